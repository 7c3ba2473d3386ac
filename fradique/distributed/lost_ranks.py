"""Lost ranks: recognize the error that a lost rank causes, find out which rank it is, report it and exit.

To find out, each rank that still runs writes a key to the store, which all ranks share. The ranks without a
key are missing. This is the roll call.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from fradique.distributed.process_group import flush_output, rank_store

ROLL_CALL_SECONDS = 10.0  # how long the roll call waits for the keys of the other ranks
POLL_SECONDS = 0.1  # between two looks for keys
MAX_REASON_CHARS = 200
# Words in the errors of gloo, NCCL and the store when a process is lost. Gloo raises a plain RuntimeError.
LOST_RANK_ERRORS = re.compile(r"gloo|nccl|connection|socket|timed? ?out|broken pipe|store", re.IGNORECASE)


def is_lost_rank_error(error: BaseException) -> bool:
    """Whether an error means that another rank does not answer. Always false for a single process."""
    if not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and LOST_RANK_ERRORS.search(str(error)) is not None
    )


def find_missing_ranks(
    stop_requested: Callable[[], bool], seconds: float = ROLL_CALL_SECONDS
) -> dict[int, str] | None:
    """The ranks that do not answer a roll call within `seconds`: rank -> host and process id.

    None if it cannot be found out: the store is lost too, or `stop_requested()` became true meanwhile.
    """
    deadline = time.monotonic() + seconds
    try:
        store = rank_store()
        store.set(f"present/{dist.get_rank()}", "yes")
        missing = set(range(dist.get_world_size()))
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not store.check([f"present/{rank}"])}
            if stop_requested():
                return None
            time.sleep(POLL_SECONDS)
        return {rank: store.get(f"process/{rank}").decode() for rank in sorted(missing)}
    except RuntimeError:  # dist.DistError: the store does not answer
        return None


def explain_lost_rank(error: BaseException, stop_requested: Callable[[], bool]) -> str:
    """The error message after a rank was lost: which rank it is, and how to continue the run."""
    missing = find_missing_ranks(stop_requested)
    if missing:
        ranks = "; ".join(f"rank {rank} ({process})" for rank, process in missing.items())
        verbs = "does not answer: it was" if len(missing) == 1 else "do not answer: they were"
        problem = f"{ranks} of {dist.get_world_size()} {verbs} killed, stopped or disconnected"
    elif missing is None and stop_requested():
        problem = "another process of the run ended, and this process received a signal to stop"
    else:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        problem = f"the processes of the run lost their connection ({reason[:MAX_REASON_CHARS]})"
    return (
        f"rank {dist.get_rank()}: {problem}. The saved checkpoints are intact. To resume from the last one, "
        "start the run again with --init_from=resume; torchrun --max-restarts=3 does this by itself"
    )


@contextmanager
def report_lost_ranks(stop_requested: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """If another rank is lost in this block, print an error that names it, and exit with status 1.

    stop_requested: whether this process has received a signal to stop, as torchrun sends it after a loss.

    The exit is immediate: destroying a process group that has lost a rank may block forever.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank_error(error):
            raise
        message = explain_lost_rank(error, stop_requested)
        with suppress(OSError, ValueError):  # stderr is closed
            print(f"error: {message}", file=sys.stderr)
        flush_output()
        os._exit(1)
