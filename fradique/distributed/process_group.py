"""The process group of a run: join and leave it, collectives over its ranks, whole and local tensors.

torchrun starts the processes, and restarts all of them when one is lost.
"""

import atexit
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
USER_ERROR_STATUS = 2  # the exit status after an error that the user can correct


@dataclass(frozen=True)
class RankInfo:
    """The number of this process, and how many there are: in the whole run, and on this machine (local)."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1


def rank_info() -> RankInfo:
    """The ranks that torchrun gave this process; RankInfo() if torchrun did not start it."""
    if "RANK" not in os.environ:
        return RankInfo()
    rank, local_rank, world = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return RankInfo(rank, local_rank, world, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def join(device: torch.device, backend: str, timeout: float) -> None:
    """Initialize the process group if torchrun started several processes. Does nothing the second time.

    timeout: seconds after which a collective fails if a rank has not joined it.
    """
    ranks = rank_info()
    if ranks.world == 1 or dist.is_initialized():
        return
    backend = "nccl" if backend == "auto" and device.type == "cuda" else backend.replace("auto", "gloo")
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend  # gloo reduces numbers on the CPU
    wait = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=wait))
    dist.init_process_group(
        backends,
        store=dist.PrefixStore(f"fradique/{restart_count()}", store),  # keys from before a restart are stale
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=wait,
        device_id=device if device.type == "cuda" else None,
    )
    rank_store().set(f"process/{ranks.rank}", f"{socket.gethostname()}, process {os.getpid()}")


def rank_store() -> dist.Store:
    """The store of the process group, with a prefix for our own keys.

    `process/<rank>` holds the host and process id of each rank.
    """
    return dist.PrefixStore("ranks", distributed_c10d._get_default_store())


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """Exit with this status: one process by sys.exit, one of several without finalizing the interpreter.

    Gloo's worker threads outlive destroy_process_group: torch's own caches keep references to the group. A
    thread that frees a tensor needs the GIL, and a thread that asks for the GIL during finalization aborts
    the process (https://github.com/pytorch/pytorch/issues/190489): a finished run would count as failed.
    Joining the threads instead could take until the timeout of a collective if another rank is lost. So the
    exit handlers run, the output is flushed, and os._exit skips the rest.
    """
    if rank_info().world == 1:
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe or stream
            stream.flush()
    os._exit(status)


def restart_count() -> int:
    """How many times torchrun has restarted the processes of this run after losing one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launch_id() -> str | None:
    """An id of the torchrun command that started this process, unchanged by restarts; None without torchrun.

    torchrun without --rdzv_id has the id "none" every time: then the id is that of the torchrun process, the
    parent of this one.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name in (None, "", "none"):
        return f"{socket.gethostname()}:{os.getppid()}" if name else None
    return name


def all_reduce(values: Sequence[float], op: str) -> list[float]:
    """The "sum" or "max" of each value over the ranks."""
    reduced = torch.tensor(values, dtype=torch.float64)  # on the CPU: no synchronization with the GPU
    dist.all_reduce(reduced, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return reduced.tolist()


def barrier() -> None:
    """Wait until every rank has called this."""
    dist.barrier()


def broadcast_from_rank0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result on every rank.

    If it raises on rank 0, the other ranks raise SystemExit, without a message: rank 0 reports the error.
    """
    if not dist.is_initialized():
        return function()
    message: list[Any] = [False, None]  # whether `function` returned, and its result
    if dist.get_rank() != 0:
        dist.broadcast_object_list(message, src=0)
        if not message[0]:
            raise SystemExit(USER_ERROR_STATUS)
        return message[1]
    try:
        message = [True, function()]
    finally:
        dist.broadcast_object_list(message, src=0)
    return message[1]


def lockstep(items: Iterable[T]) -> Iterator[T | None]:
    """Yield the items, then None until no rank has any left, so that all ranks take equally many steps."""
    iterator = iter(items)
    while True:
        item = next(iterator, None)
        any_left = torch.tensor(item is not None)
        dist.all_reduce(any_left, dist.ReduceOp.MAX)
        if not any_left:
            return
        yield item


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks if it is sharded; then all ranks must call this."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    # Importing torch.distributed.tensor takes 0.7 s, and as long as nobody has there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
