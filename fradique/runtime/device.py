"""The runtime of a process: its device, dtype and rank. Chosen once, then passed on."""

import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fradique.distributed import process_group
from fradique.nn.cpu_features import cpu_has_bf16, emulates_bf16
from fradique.nn.ngrams import NgramEmbedding
from fradique.runtime import malloc

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Peak dense FLOP/s in bf16 (V100, T4: fp16) from the vendors' data sheets, for the model FLOPs utilization
# (MFU). The first key that occurs in the name of the GPU counts.
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

DEVICE_TYPES = ("cpu", "mps", "cuda")
# Most tokens per forward pass on a CPU: their activations fit its cache, and its matrix units are still busy.
CPU_MAX_TOKENS = 4096
# On a CPU with bf16 arithmetic, bf16 is faster than fp32 from this width on; in narrower models the casts
# take longer than bf16 saves. From this vocabulary size on, bf16 is faster at any width, because the output
# layer is large: with width 64 and 4,096 tokens, a step takes 25 ms instead of 31.
CPU_BF16_MIN_WIDTH, CPU_BF16_MIN_VOCAB = 128, 4096


@dataclass(frozen=True)
class Runtime:
    """The device, dtype and rank of a process. Rank 0 writes files and prints."""

    device: torch.device
    dtype: torch.dtype  # of the forward pass, through autocast; weights stay float32
    rank: int = 0
    world: int = 1  # number of ranks
    notes: tuple[str, ...] = ()  # messages for the log: what was chosen automatically, and why
    warnings: tuple[str, ...] = ()  # for the log: choices of the user that make the run slow
    sharded: bool = False  # each rank holds a shard of every parameter (FSDP2)
    pin_memory: bool = True  # on CUDA, copy batches from page-locked memory, without waiting for the copy

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def autocast(self, enabled: bool = True) -> AbstractContextManager:
        """torch.autocast for the forward pass; does nothing in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        # in a sharded run, a cache of the cast weights would hold the whole model on each rank
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=not self.sharded)

    def split_microbatches(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of a step: (inputs, targets), (B, T) each.

        On a CPU, batches are split into micro-batches that fit its cache. All parts of a batch have the same
        size, so the mean of their losses is the loss of the batch.
        """
        if self.device.type != "cpu":
            return list(batches)
        microbatches = []
        for x, y in batches:
            rows = rows_per_pass(x.size(0), x.size(1))
            microbatches += zip(x.split(rows), y.split(rows), strict=True)
        return microbatches

    def max_eval_rows(self, batch_size: int, block_size: int) -> int:
        """Largest batch of an evaluation: batch_size; on a CPU, as many rows as fit its cache, at least 1."""
        return batch_size if self.device.type != "cpu" else max(1, CPU_MAX_TOKENS // block_size)

    def seed_dropout(self, seed: int) -> None:
        """Seed the random generators that dropout uses.

        On a CPU, only the CPU's generator: torch.manual_seed also prepares those of GPUs, which takes 2% of
        the step time of a small model.
        """
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copy tensors to the device; on CUDA without waiting for the copy, if memory can be pinned."""
        if self.device.type != "cuda" or not self.pin_memory:
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
        """Wrap a module in DistributedDataParallel, which averages the gradients over the ranks.

        With one rank, or in a sharded run, returns the module itself.
        """
        if self.world == 1 or self.sharded:
            return forward
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(forward, device_ids=device_ids)

    def peak_flops(self) -> float | None:
        """Peak FLOP/s of all GPUs of the run together; None on other devices and GPUs not in PEAK_FLOPS."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        for gpu, peak in PEAK_FLOPS.items():
            if re.search(rf"\b{gpu}\b", name):  # whole words: "L4" is not in "L40"
                return peak * self.world
        return None

    def describe(self) -> str:
        """Device, number of processes and dtype, for the log."""
        device = str(self.device)
        if self.device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(self.device)})"
        elif self.device.type == "cpu":
            device += f" ({torch.get_num_threads()} threads)"
        if self.world > 1:
            device += f", {self.world} processes"
        if self.sharded:
            device += ", each with a shard of the model"
        return f"{device}, {str(self.dtype).removeprefix('torch.')}"

    def close(self) -> None:
        """Leave the process group."""
        process_group.leave()


