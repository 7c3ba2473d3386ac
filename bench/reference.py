"""Speed of the reference implementations: NumPy and C compared with eager PyTorch, and plain Python alone.

    python -m bench.reference                      GPT-2 124M, one row of 256 tokens, forward and backward
    python -m bench.reference --n_layer 2 --rounds 5

PyTorch runs `model.py` in float32, eager; NumPy and C read the same random weights from a file. They take
turns, so that other load on the machine slows all of them equally; ratios are medians over the rounds. The
C program is compiled first (as `make reference` does). The last line is JSON.
"""

import argparse
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench import machine
from model import GPT, GPTConfig

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=fast")
CPU = torch.device("cpu")


def load_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REFERENCE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_python(seconds: float) -> float:
    """Training tokens per second of one layer of width 16, in rows of 16 tokens, including Adam."""
    reference = load_module("gpt_python")
    model = reference.GPT(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=16)
    adam, ids, rows, start = reference.Adam(model), list(range(17)), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(8):
            model.learn(ids, 1 / 8)
        adam.step(0.01)
        rows += 8
    return 16 * rows / (time.perf_counter() - start)


def write_gpt2_file(model: GPT, path: Path) -> None:
    """Write the weights in Hugging Face's GPT-2 format: no "transformer." prefix, linear layers (in, out)."""
    tensors = {}
    for name, weight in model.named_parameters():
        transposed = weight.t() if weight.ndim == 2 and ".h." in name else weight
        tensors[name.removeprefix("transformer.")] = transposed.detach().contiguous()
    save_file(tensors, path)


def torch_step(model: GPT, ids: torch.Tensor) -> Callable[[], float]:
    """A function that runs a forward and backward pass and returns its seconds."""

    def step() -> float:
        start = time.perf_counter()
        model.zero_grad()
        logits = model(ids[:, :-1], ids[:, 1:].contiguous())
        logits[1].backward()
        return time.perf_counter() - start

    return step


def numpy_step(weights: Path, ids: np.ndarray) -> Callable[[], float]:
    """As `torch_step`, with reference/gpt_numpy.py."""
    model = load_module("gpt_numpy").load(weights)

    def step() -> float:
        start = time.perf_counter()
        model.gradients(ids[:, :-1], ids[:, 1:])
        return time.perf_counter() - start

    return step


def c_step(program: Path, weights: Path, tokens: Path, batch: int, block: int) -> Callable[[], float]:
    """As `torch_step`, with reference/gpt2.c: the median of steps 2 and 3 (step 1 touches new memory)."""
    options = (f"--batch={batch}", f"--block={block}", "--steps=3")

    def step() -> float:
        command = [str(program), "train", str(weights), str(tokens), *options]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rates = [float(rate) for rate in re.findall(r"([\d.]+) tokens/s", output)]
        return batch * block / statistics.median(rates[1:])

    return step


def build(folder: Path) -> Path | None:
    """Compile reference/gpt2.c; None if there is no C compiler."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        return None
    program = folder / "gpt2"
    for threads in (["-fopenmp"], []):  # Apple's clang has no OpenMP
        command = [compiler, *FLAGS, *threads, str(REFERENCE / "gpt2.c"), "-o", str(program), "-lm"]
        if subprocess.run(command, capture_output=bool(threads), check=not threads).returncode == 0:
            return program
    return None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each implementation, and the ratio to PyTorch."""
    config = GPTConfig(
        vocab_size=50257,
        n_layer=args.n_layer,
        n_head=args.n_embd // 64,
        n_embd=args.n_embd,
        activation="gelu_tanh",
    )
    torch.manual_seed(0)
    model, count = GPT(config), args.batch * args.block
    ids = torch.randint(config.vocab_size, (args.batch, args.block + 1))
    result: dict[str, Any] = {
        "machine": machine.describe(CPU),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "parameters": model.num_params(non_embedding=False),
        "batch": args.batch,
        "block": args.block,
        "plain_python_tokens_per_second": plain_python(args.seconds),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_gpt2_file(model, folder / "model.safetensors")
        ids.flatten().numpy().astype("<u2").tofile(folder / "tokens.bin")
        steps = {
            "pytorch": torch_step(model, ids),
            "numpy": numpy_step(folder / "model.safetensors", ids.numpy()),
        }
        if program := build(folder):
            files = (folder / "model.safetensors", folder / "tokens.bin")
            steps["c"] = c_step(program, *files, args.batch, args.block)
        for name in ("pytorch", "numpy"):
            steps[name]()  # warm-up: the first step touches new memory
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.rounds):
            for name, step in steps.items():
                times = [step() for _ in range(1 if name == "c" else 3)]
                seconds[name].append(statistics.median(times))
    for name, times in seconds.items():
        result[name] = {
            "tokens_per_second": count / statistics.median(times),
            "ratio": machine.median_ratio(seconds["pytorch"], times),
        }
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reference", description=__doc__.splitlines()[0])
    parser.add_argument("--n_layer", type=int, default=12, help="number of layers (default: 12)")
    parser.add_argument("--n_embd", type=int, default=768, help="width, a multiple of 64 (default: 768)")
    parser.add_argument("--batch", type=int, default=1, help="rows per step (default: 1)")
    parser.add_argument("--block", type=int, default=256, help="tokens per row (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds for plain Python (default: 5)")
    args = parser.parse_args(argv)
    if args.n_embd < 64 or args.n_embd % 64 or min(args.n_layer, args.batch, args.block, args.rounds) < 1:
        parser.error(
            "--n_embd must be a multiple of 64, and --n_layer, --batch, --block and --rounds at least 1"
        )
    result = measure(args)
    shape = f"{result['batch']} x {result['block']} tokens"
    print(f"{result['parameters']:,} weights, {shape}, forward and backward")
    print(f"{'':10}{'tokens/s':>10}{'of PyTorch':>12}")
    for name in ("pytorch", "numpy", "c"):
        if name in result:
            print(f"{name:10}{result[name]['tokens_per_second']:10.0f}{result[name]['ratio']:12.2f}")
    print(
        f"plain Python, 1 layer, width 16, 16 tokens: {result['plain_python_tokens_per_second']:.0f} tokens/s"
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
