"""Available memory, the warning before a run that may not fit, and the message after an out-of-memory error.

Linux kills a process that uses too much memory without any message. Therefore a run whose estimate is too
large gives a warning before it starts. A failed allocation gives one message with settings that would fit.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from fradique.distributed import process_group
from fradique.runtime import malloc

if TYPE_CHECKING:
    from fradique.runtime.memory_estimate import MemoryEstimate, MemoryPlan

# The fraction of the available memory that suggested settings may use. It is smaller on a CPU, because heap
# fragmentation grows near a limit.
CPU_FRACTION, GPU_FRACTION = 0.8, 0.9
# malloc requests 64 MiB more than it needs (malloc.keep_freed_memory), except in sharded runs.
MALLOC_TOP_PAD = 64 << 20
# After a failed allocation the estimate was too low: suggested settings need at most this fraction of it.
RETRY_FRACTION = 0.75
# Messages of torch, C++ and the operating system for errors that have no type of their own.
OOM_MESSAGES = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|out of memory|bad_alloc|ALLOC_FAILED"
    r"|could not create a memory",
    re.IGNORECASE,
)
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # cgroup v1 represents "no limit" by a number above this


# Available memory


@dataclass(frozen=True)
class MemoryLimit:
    """How many more bytes this process can allocate, and which limit that is."""

    bytes: int
    source: str  # the name of the limit, for messages


def available_memory(device: torch.device) -> MemoryLimit | None:
    """The memory that this process can still allocate on a device; None if that is unknown.

    On a GPU it includes the memory that torch has already reserved.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return MemoryLimit(free + torch.cuda.memory_reserved(device), f"{device}, {name}")
    if device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return MemoryLimit(free + torch.mps.current_allocated_memory(), "mps")
    return min(_cpu_limits(), key=lambda limit: limit.bytes, default=None)


