"""The command that draws the loss curves of one run or several."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import run_script, run_training

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")

from fradique.training import loss_plot


def test_comparing_runs_keeps_the_loss_png_of_each(settings, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        run_training(replace(settings, out_dir=str(folder), max_iters=5))
    (folders[0] / "loss.png").write_bytes(b"of the run itself")
    result = run_script("lab.curves", f"--out_dir={folders[0]},{folders[1]}")
    assert result.returncode == 0, result.stderr
    written = [folders[0] / "losses.png", folders[0] / "losses.html"]
    assert result.stdout.split() == ["wrote", str(written[0]), "wrote", str(written[1])]
    assert (folders[0] / "loss.png").read_bytes() == b"of the run itself"


def test_the_command_writes_png_page_and_arrays(settings, tmp_path):
    run_training(settings)
    folder = Path(settings.out_dir)
    result = run_script("lab.curves", f"--out_dir={folder}")
    assert result.returncode == 0, result.stderr
    written = [folder / name for name in ("loss.png", "loss.html")]
    assert result.stdout == "".join(f"wrote {path}\n" for path in written)
    page = written[1].read_text(encoding="utf-8")
    assert "best validation" in page and "<script src" not in page
    result = run_script("lab.curves", f"--out_dir={folder}", f"--save_arrays={tmp_path / 'x.npz'}")
    assert result.returncode == 0, result.stderr
    arrays = np.load(tmp_path / "x.npz")
    expected = loss_plot.read_curves(folder).evaluated["val"].tolist()
    assert arrays["run evaluated val"].tolist() == expected
    result = run_script("lab.curves", f"--out_dir={tmp_path}")
    assert result.returncode == 2 and "metrics.jsonl is missing" in result.stderr
