import json

import numpy as np
import pytest
from support import run_script

from fradique.training import loss_plot

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")


def write_run(folder, val=(3.0, 2.0, 2.5), steps=100):
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"step": s, "loss": 3.0 - s / steps, "tokens": 10 * s, "seconds": s / 10} for s in range(1, steps + 1)
    ]
    for i, loss in enumerate(val):
        step = i * steps // (len(val) - 1)
        where = {"step": step, "tokens": 10 * step, "seconds": step / 10}
        records.append(where | {"eval_train_loss": loss - 0.1, "eval_val_loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_the_arrays_are_what_the_run_wrote(tmp_path):
    run = loss_plot.read_curves(write_run(tmp_path / "a"))
    assert run.name == "a"
    assert run.evaluated["val"].tolist() == [3.0, 2.0, 2.5]
    assert run.evaluated["tokens"].tolist() == [0, 500, 1000]
    assert run.batch["step"].tolist() == list(range(1, 101))


def test_smooth_is_the_mean_of_the_last_values():
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert loss_plot.smooth(values, 1).tolist() == values.tolist()
    assert loss_plot.smooth(values, 2).tolist() == [1.0, 1.5, 4.0, 4.5]
    assert loss_plot.smooth(values, 100).tolist() == [1.0, 1.5, 3.0, 3.0]


@pytest.mark.parametrize("x", loss_plot.X_AXES)
def test_the_picture_is_a_png_with_something_in_it(tmp_path, x):
    from matplotlib.image import imread

    runs = [loss_plot.read_curves(write_run(tmp_path / name)) for name in ("a", "b")]
    loss_plot.save_plot(runs, tmp_path / "both.png", x)
    picture = imread(tmp_path / "both.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 700
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 10
    assert not list(tmp_path.glob(".*"))


def test_what_is_written_into_a_picture_of_several_runs_does_not_overlap(tmp_path):
    """Runs that end at the same step with nearly the same loss: their best losses are told in the legend."""
    runs = [
        loss_plot.read_curves(write_run(tmp_path / name, val=(3.0, 2.0 + i / 100)))
        for i, name in enumerate("abc")
    ]
    figure = loss_plot.plot_losses(runs)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts() if "validation" in text.get_text()] == [
        "a: validation, best 2.000", "b: validation, best 2.010", "c: validation, best 2.020"
    ]  # fmt: skip
    assert not axes.texts
    (text,) = loss_plot.plot_losses(runs[:1]).axes[0].texts
    assert text.get_text() == "best 2.000"


def test_runs_compared_leave_the_picture_that_each_has_of_itself(tmp_path):
    folders = [write_run(tmp_path / name) for name in "ab"]
    (folders[0] / "loss.png").write_bytes(b"its own")
    done = run_script("lab.curves", f"--out_dir={folders[0]},{folders[1]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "wrote",
        str(folders[0] / "losses.png"),
        "wrote",
        str(folders[0] / "losses.html"),
    ]
    assert (folders[0] / "loss.png").read_bytes() == b"its own"


def test_a_run_of_one_evaluation_can_be_drawn(tmp_path):
    write_run(tmp_path / "a", steps=1, val=(3.0, 2.9))
    loss_plot.save_plot([loss_plot.read_curves(tmp_path / "a")], tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_a_folder_without_metrics_gets_a_message(tmp_path):
    with pytest.raises(ValueError, match=r"holds no metrics.jsonl to draw"):
        loss_plot.read_curves(tmp_path)


def test_the_command_writes_where_it_says(tmp_path):
    write_run(tmp_path / "a")
    done = run_script("lab.curves", f"--out_dir={tmp_path / 'a'}")
    assert done.returncode == 0, done.stderr
    written = [tmp_path / "a" / name for name in ("loss.png", "loss.html")]
    assert done.stdout == "".join(f"wrote {path}\n" for path in written)
    page = written[1].read_text(encoding="utf-8")
    assert "best validation" in page and "<script src" not in page
    done = run_script("lab.curves", f"--out_dir={tmp_path / 'a'}", f"--save_arrays={tmp_path / 'x.npz'}")
    assert done.returncode == 0, done.stderr
    held = np.load(tmp_path / "x.npz")
    assert held["a evaluated val"].tolist() == loss_plot.read_curves(tmp_path / "a").evaluated["val"].tolist()
    done = run_script("lab.curves", f"--out_dir={tmp_path}")
    assert done.returncode == 2 and "holds no metrics.jsonl" in done.stderr
