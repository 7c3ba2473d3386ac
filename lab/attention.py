"""Attention weights of a prompt: a heat map for each head, and all layers in one 3D view.

    python -m lab.attention --out_dir=out/eca-char --start="A figura é poética"
    python -m lab.attention --init_from=gpt2 --start="The cat sat on the mat" --layer=5 --head=1

Writes heat maps (PNG, and HTML with tooltips) and the 3D view (PNG, and HTML that turns with the mouse).
The weights are computed from the queries and keys of the model's own forward pass.

Shapes: L layers, H heads, T tokens; E edges (E, 5), each with the columns layer, head, query position, key
position, weight.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from torch import Tensor

from configurator import Resolved, setting
from fradique.nn import attention as attention_ops
from lab import common, html_page
from model import GPT

# The largest number of tokens in a heat map with tick labels, if one head or if several are drawn, and in a
# heat map with numbers in its cells.
MAX_LABELED, MAX_LABELED_IN_GRID, MAX_NUMBERED = 48, 24, 14
MIN_WEIGHT = (
    0.04  # edges with a smaller weight are not drawn: they are so many that they would hide the others
)
# Limits between line styles in the HTML page, because plotly draws all lines of a trace with one style.
WEIGHT_BINS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.01)
EDGE_COLOR, NODE_COLOR = "#f0a000", "#8a8f98"
VIEW_3D_HELP = (
    "One axis has the tokens, one the heads, and the vertical one the layers. A line goes from the token "
    "that is read, in the layer below, to the token that reads it, in the layer above: never from a later "
    "token to an earlier one. The brighter the line, the larger the weight. Drag to rotate, scroll to zoom."
)
AttentionFunction = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, float], Tensor
]  # (q, k, v, mask, dropout)


@dataclass(frozen=True)
class AttentionSettings(common.PromptSettings):
    """python -m lab.attention --out_dir=out/<run> [--start="A figura é poética"] [--layer=0] [--head=0]"""

    layer: int = setting(-1, "draw only this layer, from 0; -1: all layers", lo=-1, group="picture")
    head: int = setting(-1, "draw only this head, from 0; -1: all heads", lo=-1)


# Compute


@torch.no_grad()
def attention_weights(model: GPT, ids: Tensor) -> np.ndarray:
    """The attention weights for ids (1, T): (L, H, T, T). Dropout is off.

    Entry [l, h, i, j] is how much token i (query) attends to token j (key); the entries of a query sum to 1.
    For one forward pass, the attention function of each layer is replaced by one that also records them.
    """
    recorded: list[np.ndarray] = []  # (H, T, T) for each layer

    def recording(attention_function: AttentionFunction) -> AttentionFunction:
        """`attention_function`, which now also records the weights."""

        def record_and_compute(
            q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
        ) -> Tensor:
            recorded.append(softmax_weights(q, k, mask)[0].cpu().numpy())
            return attention_function(q, k, v, mask, dropout)

        return record_and_compute

    layers = [block.attn for block in model.transformer["h"]]
    original_functions = [layer.attention for layer in layers]
    training = model.training
    try:
        model.eval()
        for layer in layers:
            layer.attention = recording(layer.attention)
        model(ids, prefix=ids.size(1))
    finally:
        model.train(training)
        for layer, attention_function in zip(layers, original_functions, strict=True):
            layer.attention = attention_function
    return np.stack(recorded)


def softmax_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D + mask), float32: (B, H, T, S).

    q (B, H, T, D); k (B, H, S, D), with fewer heads in grouped-query attention. mask: boolean (True: attend),
    or added to the scores; None: causal.
    """
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B, H, S, D)
    scores = q.float() @ k.float().transpose(-2, -1) / q.size(-1) ** 0.5
    if mask is None:
        mask = attention_ops.causal_mask(q.size(2), k.size(2), q.device)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, dim=-1)


