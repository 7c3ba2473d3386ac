"""Memory of training: a computed table for the sizes of GPT-2, and estimates compared with measured peaks.

    python -m bench.memory
    python -m bench.memory --measure config/train_shakespeare_char_cpu.py config/train_eca_char.py
    python -m bench.memory --measure --gpt2 gpt2 --batch_size=4 --gradient_accumulation_steps=2
    python -m bench.memory --measure --processes 2 config/train_eca_char.py --n_layer=4

Options of this benchmark are written with a space, settings of train.py with an equals sign. `--measure`
runs an evaluation, three steps and a checkpoint of each config in a new process (`--processes N`: under
torchrun), not compiled, and compares its peak memory without the imports with the estimate of
`fradique.runtime.memory_estimate`. On CUDA both count only tensors (`torch.cuda.max_memory_allocated`). The
last line is JSON.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import train
from bench import machine
from bench.train import ROOT, config_name, one_step, settings_for, split_by_config
from fradique.distributed import process_group
from fradique.runtime import memory_estimate
from fradique.runtime.device import configure_process
from fradique.training import model_setup, outputs, setup
from fradique.training.logger import format_count
from fradique.training.trainer import Trainer
from model import GPTConfig

# GPT-2's sizes (Radford et al. 2019): layers, heads, width. The vocabulary is padded as train.py pads it.
FAMILY = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
SHARING = (("none", 1), ("ddp", 8), ("fsdp", 8), ("fsdp", 16))
BATCHES = (1, 4, 12)
STEPS = 3


def table() -> list[dict[str, Any]]:
    """Bytes on each device for each size of GPT-2, in bfloat16 with blocks of 1,024 tokens."""
    return [
        {
            "model": name,
            "parameters": memory_estimate.count_parameters(shape).total,
            "parallel": parallel,
            "cards": world,
            "gradient_checkpointing": checkpointing,
            "batch_size": batch,
            "bytes": estimated.total,
            "staying_bytes": estimated.persistent,
        }
        for name, (layers, heads, width) in FAMILY.items()
        for shape in [GPTConfig(n_layer=layers, n_head=heads, n_embd=width, bias=False)]
        for parallel, world in SHARING
        for checkpointing in (False, True)
        for batch in BATCHES
        for estimated in [
            memory_estimate.estimate_memory(
                memory_estimate.MemoryPlan(
                    shape,
                    batch,
                    5 * world,
                    parallel=parallel,
                    world=world,
                    gradient_checkpointing=checkpointing,
                )
            )
        ]
    ]


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: GiB on each device, without (with) gradient checkpointing."""
    headings = ["model", "GPUs", "weights and optimizer", *(f"batch_size={batch}" for batch in BATCHES)]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for name in FAMILY:
        for parallel, world in SHARING:
            group = [r for r in rows if (r["model"], r["parallel"], r["cards"]) == (name, parallel, world)]
            gib = {(r["batch_size"], r["gradient_checkpointing"]): r["bytes"] / 2**30 for r in group}
            size = f"{name}, {format_count(group[0]['parameters'])}"
            gpus = "1" if world == 1 else f"{world}, {parallel}"
            cells = [f"{gib[batch, False]:.1f} ({gib[batch, True]:.1f})" for batch in BATCHES]
            lines.append(
                f"| {size} | {gpus} | {group[0]['staying_bytes'] / 2**30:.1f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


# Measurement


def run_once(argv: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Run an evaluation, some steps and a checkpoint; return peak memory and estimate in bytes.

    scratch: a folder that all ranks share.
    """
    before = machine.peak_memory(torch.device("cpu"))
    with contextlib.redirect_stdout(io.StringIO()):
        rank_folder = (
            scratch / f"rank-{process_group.rank_info().rank}"
        )  # each rank may write a random corpus
        settings = dataclasses.replace(settings_for(argv, rank_folder), out_dir=str(scratch / "run"))
        # as train.py does
        configure_process(settings.device, parallel=settings.parallel, backend=settings.backend)
        t = setup.setup_training(dataclasses.replace(settings, eval_iters=1, compile=False))
        device = t.runtime.device
        train.evaluate_and_save(t)
        for _ in range(STEPS):
            one_step(t)
        machine.wait(device)
        peak = machine.peak_memory(device) - (before if device.type == "cpu" else 0)
        outputs.save_checkpoint(t)
        with_checkpoint = machine.peak_memory(device) - (before if device.type == "cpu" else 0)
        plan = model_setup.memory_plan(t.settings, t.model.config, t.runtime)
        estimated = memory_estimate.estimate_memory(plan)
        tensors = state_bytes(t) + recorded(lambda: one_step(t))[0] if device.type == "cpu" else peak
        t.close()
        t.forward = t.model
        t.runtime.barrier()
        t.runtime.close()
    estimate = estimated.total if device.type == "cpu" else estimated.allocated
    return {
        "config": config_name(argv),
        "machine": machine.describe(device),
        "torch": torch.__version__,
        "plan": {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name != "config"},
        "shape": dataclasses.asdict(plan.config),
        "parameters": memory_estimate.count_parameters(plan.config).total,
        "imports_bytes": before,
        "measured_bytes": peak,
        "with_checkpoint_bytes": with_checkpoint,
        "estimated_bytes": estimate,
        "ratio": estimate / peak,
        "tensors_bytes": tensors,  # of a step, as torch's profiler records them
        "estimated_tensors_bytes": max(
            m.allocated for m in memory_estimate.estimate_phases(plan) if m.phase != "evaluation"
        ),
        "estimate": dataclasses.asdict(estimated),
    }


def state_bytes(t: Trainer) -> int:
    """Bytes of this process's weights and optimizer state."""
    tensors = [p.detach() for p in t.model.parameters()]
    tensors += [x for optimizer in t.optimizers for state in optimizer.state.values() for x in state.values()]
    local = (x.to_local() if isinstance(x, DTensor) else x for x in tensors if isinstance(x, torch.Tensor))
    return sum(x.nbytes for x in local)


def recorded(step: Callable[[], object]) -> tuple[int, int]:
    """Bytes of tensors that `step` allocates on a CPU, at the peak and at the end (from torch's profiler)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def measure(argv: Sequence[str], processes: int) -> dict[str, Any]:
    """`run_once` in a new process, or in several under torchrun: the result with the highest peak."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "bench.memory", f"--once={scratch}", *argv]
        if processes > 1:
            torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
            command = [sys.executable, "-m", *torchrun, *command[2:]]
        completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    results = list(_results(completed.stdout))
    if completed.returncode or len(results) != processes:
        raise RuntimeError(f"{' '.join(command)} failed:\n{completed.stderr[-2000:]}")
    return max(results, key=lambda result: result["measured_bytes"])


def _results(output: str) -> Iterator[dict[str, Any]]:
    """The JSON results in the output of several processes, whose lines may be joined."""
    decoder, position = json.JSONDecoder(), output.find('{"config"')
    while position >= 0:
        result, position = decoder.raw_decode(output, position)
        yield result
        position = output.find('{"config"', position)


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    plan, shape = result["plan"], result["shape"]
    mib = {name.removesuffix("_bytes"): value / 2**20 for name, value in result.items() if "_bytes" in name}
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


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table or the measurements, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--measure",
        action="store_true",
        help="run each config and compare the estimate with the measured peak",
    )
    add("--gpt2", choices=tuple(FAMILY), help="model size for --measure")
    add("--processes", type=int, default=1, help="number of processes under torchrun (default: %(default)s)")
    add("--once", type=Path, help=argparse.SUPPRESS)
    args, train_flags = parser.parse_known_args(argv)
    if args.gpt2:
        layers, heads, width = FAMILY[args.gpt2]
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
