"""A disk that is full, over quota, read-only or broken, at each call that changes a file of a run; and slow.

    python tests/faults/disk.py [--errors ENOSPC,EDQUOT,EROFS,EIO] [--every 1] [--for_good]

`disk.c`, which is preloaded, counts the calls that a run makes to write, sync, create and rename. Then the
run is made once for each of them, which fails; and, `--for_good`, with all that come after it. Each run must
end with a message and status 2, or go on and warn; whatever happens, no checkpoint under its own name is
damaged, and the run is resumed (or begun again) to the weights of the undisturbed one. Needs a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from harness import checkpoint, ended, fork, losses, prepare, run, sums, words

SIZE = {"max_iters": 6, "eval_interval": 3, "gradient_accumulation_steps": 1, "sample_interval": 3}
SIZE |= {"snapshot_interval": 3, "sample_tokens": 5, "log_interval": 2}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--errors", default="ENOSPC,EDQUOT,EROFS,EIO")
    parser.add_argument("--every", type=int, default=1, help="try each N-th call only")
    parser.add_argument("--for_good", action="store_true")
    args = parser.parse_args()
    if "disk.so" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as name:
            library = Path(name) / "disk.so"
            source = Path(__file__).with_name("disk.c")
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
            environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
            return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
    with tempfile.TemporaryDirectory() as name:
        return Disk(Path(name).resolve()).fail(args.errors.split(","), args.every, args.for_good)


class Disk:
    def __init__(self, folder: Path) -> None:
        self.folder, self.library = folder, ctypes.CDLL(None)
        self.library.disk_names.restype = ctypes.c_char_p
        self.data, self.said = prepare(folder), folder / "said.txt"
        self.whole = folder / "whole"
        run(words(self.data, self.whole, **SIZE))
        self.truth = (sums(self.whole), losses(self.whole))

    def fork(self, out: Path, first: int, last: int, error: int, delay: int = 0) -> int:
        """A run into `out` with this fault: its exit status."""

        def before() -> None:
            path = ctypes.c_char_p(os.fsencode(out))
            self.library.disk_arm(
                path, ctypes.c_long(first), ctypes.c_long(last), error, ctypes.c_long(delay)
            )

        self.said.write_text("")
        return ended(fork(words(self.data, out, **SIZE), self.said, before))

    def calls(self) -> list[str]:
        """What an undisturbed run calls, in order: 'rename /…/best'."""
        out, report = self.folder / "counted", self.folder / "calls.txt"

        def before() -> None:
            self.library.disk_arm(
                ctypes.c_char_p(os.fsencode(out)), *map(ctypes.c_long, (0, 0)), 0, ctypes.c_long(0)
            )
            import train

            real = train.Trainer.close

            def close(t: train.Trainer) -> None:
                real(t)
                report.write_bytes(self.library.disk_names())

            train.Trainer.close = close

        assert ended(fork(words(self.data, out, **SIZE), self.said, before)) == 0, self.said.read_text()
        return report.read_text().splitlines()

    def fail(self, errors: list[str], every: int, for_good: bool) -> int:
        calls = self.calls()
        files = Counter(line.partition("counted/")[2].split(".tmp")[0] for line in calls)
        print(f"{len(calls)} calls, of {len(files)} files", flush=True)
        told, warned, silent, bad = 0, 0, 0, 0
        for name in errors:
            for number in range(1, len(calls) + 1, every):
                out = self.folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                last = 1 << 40 if for_good else number
                status = self.fork(out, number, last, getattr(errno, name))
                said = self.said.read_text()
                problems = self.look(out, status, said)
                told += status == 2
                warned += status == 0 and "warning:" in said
                silent += status == 0 and "warning:" not in said
                if problems:
                    bad += 1
                    print(f"{name} at call {number} ({calls[number - 1]}): {'; '.join(problems)}", flush=True)
        slow = self.folder / "slow"
        status = self.fork(slow, 0, 0, 0, 20_000)
        if status or (sums(slow), losses(slow)) != self.truth:
            bad += 1
            print(f"a slow disk: {self.said.read_text()[-500:]}")
        how = "from a call on" if for_good else "at one call"
        print(
            f"disk ({', '.join(errors)}, {how}): {told + warned + silent} runs: {told} ended with a message, "
            f"{warned} went on with a warning, {silent} did without the call; {bad} not as they should be; a "
            "slow disk (20 ms a call) changed nothing"
        )
        return 1 if bad else 0

    def look(self, out: Path, status: int, said: str) -> list[str]:
        """What is not as it should be after a run with a fault."""
        problems = []
        if status not in (0, 2):
            problems.append(f"exit status {status}")
        if "Traceback" in said:
            problems.append(f"a traceback: {said[-600:]}")
        if status == 2 and said.count("\nerror: ") + said.startswith("error: ") != 1:
            problems.append(f"not one message: {said[-600:]}")
        for folder in [*checkpoint.step_folders(out), *([out / "best"] if (out / "best").exists() else [])]:
            try:
                checkpoint.verify(folder)
            except ValueError as error:
                problems.append(str(error))
        way = ["--init_from=resume"] if out.exists() and checkpoint.step_folders(out) else ["--overwrite"]
        if status == 2:
            self.said.write_text("")
            status = ended(fork([*words(self.data, out, **SIZE), *way], self.said))
            if status:
                problems.append(f"it does not go on: {self.said.read_text()[-600:]}")
                return problems
        if sums(out) != self.truth[0]:
            problems.append("other weights")
        return problems


if __name__ == "__main__":
    sys.exit(main())
