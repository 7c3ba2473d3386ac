"""Where a run computes: device, dtype, rank and world, decided once and handed round in one frozen object."""

import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fradique.distributed import process_group
from fradique.nn.linear import cpu_has_bf16
from fradique.runtime.malloc import keep_freed_memory, return_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Peak dense FLOP/s in bf16 (V100, T4: fp16), from the maker's data sheets, for MFU. The first match wins.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10": 125e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

# A guess of the FLOP/s a run reaches, to tell whether it is long enough to repay compiling.
ASSUMED_FLOPS = {"cpu": 1.5e11, "mps": 2e12, "cuda": 1e14}
# Seconds of training from which compiling is repaid: it takes half a minute to a minute by itself, and makes
# steps 1.2 to 1.5 times as fast.
MIN_COMPILE_SECONDS = {"cpu": 180.0, "mps": float("inf"), "cuda": 60.0}
# Tokens of a slice of a micro-batch on a CPU: few enough for its cache, enough for its matrix units.
CPU_MAX_TOKENS = 4096
# The width from which bf16 beats fp32 on a CPU that has it: below, casting costs more than it saves. With a
# vocabulary of this size the output layer alone repays it: 64 wide, 4,096 tokens: 25 ms a step against 31.
CPU_BF16_MIN_WIDTH, CPU_BF16_MIN_VOCAB = 128, 4096


