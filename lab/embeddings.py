"""Where a model puts its tokens and positions: its embeddings in two dimensions, before training and after.

    python -m lab.embeddings --out_dir=out/eca-char
    python -m lab.embeddings --out_dir=out/eca-char --groups="vowels=aeiou;digits=0123456789"

Draws PCA, which shows the two directions in which the embeddings differ most, and t-SNE (van der Maaten &
Hinton 2008), which keeps neighbours together and tells nothing by distances. Writes PNG, and HTML
to point at.

Shapes: n tokens that are shown, C width, P positions.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from configurator import Resolved, command, setting
from fradique.checkpointing import run_folder
from fradique.training.loss_plot import COLORS
from lab import common, html_page
from lab.token_groups import groups
from model import GPT, GPTConfig
from sample import LoadedModel

Projections = dict[tuple[str, str, str], np.ndarray]  # (tokens or positions, pca or tsne, when) -> (n, 2)
MARKS = "osD^vPX*"  # beside colours, for those who cannot tell them


@dataclass(frozen=True)
class EmbeddingSettings(common.LookSettings):
    """python -m lab.embeddings --out_dir=out/<run> [--groups="vowels=aeiou;digits=0123456789"]"""

    most: int = setting(
        600, "of a large vocabulary, the first (in BPE the most frequent) so many", lo=10, group="picture"
    )
    groups: str = setting("", 'what has a colour: "name=characters;name=characters"; empty: kinds of letters')
    perplexity: float = setting(15.0, "of t-SNE: about how many neighbours a token keeps", lo=1.0)
    seed: int = setting(0, "of t-SNE", lo=0, hi=2**31)


# Compute


@dataclass(frozen=True)
class Vectors:
    """The embeddings of a model: tokens (n, C) and positions (P, C); None where it learns no positions."""

    tokens: np.ndarray
    positions: np.ndarray | None


def vectors(model: GPT, most: int) -> Vectors:
    wpe = model.transformer["wpe"].weight if "wpe" in model.transformer else None
    tokens = model.transformer["wte"].weight[:most].detach().float().cpu().numpy()
    return Vectors(tokens, None if wpe is None else wpe.detach().float().cpu().numpy())


def before_training(config: GPTConfig, seed: int) -> GPT:
    """The model as `train.py` began with it: weights are drawn from the seed."""
    torch.manual_seed(seed)
    return GPT(config)


def project(
    points: np.ndarray, how: str, perplexity: float = 15.0, seed: int = 0, start: np.ndarray | None = None
) -> np.ndarray:
    """Points (n, C) -> (n, 2). how: pca or tsne. `start` (n, 2): where t-SNE goes on from, small steps away;
    else it begins at the PCA."""
    if how == "pca":
        return PCA(2, svd_solver="full").fit_transform(points)
    perplexity = min(perplexity, max(1.0, (len(points) - 1) / 3))
    if start is None:
        began = project(points, "pca")
        options = {"init": (began / max(began[:, 0].std(), 1e-12) * 1e-4).astype(np.float32)}
    else:  # no early exaggeration, which would throw the points together anew
        options = {"init": start.astype(np.float32), "early_exaggeration": 1.0, "max_iter": 300}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TSNE(2, perplexity=perplexity, random_state=seed, **options).fit_transform(points)


def all_projections(found: dict[str, Vectors], settings: EmbeddingSettings) -> Projections:
    """(tokens or positions, pca or tsne, when) -> (n, 2)."""
    return {
        (what, how, when): project(points, how, settings.perplexity, settings.seed)
        for when, both in found.items()
        for what, points in (("tokens", both.tokens), ("positions", both.positions))
        if points is not None and len(points) > 3
        for how in ("pca", "tsne")
    }


# Draw


HOW = {"pca": "PCA", "tsne": "t-SNE"}


def draw(projections: Projections, names: list[str], kinds: np.ndarray, path: Path) -> None:
    """A row for tokens and one for positions; PCA and t-SNE, before training and after, side by side."""
    rows = sorted({what for what, _, _ in projections}, reverse=True)  # tokens first
    columns = list(dict.fromkeys((how, when) for _, how, when in projections))
    columns.sort(key=lambda pair: list(HOW).index(pair[0]))
    size = (4.4 * len(columns), 4.4 * len(rows) + 0.8)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, what in enumerate(rows):
        for j, (how, when) in enumerate(columns):
            axes = grid[i][j]
            if what == "tokens":
                draw_tokens(axes, projections[what, how, when], names, kinds)
            else:
                draw_positions(axes, projections[what, how, when])
            axes.set_title(f"{what}, {HOW[how]}, {when}", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path)


def style(kinds: np.ndarray) -> dict[str, tuple[str, str]]:
    """Group -> colour and mark, the largest group first."""
    found, counts = np.unique(kinds, return_counts=True)
    order = found[np.argsort(-counts, kind="stable")]
    return {kind: (COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]) for i, kind in enumerate(order.tolist())}


def draw_tokens(axes: Axes, places: np.ndarray, names: list[str], kinds: np.ndarray) -> None:
    few = len(names) <= 200  # then each token is written where it stands
    for kind, (colour, mark) in style(kinds).items():
        here = places[kinds == kind]
        axes.scatter(
            here[:, 0], here[:, 1], s=6 if few else 10, color=colour, marker=mark, label=kind, alpha=0.8
        )
    if few:
        colours = {kind: colour for kind, (colour, _) in style(kinds).items()}
        for (x, y), name, kind in zip(places, names, kinds.tolist(), strict=True):
            axes.annotate(name, (x, y), (2, 2), textcoords="offset points", fontsize=8, color=colours[kind])


def draw_positions(axes: Axes, places: np.ndarray) -> None:
    """Joined in order, from dark to bright; some of them numbered."""
    axes.plot(places[:, 0], places[:, 1], color="#9aa0a6", linewidth=0.7, zorder=1)
    axes.scatter(places[:, 0], places[:, 1], c=range(len(places)), cmap="cividis", s=9, zorder=2)
    step = max(1, len(places) // 8)
    for i in range(0, len(places), step):
        axes.annotate(str(i), places[i], (3, 3), textcoords="offset points", fontsize=8)


def scatter(places: np.ndarray, names: list[str], kinds: np.ndarray, title: str) -> str:
    """Tokens to point at."""
    made = html_page.go.Figure()
    for kind, (colour, _) in style(kinds).items():
        here = kinds == kind
        shown = [name for name, one in zip(names, here, strict=True) if one]
        made.add_scatter(
            x=places[here, 0],
            y=places[here, 1],
            mode="markers+text" if len(names) <= 200 else "markers",
            text=shown,
            textposition="top right",
            marker={"color": colour, "size": 7},
            hovertemplate=f"<b>%{{text}}</b><extra>{html_page.escape(kind)}</extra>",
            name=kind,
        )
    made.update_layout(title=title, xaxis={"visible": False}, yaxis={"visible": False, "scaleanchor": "x"})
    return html_page.figure(made)


def thread(places: np.ndarray, title: str) -> str:
    """Positions joined in order, to point at."""
    made = html_page.go.Figure()
    made.add_scatter(
        x=places[:, 0],
        y=places[:, 1],
        mode="lines+markers",
        text=[f"position {i}" for i in range(len(places))],
        hovertemplate="%{text}<extra></extra>",
        line={"color": "#9aa0a6", "width": 1},
        marker={"color": list(range(len(places))), "colorscale": "Cividis", "size": 6},
        showlegend=False,
    )
    made.update_layout(title=title, xaxis={"visible": False}, yaxis={"visible": False, "scaleanchor": "x"})
    return html_page.figure(made)


def clouds(projections: Projections, names: list[str], kinds: np.ndarray) -> list[str]:
    """A figure to point at for each projection."""
    return [
        scatter(places, names, kinds, f"tokens, {HOW[how]}, {when}")
        if what == "tokens"
        else thread(places, f"positions, {HOW[how]}, {when}")
        for (what, how, when), places in projections.items()
    ]


def two_times(writer: LoadedModel, settings: EmbeddingSettings) -> dict[str, Vectors]:
    """The embeddings before training, where the run tells how it began, and after."""
    after = {"after training": vectors(writer.model, settings.most)}
    if settings.init_from:
        return after
    saved = run_folder.saved_settings(Path(settings.out_dir))
    if saved.get("init_from") != "scratch":
        return after
    began = before_training(writer.model.config, saved["seed"])
    return {"before training": vectors(began, settings.most)} | after


def main(resolved: Resolved[EmbeddingSettings]) -> int:
    settings = resolved.settings
    writer = common.open_model(settings)
    count = min(settings.most, writer.tokenizer.vocab_size)
    kinds = groups(writer.tokenizer, range(count), settings.groups)
    names = common.labels(writer.tokenizer, np.arange(count))
    found = two_times(writer, settings)
    found = {when: Vectors(both.tokens[:count], both.positions) for when, both in found.items()}
    projections = all_projections(found, settings)
    path = common.place(settings, "embeddings")
    common.write(path.with_suffix(".png"), lambda beside: draw(projections, names, kinds, beside))
    parts = clouds(projections, names, kinds)
    html_page.write(path.with_suffix(".html"), "Where the tokens are", parts)
    arrays = {" ".join(key): places for key, places in projections.items()}
    common.save_arrays(settings.save_arrays, arrays | {"tokens": np.array(names), "groups": kinds})
    return 0


if __name__ == "__main__":
    sys.exit(command(main, EmbeddingSettings))
