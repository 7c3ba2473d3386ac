import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

from fradique.runtime import device as devices
from fradique.runtime import malloc, signals


def test_a_device_that_is_not_there_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"device=gpu: not a device; use auto, cpu, mps, cuda or cuda:N"):
        devices.choose_device("gpu")
    with pytest.raises(ValueError, match="device=xpu: use auto"):
        devices.choose_device("xpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no cuda device here"):
            devices.choose_device("cuda")
        assert devices.choose_device("auto", world=2).type == "cpu"


def test_each_process_takes_the_card_of_its_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices.choose_device("auto", local_rank=2, world=4) == torch.device("cuda:2")
    assert devices.choose_device("cuda", local_rank=3, world=4) == torch.device("cuda:3")
    assert devices.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="there are 4 CUDA devices"):
        devices.choose_device("cuda:4")


@pytest.mark.parametrize(
    ("device", "bf16", "n_embd", "vocab_size", "expected"),
    [
        ("cuda", True, 64, 96, "bfloat16"),
        ("cuda", False, 64, 96, "float16"),
        ("mps", True, 768, 50304, "float32"),
        ("cpu", True, 64, 96, "float32"),
        ("cpu", True, 384, 96, "bfloat16"),
        ("cpu", True, 64, 50304, "bfloat16"),
        ("cpu", False, 384, 50304, "float32"),
    ],
)
def test_the_dtype_is_what_the_hardware_does_well(monkeypatch, device, bf16, n_embd, vocab_size, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: bf16)
    assert devices.choose_dtype("auto", torch.device(device), n_embd, vocab_size)[0] == expected


def test_float16_is_for_cuda_alone():
    with pytest.raises(ValueError, match="float16 needs a GradScaler on CUDA"):
        devices.choose_dtype("float16", torch.device("cpu"), 64)
    assert devices.choose_dtype("bfloat16", torch.device("cpu"), 64) == ("bfloat16", "as set")


