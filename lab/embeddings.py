"""Token and position embeddings in two dimensions, before and after training.

    python -m lab.embeddings --out_dir=out/eca-char
    python -m lab.embeddings --out_dir=out/eca-char --groups="vowels=aeiou;digits=0123456789"

Draws two projections. PCA shows the two directions in which the embeddings vary most. t-SNE (van der Maaten &
Hinton 2008) keeps neighbors together, but its larger distances have no meaning. Writes PNG, and HTML with
tooltips.

Shapes: n tokens, C embedding width, P positions.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from configurator import Resolved, setting
from fradique.checkpointing import run_folder
from fradique.training.loss_plot import COLORS, legend_label
from lab import common, html_page
from lab.token_groups import token_groups
from model import GPT, GPTConfig
from sample import LoadedModel

METHOD_NAMES = {"pca": "PCA", "tsne": "t-SNE"}
# (kind, method, time) -> (n, 2) or (P, 2). kind: tokens or positions; method: a key of METHOD_NAMES;
# time: "before training" or "after training"
Projections = dict[tuple[str, str, str], np.ndarray]
MARKERS = "osD^vPX*"  # each group has a marker in addition to its color, for color-blind readers
MAX_LABELS = 200  # with more tokens than this, the points have no labels
LINE_COLOR = "#9aa0a6"
PLOTLY_AXES = {"xaxis": {"visible": False}, "yaxis": {"visible": False, "scaleanchor": "x"}}


@dataclass(frozen=True)
class EmbeddingSettings(common.ModelSettings):
    """python -m lab.embeddings --out_dir=out/<run> [--groups="vowels=aeiou;digits=0123456789"]"""

    most: int = setting(
        600, "draw at most so many tokens, the first ones (in BPE the most frequent)", lo=10, group="picture"
    )
    groups: str = setting(
        "", 'groups with a color: "name=characters;name=characters"; empty: kinds of letters'
    )
    perplexity: float = setting(15.0, "of t-SNE: roughly, how many neighbors a token keeps", lo=1.0)
    seed: int = setting(0, "random seed of t-SNE", lo=0, hi=2**31)


# Compute


@dataclass(frozen=True)
class EmbeddingTables:
    """The embeddings of a model."""

    tokens: np.ndarray  # (n, C)
    positions: np.ndarray | None  # (P, C); None if the model has no learned positional embedding


def read_embeddings(model: GPT, max_tokens: int) -> EmbeddingTables:
    """The embeddings of the first `max_tokens` tokens, and of all positions."""
    wpe = model.transformer["wpe"].weight if "wpe" in model.transformer else None
    tokens = model.transformer["wte"].weight[:max_tokens].detach().float().cpu().numpy()
    return EmbeddingTables(tokens, None if wpe is None else wpe.detach().float().cpu().numpy())


def initial_model(config: GPTConfig, seed: int) -> GPT:
    """The model with the random weights that train.py gave it before training."""
    torch.manual_seed(seed)
    return GPT(config)


def embeddings_by_time(loaded: LoadedModel, settings: EmbeddingSettings) -> dict[str, EmbeddingTables]:
    """Time -> embeddings: "before training", if the run started from scratch, and "after training"."""
    max_tokens = min(settings.most, loaded.tokenizer.vocab_size)
    after = {"after training": read_embeddings(loaded.model, max_tokens)}
    if settings.init_from:
        return after
    saved = run_folder.saved_settings(Path(settings.out_dir))
    if saved.get("init_from") != "scratch":
        return after
    model = initial_model(loaded.model.config, saved["seed"])
    return {"before training": read_embeddings(model, max_tokens)} | after


def project(
    points: np.ndarray, method: str, perplexity: float = 15.0, seed: int = 0, init: np.ndarray | None = None
) -> np.ndarray:
    """Project points (n, C) to (n, 2). method: a key of METHOD_NAMES.

    perplexity, seed, init: for t-SNE only. init (n, 2): the points to start from, which then move only a
    little; None: start from the PCA.
    """
    if method == "pca":
        return PCA(2, svd_solver="full").fit_transform(points)
    perplexity = min(perplexity, max(1.0, (len(points) - 1) / 3))  # it must be less than the number of points
    if init is None:
        pca = project(points, "pca")
        # a standard deviation of 1e-4, as in scikit-learn's init="pca"
        options = {"init": (pca / max(pca[:, 0].std(), 1e-12) * 1e-4).astype(np.float32)}
    else:  # no early exaggeration, which would first pull all points together
        options = {"init": init.astype(np.float32), "early_exaggeration": 1.0, "max_iter": 300}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TSNE(2, perplexity=perplexity, random_state=seed, **options).fit_transform(points)


def project_all(tables_by_time: dict[str, EmbeddingTables], settings: EmbeddingSettings) -> Projections:
    """Project tokens and positions at each time with each method. Tables of up to 3 rows are left out."""
    return {
        (kind, method, time): project(points, method, settings.perplexity, settings.seed)
        for time, tables in tables_by_time.items()
        for kind, points in (("tokens", tables.tokens), ("positions", tables.positions))
        if points is not None and len(points) > 3
        for method in METHOD_NAMES
    }


# Draw with matplotlib


def draw_projections(projections: Projections, labels: list[str], groups: np.ndarray) -> Figure:
    """A grid with a row for tokens and one for positions, and a column for each method and time.

    labels, groups: of the tokens, (n,) each.
    """
    kinds = [kind for kind in ("tokens", "positions") if any(key[0] == kind for key in projections)]
    times = list(dict.fromkeys(time for _, _, time in projections))  # without duplicates, in order
    columns = [(method, time) for method in METHOD_NAMES for time in times]
    size = (4.4 * len(columns), 4.4 * len(kinds) + 0.8)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(len(kinds), len(columns), squeeze=False)
    for i, kind in enumerate(kinds):
        for j, (method, time) in enumerate(columns):
            axes = grid[i][j]
            if kind == "tokens":
                draw_tokens(axes, projections[kind, method, time], labels, groups)
            else:
                draw_positions(axes, projections[kind, method, time])
            axes.set_title(f"{kind}, {METHOD_NAMES[method]}, {time}", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def group_styles(groups: np.ndarray) -> dict[str, tuple[str, str]]:
    """Group -> (color, marker). The largest groups come first, and get different colors."""
    names, counts = np.unique(groups, return_counts=True)
    ordered = names[np.argsort(-counts, kind="stable")].tolist()
    return {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(ordered)}


def draw_tokens(axes: Axes, points: np.ndarray, labels: list[str], groups: np.ndarray) -> None:
    """Draw the tokens' points (n, 2) in the colors of their groups, with labels up to MAX_LABELS tokens."""
    with_labels = len(labels) <= MAX_LABELS
    styles = group_styles(groups)
    for group, (color, marker) in styles.items():
        x, y = points[groups == group].T
        axes.scatter(
            x, y, s=6 if with_labels else 10, color=color, marker=marker, label=legend_label(group), alpha=0.8
        )
    if with_labels:
        for (x, y), label, group in zip(points, labels, groups.tolist(), strict=True):
            color = styles[group][0]
            axes.annotate(label, (x, y), (2, 2), textcoords="offset points", fontsize=8, color=color)


