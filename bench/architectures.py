"""Compare all architectures of config/arch/ on one corpus, with equal parameters and equal tokens.

    python data/machado_char/prepare.py
    python -m bench.architectures [--steps 1500] [--learning_rates 1e-3 3e-3] [--readme]

The MLP width of each is chosen so that it has as many parameters as gpt2 (within half a percent). All train
on the same batches and schedule, once per learning rate; the best loss on the whole validation split is
reported. Speeds are measured afterwards, in turns, as medians relative to gpt2 in the same round, so that
other load on the machine slows all of them equally. Architectures with identical settings are trained once.
The loss of glm130b, a prefix LM, excludes the first tokens of each window, which are the hardest to
predict.
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
from configurator import resolve
from fradique.io import files
from fradique.runtime.device import configure_process
from fradique.training import evaluation, setup
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = tuple(sorted(path.stem for path in (ROOT / "config" / "arch").glob("*.py")))
BASELINE = "gpt2"
MARKS = ("<!-- bench.architectures -->", "<!-- end of bench.architectures -->")
TABLE_FILE = ROOT / "docs" / "ARCHITECTURES.md"
HEADINGS = ("architecture", "loss", "bits per byte", "learning rate", "training speed", "generation speed")


def settings_of(name: str, flags: Sequence[str]) -> train.TrainSettings:
    """The settings of an architecture: its file, then the flags of this benchmark."""
    return resolve(train.TrainSettings, [str(ROOT / "config" / "arch" / f"{name}.py"), *flags]).settings


def parameters(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(config).num_params(non_embedding=False)


def width_for(config: GPTConfig, target: int) -> int:
    """The n_inner, a multiple of 8, with which a model has nearly `target` parameters."""
    at_8, at_16 = (parameters(replace(config, n_inner=inner)) for inner in (8, 16))
    return max(8, 8 * round((target - at_8) / (at_16 - at_8) + 1))


def set_up(settings: train.TrainSettings, target: int | None) -> train.Trainer:
    """A run as train.py sets it up, with about `target` parameters (None: as configured). Prints nothing."""
    configure_process(settings.device)  # as train.py does
    with contextlib.redirect_stdout(io.StringIO()):
        t = setup.setup_training(settings)
        if target is None:
            return t
        t.close()
        inner = width_for(t.model.config, target)
        return setup.setup_training(replace(settings, n_inner=inner, overwrite=True))


def one_step(t: train.Trainer) -> float:
    """Run one training step and return its loss."""
    loss, _ = train.train_step(t, train.learning_rate(t))
    t.state.step += 1
    return loss.item()


def generate_tokens(t: train.Trainer, count: int) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.long, device=t.runtime.device)
    with t.runtime.autocast():
        t.model.generate(prompt, count, temperature=0)[0, -1].item()  # .item() waits for the device


@dataclass
class Result:
    """The best run of an architecture over the learning rates."""

    names: list[str]  # architectures with identical settings
    loss: float
    bits_per_byte: float
    learning_rate: float
    trainer: train.Trainer
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
            "parameters": parameters(self.config),
            "n_inner": self.config.inner,
            **self.speeds,
        }


def train_all(names: Sequence[str], rates: Sequence[str], flags: Sequence[str], folder: Path) -> list[Result]:
    """Train each architecture with each learning rate; identical ones share a result."""
    results: dict[GPTConfig, Result] = {}
    target = None
    # gpt2 first: it sets the number of parameters of all
    for name in sorted(names, key=lambda name: name != BASELINE):
        for rate in rates:
            out_dir = folder / f"{name}-{rate}"
            settings = settings_of(name, [*flags, f"--learning_rate={rate}", f"--out_dir={out_dir}"])
            t = set_up(settings, target)
            shape = replace(t.model.config, n_inner=t.model.config.inner)
            result = results.get(shape)
            if result is not None and name not in result.names and rate == rates[0]:
                result.names.append(name)
                t.close()
                break
            while t.state.step < settings.max_iters:
                one_step(t)
            metrics = evaluation.evaluate_val_split(t)
            t.close()
            print(f"{name}, learning rate {rate}: {metrics}", flush=True)
            if result is None or metrics.loss < result.loss:
                results[shape] = Result([name], metrics.loss, metrics.bits_per_byte, float(rate), t)
            target = target or parameters(t.model.config)
    return list(results.values())


def measure_speeds(results: list[Result], rounds: int, steps: int, tokens: int) -> list[Result]:
    """The results with tokens/s in training and generation, and both relative to the baseline's."""
    # times[result][round] = tokens/s in (training, generation)
    times: list[list[tuple[float, float]]] = [[] for _ in results]
    for _ in range(rounds):
        for result, speeds in zip(results, times, strict=True):
            t = result.trainer
            start = time.perf_counter()
            for _ in range(steps):
                one_step(t)
            middle = time.perf_counter()
            generate_tokens(t, tokens)
            end = time.perf_counter()
            speeds.append((steps * t.tokens_per_step / (middle - start), tokens / (end - middle)))
    baseline = next(speeds for result, speeds in zip(results, times, strict=True) if BASELINE in result.names)
    measured = []
    for result, speeds in zip(results, times, strict=True):
        medians = {}
        for i, name in enumerate(("training", "writing")):
            medians[f"{name}_tokens_s"] = statistics.median(speed[i] for speed in speeds)
            ratios = [speed[i] / base[i] for speed, base in zip(speeds, baseline, strict=True)]
            medians[f"{name}_ratio"] = statistics.median(ratios)
        measured.append(replace(result, speeds=medians))
    return measured


def table(results: list[Result]) -> str:
    """A Markdown table, the lowest loss first."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    for result in sorted(results, key=lambda result: result.loss):
        lines.append(
            f"| {', '.join(sorted(result.names))} | {result.loss:.3f} | {result.bits_per_byte:.2f} "
            f"| {result.learning_rate:g} | {result.speeds['training_ratio']:.2f} "
            f"| {result.speeds['writing_ratio']:.2f} |"
        )
    return "\n".join(lines)


def write_table(path: Path, text: str) -> None:
    """Replace the table between the marks in a file. Raises ValueError if it has no marks."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"{path} needs the lines {MARKS[0]} and {MARKS[1]} around its table")
    files.write_text(path, f"{before}{begin}\n{text}\n{end}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, print the table, and one line of JSON."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--names",
        nargs="+",
        choices=ARCHITECTURES,
        default=ARCHITECTURES,
        help="architectures (default: all)",
    )
    add("--dataset", default="machado_char", help="corpus (default: %(default)s)")
    add("--data_dir", default=str(ROOT / "data"), help="folder of the corpora")
    add("--steps", type=int, default=1500, help="training steps of each (default: %(default)s)")
    add("--learning_rates", nargs="+", default=["1e-3", "3e-3"], help="default: 1e-3 3e-3")
    add("--rounds", type=int, default=5, help="rounds of the speed measurement (default: %(default)s)")
    add("--readme", action="store_true", help="write the table to docs/ARCHITECTURES.md")
    args, train_flags = parser.parse_known_args(argv)  # all others are settings of train.py
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
