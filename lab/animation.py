"""Pictures that move: frames (n, height, width, 3), uint8, as a GIF, and as MP4 where there is an encoder."""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

COLOURS = 96  # of a GIF's palette: pictures of few colours


def gif(frames: Iterable[np.ndarray], to: Path | BinaryIO, seconds: float, hold: float = 0.0) -> None:
    """Write a GIF that goes round: each frame `seconds` long, the last `hold` longer.

    All frames have the palette of the last, which shows everything: colours do not flicker, and what stays as
    it was takes no room.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    palette = pictures[-1].quantize(COLOURS)
    first, *others = (one.quantize(palette=palette, dither=Image.Dither.NONE) for one in pictures)
    lengths = [round(1000 * seconds)] * len(pictures)
    lengths[-1] += round(1000 * hold)
    first.save(
        to, format="GIF", save_all=True, append_images=others, duration=lengths, loop=0, optimize=False
    )


def mp4(frames: Iterable[np.ndarray], path: Path, seconds: float) -> None:
    """Write an H.264 film, which every browser and telephone plays. Raises ImportError where its encoder is
    not installed, saying which it is."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError("there is no encoder for MP4: pip install imageio-ffmpeg") from error
    out = None
    for frame in frames:
        height, width = (size // 2 * 2 for size in frame.shape[:2])  # H.264 wants them even
        even = np.ascontiguousarray(frame[:height, :width])
        if out is None:
            out = imageio_ffmpeg.write_frames(
                str(path),
                (width, height),
                fps=1 / seconds,
                quality=8,
                macro_block_size=2,
                ffmpeg_log_level="error",
            )
            out.send(None)
        out.send(even)
    if out is not None:
        out.close()
