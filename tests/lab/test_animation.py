"""GIF and MP4 files, read back with Pillow and ffmpeg."""

import subprocess

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")

from PIL import Image

from lab import animation


def test_a_gif_has_all_its_frames_and_durations(tmp_path):
    frames = [np.zeros((20, 31, 3), np.uint8) for _ in range(6)]
    for i, frame in enumerate(frames):
        frame[:, i] = 255, 120, 0
    animation.write_gif(frames, tmp_path / "x.gif", frame_seconds=0.2, pause_seconds=1.0)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 6 and gif.size == (31, 20)
        durations = []
        for i in range(6):
            gif.seek(i)
            durations.append(gif.info["duration"])
            assert np.array_equal(np.asarray(gif.convert("RGB")), frames[i])
        assert durations == [200] * 5 + [1200]


def test_an_mp4_has_all_its_frames(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="MP4 needs imageio-ffmpeg")
    frames = [np.full((33, 64, 3), 20 * i, np.uint8) for i in range(7)]
    animation.write_mp4(frames, tmp_path / "x.mp4", frame_seconds=0.1)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "x.mp4"]
    result = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "gray", "-"], capture_output=True, check=True
    )
    log = result.stderr.decode()
    assert "Video: h264" in log and "64x32" in log and "10 fps" in log
    decoded = np.frombuffer(result.stdout, np.uint8).reshape(7, 32, 64).mean((1, 2))
    np.testing.assert_allclose(decoded, [20 * i for i in range(7)], atol=4)
