"""Loss curves from metrics.jsonl, drawn with matplotlib: loss.png in the run folder, and `lab.curves`."""

import contextlib
import gc
import warnings
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fradique.checkpointing import metrics_file
from fradique.io import files

X_LABELS = {"step": "step", "tokens": "training tokens", "seconds": "seconds"}
X_AXES, Y_LABEL = tuple(X_LABELS), "cross-entropy, nats per token"
# The palette of Okabe & Ito, whose colors color-blind readers can tell apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class LossCurves:
    """The losses of a run. Each dict has the columns "step", "tokens" and "seconds" too, (N,) each."""

    name: str
    batch: dict[str, np.ndarray]  # "loss": of single training batches
    evaluated: dict[str, np.ndarray]  # "train" and "val": on the fixed evaluation windows


def read_curves(folder: Path) -> LossCurves:
    """The loss curves of a run. Raises ValueError if it has no metrics."""
    batch = _Columns({"loss": "loss"})
    evaluated = _Columns({"train": "eval_train_loss", "val": "eval_val_loss"})
    for record in metrics_file.iterate_metrics(folder):
        batch.append(record)
        evaluated.append(record)
    if not len(batch) and not len(evaluated):
        raise ValueError(f"no losses to draw: {folder} has no {metrics_file.METRICS_FILE}; train a run first")
    return LossCurves(folder.name, batch.arrays(), evaluated.arrays())


class _Columns:
    """Some values of each record, in compact arrays: a long run has too many records to keep whole."""

    def __init__(self, losses: dict[str, str]) -> None:
        """losses: column name -> key in a record. The x axes are columns too."""
        self.keys = {axis: axis for axis in X_AXES} | losses
        self.columns = {name: array("d") for name in self.keys}

    def __len__(self) -> int:
        return len(self.columns[X_AXES[0]])

    def append(self, record: dict) -> None:
        """Add the values of a record, if it has them all."""
        if all(key in record for key in self.keys.values()):
            for name, key in self.keys.items():
                self.columns[name].append(record[key])

    def arrays(self) -> dict[str, np.ndarray]:
        """A float64 array (N,) for each column."""
        return {name: np.array(column) for name, column in self.columns.items()}


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and the `window` - 1 before it (fewer at the start): (N,) -> (N,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def smoothed_batches(run: LossCurves) -> tuple[np.ndarray, str]:
    """The batch losses, smoothed over 1% of the run, and the legend label for them."""
    window = max(1, len(run.batch["loss"]) // 100)
    label = "training batches" + (f" (mean of {window})" if window > 1 else "")
    return trailing_mean(run.batch["loss"], window), label


def save_plot(runs: list[LossCurves], path: Path, x: str = "step") -> None:
    """Draw the runs with `plot_losses` and write the picture, atomically."""
    save_figure(plot_losses(runs, x), path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format of the suffix of `path`, and free its memory.

    A figure is full of reference cycles. Much of it reaches the garbage collector's oldest generation while
    it is drawn, and that generation is rarely collected: without the explicit collection here, the figures
    of a long training run would accumulate.
    """
    with files.atomic_path(path, keep_suffix=True) as temporary, ignore_missing_glyphs():
        figure.savefig(temporary)
    figure.clear()
    gc.collect()


@contextlib.contextmanager
def ignore_missing_glyphs() -> Iterator[None]:
    """Suppress matplotlib's warning about text in a script that its font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def plot_losses(runs: list[LossCurves], x: str = "step") -> Figure:
    """Training and validation losses of the evaluations, with the best validation loss marked by a star.

    The losses of batches are drawn too if there is only one run, or if a run has no evaluations.
    """
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        _plot_run(axes, run, COLORS[i % len(COLORS)], x, only_run=len(runs) == 1)
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel(Y_LABEL)
    axes.set_title("loss of " + ", ".join(run.name for run in runs))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def _plot_run(axes: Axes, run: LossCurves, color: str, x: str, only_run: bool) -> None:
    prefix = "" if only_run else f"{run.name}: "
    has_evaluations = len(run.evaluated["val"]) > 0
    if len(run.batch["loss"]) and (only_run or not has_evaluations):
        loss, label = smoothed_batches(run)
        axes.plot(run.batch[x], loss, color=color, linewidth=0.8, alpha=0.45, label=prefix + label)
    if not has_evaluations:
        return
    xs, losses = run.evaluated[x], run.evaluated["val"]
    axes.plot(xs, run.evaluated["train"], color=color, linestyle="--", marker=".", label=f"{prefix}train")
    best = int(losses.argmin())
    label = f"{prefix}validation" + ("" if only_run else f", best {losses[best]:.3f}")
    axes.plot(xs, losses, color=color, marker="o", markersize=4, label=label)
    axes.plot(xs[best], losses[best], color=color, marker="*", markersize=15, linestyle="none")
    if only_run:  # the labels of several runs could overlap: their best losses are in the legend
        axes.annotate(
            f"best {losses[best]:.3f}",
            (xs[best], losses[best]),
            textcoords="offset points",
            xytext=(0, 12),
            ha="right" if best == len(losses) - 1 else "center",
            color=color,
        )
