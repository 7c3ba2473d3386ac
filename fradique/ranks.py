"""The processes of a run: how they join, agree on one thing, go in step, and find out who is missing.

torchrun starts them and starts them again when one is lost; here is only what it leaves to the program.
"""

import atexit
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
ROLL_CALL = 10.0  # seconds in which a rank that lives answers after another was lost
POLL = 0.1
FAILED = 2  # the exit status after an error that the user can mend; rank 0 tells it
# What gloo, NCCL and the store say where another process is gone; gloo's errors have no class of their own.
LOST = re.compile(r"gloo|nccl|connection|socket|timed? ?out|broken pipe|store", re.IGNORECASE)
_joined: dict[str, Any] = {}  # the store, where this process has joined others


def here() -> tuple[int, int, int]:
    """Rank, local rank and world of this process: (0, 0, 1) where torchrun did not start it."""
    if "RANK" not in os.environ:
        return 0, 0, 1
    rank, local_rank, world = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return rank, local_rank, world


def join(device: torch.device, backend: str, timeout: float) -> None:
    """Join the other processes, once. `timeout`: seconds for which one waits for another, at most."""
    rank, _, world = here()
    if world == 1 or dist.is_initialized():
        return
    backend = "nccl" if backend == "auto" and device.type == "cuda" else backend.replace("auto", "gloo")
    both = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend  # gloo shares the small numbers
    wait = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=wait))
    store = dist.PrefixStore(f"fradique/{restarts()}", store)  # what ranks before a restart wrote is stale
    dist.init_process_group(
        both,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=wait,
        device_id=device if device.type == "cuda" else None,
    )
    _joined["store"] = dist.PrefixStore("ranks", store)
    _joined["store"].set(f"who/{rank}", f"{socket.gethostname()}, process {os.getpid()}")


def leave() -> None:
    _joined.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """End this process. One of several runs its exit handlers, and does not take the interpreter down: a
    thread of torch's that wants it meanwhile would abort the process, and a run that is done would be told
    as one that failed."""
    if here()[2] == 1:
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def restarts() -> int:
    """How often torchrun has started this run again after losing a process."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launch() -> str | None:
    """A name for the call of torchrun that started this process, the same for all that it starts, again and
    again; None where there is none. Without an --rdzv_id several calls have the same name: then it is the
    agent, which is the parent of this process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name in (None, "", "none"):
        return f"{socket.gethostname()}:{os.getppid()}" if name else None
    return name


def reduce(values: Sequence[float], how: str) -> list[float]:
    """Each value's "sum" or "max" over the ranks."""
    together = torch.tensor(values, dtype=torch.float64)  # on the CPU: no wait for the card
    dist.all_reduce(together, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])
    return together.tolist()


def wait() -> None:
    """Until every rank is here."""
    dist.barrier()


def agree(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank. Where it raises there, the others end quietly."""
    if not dist.is_initialized():
        return make()
    if dist.get_rank() != 0:
        told: list[Any] = [False, None]
        dist.broadcast_object_list(told, src=0)
        if not told[0]:
            raise SystemExit(FAILED)
        return told[1]
    told = [False, None]
    try:
        told = [True, make()]
    finally:
        dist.broadcast_object_list(told, src=0)
    return told[1]


def in_step(items: Iterable[T]) -> Iterator[T | None]:
    """The items, and None for a rank that has no more while others do: where every step needs all ranks."""
    rest = iter(items)
    while True:
        item = next(rest, None)
        there = torch.tensor(item is not None)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        if not there:
            return
        yield item


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may hold a part, as one: on every rank, all of which must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be in parts."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def was_lost(error: BaseException) -> bool:
    """Whether an error says that another process does not answer."""
    if not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and LOST.search(str(error)) is not None
    )


def missing(told_to_stop: Callable[[], bool], patience: float = ROLL_CALL) -> dict[int, str] | None:
    """The ranks that do not answer any more, and where they ran: a roll call after one was lost.

    None where it cannot be held: the store is gone, or this process is `told_to_stop` meanwhile.
    """
    store, world, end = _joined.get("store"), dist.get_world_size(), time.monotonic() + patience
    if store is None:
        return None
    with suppress(RuntimeError):  # of the store: a DistError
        store.set(f"here/{dist.get_rank()}", "yes")
        absent = set(range(world))
        while absent and time.monotonic() < end:
            absent = {rank for rank in absent if not store.check([f"here/{rank}"])}
            if told_to_stop():
                return None
            time.sleep(POLL)
        return {rank: store.get(f"who/{rank}").decode() for rank in sorted(absent)}
    return None


def explain(error: BaseException, told_to_stop: Callable[[], bool]) -> str:
    """What to say where the ranks lost one another."""
    absent = missing(told_to_stop)
    if absent:
        named = "; ".join(f"rank {rank} ({where})" for rank, where in absent.items())
        what = f"{named} of {dist.get_world_size()} does not answer: it was killed, stopped, or cut off"
    elif absent is None and told_to_stop():
        what = "another process of the run ended, and this one was told to stop"
    else:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        what = f"the processes of the run lost one another ({reason})"
    return (
        f"rank {dist.get_rank()}: {what}. The last checkpoint is good: torchrun --max-restarts=3 goes on "
        "from it by itself; by hand: --init_from=resume"
    )


@contextmanager
def named_if_lost(told_to_stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Where another rank is lost in this block: say which, and end this process.

    At once: a process group that has lost a rank may wait for it for ever when it is taken down.
    """
    try:
        yield
    except RuntimeError as error:
        if not was_lost(error):
            raise
        print(f"error: {explain(error, told_to_stop)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
