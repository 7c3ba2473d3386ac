"""An animation of the token and position embeddings during training, in two dimensions.

    python train.py config/train_python_char.py --snapshot_interval=50
    python -m lab.movie --out_dir=out/python-char
    python -m lab.movie --out_dir=out/python-char --how=tsne --groups="vowels=aeiou;digits=0123456789"

Writes a GIF and an MP4 with the tokens, the positions and the validation loss. The run needs snapshots of its
embeddings, which train.py saves if `snapshot_interval` is set.

The projections of successive snapshots must be comparable, so that the points move smoothly. With PCA, all
snapshots are projected on the two principal components of the last one. With t-SNE, each snapshot starts from
the projection of the one before, and is then aligned with it (Procrustes).

Shapes: S snapshots, F frames, n tokens, P positions, C embedding width.
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
from fradique.tokenizer.tokenizer import load_tokenizer
from fradique.training import loss_plot
from lab import animation, common
from lab.embeddings import METHOD_NAMES, draw_positions, draw_tokens, project
from lab.token_groups import token_groups

FIGURE_SIZE, DPI = (10.8, 5.4), 100
MAX_FRAMES = 240  # limits the time of drawing; a longer animation has fewer frames per second
PAUSE_SECONDS = 2.0  # at the end of the GIF


@dataclass(frozen=True)
class MovieSettings:
    """python -m lab.movie --out_dir=out/<run> [--how=tsne] [--groups="vowels=aeiou;digits=0123456789"]"""

    out_dir: str = setting("out", "run folder", group="run", path=True)
    how: str = setting("pca", "projection method", choices=tuple(METHOD_NAMES), group="picture")
    groups: str = setting(
        "", 'groups with a color: "name=characters;name=characters"; empty: kinds of letters'
    )
    most: int = setting(600, "draw at most so many tokens, the first ones", lo=4)
    perplexity: float = setting(15.0, "of t-SNE: roughly, how many neighbors a token keeps", lo=1.0)
    seed: int = setting(0, "random seed of t-SNE", lo=0, hi=2**31)
    seconds: float = setting(12.0, "length of the animation", above=0.0, hi=600.0)
    fps: int = setting(10, "frames per second", lo=1, hi=60)
    to: str = setting(
        "", "output path without extension; empty: in the run folder", group="output", path=True
    )
    save_arrays: str = setting("", "also write the plotted arrays to this .npz file", path=True)
    debug: bool = setting(False, "show the traceback of an error")


# Compute


def project_snapshots(
    snapshots: Sequence[np.ndarray], method: str, perplexity: float = 15.0, seed: int = 0
) -> np.ndarray:
    """Comparable projections of S snapshots (n, C): (S, n, 2). method: a key of METHOD_NAMES."""
    if method == "pca":
        pca = PCA(2, svd_solver="full").fit(snapshots[-1])
        # minus the mean of each snapshot, not of the last one, so that every picture is centered
        return np.stack([(points - points.mean(0)) @ pca.components_.T for points in snapshots])
    projections = [project(snapshots[0], method, perplexity, seed)]
    for points in snapshots[1:]:
        previous = projections[-1]
        projections.append(align(project(points, method, perplexity, seed, init=previous), previous))
    return np.stack(projections)


def align(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rotate, mirror and shift points (n, 2) so that they are as near as possible to `target` (n, 2).

    Solves the orthogonal Procrustes problem (Schönemann 1966). The distances between points do not change.
    """
    centered, centered_target = points - points.mean(0), target - target.mean(0)
    u, _, vt = np.linalg.svd(centered.T @ centered_target)
    return centered @ (u @ vt) + target.mean(0)


def interpolate(points: np.ndarray, n_frames: int) -> np.ndarray:
    """Linear interpolation from the first snapshot to the last: (S, n, 2) -> (F, n, 2), with F = n_frames."""
    times = np.linspace(0, len(points) - 1, n_frames)  # in units of snapshots
    before = np.minimum(times.astype(int), max(0, len(points) - 2))
    after = np.minimum(before + 1, len(points) - 1)
    fraction = (times - before)[:, None, None]
    return points[before] * (1 - fraction) + points[after] * fraction


@dataclass(frozen=True)
class MovieData:
    """What the frames show."""

    title: str
    method: str  # pca or tsne
    steps: np.ndarray  # (F,)
    tokens: np.ndarray  # (F, n, 2)
    positions: np.ndarray | None  # (F, P, 2)
    labels: list[str]  # of the tokens
    groups: np.ndarray  # of the tokens, (n,)
    evaluated: dict[str, np.ndarray]  # of LossCurves: "step", "val", ...


