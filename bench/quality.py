"""The loss that a config reaches in a given time, and the time that it takes to reach a given loss.

    python -m bench.quality config/auto.py config/train_machado_char.py --budgets 1m,5m --corpora machado_char
    python -m bench.quality config/train_shakespeare_char_quick.py --to 1.886 --eval_interval=10

Each run is a separate train.py, one after another. Settings are written with an equals sign and apply to
all runs. The loss is that of the best checkpoint on the whole validation split. Bits per byte is comparable
between corpora in characters and in BPE.

`--to LOSS` also reports how many tokens and seconds of training it took until the validation loss that is
estimated during training (on a fixed sample of windows, every eval_interval steps) was at or below LOSS.
The time of evaluations is not counted. The last line is JSON.
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
from bench.command import bench_command
from fradique.checkpointing import metrics_file
from fradique.runtime import device

ROOT = Path(__file__).resolve().parent.parent


def measure(
    config: str, budget: str, corpus: str, flags: Sequence[str], target_loss: float | None
) -> dict[str, Any]:
    """Run train.py once and return its results. Raises SystemExit with train.py's stderr if it fails."""
    arguments = [config, "--final_eval=whole", *flags]  # so that all runs are measured on the same text
    arguments += [f"--time_budget={budget}"] if budget else []
    arguments += [f"--dataset={corpus}"] if corpus else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments, f"--out_dir={folder}"],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(
                f"train.py {' '.join(arguments)} ended with status {process.returncode}: {process.stderr}"
            )
        records = metrics_file.read_metrics(folder)
    final = next((record for record in reversed(records) if "final_loss" in record), None)
    if final is None:
        raise SystemExit(f"train.py {' '.join(arguments)} wrote no final loss: it was not finite")
    result = {
        "config": config,
        "budget": budget,
        "corpus": corpus,
        "loss": final["final_loss"],
        "bits_per_byte": final["final_bits_per_byte"],  # None if the corpus does not state its bytes
        "steps": final["step"],
        "best_step": final["best_step"],
        "tokens": max((record.get("tokens", 0) for record in records), default=0),
        "seconds": seconds,
        "training_seconds": training_seconds(records, final["step"]),
        # what train.py logs about its automatic choices
        "notes": [line for line in process.stdout.splitlines() if line.startswith("auto: ")],
    }
    return result if target_loss is None else result | {"to": find_target(records, target_loss)}


def training_seconds(records: list[dict[str, Any]], step: int) -> float:
    """Seconds of training until `step`, from the logged step times; without evaluations and checkpoints.

    Each record's `step_seconds` is the mean since the previous record. Steps after the last record are
    assumed to take the mean so far, and steps before the first record the mean of that record.
    """
    total, last_step, mean_step_seconds = 0.0, 0, 0.0
    for record in records:
        if "step_seconds" not in record:
            continue
        if record["step"] > step:
            mean_step_seconds = mean_step_seconds or record["step_seconds"]
            break
        total += record["step_seconds"] * (record["step"] - last_step)
        last_step, mean_step_seconds = record["step"], total / record["step"]
    return total + mean_step_seconds * (step - last_step)


def find_target(records: list[dict[str, Any]], target_loss: float) -> dict[str, Any] | None:
    """The first evaluation whose validation loss is at most `target_loss`; None if there is none."""
    for record in records:
        if record.get("eval_val_loss", float("inf")) <= target_loss:
            seconds = training_seconds(records, record["step"])
            return {"step": record["step"], "tokens": record["tokens"], "training_seconds": seconds}
    return None


def format_bits(bits_per_byte: float | None) -> str:
    """Three decimals; "n/a" for a corpus that does not state how many bytes its text has."""
    return "n/a" if bits_per_byte is None else f"{bits_per_byte:.3f}"


def report(result: dict[str, Any]) -> str:
    """One line about a run, followed by the notes on its automatic choices."""
    name = " ".join(word for word in (result["config"], result["corpus"], result["budget"]) if word)
    text = (
        f"{name}: loss {result['loss']:.4f}, {format_bits(result['bits_per_byte'])} bits per byte (best "
        f"checkpoint, step {result['best_step']}) after {result['steps']} steps, "
        f"{result['training_seconds']:.1f} s of training, {result['seconds']:.1f} s in total"
    )
    if target := result.get("to"):
        text += (
            f"; target loss reached at step {target['step']}: {target['tokens']:,} tokens, "
            f"{target['training_seconds']:.1f} s"
        )
    elif "to" in result:
        text += "; target loss not reached"
    return "\n".join([text, *(f"  {note}" for note in result["notes"])])


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of bits per byte: a row for each config and corpus, a column for each budget."""
    budgets = list(dict.fromkeys(result["budget"] for result in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        cell = format_bits(result["bits_per_byte"])
        rows.setdefault((result["config"], result["corpus"]), {})[result["budget"]] = cell
    heading = ["config", "corpus", *(budget or "as configured" for budget in budgets)]
    lines = [heading, ["---"] * len(heading)]
    lines += [[*key, *(cells.get(budget, "") for budget in budgets)] for key, cells in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@bench_command
def main(argv: Sequence[str] | None = None) -> None:
    """Run all configs, print each result, the table, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="config files")
    parser.add_argument(
        "--budgets", default="", help="time budgets, separated by commas: 1m,5m,15m; empty: the config's"
    )
    parser.add_argument("--corpora", default="", help="corpora, separated by commas; empty: the config's")
    parser.add_argument(
        "--to",
        type=float,
        dest="target_loss",
        metavar="LOSS",
        help="report when the validation loss reached this value",
    )
    args, flags = parser.parse_known_args(argv)
    results = []
    for corpus, config, budget in product(args.corpora.split(","), args.configs, args.budgets.split(",")):
        result = measure(config, budget, corpus, flags, args.target_loss)
        print(report(result), flush=True)
        results.append(result)
    print(f"\nbits per byte of the validation split\n{table(results)}")
    environment = {"machine": machine.describe(device.choose_device("auto")), "torch": torch.__version__}
    print(json.dumps({"bench": "quality", **environment, "results": results}))


if __name__ == "__main__":
    main()
