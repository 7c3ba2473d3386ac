"""The warning before a run that may not fit, and the message after an out-of-memory error."""

import errno
import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from support import run_code

import sample
from configurator import command
from fradique.runtime import memory_limits
from fradique.runtime.memory_estimate import MemoryPlan, estimate_memory
from fradique.runtime.memory_limits import OomReport
from model import GPTConfig

LIMITED_TRAIN = """
import re, resource, sys
import train
from configurator import command
from fradique.training import setup
from pathlib import Path
size = int(re.search(r"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 + {extra}
resource.setrlimit(resource.{kind}, (size, size))
sys.exit(command(train.main, train.TrainSettings, sys.argv[1:], base=setup.saved_run_settings))
"""


def train_with_limit(kind, mib, *flags):
    """Run train.py in a process that may allocate `mib` MiB after its imports."""
    field = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[kind]
    return run_code(LIMITED_TRAIN.format(kind=kind, field=field, extra=mib << 20), *flags)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's process limits")
@pytest.mark.parametrize("kind", ["RLIMIT_AS"])  # RLIMIT_DATA works too, and takes as long
def test_a_run_that_does_not_fit_gets_advice_that_works(kind, data_dir, tmp_path):
    folder = tmp_path / "run"
    flags = [
        f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={folder}", "--device=cpu", "--dtype=float32",
        "--compile=False", "--n_layer=5", "--n_embd=256", "--n_head=4", "--block_size=128", "--eval_iters=1",
        "--max_iters=1", "--learning_rate=1e-3", "--sample_tokens=2",
    ]  # fmt: skip
    too_large = ["--batch_size=32", "--gradient_accumulation_steps=1"]
    result = train_with_limit(kind, 420, *flags, *too_large)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    warning, error, *_ = result.stderr.splitlines()
    assert warning.startswith("warning: this run may run out of memory")
    assert error.startswith("error: out of memory: ") and "What would fit: --batch_size=" in error
    assert len(re.findall("error:", result.stderr)) == 1
    saved = sorted(path.name for path in folder.iterdir() if path.name.startswith("step-"))
    assert saved == ["step-00000000"]  # a complete checkpoint; the next command resumes from it
    suggested = re.search(r"What would fit: ([^;]*)", error)[1].split()
    result = train_with_limit(kind, 420, "--init_from=resume", *flags, *suggested)
    assert result.returncode == 0, result.stderr
    assert "resuming at step 0" in result.stdout and (folder / "step-00000001").exists()


def report(error, plan=None, device="cpu"):
    """The message for an error, with the plan of the run if it is known."""
    with pytest.raises(ValueError, match="out of memory") as caught, OomReport() as oom:
        if plan:
            oom.check(plan, torch.device(device))
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_suggested_flags_fit_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 10 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    plan = MemoryPlan(GPTConfig(bias=False), batch_size=12, gradient_accumulation_steps=40)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    message = report(error, plan, "cuda:0")
    assert "the limit is 8.0 GiB (cuda:0, a GPU)" in message and "Tried to allocate" in message
    flags = re.search(r"--batch_size=(\d+) --gradient_accumulation_steps=(\d+)", message)
    batch, steps = map(int, flags.groups())
    smaller = replace(plan, batch_size=batch, gradient_accumulation_steps=steps)
    assert batch * steps == 480 and estimate_memory(smaller).total < 8 << 30
    assert "--gradient_checkpointing=True" in message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("std::bad_alloc"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_kind_of_out_of_memory_error_is_recognized(error):
    assert "smaller" in report(error)


def test_an_error_caused_by_out_of_memory_is_recognized():
    outer = ValueError("a file: it cannot be read")
    outer.__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")
    assert memory_limits.is_out_of_memory(outer)


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="shapes do not match"), OomReport():
        raise RuntimeError("shapes do not match")


def test_sample_reports_out_of_memory(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(sample, "load_model", fail)
    assert command(sample.main, sample.SampleSettings, ["--init_from=gpt2"]) == 2
    assert capsys.readouterr().err.startswith("error: out of memory: ")


def test_a_containers_memory_limit_is_read_from_cgroups(monkeypatch, tmp_path):
    child = tmp_path / "a" / "b"
    child.mkdir(parents=True)
    for folder, limit, usage in ((child, "max", 5), (tmp_path / "a", str(3 << 20), 2 << 20)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {1 << 19}\n")
    monkeypatch.setattr(memory_limits, "CGROUP", tmp_path)
    assert list(memory_limits.cgroup_limits("0::/a/b\n")) == [(1 << 20) + (1 << 19)]
    assert list(memory_limits.cgroup_limits("4:cpu:/a\n")) == []