def select_heads(weights: np.ndarray, layer: int = -1, head: int = -1) -> list[tuple[int, int]]:
    """The (layer, head) pairs to draw; -1: all. Raises ValueError if the layer or head does not exist."""
    L, H = weights.shape[:2]
    for name, index, count in (("layer", layer, L), ("head", head, H)):
        if index >= count:
            raise ValueError(f"--{name}={index}: this model has {count} {name}s, 0 to {count - 1}")
    layers = range(L) if layer < 0 else [layer]
    heads = range(H) if head < 0 else [head]
    return list(itertools.product(layers, heads))


def attention_edges(weights: np.ndarray, min_weight: float = MIN_WEIGHT) -> np.ndarray:
    """The weights (L, H, T, T) of at least `min_weight` as edges (E, 5), the smallest weight first.

    So the largest weights are drawn over the others.
    """
    indices = np.argwhere(weights >= min_weight)  # (E, 4)
    values = weights[tuple(indices.T)]
    return np.column_stack([indices, values])[np.argsort(values, kind="stable")]


# Draw with matplotlib


def draw_heatmaps(weights: np.ndarray, labels: list[str], heads: list[tuple[int, int]]) -> Figure:
    """A grid of heat maps of weights (L, H, T, T), for the (layer, head) pairs in `heads`.

    It has a row for each layer and a column for each head. labels: of the tokens.
    """
    layer_rows = sorted({layer for layer, _ in heads})
    head_columns = sorted({head for _, head in heads})
    T, single = len(labels), len(heads) == 1
    size = max(4.5, 0.34 * T + 1.5) if single else max(1.7, min(0.16 * T + 0.8, 5.0))  # of a heat map, inches
    figsize = (size * len(head_columns) + 0.8, size * len(layer_rows) + 1.0)
    figure = Figure(figsize=figsize, dpi=110, layout="compressed")
    grid = figure.subplots(len(layer_rows), len(head_columns), squeeze=False)
    max_labeled = MAX_LABELED if single else MAX_LABELED_IN_GRID
    with_labels = max_labeled >= T
    with_numbers = T <= MAX_NUMBERED and (single or size > 3)
    image = None
    for layer, head in heads:
        axes = grid[layer_rows.index(layer)][head_columns.index(head)]
        image = draw_heatmap(axes, weights[layer, head], labels, with_labels, with_numbers)
        axes.set_title(f"layer {layer}, head {head}", fontsize=9)
    figure.colorbar(image, ax=grid, label="weight", shrink=0.6, fraction=0.03)
    figure.suptitle("attention weights: each row shows what one token reads", fontsize=11)
    return figure


def draw_heatmap(
    axes: Axes, weights: np.ndarray, labels: list[str], with_labels: bool, with_numbers: bool
) -> AxesImage:
    """Draw the weights (T, T) of one head; with_numbers: write the value into each cell."""
    image = axes.imshow(weights, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(labels)) if with_labels else [])
    axes.set_yticks(range(len(labels)) if with_labels else [])
    if with_labels:
        axes.set_xticklabels(labels, fontsize=7, rotation=90 if max(map(len, labels)) > 1 else 0)
        axes.set_yticklabels(labels, fontsize=7)
    axes.tick_params(length=0, pad=2)
    if with_numbers:
        for i, j in np.argwhere(weights >= 0.005):  # smaller weights would be shown as .00
            number = f"{weights[i, j]:.2f}".removeprefix("0")
            color = "black" if weights[i, j] > 0.6 else "white"
            axes.text(j, i, number, ha="center", va="center", fontsize=6, color=color)
    return image