def draw_positions(axes: Axes, points: np.ndarray) -> None:
    """Draw the positions' points (P, 2), from dark to bright, joined by a line; some with their number."""
    axes.plot(points[:, 0], points[:, 1], color=LINE_COLOR, linewidth=0.7, zorder=1)
    axes.scatter(points[:, 0], points[:, 1], c=range(len(points)), cmap="cividis", s=9, zorder=2)
    interval = max(1, len(points) // 8)
    for i in range(0, len(points), interval):
        axes.annotate(str(i), points[i], (3, 3), textcoords="offset points", fontsize=8)


# Draw with plotly


def projections_html(projections: Projections, labels: list[str], groups: np.ndarray) -> list[str]:
    """The HTML of a figure for each projection."""
    figures = []
    for (kind, method, time), points in projections.items():
        title = f"{kind}, {METHOD_NAMES[method]}, {time}"
        if kind == "tokens":
            figures.append(tokens_html(points, labels, groups, title))
        else:
            figures.append(positions_html(points, title))
    return figures


def tokens_html(points: np.ndarray, labels: list[str], groups: np.ndarray, title: str) -> str:
    """The tokens' points (n, 2) as HTML."""
    figure = go.Figure()
    for group, (color, _) in group_styles(groups).items():
        members = np.flatnonzero(groups == group)
        figure.add_scatter(
            x=points[members, 0],
            y=points[members, 1],
            mode="markers+text" if len(labels) <= MAX_LABELS else "markers",
            text=[labels[i] for i in members],
            textposition="top right",
            marker={"color": color, "size": 7},
            hovertemplate="<b>%{text}</b><extra>%{fullData.name}</extra>",
            name=group,
        )
    figure.update_layout(title=title, **PLOTLY_AXES)
    return html_page.figure_html(figure)


def positions_html(points: np.ndarray, title: str) -> str:
    """The positions' points (P, 2), joined in order, as HTML."""
    figure = go.Figure()
    figure.add_scatter(
        x=points[:, 0],
        y=points[:, 1],
        mode="lines+markers",
        text=[f"position {i}" for i in range(len(points))],
        hovertemplate="%{text}<extra></extra>",
        line={"color": LINE_COLOR, "width": 1},
        marker={"color": list(range(len(points))), "colorscale": "Cividis", "size": 6},
        showlegend=False,
    )
    figure.update_layout(title=title, **PLOTLY_AXES)
    return html_page.figure_html(figure)


def main(resolved: Resolved[EmbeddingSettings]) -> int:
    settings = resolved.settings
    loaded = common.open_model(settings)
    n_tokens = min(settings.most, loaded.tokenizer.vocab_size)
    groups = token_groups(loaded.tokenizer, range(n_tokens), settings.groups)
    labels = common.token_labels(loaded.tokenizer, np.arange(n_tokens))
    projections = project_all(embeddings_by_time(loaded, settings), settings)
    path = common.output_path(settings, "embeddings")
    common.write_figure(draw_projections(projections, labels, groups), common.add_extension(path, ".png"))
    parts = projections_html(projections, labels, groups)
    html_page.write_page(common.add_extension(path, ".html"), "Embeddings", parts)
    arrays = {" ".join(key): points for key, points in projections.items()}
    common.save_arrays(settings.save_arrays, arrays | {"tokens": np.array(labels), "groups": groups})
    return 0


if __name__ == "__main__":
    sys.exit(common.command(main, EmbeddingSettings))
