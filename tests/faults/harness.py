"""Shared by the scripts of this folder: start a small training run, watch it, and compare its results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import make_text, rank_environments, write_corpus  # noqa: E402

from fradique.checkpointing import checkpoint, metrics_file  # noqa: E402

TIMEOUT = 600  # seconds after which a run is taken to hang
# A run of a few seconds: two layers, an evaluation and a checkpoint every five steps.
RUN = {
    "dataset": "tiny",
    "eval_interval": 5,
    "eval_iters": 2,
    "batch_size": 4,
    "gradient_accumulation_steps": 4,
    "block_size": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "warmup_iters": 2,
    "sample_tokens": 20,
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}


def write_tiny_corpus(folder: Path) -> Path:
    """Write the corpus of RUN. Returns the --data_dir."""
    write_corpus(folder / "data" / "tiny", make_text(3000))
    return folder / "data"


def train_flags(data: Path, out: Path, **changes: object) -> list[str]:
    """The flags for RUN with changes."""
    return [f"--data_dir={data}", f"--out_dir={out}", *(f"--{k}={v}" for k, v in (RUN | changes).items())]


def start_train(
    flags: Sequence[str], ranks: int = 1, restarts: int = 0, script: str = "train.py", **options: object
) -> subprocess.Popen:
    """Start train.py, or another script, in a new process group, with torchrun if ranks > 1."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [f"--max-restarts={restarts}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments: dict[str, object] = {"env": environment, "cwd": ROOT, "text": True, "start_new_session": True}
    arguments |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    return subprocess.Popen([*command, str(ROOT / script), *flags], **arguments)  # type: ignore[call-overload]


def fork_train(flags: Sequence[str], output: Path, before: Callable[[], None] = lambda: None) -> int:
    """Run train.py in a fork of this process, which saves importing torch. Returns its process id.

    The child appends its output to the file `output`, and calls `before` first.
    """
    import train  # once, before the first fork
    from fradique.training import setup

    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        before()
        status = train.command(train.main, train.TrainSettings, flags, base=setup.saved_run_settings)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def exit_status(pid: int) -> int:
    """Wait for a forked process. Returns its exit status; -n if signal n killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork_ranks(flags: Sequence[str], ranks: int, output: Path) -> None:
    """Run train.py on several ranks, without torchrun, to the end. Raises AssertionError if it fails."""
    environments = rank_environments(ranks)
    pids = [fork_train(flags, output, partial(os.environ.update, rank)) for rank in environments]
    assert [exit_status(pid) for pid in pids] == [0] * ranks, output.read_text()


def run_train(flags: Sequence[str], ranks: int = 1, **options: object) -> str:
    """Run train.py to its end and return its output. Raises AssertionError if it fails."""
    process = start_train(flags, ranks, **options)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return output or ""


def last_step(out: Path) -> int:
    """The last step that a run has logged; -1 before the first."""
    try:
        return max((r["step"] for r in metrics_file.read_metrics(out)), default=-1)
    except (OSError, ValueError):
        return -1


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = TIMEOUT) -> bool:
    """Wait until `condition` holds. Returns False if the process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    kill_all(process)
    raise AssertionError(f"not within {seconds:g} s")


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, directly or indirectly."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # the process has exited
            continue
        if parent == pid:
            child = int(path.parent.name)
            pids += [child, *descendants(child)]
    return pids


def rank_pids(pid: int) -> dict[int, int]:
    """{rank: process id} of the processes that torchrun has started."""
    pids = {}
    for child in descendants(pid):
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        environment = dict(entry.split(b"=", 1) for entry in variables if b"=" in entry)
        if b"RANK" in environment:
            pids.setdefault(int(environment[b"RANK"]), child)
    return pids


def kill_all(process: subprocess.Popen) -> None:
    """Kill a process and all its descendants."""
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def losses(out: Path) -> dict[int, float]:
    """{step: training loss}."""
    return {r["step"]: r["loss"] for r in metrics_file.read_metrics(out) if "loss" in r}


def tensor_checksums(out: Path) -> dict[str, str]:
    """{file: sha256} of the tensor files in the last checkpoint, and its step."""
    folder = checkpoint.newest_checkpoint(out, warn=print)
    manifest = json.loads((folder / "manifest.json").read_text())["sha256"]
    return {"step": folder.name} | {k: v for k, v in manifest.items() if k.endswith("safetensors")}
