"""Measurements of bench.gpu_check: speed of training and generation, losses, and memory.

They are those of bench.train, bench.sample, bench.quality and bench.memory, with few rounds. Each row returns
its figures; `describe` makes a line of text of them.
"""

import platform
import subprocess
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from bench import machine, memory, quality
from bench import sample as bench_sample
from bench import train as bench_train
from bench.gpu_context import Context, full_precision, training_corpus
from bench.gpu_worker import ROOT
from fradique.runtime.device import configure_process
from fradique.training.logger import format_count

Result = dict[str, Any]
TARGET_LOSS = 1.45  # nanoGPT's README reports 1.4697 for shakespeare_char
TINY_MODEL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2"]
# Both optimizers see as many tokens: STEPS x 64 x 256. Muon's learning rate is that of `auto`.
STEPS = 2000
LOSS_FLAGS = [f"--max_iters={STEPS}", "--eval_interval=100", "--eval_iters=20"]
QUICK_LOSS_FLAGS = [
    *TINY_MODEL,
    "--max_iters=40",
    "--warmup_iters=0",
    "--learning_rate=1e-2",
    "--eval_interval=20",
    "--eval_iters=20",
]
OPTIMIZER_FLAGS = {
    "adamw": ["--optimizer=adamw"],
    "muon": ["--optimizer=muon", "--muon_learning_rate=0.01"],
}
TRAIN_CONFIGS = {
    "124M": (
        ROOT / "config" / "train_gpt2.py",
        ["--batch_size=16", "--gradient_accumulation_steps=2"],
    ),
    "shakespeare_char": (
        ROOT / "config" / "train_shakespeare_char.py",
        ["--dataset=not_prepared_char"],  # random characters: the speed does not depend on the text
    ),
}


def matmul_row(context: Context) -> Result:
    """FLOP/s of a matrix product by dtype. float32 without TF32, tf32 with it."""
    size = 128 if context.quick else 0
    configure_process(str(context.device))  # as in training: float32 may use TF32
    peaks = machine.matmul_peaks(context.device, size)
    if context.is_cuda:
        peaks["tf32"] = peaks["float32"]
        with full_precision():
            peaks["float32"] = machine.matmul_peaks(context.device, size)["float32"]
    return {"flops": peaks}


def train_row(name: str, compile: bool) -> Callable[[Context], Result]:
    """The row that measures the training step of a config, compiled beside the other program's step."""

    def row(context: Context) -> Result:
        config, flags = TRAIN_CONFIGS[name]
        flags = [str(config), *flags, f"--device={context.device}", "--max_iters=100000"]
        flags += [f"--compile={compile and not context.quick}"]
        if context.quick:
            flags += [*TINY_MODEL, "--gradient_accumulation_steps=1"]
        options = Namespace(
            kernels=False,
            baseline=compile and not context.nanogpt,
            nanogpt=context.nanogpt if compile else None,
            rounds=1 if context.quick else 3,
            round_seconds=0.01 if context.quick else bench_train.ROUND_SECONDS,
            matmul_size=128 if context.quick else 0,
            profile=False,
        )
        result = bench_train.measure(flags, options)
        names = ("dtype", "compile", "step_seconds", "tokens_per_second", "flops", "share_of_peak")
        figures = {key: result[key] for key in (*names, "peak_memory_bytes")}
        if not compile:
            return figures
        other, ratio = ("nanoGPT", "nanogpt_ratio") if context.nanogpt else ("the textbook model", "ratio")
        tokens_per_second = figures["tokens_per_second"] / result[ratio]
        return figures | {
            "beside": other,
            "times_as_fast": result[ratio],
            "other_tokens_per_second": tokens_per_second,
        }

    return row


def decode_row(context: Context) -> Result:
    """Tokens per second of decoding with batches of 1 and 16, beside nanoGPT if there is one."""
    options = Namespace(
        shape="tiny" if context.quick else "gpt2",
        out_dir=None,
        device=str(context.device),
        dtype="auto",
        tokens=4 if context.quick else 256,
        rows="1,16",
        rounds=1 if context.quick else 3,
        nanogpt=context.nanogpt,
        huggingface=False,
    )
    result = bench_sample.measure(options)
    kept = ("dtype", "prefill_tokens_per_second", "limit_tokens_per_second", "decode_1", "decode_16")
    return {key: result[key] for key in kept}


