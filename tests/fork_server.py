"""Run scripts of the repository in forks of a process that has already imported torch and the project.

A new process would import them for seconds. The server reads one request per line from its standard input, as
JSON, and answers each with the exit status of the script: see `run_in_fork`.
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
from collections.abc import Sequence
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


def run_in_fork(
    program: str, arguments: Sequence[str], cwd: Path, stdin: str = "", timeout: int = 120
) -> subprocess.CompletedProcess:
    """Run train.py, sample.py or a module such as lab.curves: status and output, as subprocess.run returns.

    Warnings are errors. After `timeout` seconds SIGALRM ends the script: its status is then -14.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        paths[0].write_text(stdin, encoding="utf-8")
        request = {"program": program, "arguments": list(arguments), "cwd": str(cwd), "timeout": timeout}
        request |= {"streams": [str(path) for path in paths]}
        server = start_server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        output, errors = (path.read_text(encoding="utf-8") for path in paths[1:])
    return subprocess.CompletedProcess([program, *arguments], status, output, errors)


def serve() -> None:
    """Answer requests until standard input is closed."""
    import matplotlib.figure  # noqa: F401  # what the scripts import
    import torch  # noqa: F401

    import sample  # noqa: F401
    import train  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_request(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run_request(program: str, arguments: list[str], cwd: str, timeout: int, streams: list[str]) -> NoReturn:
    """Run a script as `__main__` in this process, and exit."""
    signal.alarm(timeout)
    os.chdir(cwd)
    for descriptor, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
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
