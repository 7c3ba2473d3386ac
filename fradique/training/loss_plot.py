"""Loss curves from metrics.jsonl, drawn with matplotlib for loss.png in the run folder and for lab.curves."""

import contextlib
import gc
import warnings
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import ScalarFormatter

from fradique.checkpointing import metrics_file
from fradique.io import files

X_LABELS = {"step": "step", "tokens": "training tokens", "seconds": "seconds"}  # key of a record -> label
X_AXES = tuple(X_LABELS)
Y_LABEL = "cross-entropy, nats per token"
# The palette of Okabe & Ito, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Parameters of matplotlib with which it parses no text as mathtext or TeX.
LITERAL_TEXT = {"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False}


@dataclass(frozen=True)
class LossCurves:
    """The losses of a run. Both tables also have the columns of X_AXES; each column is (N,)."""

    name: str
    batch: dict[str, np.ndarray]  # "loss": of each training step that was logged
    evaluated: dict[str, np.ndarray]  # "train" and "val": of each evaluation, on its fixed windows


def read_curves(folder: Path) -> LossCurves:
    """The loss curves of a run folder. Raises ValueError if it has no losses."""
    batch = _Columns({"loss": "loss"})
    evaluated = _Columns({"train": "eval_train_loss", "val": "eval_val_loss"})
    for record in metrics_file.iterate_metrics(folder):
        batch.append(record)
        evaluated.append(record)
    if not len(batch) and not len(evaluated):
        path = folder / metrics_file.METRICS_FILE
        raise ValueError(f"no losses to draw: {path} is missing or has no losses; train a run first")
    return LossCurves(run_name(folder), batch.arrays(), evaluated.arrays())


def run_name(folder: Path) -> str:
    """The name of a run folder, to be drawn or printed."""
    return escape_unprintable(folder.absolute().name)  # absolute: Path(".") has no name


def escape_unprintable(text: str) -> str:
    """Replace unprintable characters, such as control characters, by ‹their code›."""
    return "".join(c if c.isprintable() else f"‹{ord(c):x}›" for c in text)


class _Columns:
    """A table with a row for each record that has all its keys.

    The columns are compact arrays, because all records of a long run as dicts would take too much memory.
    """

    def __init__(self, losses: dict[str, str]) -> None:
        """losses: column name -> key in a record. X_AXES are added as columns."""
        self.keys = {axis: axis for axis in X_AXES} | losses
        self.columns = {name: array("d") for name in self.keys}

    def __len__(self) -> int:
        return len(self.columns[X_AXES[0]])

    def append(self, record: dict) -> None:
        """Add a row for a record, if it has all keys."""
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
    """Draw the runs with `plot_losses` and write the figure to `path`, atomically."""
    save_figure(plot_losses(runs, x), path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format of the suffix of `path`, and free its memory.

    A figure contains many reference cycles, which only the garbage collector frees. While a figure is drawn,
    much of it moves to the collector's oldest generation, which is rarely collected. Without the explicit
    collection the figures of a long training run would fill the memory.
    """
    with files.atomic_path(path, keep_suffix=True) as temporary, literal_text(figure):
        figure.savefig(temporary)
    figure.clear()
    gc.collect()


@contextlib.contextmanager
def literal_text(figure: Figure) -> Iterator[None]:
    """Draw the figure inside this context: all its text then appears as it is written.

    Without it, matplotlib draws what is between two "$" as mathematics, or raises an error. matplotlib's
    warnings about characters that its font does not have are suppressed.
    """
    with (
        warnings.catch_warnings(),
        matplotlib.rc_context(LITERAL_TEXT),
    ):  # for text that is made while drawing
        warnings.filterwarnings("ignore", message="Glyph|Matplotlib currently does not support")
        for text in figure.findobj(Text):
            text.set_parse_math(False)
            text.set_usetex(False)
        for axis in figure.findobj(Axis):
            if isinstance(axis.get_major_formatter(), ScalarFormatter):
                axis.set_major_formatter(ScalarFormatter())  # a user's matplotlibrc may make it write "$1$"
        yield


def legend_label(text: str) -> str:
    """A label that appears in the legend: matplotlib leaves out labels that begin with "_"."""
    return f" {text}" if text.startswith("_") else text


def plot_losses(runs: list[LossCurves], x: str = "step") -> Figure:
    """Draw the training and validation losses of each evaluation, with a star at the best validation loss.

    x: one of X_AXES. The losses of training batches are drawn if there is only one run, and for a run without
    evaluations.
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
    """Draw one run; only_run: it is the only one in the figure, so labels do not need its name."""
    prefix = "" if only_run else legend_label(f"{run.name}: ")
    has_evaluations = len(run.evaluated["val"]) > 0
    if len(run.batch["loss"]) and (only_run or not has_evaluations):
        batch_losses, label = smoothed_batches(run)
        axes.plot(run.batch[x], batch_losses, color=color, linewidth=0.8, alpha=0.45, label=prefix + label)
    if not has_evaluations:
        return
    xs, losses = run.evaluated[x], run.evaluated["val"]
    axes.plot(xs, run.evaluated["train"], color=color, linestyle="--", marker=".", label=f"{prefix}train")
    best = int(losses.argmin())
    label = f"{prefix}validation" + ("" if only_run else f", best {losses[best]:.3f}")
    axes.plot(xs, losses, color=color, marker="o", markersize=4, label=label)
    axes.plot(xs[best], losses[best], color=color, marker="*", markersize=15, linestyle="none")
    if only_run:  # annotations of several runs could overlap
        axes.annotate(
            f"best {losses[best]:.3f}",
            (xs[best], losses[best]),
            textcoords="offset points",
            xytext=(0, 12),
            ha="right" if best == len(losses) - 1 else "center",
            color=color,
        )