def configure_process(
    device: str = "auto", *, parallel: str = "ddp", backend: str = "auto", timeout: float = 600.0
) -> torch.device:
    """Set up this process for a run, and return its device. Only the main function of a script calls this.

    It changes process-wide state: malloc's options on a CPU, the current device and TF32 matrix products on
    CUDA, and the process group if torchrun started this process. `timeout`: how many seconds ranks wait for
    each other. Raises ValueError if this machine does not have the device.
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
        torch.set_float32_matmul_precision(
            "high"
        )  # TF32 for the matrix products that autocast leaves in fp32
    process_group.join(chosen, backend, timeout)
    return chosen


def setup_runtime(
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    parallel: str = "ddp",
    n_embd: int = 0,
    vocab_size: int = 0,
) -> Runtime:
    """Choose the runtime. Unlike `configure_process`, this changes no process-wide state.

    dtype="auto" depends on n_embd and vocab_size. Raises ValueError if this machine does not have the device,
    or if the device does not support the dtype.
    """
    ranks = process_group.rank_info()
    if isinstance(device, str):
        device = choose_device(device, ranks.local_rank, ranks.world)
    notes = []
    chosen_dtype, reason = choose_dtype(dtype, device, n_embd, vocab_size)
    if dtype == "auto":
        notes.append(f"using {chosen_dtype}: {reason}")
    slow_choices = []
    if chosen_dtype == "bfloat16" and emulates_bf16(device):
        slow_choices.append(
            f"dtype=bfloat16: this {device.type} has no bfloat16 arithmetic, and emulating it is slow; "
            "use --dtype=auto"
        )
    unpinned = pinned_memory_problem(device) if device.type == "cuda" else None
    if unpinned:
        notes.append(f"warning: copying batches without pinned memory: {unpinned}")
    return Runtime(
        device=device,
        dtype=DTYPES[chosen_dtype],
        rank=ranks.rank,
        world=ranks.world,
        notes=tuple(notes),
        warnings=tuple(slow_choices),
        sharded=parallel == "fsdp" and ranks.world > 1,
        pin_memory=unpinned is None,
    )


def pinned_memory_problem(device: torch.device) -> str | None:
    """Why batches cannot be copied to a CUDA device from pinned (page-locked) memory; None if they can.

    The amount of pinned memory may be limited, in a container for example.
    """
    tokens = torch.arange(8)
    try:
        copied = tokens.pin_memory().to(device, non_blocking=True).cpu()
    except RuntimeError as error:
        return _first_line(error) or type(error).__name__
    return None if torch.equal(copied, tokens) else "a copy from it differs from the original"


def choose_device(name: str, local_rank: int = 0, world: int = 1) -> torch.device:
    """The device with this name. auto: CUDA, else MPS, else CPU. cuda: the GPU with index `local_rank`.

    Raises ValueError if this machine does not have the device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps and world == 1 else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: not a device; use auto, cpu, mps, cuda or cuda:N") from error
    if device.type not in DEVICE_TYPES:
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
    """The name of the forward pass's dtype, and the reason. Raises ValueError for float16 without CUDA."""
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


def compile_with_fallback(
    model: nn.Module, warmup: Callable[[nn.Module], None], warn: Callable[[str], None]
) -> nn.Module:
    """torch.compile(model), on which `warmup` has run; if that fails, warn and return `model` itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's hints are for its own developers
            for module in model.modules():
                if isinstance(module, NgramEmbedding):  # the compiler knows no sparse gradients
                    module.forward = torch.compiler.disable(module.forward)
            compiled = torch.compile(model)
            warmup(compiled)
    except Exception as error:  # compilers may raise anything; without compilation the result is the same
        warn(f"torch.compile failed ({type(error).__name__}: {_first_line(error)}); continuing without it")
        torch._dynamo.reset()
        return model
    return compiled


def rows_per_pass(rows: int, length: int) -> int:
    """Rows of a micro-batch on a CPU: the largest divisor of `rows` that fits CPU_MAX_TOKENS; at least 1."""
    return max((n for n in range(1, rows + 1) if rows % n == 0 and n * length <= CPU_MAX_TOKENS), default=1)


def _first_line(error: Exception) -> str:
    """The first line of an error message, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]
