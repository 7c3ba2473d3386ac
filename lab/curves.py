"""Loss curves of one run or several, from metrics.jsonl.

    python -m lab.curves --out_dir=out/eca-char
    python -m lab.curves --out_dir=out/a,out/b --x=seconds --to=compare.png

Writes a PNG, the same that train.py draws into the run folder at each evaluation, and an HTML page with
tooltips.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from configurator import Resolved, command, setting
from fradique.training.loss_plot import (
    COLORS,
    X_AXES,
    X_LABELS,
    Y_LABEL,
    LossCurves,
    plot_losses,
    read_curves,
    smoothed_batches,
)
from lab import common, html_page

MAX_POINTS = 2000  # of a curve of batch losses on the page
IMAGE_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class CurveSettings:
    """python -m lab.curves --out_dir=out/a[,out/b ...] [--x=step|tokens|seconds] [--to=picture.png]"""

    out_dir: str = setting("out", "run folder, or several, comma-separated", path=True)
    x: str = setting("step", "x axis", choices=X_AXES)
    to: str = setting(
        "", "output file; empty: loss.png in the run folder, or losses.png in the first of several", path=True
    )
    save_arrays: str = setting("", "also write the plotted arrays to this .npz file", path=True)
    debug: bool = setting(False, "show the traceback of an error")


def curves_html(runs: list[LossCurves], x: str = "step") -> str:
    """The loss curves as HTML."""
    figure = go.Figure()
    for i, run in enumerate(runs):
        add_run(figure, run, COLORS[i % len(COLORS)], x, only_run=len(runs) == 1)
    figure.update_traces(hovertemplate="%{x:,.0f}: %{y:.4f}")
    figure.update_layout(xaxis={"title": X_LABELS[x]}, yaxis={"title": Y_LABEL}, hovermode="closest")
    return html_page.figure_html(figure, height=520)


def add_run(figure: go.Figure, run: LossCurves, color: str, x: str, only_run: bool) -> None:
    """Add the curves of a run to a figure."""
    prefix = "" if only_run else f"{run.name}: "
    solid, dashed, thin = {"color": color}, {"color": color, "dash": "dash"}, {"color": color, "width": 1}
    if len(run.batch["loss"]):
        loss, label = smoothed_batches(run)
        shown = np.unique(np.linspace(0, len(loss) - 1, MAX_POINTS).astype(int))
        xs, ys = run.batch[x][shown], loss[shown].round(4)
        figure.add_scatter(x=xs, y=ys, name=prefix + label, line=thin, opacity=0.5)
    if not len(run.evaluated["val"]):
        return
    xs, losses, mode = run.evaluated[x], run.evaluated["val"], "lines+markers"
    figure.add_scatter(x=xs, y=run.evaluated["train"], name=f"{prefix}train", line=dashed, mode=mode)
    figure.add_scatter(x=xs, y=losses, name=f"{prefix}validation", line=solid, mode=mode)
    best = int(losses.argmin())
    figure.add_scatter(
        x=xs[[best]],
        y=losses[[best]],
        name=f"{prefix}best validation {losses[best]:.3f}",
        mode="markers+text" if only_run else "markers",
        text=[f"best {losses[best]:.3f}"],
        textposition="top center",
        marker={"color": color, "symbol": "star", "size": 14},
    )


def main(resolved: Resolved[CurveSettings]) -> int:
    settings = resolved.settings
    folders = [Path(name) for name in settings.out_dir.split(",") if name]
    if not folders:
        raise ValueError("--out_dir is empty: name a run folder, such as --out_dir=out/eca-char")
    default_name = "loss.png" if len(folders) == 1 else "losses.png"
    path = Path(settings.to) if settings.to else folders[0] / default_name
    if path.suffix not in IMAGE_SUFFIXES:
        path = common.add_extension(path.with_suffix("") if path.suffix == ".html" else path, ".png")
    runs = [read_curves(folder) for folder in folders]
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_figure(plot_losses(runs, settings.x), path)
    title = "loss of " + ", ".join(run.name for run in runs)
    html_page.write_page(path.with_suffix(".html"), title, [curves_html(runs, settings.x)])
    arrays = {
        f"{run.name} {name} {column}": values
        for run in runs
        for name, columns in (("batches", run.batch), ("evaluated", run.evaluated))
        for column, values in columns.items()
    }
    common.save_arrays(settings.save_arrays, arrays)
    return 0


if __name__ == "__main__":
    sys.exit(command(main, CurveSettings))
