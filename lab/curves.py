"""Loss curves of one run or several, from metrics.jsonl.

    python -m lab.curves --out_dir=out/eca-char
    python -m lab.curves --out_dir=out/a,out/b --x=seconds --to=compare.png

`train.py` draws the same picture into the run folder at each evaluation.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configurator import Resolved, command, setting
from fradique import metrics

X_AXES = ("step", "tokens", "seconds")
# Okabe & Ito's colours, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class CurveSettings:
    """python -m lab.curves --out_dir=out/a[,out/b ...] [--x=step|tokens|seconds] [--to=picture.png]"""

    out_dir: str = setting("out", "the run folder, or several with commas between them")
    x: str = setting("step", "the axis", choices=X_AXES)
    to: str = setting("", "the picture; empty: loss.png in the first run folder")


@dataclass(frozen=True)
class Curves:
    """What a run's picture shows. Each curve has a place on every x axis: {"step": (N,), "tokens": …}."""

    name: str
    batch: dict[str, np.ndarray]  # the loss of single batches, under "loss"
    evaluated: dict[str, np.ndarray]  # on the fixed windows, under "train" and "val"


def read(folder: Path) -> Curves:
    """The curves of a run. Raises ValueError where it has no metrics."""
    records = metrics.read(folder)
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval_val_loss" in record]
    if not steps and not evaluations:
        raise ValueError(f"{folder} holds no {metrics.METRICS} to draw: train a run there first")
    return Curves(
        folder.name,
        columns(steps, {"loss": "loss"}),
        columns(evaluations, {"train": "eval_train_loss", "val": "eval_val_loss"}),
    )


def columns(records: list[dict], names: dict[str, str]) -> dict[str, np.ndarray]:
    """Records -> a float64 array (N,) for each x axis and each name."""
    wanted = {axis: axis for axis in X_AXES} | names
    return {name: np.array([record[key] for record in records], float) for name, key in wanted.items()}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and the `window` - 1 before it (fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(runs: list[Curves], path: Path, x: str = "step") -> None:
    """Write the picture: batch losses thin, evaluations thick, the best validation loss marked."""
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for run, colour in zip(runs, [COLOURS[i % len(COLOURS)] for i in range(len(runs))], strict=True):
        draw_run(axes, run, colour, x, prefix=f"{run.name}: " if len(runs) > 1 else "")
    axes.set_xlabel({"step": "step", "tokens": "tokens trained on", "seconds": "seconds"}[x])
    axes.set_ylabel("cross-entropy, nats a token")
    axes.set_title("loss of " + ", ".join(run.name for run in runs))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    beside = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        figure.savefig(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def draw_run(axes: Axes, run: Curves, colour: str, x: str, prefix: str) -> None:
    if len(run.batch["loss"]):
        window = max(1, len(run.batch["loss"]) // 100)
        label = f"{prefix}training batches" + (f" (mean of {window})" if window > 1 else "")
        loss = smooth(run.batch["loss"], window)
        axes.plot(run.batch[x], loss, color=colour, linewidth=0.8, alpha=0.45, label=label)
    if not len(run.evaluated["val"]):
        return
    places, losses = run.evaluated[x], run.evaluated["val"]
    axes.plot(
        places, run.evaluated["train"], color=colour, linestyle="--", marker=".", label=f"{prefix}train"
    )
    axes.plot(places, losses, color=colour, marker="o", markersize=4, label=f"{prefix}validation")
    best = int(losses.argmin())
    axes.plot(places[best], losses[best], color=colour, marker="*", markersize=15, linestyle="none")
    axes.annotate(
        f"best {losses[best]:.3f}",
        (places[best], losses[best]),
        textcoords="offset points",
        xytext=(0, 12),
        ha="right" if best == len(losses) - 1 else "center",
        color=colour,
    )


def main(resolved: Resolved[CurveSettings]) -> int:
    settings = resolved.settings
    folders = [Path(name) for name in settings.out_dir.split(",") if name]
    if not folders:
        raise ValueError("--out_dir names no run folder")
    path = Path(settings.to) if settings.to else folders[0] / "loss.png"
    draw([read(folder) for folder in folders], path, settings.x)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main, CurveSettings))
