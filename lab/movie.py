"""How a model's tokens and positions find their places: its embeddings through training, as a film.

    python train.py config/train_python_char.py --snapshot_interval=50
    python -m lab.movie --out_dir=out/python-char
    python -m lab.movie --out_dir=out/python-char --how=tsne --groups="vowels=aeiou;digits=0123456789"

Writes a GIF and an MP4: tokens and positions in two dimensions, coloured, and beside them the validation loss
as it falls. `snapshot_interval` in train.py keeps the embeddings.

Points move rather than jump. PCA: all times share the two directions in which the last one differs most.
t-SNE: each time begins where the one before ended, and is turned and shifted to lie on it (Procrustes).

Shapes: F snapshots, n tokens, P positions, C width.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from configurator import Resolved, command, setting
from fradique.checkpointing import embedding_snapshots, run_folder
from fradique.tokenizer import tokenizer as tokenizers
from fradique.training import loss_plot
from lab import animation, common
from lab.embeddings import HOW, draw_positions, draw_tokens, project
from lab.token_groups import groups

SIZE, DPI = (10.8, 5.4), 100
MOST_FRAMES = 240  # with those between two snapshots


@dataclass(frozen=True)
class MovieSettings:
    """python -m lab.movie --out_dir=out/<run> [--how=tsne] [--groups="vowels=aeiou;digits=0123456789"]"""

    out_dir: str = setting("out", "the run folder", group="run")
    how: str = setting("pca", "the projection", choices=tuple(HOW), group="picture")
    groups: str = setting("", 'what has a colour: "name=characters;name=characters"; empty: kinds of letters')
    most: int = setting(600, "of a large vocabulary, the first so many tokens", lo=4)
    perplexity: float = setting(15.0, "of t-SNE: about how many neighbours a token keeps", lo=1.0)
    seed: int = setting(0, "of t-SNE", lo=0, hi=2**31)
    seconds: float = setting(12.0, "how long the film is", above=0.0, hi=600.0)
    fps: int = setting(10, "frames a second", lo=1, hi=60)
    to: str = setting("", "where to write, a name without ending; empty: into the run folder", group="output")
    save_arrays: str = setting("", "keep the numbers of the pictures too, in this .npz")
    debug: bool = setting(False, "show the traceback of an error")


# Compute


def paths_of(points: Sequence[np.ndarray], how: str, perplexity: float = 15.0, seed: int = 0) -> np.ndarray:
    """Where points stand at each time: F times (n, C) -> (F, n, 2)."""
    if how == "pca":
        pca = PCA(2, svd_solver="full").fit(points[-1])
        # about each time's own middle, so that the cloud does not wander out of the picture
        return np.stack([(now - now.mean(0)) @ pca.components_.T for now in points])
    places = [project(points[0], how, perplexity, seed)]
    for now in points[1:]:
        places.append(aligned(project(now, how, perplexity, seed, start=places[-1]), places[-1]))
    return np.stack(places)


def aligned(places: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Places (n, 2) turned, mirrored and shifted to lie on `target` (n, 2) as well as they can (orthogonal
    Procrustes; Schönemann 1966). Distances stay."""
    centred, aim = places - places.mean(0), target - target.mean(0)
    u, _, vt = np.linalg.svd(centred.T @ aim)
    return centred @ (u @ vt) + target.mean(0)


def between(places: np.ndarray, count: int) -> np.ndarray:
    """(F, n, 2) -> (count, n, 2): straight lines from snapshot to snapshot, the first and last among them."""
    times = np.linspace(0, len(places) - 1, count)
    low = np.minimum(times.astype(int), max(0, len(places) - 2))
    part = (times - low)[:, None, None]
    return places[low] * (1 - part) + places[np.minimum(low + 1, len(places) - 1)] * part


# Draw


@dataclass(frozen=True)
class Scene:
    """What the frames show: steps (count,), tokens (count, n, 2), positions (count, P, 2) or None."""

    title: str
    how: str
    steps: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray | None
    names: list[str]
    kinds: np.ndarray
    evaluated: dict[str, np.ndarray]  # "step" and "val", (N,)


