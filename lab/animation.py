"""Write frames, (height, width, 3) uint8 each, as a GIF, or as an MP4 if an encoder is installed."""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

PALETTE_SIZE = 96  # colors of a GIF: enough for plots, and smaller files than with all 256


def write_gif(
    frames: Iterable[np.ndarray],
    output: Path | BinaryIO,
    frame_seconds: float,
    pause_seconds: float = 0.0,
) -> None:
    """Write a GIF that repeats forever. The last frame is shown `pause_seconds` longer than the others.

    All frames use the palette of the last frame, which has all colors of a plot. With one palette the colors
    do not flicker, and regions that do not change compress well.
    """
    images = [Image.fromarray(frame) for frame in frames]
    palette = images[-1].quantize(PALETTE_SIZE)
    first, *later_frames = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    durations = [round(1000 * frame_seconds)] * len(images)  # milliseconds
    durations[-1] += round(1000 * pause_seconds)
    first.save(
        output,
        format="GIF",
        save_all=True,
        append_images=later_frames,
        duration=durations,
        loop=0,
        optimize=False,
    )


def write_mp4(frames: Iterable[np.ndarray], path: Path, frame_seconds: float) -> None:
    """Write an H.264 video, which every browser and phone can play.

    Raises ImportError with the command that installs an encoder if there is none.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError("no MP4 was written: it needs an encoder, pip install imageio-ffmpeg") from error
    encoder = None
    for frame in frames:
        height, width = (size // 2 * 2 for size in frame.shape[:2])  # H.264 requires even sizes
        cropped = np.ascontiguousarray(frame[:height, :width])
        if encoder is None:
            encoder = imageio_ffmpeg.write_frames(
                str(path),
                (width, height),
                fps=1 / frame_seconds,
                quality=8,
                macro_block_size=2,
                ffmpeg_log_level="error",
            )
            encoder.send(None)  # advances the generator to where it accepts frames
        encoder.send(cropped)
    if encoder is not None:
        encoder.close()
