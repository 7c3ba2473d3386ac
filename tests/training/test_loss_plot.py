"""Loss curves: read from metrics.jsonl and drawn."""

import gc
import json
import weakref

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")

from matplotlib.image import imread

from fradique.training import loss_plot


def write_run(folder, val=(3.0, 2.0, 2.5), steps=100):
    """A run folder with a batch loss at each step, and evaluations at equal distances."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"step": s, "loss": 3.0 - s / steps, "tokens": 10 * s, "seconds": s / 10} for s in range(1, steps + 1)
    ]
    for i, loss in enumerate(val):
        step = i * steps // (len(val) - 1)
        axes = {"step": step, "tokens": 10 * step, "seconds": step / 10}
        records.append(axes | {"eval_train_loss": loss - 0.1, "eval_val_loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_curves_have_the_values_in_the_metrics(tmp_path):
    run = loss_plot.read_curves(write_run(tmp_path / "a"))
    assert run.name == "a"
    assert run.evaluated["val"].tolist() == [3.0, 2.0, 2.5]
    assert run.evaluated["tokens"].tolist() == [0, 500, 1000]
    assert run.batch["step"].tolist() == list(range(1, 101))


def test_trailing_mean_averages_the_last_values():
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert loss_plot.trailing_mean(values, 1).tolist() == values.tolist()
    assert loss_plot.trailing_mean(values, 2).tolist() == [1.0, 1.5, 4.0, 4.5]
    assert loss_plot.trailing_mean(values, 100).tolist() == [1.0, 1.5, 3.0, 3.0]


@pytest.mark.parametrize("x", loss_plot.X_AXES)
def test_the_plot_is_a_png_that_is_not_blank(tmp_path, x):
    runs = [loss_plot.read_curves(write_run(tmp_path / name)) for name in ("a", "b")]
    loss_plot.save_plot(runs, tmp_path / "both.png", x)
    picture = imread(tmp_path / "both.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 700
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 10
    assert not list(tmp_path.glob(".*"))


def test_labels_of_several_runs_do_not_overlap(tmp_path):
    """Runs that end at the same step with nearly the same loss: their best losses are in the legend."""
    runs = [
        loss_plot.read_curves(write_run(tmp_path / name, val=(3.0, 2.0 + i / 100)))
        for i, name in enumerate("abc")
    ]
    (axes,) = loss_plot.plot_losses(runs).axes
    assert [text.get_text() for text in axes.get_legend().get_texts() if "validation" in text.get_text()] == [
        "a: validation, best 2.000", "b: validation, best 2.010", "c: validation, best 2.020"
    ]  # fmt: skip
    assert not axes.texts
    (text,) = loss_plot.plot_losses(runs[:1]).axes[0].texts
    assert text.get_text() == "best 2.000"


def test_a_run_with_two_evaluations_one_step_apart_is_drawn(tmp_path):
    write_run(tmp_path / "a", steps=1, val=(3.0, 2.9))
    loss_plot.save_plot([loss_plot.read_curves(tmp_path / "a")], tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_a_folder_without_metrics_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"metrics.jsonl is missing"):
        loss_plot.read_curves(tmp_path)


def test_saving_a_figure_frees_its_memory(tmp_path):
    figure = loss_plot.plot_losses([loss_plot.read_curves(write_run(tmp_path / "a"))])
    axes = weakref.ref(figure.axes[0])
    gc.disable()  # only the explicit collection in save_figure frees the reference cycles
    try:
        loss_plot.save_figure(figure, tmp_path / "a.png")
        assert axes() is None
    finally:
        gc.enable()
