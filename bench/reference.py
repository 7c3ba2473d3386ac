"""Speed of the reference implementations: NumPy and C compared with PyTorch, and plain Python alone.

    python -m bench.reference                      GPT-2 124M, one row of 256 tokens, forward and backward
    python -m bench.reference --n_layer 2 --rounds 5

PyTorch runs `model.py` in float32, not compiled. NumPy and C read the same random weights from a file. The
implementations take turns, so that other load on the machine slows all of them; ratios are medians over the
rounds. The C program is compiled first, as `make reference` does. The last line is JSON.
"""

import argparse
import importlib.util
import json
import platform
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
from fradique.io.terminal import command_output
from model import GPT, GPTConfig

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
# Apple's clang knows -march=native only in its later versions
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
COMPILER_FLAGS = ("-std=c11", "-O3", NATIVE, "-ffp-contract=fast")
CPU = torch.device("cpu")


def load_module(name: str) -> ModuleType:
    """Import reference/<name>.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location(name, REFERENCE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_python(seconds: float) -> float:
    """Train with reference/gpt_python.py for `seconds`: one layer of width 16, rows of 16 tokens, Adam.

    Returns tokens per second.
    """
    reference = load_module("gpt_python")
    block_size, rows_per_step = 16, 8
    model = reference.GPT(vocab_size=64, block_size=block_size, n_layer=1, n_head=2, n_embd=16)
    adam, ids, rows = reference.Adam(model), list(range(block_size + 1)), 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(rows_per_step):
            model.learn(ids, 1 / rows_per_step)
        adam.step(0.01)
        rows += rows_per_step
    return block_size * rows / (time.perf_counter() - start)


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
        _, loss = model(ids[:, :-1], ids[:, 1:].contiguous())
        loss.backward()
        return time.perf_counter() - start

    return step


def numpy_step(weights: Path, n_head: int, ids: np.ndarray) -> Callable[[], float]:
    """As `torch_step`, with reference/gpt_numpy.py."""
    model = load_module("gpt_numpy").load(weights, n_head)

    def step() -> float:
        start = time.perf_counter()
        model.gradients(ids[:, :-1], ids[:, 1:])
        return time.perf_counter() - start

    return step


def c_step(program: Path, weights: Path, tokens: Path, batch: int, block: int) -> Callable[[], float]:
    """As `torch_step`, with reference/gpt2.c. Returns the median of steps 2 and 3.

    Step 1 is slower, because the operating system provides its memory at first use.
    """
    options = (f"--batch={batch}", f"--block={block}", "--steps=3")

    def step() -> float:
        command = [str(program), "train", str(weights), str(tokens), *options]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        tokens_per_second = [float(rate) for rate in re.findall(r"([\d.]+) tokens/s", output)]
        return batch * block / statistics.median(tokens_per_second[1:])

    return step


def build(folder: Path) -> Path | None:
    """Compile reference/gpt2.c; None if there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    program = folder / "gpt2"
    for openmp in (["-fopenmp"], []):  # with OpenMP if possible: Apple's clang does not have it
        command = [compiler, *COMPILER_FLAGS, *openmp, str(REFERENCE / "gpt2.c"), "-o", str(program), "-lm"]
        # the second attempt shows its errors, and raises CalledProcessError if it fails
        if subprocess.run(command, capture_output=bool(openmp), check=not openmp).returncode == 0:
            break
    return program


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
    model, tokens_per_step = GPT(config), args.batch * args.block
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
            "numpy": numpy_step(folder / "model.safetensors", model.config.n_head, ids.numpy()),
        }
        if program := build(folder):
            steps["c"] = c_step(
                program, folder / "model.safetensors", folder / "tokens.bin", args.batch, args.block
            )
        for name in ("pytorch", "numpy"):  # c_step has its own warm-up
            steps[name]()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.rounds):
            for name, step in steps.items():
                times = [step() for _ in range(1 if name == "c" else 3)]  # c_step is a median already
                seconds[name].append(statistics.median(times))
    for name, times in seconds.items():
        result[name] = {
            "tokens_per_second": tokens_per_step / statistics.median(times),
            "ratio": machine.median_ratio(seconds["pytorch"], times),
        }
    return result


@command_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the result, and one line of JSON. Returns the exit status."""
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
    batch_shape = f"{result['batch']} x {result['block']} tokens"
    print(f"{result['parameters']:,} weights, {batch_shape}, forward and backward")
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
