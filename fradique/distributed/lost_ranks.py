"""TODO."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from fradique.distributed.process_group import _state

ROLL_CALL_SECONDS = 10.0  # seconds in which a rank that lives answers after another was lost
POLL_SECONDS = 0.1
# What gloo, NCCL and the store say where another process is gone; gloo's errors have no class of their own.
LOST_RANK_ERRORS = re.compile(r"gloo|nccl|connection|socket|timed? ?out|broken pipe|store", re.IGNORECASE)


def is_lost_rank_error(error: BaseException) -> bool:
    """Whether an error says that another process does not answer."""
    if not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and LOST_RANK_ERRORS.search(str(error)) is not None
    )


def find_missing_ranks(
    told_to_stop: Callable[[], bool], patience: float = ROLL_CALL_SECONDS
) -> dict[int, str] | None:
    """The ranks that do not answer any more, and where they ran: a roll call after one was lost.

    None where it cannot be held: the store is gone, or this process is `told_to_stop` meanwhile.
    """
    store, world, end = _state.get("store"), dist.get_world_size(), time.monotonic() + patience
    if store is None:
        return None
    with suppress(RuntimeError):  # of the store: a DistError
        store.set(f"here/{dist.get_rank()}", "yes")
        absent = set(range(world))
        while absent and time.monotonic() < end:
            absent = {rank for rank in absent if not store.check([f"here/{rank}"])}
            if told_to_stop():
                return None
            time.sleep(POLL_SECONDS)
        return {rank: store.get(f"who/{rank}").decode() for rank in sorted(absent)}
    return None


def explain_lost_rank(error: BaseException, told_to_stop: Callable[[], bool]) -> str:
    """What to say where the ranks lost one another."""
    absent = find_missing_ranks(told_to_stop)
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
def report_lost_ranks(told_to_stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Where another rank is lost in this block: say which, and end this process.

    At once: a process group that has lost a rank may wait for it for ever when it is taken down.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank_error(error):
            raise
        print(f"error: {explain_lost_rank(error, told_to_stop)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
