"""What the tests share: a tiny corpus written by hand, and settings of a model that trains in a moment."""

import contextlib
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402  (needs the path above)
from configurator import command  # noqa: E402
from fradique import metrics  # noqa: E402
from train import TrainSettings  # noqa: E402

IN_GRAPH = "aot_eager_decomp_partition"  # what inductor does to a graph, without its C++
COMPILING = [  # for tests that compile: torch's compiler warns of what it does itself
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]
WORDS = ("amor", "casa", "dia", "era", "figura", "gato", "hora", "ilha", "jardim", "lua", "mar", "poética")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny matrices are no faster on two threads, and one thread keeps sums in one order."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def signals_are_heard():
    """A suite that was started in the background ignores Ctrl-C and the end of its terminal, and so would the
    processes that tests start, and stop by these signals."""
    for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        if signal.getsignal(number) is signal.SIG_IGN:
            heard = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, heard)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_text(n_words: int, seed: int = 0) -> str:
    """Portuguese-looking text of words in random order, the same for the same seed."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", ", ", ".\n"]) for _ in range(n_words))


def write_corpus(folder: Path, text: str, val_fraction: float = 0.1) -> Path:
    """A character corpus as `prepare.py` makes it, written with nothing of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    chars = sorted(set(text))
    ids = np.array([chars.index(c) for c in text], dtype="<u2")
    cut = int(len(text) * (1 - val_fraction))
    splits = {}
    for name, part, part_text in (("train", ids[:cut], text[:cut]), ("val", ids[cut:], text[cut:])):
        part.tofile(folder / f"{name}.bin")
        size = len(part_text.encode())
        shard = {"file": f"{name}.bin", "tokens": len(part), "bytes": size, "sha256": ""}
        splits[name] = {"tokens": len(part), "bytes": size, "shards": [shard]}
    meta = {"format": 1, "dtype": "uint16", "vocab_size": len(chars), "tokenizer": "char", "source": "a test"}
    (folder / "meta.json").write_text(json.dumps(meta | {"splits": splits}))
    tokenizer = {"format": 1, "kind": "char", "chars": "".join(chars)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


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


def run_training(settings: TrainSettings) -> tuple[int, train.Training]:
    """Set up and train in this process: the exit status, and the run with its final weights."""
    t = train.set_up(settings)
    try:
        return train.train(t), t
    finally:
        t.close()


def losses(folder: str | Path) -> dict[int, float]:
    """Step -> training loss, from metrics.jsonl."""
    return {r["step"]: r["loss"] for r in metrics.read(Path(folder)) if "loss" in r}


def flags(settings: TrainSettings) -> list[str]:
    """The settings as flags: what a test of the command line passes on."""
    default = TrainSettings()
    return [f"--{name}={value}" for name, value in vars(settings).items() if value != getattr(default, name)]


def run_script(name: str, *words: object, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    """A script of the repository, or a module (lab.curves), in a process of its own: status and output."""
    program = [str(ROOT / name)] if name.endswith(".py") else ["-m", name]
    command = [sys.executable, "-W", "error", *program, *map(str, words)]
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": cwd} | options
    return subprocess.run(command, check=False, **options)


def run_lab(name: str, *words: object) -> subprocess.CompletedProcess:
    """A module of lab/ as its command runs, but in this process: a new one imports torch for seconds."""
    module = importlib.import_module(name)
    (settings,) = (
        found
        for found in vars(module).values()
        if isinstance(found, type) and found.__module__ == name and hasattr(found, "debug")
    )
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command(module.main, settings, [str(word) for word in words])
    return subprocess.CompletedProcess([name, *words], status, out.getvalue(), err.getvalue())


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_with_gradients(found, expected, inputs, tolerance):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    grad = normal(*found.shape, seed=9)
    mine = torch.autograd.grad(found, inputs, grad.to(found.dtype), retain_graph=True)
    truth = torch.autograd.grad(expected, inputs, grad.double(), retain_graph=True)
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=3 * tolerance)


def torchrun(processes: int, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*command, str(ROOT / "train.py"), *words], capture_output=True, text=True, timeout=240, check=False
    )
