"""Stop a run by every signal, by closing its terminal and by closing its output: a checkpoint, the right exit
status, nothing left behind, and the run goes on to the weights of one that was never stopped.

    python tests/faults/signals.py

Prints a line for each case, and ends with 1 where one failed.
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

from harness import checkpoint, children, losses, prepare, run, start, step, stop, sums, wait_for, words

STEPS = {"max_iters": 60, "dropout": 0.1, "eval_interval": 20, "n_embd": 128}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare(folder)
        truth = {}
        for ranks in (1, 2):
            whole = folder / f"whole-{ranks}"
            run(words(data, whole, **STEPS), ranks)
            truth[ranks] = (sums(whole), losses(whole))
        failed = 0
        for number, (label, ranks, status, end) in enumerate(CASES):
            out = folder / f"run {number}"
            problems = case(words(data, out, **STEPS), out, ranks, status, end, truth[ranks])
            failed += bool(problems)
            print(f"{label}: {'; '.join(problems) or 'as it should be'}", flush=True)
    print(f"signals: {len(CASES) - failed} of {len(CASES)} cases as they should be")
    return 1 if failed else 0


End = Callable[[subprocess.Popen], None]


def case(flags: list[str], out: Path, ranks: int, status: int | None, end: End, truth: tuple) -> list[str]:
    """Start, stop by `end` after some steps, look at what is left, go on. What was not as it should be."""
    terminal = None
    if end is close_terminal:
        terminal, other = pty.openpty()
        options = {"stdin": other, "stdout": other, "stderr": other, "preexec_fn": own_terminal}
        process = start(flags, ranks, **options)
        os.close(other)
        process.terminal = terminal  # type: ignore[attr-defined]
    else:
        process = start(flags, ranks)
    assert wait_for(lambda: step(out) >= 25, process), process.communicate()
    below = children(process.pid)
    end(process)
    try:
        said = process.communicate(timeout=60)[0] or ""
    except subprocess.TimeoutExpired:
        stop(process)
        return ["it did not end within a minute"]
    problems = []
    if status is not None and process.returncode != status:
        problems.append(f"exit status {process.returncode}, not {status}")
    if "Traceback" in said and ranks == 1:
        problems.append(f"a traceback: {said[-300:]}")
    time.sleep(0.5)
    if alive := [pid for pid in below if Path(f"/proc/{pid}").exists()]:
        problems.append(f"processes left: {alive}")
    last = checkpoint.newest(out, warn=problems.append)
    if status != 130 and int(last.name[5:]) < 25:
        problems.append(f"the last checkpoint is {last.name}")
    run(["--init_from=resume", f"--out_dir={out}"], ranks)
    if (sums(out), losses(out)) != truth:
        problems.append("the resumed run came to other weights or losses")
    return problems


def own_terminal() -> None:
    """In the new process: its input becomes its controlling terminal, whose end it is told."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def close_terminal(process: subprocess.Popen) -> None:
    os.close(process.terminal)  # type: ignore[attr-defined]


def close_output(process: subprocess.Popen) -> None:
    process.stdout.close()
    process.stdout = open(os.devnull)  # noqa: PTH123, SIM115


def once(number: int) -> End:
    return lambda process: process.send_signal(number)


def twice(number: int, pause: float) -> End:
    def end(process: subprocess.Popen) -> None:
        process.send_signal(number)
        time.sleep(pause)
        process.send_signal(number)

    return end


def whole_group(number: int) -> End:
    """As Ctrl-C in a terminal does it: torchrun and all ranks hear it."""
    return lambda process: os.killpg(process.pid, number)


CASES = [
    ("SIGTERM", 1, 143, once(signal.SIGTERM)),
    ("SIGTERM twice", 1, 143, twice(signal.SIGTERM, 0.001)),
    ("SIGINT (Ctrl-C)", 1, 130, once(signal.SIGINT)),
    ("SIGINT twice at once: ends with the last checkpoint", 1, 130, twice(signal.SIGINT, 0.0005)),
    ("SIGHUP", 1, 129, once(signal.SIGHUP)),
    ("a closed terminal", 1, 129, close_terminal),
    ("closed output (| head)", 1, 141, close_output),
    ("SIGTERM to torchrun with 2 ranks", 2, None, once(signal.SIGTERM)),
    ("Ctrl-C in the terminal of torchrun with 2 ranks", 2, None, whole_group(signal.SIGINT)),
    ("SIGHUP to torchrun with 2 ranks", 2, None, once(signal.SIGHUP)),
]


if __name__ == "__main__":
    sys.exit(main())
