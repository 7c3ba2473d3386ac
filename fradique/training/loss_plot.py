"""TODO."""

import warnings
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fradique.checkpointing import metrics_file
from fradique.io import files

X_TITLES = {"step": "step", "tokens": "tokens trained on", "seconds": "seconds"}
X_AXES, Y_TITLE = tuple(X_TITLES), "cross-entropy, nats a token"
# Okabe & Ito's colours, which colour-blind readers can tell apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class LossCurves:
    """What a run's picture shows. Each curve has a place on every x axis: {"step": (N,), "tokens": …}."""

    name: str
    batch: dict[str, np.ndarray]  # the loss of single batches, under "loss"
    evaluated: dict[str, np.ndarray]  # on the fixed windows, under "train" and "val"


def read_curves(folder: Path) -> LossCurves:
    """The curves of a run. Raises ValueError where it has no metrics."""
    batch, evaluated = (
        Columns({"loss": "loss"}),
        Columns({"train": "eval_train_loss", "val": "eval_val_loss"}),
    )
    for record in metrics_file.iterate_metrics(folder):
        batch.add(record)
        evaluated.add(record)
    if not len(batch) and not len(evaluated):
        raise ValueError(f"{folder} holds no {metrics_file.METRICS_FILE} to draw: train a run there first")
    return LossCurves(folder.name, batch.arrays(), evaluated.arrays())


class Columns:
    """Numbers of records, gathered without the records: a long run has many."""

    def __init__(self, names: dict[str, str]) -> None:
        self.keys = {axis: axis for axis in X_AXES} | names  # what each column is called in a record
        self.columns = {name: array("d") for name in self.keys}

    def __len__(self) -> int:
        return len(self.columns[X_AXES[0]])

    def add(self, record: dict) -> None:
        """The numbers of a record, where it has them all."""
        if all(key in record for key in self.keys.values()):
            for name, key in self.keys.items():
                self.columns[name].append(record[key])

    def arrays(self) -> dict[str, np.ndarray]:
        """A float64 array (N,) for each x axis and each name."""
        return {name: np.array(column) for name, column in self.columns.items()}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and the `window` - 1 before it (fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def save_plot(runs: list[LossCurves], path: Path, x: str = "step") -> None:
    """Write the picture of `picture`."""
    write_figure(path, plot_losses(runs, x).savefig)


def plot_losses(runs: list[LossCurves], x: str = "step") -> Figure:
    """Evaluations thick, the best validation loss marked, and of one run alone its batches, thin."""
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        _plot_run(axes, run, COLORS[i % len(COLORS)], x, alone=len(runs) == 1)
    axes.set_xlabel(X_TITLES[x])
    axes.set_ylabel(Y_TITLE)
    axes.set_title("loss of " + ", ".join(run.name for run in runs))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def write_figure(path: Path, make: Callable[[Path], None]) -> None:
    """Let `make` write a file beside `path`, then put it there whole."""
    with (
        files.atomic_path(path, keep_suffix=True) as temporary,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks
        make(temporary)


def smoothed_batches(run: LossCurves) -> tuple[np.ndarray, str]:
    """The losses of batches, smoothed for the eye, and what to call them."""
    window = max(1, len(run.batch["loss"]) // 100)
    label = "training batches" + (f" (mean of {window})" if window > 1 else "")
    return smooth(run.batch["loss"], window), label


def _plot_run(axes: Axes, run: LossCurves, colour: str, x: str, alone: bool) -> None:
    prefix = "" if alone else f"{run.name}: "
    if len(run.batch["loss"]) and (alone or not len(run.evaluated["val"])):
        loss, label = smoothed_batches(run)
        axes.plot(run.batch[x], loss, color=colour, linewidth=0.8, alpha=0.45, label=prefix + label)
    if not len(run.evaluated["val"]):
        return
    places, losses = run.evaluated[x], run.evaluated["val"]
    axes.plot(
        places, run.evaluated["train"], color=colour, linestyle="--", marker=".", label=f"{prefix}train"
    )
    best = int(losses.argmin())
    name = f"{prefix}validation" + ("" if alone else f", best {losses[best]:.3f}")
    axes.plot(places, losses, color=colour, marker="o", markersize=4, label=name)
    axes.plot(places[best], losses[best], color=colour, marker="*", markersize=15, linestyle="none")
    if not alone:  # several stars may stand side by side: the legend tells
        return
    axes.annotate(
        f"best {losses[best]:.3f}",
        (places[best], losses[best]),
        textcoords="offset points",
        xytext=(0, 12),
        ha="right" if best == len(losses) - 1 else "center",
        color=colour,
    )
