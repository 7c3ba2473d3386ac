"""The process group of a run: join and leave it, collectives, and tensors that may be sharded.

torchrun starts the processes (ranks), and restarts all of them when one is lost.
"""

import atexit
import os
import socket
import sys
import time
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
REPORT_SECONDS = 5.0  # more than torchrun needs to stop all ranks of a machine after one has ended


@dataclass(frozen=True)
class RankInfo:
    """The number of this process, counted from 0, and the number of processes."""

    rank: int = 0
    local_rank: int = 0  # among the processes on this machine
    world: int = 1  # number of processes in the run: torchrun's WORLD_SIZE
    local_world: int = 1  # number of processes on this machine


def rank_info() -> RankInfo:
    """The RankInfo in torchrun's environment variables; that of a single process if there are none."""
    if "RANK" not in os.environ:
        return RankInfo()
    return RankInfo(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )


def join(device: torch.device, backend: str, timeout_seconds: float) -> None:
    """Initialize the process group if torchrun started several processes. Does nothing the second time.

    backend: gloo, nccl or auto (nccl for CUDA, else gloo).
    timeout_seconds: after this time, waiting for another rank raises an error.
    """
    ranks = rank_info()
    if ranks.world == 1 or dist.is_initialized():
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl":
        backend = "cpu:gloo,cuda:nccl"  # NCCL has no collectives for CPU tensors, which all_reduce() needs
    timeout = timedelta(seconds=timeout_seconds)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # (store, rank, world size)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"fradique/{restart_count()}", store),  # keys from before a restart are stale
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    rank_store().set(f"process/{ranks.rank}", f"{socket.gethostname()}, process {os.getpid()}")


def rank_store() -> dist.Store:
    """The key-value store that all ranks share. The prefix keeps our keys apart from torch's.

    `process/<rank>` contains the host and process id of each rank.
    """
    return dist.PrefixStore("ranks", distributed_c10d._get_default_store())


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """Exit with this status: a single process by sys.exit, a process of several by os._exit.

    os._exit does not finalize the interpreter, so the exit handlers and the flush are done here. Finalization
    can abort the process, so that a finished run counts as failed. Gloo's worker threads outlive
    destroy_process_group, because torch's own caches keep references to the group. A thread that frees a
    tensor needs the GIL, and a thread that asks for the GIL during finalization aborts the process
    (https://github.com/pytorch/pytorch/issues/190489). Joining the threads could take until the timeout of a
    collective if another rank is lost.
    """
    if rank_info().world == 1:
        sys.exit(status)
    atexit._run_exitfuncs()
    flush_output()
    os._exit(status)


def report_error(text: str) -> None:
    """Print an error message to stderr, only once per machine if all of its ranks meet the same error.

    Ranks meet a mistake in the settings or the corpus all at the same time. The first rank of the machine
    prints it and exits; torchrun then stops the others, which wait here. If a rank is still running after
    REPORT_SECONDS, the first rank did not meet the error (such as CUDA out of memory): this rank prints it.
    """
    ranks = rank_info()
    if ranks.local_rank != 0:
        time.sleep(REPORT_SECONDS)
    print(f"rank {ranks.rank}: {text}" if ranks.rank else text, file=sys.stderr, flush=True)


def flush_output() -> None:
    """Write out what stdout and stderr have buffered, before an os._exit. Closed streams are ignored."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # BrokenPipeError; ValueError for a stream closed in Python
            stream.flush()


def restart_count() -> int:
    """How many times torchrun has restarted the processes of this run after losing one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launch_id() -> str | None:
    """An id of the torchrun command that started this process, unchanged by restarts; None without torchrun.

    It is the --rdzv_id of torchrun. Without that option, torchrun always sets "none"; then it is the host and
    process id of torchrun, the parent of this process.
    """
    rdzv_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if not rdzv_id:
        return None
    return f"{socket.gethostname()}:{os.getppid()}" if rdzv_id == "none" else rdzv_id


def all_reduce(values: Sequence[float], op: str) -> list[float]:
    """Each value summed over the ranks (op "sum"), or its maximum over the ranks (op "max")."""
    reduced = torch.tensor(values, dtype=torch.float64)  # on the CPU: no synchronization with the GPU
    dist.all_reduce(reduced, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return reduced.tolist()


def barrier() -> None:
    """Wait until every rank has called this."""
    dist.barrier()


def broadcast_from_rank0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only, and return its result on every rank. All ranks must call this.

    If `function` raises an exception, rank 0 raises it too and reports it; the other ranks raise SystemExit
    without a message.
    """
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [False, None]  # whether `function` returned, and its result
    if dist.get_rank() != 0:
        dist.broadcast_object_list(outcome, src=0)
        succeeded, result = outcome
        if not succeeded:
            raise SystemExit(USER_ERROR_STATUS)
        return result
    try:
        outcome = [True, function()]
    finally:
        dist.broadcast_object_list(outcome, src=0)
    return outcome[1]


def lockstep(items: Iterable[T]) -> Iterator[T | None]:
    """Yield the items of this rank, then None until all ranks have yielded theirs.

    So all ranks run equally many forward passes, each of which is a collective for a sharded model.
    """
    iterator = iter(items)
    while True:
        item = next(iterator, None)
        any_rank_has_item = torch.tensor(item is not None)
        dist.all_reduce(any_rank_has_item, dist.ReduceOp.MAX)
        if not any_rank_has_item:
            return
        yield item


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. A sharded one is gathered from all ranks, so all ranks must call this."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    # Do not import torch.distributed.tensor here: it takes 0.7 s. Before its import no DTensor can exist.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