def draw_3d(edges: np.ndarray, labels: list[str], shape: tuple[int, ...]) -> Figure:
    """The edges (E, 5) as lines in a 3D figure of matplotlib. shape: of the weights, (L, H, T, T)."""
    L, H, T, _ = shape
    figure = Figure(figsize=(9, 5.6), dpi=110)
    axes = figure.add_axes((0.0, 0.0, 0.98, 0.95), projection="3d")
    layer, head, query, key, weight = edges.T
    starts, ends = np.column_stack([key, head, layer]), np.column_stack([query, head, layer + 1])
    colors = [(0.9, 0.55, 0.0, alpha) for alpha in np.clip(0.08 + 0.92 * weight, 0, 1)]
    no_clip = {"clip_on": False}  # matplotlib clips to a square that is smaller than the box of the axes
    segments = np.stack([starts, ends], axis=1)  # (E, 2, 3)
    axes.add_collection3d(Line3DCollection(segments, colors=colors, linewidths=0.4 + 2.4 * weight, **no_clip))
    nodes = np.array(list(itertools.product(range(T), range(H), range(L + 1))))  # (T H (L + 1), 3)
    axes.scatter(*nodes.T, s=2, color=NODE_COLOR, **no_clip)
    axes.set(xlim=(0, max(1, T - 1)), ylim=(0, max(1, H - 1)), zlim=(0, L))
    axes.set_xticks(range(T) if T <= MAX_LABELED else [], labels if T <= MAX_LABELED else [], fontsize=7)
    axes.set_yticks(range(H))
    axes.set_zticks(range(L + 1), layer_labels(L))
    axes.set(xlabel="token", ylabel="head", zlabel="layer")
    axes.view_init(elev=14, azim=-78)
    axes.set_box_aspect((2.0, 0.8, 1.2), zoom=1.22)
    axes.set_title("attention through the layers: the stronger the line, the larger the weight", fontsize=11)
    return figure


# Draw with plotly


def heatmap_html(weights: np.ndarray, labels: list[str], heads: list[tuple[int, int]]) -> str:
    """A heat map as HTML, with a menu that selects one of the (layer, head) pairs in `heads`."""
    T = len(labels)
    # cells of later tokens are empty, unless some head attends to them, as in a prefix LM
    visible = np.tril(np.ones((T, T), dtype=bool)) | (weights.max((0, 1)) > 0)
    maps = [np.where(visible, weights[layer, head].astype(float).round(4), np.nan) for layer, head in heads]
    tooltip_labels = np.array(
        [[(query, key) for key in labels] for query in labels], dtype=object
    )  # (T, T, 2)
    # one trace whose values the menu replaces, so that the tooltips are stored only once
    figure = go.Figure()
    figure.add_heatmap(
        z=maps[0],
        customdata=tooltip_labels,
        hovertemplate="<b>%{customdata[0]}</b> reads <b>%{customdata[1]}</b>: %{z:.3f}<extra></extra>",
        zmin=0,
        zmax=1,
        colorscale="Cividis",
        xgap=1,
        ygap=1,
        colorbar={"title": "weight"},
    )
    buttons = [
        {"label": f"layer {layer}, head {head}", "method": "restyle", "args": [{"z": [nan_to_none(z)]}]}
        for (layer, head), z in zip(heads, maps, strict=True)
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.12, "bgcolor": "#9aa0a6"}
    axis = {"tickmode": "array", "tickvals": list(range(T)), "ticktext": labels, "showgrid": False}
    figure.update_layout(
        xaxis=axis | {"title": "token that is read", "side": "bottom", "constrain": "domain"},
        yaxis=axis | {"title": "token that reads", "autorange": "reversed", "scaleanchor": "x"},
        updatemenus=[menu | {"font": {"color": "#000"}}],
    )
    return html_page.figure_html(figure, height=max(520, min(1000, 24 * T + 200)))