def loss_row(optimizer: str) -> Callable[[Context], Result]:
    """The row that trains shakespeare_char's model: final loss, and when it reached TARGET_LOSS."""

    def row(context: Context) -> Result:
        data_dir, dataset = training_corpus(context)
        flags = [f"--data_dir={data_dir}", f"--device={context.device}", "--compile=False"]
        flags += [*(QUICK_LOSS_FLAGS if context.quick else LOSS_FLAGS), *OPTIMIZER_FLAGS[optimizer]]
        config = str(ROOT / "config" / "train_shakespeare_char.py")
        result = quality.measure(config, "", dataset, flags, TARGET_LOSS)
        kept = ("loss", "bits_per_byte", "steps", "tokens", "training_seconds", "seconds")
        return {"target": TARGET_LOSS, "reached": result["to"]} | {key: result[key] for key in kept}

    return row


def memory_row(name: str) -> Callable[[Context], Result]:
    """The row that compares the estimate of a config's memory with the measured peak."""

    def row(context: Context) -> Result:
        config, flags = TRAIN_CONFIGS[name]
        flags = [str(config), *flags, f"--device={context.device}"]
        if context.quick:
            flags += [*TINY_MODEL, "--gradient_accumulation_steps=1"]
        result = memory.measure(flags, processes=1)
        return {key: result[key] for key in ("estimated_bytes", "measured_bytes", "ratio")}

    return row


def describe(result: Result) -> str:
    """The figures of a row as text: those of this module in words, others as they are."""
    if "flops" in result and isinstance(result["flops"], dict):
        return ", ".join(f"{dtype} {format_count(peak)}FLOP/s" for dtype, peak in result["flops"].items())
    if "share_of_peak" in result:
        return _describe_training(result)
    if "decode_1" in result:
        return ", ".join(_describe_decoding(result[f"decode_{rows}"], rows) for rows in (1, 16))
    if "target" in result:
        return _describe_loss(result)
    if "estimated_bytes" in result:
        estimated, measured = (result[f"{kind}_bytes"] / 2**20 for kind in ("estimated", "measured"))
        return f"estimate {estimated:.0f} MiB, measured {measured:.0f} MiB, ratio {result['ratio']:.2f}"
    return ", ".join(f"{key} {_number(value)}" for key, value in result.items())


def _describe_training(result: Result) -> str:
    text = (
        f"{format_count(result['tokens_per_second'])} tokens/s, {result['share_of_peak']:.1%} of the matmul "
        f"peak in {result['dtype']}, {'compiled' if result['compile'] else 'eager'}"
    )
    if "beside" in result:
        other = format_count(result["other_tokens_per_second"])
        text += f"; {result['times_as_fast']:.2f} times as fast as {result['beside']} ({other} tokens/s)"
    return text


def _describe_decoding(rates: Result, rows: int) -> str:
    text = f"batch {rows}: {rates['tokens_per_second']:.0f} tokens/s"
    return f"{text} ({rates['nanogpt_ratio']:.2f} times nanoGPT)" if "nanogpt_ratio" in rates else text


def _describe_loss(result: Result) -> str:
    reached = result["reached"]
    when = "not reached"
    if reached:
        when = f"reached after {reached['training_seconds']:.1f} s, {format_count(reached['tokens'])} tokens"
    return (
        f"loss {result['loss']:.4f} after {format_count(result['tokens'])} tokens, "
        f"{result['training_seconds']:.1f} s of training; {result['target']} {when}"
    )


def _number(value: Any) -> str:
    """Floats with two digits, everything else unchanged."""
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def machine_info(context: Context) -> Result:
    """The card, its driver and memory, and the versions of Python, torch and CUDA."""
    info = {
        "device": machine.describe(context.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if not context.is_cuda:
        return info
    properties = torch.cuda.get_device_properties(context.device)
    driver = None
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True)
        driver = output.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        pass  # there is no nvidia-smi in some containers
    return info | {
        "driver": driver,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


# In the order of their importance: the last ones are not run if no time is left.
TABLE: dict[str, tuple[Callable[[Context], Result], float]] = {  # name: (function, seconds at most)
    "matmul": (matmul_row, 15),
    "train 124M eager": (train_row("124M", compile=False), 40),
    "train shakespeare_char eager": (train_row("shakespeare_char", compile=False), 30),
    "decode 124M": (decode_row, 40),
    "train 124M compiled": (train_row("124M", compile=True), 150),
    "train shakespeare_char compiled": (train_row("shakespeare_char", compile=True), 90),
    "loss with AdamW": (loss_row("adamw"), 75),
    "loss with Muon": (loss_row("muon"), 90),
    "memory of 124M": (memory_row("124M"), 40),
    "memory of shakespeare_char": (memory_row("shakespeare_char"), 30),
}
