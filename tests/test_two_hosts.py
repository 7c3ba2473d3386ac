"""Two hosts on one machine, and the cable between them cut in mid-run (`make faults` cuts it for longer)."""

import subprocess
import sys

import pytest
from conftest import ROOT


def test_two_hosts_wait_out_a_cut_cable():
    script = ROOT / "tests" / "faults" / "two_hosts.py"
    command = [sys.executable, str(script), "--cut", "2", "--steps", "120"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if done.stdout.startswith("two hosts: skipped"):
        pytest.skip(done.stdout.strip())
    assert "the ranks waited; the losses are those of an undisturbed run" in done.stdout
