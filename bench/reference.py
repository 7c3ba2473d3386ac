"""How fast the framework-free references are: NumPy and C beside eager PyTorch, and plain Python by itself.

    python -m bench.reference                      GPT-2 124M, one row of 256 tokens, forward and backward
    python -m bench.reference --n_layer 2 --rounds 5

PyTorch runs `model.py` in float32, eager; NumPy and C read the same random weights from a file. They take
turns, so that a busy machine is busy for all, and ratios are medians over the rounds. The C program is built
anew (`make reference` builds the same). The last line is JSON.
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


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REFERENCE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_python(seconds: float) -> float:
    """Tokens a second that one layer, 16 wide, learns from, in rows of 16, Adam included."""
    reference = load("gpt_python")
    model = reference.GPT(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=16)
    adam, ids, rows, begun = reference.Adam(model), list(range(17)), 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for _ in range(8):
            model.learn(ids, 1 / 8)
        adam.step(0.01)
        rows += 8
    return 16 * rows / (time.perf_counter() - begun)


def gpt2_file(model: GPT, path: Path) -> None:
    """The weights as Hugging Face keeps a GPT-2's: bare names, linear layers as (in, out)."""
    tensors = {}
    for name, weight in model.named_parameters():
        turned = weight.t() if weight.ndim == 2 and ".h." in name else weight
        tensors[name.removeprefix("transformer.")] = turned.detach().contiguous()
    save_file(tensors, path)


def in_torch(model: GPT, ids: torch.Tensor) -> Callable[[], float]:
    def step() -> float:
        begun = time.perf_counter()
        model.zero_grad()
        logits = model(ids[:, :-1], ids[:, 1:].contiguous())
        logits[1].backward()
        return time.perf_counter() - begun

    return step


def in_numpy(weights: Path, ids: np.ndarray) -> Callable[[], float]:
    model = load("gpt_numpy").load(weights)

    def step() -> float:
        begun = time.perf_counter()
        model.gradients(ids[:, :-1], ids[:, 1:])
        return time.perf_counter() - begun

    return step


def in_c(program: Path, weights: Path, tokens: Path, batch: int, block: int) -> Callable[[], float]:
    """The median of the second and third step, as the program itself times them: the first touches memory."""
    options = (f"--batch={batch}", f"--block={block}", "--steps=3")

    def step() -> float:
        command = [str(program), "train", str(weights), str(tokens), *options]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rates = [float(rate) for rate in re.findall(r"([\d.]+) tokens/s", told)]
        return batch * block / statistics.median(rates[1:])

    return step


def build(folder: Path) -> Path | None:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    program = folder / "gpt2"
    for threads in (["-fopenmp"], []):  # Apple's clang has none of its own
        command = [compiler, *FLAGS, *threads, str(REFERENCE / "gpt2.c"), "-o", str(program), "-lm"]
        if subprocess.run(command, capture_output=bool(threads), check=not threads).returncode == 0:
            return program
    return None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each, and how many times PyTorch's speed that is."""
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gpt2_file(model, folder / "model.safetensors")
        ids.flatten().numpy().astype("<u2").tofile(folder / "tokens.bin")
        sides = {
            "pytorch": in_torch(model, ids),
            "numpy": in_numpy(folder / "model.safetensors", ids.numpy()),
        }
        if program := build(folder):
            files = (folder / "model.safetensors", folder / "tokens.bin")
            sides["c"] = in_c(program, *files, args.batch, args.block)
        for side in ("pytorch", "numpy"):
            sides[side]()  # the first touches memory
        spent: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, step in sides.items():
                times = [step() for _ in range(1 if side == "c" else 3)]
                spent[side].append(statistics.median(times))
    for side, seconds in spent.items():
        result[side] = {
            "tokens_per_second": count / statistics.median(seconds),
            "ratio": machine.median_ratio(spent["pytorch"], seconds),
        }
    return result


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reference", description=__doc__.splitlines()[0])
    parser.add_argument("--n_layer", type=int, default=12, help="default: 12, GPT-2 124M's")
    parser.add_argument("--n_embd", type=int, default=768, help="a multiple of 64; default: 768")
    parser.add_argument("--batch", type=int, default=1, help="rows at a time; default: 1")
    parser.add_argument("--block", type=int, default=256, help="tokens in a row; default: 256")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--seconds", type=float, default=5.0, help="for plain Python; default: 5")
    args = parser.parse_args(words)
    if args.n_embd < 64 or args.n_embd % 64 or min(args.n_layer, args.batch, args.block, args.rounds) < 1:
        parser.error(
            "--n_embd must be a multiple of 64, and --n_layer, --batch, --block and --rounds at least 1"
        )
    result = measure(args)
    shape = f"{result['batch']} x {result['block']} tokens"
    print(f"{result['parameters']:,} weights, {shape}, forward and backward")
    print(f"{'':10}{'tokens/s':>10}{'of PyTorch':>12}")
    for side in ("pytorch", "numpy", "c"):
        if side in result:
            print(f"{side:10}{result[side]['tokens_per_second']:10.0f}{result[side]['ratio']:12.2f}")
    print(
        f"plain Python, 1 layer, 16 wide, 16 tokens: {result['plain_python_tokens_per_second']:.0f} tokens/s"
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
