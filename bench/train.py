"""Speed of train.py's training step, in tokens per second and as a share of the speed of a matrix product.

    python -m bench.train config/train_eca_char.py --baseline
    python -m bench.train config/train_shakespeare_char.py config/train_gpt2.py --batch_size=2 --profile

Options of this benchmark are written with a space (`--rounds 5`), settings of train.py with an equals sign
(`--n_layer=4`). Each config is measured separately. A corpus that is not prepared is replaced by random
tokens. `--baseline` also measures the textbook step of bench.textbook, and `--nanogpt FOLDER` that step with
nanoGPT's model, each in a process of its own. The programs take turns; ratios are medians over the rounds.
`--kernels` compares each of this project's own functions with torch's (bench.kernels). The last line is JSON.
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
from bench import kernels, machine, textbook
from bench.command import bench_command
from configurator import resolve
from fradique.io.files import find_beside_project
from fradique.io.terminal import path_argument
from fradique.runtime.device import configure_process
from fradique.training import setup
from fradique.training.logger import format_count
from fradique.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
ROUND_SECONDS = 1.0  # how long each program runs in a round; at least one step
TRACES = Path("out")  # folder for the profiles


def measure(argv: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """The speed of one config and its flags, `argv`, and the ratios to the other programs.

    args: the options of this benchmark.
    """
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_for(argv, Path(scratch))
        configure_process(settings.device, parallel=settings.parallel)
        output = io.StringIO()
        start = time.perf_counter()
        with contextlib.redirect_stdout(output):
            t = setup.setup_training(settings)
        one_step(t)
        machine.wait(t.runtime.device)
        set_up_seconds = time.perf_counter() - start
        others = {}
        with contextlib.ExitStack() as stack:
            if args.baseline:
                others["ratio"] = stack.enter_context(textbook.BaselineProcess(baseline_settings(t)))
            if args.nanogpt:
                nanogpt = textbook.BaselineProcess(baseline_settings(t), args.nanogpt)
                others["nanogpt_ratio"] = stack.enter_context(nanogpt)
            our_times, other_times = time_rounds(t, others, args.rounds, args.round_seconds)
        if args.profile:
            write_trace(t, config_name(argv))
        peaks = machine.matmul_peaks(t.runtime.device, args.matmul_size)
        result = summarize(t, our_times, other_times, peaks) | {"set_up_seconds": set_up_seconds}
        if args.kernels:
            result["kernels"] = kernels.measure(kernels.sizes_of(t))
        t.close()
    return {"config": config_name(argv), "notes": output.getvalue().splitlines(), **result}


def settings_for(argv: Sequence[str], scratch: Path) -> train.TrainSettings:
    """The settings of a config, with its run folder in `scratch`.

    If its corpus is not prepared, a corpus of random tokens is written to `scratch` and used instead.
    """
    settings = resolve(train.TrainSettings, argv).settings
    corpus = find_beside_project(Path(settings.data_dir) / settings.dataset)
    characters = settings.dataset.endswith("_char")
    settings = replace(
        settings, out_dir=str(scratch / "run"), wandb_log=False, overwrite=False, eval_only=False
    )
    if not list(corpus.glob("train*.bin")):
        write_random_corpus(scratch / "data" / "random", characters)
        settings = replace(settings, data_dir=str(scratch / "data"), dataset="random")
    return settings


def write_random_corpus(folder: Path, characters: bool) -> None:
    """A corpus of random tokens: 96 characters, or GPT-2's vocabulary."""
    folder.mkdir(parents=True)
    n_vocab = 96 if characters else 50257
    random = np.random.default_rng(0)
    for name in ("train", "val"):
        random.integers(n_vocab, size=1 << 18).astype("<u2").tofile(folder / f"{name}.bin")
    if characters:  # without a tokenizer file the tokens are those of GPT-2's BPE, as in nanoGPT
        chars = "".join(map(chr, range(33, 33 + n_vocab)))
        (folder / "tokenizer.json").write_text(json.dumps({"format": 1, "kind": "char", "chars": chars}))


def one_step(t: Trainer) -> None:
    """Run one training step."""
    train.train_step(t, train.learning_rate_at(t, t.state.step))
    t.state.step += 1


def baseline_settings(t: Trainer) -> dict[str, Any]:
    """The argument of BaselineTrainer: a GPT-2 of the same size, whatever the architecture."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    return {name: getattr(t.model.config, name) for name in names} | {
        "batch_size": t.settings.batch_size,
        "accumulation": t.settings.gradient_accumulation_steps,
        "device": str(t.runtime.device),
    }


def time_rounds(
    t: Trainer, others: dict[str, textbook.BaselineProcess], rounds: int, least_seconds: float
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds per step in each round: of our step, and of the others by name. They take turns.

    In a round all run for about the same time: `least_seconds`, or one step. They run several steps if these
    are short, because the first step after a pause is slower, and training has no pauses.
    """

    def run_our_steps(count: int) -> float:
        return machine.seconds(lambda: [one_step(t) for _ in range(count)], t.runtime.device)

    programs = {"ours": run_our_steps} | {name: other.run for name, other in others.items()}
    step_seconds = {name: min(run(1), run(1)) for name, run in programs.items()}
    round_seconds = max(least_seconds, *step_seconds.values())
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            steps = max(1, round(round_seconds / step_seconds[name]))
            times[name].append(run(steps) / steps)
    our_times = times.pop("ours")
    return our_times, times


