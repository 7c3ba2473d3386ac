"""Compare all architectures of config/arch/ on one corpus, with equal parameters and equal tokens.

    python data/machado_char/prepare.py
    python -m bench.architectures [--steps 1500] [--learning_rates 1e-3 3e-3] [--readme]

The MLP width of each architecture is chosen so that it has as many parameters as gpt2, within half a percent.
All train on the same batches with the same schedule, once per learning rate. The table shows the best loss on
the whole validation split. Architectures with identical settings are trained once. The loss of glm130b, a
prefix LM, does not include the first tokens of each window, which are the hardest to predict.

Speeds are measured after all training, in rounds: in each round every architecture trains and generates for a
short time, and is compared with gpt2 in the same round. So other load on the machine affects all of them
alike. The table shows medians over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import train
from bench.command import bench_command
from configurator import resolve
from fradique.io import files
from fradique.io.terminal import path_argument
from fradique.runtime.device import configure_process
from fradique.training import evaluation, setup
from fradique.training.trainer import Trainer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = tuple(sorted(path.stem for path in (ROOT / "config" / "arch").glob("*.py")))
BASELINE = "gpt2"
# The lines of docs/ARCHITECTURES.md between which the table is.
MARKS = ("<!-- bench.architectures -->", "<!-- end of bench.architectures -->")
TABLE_FILE = ROOT / "docs" / "ARCHITECTURES.md"
HEADINGS = ("architecture", "loss", "bits per byte", "learning rate", "training speed", "generation speed")


def architecture_settings(name: str, flags: Sequence[str]) -> train.TrainSettings:
    """The settings in the config file of an architecture, overridden by `flags`."""
    return resolve(train.TrainSettings, [str(ROOT / "config" / "arch" / f"{name}.py"), *flags]).settings


def count_parameters(config: GPTConfig) -> int:
    with torch.device("meta"):  # allocates no memory
        return GPT(config).num_params(non_embedding=False)


def inner_width(config: GPTConfig, target: int) -> int:
    """The n_inner, a multiple of 8, with which a model has nearly `target` parameters."""
    at_8 = count_parameters(replace(config, n_inner=8))
    at_16 = count_parameters(replace(config, n_inner=16))
    per_8 = at_16 - at_8  # the number of parameters is linear in n_inner
    return max(8, 8 * round((target - at_8) / per_8 + 1))


def setup_run(settings: train.TrainSettings, target: int | None) -> Trainer:
    """Set up a run as train.py does, with nearly `target` parameters. Prints nothing.

    target: None for the n_inner of the settings.
    """
    configure_process(settings.device)
    with contextlib.redirect_stdout(io.StringIO()):
        t = setup.setup_training(settings)
        if target is None:
            return t
        t.close()
        n_inner = inner_width(t.model.config, target)
        return setup.setup_training(replace(settings, n_inner=n_inner, overwrite=True))


def one_step(t: Trainer) -> float:
    """Run one training step and return its loss."""
    loss, _ = train.train_step(t, train.learning_rate_at(t, t.state.step))
    t.state.step += 1
    return loss.item()


def generate_tokens(t: Trainer, count: int) -> None:
    """Generate `count` tokens, and wait until the device has finished."""
    prompt = torch.zeros(1, 1, dtype=torch.long, device=t.runtime.device)
    with t.runtime.autocast():
        tokens = t.model.generate(prompt, count, temperature=0)
    tokens[0, -1].item()  # waits for the device


@dataclass
class Result:
    """The run with the best learning rate, of one architecture or of several with identical settings."""

    names: list[str]
    loss: float
    bits_per_byte: float
    learning_rate: float
    trainer: Trainer
    # training_tokens_s, training_ratio, writing_tokens_s and writing_ratio, see `measure_speeds`
    speeds: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> GPTConfig:
        return self.trainer.model.config

    def as_json(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "learning_rate": self.learning_rate,
            "parameters": count_parameters(self.config),
            "n_inner": self.config.inner,
            **self.speeds,
        }


def train_all(names: Sequence[str], rates: Sequence[str], flags: Sequence[str], folder: Path) -> list[Result]:
    """Train each architecture with each learning rate, each run in a subfolder of `folder`.

    `names` must contain BASELINE. Architectures with identical settings share a result.
    """
    results: dict[GPTConfig, Result] = {}
    target = None
    # the baseline is first, because the others get its number of parameters
    for name in [BASELINE, *(name for name in names if name != BASELINE)]:
        for rate in rates:
            out_dir = folder / f"{name}-{rate}"
            settings = architecture_settings(
                name, [*flags, f"--learning_rate={rate}", f"--out_dir={out_dir}"]
            )
            t = setup_run(settings, target)
            config = replace(t.model.config, n_inner=t.model.config.inner)  # equal if the models are equal
            result = results.get(config)
            if result is not None and name not in result.names and rate == rates[0]:
                result.names.append(name)  # of an identical architecture, which is trained already
                t.close()
                break
            while t.state.step < settings.max_iters:
                one_step(t)
            metrics = evaluation.evaluate_val_split(t)
            t.close()
            print(f"{name}, learning rate {rate}: {metrics}", flush=True)
            if result is None or metrics.loss < result.loss:
                results[config] = Result([name], metrics.loss, metrics.bits_per_byte, float(rate), t)
            target = target or count_parameters(t.model.config)
    return list(results.values())


def measure_speeds(results: list[Result], rounds: int, steps: int, tokens: int) -> list[Result]:
    """The results with their speeds: tokens/s in training and generation, and the ratios to the baseline.

    In each round every architecture trains `steps` steps and generates `tokens` tokens. Medians over the
    rounds.
    """
    # for each result, tokens/s in each round; "writing" is the key of generation in the JSON output
    rates: list[dict[str, list[float]]] = [{"training": [], "writing": []} for _ in results]
    for _ in range(rounds):
        for result, result_rates in zip(results, rates, strict=True):
            t = result.trainer
            start = time.perf_counter()
            for _ in range(steps):
                one_step(t)
            training_end = time.perf_counter()
            generate_tokens(t, tokens)
            generation_end = time.perf_counter()
            result_rates["training"].append(steps * t.tokens_per_step / (training_end - start))
            result_rates["writing"].append(tokens / (generation_end - training_end))
    (baseline,) = (rates[i] for i, result in enumerate(results) if BASELINE in result.names)
    measured = []
    for result, result_rates in zip(results, rates, strict=True):
        speeds = {}
        for name, values in result_rates.items():
            ratios = [value / base for value, base in zip(values, baseline[name], strict=True)]
            speeds[f"{name}_tokens_s"] = statistics.median(values)
            speeds[f"{name}_ratio"] = statistics.median(ratios)
        measured.append(replace(result, speeds=speeds))
    return measured


def table(results: list[Result]) -> str:
    """A Markdown table, sorted by loss."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    for result in sorted(results, key=lambda result: result.loss):
        lines.append(
            f"| {', '.join(sorted(result.names))} | {result.loss:.3f} | {result.bits_per_byte:.2f} "
            f"| {result.learning_rate:g} | {result.speeds['training_ratio']:.2f} "
            f"| {result.speeds['writing_ratio']:.2f} |"
        )
    return "\n".join(lines)