@dataclass(frozen=True)
class Runtime:
    """What was decided. Rank 0 of `world` processes writes and speaks."""

    device: torch.device
    dtype: torch.dtype  # of the forward pass, through autocast; weights stay float32
    compile: bool
    rank: int = 0
    world: int = 1
    notes: tuple[str, ...] = ()  # what was chosen automatically, and why
    sharded: bool = False  # each rank holds a part of every parameter (FSDP2)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self, enabled: bool = True) -> AbstractContextManager:
        if self.dtype == torch.float32:
            return nullcontext()
        # of a model in parts no cast of a weight is kept: all of them together would be the whole model
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=not self.sharded)

    def slices(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of a step (B, T); on a CPU cut into equal parts that stay in its cache, as if
        there were more and smaller ones: the mean of their losses is the same."""
        if self.device.type != "cpu":
            return list(batches)
        return [
            part
            for x, y in batches
            for part in zip(*(a.split(_rows_at_once(*x.shape)) for a in (x, y)), strict=True)
        ]

    def rows_at_once(self, batch_size: int, block_size: int) -> int:
        """How many windows are evaluated together: a batch; on a CPU as many as stay in its cache."""
        return batch_size if self.device.type != "cpu" else max(1, CPU_MAX_TOKENS // block_size)

    def seed(self, number: int) -> None:
        """Seed what dropout draws from. For a CPU torch.manual_seed also writes down, for a card that may
        come, where it was called from, which takes a small model's step a fiftieth of its time."""
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(number)
        else:
            torch.manual_seed(number)

    def move(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors on the device; on CUDA without waiting for the copy."""
        if self.device.type != "cuda":
            return [tensor.to(self.device) for tensor in tensors]
        return [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""
        return process_group.all_reduce(values, "sum") if self.world > 1 else list(values)

    def max(self, *values: float) -> list[float]:
        """Each value's maximum over the ranks."""
        return process_group.all_reduce(values, "max") if self.world > 1 else list(values)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            process_group.barrier()

    def wrap(self, forward: nn.Module) -> nn.Module:
        """The model as the ranks share it: gradients are averaged in its backward pass. One in parts does
        that by itself."""
        if self.world == 1 or self.sharded:
            return forward
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(forward, device_ids=ids)

    def peak_flops(self) -> float | None:
        """FLOP/s of all devices of the run together where the card is known; else None."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next(
            (peak * self.world for card, peak in PEAK_FLOPS.items() if re.search(rf"\b{card}\b", name)), None
        )

    def describe(self) -> str:
        where = str(self.device)
        if self.device.type == "cuda":
            where += f" ({torch.cuda.get_device_name(self.device)})"
        elif self.device.type == "cpu":
            where += f" ({torch.get_num_threads()} threads)"
        processes = f", {self.world} processes" if self.world > 1 else ""
        processes += ", each with a part of the model" if self.sharded else ""
        return f"{where}{processes}, {str(self.dtype).removeprefix('torch.')}"

    def close(self) -> None:
        process_group.leave()


def setup_runtime(
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool | str = False,
    backend: str = "auto",
    parallel: str = "ddp",
    timeout: float = 600.0,
    n_embd: int = 0,
    vocab_size: int = 0,
    run_flops: float = 0.0,
    run_seconds: float | None = None,
) -> Runtime:
    """Decide once. `run_flops` (or `run_seconds`, where a budget is set) tells whether compiling is repaid.

    Joins the process group when torchrun started this process. Raises ValueError where a device or dtype was
    asked for that this machine does not have.
    """
    rank, _, world = process_group.rank_info()
    sharded = parallel == "fsdp" and world > 1
    place = join_run(device, backend, timeout)
    notes = []
    if place.type == "cpu":
        return_freed_memory() if sharded else keep_freed_memory()
    kind, why = choose_dtype(dtype, place, n_embd, vocab_size)
    if dtype == "auto":
        notes.append(f"dtype=auto: {kind} ({why})")
    compiled, why = choose_compile(compile, place, run_flops, run_seconds)
    if compile == "auto":
        notes.append(f"compile=auto: {compiled} ({why})")
    if place.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    return Runtime(place, DTYPES[kind], compiled, rank, world, tuple(notes), sharded)


def join_run(device: str, backend: str, timeout: float) -> torch.device:
    """The device of this process, which has joined the others that torchrun started beside it."""
    _, local_rank, world = process_group.rank_info()
    place = choose_device(device, local_rank, world)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    process_group.join(place, backend, timeout)
    return place


def choose_device(name: str, local_rank: int = 0, world: int = 1) -> torch.device:
    """`auto`: CUDA, else MPS, else CPU. Under torchrun each process takes the card of its local rank."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps and world == 1 else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: not a device; use auto, cpu, mps, cuda or cuda:N") from error
    if device.type not in ASSUMED_FLOPS:
        raise ValueError(f"device={name}: use auto, cpu, mps, cuda or cuda:N")
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise ValueError(
            f"device={name}: torch {torch.__version__} sees no {device.type} device here; use auto"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"device={device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    return device


def choose_dtype(name: str, device: torch.device, n_embd: int, vocab_size: int = 0) -> tuple[str, str]:
    """The dtype of the forward pass, and why."""
    if name != "auto":
        if name == "float16" and device.type != "cuda":
            raise ValueError(f"dtype=float16 needs a GradScaler on CUDA; use float32 or bfloat16 on {device}")
        return name, "as set"
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "the card has it") if bf16 else ("float16", "the card has no bfloat16")
    if device.type == "mps":
        return "float32", "the safe choice on MPS"
    if not cpu_has_bf16():
        return "float32", "this CPU has no bfloat16 arithmetic"
    if n_embd < CPU_BF16_MIN_WIDTH and vocab_size < CPU_BF16_MIN_VOCAB:
        return "float32", f"n_embd < {CPU_BF16_MIN_WIDTH}: casts would cost more than bfloat16 saves"
    return "bfloat16", "this CPU has bfloat16 arithmetic"


def choose_compile(
    wanted: bool | str, device: torch.device, flops: float, seconds: float | None
) -> tuple[bool, str]:
    """Whether to compile, and why: `auto` does where the run is long enough to repay it."""
    if wanted != "auto":
        return bool(wanted), "as set"
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return False, "no C++ compiler is at hand"
    seconds = flops / ASSUMED_FLOPS[device.type] if seconds is None else seconds
    enough = MIN_COMPILE_SECONDS[device.type]
    length = f"about {seconds:.0f} s of training"
    return (True, f"{length} repay it") if seconds >= enough else (False, f"{length} would not repay it")


def compile_with_fallback(
    model: nn.Module, try_it: Callable[[nn.Module], None], warn: Callable[[str], None]
) -> nn.Module:
    """torch.compile(model), once `try_it` has run on it; the model, after one warning, where that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's hints are for its own developers
            fast = torch.compile(model)
            try_it(fast)
    except Exception as error:  # whatever a compiler may raise: eager gives the same numbers
        warn(f"torch.compile failed ({type(error).__name__}: {_first_line(error)}); going on without it")
        torch._dynamo.reset()
        return model
    return fast


def _rows_at_once(rows: int, length: int) -> int:
    """The largest divisor of `rows` that makes no more than CPU_TOKENS_AT_ONCE tokens of `length` each."""
    return max((n for n in range(1, rows + 1) if rows % n == 0 and n * length <= CPU_MAX_TOKENS), default=1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
