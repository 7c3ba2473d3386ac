"""How large a writer a book and a machine bear: several configs, trained one after another and compared.

    python -m lab.journey config/train_golden_age_baby.py config/train_golden_age_teen.py config/train_golden_age_adult.py
    python -m lab.journey config/train_golden_age_baby.py config/train_golden_age_teen.py --time_budget=1m

A run that is there already, trained to its end with the same settings, is taken as it is; one that was
interrupted is gone on with. Settings of train.py (`--time_budget=1m`) hold for all. Writes one table (Markdown
to the terminal), a picture (PNG), and both with the curves and the samples to point at (HTML).
"""  # noqa: E501 (a command is a line)

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configurator import Resolved, command, resolve, setting
from fradique.checkpointing import checkpoint, metrics_file, run_folder
from fradique.training import loss_plot, time_budget
from fradique.training.logger import format_count
from lab import common, curves, html_page
from train import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
# what may differ between a run and what is asked for: neither changes what it comes to
BESIDE = {"out_dir", "overwrite", "debug", "init_from", "wandb_log", "wandb_project", "wandb_run_name"}
SHOWN = 80  # characters of a sample in the table


@dataclass(frozen=True)
class JourneySettings:
    """python -m lab.journey config/<a>.py config/<b>.py … [--key=value for all of them]"""

    to: str = setting("out/journey", "where to write, a name without ending", group="output")
    save_arrays: str = setting("", "keep the numbers of the picture too, in this .npz")


# Compute


@dataclass(frozen=True)
class Stage:
    """What a run came to."""

    name: str
    parameters: int
    best_val_loss: float  # on the fixed windows
    train_loss: float  # there, at the same step
    best_step: int
    loss: float  # of the whole validation split
    bits_per_byte: float
    seconds: float
    sample: str


def prepare(config: str, flags: Sequence[str]) -> tuple[TrainSettings, list[str] | None]:
    """What a config asks for, and how train.py is to be called; None where the run is there already.

    Raises ValueError where its folder holds a run with other settings.
    """
    settings = resolve(TrainSettings, [config, *flags]).settings
    folder = Path(settings.out_dir)
    if settings.overwrite or not (folder / run_folder.SETTINGS_FILE).exists():
        return settings, [config, *flags]
    saved = run_folder.saved_settings(folder)
    differ = [
        f"{name} = {saved[name]!r}, now {value!r}"
        for name, value in asdict(settings).items()
        if name not in BESIDE and saved.get(name, value) != value
    ]
    if differ:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(differ[:3])}): give --overwrite to train "
            "all anew, or move it away"
        )
    if any("final_loss" in record for record in metrics_file.read_metrics(folder)):
        return settings, None
    return settings, [f"--out_dir={folder}", "--init_from=resume"]


def train(words: Sequence[str]) -> None:
    """Call train.py, which tells how it goes. Raises ValueError where it fails."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=False)
    if done.returncode:
        raise ValueError(f"train.py {' '.join(words)} ended with status {done.returncode}: see above")


def stage(folder: Path) -> Stage:
    """Read what a run came to, from its metrics and its best weights' description."""
    records = metrics_file.read_metrics(folder)
    final = next(record for record in reversed(records) if "final_loss" in record)
    evaluated = {record["step"]: record for record in records if "eval_val_loss" in record}
    best = evaluated[min(evaluated, key=lambda step: evaluated[step]["eval_val_loss"])]
    samples = metrics_file.read_samples(folder)
    return Stage(
        name=folder.name,
        parameters=parameters(folder),
        best_val_loss=best["eval_val_loss"],
        train_loss=best["eval_train_loss"],
        best_step=best["step"],
        loss=final["final_loss"],
        bits_per_byte=final["final_bits_per_byte"],
        seconds=final["seconds"],
        sample=samples[-1][1].strip() if samples else "",
    )


def parameters(folder: Path) -> int:
    """How many numbers the best weights of a run are."""
    held = checkpoint.read_checkpoint(folder / "best", with_optimizer=False)
    return sum(tensor.numel() for tensor in held.model.values())


# Draw


HEAD = ("run", "parameters", "best val loss", "bits per byte", "step of the best", "time", "it writes")


def rows(stages: Sequence[Stage]) -> list[tuple[str, ...]]:
    """A row for each run, under HEAD."""
    return [
        (
            one.name,
            format_count(one.parameters),
            f"{one.best_val_loss:.3f}",
            f"{one.bits_per_byte:.3f}",
            f"{one.best_step:,}",
            time_budget.format_duration(one.seconds),
            common.visible(one.sample[:SHOWN]) + ("…" if len(one.sample) > SHOWN else ""),
        )
        for one in stages
    ]


