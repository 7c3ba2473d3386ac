"""Helpers for the tests: a tiny character corpus, runs in this process and in others, comparisons."""

import ast
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_server import TIMEOUT, ForkedProcesses, run_in_forks, start_in_forks

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from configurator import command  # noqa: E402
from fradique.checkpointing import checkpoint, metrics_file  # noqa: E402
from fradique.training import setup  # noqa: E402
from train import TrainSettings  # noqa: E402

IN_GRAPH = "aot_eager_decomp_partition"  # what inductor does to a graph, without its C++
needs_compiler = pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU"
)
COMPILING = [  # for tests that compile: torch's compiler warns of what it does itself
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]
WORDS = ("amor", "casa", "dia", "era", "figura", "gato", "hora", "ilha", "jardim", "lua", "mar", "poética")


def make_text(n_words: int, seed: int = 0) -> str:
    """Portuguese-looking text of words in random order, the same for the same seed."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", ", ", ".\n"]) for _ in range(n_words))


def write_corpus(folder: Path, text: str, val_fraction: float = 0.1) -> Path:
    """Write a character corpus as prepare.py would, without any code of the project."""
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


def run_training(settings: TrainSettings) -> tuple[int, train.Trainer]:
    """Set up and train in this process: the exit status, and the run with its final weights."""
    t = setup.setup_training(settings)
    try:
        return train.train(t), t
    finally:
        t.close()


def losses(folder: str | Path) -> dict[int, float]:
    """Step -> training loss, from metrics.jsonl."""
    return {r["step"]: r["loss"] for r in metrics_file.read_metrics(Path(folder)) if "loss" in r}


def flags(settings: TrainSettings) -> list[str]:
    """The settings as flags: what a test of the command line passes on."""
    default = TrainSettings()
    return [f"--{name}={value}" for name, value in vars(settings).items() if value != getattr(default, name)]


def run_script(name: str, *arguments: object, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    """A script of the repository, or a module (lab.curves), in a process of its own: status and output.

    The process is a fork of one that has imported torch, if there are no other `options` of subprocess.run.
    """
    if options.keys() <= {"input", "env"}:
        environment = options.get("env", os.environ)
        stdin = options.get("input", "")
        return run_in_forks(name, [*map(str, arguments)], [environment], cwd, stdin)[0]
    program = [str(ROOT / name)] if name.endswith(".py") else ["-m", name]
    command = [sys.executable, "-W", "error", *program, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": TIMEOUT, "cwd": cwd} | options
    return subprocess.run(command, check=False, **options)


def run_code(code: str, *arguments: object, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    """Python code in a process of its own, which has already imported torch (see `run_script`)."""
    return run_in_forks("-c", [code, *map(str, arguments)], [options.get("env", os.environ)], cwd)[0]


def start_script(name: str, *arguments: object) -> ForkedProcesses:
    """Start a script as `run_script` does: a context manager with its `pids`, and `lines` of its output."""
    return start_in_forks(name, [*map(str, arguments)], [os.environ], read_lines=True)


def run_forked(command: list[str], **_) -> subprocess.CompletedProcess:
    """subprocess.run for a command that starts train.py: for modules whose runs need no new process."""
    assert command[:2] == [sys.executable, str(ROOT / "train.py")]
    return run_script("train.py", *command[2:])


def run_lab(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """A module of lab/ as its command runs, but in this process: a new one imports torch for seconds."""
    module = importlib.import_module(name)
    (settings,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == name and hasattr(value, "debug")
    )
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command(module.main, settings, [str(argument) for argument in arguments])
    return subprocess.CompletedProcess([name, *arguments], status, out.getvalue(), err.getvalue())


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_with_gradients(actual, expected, inputs, tolerance):
    """Compare outputs, and the gradients of `inputs` for a random gradient of the output."""
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)
    grad = normal(*actual.shape, seed=9)
    gradients = torch.autograd.grad(actual, inputs, grad.to(actual.dtype), retain_graph=True)
    expected_gradients = torch.autograd.grad(expected, inputs, grad.double(), retain_graph=True)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=3 * tolerance)


def run_ranks(
    processes: int, *arguments: object, program: Path = ROOT / "train.py"
) -> subprocess.CompletedProcess:
    """train.py, or another program, as torchrun starts it on one machine: status and output of all ranks."""
    environments = rank_environments(processes)
    ranks = run_in_forks(str(program), [*map(str, arguments)], environments)
    status = next((rank.returncode for rank in ranks if rank.returncode), 0)
    output, errors = ("".join(getattr(rank, stream) for rank in ranks) for stream in ("stdout", "stderr"))
    return subprocess.CompletedProcess([program, *arguments], status, output, errors)


def rank_environments(processes: int) -> list[dict[str, str]]:
    """The environment variables of each rank, as torchrun sets them on one machine."""
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port())}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
    return [os.environ | world | rank for rank in ranks]


def unused_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def same_folder(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bits in weights and optimizer."""
    first, second = checkpoint.read_checkpoint(a), checkpoint.read_checkpoint(b)
    return all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        for x, y in ((first.model, second.model), (first.optimizer, second.optimizer))
    )


def before_steps(monkeypatch, action) -> None:
    """Call `action(t)` before each training step."""
    real_train_step = train.train_step

    def train_step(t, lr):
        action(t)
        return real_train_step(t, lr)

    monkeypatch.setattr(train, "train_step", train_step)


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal before a training step."""
    before_steps(monkeypatch, lambda t: signal.raise_signal(number) if t.state.step == step else None)


def imported_names(path: Path, modules: Collection[str] = ()) -> set[str]:
    """The dotted names that a file imports, inside functions too; except for type annotations.

    `modules`: the project's modules; of "from package import module" the module is named.
    """
    names, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in members if name in modules}
            names |= submodules | ({node.module} if members - submodules else set())
        nodes += ast.iter_child_nodes(node)
    return names
