"""Two simulated hosts; the network between them is cut during a run (`make faults` cuts it for longer)."""

import subprocess
import sys

import pytest
from fork_server import TIMEOUT
from support import ROOT


def test_two_hosts_wait_while_the_network_is_cut():
    script = ROOT / "tests" / "faults" / "two_hosts.py"
    command = [sys.executable, str(script), "--cut", "2", "--steps", "60", "--patience", "300"]
    # the ranks wait for each other much longer than the cut, so that a busy machine does not part them
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        finally:
            process.terminate()  # which stops its hosts too
    assert process.returncode == 0, output
    if output.startswith("two hosts: skipped"):
        pytest.skip(output.strip())
    assert "the ranks waited; the losses are those of an undisturbed run" in output
