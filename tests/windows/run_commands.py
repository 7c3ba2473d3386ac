"""Run commands one after the other in this process: a new one would import torch for seconds each time.

    python run_commands.py commands.json statuses.json

commands.json is a list of [program, argument, ...]. A program is a file, a module, "import" (of the file or
module that follows), or "-c" (code). Prints the traceback of an error; the exit status of a program goes into
statuses.json.
"""

import importlib
import json
import runpy
import sys
import traceback
from pathlib import Path


def run(program: str, arguments: list[str]) -> None:
    if program == "import" and arguments[0].endswith(".py"):
        runpy.run_path(arguments[0], run_name="imported")
    elif program == "import":
        importlib.import_module(arguments[0])
    elif program == "-c":
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        sys.modules.pop(program, None)  # else runpy warns that it is imported already
        runpy.run_module(program, run_name="__main__")


def main(commands: Path, statuses: Path) -> None:
    results = []
    for program, *arguments in json.loads(commands.read_text(encoding="utf-8")):
        sys.argv = [program, *arguments]
        try:
            run(program, arguments)
            results.append(0)
        except SystemExit as stop:
            results.append(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            results.append(-1)
        print(f"[{program} {' '.join(arguments)[:60]!a} ended with status {results[-1]}]", flush=True)
    statuses.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