def limits(places: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """x and y limits that hold all frames (count, n, 2), with a margin."""
    low, high = places.min((0, 1)), places.max((0, 1))
    margin = 0.06 * np.maximum(high - low, 1e-9)
    return tuple(zip((low - margin).tolist(), (high + margin).tolist(), strict=True))


def frames(scene: Scene) -> Iterator[np.ndarray]:
    """The pictures, one after another: (height, width, 3) uint8."""
    for i, step in enumerate(scene.steps):
        figure = Figure(figsize=SIZE, dpi=DPI)
        left, width = 0.02, 0.54
        axes = figure.add_axes((left, 0.1, width, 0.8))
        draw_tokens(axes, scene.tokens[i], scene.names, scene.kinds)
        hold(axes, scene.tokens, f"tokens, {HOW[scene.how]}")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(left, 0.0), ncols=6, frameon=False, fontsize=8
        )
        if scene.positions is not None:
            below = figure.add_axes((0.63, 0.1, 0.34, 0.36))
            draw_positions(below, scene.positions[i])
            hold(below, scene.positions, f"positions, {HOW[scene.how]}, joined in order")
        height = 0.8 if scene.positions is None else 0.3
        draw_loss(figure.add_axes((0.63, 0.9 - height, 0.34, height)), scene.evaluated, step, scene.steps[-1])
        figure.suptitle(f"{scene.title}: step {step:,.0f}", x=left, y=0.975, ha="left", fontsize=12)
        yield common.pixels(figure)


def hold(axes: Axes, places: np.ndarray, title: str) -> None:
    """The same limits in every frame."""
    (x_low, x_high), (y_low, y_high) = limits(places)
    axes.set(xlim=(x_low, x_high), ylim=(y_low, y_high), xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def draw_loss(axes: Axes, evaluated: dict[str, np.ndarray], step: float, last: float) -> None:
    """The validation loss up to `step`."""
    axes.set_title("validation loss, nats a token", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    steps, losses = evaluated["step"], evaluated["val"]
    if not len(steps):
        return
    now = float(np.interp(step, steps, losses))
    seen = steps <= step
    axes.plot([*steps[seen], step], [*losses[seen], now], color=loss_plot.COLORS[0])
    axes.plot(step, now, "o", color=loss_plot.COLORS[1])
    axes.annotate(f"{now:.2f}", (step, now), (5, 5), textcoords="offset points", fontsize=8)
    spread = max(1e-3, float(np.ptp(losses)))
    axes.set_xlim(0, max(1.0, 1.12 * last))
    axes.set_ylim(losses.min() - 0.1 * spread, losses.max() + 0.15 * spread)


def scene_of(settings: MovieSettings) -> Scene:
    """Read a run's snapshots and follow its points. Raises ValueError where there are too few."""
    folder = Path(settings.out_dir)
    run_folder.saved_settings(folder)  # a folder that is no run is told so
    kept = embedding_snapshots.read_snapshots(folder)
    if len(kept) < 2:
        raise ValueError(
            f"{folder} holds one snapshot, of step {kept[0].step}: a film needs two; train with a smaller "
            "--snapshot_interval"
        )
    tokenizer = tokenizers.load_tokenizer(folder / run_folder.TOKENIZER_FILE)
    count = min(settings.most, tokenizer.vocab_size, len(kept[0].tokens))
    follow = {"how": settings.how, "perplexity": settings.perplexity, "seed": settings.seed}
    length = min(MOST_FRAMES, max(2, round(settings.seconds * settings.fps)))
    steps = np.array([one.step for one in kept], float)
    positions = None
    if kept[0].positions is not None and len(kept[0].positions) > 3:
        positions = between(paths_of([one.positions for one in kept], **follow), length)
    return Scene(
        title=folder.name,
        how=settings.how,
        steps=between(steps[:, None, None], length)[:, 0, 0],
        tokens=between(paths_of([one.tokens[:count] for one in kept], **follow), length),
        positions=positions,
        names=common.labels(tokenizer, np.arange(count)),
        kinds=groups(tokenizer, range(count), settings.groups),
        evaluated=loss_plot.read_curves(folder).evaluated,
    )


def main(resolved: Resolved[MovieSettings]) -> int:
    settings = resolved.settings
    scene = scene_of(settings)
    path = common.place_in(settings.out_dir, settings.to, "movie")
    pictures = list(frames(scene))
    seconds = settings.seconds / len(pictures)
    common.write(path.with_suffix(".gif"), lambda beside: animation.gif(pictures, beside, seconds, hold=2.0))
    try:
        common.write(path.with_suffix(".mp4"), lambda beside: animation.mp4(pictures, beside, seconds))
    except ImportError as error:
        print(error)
    arrays = {"steps": scene.steps, "tokens": scene.tokens, "names": np.array(scene.names)}
    arrays |= {"groups": scene.kinds} | ({} if scene.positions is None else {"positions": scene.positions})
    common.save_arrays(settings.save_arrays, arrays)
    return 0


if __name__ == "__main__":
    sys.exit(command(main, MovieSettings))
