"""The processes of a run: how they join, agree on one thing, go in step, and find out who is missing.

torchrun starts them and starts them again when one is lost; here is only what it leaves to the program.
"""

import atexit
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
FAILED = 2  # the exit status after an error that the user can mend; rank 0 tells it
_state: dict[str, Any] = {}  # the store, where this process has joined others


def rank_info() -> tuple[int, int, int]:
    """Rank, local rank and world of this process: (0, 0, 1) where torchrun did not start it."""
    if "RANK" not in os.environ:
        return 0, 0, 1
    rank, local_rank, world = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return rank, local_rank, world


def join(device: torch.device, backend: str, timeout: float) -> None:
    """Join the other processes, once. `timeout`: seconds for which one waits for another, at most."""
    rank, _, world = rank_info()
    if world == 1 or dist.is_initialized():
        return
    backend = "nccl" if backend == "auto" and device.type == "cuda" else backend.replace("auto", "gloo")
    both = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend  # gloo shares the small numbers
    wait = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=wait))
    store = dist.PrefixStore(
        f"fradique/{restart_count()}", store
    )  # what ranks before a restart wrote is stale
    dist.init_process_group(
        both,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=wait,
        device_id=device if device.type == "cuda" else None,
    )
    _state["store"] = dist.PrefixStore("ranks", store)
    _state["store"].set(f"who/{rank}", f"{socket.gethostname()}, process {os.getpid()}")


def leave() -> None:
    _state.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """End this process. One of several runs its exit handlers, and does not take the interpreter down: a
    thread of torch's that wants it meanwhile would abort the process, and a run that is done would be told
    as one that failed."""
    if rank_info()[2] == 1:
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def restart_count() -> int:
    """How often torchrun has started this run again after losing a process."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launch_id() -> str | None:
    """A name for the call of torchrun that started this process, the same for all that it starts, again and
    again; None where there is none. Without an --rdzv_id several calls have the same name: then it is the
    agent, which is the parent of this process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name in (None, "", "none"):
        return f"{socket.gethostname()}:{os.getppid()}" if name else None
    return name


def all_reduce(values: Sequence[float], how: str) -> list[float]:
    """Each value's "sum" or "max" over the ranks."""
    together = torch.tensor(values, dtype=torch.float64)  # on the CPU: no wait for the card
    dist.all_reduce(together, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])
    return together.tolist()


def barrier() -> None:
    """Until every rank is here."""
    dist.barrier()


def broadcast_from_rank0(make: Callable[[], T]) -> T:
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


def lockstep(items: Iterable[T]) -> Iterator[T | None]:
    """The items, and None for a rank that has no more while others do: where every step needs all ranks."""
    rest = iter(items)
    while True:
        item = next(rest, None)
        there = torch.tensor(item is not None)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        if not there:
            return
        yield item


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may hold a part, as one: on every rank, all of which must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be in parts."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
