"""The process group: ranks, torchrun restarts, exit, tensors that may be sharded."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ROOT, flags, run_training, unused_port

from fradique.checkpointing import checkpoint, run_folder
from fradique.distributed import lost_ranks, process_group
from fradique.training import setup


def test_without_torchrun_there_is_one_rank(monkeypatch):
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    assert process_group.rank_info() == process_group.RankInfo(rank=0, local_rank=0, world=1, local_world=1)
    assert process_group.restart_count() == 0 and process_group.launch_id() is None
    assert process_group.broadcast_from_rank0(lambda: 7) == 7
    assert not lost_ranks.is_lost_rank_error(RuntimeError("gloo: connection closed"))


def test_torchrun_without_rdzv_id_has_a_launch_id(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    assert process_group.launch_id() == "job-17"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun without --rdzv_id sets
    first = process_group.launch_id()
    monkeypatch.setattr("os.getppid", lambda: 123456)
    assert process_group.launch_id() != first and process_group.launch_id().endswith(":123456")


@pytest.fixture
def restarted(monkeypatch):
    """As if torchrun had restarted this process once."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_a_restarted_run_resumes(settings, restarted):
    run_training(replace(settings, max_iters=5))
    assert setup.settings_after_restart(settings) == replace(settings, init_from="resume")
    assert setup.settings_after_restart(replace(settings, overwrite=True)).overwrite is False
    assert setup.saved_run_settings(settings)[0]["max_iters"] == 5  # the settings of the first start


def test_a_run_of_another_launch_is_not_resumed(settings, monkeypatch, restarted):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-16")
    run_training(replace(settings, max_iters=5))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    assert setup.settings_after_restart(settings) == settings and setup.saved_run_settings(settings) is None
    with pytest.raises(ValueError, match="already holds a run"):
        setup.setup_training(settings)


def test_the_first_start_is_no_restart(settings, monkeypatch, restarted):
    run_training(replace(settings, max_iters=5))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert setup.settings_after_restart(settings) == settings


def test_a_restart_before_the_first_checkpoint_starts_anew(settings, restarted):
    run_training(replace(settings, max_iters=5))
    folder = Path(settings.out_dir)
    for step in checkpoint.step_folders(folder):
        step.rename(folder / f"gone-{step.name}")
    assert setup.settings_after_restart(settings) == replace(settings, overwrite=True)
    assert run_folder.was_started_by(folder, "job-17") and not run_folder.was_started_by(folder, None)


EXIT_SCRIPT = """
import atexit, sys
from fradique.distributed import process_group
class Finalized:
    def __del__(self):
        print("finalized")
finalized = Finalized()
atexit.register(print, "exit handlers ran")
process_group.exit_process(3)
"""


@pytest.mark.parametrize(
    ("world", "output"), [("1", "exit handlers ran\nfinalized\n"), ("2", "exit handlers ran\n")]
)
def test_one_of_several_processes_exits_without_finalization(world, output):
    environment = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
    }
    command = [sys.executable, "-c", EXIT_SCRIPT]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (3, output, "")


def test_all_ranks_exit_with_status_2_after_an_error_on_rank_0(settings, tmp_path):
    """Rank 0 finds that out_dir holds a run; rank 1 learns it from rank 0. Without torchrun, to see both."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}")
    port = unused_port()
    ranks = []
    for rank in ("0", "1"):
        environment = os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            *flags(replace(settings, out_dir=str(tmp_path / "run"))),
        ]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert "files that no run has written" in errors[0] and errors[1] == ""


def test_a_tensor_that_is_not_sharded_is_its_own_full_and_local_tensor():
    tensor = torch.ones(2)
    assert process_group.full_tensor(tensor) is tensor and process_group.local_tensor(tensor) is tensor


def test_process_group_does_not_import_dtensor():
    """Its import takes 0.7 s, also in a run of one process."""
    code = (
        "import sys; from fradique.distributed import process_group\n"
        "sys.exit('torch.distributed.tensor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
