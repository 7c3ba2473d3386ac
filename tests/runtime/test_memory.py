"""What a run takes, against torch's own record of every allocation; and what would fit."""

import errno
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support import ROOT

import sample as sample_module
from bench.memory import recorded
from configurator import command
from fradique.optim import optimizer
from fradique.runtime import device as devices
from fradique.runtime import memory_estimate, memory_limits
from model import GPT, GPTConfig

SMALL = GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=64, vocab_size=96, bias=False)
MODERN = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "n_kv_head": 1, "qk_norm": True}


def plan(shape=SMALL, **changes):
    return memory_estimate.MemoryPlan(
        shape, **{"batch_size": 16, "device": "cpu", "dtype": "float32", "parallel": "none"} | changes
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True, "tie_weights": False},
        MODERN,
        {"activation": "geglu", "bias": True, "position": "relative", "embd_norm": True},
        {"parallel_block": True, "norm": "rmsnorm", "bias": True, "n_inner": 100, "position": "none"},
        {"norm_place": "post", "qk_norm": True, "bias": True, "position": "sinusoidal"},
    ],
)
def test_parameters_are_counted_as_the_model_has_them(changes):
    shape = replace(SMALL, **changes)
    with torch.device("meta"):
        model = GPT(shape)
    counted = memory_estimate.count_parameters(shape)
    assert counted.total == model.num_params(non_embedding=False)
    blocks = [p for name, p in model.named_parameters() if ".h." in name]
    assert counted.matrices == sum(p.numel() for p in blocks if p.dim() == 2)
    assert counted.vectors == sum(p.numel() for p in blocks if p.dim() < 2)


def peak_of_a_step(shape, given):
    """Bytes of all tensors at the fullest moment of a step, by torch's record of allocations."""
    torch.manual_seed(0)
    model = GPT(shape)
    model.gradient_checkpointing = given.gradient_checkpointing
    optimizers = optimizer.build_optimizers(
        model, name=given.optimizer, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1
    )
    place = devices.Runtime(torch.device("cpu"), devices.DTYPES[given.dtype], False)
    rows, length = given.batch_size, shape.block_size
    tokens = torch.randint(shape.vocab_size, (given.gradient_accumulation_steps, rows, length))

    def step():
        with place.autocast():
            for x, y in place.slices((x, x) for x in tokens):
                loss = model(x, y, with_logits=False)[1]
                with place.autocast(enabled=False):
                    loss.backward()
        optimizer.assign_gradients(optimizers)
        for one in optimizers:
            one.step()
        for one in optimizers:
            one.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)

    step()
    kept = {id(t): t.nbytes for t in [*model.parameters(), *optimizer.state_by_name(optimizers).values()]}
    peak, left = recorded(step)
    assert left == 0  # what a step takes it gives back
    return sum(kept.values()) + peak


