"""bench.gpu_check: its rows run on a CPU and find faults, and crashes and limits end only one row.

On a machine with CUDA, the correctness rows also run there.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT, run_script

from bench import gpu_cases, gpu_check, gpu_runs, gpu_table, machine, textbook
from bench import memory as bench_memory
from bench import quality as bench_quality
from bench.gpu_check import Row, run_rows
from bench.gpu_context import Context, compare
from bench.gpu_worker import Worker
from fradique.nn import functional
from model import plain_attention

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path):
    return Context(CPU, quick=True, text=None, nanogpt=None, scratch=tmp_path)


def run_main(capsys, *arguments):
    """The lines that the command prints, its JSON, and its exit status."""
    status = 0
    try:
        gpu_check.main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    *lines, summary = capsys.readouterr().out.splitlines()
    return lines, json.loads(summary), status


# The rows


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_all_correctness_rows_are_ok(capsys, tmp_path, device):
    arguments = ("--quick", f"--device={device}", "--only=correctness", f"--out={tmp_path / 'out.json'}")
    lines, summary, status = run_main(capsys, *arguments)
    assert {row["name"]: row.get("error") for row in summary["rows"]} == dict.fromkeys(
        [*gpu_cases.CASES, *gpu_runs.RUNS]
    )
    assert status == 0 and summary["counts"] == {"ok": len(summary["rows"]), "failed": 0, "not run": 0}
    assert summary["machine"]["torch"] == torch.__version__
    assert summary["machine"]["cuda"] == torch.version.cuda
    assert any(line.startswith("ok      attention ") for line in lines)
    assert json.loads((tmp_path / "out.json").read_text()) == summary


class InProcess:
    """textbook.BaselineProcess without a process."""

    def __init__(self, settings, nanogpt=None):
        self.trainer = textbook.BaselineTrainer(settings, nanogpt)

    def __enter__(self):
        return self.trainer

    def __exit__(self, *error):
        pass


def run_forked(command, **options):
    """subprocess.run for a command of this Python."""
    assert command[0] == sys.executable
    name, *arguments = command[2:] if command[1] == "-m" else command[1:]
    return run_script(Path(name).name if name.endswith(".py") else name, *arguments)


@pytest.mark.parametrize("name", gpu_table.TABLE)
def test_a_speed_row_gives_its_figures(name, context, monkeypatch):
    for module in (bench_quality, bench_memory):
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run_forked))
    monkeypatch.setattr(textbook, "BaselineProcess", InProcess)
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)
    function, limit = gpu_table.TABLE[name]
    result = function(context)
    text = gpu_table.describe(result)
    assert limit > 0 and json.loads(json.dumps(result)) == result
    expected = {"matmul": "FLOP/s", "train": "of the matmul peak", "loss": "1.45 not reached"}
    expected |= {"decode": "batch 16: ", "memory": "MiB, ratio "}
    assert expected[name.split()[0]] in text
    if name.startswith("loss"):
        assert result["steps"] == 40 and result["loss"] < 2.6  # 2.65 before the first step
    if name.endswith("compiled"):
        assert "times as fast as the textbook model" in text and result["times_as_fast"] > 0


def test_the_losses_of_both_optimizers_are_compared():
    rows = [
        {"name": f"loss with {name}", "status": "ok", "result": {"tokens": 100, "loss": loss}}
        for name, loss in (("AdamW", 1.5), ("Muon", 1.25))
    ]
    assert gpu_check.beside_adamw(rows) == {"tokens": 100, "adamw": 1.5, "muon": 1.25}
    assert gpu_check.beside_adamw(rows[:1]) is None
    rows[1]["result"]["tokens"] = 99
    assert gpu_check.beside_adamw(rows) is None


def test_a_text_and_a_prepared_corpus_replace_the_library(context, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 200)
    with_text = Context(CPU, False, text, None, tmp_path)
    data_dir, dataset = gpu_table.training_corpus(with_text)
    assert json.loads((data_dir / dataset / "meta.json").read_text())["source"] == "text.txt"
    assert gpu_check.describe_text(with_text) == str(text)
    prepared = tmp_path / "prepared" / "shakespeare_char" / "meta.json"
    monkeypatch.setattr("bench.gpu_context.SHAKESPEARE", prepared)
    without = Context(CPU, False, None, None, tmp_path)
    assert "Python's standard library" in gpu_check.describe_text(without)
    prepared.parent.mkdir(parents=True)
    prepared.write_text("{}")
    assert gpu_table.training_corpus(without) == (tmp_path / "prepared", "shakespeare_char")
    assert gpu_check.describe_text(without) == "data/shakespeare_char"


# Faults are found


def wrong_dropout(x, p, training):
    return functional._Dropout.apply(x, p / 2)


@pytest.mark.parametrize(
    ("row", "module", "name", "wrong", "message"),
    [
        ("attention", gpu_cases, "attention", lambda *inputs: 1.01 * plain_attention(*inputs), "attention"),
        ("cross-entropy", gpu_cases, "linear_cross_entropy", lambda x, w, t, c: x.sum() + w.sum(), "V=65"),
        ("functional", functional, "rms_norm", lambda x, w, eps: 1.01 * x * w, "rms_norm in float32"),
        ("functional", functional, "dropout", wrong_dropout, "instead of 0.25"),
        ("AdamW", gpu_cases.optimizer, "clip_gradients", lambda model, norm: None, "AdamW"),
        ("CUDA graph", gpu_runs, "record_operations", None, "logits in float32"),
    ],
)
def test_a_wrong_result_fails_its_row(row, module, name, wrong, message, context, monkeypatch):
    if wrong is None:  # the replay does nothing

        def wrong(step, device):
            return lambda: None, step().clone()

    monkeypatch.setattr(module, name, wrong)
    function, _ = (gpu_cases.CASES | gpu_runs.RUNS)[row]
    with pytest.raises(AssertionError, match=message):
        function(context)


def test_a_run_that_does_not_resume_exactly_fails_its_row(context, monkeypatch):
    checksums = iter(["a", "a", "b"])
    monkeypatch.setattr(gpu_runs, "run", lambda settings: None)
    monkeypatch.setattr(gpu_runs, "checksums", lambda settings: next(checksums))
    with pytest.raises(AssertionError, match="the resumed run differs"):
        gpu_runs.resume_row(context)


@pytest.mark.parametrize(
    ("second", "outcome"), [("aaa", "repeats the run"), ("aab", "not repeat"), ("abb", "not repeat")]
)
def test_kernels_that_are_not_deterministic_fail_the_row(context, monkeypatch, second, outcome):
    checksums = iter("aba" + second)
    monkeypatch.setattr(gpu_runs, "run", lambda settings: None)
    monkeypatch.setattr(gpu_runs, "checksums", lambda settings: next(checksums))
    with pytest.raises(AssertionError, match=f"not deterministic; .*{outcome}"):
        gpu_runs.resume_row(context)
    assert not torch.are_deterministic_algorithms_enabled()


def test_compare_refuses_nan_and_other_shapes():
    ones = torch.ones(3)
    assert compare("x", ones + 1e-3, ones, 1e-2) == pytest.approx(1e-3, rel=1e-3)
    for wrong in (ones * float("nan"), ones * float("inf"), ones + 0.02, torch.ones(2)):
        with pytest.raises(AssertionError, match="x: "):
            compare("x", wrong, ones, 1e-2)


# The process and the limits

# A process that does not import torch: it starts in a few milliseconds.
STUB = """
import os, sys, time
from bench.gpu_worker import serve

