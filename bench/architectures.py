"""Every decoder of config/arch/ on one corpus, at equal parameters and equal tokens.

    python data/machado_char/prepare.py
    python -m bench.architectures [--steps 1500] [--learning_rates 1e-3 3e-3] [--readme]

The MLP of each is made as wide as brings it to the parameters of gpt2 (within half a percent). All see the
same batches, on the same schedule, with each of the learning rates; the better whole-validation loss is told.
Speeds are taken in turns after the training, as medians relative to gpt2 in the same round, so that a busy
machine slows all alike. Architectures that are one and the same here are trained once. The loss of glm130b, a
prefix decoder, leaves out the first tokens of a window, which are the hardest to predict.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import train
from configurator import resolve
from fradique.training import evaluation, setup
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = tuple(sorted(path.stem for path in (ROOT / "config" / "arch").glob("*.py")))
BASELINE = "gpt2"
MARKS = ("<!-- bench.architectures -->", "<!-- end of bench.architectures -->")
HEADINGS = {  # of the table in each README
    "README.md": (
        "architecture",
        "loss",
        "bits per byte",
        "learning rate",
        "training speed",
        "writing speed",
    ),
    "README.pt-BR.md": (
        "arquitetura",
        "perda",
        "bits por byte",
        "taxa de aprendizado",
        "velocidade do treino",
        "velocidade da escrita",
    ),
}
Row = dict[str, Any]


def settings_of(name: str, flags: Sequence[str]) -> train.TrainSettings:
    """The settings of an architecture: its file, then the flags of this bench."""
    return resolve(train.TrainSettings, [str(ROOT / "config" / "arch" / f"{name}.py"), *flags]).settings


def parameters(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(config).num_params(non_embedding=False)


def width_for(config: GPTConfig, target: int) -> int:
    """The n_inner, a multiple of 8, that brings a model nearest to `target` parameters."""
    at_8, at_16 = (parameters(replace(config, n_inner=inner)) for inner in (8, 16))
    return max(8, 8 * round((target - at_8) / (at_16 - at_8) + 1))


def set_up(settings: train.TrainSettings, target: int | None) -> train.Trainer:
    """A run as train.py makes it, its MLP as wide as `target` asks; what it says is not shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        t = setup.setup_training(settings)
        if target is None:
            return t
        t.close()
        inner = width_for(t.model.config, target)
        return setup.setup_training(replace(settings, n_inner=inner, overwrite=True))


def one_step(t: train.Trainer) -> float:
    """Train a step; its loss."""
    loss, _ = train.train_step(t, train.learning_rate(t))
    t.state.step += 1
    return loss.item()


def write_tokens(t: train.Trainer, count: int) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.long, device=t.runtime.device)
    with t.runtime.autocast():
        t.model.generate(prompt, count, temperature=0)[0, -1].item()  # waits for a card


def train_all(names: Sequence[str], rates: Sequence[str], flags: Sequence[str], folder: Path) -> list[Row]:
    """Train each with each learning rate; a row for each, and under "run" the better run."""
    rows: list[Row] = []
    trained: dict[str, Row] = {}
    target = None
    for name in sorted(names, key=lambda name: name != BASELINE):  # the first tells how large all are
        best: Row | None = None
        for rate in rates:
            settings = settings_of(
                name, [*flags, f"--learning_rate={rate}", f"--out_dir={folder / name}-{rate}"]
            )
            t = set_up(settings, target)
            shape = json.dumps(asdict(replace(t.model.config, n_inner=t.model.config.inner)))
            if shape in trained:
                best = trained[shape]
                t.close()
                break
            while t.state.step < settings.max_iters:
                one_step(t)
            found = evaluation.evaluate_val_split(t)
            t.close()
            row = {"loss": found.loss, "bits_per_byte": found.bits_per_byte, "learning_rate": float(rate)}
            row |= {"parameters": t.model.num_params(non_embedding=False), "n_inner": t.model.config.inner}
            print(f"{name}, learning rate {rate}: {found}", flush=True)
            if best is None or row["loss"] < best["loss"]:
                best = row | {"run": t, "shape": shape}
        assert best is not None
        target = target or best["parameters"]
        trained[best["shape"]] = best
        rows.append(best | {"name": name})
    return rows