def table(stages: Sequence[Stage]) -> str:
    """The rows in Markdown."""
    escaped = [tuple(word.replace("|", "\\|") for word in row) for row in rows(stages)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [HEAD, ("---",) * len(HEAD), *escaped])


def draw(stages: Sequence[Stage], path: Path) -> None:
    """Losses and times against the number of parameters."""
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    losses, times = figure.subplots(1, 2)
    ordered = sorted(stages, key=lambda one: one.parameters)
    sizes = [one.parameters for one in ordered]
    losses.plot(
        sizes, [one.best_val_loss for one in ordered], "o-", color=loss_plot.COLORS[0], label="validation"
    )
    losses.plot(
        sizes, [one.train_loss for one in ordered], "s--", color=loss_plot.COLORS[1], label="training"
    )
    losses.set_ylabel(loss_plot.Y_TITLE)
    losses.set_title("loss at the best step: the gap is what is learnt by heart", fontsize=10)
    losses.legend(frameon=False)
    times.plot(sizes, [one.seconds for one in ordered], "o-", color=loss_plot.COLORS[2])
    times.set_ylim(0, 1.15 * max(one.seconds for one in ordered))
    times.set_ylabel("seconds")
    times.set_title("time of the whole run", fontsize=10)
    for axes, heights in (
        (losses, [one.best_val_loss for one in ordered]),
        (times, [one.seconds for one in ordered]),
    ):
        name_points(axes, sizes, heights, [one.name for one in ordered])
    figure.suptitle("how large a writer does this text bear?", fontsize=12)
    figure.savefig(path)


def name_points(axes: Axes, sizes: Sequence[int], heights: Sequence[float], names: Sequence[str]) -> None:
    """A logarithmic axis of parameters, and a name above each point."""
    axes.set_xscale("log")
    low, high = min(sizes), max(sizes)
    axes.set_xlim(low / 1.8, high * 1.8)
    axes.set_xticks(sizes, [format_count(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("parameters")
    axes.grid(alpha=0.25)
    axes.margins(y=0.15)
    for size, height, name in zip(sizes, heights, names, strict=True):
        ground = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}  # over the lines
        axes.annotate(
            name, (size, height), (0, 8), textcoords="offset points", ha="center", fontsize=8, bbox=ground
        )


def parts(stages: Sequence[Stage], folders: Sequence[Path]) -> list[str]:
    """The page: table, curves, samples."""
    found = [html_page.table(rows(stages), HEAD), "<h2>How the loss fell</h2>"]
    found.append(curves.figure([loss_plot.read_curves(folder) for folder in folders]))
    for one in stages:
        found += [f"<h2>{html_page.escape(one.name)} writes</h2>", html_page.sample(one.sample)]
    return found


def main(resolved: Resolved[JourneySettings], configs: Sequence[str], flags: Sequence[str]) -> int:
    settings = resolved.settings
    if not configs:
        raise ValueError("name the configs to compare: python -m lab.journey config/a.py config/b.py")
    asked = [prepare(config, flags) for config in configs]  # all, before any is trained
    folders = [Path(one.out_dir) for one, _ in asked]
    if twice := {str(folder) for folder in folders if folders.count(folder) > 1}:
        raise ValueError(f"two of the configs write into one folder: {', '.join(sorted(twice))}")
    for (_, words), folder in zip(asked, folders, strict=True):
        if words is None:
            print(f"{folder} is trained already", flush=True)
        else:
            print(f"python train.py {' '.join(words)}", flush=True)
            train(words)
    stages = [stage(folder) for folder in folders]
    print(f"\n{table(stages)}\n")
    path = common.place_in("out", settings.to, "journey")
    common.write(path.with_suffix(".png"), lambda beside: draw(stages, beside))
    html_page.write(path.with_suffix(".html"), "How large a writer?", parts(stages, folders))
    columns: dict[str, Any] = {
        f.name: np.array([getattr(one, f.name) for one in stages]) for f in fields(Stage)
    }
    common.save_arrays(settings.save_arrays, columns)
    return 0


def split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """A command line -> the flags of this command, the configs, and the flags of train.py."""
    ours = {f"--{f.name}" for f in fields(JourneySettings)} | {"--help", "-h", "--debug", "--print_settings"}
    own = [word for word in argv if word.partition("=")[0] in ours]
    configs = [word for word in argv if word.endswith(".py") and not word.startswith("-")]
    return own, configs, [word for word in argv if word not in own and word not in configs]


if __name__ == "__main__":
    own, configs, flags = split(sys.argv[1:])
    sys.exit(command(lambda resolved: main(resolved, configs, flags), JourneySettings, own))
