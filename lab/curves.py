"""Loss curves of one run or several, from metrics.jsonl.

    python -m lab.curves --out_dir=out/eca-char
    python -m lab.curves --out_dir=out/a,out/b --x=seconds --to=compare.png

Writes PNG, and HTML to point at. `train.py` draws the same PNG into the run folder at each evaluation, with
matplotlib alone; the command needs plotly too (both are in the extra `lab`).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import Resolved, command, setting
from fradique.training.loss_plot import (
    COLORS,
    X_AXES,
    X_TITLES,
    Y_TITLE,
    LossCurves,
    read_curves,
    save_plot,
    smoothed_batches,
)

MOST_POINTS = 2000  # of a curve of batches, in a page


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


def figure(runs: list[LossCurves], x: str = "step") -> str:
    """The same picture to point at, a part of a page."""
    from lab import html_page  # not above: train.py draws without plotly

    made = html_page.go.Figure()
    for i, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        colour = {"color": COLORS[i % len(COLORS)]}
        if len(run.batch["loss"]):
            loss, label = smoothed_batches(run)
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
    return html_page.figure(made, height=520)


def main(resolved: Resolved[CurveSettings]) -> int:
    from lab import (
        common,  # not above: train.py draws without plotly
        html_page,
    )

    settings = resolved.settings
    folders = [Path(name) for name in settings.out_dir.split(",") if name]
    if not folders:
        raise ValueError("--out_dir names no run folder")
    path = (
        Path(settings.to) if settings.to else folders[0] / ("loss.png" if len(folders) == 1 else "losses.png")
    )
    path = path if path.suffix not in ("", ".html") else path.with_suffix(".png")
    runs = [read_curves(folder) for folder in folders]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_plot(runs, path, settings.x)
    print(f"wrote {path}")
    title = "loss of " + ", ".join(run.name for run in runs)
    html_page.write(path.with_suffix(".html"), title, [figure(runs, settings.x)])
    common.save_arrays(
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
