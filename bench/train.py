"""How fast train.py trains: the very step that it runs, as a share of what the machine can do.

    python -m bench.train config/train_eca_char.py --baseline
    python -m bench.train config/train_shakespeare_char.py config/train_gpt2.py --batch_size=2 --profile

Flags of this bench are written with a space and settings with an equals sign: `--rounds 5`, `--n_layer=4`. Each
config is measured by itself. A corpus that is not prepared is replaced by random tokens. `--baseline` alternates
with a textbook step in a process of its own, and `--nanogpt FOLDER` with nanoGPT's own model; the ratios are the
medians over the rounds. The last line is JSON.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from bench import machine, textbook
from configurator import resolve
from fradique.training import setup
from fradique.training.logger import format_count

ROOT = Path(__file__).resolve().parent.parent
ROUND_SECONDS = 1.0  # as many steps make a round as fill this
TRACES = Path("out")


def measure(argv: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """The speeds of one config (with its flags), and the ratios that were asked for."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_for(argv, Path(scratch))
        said = io.StringIO()
        start = time.perf_counter()
        with contextlib.redirect_stdout(said):
            t = setup.setup_training(settings)
        one_step(t)
        machine.wait(t.runtime.device)
        ready = time.perf_counter() - start
        others = {}
        with contextlib.ExitStack() as stack:
            if args.baseline:
                others["ratio"] = stack.enter_context(textbook.Beside(shape_of(t)))
            if args.nanogpt:
                nanogpt = textbook.Beside(shape_of(t), args.nanogpt)
                others["nanogpt_ratio"] = stack.enter_context(nanogpt)
            ours, theirs = rounds(t, others, args.rounds)
        if args.profile:
            write_trace(t, name_of(argv))
        result = figures(t, ours, theirs) | {"set_up_seconds": ready}
        t.close()
    return {"config": name_of(argv), "notes": said.getvalue().splitlines(), **result}


def settings_for(argv: Sequence[str], scratch: Path) -> train.TrainSettings:
    """The settings of the config, its run in a scratch folder, its corpus random where it is not there."""
    asked = resolve(train.TrainSettings, argv).settings
    data = Path(asked.data_dir) / asked.dataset
    found = replace(asked, out_dir=str(scratch / "run"), wandb_log=False, overwrite=False, eval_only=False)
    if not list(data.glob("train*.bin")):
        write_random_corpus(scratch / "data" / "random", characters=asked.dataset.endswith("_char"))
        found = replace(found, data_dir=str(scratch / "data"), dataset="random")
    return found


def write_random_corpus(folder: Path, characters: bool) -> None:
    """Random tokens, of 96 characters or of GPT-2's vocabulary, as train.py reads them."""
    folder.mkdir(parents=True)
    n_vocab = 96 if characters else 50257
    random = np.random.default_rng(0)
    for name in ("train", "val"):
        random.integers(n_vocab, size=1 << 18).astype("<u2").tofile(folder / f"{name}.bin")
    if characters:  # none: nanoGPT's way to say that they are GPT-2's
        chars = "".join(map(chr, range(33, 33 + n_vocab)))
        (folder / "tokenizer.json").write_text(json.dumps({"format": 1, "kind": "char", "chars": chars}))


def one_step(t: train.Trainer) -> None:
    train.train_step(t, train.learning_rate(t))
    t.state.step += 1


def shape_of(t: train.Trainer) -> dict[str, Any]:
    """What a textbook GPT of the same size needs to know. Other architectures are measured beside GPT-2's."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    return {name: getattr(t.model.config, name) for name in names} | {
        "batch_size": t.settings.batch_size,
        "accumulation": t.settings.gradient_accumulation_steps,
        "device": str(t.runtime.device),
    }


def rounds(
    t: train.Trainer, others: dict[str, textbook.Beside], count: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds a step, round by round, of ours and of the others by turns. Each works as long as the others:
    after a pause the first step takes longer, and a training run makes none."""
    device = t.runtime.device

    def run(steps: int) -> float:
        return machine.seconds(lambda: [one_step(t) for _ in range(steps)], device)

    runs = {"": run} | {name: other.run for name, other in others.items()}
    pace = {name: min(work(1), work(1)) for name, work in runs.items()}
    length = max(ROUND_SECONDS, *pace.values())
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count):
        for name, work in runs.items():
            steps = max(1, round(length / pace[name]))
            spent[name].append(work(steps) / steps)
    return spent.pop(""), spent