def load_movie(settings: MovieSettings) -> MovieData:
    """Read and project a run's snapshots. Raises ValueError if there are fewer than two."""
    folder = Path(settings.out_dir)
    run_folder.saved_settings(folder)  # raises ValueError if it is not a run folder
    snapshots = embedding_snapshots.read_snapshots(folder)
    if len(snapshots) < 2:
        raise ValueError(
            f"{folder} has only one snapshot of its embeddings, of step {snapshots[0].step}. An animation "
            "needs at least two: train with a smaller --snapshot_interval"
        )
    n_frames = min(MAX_FRAMES, max(2, round(settings.seconds * settings.fps)))

    def project_frames(tables: Sequence[np.ndarray]) -> np.ndarray:
        """The embeddings of each snapshot, (n, C) -> the points in each frame, (F, n, 2)."""
        points = project_snapshots(tables, settings.how, settings.perplexity, settings.seed)
        return interpolate(points, n_frames)

    tokenizer = load_tokenizer(folder / run_folder.TOKENIZER_FILE)
    n_tokens = min(settings.most, tokenizer.vocab_size, len(snapshots[0].tokens))
    positions = None
    if snapshots[0].positions is not None and len(snapshots[0].positions) > 3:
        positions = project_frames([snapshot.positions for snapshot in snapshots])
    snapshot_steps = np.array([snapshot.step for snapshot in snapshots], float)  # (S,)
    return MovieData(
        title=loss_plot.run_name(folder),
        method=settings.how,
        steps=interpolate(snapshot_steps[:, None, None], n_frames)[:, 0, 0],
        tokens=project_frames([snapshot.tokens[:n_tokens] for snapshot in snapshots]),
        positions=positions,
        labels=common.token_labels(tokenizer, np.arange(n_tokens)),
        groups=token_groups(tokenizer, range(n_tokens), settings.groups),
        evaluated=loss_plot.read_curves(folder).evaluated,
    )


# Draw


def render_frames(movie: MovieData) -> Iterator[np.ndarray]:
    """Draw the frames one after another: (height, width, 3) uint8."""
    for frame in range(len(movie.steps)):
        yield common.figure_pixels(draw_frame(movie, frame))


def draw_frame(movie: MovieData, frame: int) -> Figure:
    """Tokens on the left; the validation loss, and the positions if there are any, on the right."""
    step, method = movie.steps[frame], METHOD_NAMES[movie.method]
    figure = Figure(figsize=FIGURE_SIZE, dpi=DPI)
    left = 0.02
    axes = figure.add_axes((left, 0.1, 0.54, 0.8))
    draw_tokens(axes, movie.tokens[frame], movie.labels, movie.groups)
    set_fixed_limits(axes, movie.tokens, f"tokens, {method}")
    handles, names = axes.get_legend_handles_labels()
    legend_style = {"loc": "lower left", "bbox_to_anchor": (left, 0.0), "ncols": 6, "fontsize": 8}
    figure.legend(handles, names, frameon=False, **legend_style)
    if movie.positions is not None:
        position_axes = figure.add_axes((0.63, 0.1, 0.34, 0.36))
        draw_positions(position_axes, movie.positions[frame])
        set_fixed_limits(position_axes, movie.positions, f"positions, {method}, joined in order")
    height = 0.8 if movie.positions is None else 0.3
    loss_axes = figure.add_axes((0.63, 0.9 - height, 0.34, height))
    draw_loss(loss_axes, movie.evaluated, step, movie.steps[-1])
    figure.suptitle(f"{movie.title}: step {step:,.0f}", x=left, y=0.975, ha="left", fontsize=12)
    return figure


def set_fixed_limits(axes: Axes, points: np.ndarray, title: str) -> None:
    """Set the title, and limits that contain the points of all frames (F, n, 2). Remove the ticks."""
    (min_x, max_x), (min_y, max_y) = axis_limits(points)
    axes.set(xlim=(min_x, max_x), ylim=(min_y, max_y), xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def axis_limits(points: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """(minimum, maximum) of x and of y over the points of all frames (F, n, 2), with a margin."""
    minimum, maximum = points.min((0, 1)), points.max((0, 1))  # (2,) each
    margin = 0.06 * np.maximum(maximum - minimum, 1e-9)
    (min_x, min_y), (max_x, max_y) = (minimum - margin).tolist(), (maximum + margin).tolist()
    return (min_x, max_x), (min_y, max_y)


def draw_loss(axes: Axes, evaluated: dict[str, np.ndarray], step: float, last_step: float) -> None:
    """The validation loss up to `step`, in axes whose limits are the same in all frames."""
    axes.set_title("validation loss, nats per token", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    steps, losses = evaluated["step"], evaluated["val"]
    if not len(steps):
        return
    current = float(np.interp(step, steps, losses))  # the loss at `step`, between two evaluations
    past = steps <= step
    axes.plot([*steps[past], step], [*losses[past], current], color=loss_plot.COLORS[0])
    axes.plot(step, current, "o", color=loss_plot.COLORS[1])
    axes.annotate(f"{current:.2f}", (step, current), (5, 5), textcoords="offset points", fontsize=8)
    spread = max(1e-3, float(np.ptp(losses)))
    axes.set_xlim(0, max(1.0, 1.12 * last_step))
    axes.set_ylim(losses.min() - 0.1 * spread, losses.max() + 0.15 * spread)


def main(resolved: Resolved[MovieSettings]) -> int:
    settings = resolved.settings
    movie = load_movie(settings)
    path = common.output_path_in(settings.out_dir, settings.to, "movie")
    frames = list(render_frames(movie))
    frame_seconds = settings.seconds / len(frames)
    common.write_output(
        common.add_extension(path, ".gif"),
        lambda temporary: animation.write_gif(frames, temporary, frame_seconds, PAUSE_SECONDS),
    )
    try:
        common.write_output(
            common.add_extension(path, ".mp4"),
            lambda temporary: animation.write_mp4(frames, temporary, frame_seconds),
        )
    except ImportError as error:
        print(error)
    arrays = {"steps": movie.steps, "tokens": movie.tokens, "names": np.array(movie.labels)}
    arrays["groups"] = movie.groups
    if movie.positions is not None:
        arrays["positions"] = movie.positions
    common.save_arrays(settings.save_arrays, arrays)
    return 0


if __name__ == "__main__":
    sys.exit(command(main, MovieSettings))
