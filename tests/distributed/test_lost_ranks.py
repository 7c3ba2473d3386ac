"""Lost ranks: which errors mean one, the roll call, the message, and a run under torchrun."""

import io
import os
import sys

import pytest
import torch.distributed as dist
from support import run_ranks, run_script

from fradique.distributed import lost_ranks


class Store(dict):
    """A dict as the store that the ranks share."""

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)


class SleepingClock:
    """The module `time`, for a process in which only sleeping takes time."""

    seconds = 0.0

    def monotonic(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds


@pytest.fixture
def rank2_of_4_missing(monkeypatch):
    """As if this were rank 1 of four, and ranks 0 and 3 had answered the roll call."""
    store = Store({"present/0": b"yes", "present/3": b"yes", "process/2": b"host-b, process 77"})
    monkeypatch.setattr(lost_ranks, "rank_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(lost_ranks, "time", SleepingClock())


def test_the_roll_call_finds_the_missing_rank(rank2_of_4_missing):
    assert lost_ranks.find_missing_ranks(lambda: False, seconds=9) == {2: "host-b, process 77"}
    assert lost_ranks.find_missing_ranks(lambda: True, seconds=9) is None


def test_the_message_names_the_rank_and_how_to_resume(rank2_of_4_missing, monkeypatch):
    message = lost_ranks.explain_lost_rank(RuntimeError("gloo timed out"), lambda: False)
    assert message.startswith("rank 1: rank 2 (host-b, process 77) of 4 does not answer")
    assert "--max-restarts" in message and "--init_from=resume" in message
    assert "signal to stop" in lost_ranks.explain_lost_rank(RuntimeError("gloo"), lambda: True)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"), True),
        (RuntimeError("Timed out waiting 15000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 3"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
        (ValueError("connection"), False),
    ],
)
def test_lost_rank_errors_are_recognized(rank2_of_4_missing, error, lost):
    assert lost_ranks.is_lost_rank_error(error) is lost


def test_other_errors_propagate(rank2_of_4_missing):
    with pytest.raises(RuntimeError, match="shapes"), lost_ranks.report_lost_ranks():
        raise RuntimeError("shapes do not fit")


def test_a_stopped_rank_is_named_and_the_run_resumes_exactly():
    """Two ranks under torchrun, one is sent SIGSTOP; `make faults` does it with four, and with SIGKILL."""
    words = "--ranks 2 --rounds 1 --parallel ddp --signals SIGSTOP --patience 12 --steps 20 --kill"
    result = run_script("tests/faults/ranks.py", *words.split())
    assert result.returncode == 0 and "1 of 1 runs" in result.stdout, result.stdout + result.stderr


ROLL_CALL_SCRIPT = """
import time
from types import SimpleNamespace
import torch
from fradique.distributed import lost_ranks, process_group
process_group.join(torch.device("cpu"), "gloo", 600)
rank, store = process_group.rank_info().rank, process_group.rank_store()
process_group.barrier()
seconds = 0
def monotonic():
    global seconds
    seconds += store.check(["present/0", "present/2"])  # time passes when these two have answered
    return seconds
if rank != 1:  # which does not answer
    lost_ranks.time = SimpleNamespace(monotonic=monotonic, sleep=time.sleep)
    missing = lost_ranks.find_missing_ranks(lambda: False, seconds=2)
    assert list(missing) == [1] and "process" in missing[1], missing
store.set(f"done/{rank}", "yes")
store.wait([f"done/{other}" for other in range(3)])
process_group.barrier()  # the store ends with rank 0
process_group.exit_process(0)
"""


def test_the_roll_call_uses_the_store_of_the_process_group(tmp_path):
    script = tmp_path / "roll_call.py"
    script.write_text(ROLL_CALL_SCRIPT)
    result = run_ranks(3, program=script)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_process_with_closed_output_exits_too(rank2_of_4_missing, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    for stream in ("stdout", "stderr"):
        closed = io.StringIO()
        closed.close()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exited:
            patch.setattr(sys, stream, closed)
            with lost_ranks.report_lost_ranks():
                raise RuntimeError("gloo: connection closed")
        assert exited.value.code == 1
