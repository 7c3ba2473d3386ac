"""What each head looks at: maps of its weights, and all layers as fibres in space.

    python -m lab.attention --out_dir=out/eca-char --start="A figura é poética"
    python -m lab.attention --init_from=gpt2 --start="The cat sat on the mat" --layer=5 --head=1

Writes maps (PNG), maps to point at and a view of all layers to turn with the mouse (HTML). The weights
are those that the model computes with: its own queries and keys, taken where it takes them.

Shapes: L layers, H heads, T tokens.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from torch import Tensor

from configurator import Resolved, command, setting
from fradique.nn import attention as attention_ops
from lab import common, html_page
from model import GPT

LABELS, NUMBERS = 48, 14  # tokens: with more, a map has no labels, or no numbers
FAINT = 0.04  # weights below it are no fibre: there would be too many to see any
HOW_TO_READ = (
    "Tokens stand along one axis, heads beside one another, layers above one another. A fibre leads from the "
    "token that is read, in the layer below, to the token that reads, in the layer above: never from a later "
    "token to an earlier one. The brighter, the larger its weight. Drag to turn, scroll to come nearer."
)


@dataclass(frozen=True)
class AttentionSettings(common.LookSettings):
    """python -m lab.attention --out_dir=out/<run> --start="A figura é poética" [--layer=0] [--head=0]"""

    start: str = setting("A figura é poética", "the text: itself, FILE:path, or -", group="text")
    layer: int = setting(-1, "the layer whose heads are drawn, from 0; -1: all", lo=-1, group="picture")
    head: int = setting(-1, "the head, from 0; -1: all", lo=-1)


# Compute


@torch.no_grad()
def attention_weights(model: GPT, ids: Tensor) -> np.ndarray:
    """The weight of each token in what each token reads: (L, H, T, T), rows (queries) sum to 1.

    ids (1, T). Each layer's attention is asked what it is given, and then does what it always does.
    """
    found: list[np.ndarray] = []

    def listen(attend):  # noqa: ANN001, ANN202
        def attend_and_tell(
            q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0
        ) -> Tensor:
            found.append(softmax_weights(q, k, mask)[0].cpu().numpy())
            return attend(q, k, v, mask, p)

        return attend_and_tell

    attentions = [block.attn for block in model.transformer["h"]]
    before = [attention.attend for attention in attentions]
    training = model.training
    try:
        model.eval()
        for attention in attentions:
            attention.attend = listen(attention.attend)
        model(ids, prefix=ids.size(1))
    finally:
        model.train(training)
        for attention, attend in zip(attentions, before, strict=True):
            attention.attend = attend
    return np.stack(found)


def softmax_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D + mask), float32: (B, H, T, S). q (B, H, T, D), k (B, H or fewer, S, D); mask as in
    `kernels.attention`."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scores = q.float() @ k.float().transpose(-2, -1) / q.size(-1) ** 0.5
    if mask is None:
        mask = attention_ops.causal_mask(q.size(2), k.size(2), q.device)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, dim=-1)


def chosen(weights: np.ndarray, layer: int, head: int) -> list[tuple[int, int]]:
    """The (layer, head) pairs that are drawn. Raises ValueError where there is no such layer or head."""
    L, H = weights.shape[:2]
    for name, number, count in (("layer", layer, L), ("head", head, H)):
        if number >= count:
            raise ValueError(f"--{name}={number}: this model has {count} {name}s, 0 to {count - 1}")
    layers = range(L) if layer < 0 else [layer]
    return [(i, j) for i in layers for j in (range(H) if head < 0 else [head])]


def fibres(weights: np.ndarray, faint: float = FAINT) -> np.ndarray:
    """What is drawn in space, the strongest last, (n, 5): layer, head, reader, what it reads, weight."""
    where = np.argwhere(weights >= faint)
    strength = weights[tuple(where.T)]
    return np.column_stack([where, strength])[np.argsort(strength, kind="stable")]


# Draw


def draw_maps(weights: np.ndarray, names: list[str], pairs: list[tuple[int, int]], path: Path) -> None:
    """A grid of maps: a row for each layer, a column for each head."""
    layers, heads = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
    T = len(names)
    single = len(pairs) == 1
    size = max(4.5, 0.34 * T + 1.5) if single else max(1.7, min(0.16 * T + 0.8, 5.0))
    figure = Figure(figsize=(size * len(heads) + 0.8, size * len(layers) + 1.0), dpi=110, layout="compressed")
    grid = figure.subplots(len(layers), len(heads), squeeze=False)
    labelled = (LABELS if single else 24) >= T
    image = None
    for layer, head in pairs:
        axes = grid[layers.index(layer)][heads.index(head)]
        image = draw_map(
            axes, weights[layer, head], names, labelled, numbers=T <= NUMBERS and (single or size > 3)
        )
        axes.set_title(f"layer {layer}, head {head}", fontsize=9)
    figure.colorbar(image, ax=grid, label="weight", shrink=0.6, fraction=0.03)
    figure.suptitle("what each token (row) reads from which token (column)", fontsize=11)
    figure.savefig(path)


def draw_map(axes: Axes, weights: np.ndarray, names: list[str], labelled: bool, numbers: bool):  # noqa: ANN201
    image = axes.imshow(weights, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(names)) if labelled else [])
    axes.set_yticks(range(len(names)) if labelled else [])
    if labelled:
        axes.set_xticklabels(names, fontsize=7, rotation=90 if max(map(len, names)) > 1 else 0)
        axes.set_yticklabels(names, fontsize=7)
    axes.tick_params(length=0, pad=2)
    if numbers:
        for i, j in np.argwhere(weights >= 0.005):
            colour = "black" if weights[i, j] > 0.6 else "white"
            axes.text(
                j,
                i,
                f"{weights[i, j]:.2f}".removeprefix("0"),
                ha="center",
                va="center",
                fontsize=6,
                color=colour,
            )
    return image


def draw_space(found: np.ndarray, names: list[str], shape: tuple[int, ...], path: Path) -> None:
    """The view in space as it is first seen: `found` (n, 5) as `fibres` gives them."""
    L, H, T = shape[:3]
    figure = Figure(figsize=(9, 5.6), dpi=110)
    axes = figure.add_axes((0.0, 0.0, 0.98, 0.95), projection="3d")
    layer, head, reader, read, weight = found.T
    ends = np.stack(  # (n, 2, 3)
        [np.column_stack([read, head, layer]), np.column_stack([reader, head, layer + 1])], axis=1
    )
    colours = [(0.9, 0.55, 0.0, alpha) for alpha in np.clip(0.08 + 0.92 * weight, 0, 1)]
    whole = {"clip_on": False}  # the box is larger than the square that matplotlib keeps for it
    axes.add_collection3d(Line3DCollection(ends, colors=colours, linewidths=0.4 + 2.4 * weight, **whole))
    nodes = np.stack(np.meshgrid(range(T), range(H), range(L + 1), indexing="ij"), -1).reshape(-1, 3)
    axes.scatter(*nodes.T, s=2, color="#8a8f98", **whole)
    axes.set(xlim=(0, max(1, T - 1)), ylim=(0, max(1, H - 1)), zlim=(0, L))
    axes.set_xticks(range(T) if T <= LABELS else [], names if T <= LABELS else [], fontsize=7)
    axes.set_yticks(range(H))
    axes.set_zticks(range(L + 1), ["in", *map(str, range(1, L + 1))])
    axes.set(xlabel="token", ylabel="head", zlabel="layer")
    axes.view_init(elev=14, azim=-78)
    axes.set_box_aspect((2.0, 0.8, 1.2), zoom=1.22)
    axes.set_title("who reads whom, layer by layer: the stronger the line, the more", fontsize=11)
    figure.savefig(path)


def main(resolved: Resolved[AttentionSettings]) -> int:
    settings = resolved.settings
    writer = common.open_model(settings)
    ids = common.prompt_ids(writer, settings.start)
    weights = attention_weights(writer.model, common.as_batch(writer, ids))
    names = common.labels(writer.tokenizer, ids)
    pairs = chosen(weights, settings.layer, settings.head)
    path = common.place(settings, "attention")
    common.write(path.with_suffix(".png"), lambda beside: draw_maps(weights, names, pairs, beside))
    html_page.write(
        path.with_suffix(".html"), "What each token reads", [html_page.maps(weights, names, pairs)]
    )
    space = path.with_name(path.name + "-3d")
    seen = fibres(weights)
    common.write(space.with_suffix(".png"), lambda beside: draw_space(seen, names, weights.shape, beside))
    parts = [html_page.note(HOW_TO_READ), html_page.space(seen, names, weights.shape)]
    html_page.write(space.with_suffix(".html"), "Attention through the layers", parts)
    common.save_arrays(settings.save_arrays, {"weights": weights, "ids": ids, "tokens": np.array(names)})
    return 0


if __name__ == "__main__":
    sys.exit(command(main, AttentionSettings))
