"""Stop a run with each signal, by closing its terminal, and by closing its output.

The run must save a checkpoint, return the right exit status and leave no process running; the resumed run
must end with the weights of a run that was not stopped.

    python tests/faults/signals.py

Prints a line per case; the exit status is 1 if one failed.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import (
    checkpoint,
    descendants,
    kill_all,
    last_step,
    losses,
    run_train,
    start_train,
    tensor_checksums,
    train_flags,
    wait_for,
    write_tiny_corpus,
)

# changes to harness.RUN
CHANGES = {"max_iters": 60, "dropout": 0.1, "eval_interval": 20, "n_embd": 128}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_tiny_corpus(folder)
        expected = {}
        for ranks in (1, 2):
            reference = folder / f"uninterrupted-{ranks}"
            run_train(train_flags(data, reference, **CHANGES), ranks)
            expected[ranks] = (tensor_checksums(reference), losses(reference))
        failed = 0
        for number, (label, ranks, status, send) in enumerate(CASES):
            out = folder / f"run {number}"
            problems = run_case(train_flags(data, out, **CHANGES), out, ranks, status, send, expected[ranks])
            failed += bool(problems)
            print(f"{label}: {'; '.join(problems) or 'ok'}", flush=True)
    print(f"signals: {len(CASES) - failed} of {len(CASES)} cases ok")
    return 1 if failed else 0


Send = Callable[[subprocess.Popen], None]


def run_case(
    flags: list[str], out: Path, ranks: int, status: int | None, send: Send, expected: tuple
) -> list[str]:
    """Start a run, stop it with `send` after 25 steps, check its processes and checkpoint, and resume it.

    `status`: the expected exit status; None: any. Returns the problems.
    """
    terminal = None
    if send is close_terminal:
        terminal, terminal_child = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal_child)
        process = start_train(flags, ranks, **streams, preexec_fn=set_controlling_terminal)
        os.close(terminal_child)
        process.terminal = terminal  # type: ignore[attr-defined]
    else:
        process = start_train(flags, ranks)
    assert wait_for(lambda: last_step(out) >= 25, process), process.communicate()
    pids = descendants(process.pid)
    send(process)
    try:
        output = process.communicate(timeout=60)[0] or ""
    except subprocess.TimeoutExpired:
        kill_all(process)
        return ["it did not exit within a minute"]
    problems = []
    if status is not None and process.returncode != status:
        problems.append(f"exit status {process.returncode}, not {status}")
    if "Traceback" in output and ranks == 1:
        problems.append(f"a traceback: {output[-300:]}")
    time.sleep(0.5)
    if alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        problems.append(f"processes left: {alive}")
    last = checkpoint.newest_checkpoint(out, warn=problems.append)
    if status != 130 and int(last.name[5:]) < 25:
        problems.append(f"the last checkpoint is {last.name}")
    run_train(["--init_from=resume", f"--out_dir={out}"], ranks)
    if (tensor_checksums(out), losses(out)) != expected:
        problems.append("the resumed run ended with other weights or losses")
    return problems


def set_controlling_terminal() -> None:
    """In the new process: make standard input the controlling terminal, so that closing it sends SIGHUP."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def close_terminal(process: subprocess.Popen) -> None:
    os.close(process.terminal)  # type: ignore[attr-defined]


def close_output(process: subprocess.Popen) -> None:
    process.stdout.close()
    process.stdout = open(os.devnull)  # noqa: PTH123, SIM115


def once(number: int) -> Send:
    return lambda process: process.send_signal(number)


def twice(number: int, pause: float) -> Send:
    def send(process: subprocess.Popen) -> None:
        process.send_signal(number)
        time.sleep(pause)
        process.send_signal(number)

    return send


def to_process_group(number: int) -> Send:
    """Like Ctrl-C in a terminal: torchrun and all ranks receive the signal."""
    return lambda process: os.killpg(process.pid, number)


CASES = [
    ("SIGTERM", 1, 143, once(signal.SIGTERM)),
    ("SIGTERM twice", 1, 143, twice(signal.SIGTERM, 0.001)),
    ("SIGINT (Ctrl-C)", 1, 130, once(signal.SIGINT)),
    ("SIGINT twice: exits at once", 1, 130, twice(signal.SIGINT, 0.0005)),
    ("SIGHUP", 1, 129, once(signal.SIGHUP)),
    ("a closed terminal", 1, 129, close_terminal),
    ("closed output (| head)", 1, 141, close_output),
    ("SIGTERM to torchrun with 2 ranks", 2, None, once(signal.SIGTERM)),
    ("Ctrl-C in the terminal of torchrun with 2 ranks", 2, None, to_process_group(signal.SIGINT)),
    ("SIGHUP to torchrun with 2 ranks", 2, None, once(signal.SIGHUP)),
]


if __name__ == "__main__":
    sys.exit(main())
