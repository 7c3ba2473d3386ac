"""Token and position embeddings in two dimensions, before and after training.

    python -m lab.embeddings --out_dir=out/eca-char
    python -m lab.embeddings --out_dir=out/eca-char --groups="vowels=aeiou;digits=0123456789"

Draws PCA, the two directions in which the embeddings vary most, and t-SNE (van der Maaten & Hinton 2008),
which keeps neighbors together but whose distances have no meaning. Writes PNG, and HTML with tooltips.

Shapes: n tokens, C embedding width, P positions.
"""

import sys
import warnings
from dataclasses import dataclass
from html import escape
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
from fradique.training.loss_plot import COLORS
from lab import common, html_page
from lab.token_groups import token_groups
from model import GPT, GPTConfig
from sample import LoadedModel

METHOD_NAMES = {"pca": "PCA", "tsne": "t-SNE"}
Projections = dict[tuple[str, str, str], np.ndarray]  # (tokens or positions, pca or tsne, when) -> (n, 2)
MARKERS = "osD^vPX*"  # one for each group as well as a color, for color-blind readers
MAX_WRITTEN_LABELS = 200  # with more tokens than this, only dots are drawn
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
    """A model's embeddings: tokens (n, C) and positions (P, C), None if positions are not learned."""

    tokens: np.ndarray
    positions: np.ndarray | None


def read_embeddings(model: GPT, max_tokens: int) -> EmbeddingTables:
    """The embeddings of the first `max_tokens` tokens, and of all positions."""
    wpe = model.transformer["wpe"].weight if "wpe" in model.transformer else None
    tokens = model.transformer["wte"].weight[:max_tokens].detach().float().cpu().numpy()
    return EmbeddingTables(tokens, None if wpe is None else wpe.detach().float().cpu().numpy())


def initial_model(config: GPTConfig, seed: int) -> GPT:
    """The model as train.py initialized it: the weights are random numbers of this seed."""
    torch.manual_seed(seed)
    return GPT(config)


def embeddings_by_time(loaded: LoadedModel, settings: EmbeddingSettings) -> dict[str, EmbeddingTables]:
    """The embeddings "after training", and "before training" if the run started from scratch."""
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
    """Project points (n, C) to (n, 2). method: pca or tsne.

    init (n, 2): t-SNE continues from these points and moves them only a little. Without it, t-SNE starts at
    the PCA.
    """
    if method == "pca":
        return PCA(2, svd_solver="full").fit_transform(points)
    perplexity = min(perplexity, max(1.0, (len(points) - 1) / 3))
    if init is None:
        pca = project(points, "pca")
        options = {"init": (pca / max(pca[:, 0].std(), 1e-12) * 1e-4).astype(np.float32)}
    else:  # no early exaggeration: it would pull all points together first
        options = {"init": init.astype(np.float32), "early_exaggeration": 1.0, "max_iter": 300}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TSNE(2, perplexity=perplexity, random_state=seed, **options).fit_transform(points)


def project_all(tables_by_time: dict[str, EmbeddingTables], settings: EmbeddingSettings) -> Projections:
    """Project tokens and positions, at each time, with both methods."""
    return {
        (kind, method, when): project(points, method, settings.perplexity, settings.seed)
        for when, tables in tables_by_time.items()
        for kind, points in (("tokens", tables.tokens), ("positions", tables.positions))
        if points is not None and len(points) > 3
        for method in METHOD_NAMES
    }


# Draw with matplotlib


def draw_projections(projections: Projections, labels: list[str], groups: np.ndarray) -> Figure:
    """A row for tokens and one for positions; a column for each method and time."""
    rows = sorted({kind for kind, _, _ in projections}, reverse=True)  # tokens first
    columns = list(dict.fromkeys((method, when) for _, method, when in projections))
    columns.sort(key=lambda column: list(METHOD_NAMES).index(column[0]))
    size = (4.4 * len(columns), 4.4 * len(rows) + 0.8)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, kind in enumerate(rows):
        for j, (method, when) in enumerate(columns):
            axes = grid[i][j]
            if kind == "tokens":
                draw_tokens(axes, projections[kind, method, when], labels, groups)
            else:
                draw_positions(axes, projections[kind, method, when])
            axes.set_title(f"{kind}, {METHOD_NAMES[method]}, {when}", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def group_styles(groups: np.ndarray) -> dict[str, tuple[str, str]]:
    """Group -> (color, marker), the largest group first."""
    names, counts = np.unique(groups, return_counts=True)
    ordered = names[np.argsort(-counts, kind="stable")].tolist()
    return {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(ordered)}


def draw_tokens(axes: Axes, points: np.ndarray, labels: list[str], groups: np.ndarray) -> None:
    """Scatter the tokens' points (n, 2), colored by group, with their labels if there is room."""
    with_labels = len(labels) <= MAX_WRITTEN_LABELS
    styles = group_styles(groups)
    for group, (color, marker) in styles.items():
        x, y = points[groups == group].T
        axes.scatter(x, y, s=6 if with_labels else 10, color=color, marker=marker, label=group, alpha=0.8)
    if with_labels:
        for (x, y), label, group in zip(points, labels, groups.tolist(), strict=True):
            color = styles[group][0]
            axes.annotate(label, (x, y), (2, 2), textcoords="offset points", fontsize=8, color=color)


def draw_positions(axes: Axes, points: np.ndarray) -> None:
    """Join the positions' points (P, 2) in order, from dark to bright, with a number at some of them."""
    axes.plot(points[:, 0], points[:, 1], color=LINE_COLOR, linewidth=0.7, zorder=1)
    axes.scatter(points[:, 0], points[:, 1], c=range(len(points)), cmap="cividis", s=9, zorder=2)
    interval = max(1, len(points) // 8)
    for i in range(0, len(points), interval):
        axes.annotate(str(i), points[i], (3, 3), textcoords="offset points", fontsize=8)


# Draw with plotly


def projections_html(projections: Projections, labels: list[str], groups: np.ndarray) -> list[str]:
    """HTML of a figure for each projection."""
    figures = []
    for (kind, method, when), points in projections.items():
        title = f"{kind}, {METHOD_NAMES[method]}, {when}"
        is_tokens = kind == "tokens"
        figures.append(
            tokens_html(points, labels, groups, title) if is_tokens else positions_html(points, title)
        )
    return figures


def tokens_html(points: np.ndarray, labels: list[str], groups: np.ndarray, title: str) -> str:
    """The tokens' points (n, 2) as HTML."""
    figure = go.Figure()
    for group, (color, _) in group_styles(groups).items():
        members = np.flatnonzero(groups == group)
        figure.add_scatter(
            x=points[members, 0],
            y=points[members, 1],
            mode="markers+text" if len(labels) <= MAX_WRITTEN_LABELS else "markers",
            text=[labels[i] for i in members],
            textposition="top right",
            marker={"color": color, "size": 7},
            hovertemplate=f"<b>%{{text}}</b><extra>{escape(group)}</extra>",
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
    common.save_figure(draw_projections(projections, labels, groups), common.add_extension(path, ".png"))
    parts = projections_html(projections, labels, groups)
    html_page.write_page(common.add_extension(path, ".html"), "Embeddings", parts)
    arrays = {" ".join(key): points for key, points in projections.items()}
    common.save_arrays(settings.save_arrays, arrays | {"tokens": np.array(labels), "groups": groups})
    return 0


if __name__ == "__main__":
    sys.exit(common.command(main, EmbeddingSettings))
