"""How much memory there is, what is said before a run that will not fit, and when memory has run out.

The kernel ends a process that takes more than there is without a word: so a run that is too large is told so
before it begins, and where an allocation fails there is one message, with settings that would fit.
"""

import errno
import functools
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from fradique.runtime.memory_estimate import MemoryEstimate, MemoryPlan, estimate_memory, suggest_settings

P, R = ParamSpec("P"), TypeVar("R")

# Of what there is, what a run is advised to take. malloc asks for 64 MiB more than it needs at a time (but
# where a model is in parts: runtime.keep_freed_memory), and has more holes the nearer it comes to a limit.
CPU_MARGIN, CARD_MARGIN, ASKED_AHEAD = 0.8, 0.9, 64 << 20
# What torch, C++ and the system say where memory is short and the error has no type of its own.
OOM_MESSAGES = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|out of memory|bad_alloc|ALLOC_FAILED"
    r"|could not create a memory",
    re.IGNORECASE,
)
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # cgroup v1's "unlimited" is above it


@dataclass(frozen=True)
class MemoryLimit:
    """How many bytes a process may take beyond what it has, and what sets the limit."""

    bytes: int
    limit: str


def available_memory(device: torch.device) -> MemoryLimit | None:
    """What there is on a device; None where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return MemoryLimit(free + torch.cuda.memory_reserved(device), f"{device} ({name})")
    if device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return MemoryLimit(free + torch.mps.current_allocated_memory(), "mps")
    return min(_cpu_limits(), key=lambda one: one.bytes, default=None)


def _cpu_limits() -> Iterator[MemoryLimit]:
    """What each limit leaves to this process on its CPU. Those of the machine are shared by its processes."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    machine = _numbers(Path("/proc/meminfo"))
    if "MemAvailable" in machine:
        yield MemoryLimit(machine["MemAvailable"] * 1024 // here, "the free memory of this machine")
    for left in cgroup_limits(_text(Path("/proc/self/cgroup"))):
        yield MemoryLimit(left // here, "the memory limit of this container (cgroup)")
    own = _numbers(Path("/proc/self/status"))
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, used, name in (
        (resource.RLIMIT_AS, "VmSize", "the limit of the address space (ulimit -v)"),
        (resource.RLIMIT_DATA, "VmData", "the limit of data (ulimit -d)"),
    ):
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY and used in own:
            yield MemoryLimit(max(0, soft - own[used] * 1024), name)


def cgroup_limits(membership: str) -> Iterator[int]:
    """Bytes that the limits of control groups, versions 2 and 1, and of those above them, leave.

    `membership`: the lines of /proc/self/cgroup.
    """
    for line in membership.splitlines():
        _, kinds, place = line.split(":", 2)
        if kinds in ("", "memory"):
            names = ("memory.max", "memory.current", "inactive_file")
            if kinds:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            for folder in _upwards(CGROUP / kinds, place):
                yield from _left(folder, *names)


def _upwards(root: Path, place: str) -> list[Path]:
    """A control group's folder and those above it; inside a container its own stands at the root."""
    below = root / place.lstrip("/")
    return [below, *(one for one in below.parents if one == root or root in one.parents)]


def _left(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    """The limit less what is used of it; the cache of files can go."""
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        cache = _numbers(folder / "memory.stat").get(cached, 0)
    except (OSError, ValueError):
        return
    if most != "max" and int(most) < UNLIMITED:
        yield max(0, int(most) - now + cache)


def _numbers(path: Path) -> dict[str, int]:
    """Lines such as `MemAvailable:  123 kB`; empty where the file cannot be read."""
    return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)", _text(path), re.M)}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


# What is said


@dataclass(frozen=True)
class RunMemory:
    """What a run is about to take, and of which room: what the message is made of, should that not do."""

    room: MemoryLimit | None
    plan: MemoryPlan | None = None


_run_memory: ContextVar[RunMemory] = ContextVar("expected")


def check_memory(plan: MemoryPlan, device: torch.device) -> str | None:
    """Remember what is about to run; the warning that is due, before anything of it is there, where its
    estimate is above what the device has."""
    there = available_memory(device)
    _run_memory.set(RunMemory(there, plan))
    need = estimate_memory(plan)
    if there is None or need.total <= there.bytes:
        return None
    return (
        f"this run may run out of memory: {there.limit} leaves {format_bytes(there.bytes)}, and "
        f"{_need(plan, need)}. " + _advice(plan, _budget(plan, there))
    )


def explain_oom(expected: RunMemory) -> str:
    """What to say where memory has run out."""
    there, plan = expected.room, expected.plan
    left = f"{there.limit} left {format_bytes(there.bytes)}" if there else "there was too little"
    if plan is None:
        return (
            f"{left}. Ask for less at a time (a smaller batch_size or num_samples), or take a smaller model"
        )
    need = estimate_memory(plan)
    budget = int(0.75 * need.total)  # it did not fit, whatever the estimate says
    if there:
        budget = min(budget, _budget(plan, there))
    return f"{left}, and {_need(plan, need)}. {_advice(plan, budget)}"


def _budget(plan: MemoryPlan, there: MemoryLimit) -> int:
    """Bytes that a run may be advised to take."""
    if plan.device == "cpu":
        return int(CPU_MARGIN * max(0, there.bytes - (0 if plan.sharded else ASKED_AHEAD)))
    return int(CARD_MARGIN * there.bytes)


def _need(plan: MemoryPlan, need: MemoryEstimate) -> str:
    parts = {
        "weights": need.weights,
        "gradients": need.gradients + need.exchange,
        "optimizer": need.optimizer,
        "activations and loss": need.activations + need.passing + need.casts,
        "the process": need.process + need.holes,
    }
    said = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items())
    each = f" in each of {plan.world} processes" if plan.world > 1 else ""
    return (
        f"batch_size={plan.batch_size} with block_size={plan.shape.block_size} takes about "
        f"{format_bytes(need.total)}{each} ({said})"
    )


def _advice(plan: MemoryPlan, budget: int) -> str:
    found = suggest_settings(plan, budget)
    if not found:
        return "No setting makes this model fit: choose a much smaller one, or more memory"
    return "What would fit: " + "; or ".join(format_flags(one) for one in found)


def format_flags(settings: dict[str, int | bool]) -> str:
    return " ".join(f"--{name}={value}" for name, value in settings.items())


def format_bytes(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory is short."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if OOM_MESSAGES.search(str(error)):
            return True
        error = error.__cause__
    return False


def report_oom(main: Callable[P, R]) -> Callable[P, R]:
    """`main` of a command, which answers an error for want of memory with one ValueError: what there was,
    what the run takes where that is known (`expect`), and settings that would fit."""

    @functools.wraps(main)
    def told(*words: P.args, **options: P.kwargs) -> R:
        before = _run_memory.set(RunMemory(available_memory(torch.device("cpu"))))
        try:
            return main(*words, **options)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what took the memory
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            message = f"out of memory: {explain_oom(_run_memory.get())}\n({reason})"
            raise ValueError(message) from error
        finally:
            _run_memory.reset(before)

    return told