def figures(t: train.Trainer, ours: list[float], theirs: dict[str, list[float]]) -> dict[str, Any]:
    """What is told of a config."""
    step, tokens = statistics.median(ours), train.tokens_per_step(t.settings)
    flops = t.model.flops_per_token() * tokens / step
    peaks = machine.matmul_peaks(t.runtime.device)
    dtype = str(t.runtime.dtype).removeprefix("torch.")
    return {
        "machine": machine.describe(t.runtime.device),
        "torch": torch.__version__,
        "dtype": dtype,
        "compile": t.forward is not t.model,
        "parameters": t.model.num_params(non_embedding=False),
        "step_seconds": step,
        "tokens_per_second": tokens / step,
        "flops": flops,
        "matmul_peaks": peaks,
        "share_of_peak": flops / peaks.get(dtype, peaks["bfloat16"]),
        "peak_memory_bytes": machine.peak_memory(t.runtime.device),
        **{name: machine.median_ratio(seconds, ours) for name, seconds in theirs.items()},
        **{f"{name}_step_seconds": statistics.median(seconds) for name, seconds in theirs.items()},
    }


def write_trace(t: train.Trainer, name: str) -> None:
    """Two steps as torch's profiler saw them, for chrome://tracing or https://ui.perfetto.dev."""
    with torch.profiler.profile() as profiler:
        for _ in range(2):
            one_step(t)
        machine.wait(t.runtime.device)
    TRACES.mkdir(exist_ok=True)
    path = TRACES / f"trace-{name}.json"
    profiler.export_chrome_trace(str(path))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
    print(f"the trace lies in {path}")


def first_step_seconds(argv: Sequence[str], scratch: Path) -> float:
    """From the start of a process to the end of its first step: imports, set-up, evaluation of nothing."""
    out = scratch / "first"
    flags = ["--max_iters=1", "--eval_iters=1", "--compile=False", f"--out_dir={out}", "--overwrite=True"]
    settings = settings_for(argv, scratch)
    data = [f"--data_dir={settings.data_dir}", f"--dataset={settings.dataset}", "--wandb_log=False"]
    command = [sys.executable, "-u", "train.py", *argv, *flags, *data, "--log_interval=1"]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1:"):
                spent = time.perf_counter() - start
                process.terminate()
                return spent
    raise RuntimeError(f"{' '.join(command)} ended before its first step; its message stands above")


def name_of(argv: Sequence[str]) -> str:
    return next((Path(a).stem for a in argv if a.endswith(".py")), "defaults")


def each_config(argv: Sequence[str]) -> list[list[str]]:
    """One list of arguments for each config among them, with the flags that all share."""
    configs = [a for a in argv if a.endswith(".py")]
    flags = [a for a in argv if not a.endswith(".py")]
    return [[config, *flags] for config in configs] or [flags]


def report(result: dict[str, Any]) -> str:
    """A result as people read it."""
    peaks = ", ".join(f"{name} {format_count(peak)}FLOP/s" for name, peak in result["matmul_peaks"].items())
    lines = [
        f"{result['config']}: {format_count(result['parameters'])} parameters, {result['dtype']}, "
        f"{'compiled' if result['compile'] else 'eager'}, on {result['machine']}",
        f"  {1000 * result['step_seconds']:.4g} ms a step, {format_count(result['tokens_per_second'])} tokens/s",
        f"  {format_count(result['flops'])}FLOP/s, {result['share_of_peak']:.1%} of the matrix product's (peaks: {peaks})",
        f"  memory {result['peak_memory_bytes'] / 2**20:.0f} MiB at most; set-up and first step here "
        f"{result['set_up_seconds']:.1f} s",
    ]
    if "first_step_seconds" in result:
        lines.append(f"  from start to first step, not compiled: {result['first_step_seconds']:.1f} s")
    for name, other in (("ratio", "the textbook step"), ("nanogpt_ratio", "nanoGPT's step")):
        if name in result:
            theirs = 1000 * result[f"{name}_step_seconds"]
            lines.append(f"  {result[name]:.2f} times as fast as {other} ({theirs:.4g} ms)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each config, print what was found, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--baseline", action="store_true", help="alternate with the textbook step")
    add(
        "--nanogpt", type=Path, metavar="FOLDER", help="alternate with the model of a nanoGPT that lies there"
    )
    add("--profile", action="store_true", help="write a trace of torch's profiler into out/")
    add("--first-step", action="store_true", help="time a process from its start to its first step, too")
    add("--rounds", type=int, default=5, help="of which the medians are told (default: %(default)s)")
    args, rest = parser.parse_known_args(argv)
    results = []
    for arguments in each_config(rest):
        result = measure(arguments, args)
        if args.first_step:
            with tempfile.TemporaryDirectory() as scratch:
                result["first_step_seconds"] = first_step_seconds(arguments, Path(scratch))
        print(report(result), flush=True)
        results.append(result)
    print(json.dumps({"bench": "train", "results": results}))


if __name__ == "__main__":
    main()
