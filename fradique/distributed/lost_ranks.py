"""Lost ranks: recognize the error, find out by a roll call which rank is missing, report it and exit."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from fradique.distributed.process_group import rank_store

ROLL_CALL_SECONDS = 10.0  # how long the other ranks have to answer
POLL_SECONDS = 0.1
# Messages of gloo, NCCL and the store when another process is gone; gloo's errors have no class of their own.
LOST_RANK_ERRORS = re.compile(r"gloo|nccl|connection|socket|timed? ?out|broken pipe|store", re.IGNORECASE)


def is_lost_rank_error(error: BaseException) -> bool:
    """Whether an error means that another process does not answer."""
    if not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and LOST_RANK_ERRORS.search(str(error)) is not None
    )


def find_missing_ranks(
    stop_requested: Callable[[], bool], seconds: float = ROLL_CALL_SECONDS
) -> dict[int, str] | None:
    """The ranks that do not answer a roll call within `seconds`: rank -> host and process id.

    None if there is no answer: the store is lost too, or `stop_requested` became true meanwhile.
    """
    deadline = time.monotonic() + seconds
    with suppress(RuntimeError):  # the store's errors: dist.DistError
        store = rank_store()
        store.set(f"present/{dist.get_rank()}", "yes")
        missing = set(range(dist.get_world_size()))
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not store.check([f"present/{rank}"])}
            if stop_requested():
                return None
            time.sleep(POLL_SECONDS)
        return {rank: store.get(f"process/{rank}").decode() for rank in sorted(missing)}
    return None


def explain_lost_rank(error: BaseException, stop_requested: Callable[[], bool]) -> str:
    """The message after the connection to a rank was lost: which rank, and how to continue."""
    missing = find_missing_ranks(stop_requested)
    if missing:
        ranks = "; ".join(f"rank {rank} ({process})" for rank, process in missing.items())
        problem = (
            f"{ranks} of {dist.get_world_size()} does not answer: it was killed, stopped or disconnected"
        )
    elif missing is None and stop_requested():
        problem = "another process of the run ended, and this one was told to stop"
    else:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        problem = f"the processes of the run lost their connection ({reason})"
    return (
        f"rank {dist.get_rank()}: {problem}. The last checkpoint is intact. torchrun --max-restarts=3 "
        "resumes from it by itself; to resume by hand, use --init_from=resume"
    )


@contextmanager
def report_lost_ranks(stop_requested: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """If another rank is lost in this block, print which one and exit with status 1.

    The exit is immediate: destroying a process group that has lost a rank may block forever.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank_error(error):
            raise
        print(f"error: {explain_lost_rank(error, stop_requested)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
