"""What a config reaches in a given time, and how long it takes to a given loss.

    python -m bench.quality config/auto.py config/train_machado_char.py --budgets 1m,5m --corpora machado_char
    python -m bench.quality config/train_shakespeare_char_quick.py --to 1.886

Each run is a `train.py` of its own, one after another, as a user starts it; settings have an equals sign and
go to every run. The loss is that of the whole validation split; in bits per byte corpora in characters and in
BPE compare. `--to LOSS` tells the tokens and the seconds of training after which an evaluation on the fixed
windows (`--eval_interval=…`) was that low, evaluations not counted. The last line is JSON.
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
    """One run: what it reached."""
    words = [config, *flags]
    words += [f"--time_budget={budget}"] if budget else []
    words += [f"--dataset={corpus}"] if corpus else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words, f"--out_dir={folder}"],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"train.py {' '.join(words)} ended with status {done.returncode}: {done.stderr}")
        lines = metrics_file.read_metrics(folder)
    last = lines[-1]
    found = {
        "config": Path(config).stem,
        "budget": budget,
        "corpus": corpus,
        "loss": last["final_loss"],
        "bits_per_byte": last["final_bits_per_byte"],
        "steps": last["step"],
        "tokens": max((line.get("tokens", 0) for line in lines), default=0),
        "seconds": seconds,
        "training_seconds": training_seconds(lines, last["step"]),
        "notes": [line for line in done.stdout.splitlines() if line.startswith("auto: ")],
    }
    return found | ({"to": reached(lines, to)} if to is not None else {})


def training_seconds(lines: list[dict[str, Any]], step: int) -> float:
    """Seconds of training until `step`: those of the logged steps, evaluations and checkpoints left out."""
    total, at, pace = 0.0, 0, 0.0
    for line in lines:
        if "step_seconds" in line:
            if line["step"] > step:
                pace = pace or line["step_seconds"]
                break
            total += line["step_seconds"] * (line["step"] - at)
            at, pace = line["step"], total / line["step"]
    return total + pace * (step - at)  # steps that no line tells of took as long as those before, or behind


def reached(lines: list[dict[str, Any]], loss: float) -> dict[str, Any] | None:
    """The first evaluation at or below `loss`; None where there was none."""
    for line in lines:
        if line.get("eval_val_loss", float("inf")) <= loss:
            seconds = training_seconds(lines, line["step"])
            return {"step": line["step"], "tokens": line["tokens"], "training_seconds": seconds}
    return None


def report(found: dict[str, Any]) -> str:
    """A run as people read it."""
    where = " ".join(word for word in (found["config"], found["corpus"], found["budget"]) if word)
    text = (
        f"{where}: loss {found['loss']:.4f}, {found['bits_per_byte']:.3f} bits per byte after "
        f"{found['steps']} steps, {found['training_seconds']:.1f} s of training, {found['seconds']:.1f} s "
        "in all"
    )
    if "to" in found and found["to"] is None:
        return text + "; no evaluation was that low"
    if "to" in found:
        to = found["to"]
        text += f"; that low at step {to['step']}: {to['tokens']:,} tokens, {to['training_seconds']:.1f} s"
    return "\n".join([text, *(f"  {note}" for note in found["notes"])])


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each config and corpus, a column for each budget."""
    budgets = list(dict.fromkeys(found["budget"] for found in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for found in results:
        cell = f"{found['bits_per_byte']:.3f}"
        rows.setdefault((found["config"], found["corpus"]), {})[found["budget"]] = cell
    head = ["config", "corpus", *(budget or "as set" for budget in budgets)]
    lines = [head, ["---"] * len(head)]
    lines += [[*key, *(cells.get(budget, "") for budget in budgets)] for key, cells in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run them all, print each as it ends, the table, and one line of JSON."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("configs", nargs="+", help="config files")
    add("--budgets", default="", help="time budgets, with commas: 1m,5m,15m; empty: as the config has it")
    add("--corpora", default="", help="corpora, with commas; empty: as the config has it")
    add("--to", type=float, help="tell when the validation loss was this low")
    args, flags = parser.parse_known_args(argv)
    results = []
    for corpus, config, budget in product(args.corpora.split(","), args.configs, args.budgets.split(",")):
        found = measure(config, budget, corpus, flags, args.to)
        print(report(found), flush=True)
        results.append(found)
    print(table(results))
    where = {"machine": machine.describe(device.choose_device("auto")), "torch": torch.__version__}
    print(json.dumps({"bench": "quality", **where, "results": results}))


if __name__ == "__main__":
    main()
