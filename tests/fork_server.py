"""Run scripts of the repository in forks of a process that has already imported torch and the project.

A new process would import them for seconds. The server reads one request per line from its standard input, as
JSON, and answers each with one line: the process ids that it has started, or exit statuses.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
# Seconds after which SIGALRM ends a process that hangs. No machine is so slow that a test takes this long.
TIMEOUT = 900
# what the scripts import; torch imports torch._dynamo with the first step of an optimizer
PRELOADED = ("matplotlib.backends.backend_agg", "matplotlib.figure", "torch", "torch._dynamo")


@functools.cache
def start_server() -> subprocess.Popen:
    """The server of this process. It ends with it, when its standard input is closed."""
    command = [sys.executable, __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask_server(request: Mapping[str, Any]) -> list[int]:
    """Send a request to the server and return its answer."""
    server = start_server()
    try:
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())
    except BaseException:  # such as pytest-timeout's: the answer that comes later belongs to no request
        start_server.cache_clear()
        server.kill()
        server.communicate()
        raise


class ForkedProcesses:
    """Processes that run the same program, started by `start_in_forks`; a context manager that kills them."""

    def __init__(self, folder: Path, count: int) -> None:
        """folder: a new folder for the streams of `count` processes."""
        self.folders = [folder / str(index) for index in range(count)]
        self.pids, self.statuses = [], None
        self.lines = None  # of the standard output of the first process, if `start_in_forks` was asked to
        for path in self.folders:
            path.mkdir()

    def open_fifo(self) -> None:
        """Make the standard output of the first process a FIFO that `lines` reads."""
        fifo = self.folders[0] / "stdout"
        os.mkfifo(fifo)
        descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for the other end
        os.set_blocking(descriptor, True)
        self.lines = os.fdopen(descriptor, encoding="utf-8")

    def wait(self) -> list[int]:
        """Wait until all of them have ended. Returns their exit statuses; -n if signal n ended a process."""
        if self.statuses is None:
            self.statuses = ask_server({"wait": self.pids})
        return self.statuses

    def kill(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> "ForkedProcesses":
        return self

    def __exit__(self, *error: object) -> None:
        if self.statuses is None:
            self.kill()
            if not any(error):  # else the server may have been killed too
                self.wait()
        if self.lines:
            self.lines.close()
        shutil.rmtree(self.folders[0].parent)


class PlainProcesses(ForkedProcesses):
    """`ForkedProcesses` for a system without forks, Windows: new processes, which import torch anew."""

    def start(
        self, command: Sequence[str], environments: Sequence[Mapping[str, str]], cwd: str, read_lines: bool
    ) -> None:
        self.children: list[subprocess.Popen] = []
        for folder, environment in zip(self.folders, environments, strict=True):
            paths = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
            with contextlib.ExitStack() as stack:
                stdin = stack.enter_context((folder / "stdin").open("rb"))
                stdout, stderr = (
                    stack.enter_context((folder / name).open("wb")) for name in ("stdout", "stderr")
                )
                is_read = read_lines and not self.children
                child = subprocess.Popen(
                    command,
                    cwd=cwd,
                    env={**environment, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"},
                    stdin=stdin,
                    stdout=subprocess.PIPE if is_read else stdout,
                    stderr=stderr,
                    encoding="utf-8",
                )
            self.children.append(child)
        self.pids = [child.pid for child in self.children]
        self.lines = self.children[0].stdout  # None unless it is a pipe

    def wait(self) -> list[int]:
        self.statuses = [child.wait(TIMEOUT) for child in self.children]
        return self.statuses

    def kill(self) -> None:
        for child in self.children:
            child.kill()


def start_in_forks(
    program: str,
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    cwd: Path = ROOT,
    stdin: str = "",
    *,
    read_lines: bool = False,
) -> ForkedProcesses:
    """Start train.py, sample.py, another file, a module such as lab.curves, or code (`-c`, code).

    It runs in one process for each of `environments`, all at the same time. Warnings are errors. After
    TIMEOUT seconds SIGALRM ends the processes: their status is then -14.

    read_lines: the `lines` of the first process can be read while it runs.
    """
    can_fork = hasattr(os, "fork")
    kind = ForkedProcesses if can_fork else PlainProcesses
    processes = kind(Path(tempfile.mkdtemp()), len(environments))
    for folder in processes.folders:
        (folder / "stdin").write_text(stdin, encoding="utf-8")
    if not can_fork:
        is_module = program != "-c" and not program.endswith(".py")
        named = ["-m", program] if is_module else [program if program == "-c" else str(ROOT / program)]
        command = [sys.executable, "-W", "error", *named, *arguments]
        processes.start(command, environments, str(cwd), read_lines)
        return processes
    if read_lines:
        processes.open_fifo()
    request = {
        "program": program,
        "arguments": list(arguments),
        "environments": [dict(environment) for environment in environments],
        "folders": [str(path) for path in processes.folders],
        "cwd": str(cwd),
    }
    processes.pids = ask_server(request)
    return processes


def run_in_forks(
    program: str,
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    cwd: Path = ROOT,
    stdin: str = "",
) -> list[subprocess.CompletedProcess]:
    """`start_in_forks`, to the end: status and output of each process."""
    with start_in_forks(program, arguments, environments, cwd, stdin) as processes:
        statuses = processes.wait()
        return [
            subprocess.CompletedProcess(
                [program, *arguments],
                status,
                *((folder / stream).read_text(encoding="utf-8") for stream in ("stdout", "stderr")),
            )
            for status, folder in zip(statuses, processes.folders, strict=True)
        ]


def serve() -> None:
    """Answer each request until standard input is closed: start processes, or wait for them."""
    for module in (*PRELOADED, "sample", "train"):
        importlib.import_module(module)
    os.fsync = os.fstat  # see conftest.py
    gc.freeze()  # so that a collection in a fork does not visit, and copy, all that has been imported
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in request["wait"]]
        else:
            environments, folders = request.pop("environments"), request.pop("folders")
            answer = [
                fork_program(environment=environment, folder=Path(folder), **request)
                for environment, folder in zip(environments, folders, strict=True)
            ]
        print(json.dumps(answer), flush=True)


def fork_program(folder: Path, **options: Any) -> int:
    """`run_program` in a fork of this process. Returns its process id."""
    # before the fork: who reads a FIFO must not find it without a writer
    streams = [os.open(folder / name, os.O_RDWR | os.O_CREAT) for name in ("stdin", "stdout", "stderr")]
    child = os.fork()
    if child == 0:
        run_program(streams=streams, **options)
    for descriptor in streams:
        os.close(descriptor)
    return child


def run_program(
    program: str, arguments: list[str], environment: dict[str, str], cwd: str, streams: list[int]
) -> NoReturn:
    """Run a program as `__main__` in this process, and exit."""
    signal.alarm(TIMEOUT)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = [program, *arguments]
    warnings.resetwarnings()
    warnings.simplefilter("error")
    status = 1
    try:
        if program == "-c":
            sys.argv = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        elif program.endswith(".py"):
            sys.path.insert(0, str((ROOT / program).parent))
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
