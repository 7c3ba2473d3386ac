"""What is made of torchrun's words: who starts again what it began, and who is missing."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from support import ROOT, run_training

from fradique.checkpointing import checkpoint, run_folder
from fradique.distributed import lost_ranks, process_group
from fradique.training import setup


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch):
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    assert (
        process_group.rank_info() == (0, 0, 1)
        and process_group.restart_count() == 0
        and process_group.launch_id() is None
    )
    assert process_group.broadcast_from_rank0(lambda: 7) == 7
    assert not lost_ranks.is_lost_rank_error(RuntimeError("gloo: connection closed"))


def test_a_call_of_torchrun_has_a_name_even_where_none_was_given(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    assert process_group.launch_id() == "job-17"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # the same for every call without --rdzv_id
    first = process_group.launch_id()
    monkeypatch.setattr("os.getppid", lambda: 123456)
    assert process_group.launch_id() != first and process_group.launch_id().endswith(":123456")


@pytest.fixture
def again(monkeypatch):
    """torchrun has started this process a second time."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_what_torchrun_starts_again_goes_on(settings, again):
    run_training(replace(settings, max_iters=5))
    assert setup.settings_after_restart(settings) == replace(settings, init_from="resume")
    assert setup.settings_after_restart(replace(settings, overwrite=True)).overwrite is False
    assert setup.saved_run_settings(settings)[0]["max_iters"] == 5  # what the run itself was begun with


def test_a_run_of_another_call_is_never_gone_on_with(settings, monkeypatch, again):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-16")
    run_training(replace(settings, max_iters=5))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    assert setup.settings_after_restart(settings) == settings and setup.saved_run_settings(settings) is None
    with pytest.raises(ValueError, match="already holds a run"):
        setup.setup_training(settings)


def test_a_first_start_is_no_restart(settings, monkeypatch, again):
    run_training(replace(settings, max_iters=5))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert setup.settings_after_restart(settings) == settings


def test_what_was_lost_before_its_first_checkpoint_begins_anew(settings, again):
    run_training(replace(settings, max_iters=5))
    folder = Path(settings.out_dir)
    for step in checkpoint.step_folders(folder):
        step.rename(folder / f"gone-{step.name}")
    assert setup.settings_after_restart(settings) == replace(settings, overwrite=True)
    assert run_folder.was_started_by(folder, "job-17") and not run_folder.was_started_by(folder, None)


class Store(dict):
    """What ranks write down for each other."""

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.fixture
def three_of_four(monkeypatch):
    """This is rank 1 of four, of which 0 and 3 answer a roll call."""
    store = Store({"here/0": b"yes", "here/3": b"yes", "who/2": b"host-b, process 77"})
    monkeypatch.setitem(process_group._state, "store", store)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(lost_ranks, "POLL_SECONDS", 0.001)


def test_a_roll_call_names_who_does_not_answer(three_of_four):
    assert lost_ranks.find_missing_ranks(lambda: False, patience=0.05) == {2: "host-b, process 77"}
    assert lost_ranks.find_missing_ranks(lambda: True, patience=9) is None


def test_the_message_names_the_rank_and_what_to_do(three_of_four, monkeypatch):
    monkeypatch.setattr(lost_ranks.find_missing_ranks, "__defaults__", (0.05,))
    said = lost_ranks.explain_lost_rank(RuntimeError("gloo timed out"), lambda: False)
    assert said.startswith("rank 1: rank 2 (host-b, process 77) of 4 does not answer")
    assert "--max-restarts" in said and "--init_from=resume" in said
    assert "told to stop" in lost_ranks.explain_lost_rank(RuntimeError("gloo"), lambda: True)


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
def test_the_loss_of_a_rank_is_told_from_an_error_of_our_own(three_of_four, error, lost):
    assert lost_ranks.is_lost_rank_error(error) is lost


def test_an_error_of_our_own_passes(three_of_four):
    with pytest.raises(RuntimeError, match="shapes"), lost_ranks.report_lost_ranks():
        raise RuntimeError("shapes do not fit")


def test_a_rank_that_answers_no_more_is_named_and_the_run_goes_on_to_the_last_bit():
    """One of two under torchrun, stopped; `make faults` does so with four, and kills them too."""
    words = "--ranks 2 --rounds 1 --parallel ddp --signals SIGSTOP --patience 12"
    command = [sys.executable, str(ROOT / "tests" / "faults" / "ranks.py"), *words.split()]
    environment = os.environ | {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"
    }  # for which torchrun asks the stopped one
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 of 1 runs" in done.stdout, done.stdout + done.stderr


ENDING = """
import atexit, sys
from fradique.distributed import process_group
class Last:
    def __del__(self):
        print("taken down")
last = Last()
atexit.register(print, "handlers ran")
process_group.exit_process(3)
"""


@pytest.mark.parametrize(("world", "said"), [("1", "handlers ran\ntaken down\n"), ("2", "handlers ran\n")])
def test_one_of_several_processes_ends_without_taking_the_interpreter_down(world, said):
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": world}
    command = [sys.executable, "-c", ENDING]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, said, "")
