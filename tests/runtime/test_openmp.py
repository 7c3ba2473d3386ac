"""How OpenMP's threads wait: what libgomp itself reports in a new process."""

import os
import re
import subprocess
import sys

import pytest
from support import ROOT

from fradique.runtime import openmp


def reported_spin_count(module, **environment):
    """What libgomp prints when it is loaded; None if torch has another OpenMP."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names} | environment
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    command = [sys.executable, "-c", f"import {module}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    match = re.search(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
    return match and int(match[1])


@pytest.mark.parametrize("module", ["train", "sample", "lab.common", "bench.machine"])
def test_threads_of_a_command_sleep_soon(module):
    if reported_spin_count("torch") is None:
        pytest.skip("torch's OpenMP is not GNU's")
    assert reported_spin_count(module) == openmp.SPIN_COUNT


def test_the_users_choice_is_kept(monkeypatch):
    for name, value in (("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "active")):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.setenv(name, value)
        openmp.limit_spinning()
        assert os.environ.get("GOMP_SPINCOUNT") == (value if name == "GOMP_SPINCOUNT" else None)
