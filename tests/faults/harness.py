"""What the scripts of this folder share: a small run, ways to start it, to watch it, to compare its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import make_text, write_corpus  # noqa: E402

from fradique.checkpointing import checkpoint, metrics_file  # noqa: E402

# A run of some seconds: two layers, an evaluation and a checkpoint every five steps.
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


def prepare(folder: Path) -> Path:
    """A corpus for RUN; the --data_dir."""
    write_corpus(folder / "data" / "tiny", make_text(3000))
    return folder / "data"


def words(data: Path, out: Path, **changes: object) -> list[str]:
    """RUN with changes, as flags."""
    return [f"--data_dir={data}", f"--out_dir={out}", *(f"--{k}={v}" for k, v in (RUN | changes).items())]


def start(flags: Sequence[str], ranks: int = 1, restarts: int = 0, **options: object) -> subprocess.Popen:
    """train.py, by torchrun where there are several ranks: a process group of its own."""
    program = [sys.executable]
    if ranks > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        program += [f"--max-restarts={restarts}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    settings: dict[str, object] = {"env": environment, "cwd": ROOT, "text": True, "start_new_session": True}
    settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    return subprocess.Popen([*program, str(ROOT / "train.py"), *flags], **settings)  # type: ignore[call-overload]


def fork(flags: Sequence[str], said: Path, before: Callable[[], None] = lambda: None) -> int:
    """train.py in a copy of this process, which need not import torch again: its pid. What it says goes to
    the end of the file `said`. `before` runs in it first."""
    import train  # once, before the first fork
    from fradique.training import setup

    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        number = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(number, stream)
        before()
        status = train.command(train.main, train.TrainSettings, flags, base=setup.saved_run_settings)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a forked process: its exit status; -n where signal n ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(flags: Sequence[str], ranks: int = 1, **options: object) -> str:
    """`start`, to its end. Raises AssertionError with what it said where that is not well."""
    process = start(flags, ranks, **options)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out or ""


def step(out: Path) -> int:
    """The last step that a run has logged; -1 before the first."""
    try:
        return max((r["step"] for r in metrics_file.read_metrics(out)), default=-1)
    except (OSError, ValueError):
        return -1


def wait_for(what: Callable[[], bool], process: subprocess.Popen, seconds: float = 300) -> bool:
    """Until `what` holds; False where the process ends first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    stop(process)
    raise AssertionError("it takes too long")


def children(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended
            continue
        if parent == pid:
            child = int(path.parent.name)
            found += [child, *children(child)]
    return found


def ranks_of(pid: int) -> dict[int, int]:
    """Rank -> process of what torchrun has started."""
    found = {}
    for child in children(pid):
        try:
            raw = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        environment = dict(entry.split(b"=", 1) for entry in raw if b"=" in entry)
        if b"RANK" in environment:
            found.setdefault(int(environment[b"RANK"]), child)
    return found


def stop(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started."""
    for pid in [*children(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def losses(out: Path) -> dict[int, float]:
    """Step -> training loss."""
    return {r["step"]: r["loss"] for r in metrics_file.read_metrics(out) if "loss" in r}


def sums(out: Path) -> dict[str, str]:
    """The files of the last checkpoint that hold numbers, with their sums."""
    folder = checkpoint.newest_checkpoint(out, warn=print)
    manifest = json.loads((folder / "manifest.json").read_text())["sha256"]
    return {"step": folder.name} | {k: v for k, v in manifest.items() if k.endswith("safetensors")}
