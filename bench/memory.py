"""Memory of training: a table of estimates for the sizes of GPT-2, and estimates compared with measurements.

    python -m bench.memory
    python -m bench.memory --measure config/train_shakespeare_char_cpu.py config/train_eca_char.py
    python -m bench.memory --measure --gpt2 gpt2 --batch_size=4 --gradient_accumulation_steps=2
    python -m bench.memory --measure --processes 2 config/train_eca_char.py --n_layer=4

Options of this benchmark are written with a space, settings of train.py with an equals sign.

`--measure` runs each config in a new process, or in N processes under torchrun (`--processes N`): an
evaluation, three steps and a checkpoint, not compiled. The peak memory minus the memory of the imports is
compared with the estimate of `fradique.runtime.memory_estimate`. On CUDA both numbers include only tensors
(`torch.cuda.max_memory_allocated`). The last line is JSON.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import train
from bench import machine
from bench.command import bench_command
from bench.train import ROOT, config_name, one_step, settings_for, split_by_config
from fradique.distributed import process_group
from fradique.io.terminal import path_argument
from fradique.runtime import memory_estimate
from fradique.runtime.device import configure_process
from fradique.training import model_setup, outputs, setup
from fradique.training.logger import format_count
from fradique.training.trainer import Trainer
from model import GPTConfig

# Layers, heads and width of the sizes of GPT-2 (Radford et al. 2019).
GPT2_SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
PARALLELISM = (("none", 1), ("ddp", 8), ("fsdp", 8), ("fsdp", 16))  # (kind, number of GPUs)
BATCH_SIZES = (1, 4, 12)
STEPS = 3


def table() -> list[dict[str, Any]]:
    """Estimated bytes on each GPU for each size of GPT-2, in bfloat16 with blocks of 1,024 tokens."""
    rows = []
    combinations = itertools.product(GPT2_SIZES.items(), PARALLELISM, (False, True), BATCH_SIZES)
    for (name, (layers, heads, width)), (parallel, world), checkpointing, batch_size in combinations:
        config = GPTConfig(n_layer=layers, n_head=heads, n_embd=width, bias=False)
        plan = memory_estimate.MemoryPlan(
            config,
            batch_size,
            gradient_accumulation_steps=5 * world,
            parallel=parallel,
            world=world,
            gradient_checkpointing=checkpointing,
        )
        estimate = memory_estimate.estimate_memory(plan)
        rows.append(
            {
                "model": name,
                "parameters": memory_estimate.count_parameters(config).total,
                "parallel": parallel,
                "cards": world,
                "gradient_checkpointing": checkpointing,
                "batch_size": batch_size,
                "bytes": estimate.total,
                "staying_bytes": estimate.persistent,
            }
        )
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of GiB on each GPU, without gradient checkpointing and (in parentheses) with it."""
    headings = ["model", "GPUs", "weights and optimizer", *(f"batch_size={size}" for size in BATCH_SIZES)]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for name in GPT2_SIZES:
        for parallel, world in PARALLELISM:
            group = [r for r in rows if (r["model"], r["parallel"], r["cards"]) == (name, parallel, world)]
            # (batch size, gradient checkpointing) -> GiB
            gib = {(r["batch_size"], r["gradient_checkpointing"]): r["bytes"] / 2**30 for r in group}
            size = f"{name}, {format_count(group[0]['parameters'])}"
            gpus = "1" if world == 1 else f"{world}, {parallel}"
            cells = [
                f"{gib[batch_size, False]:.1f} ({gib[batch_size, True]:.1f})" for batch_size in BATCH_SIZES
            ]
            lines.append(
                f"| {size} | {gpus} | {group[0]['staying_bytes'] / 2**30:.1f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


# Measurement


def run_once(argv: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Run an evaluation, some steps and a checkpoint in this process.

    Returns the peak memory and its estimate, in bytes. scratch: a folder that all ranks share.
    """
    imports_bytes = machine.peak_memory(torch.device("cpu"))
    with contextlib.redirect_stdout(io.StringIO()):
        # a folder for each rank, because each may write a random corpus
        rank_folder = scratch / f"rank-{process_group.rank_info().rank}"
        settings = dataclasses.replace(settings_for(argv, rank_folder), out_dir=str(scratch / "run"))
        configure_process(settings.device, parallel=settings.parallel, backend=settings.backend)
        t = setup.setup_training(dataclasses.replace(settings, eval_iters=1, compile=False))
        device = t.runtime.device
        on_cpu = device.type == "cpu"
        other_bytes = imports_bytes if on_cpu else 0  # included in the peaks, but not in the estimate
        train.evaluate_and_save(t)
        for _ in range(STEPS):
            one_step(t)
        machine.wait(device)
        peak = machine.peak_memory(device) - other_bytes
        outputs.save_checkpoint(t)
        with_checkpoint = machine.peak_memory(device) - other_bytes
        plan = model_setup.memory_plan(t.settings, t.model.config, t.runtime)
        estimated = memory_estimate.estimate_memory(plan)
        tensors_bytes = peak  # on a GPU the peak is that of tensors only
        if on_cpu:
            step_peak, _ = recorded(lambda: one_step(t))
            tensors_bytes = state_bytes(t) + step_peak
        t.close()
        t.forward = t.model  # frees the DDP wrapper, which must not outlive the process group
        t.runtime.barrier()
        t.runtime.close()
    estimate = estimated.total if on_cpu else estimated.allocated
    return {
        "config": config_name(argv),
        "machine": machine.describe(device),
        "torch": torch.__version__,
        "plan": {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name != "config"},
        "shape": dataclasses.asdict(plan.config),
        "parameters": memory_estimate.count_parameters(plan.config).total,
        "imports_bytes": imports_bytes,
        "measured_bytes": peak,
        "with_checkpoint_bytes": with_checkpoint,
        "estimated_bytes": estimate,
        "ratio": estimate / peak,
        "tensors_bytes": tensors_bytes,  # weights, optimizer state, and what a step allocates at its peak
        "estimated_tensors_bytes": max(
            m.allocated for m in memory_estimate.estimate_phases(plan) if m.phase != "evaluation"
        ),
        "estimate": dataclasses.asdict(estimated),
    }


def state_bytes(t: Trainer) -> int:
    """Bytes of this process's weights and optimizer state."""
    tensors = [p.detach() for p in t.model.parameters()]
    for optimizer in t.optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(process_group.local_tensor(x).nbytes for x in tensors)


def recorded(step: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the tensors that `step` has allocated on a CPU, at the peak and at the end.

    Recorded by torch's profiler.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()  # negative when memory is freed
        peak = max(peak, allocated)
    return peak, allocated


def measure(argv: Sequence[str], processes: int) -> dict[str, Any]:
    """Call `run_once` in a new process, or in several under torchrun.

    Returns the result with the highest peak. Raises ValueError if a process fails.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, *(torchrun if processes > 1 else [])]
        command += ["-m", "bench.memory", f"--once={scratch}", *argv]
        completed = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    results = list(_results(completed.stdout))
    if completed.returncode or len(results) != processes:
        raise ValueError(f"{' '.join(command)} failed:\n{completed.stderr[-2000:]}")
    return max(results, key=lambda result: result["measured_bytes"])


def _results(output: str) -> Iterator[dict[str, Any]]:
    """The JSON results in the output of several processes, which may print on the same line."""
    decoder, position = json.JSONDecoder(), output.find('{"config"')
    while position >= 0:
        result, position = decoder.raw_decode(output, position)
        yield result
        position = output.find('{"config"', position)


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    plan, shape = result["plan"], result["shape"]
    mib = {
        name.removesuffix("_bytes"): value / 2**20
        for name, value in result.items()
        if name.endswith("_bytes")
    }
    return (
        f"{result['config']}: {format_count(result['parameters'])} parameters, {shape['n_layer']} layers, "
        f"width {shape['n_embd']}, {plan['batch_size']} x {shape['block_size']} tokens, "
        f"vocabulary {shape['vocab_size']}, {plan['dtype']}, {plan['optimizer']}, {plan['world']} processes"
        f"{', gradient checkpointing' if plan['gradient_checkpointing'] else ''}: "
        f"estimate {mib['estimated']:.0f} MiB, measured {mib['measured']:.0f} MiB, "
        f"ratio {result['ratio']:.2f}; "
        f"with a checkpoint {mib['with_checkpoint']:.0f} MiB; tensors only: "
        f"estimate {mib['estimated_tensors']:.0f} MiB, torch's profiler {mib['tensors']:.0f} MiB"
    )


@bench_command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table or the measurements, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="run each config and compare the estimate with the measured peak",
    )
    parser.add_argument("--gpt2", choices=tuple(GPT2_SIZES), help="model size for --measure")
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes under torchrun (default: %(default)s)"
    )
    parser.add_argument("--once", type=path_argument, help=argparse.SUPPRESS)
    args, train_flags = parser.parse_known_args(argv)  # train_flags: configs and settings of train.py
    if args.gpt2:
        layers, heads, width = GPT2_SIZES[args.gpt2]
        train_flags = [f"--n_layer={layers}", f"--n_head={heads}", f"--n_embd={width}", *train_flags]
    if args.once:
        sys.stdout.write(json.dumps(run_once(train_flags, args.once)) + "\n")
        return
    if not args.measure:
        rows = table()
        print(as_markdown(rows))
        print(json.dumps({"bench": "memory", "rows": rows}))
        return
    results = []
    for arguments in split_by_config(train_flags):
        results.append(measure(arguments, args.processes))
        print(report(results[-1]), flush=True)
    print(json.dumps({"bench": "memory", "results": results}))


if __name__ == "__main__":
    main()
