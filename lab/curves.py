"""Loss curves of one run or several, from metrics.jsonl.

    python -m lab.curves --out_dir=out/eca-char
    python -m lab.curves --out_dir=out/a,out/b --x=seconds --to=compare.png

Writes PNG, and HTML to point at. `train.py` draws the same PNG into the run folder at each evaluation, with
matplotlib alone; the command needs plotly too (both are in the extra `lab`).
"""

import sys
import warnings
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configurator import Resolved, command, setting
from fradique import metrics

X_TITLES = {"step": "step", "tokens": "tokens trained on", "seconds": "seconds"}
X_AXES, Y_TITLE = tuple(X_TITLES), "cross-entropy, nats a token"
MOST_POINTS = 2000  # of a curve of batches, in a page
# Okabe & Ito's colours, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class CurveSettings:
    """python -m lab.curves --out_dir=out/a[,out/b ...] [--x=step|tokens|seconds] [--to=picture.png]"""

    out_dir: str = setting("out", "the run folder, or several with commas between them")
    x: str = setting("step", "the axis", choices=X_AXES)
    to: str = setting(
        "", "the picture; empty: loss.png in the run folder; of several runs losses.png in the first"
    )
    save_arrays: str = setting("", "keep the numbers of the pictures too, in this .npz")
    debug: bool = setting(False, "show the traceback of an error")


@dataclass(frozen=True)
class Curves:
    """What a run's picture shows. Each curve has a place on every x axis: {"step": (N,), "tokens": …}."""

    name: str
    batch: dict[str, np.ndarray]  # the loss of single batches, under "loss"
    evaluated: dict[str, np.ndarray]  # on the fixed windows, under "train" and "val"


def read(folder: Path) -> Curves:
    """The curves of a run. Raises ValueError where it has no metrics."""
    batch, evaluated = (
        Columns({"loss": "loss"}),
        Columns({"train": "eval_train_loss", "val": "eval_val_loss"}),
    )
    for record in metrics.records(folder):
        batch.add(record)
        evaluated.add(record)
    if not len(batch) and not len(evaluated):
        raise ValueError(f"{folder} holds no {metrics.METRICS} to draw: train a run there first")
    return Curves(folder.name, batch.arrays(), evaluated.arrays())


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


def draw(runs: list[Curves], path: Path, x: str = "step") -> None:
    """Write the picture of `picture`."""
    write_beside(path, picture(runs, x).savefig)


def picture(runs: list[Curves], x: str = "step") -> Figure:
    """Evaluations thick, the best validation loss marked, and of one run alone its batches, thin."""
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        draw_run(axes, run, COLOURS[i % len(COLOURS)], x, alone=len(runs) == 1)
    axes.set_xlabel(X_TITLES[x])
    axes.set_ylabel(Y_TITLE)
    axes.set_title("loss of " + ", ".join(run.name for run in runs))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def write_beside(path: Path, make: Callable[[Path], None]) -> None:
    """Let `make` write a file beside `path`, then put it there whole."""
    beside = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks
            make(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def batches(run: Curves) -> tuple[np.ndarray, str]:
    """The losses of batches, smoothed for the eye, and what to call them."""
    window = max(1, len(run.batch["loss"]) // 100)
    label = "training batches" + (f" (mean of {window})" if window > 1 else "")
    return smooth(run.batch["loss"], window), label


def draw_run(axes: Axes, run: Curves, colour: str, x: str, alone: bool) -> None:
    prefix = "" if alone else f"{run.name}: "
    if len(run.batch["loss"]) and (alone or not len(run.evaluated["val"])):
        loss, label = batches(run)
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


def figure(runs: list[Curves], x: str = "step") -> str:
    """The same picture to point at, a part of a page."""
    from lab import pages  # not above: train.py draws without plotly

    made = pages.go.Figure()
    for i, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        colour = {"color": COLOURS[i % len(COLOURS)]}
        if len(run.batch["loss"]):
            loss, label = batches(run)
            some = np.unique(np.linspace(0, len(loss) - 1, MOST_POINTS).astype(int))
            line = colour | {"width": 1}
            made.add_scatter(
                x=run.batch[x][some], y=loss[some].round(4), name=prefix + label, line=line, opacity=0.5
            )
        if not len(run.evaluated["val"]):
            continue
        places, losses = run.evaluated[x], run.evaluated["val"]
        both = {"mode": "lines+markers"}
        made.add_scatter(
            x=places, y=run.evaluated["train"], name=f"{prefix}train", line=colour | {"dash": "dash"}, **both
        )
        made.add_scatter(x=places, y=losses, name=f"{prefix}validation", line=colour, **both)
        best = int(losses.argmin())
        made.add_scatter(
            x=places[[best]],
            y=losses[[best]],
            name=f"{prefix}best validation {losses[best]:.3f}",
            mode="markers+text" if len(runs) == 1 else "markers",
            text=[f"best {losses[best]:.3f}"],
            textposition="top center",
            marker=colour | {"symbol": "star", "size": 14},
        )
    made.update_traces(hovertemplate="%{x:,.0f}: %{y:.4f}")
    made.update_layout(xaxis={"title": X_TITLES[x]}, yaxis={"title": Y_TITLE}, hovermode="closest")
    return pages.figure(made, height=520)


def main(resolved: Resolved[CurveSettings]) -> int:
    from lab import look, pages  # not above: train.py draws without plotly

    settings = resolved.settings
    folders = [Path(name) for name in settings.out_dir.split(",") if name]
    if not folders:
        raise ValueError("--out_dir names no run folder")
    path = (
        Path(settings.to) if settings.to else folders[0] / ("loss.png" if len(folders) == 1 else "losses.png")
    )
    path = path if path.suffix not in ("", ".html") else path.with_suffix(".png")
    runs = [read(folder) for folder in folders]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, path, settings.x)
    print(f"wrote {path}")
    title = "loss of " + ", ".join(run.name for run in runs)
    pages.write(path.with_suffix(".html"), title, [figure(runs, settings.x)])
    look.save_arrays(
        settings.save_arrays,
        {
            f"{run.name} {name} {axis}": values
            for run in runs
            for name, curve in (("batches", run.batch), ("evaluated", run.evaluated))
            for axis, values in curve.items()
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(command(main, CurveSettings))
