"""Check a GPU: each of its paths beside the CPU's result, then speed, losses and memory, in eight minutes.

    python -m bench.gpu_check --text shakespeare.txt --nanogpt FOLDER
    python -m bench.gpu_check --device cpu --quick

It needs no network and no pytest. Each row runs in a process that is replaced after a crash, and has its own
time limit; rows for which no time is left are not run. Without `--text`, the losses are those of a part of
Python's standard library. Without `--nanogpt`, speeds are compared with the textbook model of bench.textbook.
`--quick` runs every row with tiny sizes, to test the rows themselves. The last line is JSON. The exit status
is 1 if a row has failed.
"""

import argparse
import contextlib
import functools
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.command import bench_command
from bench.gpu_cases import CASES
from bench.gpu_context import Context, describe_text, free_memory
from bench.gpu_runs import RUNS
from bench.gpu_table import TABLE, describe, machine_info
from bench.gpu_worker import Worker, serve
from fradique.io.terminal import path_argument
from fradique.runtime.device import choose_device

Result = dict[str, Any]
BUDGET_SECONDS = 480.0
LEAST_SHARE = 0.25  # a row is not started with less than this share of its limit left
MACHINE_ROW = "machine"
GROUPS = {"correctness": CASES | RUNS, "speed": TABLE}


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    group: str  # a key of GROUPS
    limit: float  # seconds at most


class RowRunner(Protocol):
    """What runs a row: a Worker, or its substitute in a test."""

    def run(self, name: str, limit: float) -> Result: ...


ROWS = [Row(name, group, limit) for group, rows in GROUPS.items() for name, (_, limit) in rows.items()]


def run_rows(
    rows: Sequence[Row],
    runner: RowRunner,
    budget: float,
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[str], None] = print,
) -> list[Result]:
    """Run the rows in turn within `budget` seconds, print a line for each, and return their results.

    A result has the row's name and group, a status (ok, failed, not run), and a result or an error.
    """
    end, results = clock() + budget, []
    for row in rows:
        left = end - clock()
        if left < LEAST_SHARE * row.limit:
            outcome: Result = {"status": "not run", "error": "no time left"}
        else:
            outcome = runner.run(row.name, min(row.limit, left))
        results.append({"name": row.name, "group": row.group, **outcome})
        report(describe_row(results[-1]))
    return results


def describe_row(row: Result) -> str:
    """A row as a line of text."""
    seconds = f"{row['seconds']:6.1f} s" if "seconds" in row else " " * 8
    text = row["error"] if "error" in row else describe(row["result"])
    return f"{row['status']:8}{row['name']:34}{seconds}  {text}"


def beside_adamw(results: Sequence[Result]) -> Result | None:
    """The losses of Muon and AdamW after the same number of tokens; None if one of them is missing."""
    losses = {row["name"]: row["result"] for row in results if row["status"] == "ok"}
    adamw, muon = losses.get("loss with AdamW"), losses.get("loss with Muon")
    if adamw is None or muon is None or adamw["tokens"] != muon["tokens"]:
        return None
    return {"tokens": adamw["tokens"], "adamw": adamw["loss"], "muon": muon["loss"]}


def select_rows(names: str) -> list[Row]:
    """The rows that `--only` names; all if it is empty. Raises ValueError for an unknown name."""
    selected = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in selected if name not in GROUPS and name not in {row.name for row in ROWS}]
    if unknown:
        choices = ", ".join([*GROUPS, *(row.name for row in ROWS)])
        raise ValueError(f"--only: there is no row {unknown[0]!r}; use {choices}")
    return [row for row in ROWS if not selected or row.name in selected or row.group in selected]


# The process of the rows


def worker_command(context: Context) -> list[str]:
    """The command of the process that runs the rows."""
    paths = {name: str(path) if (path := getattr(context, name)) else "" for name in ("text", "nanogpt")}
    options = {"device": str(context.device), "quick": context.quick, "scratch": str(context.scratch)}
    return [sys.executable, "-m", "bench.gpu_check", "--worker", json.dumps(options | paths)]


def work(options: dict[str, Any]) -> None:
    """The process of `worker_command`."""
    context = Context(
        device=torch.device(options["device"]),
        quick=options["quick"],
        text=Path(options["text"]) if options["text"] else None,
        nanogpt=Path(options["nanogpt"]) if options["nanogpt"] else None,
        scratch=Path(options["scratch"]),
    )
    functions = {name: function for rows in GROUPS.values() for name, (function, _) in rows.items()}
    rows = {
        name: functools.partial(run_row, function, context)
        for name, function in ({MACHINE_ROW: machine_info} | functions).items()
    }
    serve(rows, is_usable=lambda: clean_up(context))


def run_row(function: Callable[[Context], Result], context: Context) -> Result:
    """Run a row, and clean up: an asynchronous CUDA error of this row must not appear in the next one."""
    result = function(context)
    assert clean_up(context), "the device computes a wrong sum after this row"
    return result


def clean_up(context: Context) -> bool:
    """Free the memory of the last row. Returns whether the device can still add.

    Raises RuntimeError after a CUDA error that makes the context unusable.
    """
    torch._dynamo.reset()
    gc.collect()
    free_memory(context)
    return torch.ones(2, device=context.device).sum().item() == 2.0


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, mps or cpu (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the rows themselves")
    parser.add_argument("--text", type=path_argument, metavar="FILE", help="the text of the loss rows")
    parser.add_argument("--nanogpt", type=path_argument, metavar="FOLDER", help="compare with this nanoGPT")
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="also write the JSON to this file")
    parser.add_argument("--only", default="", help="rows or groups (correctness, speed), separated by commas")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_SECONDS, help="seconds in all (default: %(default)s)"
    )
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


@bench_command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and one line of JSON."""
    args = make_parser().parse_args(argv)
    if args.worker:
        work(args.worker)
        return
    start = time.monotonic()
    rows, device = select_rows(args.only), choose_device(args.device)
    for path in (args.text, args.nanogpt and args.nanogpt / "model.py"):
        if path and not path.is_file():
            raise ValueError(f"{path} is not a file: check --text and --nanogpt")
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        text, nanogpt = (path and path.resolve() for path in (args.text, args.nanogpt))
        context = Context(device, args.quick, text, nanogpt, scratch)
        worker = stack.enter_context(Worker(worker_command(context)))
        machine = worker.run(MACHINE_ROW, limit=60.0)
        print(describe(machine["result"]) if "result" in machine else machine["error"], flush=True)
        left = args.budget - (time.monotonic() - start)
        results = run_rows(rows, worker, left, report=functools.partial(print, flush=True))
    counts = {
        status: sum(row["status"] == status for row in results) for status in ("ok", "failed", "not run")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if comparison := beside_adamw(results):
        print(
            "Muon beside AdamW: loss {muon:.4f} and {adamw:.4f} after {tokens:,} tokens".format(**comparison)
        )
    summary = {
        "bench": "gpu_check",
        "machine": machine.get("result"),
        "quick": args.quick,
        "text": describe_text(context),
        "beside": str(args.nanogpt) if args.nanogpt else "bench.textbook: no --nanogpt was given",
        "seconds": round(time.monotonic() - start, 1),
        "counts": counts,
        "muon_beside_adamw": comparison,
        "rows": results,
    }
    if args.out:
        args.out.write_text(json.dumps(summary) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    if counts["failed"] or machine["status"] == "failed":
        sys.exit(1)


if __name__ == "__main__":
    main()