def write_table(path: Path, text: str) -> None:
    """Replace the text between MARKS in a file. Raises ValueError if the file does not have them."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"{path} needs the lines {MARKS[0]} and {MARKS[1]} around its table")
    files.write_text(path, f"{before}{begin}\n{text}\n{end}{after}")


@bench_command
def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, print the table, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--names",
        nargs="+",
        choices=ARCHITECTURES,
        default=ARCHITECTURES,
        help="architectures (default: all)",
    )
    parser.add_argument("--dataset", default="machado_char", help="corpus (default: %(default)s)")
    parser.add_argument(
        "--data_dir",
        type=path_argument,
        default=ROOT / "data",
        help="folder that contains the corpora (default: data)",
    )
    parser.add_argument(
        "--steps", type=int, default=1500, help="training steps per run (default: %(default)s)"
    )
    parser.add_argument(
        "--learning_rates", nargs="+", default=["1e-3", "3e-3"], help="each is tried (default: 1e-3 3e-3)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of the speed measurement (default: %(default)s)"
    )
    parser.add_argument("--readme", action="store_true", help="write the table to docs/ARCHITECTURES.md")
    args, train_flags = parser.parse_known_args(argv)  # train_flags: settings of train.py
    if args.readme and len(args.names) < len(ARCHITECTURES):
        parser.error("--readme replaces the whole table: use it without --names")
    names = sorted({BASELINE, *args.names})
    flags = [
        f"--dataset={args.dataset}", f"--data_dir={args.data_dir}", f"--max_iters={args.steps}",
        "--block_size=64", "--batch_size=16", "--gradient_accumulation_steps=1", "--warmup_iters=150",
        "--lr_schedule=wsd", "--min_lr=0", "--beta2=0.99", "--overwrite=True", *train_flags,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        results = train_all(names, args.learning_rates, flags, Path(folder))
        results = measure_speeds(results, args.rounds, steps=10, tokens=100)
    text = table(results)
    print(text)
    if args.readme:
        write_table(TABLE_FILE, text)
    rows = [result.as_json(name) for result in results for name in result.names]
    print(json.dumps({"bench": "architectures", "steps": args.steps, "rows": rows}))


if __name__ == "__main__":
    main()
