"""The workflow of GitHub: which systems it runs on, and the commands of its smoke test."""

import shlex
import shutil

import pytest
from support import ROOT, run_script

yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def job():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    return workflow["jobs"]["test"]


def test_it_runs_on_three_systems_and_the_oldest_python(job):
    matrix = job["strategy"]["matrix"]
    rows = [{"os": os, "python": python} for os in matrix["os"] for python in matrix["python"]]
    rows += matrix["include"]
    assert {row["os"].partition("-")[0] for row in rows} == {"ubuntu", "macos", "windows"}
    assert {row["python"] for row in rows if row["os"].startswith("ubuntu")} == {"3.10", "3.13"}


def test_the_folders_of_tests_exist(job):
    matrix = job["strategy"]["matrix"]
    for names in (*matrix["tests"], *(row["tests"] for row in matrix["include"])):
        assert all((ROOT / name).is_dir() for name in names.split()), names


def test_the_smoke_test_passes_here(job, tmp_path):
    shutil.copy(ROOT / "README.pt-BR.md", tmp_path)
    (step,) = (step for step in job["steps"] if step.get("name") == "Smoke test")
    commands = [shlex.split(line) for line in step["run"].splitlines()]
    assert all(command[0] == "python" for command in commands)
    outputs = []
    for _, *words in commands:
        program, *arguments = words[words[0] == "-m" :]
        result = run_script(program, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert "resuming at step 20" in outputs[2] and outputs[3].startswith("Fradique é ")
    assert (tmp_path / "out/smoke/report.html").exists()
