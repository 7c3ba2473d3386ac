"""The runtime of a process: device, dtype, compilation and ranks, chosen once and then passed on."""

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
from fradique.runtime import malloc

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Peak dense FLOP/s in bf16 (V100, T4: fp16), from the vendors' data sheets, for MFU. The first match counts.
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

# A rough guess of the FLOP/s that a run achieves, to estimate whether it is long enough to compile.
ASSUMED_FLOPS = {"cpu": 1.5e11, "mps": 2e12, "cuda": 1e14}
# compile=auto compiles runs of at least this many seconds: compiling takes 30 to 60 s, and makes steps 1.2 to
# 1.5 times as fast.
MIN_COMPILE_SECONDS = {"cpu": 180.0, "mps": float("inf"), "cuda": 60.0}
# Tokens per forward pass on a CPU: few enough for its cache, enough for its matrix units.
CPU_MAX_TOKENS = 4096
# Minimum width at which bf16 is faster than fp32 on a CPU with bf16 arithmetic; in narrower models the casts
# cost more than bf16 saves. With a vocabulary of at least this size the output layer alone makes up for them:
# width 64, 4,096 tokens: 25 ms a step instead of 31.
CPU_BF16_MIN_WIDTH, CPU_BF16_MIN_VOCAB = 128, 4096


@dataclass(frozen=True)
class Runtime:
    """Device, dtype, compilation and ranks of a run. Rank 0 writes files and prints."""

    device: torch.device
    dtype: torch.dtype  # of the forward pass, through autocast; weights stay float32
    compile: bool
    rank: int = 0
    world: int = 1  # number of ranks
    notes: tuple[str, ...] = ()  # on what was chosen automatically, and why; for the log
    sharded: bool = False  # each rank holds a shard of every parameter (FSDP2)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def autocast(self, enabled: bool = True) -> AbstractContextManager:
        """torch.autocast for the forward pass; no-op in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        # no cache of cast weights in a sharded run: together they would be the whole model
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=not self.sharded)

    def split_microbatches(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches (B, T) of a step; on a CPU split into equal parts that fit its cache.

        The mean of their losses is the same.
        """
        if self.device.type != "cpu":
            return list(batches)
        return [
            part
            for x, y in batches
            for part in zip(*(tensor.split(_rows_per_pass(*x.shape)) for tensor in (x, y)), strict=True)
        ]

    def max_eval_rows(self, batch_size: int, block_size: int) -> int:
        """Windows per forward pass of an evaluation: a batch; on a CPU as many as fit its cache."""
        return batch_size if self.device.type != "cpu" else max(1, CPU_MAX_TOKENS // block_size)

    def seed_dropout(self, seed: int) -> None:
        """Seed the default random generators.

        On a CPU only its own: torch.manual_seed also records the stack for a lazily initialized GPU, which
        takes 2% of the step time of a small model.
        """
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copy tensors to the device; on CUDA without waiting for the copy."""
        if self.device.type != "cuda":
            return [tensor.to(self.device) for tensor in tensors]
        return [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""
        return process_group.all_reduce(values, "sum") if self.world > 1 else list(values)

    def max(self, *values: float) -> list[float]:
        """Each value's maximum over the ranks."""
        return process_group.all_reduce(values, "max") if self.world > 1 else list(values)

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.world > 1:
            process_group.barrier()

    def wrap_ddp(self, forward: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel, which averages gradients; unchanged if sharded or alone."""
        if self.world == 1 or self.sharded:
            return forward
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(forward, device_ids=device_ids)

    def peak_flops(self) -> float | None:
        """Peak FLOP/s of all devices of the run together; None if the GPU is not in PEAK_FLOPS."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next(
            (peak * self.world for gpu, peak in PEAK_FLOPS.items() if re.search(rf"\b{gpu}\b", name)), None
        )

    def describe(self) -> str:
        """Device, number of processes and dtype, for the log."""
        device = str(self.device)
        if self.device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(self.device)})"
        elif self.device.type == "cpu":
            device += f" ({torch.get_num_threads()} threads)"
        processes = f", {self.world} processes" if self.world > 1 else ""
        processes += ", each with a shard of the model" if self.sharded else ""
        return f"{device}{processes}, {str(self.dtype).removeprefix('torch.')}"

    def close(self) -> None:
        """Leave the process group."""
        process_group.leave()