def nan_to_none(z: np.ndarray) -> list[list[float | None]]:
    """(rows, columns) -> nested lists with None for NaN, which JSON does not have."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in z]


def view_3d_html(edges: np.ndarray, labels: list[str], shape: tuple[int, ...]) -> str:
    """The edges (E, 5) as lines in a 3D figure, as HTML. shape: of the weights, (L, H, T, T)."""
    L, H, T, _ = shape
    figure = go.Figure()
    for min_weight, max_weight in itertools.pairwise(WEIGHT_BINS):
        selected = edges[(edges[:, 4] >= min_weight) & (edges[:, 4] < max_weight)]
        if len(selected):
            add_edges(figure, selected, labels, min_weight, max_weight)
    nodes = np.array([(t, h, layer) for layer in range(L + 1) for h in range(H) for t in range(T)])  # (n, 3)
    figure.add_scatter3d(
        x=nodes[:, 0], y=nodes[:, 1], z=nodes[:, 2], mode="markers",
        marker={"size": 2, "color": NODE_COLOR}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    layer_ticks = {"tickvals": list(range(L + 1)), "ticktext": layer_labels(L)}
    figure.update_layout(
        scene={
            "xaxis": {"title": "token", "tickvals": list(range(T)), "ticktext": labels},
            "yaxis": {"title": "head", "tickvals": list(range(H))},
            "zaxis": {"title": "layer"} | layer_ticks,
            "aspectmode": "manual",
            "aspectratio": {"x": 2.0, "y": 0.8, "z": 1.2},
            "camera": {"eye": {"x": -0.4, "y": -2.4, "z": 0.7}},
        },
        legend={"title": "weight"},
    )
    return html_page.figure_html(figure, height=760)


def layer_labels(n_layer: int) -> list[str]:
    """Labels for the input of the first layer and the output of each layer, in a 3D figure."""
    return ["in", *(str(layer) for layer in range(1, n_layer + 1))]


def add_edges(
    figure: go.Figure, edges: np.ndarray, labels: list[str], min_weight: float, max_weight: float
) -> None:
    """Add edges (E, 5) with weights between min_weight and max_weight to a 3D figure, as one trace.

    A trace is one line: start, end and NaN of each edge, where NaN interrupts the line.
    """
    tooltips = [
        (int(layer), int(head), labels[int(query)], labels[int(key)], f"{weight:.2f}")
        for layer, head, query, key, weight in edges
    ]
    layers, heads, queries, keys, _ = edges.T
    gaps = np.full(len(edges), np.nan)
    figure.add_scatter3d(
        x=np.column_stack([keys, queries, gaps]).ravel(),
        y=np.column_stack([heads, heads, gaps]).ravel(),
        z=np.column_stack([layers, layers + 1, gaps]).ravel(),
        customdata=[values for tooltip in tooltips for values in (tooltip, tooltip, ())],
        mode="lines",
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}: <b>%{customdata[2]}</b> reads "
        "<b>%{customdata[3]}</b>: %{customdata[4]}<extra></extra>",
        line={"color": EDGE_COLOR, "width": 1 + 6 * max_weight},
        opacity=min(1.0, 0.12 + 0.9 * min_weight),
        name=f"{min_weight:g} to {min(max_weight, 1):g}",
    )


def main(resolved: Resolved[AttentionSettings]) -> int:
    settings = resolved.settings
    loaded = common.open_model(settings)
    ids = common.prompt_tokens(loaded, settings, MAX_LABELED_IN_GRID, fallback="A figura é poética")
    weights = attention_weights(loaded.model, common.to_batch(loaded, ids))
    labels = common.token_labels(loaded.tokenizer, ids)
    heads = select_heads(weights, settings.layer, settings.head)
    path = common.output_path(settings, "attention")
    common.write_figure(draw_heatmaps(weights, labels, heads), common.add_extension(path, ".png"))
    parts = [heatmap_html(weights, labels, heads)]
    html_page.write_page(common.add_extension(path, ".html"), "Attention weights", parts)

    path_3d: Path = path.with_name(path.name + "-3d")
    edges = attention_edges(weights)
    common.write_figure(draw_3d(edges, labels, weights.shape), common.add_extension(path_3d, ".png"))
    parts = [html_page.note(VIEW_3D_HELP), view_3d_html(edges, labels, weights.shape)]
    html_page.write_page(common.add_extension(path_3d, ".html"), "Attention through the layers", parts)
    common.save_arrays(settings.save_arrays, {"weights": weights, "ids": ids, "tokens": np.array(labels)})
    return 0


if __name__ == "__main__":
    sys.exit(common.command(main, AttentionSettings))
