"""Train several configs one after another and compare them, for example models of different sizes.

    python -m lab.journey config/train_golden_age_baby.py config/train_golden_age_teen.py config/train_golden_age_adult.py
    python -m lab.journey config/train_golden_age_baby.py config/train_golden_age_teen.py --time_budget=1m

A finished run with the same settings is not trained again, and an interrupted run is resumed. Settings of
train.py, such as `--time_budget=1m`, apply to all configs. Prints a Markdown table, and writes a picture (PNG)
and a page with the table, the loss curves and the samples (HTML).
"""  # noqa: E501 (a command is a line)

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path

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
# Settings that do not change the result: a run whose settings differ only in these is not trained again.
IGNORED_SETTINGS = {
    "out_dir", "overwrite", "debug", "init_from", "wandb_log", "wandb_project", "wandb_run_name"
}  # fmt: skip
SAMPLE_CHARACTERS = 80  # the length of a sample in the table


TABLE_HEADER = ("run", "parameters", "best val loss", "bits per byte", "best step", "time", "sample")


@dataclass(frozen=True)
class JourneySettings:
    """python -m lab.journey config/<a>.py config/<b>.py … [--key=value for all of them]"""

    to: str = setting("out/journey", "output path without extension", group="output", path=True)
    save_arrays: str = setting("", "also write the plotted arrays to this .npz file", path=True)