def _cpu_limits() -> Iterator[MemoryLimit]:
    """Every limit on CPU memory. The ranks on one machine share its memory and its cgroup."""
    local_world = process_group.rank_info().local_world
    meminfo = _read_numbers(Path("/proc/meminfo"))
    if "MemAvailable" in meminfo:
        yield MemoryLimit(meminfo["MemAvailable"] * 1024 // local_world, "free memory of this machine")
    for free in cgroup_limits(_read_text(Path("/proc/self/cgroup"))):
        yield MemoryLimit(free // local_world, "free memory in the cgroup of this process")
    status = _read_numbers(Path("/proc/self/status"))
    try:
        import resource
    except ImportError:  # Windows
        return
    for limit, usage_field, source in (
        (resource.RLIMIT_AS, "VmSize", "address space, ulimit -v"),
        (resource.RLIMIT_DATA, "VmData", "data segment, ulimit -d"),
    ):
        soft_limit = resource.getrlimit(limit)[0]
        if soft_limit != resource.RLIM_INFINITY and usage_field in status:
            free = soft_limit - status[usage_field] * 1024 + malloc.free_heap_bytes()
            yield MemoryLimit(max(0, free), source)


def cgroup_limits(membership: str) -> Iterator[int]:
    """Free bytes under each memory limit of this process's control groups (v1 and v2) and of their parents.

    `membership`: the content of /proc/self/cgroup, with lines `<number>:<controllers>:<path>`.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # v2: one hierarchy for all controllers
            names = ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":  # v1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for folder in _group_and_parents(CGROUP / controllers, path):
            yield from _free_in_group(folder, *names)


def _group_and_parents(root: Path, path: str) -> list[Path]:
    """The folders of a control group and of its parents up to `root`.

    In a container the folder of the group may not exist; the container's own group is then `root`.
    """
    group = root / path.lstrip("/")
    return [group, *(parent for parent in group.parents if parent == root or root in parent.parents)]


def _free_in_group(folder: Path, limit_file: str, usage_file: str, cache_field: str) -> Iterator[int]:
    """Yield a group's limit minus its usage, or nothing if it has no limit.

    The file cache counts as free, because the kernel can drop it.
    """
    try:
        limit, usage = (folder / limit_file).read_text().strip(), int((folder / usage_file).read_text())
        cache = _read_numbers(folder / "memory.stat").get(cache_field, 0)
    except (OSError, ValueError):
        return
    if limit != "max" and int(limit) < UNLIMITED:
        yield max(0, int(limit) - usage + cache)


def _read_numbers(path: Path) -> dict[str, int]:
    """Lines such as `MemAvailable:  123 kB` as {name: number}; empty if the file cannot be read."""
    return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)", _read_text(path), re.M)}


def _read_text(path: Path) -> str:
    """The content of a file; empty if the file cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


# The warning and the error message


class OomReport:
    """Context manager for a script's main: turns an out-of-memory error into a ValueError with advice.

    The message says how much memory was available, how much the run needs (after `check`), and which settings
    would fit. Other errors pass unchanged.

        with OomReport() as oom:
            return run(resolved, oom)  # a separate function: its local tensors are freed before the report
    """

    def __init__(self) -> None:
        self.plan: MemoryPlan | None = None  # None before `check`
        self.limit = available_memory(torch.device("cpu"))

    def check(self, plan: MemoryPlan, device: torch.device) -> str | None:
        """Record the plan of the run. Returns a warning if its estimate exceeds the available memory."""
        self.plan, self.limit = plan, available_memory(device)
        estimate = plan.estimate()
        if self.limit is None or estimate.total <= self.limit.bytes:
            return None
        return (
            f"this run may run out of memory: {_describe_limit(self.limit)}, and "
            f"{_describe_estimate(plan, estimate)}. {_advice(plan, _budget(plan, self.limit))}"
        )

    def explain(self) -> str:
        """The message for an out-of-memory error."""
        available = _describe_limit(self.limit) if self.limit else "there was not enough memory"
        if self.plan is None:
            return f"{available}. Use a smaller batch_size or num_samples, or a smaller model"
        estimate = self.plan.estimate()
        budget = int(RETRY_FRACTION * estimate.total)
        if self.limit:
            budget = min(budget, _budget(self.plan, self.limit))
        return f"{available}, and {_describe_estimate(self.plan, estimate)}. {_advice(self.plan, budget)}"

    def __enter__(self) -> OomReport:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        error_traceback: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or not is_out_of_memory(error):
            return
        traceback.clear_frames(error_traceback)  # frees the local variables, which hold most of the memory
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"out of memory: {self.explain()}\n({reason})") from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is an out-of-memory error."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if OOM_MESSAGES.search(str(error)):
            return True
        error = error.__cause__
    return False


def _budget(plan: MemoryPlan, limit: MemoryLimit) -> int:
    """Bytes per process that suggested settings may use."""
    if plan.device != "cpu":
        return int(GPU_FRACTION * limit.bytes)
    top_pad = 0 if plan.sharded else MALLOC_TOP_PAD
    return int(CPU_FRACTION * max(0, limit.bytes - top_pad))


def _describe_limit(limit: MemoryLimit) -> str:
    """For example `the limit is 3.2 GiB (cuda:0, NVIDIA A100)`."""
    return f"the limit is {format_bytes(limit.bytes)} ({limit.source})"


def _describe_estimate(plan: MemoryPlan, estimate: MemoryEstimate) -> str:
    """For example `batch_size=12 with block_size=1024 needs about 8.1 GiB (weights 475 MiB, ...)`."""
    bytes_by_use = {
        "weights": estimate.weights,
        "gradients": estimate.gradients + estimate.communication,
        "optimizer": estimate.optimizer,
        "activations and loss": estimate.activations + estimate.transient + estimate.casts,
        "the process": estimate.process + estimate.fragmentation,
    }
    breakdown = ", ".join(f"{use} {format_bytes(count)}" for use, count in bytes_by_use.items())
    processes = f" in each of {plan.world} processes" if plan.world > 1 else ""
    return (
        f"batch_size={plan.batch_size} with block_size={plan.config.block_size} needs about "
        f"{format_bytes(estimate.total)}{processes} ({breakdown})"
    )


def _advice(plan: MemoryPlan, budget: int) -> str:
    """The settings that fit `budget` bytes per process, as flags; or that none does."""
    suggestions = plan.suggest_settings(budget)
    if not suggestions:
        return "No setting makes this model fit: use a much smaller model, or a machine with more memory"
    return "What would fit: " + "; or ".join(format_flags(settings) for settings in suggestions)


def format_flags(settings: dict[str, int | bool]) -> str:
    """Settings as flags of a command line."""
    return " ".join(f"--{name}={value}" for name, value in settings.items())


def format_bytes(count: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
