"""The process in which bench.gpu_check runs its rows, so that a crash ends one row and not the whole check.

After some CUDA errors (an illegal memory access, a failed assertion in a kernel) every later CUDA call of the
process fails. The process then ends, and `Worker` starts another one for the next row. A row that takes too
long is killed with all the processes that it has started.

The parent writes the name of a row on a line; the reply is a line of JSON. This module does not import torch.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0  # at most, from the start of a process until it has imported torch
MAX_ERROR, MAX_TRACEBACK = 300, 3000  # characters of a line of an error, and of a traceback, in a result
READY = {"ready": True}
REPLACED = {"process": "replaced"}  # in the result of a row after which the process cannot be used
Result = dict[str, Any]


def serve(rows: Mapping[str, Callable[[], Result]], is_usable: Callable[[], bool] = lambda: True) -> None:
    """The process: run the rows whose names arrive on standard input, until there are no more.

    is_usable: called after a row has failed; if it returns False or raises RuntimeError, the process ends.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the rows print goes to stderr

    def reply(content: Result) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    reply(READY)
    for line in sys.stdin:
        start = time.perf_counter()
        outcome = run_row(rows[line.strip()])
        outcome["seconds"] = round(time.perf_counter() - start, 2)
        if outcome["status"] == "ok":
            reply(outcome)
            continue
        usable = False
        with contextlib.suppress(RuntimeError):  # a CUDA error
            usable = is_usable()
        reply(outcome if usable else outcome | REPLACED)
        if not usable:
            sys.stderr.flush()
            os._exit(1)  # a normal exit would call CUDA again


def run_row(function: Callable[[], Result]) -> Result:
    """The outcome of a row: status "ok" and its result, or "failed", its error and its traceback.

    The error is the last part of the traceback; of several lines, the first and the last.
    """
    try:
        return {"status": "ok", "result": function()}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
        ends = [line[:MAX_ERROR] for line in dict.fromkeys((lines[0], lines[-1]))]
        details = traceback.format_exc()[-MAX_TRACEBACK:]
        return {"status": "failed", "error": " … ".join(ends), "traceback": details}


class Worker:
    """Runs rows in a process, and starts another process after one that has ended."""

    def __init__(self, command: Sequence[str]) -> None:
        """command: starts a process that calls `serve`."""
        self.command = command
        self.process: subprocess.Popen | None = None
        self.output: queue.Queue[str | None] = queue.Queue()  # the lines of its replies; None at the end
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self.errors.close()

    def run(self, name: str, limit: float) -> Result:
        """The outcome of a row that may take `limit` seconds; see `run_row`."""
        if self.process is None or self.process.poll() is not None:
            self.stop()
            if problem := self.start():
                return {"status": "failed", "error": problem}
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        result = self.receive(limit)
        if result.items() >= REPLACED.items():
            self.stop()
        return result

    def start(self) -> str | None:
        """Start a process. Returns the problem if it does not become ready."""
        self.output = queue.Queue()
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            start_new_session=True,  # a group of its own, which `stop` can kill
        )
        threading.Thread(target=self._read, args=(self.process, self.output), daemon=True).start()
        reply = self.receive(START_SECONDS)
        return None if reply == READY else reply["error"]

    @staticmethod
    def _read(process: subprocess.Popen, output: "queue.Queue[str | None]") -> None:
        """Put the lines that a process writes into `output`, and None at their end."""
        for line in process.stdout:
            output.put(line)
        output.put(None)

    def receive(self, limit: float) -> Result:
        """The next reply; a failure if it does not come within `limit` seconds, or if the process ends."""
        try:
            line = self.output.get(timeout=limit)
        except queue.Empty:
            self.stop()
            return {"status": "failed", "error": f"not finished after {limit:.0f} s"}
        if line is not None:
            return json.loads(line)
        process, self.process = self.process, None
        status = process.wait()
        process.stdin.close()
        process.stdout.close()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return {"status": "failed", "error": f"the process ended with {how}: {self.last_error_line()}"}

    def last_error_line(self) -> str:
        """The last line that the processes have written to stderr."""
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or ["no message"]
        self.errors.seek(0, os.SEEK_END)  # the position is shared with the next process
        return lines[-1][:MAX_ERROR]

    def stop(self) -> None:
        """End the process and those that it has started."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