def configure_process(
    device: str = "auto", *, parallel: str = "ddp", backend: str = "auto", timeout: float = 600.0
) -> torch.device:
    """Set up this process for a run, and return its device. Only the main of a script calls this.

    It changes process-wide state: malloc's options on a CPU, the current device and TF32 matrix products on
    CUDA, and the process group if torchrun started this process. `timeout`: seconds that ranks wait for each
    other. Raises ValueError if this machine does not have the device.
    """
    ranks = process_group.rank_info()
    chosen = choose_device(device, ranks.local_rank, ranks.world)
    if chosen.type == "cpu":
        if parallel == "fsdp" and ranks.world > 1:
            malloc.return_freed_memory()
        else:
            malloc.keep_freed_memory()
    elif chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for matrix products that stay in fp32
    process_group.join(chosen, backend, timeout)
    return chosen


def setup_runtime(
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    compile: bool | str = False,
    parallel: str = "ddp",
    n_embd: int = 0,
    vocab_size: int = 0,
    run_flops: float = 0.0,
    run_seconds: float | None = None,
) -> Runtime:
    """Choose the runtime; no process-wide state changes (see `configure_process`).

    `run_flops`, or `run_seconds` with a time budget, is the length of the run: for compile="auto". Raises
    ValueError if this machine does not have the device or dtype.
    """
    ranks = process_group.rank_info()
    if isinstance(device, str):
        device = choose_device(device, ranks.local_rank, ranks.world)
    notes = []
    chosen_dtype, reason = choose_dtype(dtype, device, n_embd, vocab_size)
    if dtype == "auto":
        notes.append(f"using {chosen_dtype}: {reason}")
    compiled, reason = choose_compile(compile, device, run_flops, run_seconds)
    if compile == "auto":
        notes.append(f"{'compiling' if compiled else 'not compiling'}: {reason}")
    return Runtime(
        device,
        DTYPES[chosen_dtype],
        compiled,
        ranks.rank,
        ranks.world,
        tuple(notes),
        sharded=parallel == "fsdp" and ranks.world > 1,
    )


def choose_device(name: str, local_rank: int = 0, world: int = 1) -> torch.device:
    """The device that `name` means. auto: CUDA, else MPS, else CPU; each process takes GPU `local_rank`.

    Raises ValueError if this machine does not have it.
    """
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
        raise ValueError(f"device={name}: torch {torch.__version__} finds no {device.type} device; use auto")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"device={device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    return device


def choose_dtype(name: str, device: torch.device, n_embd: int, vocab_size: int = 0) -> tuple[str, str]:
    """The dtype of the forward pass, and the reason. Raises ValueError for float16 without CUDA."""
    if name != "auto":
        if name == "float16" and device.type != "cuda":
            raise ValueError(f"dtype=float16 needs a GradScaler on CUDA; use float32 or bfloat16 on {device}")
        return name, "as set"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU supports it"
        return "float16", "the GPU does not support bfloat16"
    if device.type == "mps":
        return "float32", "the safe choice on MPS"
    if not cpu_has_bf16():
        return "float32", "this CPU has no bfloat16 arithmetic"
    if n_embd < CPU_BF16_MIN_WIDTH and vocab_size < CPU_BF16_MIN_VOCAB:
        return "float32", f"n_embd < {CPU_BF16_MIN_WIDTH}: casts would cost more than bfloat16 saves"
    return "bfloat16", "this CPU has bfloat16 arithmetic"


def choose_compile(
    setting: bool | str, device: torch.device, run_flops: float, run_seconds: float | None
) -> tuple[bool, str]:
    """Whether to compile, and the reason. auto: if the run is long enough."""
    if setting != "auto":
        return bool(setting), "as set"
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return False, "no C++ compiler found"
    seconds = run_flops / ASSUMED_FLOPS[device.type] if run_seconds is None else run_seconds
    if seconds >= MIN_COMPILE_SECONDS[device.type]:
        return True, f"training is long enough (about {seconds:.0f} s) to save time"
    return False, f"training is too short (about {seconds:.0f} s) to save time"


def compile_with_fallback(
    model: nn.Module, warmup: Callable[[nn.Module], None], warn: Callable[[str], None]
) -> nn.Module:
    """torch.compile(model), after `warmup` has run on it; if that fails, a warning and `model` itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's hints are for its own developers
            compiled = torch.compile(model)
            warmup(compiled)
    except Exception as error:  # compilers may raise anything; without compilation the result is the same
        warn(f"torch.compile failed ({type(error).__name__}: {_first_line(error)}); continuing without it")
        torch._dynamo.reset()
        return model
    return compiled


def _rows_per_pass(rows: int, length: int) -> int:
    """The largest divisor of `rows` with at most CPU_MAX_TOKENS tokens in that many sequences of `length`."""
    return max((n for n in range(1, rows + 1) if rows % n == 0 and n * length <= CPU_MAX_TOKENS), default=1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
