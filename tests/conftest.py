"""Fixtures for all tests: one thread, default signal handlers, a tiny corpus, settings of a small model."""

import gc
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import architecture  # noqa: F401
from support import make_text, write_corpus

from fradique.training import outputs
from train import TrainSettings


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are processors: many tests wait for other processes."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_collection_finish():
    """Keep the garbage collector from visiting what has been imported: a collection would take 0.2 s."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """Let os.fsync only check its descriptor: runs would wait for the disk half of their time.

    No test cuts the power, and what a killed process has written is not lost. New processes still sync.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny matrices are no faster on two threads, and one thread keeps sums in one order."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def default_signal_handlers():
    """A suite that runs in the background ignores SIGINT and SIGHUP, and so would the processes that it
    starts, and that some tests stop by these signals."""
    for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        if signal.getsignal(number) is signal.SIG_IGN:
            handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def draw_loss_plots_only_if_marked(request, monkeypatch):
    """Drawing loss.png takes longer than the training steps of a test: only tests with the marker do it."""
    if "loss_plot" not in request.keywords:
        monkeypatch.setattr(outputs, "draw_loss_plot", lambda t: 0.0)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A data folder with the corpus `tiny`: 2,000 words."""
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "tiny", make_text(2000))
    return folder


@pytest.fixture
def settings(data_dir, tmp_path) -> TrainSettings:
    """A run of 20 steps of a model with 2 layers, in a folder of its own."""
    return replace(
        TrainSettings(),
        out_dir=str(tmp_path / "run"),
        data_dir=str(data_dir),
        dataset="tiny",
        max_iters=20,
        eval_interval=5,
        eval_iters=2,
        log_interval=1,
        batch_size=4,
        gradient_accumulation_steps=1,
        block_size=16,
        n_layer=2,
        n_head=2,
        n_embd=16,
        dropout=0.1,
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_iters=2,
        sample_tokens=5,
        device="cpu",
        compile=False,
    )