def fail():
    raise ValueError("an injected failure\\nmore")

def crash():
    print("CUDA error: an illegal memory access was encountered", file=sys.stderr)
    os._exit(7)

def hang():
    while True:
        time.sleep(1)

def broken_context():
    return {usable}

serve(
    dict.fromkeys(["machine", "a", "attention", "Muon"], lambda: dict(pid=os.getpid()))
    | {{"AdamW": fail, "fail": fail, "crash": crash, "abort": os.abort, "hang": hang,
       "print": lambda: print("{{}}") or dict(printed=1)}},
    broken_context,
)
"""


def stub(usable="True"):
    return [sys.executable, "-c", STUB.format(usable=usable)]


def test_a_failure_sets_the_exit_status_and_ends_one_row(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "worker_command", lambda context: stub())
    lines, summary, status = run_main(capsys, "--device=cpu", "--only=attention,AdamW,Muon")
    assert status == 1 and summary["counts"] == {"ok": 2, "failed": 1, "not run": 0}
    assert [row["status"] for row in summary["rows"]] == ["ok", "failed", "ok"]
    failed = summary["rows"][1]
    assert failed["error"] == "ValueError: an injected failure … more" and "in fail" in failed["traceback"]
    assert any(line.startswith("failed  AdamW ") and "an injected failure" in line for line in lines)
    assert summary["rows"][0]["result"] == summary["rows"][2]["result"]  # one process


def test_a_crash_ends_only_its_row():
    with Worker(stub()) as worker:
        first = worker.run("a", 60)["result"]["pid"]
        error = worker.run("crash", 60)["error"]
        assert error == (
            "the process ended with status 7: CUDA error: an illegal memory access was encountered"
        )
        second = worker.run("a", 60)["result"]["pid"]
        assert "signal SIGABRT" in worker.run("abort", 60)["error"]
        assert len({first, second, worker.run("a", 60)["result"]["pid"]}) == 3


@pytest.mark.parametrize("usable", ["False", "exec('raise RuntimeError(1)')"])
def test_a_broken_cuda_context_gets_a_new_process(usable):
    with Worker(stub(usable)) as worker:
        first = worker.run("a", 60)["result"]["pid"]
        failed = worker.run("fail", 60)
        assert failed["error"] == "ValueError: an injected failure … more"
        assert failed["process"] == "replaced"
        assert worker.run("a", 60)["result"]["pid"] != first


def test_a_row_that_hangs_is_killed():
    with Worker(stub()) as worker:
        pid = worker.run("a", 60)["result"]["pid"]
        assert worker.run("hang", 0.01) == {"status": "failed", "error": "not finished after 0 s"}
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert worker.run("a", 60)["status"] == "ok"


def test_what_a_row_prints_is_no_reply():
    with Worker(stub()) as worker:
        assert worker.run("print", 60)["result"] == {"printed": 1}


def test_a_process_that_cannot_start_fails_every_row():
    with Worker([sys.executable, "-c", "raise SystemExit('no torch')"]) as worker:
        for _ in range(2):
            assert worker.run("a", 60)["error"] == "the process ended with status 1: no torch"


class SlowRunner:
    """Rows that take as long as their name says, by a clock of their own."""

    def __init__(self):
        self.seconds, self.limits = 0.0, []

    def run(self, name, limit):
        self.limits.append(limit)
        self.seconds += min(float(name), limit)
        return {"status": "ok", "seconds": 0.0, "result": {}}


def test_rows_without_time_are_not_run():
    runner, lines = SlowRunner(), []
    rows = [
        Row("50", "speed", 100.0),
        Row("30", "speed", 40.0),
        Row("1", "speed", 400.0),
        Row("5", "speed", 10),
    ]
    results = run_rows(rows, runner, 95.0, clock=lambda: runner.seconds, report=lines.append)
    assert [row["status"] for row in results] == ["ok", "ok", "not run", "ok"]
    assert runner.limits == [95.0, 40.0, 10.0]  # the first row would have 100 s, if they were left
    assert results[2] == {"name": "1", "group": "speed", "status": "not run", "error": "no time left"}
    assert len(lines) == 4 and "no time left" in lines[2]


def test_no_budget_runs_no_row(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "worker_command", lambda context: stub())
    _, summary, status = run_main(capsys, "--device=cpu", "--budget=0")
    assert status == 0 and summary["counts"]["not run"] == len(gpu_check.ROWS)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--only=attention,nothing", "there is no row 'nothing'"),
        ("--text=missing.txt", "missing.txt is not a file"),
        ("--nanogpt=missing", "model.py is not a file"),
        ("--device=xpu", "device=xpu"),
    ],
)
def test_a_mistake_in_a_flag_ends_with_status_2(capsys, flag, message):
    with pytest.raises(SystemExit) as exit:
        gpu_check.main(["--device=cpu", flag])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_the_makefile_runs_the_check():
    makefile = (ROOT / "Makefile").read_text()
    assert "\ngpu-check:\n" in makefile and "-m bench.gpu_check $(ARGS)" in makefile