def measure_speeds(rows: list[Row], rounds: int, steps: int, tokens: int) -> None:
    """Add to each row its tokens/s in training and in writing, and both relative to the baseline's."""
    distinct = {row["shape"]: row["run"] for row in rows}
    taken: dict[str, list[tuple[float, float]]] = {shape: [] for shape in distinct}
    for _ in range(rounds):
        for shape, t in distinct.items():
            start = time.perf_counter()
            for _ in range(steps):
                one_step(t)
            middle = time.perf_counter()
            write_tokens(t, tokens)
            end = time.perf_counter()
            trained = steps * train.tokens_per_step(t.settings)
            taken[shape].append((trained / (middle - start), tokens / (end - middle)))
    base = taken[next(row["shape"] for row in rows if row["name"] == BASELINE)]
    for row in rows:
        mine = taken[row["shape"]]
        for which, key in ((0, "training"), (1, "writing")):
            row[f"{key}_tokens_s"] = statistics.median(speeds[which] for speeds in mine)
            ratios = [a[which] / b[which] for a, b in zip(mine, base, strict=True)]
            row[f"{key}_ratio"] = statistics.median(ratios)


def table(rows: list[Row], headings: Sequence[str]) -> str:
    """The rows in Markdown, the lowest loss first; names of one and the same shape share a row."""
    shapes: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["loss"]):
        shapes.setdefault(row["shape"], []).append(row)
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for alike in shapes.values():
        row, names = alike[0], ", ".join(sorted(one["name"] for one in alike))
        lines.append(
            f"| {names} | {row['loss']:.3f} | {row['bits_per_byte']:.2f} | {row['learning_rate']:g} "
            f"| {row['training_ratio']:.2f} | {row['writing_ratio']:.2f} |"
        )
    return "\n".join(lines)


def put_into_readme(path: Path, text: str) -> None:
    """Replace what stands between the marks. Raises ValueError where a README has none."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"{path} has no {MARKS[0]} and {MARKS[1]} to put the table between")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, print the table, and one line of JSON."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--names", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="which (default: all)")
    add("--dataset", default="machado_char", help="default: %(default)s")
    add("--data_dir", default=str(ROOT / "data"))
    add("--steps", type=int, default=1500, help="of training, each (default: %(default)s)")
    add("--learning_rates", nargs="+", default=["1e-3", "3e-3"], help="default: 1e-3 3e-3")
    add("--rounds", type=int, default=5, help="of the speeds (default: %(default)s)")
    add("--readme", action="store_true", help="put the table into the READMEs")
    args, others = parser.parse_known_args(argv)  # what is left are settings of train.py
    names = sorted({BASELINE, *args.names})
    flags = [
        f"--dataset={args.dataset}", f"--data_dir={args.data_dir}", f"--max_iters={args.steps}",
        "--block_size=64", "--batch_size=16", "--gradient_accumulation_steps=1", "--warmup_iters=150",
        "--lr_schedule=wsd", "--min_lr=0", "--beta2=0.99", "--overwrite=True", *others,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = train_all(names, args.learning_rates, flags, Path(folder))
        measure_speeds(rows, args.rounds, steps=10, tokens=100)
    print(table(rows, HEADINGS["README.md"]))
    if args.readme:
        for name, headings in HEADINGS.items():
            put_into_readme(ROOT / name, table(rows, headings))
    told = [{key: value for key, value in row.items() if key not in ("run", "shape")} for row in rows]
    print(json.dumps({"bench": "architectures", "steps": args.steps, "rows": told}))


if __name__ == "__main__":
    main()
