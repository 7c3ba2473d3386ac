"""What the rows of bench.gpu_check share: their options, corpora, settings of small runs, and comparisons."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench import machine
from bench.gpu_worker import ROOT
from fradique.data import build
from fradique.data.sources import python_library
from fradique.data.text import Text, files_text
from train import TrainSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_TEXT_CHARS = 1_200_000  # of the Python library: as long as the text of shakespeare_char
SHAKESPEARE = ROOT / "data" / "shakespeare_char" / "meta.json"
GENERATED = "generated"  # the corpus of the correctness rows


@dataclass(frozen=True)
class Context:
    """The options of bench.gpu_check, and a folder for temporary files that all its processes share."""

    device: torch.device
    quick: bool
    text: Path | None
    nanogpt: Path | None
    scratch: Path

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def data_dir(self) -> Path:
        return self.scratch / "data"


# Corpora and runs


def generated_corpus(context: Context) -> str:
    """Prepare a corpus of random words, if that is not done yet, and return its name."""
    folder = context.data_dir / GENERATED
    if not (folder / "meta.json").exists():
        words = [a + b + end for a in "bdgl" for b in "aeiou" for end in ("", "m", "ra", "sso")]
        source = random.Random(0)
        string = "".join(source.choice(words) + source.choice(" \n") for _ in range(20_000))
        build.prepare_text(Text("random words", len(string), lambda: iter([string])), folder)
    return GENERATED


def describe_text(context: Context) -> str:
    """Which text `training_corpus` is made of."""
    if context.text:
        return str(context.text)
    if context.quick:
        return "random words"
    if SHAKESPEARE.exists():
        return "data/shakespeare_char"
    return (
        f"Python's standard library, {MAX_TEXT_CHARS:,} characters: the losses are not those of Shakespeare"
    )


def training_corpus(context: Context) -> tuple[Path, str]:
    """The corpus of the rows that measure a loss: (data_dir, dataset).

    It is the text of --text, or shakespeare_char if it is prepared, or a part of Python's standard library.
    """
    if context.quick and not context.text:
        return context.data_dir, generated_corpus(context)
    if not context.text and SHAKESPEARE.exists():
        return SHAKESPEARE.parent.parent, SHAKESPEARE.parent.name
    folder = context.data_dir / "text"
    if not (folder / "meta.json").exists():
        if context.text:
            text = files_text([context.text], context.text.name)
        else:
            library = python_library(folder)
            string = "".join(library.chunks())[:MAX_TEXT_CHARS]
            text = Text(library.source, len(string), lambda: iter([string]))
        build.prepare_text(text, folder)
    return context.data_dir, "text"


def run_settings(context: Context, name: str, **changes: object) -> TrainSettings:
    """The settings of a small run in the folder `name`: 20 steps, not compiled."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4}
    if not context.quick:  # longer than one block of queries of the fused attention kernels
        sizes = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 512, "batch_size": 8}
    settings = replace(
        TrainSettings(),
        out_dir=str(context.scratch / name),
        data_dir=str(context.data_dir),
        dataset=generated_corpus(context),
        device=str(context.device),
        overwrite=True,
        max_iters=20,
        lr_decay_iters=20,
        warmup_iters=2,
        eval_interval=10,
        eval_iters=1,
        gradient_accumulation_steps=1,
        sample_tokens=8,
        learning_rate=1e-3,
        min_lr=1e-4,
        dropout=0.1,
        compile=False,
        **sizes,
    )
    return replace(settings, **changes)


# Comparisons


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 in the matrix products of float32, for the time of the context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed numbers on the CPU, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest difference, as a fraction of the largest expected value.

    Raises AssertionError if it exceeds the tolerance or is not finite.
    """
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} instead of {expected.shape}"
    error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    if not error <= tolerance:  # also if it is NaN
        raise AssertionError(
            f"{name}: the largest difference from the CPU's result is {error:.2g} of its largest value, "
            f"and the tolerance is {tolerance:.2g}"
        )
    return error


def free_memory(context: Context) -> None:
    """Give cached memory back, so that a row does not depend on the rows before it."""
    machine.wait(context.device)
    if context.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(context.device)