CASES = [
    ({}, {}),
    ({}, {"gradient_accumulation_steps": 2}),
    ({"n_embd": 128, "block_size": 128}, {"dtype": "bfloat16", "gradient_accumulation_steps": 2}),
    ({"dropout": 0.2}, {"gradient_accumulation_steps": 2}),
    ({"dropout": 0.2, "block_size": 128}, {"dtype": "bfloat16"}),
    ({"block_size": 1024, "n_embd": 128}, {"dtype": "bfloat16", "batch_size": 2}),
    ({"block_size": 1024, "vocab_size": 2048}, {"batch_size": 2, "gradient_accumulation_steps": 2}),
    ({"vocab_size": 8192, "block_size": 128}, {"dtype": "bfloat16", "gradient_accumulation_steps": 2}),
    ({"n_layer": 8}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ({"n_layer": 8, "n_embd": 128}, {"gradient_checkpointing": True, "dtype": "bfloat16"}),
    ({"n_embd": 256}, {"optimizer": "muon", "batch_size": 2}),
    ({"n_embd": 256, "n_layer": 6, "vocab_size": 4096}, {"batch_size": 1}),
    (MODERN, {"gradient_accumulation_steps": 2}),
    (MODERN | {"n_embd": 128, "block_size": 128}, {"dtype": "bfloat16"}),
    ({"activation": "relu2", "parallel_block": True}, {"gradient_accumulation_steps": 2}),
    ({"norm_place": "post", "activation": "relu", "tie_weights": False}, {}),
]


@pytest.mark.parametrize(
    ("shape", "changes"), CASES, ids=lambda one: ",".join(map(str, one.items())) or "plain"
)
def test_an_estimate_is_what_torch_allocates(shape, changes):
    """The tensors of a step, to some hundredths: what lies beside them is measured by bench.memory."""
    shape = replace(SMALL, **shape)
    given = plan(shape, **changes)
    of_a_step = [
        one.allocated for one in memory_estimate.estimate_moments(given) if one.moment != "evaluation"
    ]
    assert max(of_a_step) == pytest.approx(peak_of_a_step(shape, given), rel=0.08)


def test_one_process_has_the_whole_model_whatever_parallel_says():
    shape = replace(SMALL, n_embd=256, vocab_size=8192)
    whole = memory_estimate.estimate_memory(plan(shape))
    assert memory_estimate.estimate_memory(plan(shape, parallel="fsdp")) == whole
    parts = memory_estimate.estimate_memory(
        plan(shape, parallel="fsdp", world=2, gradient_accumulation_steps=2)
    )
    assert parts.weights == whole.weights // 2 and parts.optimizer == whole.optimizer // 2
    assert 0 < parts.holes < whole.holes  # malloc gives large tensors back


def test_a_step_is_cut_as_the_runtime_cuts_it():
    place = devices.Runtime(torch.device("cpu"), torch.float32, False)
    for rows, length in ((12, 1024), (7, 1000), (1, 9000), (64, 64), (60, 128)):
        x = torch.zeros(rows, length)
        parts = place.slices([(x, x)] * 3)
        given = plan(replace(SMALL, block_size=length), batch_size=rows, gradient_accumulation_steps=3)
        assert given.slices() == (parts[0][0].numel(), len(parts))


def test_each_process_has_its_part_of_a_sharded_run():
    alone = memory_estimate.estimate_memory(plan(device="cuda"))
    shared = [
        memory_estimate.estimate_memory(
            plan(device="cuda", parallel="fsdp", world=n, gradient_accumulation_steps=n)
        )
        for n in (2, 4)
    ]
    for n, one in zip((2, 4), shared, strict=True):
        assert (one.weights, one.optimizer) == (alone.weights // n, alone.optimizer // n)
    double = memory_estimate.estimate_memory(
        plan(device="cuda", parallel="ddp", world=2, gradient_accumulation_steps=2)
    )
    assert double.exchange == double.weights  # the buckets are a copy of the gradients


GPT2 = GPTConfig(bias=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("gib", [2.5, 3, 4, 6, 10, 20])
def test_what_is_said_to_fit_fits_and_makes_the_same_steps(device, gib):
    given = plan(GPT2, device=device, batch_size=12, gradient_accumulation_steps=40, dtype="bfloat16")
    budget = int(gib * 2**30)
    found = memory_estimate.suggest_settings(given, budget)
    assert found or gib < 3
    for changes in found:
        shape = {name: changes[name] for name in ("block_size", "n_layer") if name in changes}
        rest = {name: value for name, value in changes.items() if name not in shape}
        fits = replace(given, shape=replace(GPT2, **shape), **rest)
        assert memory_estimate.estimate_memory(fits).total <= budget
        assert fits.batch_size * fits.gradient_accumulation_steps == 12 * 40


def test_the_largest_batch_is_found_by_trying_all():
    given = plan(GPT2, device="cuda", batch_size=12, gradient_accumulation_steps=40, dtype="bfloat16")
    budget = 6 * 2**30
    tried = [
        rows
        for rows in range(1, 13)
        if 480 % rows == 0
        and memory_estimate.estimate_memory(
            replace(given, batch_size=rows, gradient_accumulation_steps=480 // rows)
        ).total
        <= budget
    ]
    assert memory_estimate.suggest_settings(given, budget)[0] == {
        "batch_size": max(tried),
        "gradient_accumulation_steps": 480 // max(tried),
    }


def test_where_nothing_fits_nothing_is_advised():
    assert memory_estimate.suggest_settings(plan(GPT2), 1 << 20) == []


# When there is too little


LIMITED = """
import re, resource, sys
import train
from configurator import command
from fradique.training import setup
from pathlib import Path
size = int(re.search(r"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 + {room}
resource.setrlimit(resource.{kind}, (size, size))
sys.exit(command(train.main, train.TrainSettings, sys.argv[1:], base=setup.saved_run_settings))
"""


def train_within(kind, mib, *words):
    """train.py in a process that may take `mib` MiB beyond its imports."""
    field = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[kind]
    code = LIMITED.format(kind=kind, field=field, room=mib << 20)
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=280,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits of processes are Linux's")
@pytest.mark.parametrize("kind", ["RLIMIT_AS"])  # RLIMIT_DATA works as well, and takes as long
def test_a_run_that_does_not_fit_says_what_would_and_that_does(kind, data_dir, tmp_path):
    out = tmp_path / "run"
    words = [
        f"--data_dir={data_dir}",
        "--dataset=tiny",
        f"--out_dir={out}",
        "--device=cpu",
        "--dtype=float32",
    ]
    words += [
        "--compile=False",
        "--n_layer=5",
        "--n_embd=256",
        "--n_head=4",
        "--block_size=128",
        "--eval_iters=1",
    ]
    words += ["--max_iters=1", "--learning_rate=1e-3", "--sample_tokens=2"]
    large = ["--batch_size=32", "--gradient_accumulation_steps=1"]
    done = train_within(kind, 420, *words, *large)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    warning, error, *_ = done.stderr.splitlines()
    assert warning.startswith("warning: this run may run out of memory")
    assert error.startswith("error: out of memory: ") and "What would fit: --batch_size=" in error
    assert len(re.findall("error:", done.stderr)) == 1
    held = sorted(path.name for path in out.iterdir() if path.name.startswith("step-"))
    assert held == ["step-00000000"]  # that of the beginning, and whole: the next command goes on with it
    advised = re.search(r"What would fit: ([^;]*)", error)[1].split()
    done = train_within(kind, 420, "--init_from=resume", *words, *advised)
    assert done.returncode == 0, done.stderr
    assert "going on at step 0" in done.stdout and (out / "step-00000001").exists()


def told(error, *, expected=None, device="cpu"):
    """The message of a command that fails so, once its plan is known; its exit status is 2."""

    @memory_limits.report_oom
    def main(resolved):
        if expected:
            memory_limits.check_memory(expected, torch.device(device))
        raise error

    with pytest.raises(ValueError, match="out of memory") as caught:
        main(None)
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_a_card_without_room_gets_flags_that_fit_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 10 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    given = plan(GPT2, device="cuda", batch_size=12, gradient_accumulation_steps=40, dtype="bfloat16")
    said = told(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), expected=given, device="cuda:0"
    )
    assert "cuda:0 (a card) left 8.0 GiB" in said and "Tried to allocate" in said
    batch, steps = map(
        int, re.search(r"--batch_size=(\d+) --gradient_accumulation_steps=(\d+)", said).groups()
    )
    fits = memory_estimate.estimate_memory(
        replace(given, batch_size=batch, gradient_accumulation_steps=steps)
    )
    assert batch * steps == 480 and fits.total < 8 << 30
    assert "--gradient_checkpointing=True" in said


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
def test_every_way_to_run_out_is_known(error):
    assert "smaller" in told(error)


def test_what_was_caused_by_a_want_of_memory_is_known_by_its_cause():
    outer = ValueError("a file: it cannot be read")
    outer.__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")
    assert memory_limits.is_out_of_memory(outer)


def test_other_errors_pass_as_they_are():
    @memory_limits.report_oom
    def main(resolved):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(None)


def test_sampling_has_the_message_too(monkeypatch, capsys):
    import sample

    def fails(*words, **options):
        raise MemoryError

    monkeypatch.setattr(sample_module, "load_model", fails)
    assert command(sample.main, sample.SampleSettings, ["--init_from=gpt2"]) == 2
    assert capsys.readouterr().err.startswith("error: out of memory: ")


def test_a_container_s_limit_is_found_in_its_control_groups(monkeypatch, tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, most, now in ((inner, "max", 5), (tmp_path / "a", str(3 << 20), 2 << 20)):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{now}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {1 << 19}\n")
    monkeypatch.setattr(memory_limits, "CGROUP", tmp_path)
    assert list(memory_limits.cgroup_limits("0::/a/b\n")) == [(1 << 20) + (1 << 19)]
    assert list(memory_limits.cgroup_limits("4:cpu:/a\n")) == []
