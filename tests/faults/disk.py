"""Disk errors at every call that changes a file of a run: full, over quota, read-only, broken or slow.

    python tests/faults/disk.py [--errors ENOSPC,EDQUOT,EROFS,EIO] [--every 1] [--for_good]

`disk.c` is preloaded and counts the calls that write, sync, create and rename. Then the run is repeated once
for each call, and this call fails; with `--for_good` all later calls fail too. Each run must exit with a
message and status 2, or warn and continue. No checkpoint may be damaged, and the run, resumed or started
again, must end with the weights of a run without faults. Needs a C compiler.
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

from harness import (
    checkpoint,
    exit_status,
    fork_train,
    losses,
    run_train,
    tensor_checksums,
    train_flags,
    write_tiny_corpus,
)

# changes to harness.RUN
CHANGES = {"max_iters": 6, "eval_interval": 3, "gradient_accumulation_steps": 1, "sample_interval": 3}
CHANGES |= {"snapshot_interval": 3, "sample_tokens": 5, "log_interval": 2}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--errors", default="ENOSPC,EDQUOT,EROFS,EIO")
    parser.add_argument("--every", type=int, default=1, help="only every N-th call")
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
        return DiskFaults(Path(name).resolve()).run_all(args.errors.split(","), args.every, args.for_good)


class DiskFaults:
    """Runs train.py with failing calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.library = folder, ctypes.CDLL(None)
        self.library.disk_names.restype = ctypes.c_char_p
        self.data, self.output = write_tiny_corpus(folder), folder / "output.txt"
        reference = folder / "undisturbed"
        run_train(train_flags(self.data, reference, **CHANGES))
        self.expected = (tensor_checksums(reference), losses(reference))

    def run_with_faults(self, out: Path, first: int, last: int, error: int, delay: int = 0) -> int:
        """Run train.py with calls `first` to `last` failing and `delay` µs per call. Returns its status."""

        def before() -> None:
            calls = ctypes.c_long(first), ctypes.c_long(last)
            self.library.disk_arm(ctypes.c_char_p(os.fsencode(out)), *calls, error, ctypes.c_long(delay))

        self.output.write_text("")
        return exit_status(fork_train(train_flags(self.data, out, **CHANGES), self.output, before))

    def calls(self) -> list[str]:
        """The calls of a run without faults, in order, such as 'rename /.../best'."""
        out, report = self.folder / "counted", self.folder / "calls.txt"

        def before() -> None:
            no_calls = ctypes.c_long(0), ctypes.c_long(0)
            self.library.disk_arm(ctypes.c_char_p(os.fsencode(out)), *no_calls, 0, ctypes.c_long(0))
            import train

            original_close = train.Trainer.close

            def close(t: train.Trainer) -> None:
                original_close(t)
                report.write_bytes(self.library.disk_names())

            train.Trainer.close = close

        status = exit_status(fork_train(train_flags(self.data, out, **CHANGES), self.output, before))
        assert status == 0, self.output.read_text()
        return report.read_text().splitlines()

    def run_all(self, errors: list[str], every: int, for_good: bool) -> int:
        """Run train.py with each call failing in turn. Returns the exit status."""
        calls = self.calls()
        files = Counter(line.partition("counted/")[2].split(".tmp")[0] for line in calls)
        print(f"{len(calls)} calls on {len(files)} files", flush=True)
        failed, warned, silent, wrong = 0, 0, 0, 0
        for name in errors:
            for number in range(1, len(calls) + 1, every):
                out = self.folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                last = 1 << 40 if for_good else number
                status = self.run_with_faults(out, number, last, getattr(errno, name))
                output = self.output.read_text()
                problems = self.check(out, status, output)
                failed += status == 2
                warned += status == 0 and "warning:" in output
                silent += status == 0 and "warning:" not in output
                if problems:
                    wrong += 1
                    print(f"{name} at call {number} ({calls[number - 1]}): {'; '.join(problems)}", flush=True)
        slow = self.folder / "slow"
        status = self.run_with_faults(slow, 0, 0, 0, 20_000)
        if status or (tensor_checksums(slow), losses(slow)) != self.expected:
            wrong += 1
            print(f"a slow disk: {self.output.read_text()[-500:]}")
        faults = "from one call on" if for_good else "at one call"
        print(
            f"disk ({', '.join(errors)}, {faults}): {failed + warned + silent} runs: {failed} exited with a "
            f"message, {warned} continued with a warning, {silent} did not need the call; {wrong} wrong; "
            "a slow disk (20 ms per call) changed nothing"
        )
        return 1 if wrong else 0

    def check(self, out: Path, status: int, output: str) -> list[str]:
        """The problems after a run with a fault, and after resuming it."""
        problems = []
        if status not in (0, 2):
            problems.append(f"exit status {status}")
        if "Traceback" in output:
            problems.append(f"a traceback: {output[-600:]}")
        if status == 2 and output.count("\nerror: ") + output.startswith("error: ") != 1:
            problems.append(f"not one message: {output[-600:]}")
        for folder in [*checkpoint.step_folders(out), *([out / "best"] if (out / "best").exists() else [])]:
            try:
                checkpoint.verify_checkpoint(folder)
            except ValueError as error:
                problems.append(str(error))
        mode = "--init_from=resume" if out.exists() and checkpoint.step_folders(out) else "--overwrite"
        if status == 2:
            self.output.write_text("")
            status = exit_status(fork_train([*train_flags(self.data, out, **CHANGES), mode], self.output))
            if status:
                problems.append(f"it cannot resume: {self.output.read_text()[-600:]}")
                return problems
        if tensor_checksums(out) != self.expected[0]:
            problems.append("other weights")
        return problems


if __name__ == "__main__":
    sys.exit(main())
