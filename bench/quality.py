"""The loss that a config reaches in a given time, and the time that it takes to reach a given loss.

    python -m bench.quality config/auto.py config/train_machado_char.py --budgets 1m,5m --corpora machado_char
    python -m bench.quality config/train_shakespeare_char_quick.py --to 1.886

Each run is a separate train.py, one after another. Settings are written with an equals sign and apply to
all runs. The loss is that of the whole validation split; bits per byte make corpora in characters and in
BPE comparable. `--to LOSS` reports the tokens and seconds of training (without evaluations) until an
evaluation on the fixed windows (`--eval_interval=...`) was at or below LOSS. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench import machine
from fradique.checkpointing import metrics_file
from fradique.runtime import device

ROOT = Path(__file__).resolve().parent.parent


def measure(config: str, budget: str, corpus: str, flags: Sequence[str], to: float | None) -> dict[str, Any]:
    """Run train.py once and return its results. Raises SystemExit with its message if it fails."""
    arguments = [config, *flags]
    arguments += [f"--time_budget={budget}"] if budget else []
    arguments += [f"--dataset={corpus}"] if corpus else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        start = time.perf_counter()
        completed = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments, f"--out_dir={folder}"],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        seconds = time.perf_counter() - start
        if completed.returncode:
            raise SystemExit(
                f"train.py {' '.join(arguments)} ended with status {completed.returncode}: {completed.stderr}"
            )
        lines = metrics_file.read_metrics(folder)
    last = lines[-1]
    result = {
        "config": Path(config).stem,
        "budget": budget,
        "corpus": corpus,
        "loss": last["final_loss"],
        "bits_per_byte": last["final_bits_per_byte"],
        "steps": last["step"],
        "tokens": max((line.get("tokens", 0) for line in lines), default=0),
        "seconds": seconds,
        "training_seconds": training_seconds(lines, last["step"]),
        "notes": [line for line in completed.stdout.splitlines() if line.startswith("auto: ")],
    }
    return result | ({"to": reached(lines, to)} if to is not None else {})


def training_seconds(lines: list[dict[str, Any]], step: int) -> float:
    """Seconds of training until `step`, from the logged step times; without evaluations and checkpoints."""
    total, last_step, step_seconds = 0.0, 0, 0.0
    for line in lines:
        if "step_seconds" in line:
            if line["step"] > step:
                step_seconds = step_seconds or line["step_seconds"]
                break
            total += line["step_seconds"] * (line["step"] - last_step)
            last_step, step_seconds = line["step"], total / line["step"]
    # the steps that are not logged are assumed to take as long as the logged ones
    return total + step_seconds * (step - last_step)


def reached(lines: list[dict[str, Any]], loss: float) -> dict[str, Any] | None:
    """The first evaluation at or below `loss`; None if there is none."""
    for line in lines:
        if line.get("eval_val_loss", float("inf")) <= loss:
            seconds = training_seconds(lines, line["step"])
            return {"step": line["step"], "tokens": line["tokens"], "training_seconds": seconds}
    return None


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    name = " ".join(word for word in (result["config"], result["corpus"], result["budget"]) if word)
    text = (
        f"{name}: loss {result['loss']:.4f}, {result['bits_per_byte']:.3f} bits per byte after "
        f"{result['steps']} steps, {result['training_seconds']:.1f} s of training, {result['seconds']:.1f} s "
        "in total"
    )
    if "to" in result and result["to"] is None:
        return text + "; the loss of --to was not reached"
    if "to" in result:
        to = result["to"]
        text += (
            f"; reached --to at step {to['step']}: {to['tokens']:,} tokens, {to['training_seconds']:.1f} s"
        )
    return "\n".join([text, *(f"  {note}" for note in result["notes"])])


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each config and corpus, a column for each budget."""
    budgets = list(dict.fromkeys(result["budget"] for result in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        cell = f"{result['bits_per_byte']:.3f}"
        rows.setdefault((result["config"], result["corpus"]), {})[result["budget"]] = cell
    heading = ["config", "corpus", *(budget or "as configured" for budget in budgets)]
    lines = [heading, ["---"] * len(heading)]
    lines += [[*key, *(cells.get(budget, "") for budget in budgets)] for key, cells in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all configs, print each result, the table, and one line of JSON."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("configs", nargs="+", help="config files")
    add("--budgets", default="", help="time budgets, separated by commas: 1m,5m,15m; empty: the config's")
    add("--corpora", default="", help="corpora, separated by commas; empty: the config's")
    add("--to", type=float, help="report when the validation loss reached this value")
    args, flags = parser.parse_known_args(argv)
    results = []
    for corpus, config, budget in product(args.corpora.split(","), args.configs, args.budgets.split(",")):
        result = measure(config, budget, corpus, flags, args.to)
        print(report(result), flush=True)
        results.append(result)
    print(table(results))
    environment = {"machine": machine.describe(device.choose_device("auto")), "torch": torch.__version__}
    print(json.dumps({"bench": "quality", **environment, "results": results}))


if __name__ == "__main__":
    main()
