"""Run scripts of the repository in forks of a process that has already imported torch and the project.

A new process would import them for seconds. The server reads one request per line from its standard input, as
JSON, and answers each with exit statuses: see `run_in_forks`.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def start_server() -> subprocess.Popen:
    """The server of this process. It ends with it, when its standard input is closed."""
    command = [sys.executable, __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run_in_forks(
    program: str,
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    cwd: Path = ROOT,
    stdin: str = "",
    timeout: int = 120,
) -> list[subprocess.CompletedProcess]:
    """Run train.py, sample.py, another file, or a module such as lab.curves: status and output.

    It runs in one process for each of `environments`, all at the same time. Warnings are errors. After
    `timeout` seconds SIGALRM ends the processes: their status is then -14.
    """
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(i) for i in range(len(environments))]
        for folder in folders:
            folder.mkdir()
            (folder / "stdin").write_text(stdin, encoding="utf-8")
        request = {
            "program": program,
            "arguments": list(arguments),
            "environments": [dict(environment) for environment in environments],
            "folders": [str(folder) for folder in folders],
            "cwd": str(cwd),
            "timeout": timeout,
        }
        server = start_server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        return [
            subprocess.CompletedProcess(
                [program, *arguments],
                status,
                *((folder / stream).read_text(encoding="utf-8") for stream in ("stdout", "stderr")),
            )
            for status, folder in zip(statuses, folders, strict=True)
        ]


def serve() -> None:
    """Answer each request with the exit statuses of its processes, until standard input is closed."""
    import matplotlib.figure  # noqa: F401  # what the scripts import
    import torch  # noqa: F401

    import sample  # noqa: F401
    import train  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for environment, folder in zip(request.pop("environments"), request.pop("folders"), strict=True):
            child = os.fork()
            if child == 0:
                run_program(environment=environment, folder=Path(folder), **request)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)


def run_program(
    program: str, arguments: list[str], environment: dict[str, str], folder: Path, cwd: str, timeout: int
) -> NoReturn:
    """Run a program as `__main__` in this process, and exit."""
    signal.alarm(timeout)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, stream in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(folder / stream, os.O_RDWR | os.O_CREAT), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = [program, *arguments]
    warnings.resetwarnings()
    warnings.simplefilter("error")
    status = 1
    try:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