def summarize(
    t: Trainer, our_times: list[float], other_times: dict[str, list[float]], peaks: dict[str, float]
) -> dict[str, Any]:
    """The result of a config, from the seconds per step in each round (see `time_rounds`).

    peaks: what machine.matmul_peaks returns.
    """
    step_seconds, tokens = statistics.median(our_times), t.tokens_per_step
    flops_per_second = t.model.flops_per_token() * tokens / step_seconds
    dtype = str(t.runtime.dtype).removeprefix("torch.")
    return {
        "machine": machine.describe(t.runtime.device),
        "torch": torch.__version__,
        "dtype": dtype,
        "compile": t.forward is not t.model,
        "parameters": t.model.num_params(non_embedding=False),
        "step_seconds": step_seconds,
        "tokens_per_second": tokens / step_seconds,
        "flops": flops_per_second,
        "matmul_peaks": peaks,
        # the peak of an emulated dtype is not measured
        "share_of_peak": flops_per_second / peaks.get(dtype, max(peaks.values())),
        "peak_memory_bytes": machine.peak_memory(t.runtime.device),
        **{name: machine.median_ratio(times, our_times) for name, times in other_times.items()},
        **{f"{name}_step_seconds": statistics.median(times) for name, times in other_times.items()},
    }


def write_trace(t: Trainer, name: str) -> None:
    """Profile two steps and print a summary. Write the trace, for chrome://tracing or ui.perfetto.dev."""
    with torch.profiler.profile() as profiler:
        for _ in range(2):
            one_step(t)
        machine.wait(t.runtime.device)
    TRACES.mkdir(exist_ok=True)
    path = TRACES / f"trace-{name}.json"
    profiler.export_chrome_trace(str(path))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
    print(f"trace: {path}")


def first_step_seconds(argv: Sequence[str], scratch: Path) -> float:
    """Seconds from the start of train.py to the end of its first step.

    They include imports, set-up and a short evaluation.
    """
    settings = settings_for(argv, scratch)
    flags = [
        "--max_iters=1",
        "--eval_iters=1",
        "--log_interval=1",
        "--compile=False",
        "--wandb_log=False",
        "--overwrite=True",
        f"--out_dir={scratch / 'first'}",
        f"--data_dir={settings.data_dir}",
        f"--dataset={settings.dataset}",
    ]
    command = [sys.executable, "-u", "train.py", *argv, *flags]  # -u: its lines arrive at once
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8") as process:
        for line in process.stdout:
            if line.startswith("step 1:"):
                seconds = time.perf_counter() - start
                process.terminate()
                return seconds
    raise RuntimeError(f"{' '.join(command)} ended before its first step; see its error message above")


def config_name(argv: Sequence[str]) -> str:
    """The name of the first config file, without .py; "defaults" if there is none."""
    return next((Path(a).stem for a in argv if a.endswith(".py")), "defaults")


def split_by_config(argv: Sequence[str]) -> list[list[str]]:
    """One command line per config file, each with all the flags."""
    configs = [a for a in argv if a.endswith(".py")]
    flags = [a for a in argv if not a.endswith(".py")]
    return [[config, *flags] for config in configs] or [flags]


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    peaks = ", ".join(f"{name} {format_count(peak)}FLOP/s" for name, peak in result["matmul_peaks"].items())
    lines = [
        f"{result['config']}: {format_count(result['parameters'])} parameters, {result['dtype']}, "
        f"{'compiled' if result['compile'] else 'eager'}, on {result['machine']}",
        f"  {1000 * result['step_seconds']:.4g} ms per step, "
        f"{format_count(result['tokens_per_second'])} tokens/s",
        f"  {format_count(result['flops'])}FLOP/s, {result['share_of_peak']:.1%} of the speed of a "
        f"matrix product ({peaks})",
        f"  memory {result['peak_memory_bytes'] / 2**20:.0f} MiB peak; set-up and first step in this process "
        f"{result['set_up_seconds']:.1f} s",
    ]
    if "first_step_seconds" in result:
        lines.append(
            f"  from process start to first step, not compiled: {result['first_step_seconds']:.1f} s"
        )
    for name, other in (("ratio", "the textbook step"), ("nanogpt_ratio", "nanoGPT's step")):
        if name in result:
            milliseconds = 1000 * result[f"{name}_step_seconds"]
            lines.append(f"  {result[name]:.2f} times as fast as {other} ({milliseconds:.4g} ms)")
    if "kernels" in result:
        lines.append(kernels.format_table(result["kernels"]))
    return "\n".join(lines)


@bench_command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure each config, print the results, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--baseline", action="store_true", help="also measure the textbook step of bench.textbook"
    )
    parser.add_argument(
        "--nanogpt", type=path_argument, metavar="FOLDER", help="also measure the nanoGPT in this folder"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="also compare each function of ours with torch's (on a CPU)"
    )
    parser.add_argument("--profile", action="store_true", help="write a profile of two steps to out/")
    parser.add_argument(
        "--first-step", action="store_true", help="also time train.py from its start to its first step"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="number of rounds; results are medians over them (default: %(default)s)",
    )
    parser.add_argument(
        "--round-seconds",
        type=float,
        default=ROUND_SECONDS,
        help="how long each program runs in a round; at least one step (default: %(default)s)",
    )
    parser.add_argument(
        "--matmul-size",
        type=int,
        default=0,
        help="rows of the matrices of the product; 0: enough for full speed",
    )
    args, train_flags = parser.parse_known_args(argv)  # train_flags: configs and settings of train.py
    results = []
    for arguments in split_by_config(train_flags):
        result = measure(arguments, args)
        if args.first_step:
            with tempfile.TemporaryDirectory() as scratch:
                result["first_step_seconds"] = first_step_seconds(arguments, Path(scratch))
        print(report(result), flush=True)
        results.append(result)
    print(json.dumps({"bench": "train", "results": results}))


if __name__ == "__main__":
    main()
