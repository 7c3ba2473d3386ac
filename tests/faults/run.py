"""Run all fault tests one after another (make faults). Prints the last line of each and a verdict.

python tests/faults/run.py [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
FAULTS = {
    "kill_run": ["kill_run.py", "--kills", "200"],
    "kill_prepare": ["kill_prepare.py"],
    "signals": ["signals.py"],
    "ranks": ["ranks.py"],
    "two_hosts": ["two_hosts.py"],
    "disk": ["disk.py"],
    "disk_for_good": ["disk.py", "--for_good", "--errors", "ENOSPC"],
    "soak": ["soak.py"],
}


def main() -> int:
    chosen = sys.argv[1:] or list(FAULTS)
    if unknown := [name for name in chosen if name not in FAULTS]:
        print(f"error: {', '.join(unknown)}: there are {', '.join(FAULTS)}", file=sys.stderr)
        return 2
    failed = []
    for name in chosen:
        start, last_line = time.monotonic(), ""
        script, *arguments = FAULTS[name]
        command = [sys.executable, str(FOLDER / script), *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout or ():
                last_line = line.strip() or last_line
                print(f"  {line}", end="", flush=True)
        if process.returncode:
            failed.append(name)
        verdict = "FAILED" if process.returncode else "ok"
        print(f"{verdict}: {name} ({time.monotonic() - start:.0f} s): {last_line}", flush=True)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} passed" + (f"; failed: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
