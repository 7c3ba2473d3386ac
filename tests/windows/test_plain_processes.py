"""The processes that tests start on a system without forks."""

import os
import sys

import pytest
from support import ROOT, rank_environments, run_in_forks, run_script, start_in_forks


@pytest.fixture(autouse=True)
def without_fork(monkeypatch):
    monkeypatch.delattr(os, "fork", raising=False)


def test_a_process_gets_its_input_and_environment():
    code = "import os, sys; print(sys.stdin.read(), sys.argv[1], os.environ['RANK']); sys.exit(3)"
    results = run_in_forks("-c", [code, "é"], rank_environments(2), stdin="ç")
    assert [(result.returncode, result.stdout) for result in results] == [(3, "ç é 0\n"), (3, "ç é 1\n")]


@pytest.mark.parametrize("name", ["train.py", "lab.anatomy"])
def test_a_script_and_a_module_run_in_another_folder(name, tmp_path):
    result = run_script(name, "--nonsense=1", cwd=tmp_path)
    assert result.returncode == 2 and "nonsense" in result.stderr and not result.stdout


def test_lines_can_be_read_while_a_process_runs():
    code = "import sys, time; print('started', flush=True); time.sleep(600)"
    with start_in_forks("-c", [code], [os.environ], ROOT, read_lines=True) as process:
        assert process.lines.readline() == "started\n"
        process.kill()
        (status,) = process.wait()
    assert status == (1 if sys.platform == "win32" else -9)
