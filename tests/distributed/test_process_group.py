"""The process group: ranks, torchrun restarts, exit, tensors that may be sharded."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fork_server import run_in_forks
from support import ROOT, flags, rank_environments, run_training

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
    arguments = flags(replace(settings, out_dir=str(tmp_path / "run")))
    ranks = run_in_forks("train.py", arguments, rank_environments(2))
    assert [rank.returncode for rank in ranks] == [2, 2]
    errors = [rank.stderr for rank in ranks]
    assert "files that no run has written" in errors[0] and errors[1] == ""


REPORT_SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from configurator import command, setting
from fradique.distributed import process_group
process_group.REPORT_SECONDS = float(os.environ.get("REPORT_SECONDS", process_group.REPORT_SECONDS))

@dataclass(frozen=True)
class Settings:
    'a toy'
    failing: str = setting("all", "ranks that fail")

def main(resolved):
    rank = process_group.rank_info().rank
    if resolved.settings.failing in ("all", str(rank)):
        raise ValueError("the corpus is missing")
    time.sleep(60)  # as in a collective, until torchrun stops this rank

sys.exit(command(main, Settings, report_error=process_group.report_error))
"""


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--failing=all", "error: the corpus is missing"),
        ("--failing=0", "error: the corpus is missing"),
        ("--failing=1", "rank 1: error: the corpus is missing"),
        ("--faling=1", "error: --faling=1: unknown setting 'faling' (did you mean 'failing'?)"),
    ],
)
def test_torchrun_shows_an_error_once_with_its_rank(tmp_path, flag, message):
    script = tmp_path / "toy.py"
    script.write_text(REPORT_SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if flag == "--failing=1":
        environment["REPORT_SECONDS"] = "0.1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, str(script), flag],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error", "rank"))]
    assert result.returncode != 0 and lines == [message], result.stderr


@pytest.mark.parametrize(
    ("rank", "local_rank", "prefix", "waits"),
    [(0, 0, "", False), (8, 0, "rank 8: ", False), (3, 3, "rank 3: ", True)],
)
def test_the_first_rank_of_a_machine_reports_at_once(monkeypatch, capsys, rank, local_rank, prefix, waits):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(
        process_group, "rank_info", lambda: process_group.RankInfo(rank, local_rank, world=16, local_world=8)
    )
    process_group.report_error("error: no memory")
    assert capsys.readouterr().err == f"{prefix}error: no memory\n"
    assert slept == [process_group.REPORT_SECONDS] * waits


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
