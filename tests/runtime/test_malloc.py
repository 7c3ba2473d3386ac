"""The malloc options of a process, measured in other processes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, run_code

from fradique.distributed.process_group import RankInfo
from fradique.runtime import device, malloc

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="glibc's malloc and Linux's /proc"
)


def run_python(code):
    """The number that `code` prints in a process of its own."""
    result = run_code(code)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


HUGE_PAGES = """
import re, torch
from fradique.runtime import device
device.configure_process("cpu")
x = torch.ones(1 << 24)  # 64 MB
print(re.search(r"AnonHugePages: *(\\d+)", open("/proc/self/smaps_rollup").read())[1])
"""


@linux_only
def test_tensors_use_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel has no transparent huge pages")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("THP")}
    command = [sys.executable, "-c", HUGE_PAGES]  # a new process: torch reads the option once
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environ)
    # in kB: a quarter of x, because the kernel may have no more huge pages
    assert int(result.stdout) >= 1 << 14


PAGE_FAULTS = """
import resource, torch
from fradique.runtime import malloc
if {keep}:
    malloc.keep_freed_memory()
def faults():
    for _ in range(10):
        torch.zeros(1 << 24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults() for _ in range(5)]
print(min(after - before for before, after in zip(counts, counts[1:])))  # the kernel may reclaim some
"""


@linux_only
def test_freed_memory_is_reused_without_page_faults():
    faults = {keep: run_python(PAGE_FAULTS.format(keep=keep)) for keep in (False, True)}
    if faults[False] < 1000:
        pytest.skip("this malloc keeps freed memory by default, or its pages are huge")
    assert faults[True] < faults[False] / 10


RESIDENT = """
import os, torch
from fradique.runtime import malloc
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20  # MiB
malloc.keep_freed_memory()  # the second call replaces its options
{call}()
before = resident()
x = torch.ones(1 << 26)  # 256 MiB
del x
print(resident() - before)
"""


@linux_only
@pytest.mark.parametrize(
    ("call", "stays_resident"), [("malloc.keep_freed_memory", True), ("malloc.return_freed_memory", False)]
)
def test_large_tensors_are_returned_only_on_request(call, stays_resident):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc's malloc")
    growth = run_python(RESIDENT.format(call=call))
    assert growth > 200 if stays_resident else growth < 50


@pytest.mark.parametrize(
    ("parallel", "world", "expected"), [("fsdp", 2, "return"), ("ddp", 2, "keep"), ("fsdp", 1, "keep")]
)
def test_only_sharded_runs_return_freed_memory(monkeypatch, parallel, world, expected):
    calls = []
    monkeypatch.setattr(malloc, "return_freed_memory", lambda: calls.append("return"))
    monkeypatch.setattr(malloc, "keep_freed_memory", lambda: calls.append("keep"))
    monkeypatch.setattr(device.process_group, "rank_info", lambda: RankInfo(world=world))
    monkeypatch.setattr(device.process_group, "join", lambda *_: None)
    assert device.configure_process("cpu", parallel=parallel).type == "cpu"
    assert calls == [expected]
    runtime = device.setup_runtime(device="cpu", parallel=parallel)
    assert calls == [expected]  # setup_runtime changes no malloc options
    assert runtime.sharded == (expected == "return")