def test_compiling_is_for_runs_that_are_long_enough(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/g++")
    assert devices.choose_compile("auto", cpu, 1e17, None)[0]
    assert not devices.choose_compile("auto", cpu, 1e10, None)[0]
    assert not devices.choose_compile("auto", cpu, 1e17, 60.0)[0]  # the budget counts, not max_iters
    assert not devices.choose_compile("auto", torch.device("mps"), 1e20, None)[0]
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert devices.choose_compile("auto", cpu, 1e17, None) == (False, "no C++ compiler is at hand")
    assert devices.choose_compile(True, cpu, 0.0, None) == (True, "as set")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", None),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    place = devices.Runtime(torch.device("cuda:0"), torch.bfloat16, False)
    assert place.peak_flops() == peak


def test_a_cpu_has_no_peak_that_is_known():
    assert devices.Runtime(torch.device("cpu"), torch.float32, False).peak_flops() is None


def test_autocast_is_on_for_halves_alone():
    x = torch.ones(4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with devices.Runtime(torch.device("cpu"), dtype, False).autocast():
            assert (x @ x).dtype == dtype


def test_a_single_process_reduces_to_itself():
    place = devices.setup_runtime(device="cpu")
    assert place.sum(1.5, 2) == [1.5, 2] and place.max(3) == [3]
    assert place.is_main and place.wrap(torch.nn.Linear(1, 1)).__class__ is torch.nn.Linear


def test_a_signal_is_remembered_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    stop = signals.StopSignal()
    place = devices.Runtime(torch.device("cpu"), torch.float32, False)
    assert not stop.heard(place)
    signal.raise_signal(signal.SIGTERM)
    assert stop.heard(place) and stop.name == "SIGTERM"
    stop.forget()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_stops_at_once():
    stop = signals.StopSignal()
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.forget()


@pytest.mark.parametrize(
    ("rows", "length", "at_once"),
    [(64, 256, 16), (12, 64, 12), (2, 1024, 2), (7, 2048, 1), (3, 9999, 1), (18, 1024, 3), (1, 4, 1)],
)
def test_a_slice_is_the_largest_equal_part_that_fits(rows, length, at_once, monkeypatch):
    monkeypatch.setattr(devices, "CPU_MAX_TOKENS", 4096)
    x = torch.arange(rows * length).view(rows, length)
    place = devices.Runtime(torch.device("cpu"), torch.float32, False)
    parts = place.slices([(x, x + 1), (x + 2, x + 3)])
    assert {part[0].shape for part in parts} == {(at_once, length)}
    assert torch.equal(torch.cat([part[0] for part in parts]), torch.cat([x, x + 2]))
    assert torch.equal(torch.cat([part[1] for part in parts]), torch.cat([x + 1, x + 3]))


def test_a_seed_is_torchs():
    place = devices.Runtime(torch.device("cpu"), torch.float32, False)
    drawn = []
    for seed in (place.seed, torch.manual_seed):
        seed(7)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


PAGES = """
import resource, torch
from fradique.runtime import malloc
if {keep}:
    malloc.keep_freed_memory()
def faults():
    for _ in range(10):
        torch.zeros(1 << 24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults() for _ in range(5)]
print(min(after - before for before, after in zip(counts, counts[1:])))  # the kernel may take some back
"""


HUGE = """
import re, torch
from fradique.runtime import device
device.setup_runtime(device="cpu")
x = torch.ones(1 << 24)  # 64 MB
print(re.search(r"AnonHugePages: *(\\d+)", open("/proc/self/smaps_rollup").read())[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's huge pages")
def test_weights_lie_in_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives none")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("THP")}
    command = [sys.executable, "-c", HUGE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environ)
    assert int(done.stdout) >= 1 << 14  # kB: a quarter; the kernel may lack the rest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_not_fetched_anew_from_the_kernel():
    pages = {}
    for keep in (False, True):
        command = [sys.executable, "-c", PAGES.format(keep=keep)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        pages[keep] = int(done.stdout)
    if pages[False] < 1000:
        pytest.skip("this malloc keeps freed memory by itself, or its pages are huge")
    assert pages[True] < pages[False] / 10


RESIDENT = """
import os, torch
from fradique.runtime import malloc
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20  # MiB
malloc.keep_freed_memory()  # as a trial of `auto` does
{way}()
before = resident()
x = torch.ones(1 << 26)  # 256 MiB
del x
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's /proc")
@pytest.mark.parametrize(
    ("way", "stays"), [("malloc.keep_freed_memory", True), ("malloc.return_freed_memory", False)]
)
def test_large_tensors_are_given_back_where_that_is_asked_for(way, stays):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another malloc than glibc's")
    command = [sys.executable, "-c", RESIDENT.format(way=way)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) > 200 if stays else int(done.stdout) < 50


@pytest.mark.parametrize(
    ("parallel", "world", "way"), [("fsdp", 2, "gives"), ("ddp", 2, "keeps"), ("fsdp", 1, "keeps")]
)
def test_a_model_in_parts_gives_memory_back_and_others_keep_it(monkeypatch, parallel, world, way):
    done = []
    monkeypatch.setattr(malloc, "return_freed_memory", lambda: done.append("gives"))
    monkeypatch.setattr(malloc, "keep_freed_memory", lambda: done.append("keeps"))
    monkeypatch.setattr(devices.ranks, "here", lambda: (0, 0, world))
    monkeypatch.setattr(devices.ranks, "join", lambda *_: None)
    place = devices.setup_runtime(device="cpu", parallel=parallel)
    assert done == [way] and place.sharded == (way == "gives")


def test_a_signal_that_comes_while_the_ranks_tell_each_other_is_not_lost():
    stop = signals.StopSignal()

    class Asked:
        """Ranks of which none had heard anything; this one hears it while they are asked."""

        def max(self, number):
            os.kill(os.getpid(), signal.SIGTERM)
            return [float(number)]

    class Silent:
        def max(self, number):
            return [float(number)]

    class Another:
        """It was another rank that heard Ctrl-C."""

        def max(self, number):
            return [float(max(number, signal.SIGINT))]

    try:
        assert not stop.heard(Asked())
        assert stop.heard(Silent()) and stop.name == "SIGTERM"
    finally:
        stop.forget()
    stop = signals.StopSignal()
    try:
        assert stop.heard(Another()) and stop.name == "SIGINT"
    finally:
        stop.forget()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of POSIX")
def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = signals.StopSignal()
    try:
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        stop.forget()
        signal.signal(signal.SIGHUP, before)