# Compute


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run."""

    name: str
    parameters: int
    best_val_loss: float  # of the best evaluation, on its fixed windows; nats per token
    train_loss: float  # of the same evaluation
    best_step: int  # of the same evaluation
    loss: float  # of the final measurement on the validation split; nats per token
    bits_per_byte: float  # of the same measurement
    seconds: float  # of the whole run
    sample: str  # the last one


@dataclass(frozen=True)
class PlannedRun:
    """A run of train.py that is still to be trained, or finished already."""

    folder: Path
    arguments: list[str] | None  # of train.py; None if the run is finished


def plan_run(config: str, flags: Sequence[str]) -> PlannedRun:
    """Decide whether the run of a config must be trained, resumed, or neither.

    Raises ValueError if its run folder contains a run with other settings.
    """
    settings = resolve(TrainSettings, [config, *flags]).settings
    folder = Path(settings.out_dir)
    if settings.overwrite or not (folder / run_folder.SETTINGS_FILE).exists():
        return PlannedRun(folder, [config, *flags])
    saved = run_folder.saved_settings(folder)
    differences = [
        f"{name} was {saved[name]!r} and is {value!r} now"
        for name, value in asdict(settings).items()
        if name not in IGNORED_SETTINGS and saved.get(name, value) != value
    ]
    if differences:
        raise ValueError(
            f"{folder} contains a run with other settings ({'; '.join(differences[:3])}). Move that folder, "
            "or add --overwrite=True, which deletes the runs of all configs and trains them again"
        )
    if any("final_loss" in record for record in metrics_file.read_metrics(folder)):  # the run is finished
        return PlannedRun(folder, None)
    return PlannedRun(folder, [f"--out_dir={folder}", "--init_from=resume"])


def plan_runs(configs: Sequence[str], flags: Sequence[str]) -> list[PlannedRun]:
    """Plan the runs of all configs.

    Raises ValueError, before anything is trained, if there are no configs, two of them have the same run
    folder, or a run folder contains a run with other settings.
    """
    if not configs:
        raise ValueError(
            "no configs to compare; write, for example: python -m lab.journey config/a.py config/b.py"
        )
    runs = [plan_run(config, flags) for config in configs]
    folders = [run.folder for run in runs]
    if duplicates := {str(folder) for folder in folders if folders.count(folder) > 1}:
        raise ValueError(
            f"several configs have the same out_dir: {', '.join(sorted(duplicates))}. Give each its own"
        )
    return runs


def run_train_script(arguments: Sequence[str]) -> None:
    """Run train.py, which prints its progress. Raises ValueError if it fails."""
    result = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], check=False)
    if result.returncode:
        raise ValueError(
            f"train.py {' '.join(arguments)} failed with status {result.returncode}; see its message above"
        )


def read_result(folder: Path) -> RunResult:
    """Read the result of a finished run from its metrics, samples and best checkpoint."""
    records = metrics_file.read_metrics(folder)
    final = next(record for record in reversed(records) if "final_loss" in record)
    evaluations = {record["step"]: record for record in records if "eval_val_loss" in record}
    best = min(evaluations.values(), key=lambda record: record["eval_val_loss"])
    samples = metrics_file.read_samples(folder)
    _, last_sample = samples[-1] if samples else (None, "")
    return RunResult(
        name=loss_plot.run_name(folder),
        parameters=count_parameters(folder),
        best_val_loss=best["eval_val_loss"],
        train_loss=best["eval_train_loss"],
        best_step=best["step"],
        loss=final["final_loss"],
        bits_per_byte=final["final_bits_per_byte"],
        seconds=final["seconds"],
        sample=last_sample.strip(),
    )


def count_parameters(folder: Path) -> int:
    """The number of parameters in the best checkpoint of a run."""
    weights = checkpoint.read_checkpoint(folder / "best", with_optimizer=False).model
    return sum(tensor.numel() for tensor in weights.values())


# Draw


def table_rows(results: Sequence[RunResult]) -> list[tuple[str, ...]]:
    """A row for each run, under TABLE_HEADER."""
    return [
        (
            result.name,
            format_count(result.parameters),
            f"{result.best_val_loss:.3f}",
            f"{result.bits_per_byte:.3f}",
            f"{result.best_step:,}",
            time_budget.format_duration(result.seconds),
            common.show_whitespace(result.sample[:SAMPLE_CHARACTERS])
            + ("…" if len(result.sample) > SAMPLE_CHARACTERS else ""),
        )
        for result in results
    ]


def draw_comparison(results: Sequence[RunResult]) -> Figure:
    """Losses and training times against the number of parameters."""
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    loss_axes, time_axes = figure.subplots(1, 2)
    results = sorted(results, key=lambda result: result.parameters)
    sizes, names = [result.parameters for result in results], [result.name for result in results]
    val_losses = [result.best_val_loss for result in results]
    train_losses = [result.train_loss for result in results]
    seconds = [result.seconds for result in results]
    loss_axes.plot(sizes, val_losses, "o-", color=loss_plot.COLORS[0], label="validation")
    loss_axes.plot(sizes, train_losses, "s--", color=loss_plot.COLORS[1], label="training")
    loss_axes.set_ylabel(loss_plot.Y_LABEL)
    loss_axes.set_title("loss at the best step; a gap shows overfitting", fontsize=10)
    loss_axes.legend(frameon=False)
    time_axes.plot(sizes, seconds, "o-", color=loss_plot.COLORS[2])
    time_axes.set_ylim(0, 1.15 * max(seconds))
    time_axes.set_ylabel("seconds")
    time_axes.set_title("time of the whole run", fontsize=10)
    label_points(loss_axes, sizes, val_losses, names)
    label_points(time_axes, sizes, seconds, names)
    figure.suptitle("model size, loss and training time", fontsize=12)
    return figure


def label_points(axes: Axes, sizes: Sequence[int], values: Sequence[float], names: Sequence[str]) -> None:
    """Give the axes a logarithmic x axis of parameters, and write a name above each point."""
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.8, max(sizes) * 1.8)
    axes.set_xticks(sizes, [format_count(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("parameters")
    axes.grid(alpha=0.25)
    axes.margins(y=0.15)
    background = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}  # hides the lines below
    style = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "bbox": background}
    for size, value, name in zip(sizes, values, names, strict=True):
        axes.annotate(name, (size, value), (0, 8), **style)


def page_parts(results: Sequence[RunResult], folders: Sequence[Path]) -> list[str]:
    """The HTML of the page in parts: table, loss curves, samples."""
    curves_html = curves.curves_html([loss_plot.read_curves(folder) for folder in folders])
    parts = [html_page.table(table_rows(results), TABLE_HEADER), "<h2>Loss curves</h2>", curves_html]
    for result in results:
        parts.append(f"<h2>Sample of {escape(result.name)}</h2>")
        parts.append(html_page.sample_text(result.sample))
    return parts


def main(resolved: Resolved[JourneySettings], configs: Sequence[str], flags: Sequence[str]) -> int:
    settings = resolved.settings
    runs = plan_runs(configs, flags)
    folders = [run.folder for run in runs]
    for run in runs:
        if run.arguments is None:
            print(f"{run.folder} is already trained", flush=True)
        else:
            print(f"python train.py {' '.join(run.arguments)}", flush=True)
            run_train_script(run.arguments)
    results = [read_result(folder) for folder in folders]
    print(f"\n{common.markdown_table(TABLE_HEADER, table_rows(results))}\n")
    path = common.output_path_in("out", settings.to, "journey")
    common.write_figure(draw_comparison(results), common.add_extension(path, ".png"))
    page_path = common.add_extension(path, ".html")
    html_page.write_page(page_path, "Comparison of runs", page_parts(results, folders))
    columns = [field.name for field in fields(RunResult)]
    arrays = {column: np.array([getattr(result, column) for result in results]) for column in columns}
    common.save_arrays(settings.save_arrays, arrays)
    return 0


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Divide a command line into flags of this command, configs, and flags of train.py."""
    own_names = {f"--{field.name}" for field in fields(JourneySettings)}
    own_names |= {"--help", "-h", "--debug", "--print_settings"}
    own_flags = [argument for argument in argv if argument.partition("=")[0] in own_names]
    configs = [argument for argument in argv if argument.endswith(".py") and not argument.startswith("-")]
    train_flags = [argument for argument in argv if argument not in own_flags and argument not in configs]
    return own_flags, configs, train_flags


if __name__ == "__main__":
    own_flags, configs, train_flags = split_arguments(sys.argv[1:])
    sys.exit(command(lambda resolved: main(resolved, configs, train_flags), JourneySettings, own_flags))
