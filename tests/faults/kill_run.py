"""Kill a run (kill -9) at random times, also during saves: it must resume and end with the same weights.

    python tests/faults/kill_run.py [--kills 200] [--seed 0]

A run of 40 steps is killed and resumed until it ends, and then the next run starts, up to --kills kills. Half
of the kills are at a random time, half during a save. The exit status is 1 if a run ended with other weights
or could not resume.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from harness import (
    checkpoint,
    exit_status,
    fork_train,
    losses,
    tensor_checksums,
    train_flags,
    write_tiny_corpus,
)

STEPS = 40
# changes to harness.RUN
CHANGES = {
    "max_iters": STEPS,
    "n_layer": 4,
    "n_embd": 128,
    "n_head": 4,
    "gradient_accumulation_steps": 1,
    "dropout": 0.1,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        return kill_runs(Path(name), args.kills, random.Random(args.seed))


def kill_runs(folder: Path, n_kills: int, rng: random.Random) -> int:
    """Kill runs n_kills times and compare them with an uninterrupted one. Returns the exit status."""
    data, output = write_tiny_corpus(folder), folder / "output.txt"
    reference = folder / "uninterrupted"
    start = time.monotonic()
    assert exit_status(fork_train(train_flags(data, reference, **CHANGES), output)) == 0, output.read_text()
    duration = time.monotonic() - start
    expected = (tensor_checksums(reference), losses(reference))
    kills, runs, different, phases = 0, 0, 0, Counter()
    while kills < n_kills:
        runs += 1
        out = folder / f"run-{runs}"
        status = None
        while status != 0:
            has_checkpoint = out.exists() and bool(checkpoint.step_folders(out))
            mode = "--init_from=resume" if has_checkpoint else "--overwrite"
            pid = fork_train([*train_flags(data, out, **CHANGES), mode], output)
            if kills < n_kills:
                wait_until_kill(out, rng.random() < 0.5, rng, duration)
                kill_phase = phase(out)
                os.kill(pid, signal.SIGKILL)
            status = exit_status(pid)
            if status == -signal.SIGKILL:
                kills, phases[kill_phase] = kills + 1, phases[kill_phase] + 1
            elif status != 0:
                print(output.read_text()[-3000:])
                return 1
        if (tensor_checksums(out), losses(out)) != expected or leftover_files(out):
            different += 1
            print(f"run {runs} differs from the uninterrupted one; left over: {leftover_files(out)}")
        shutil.rmtree(out)
    counts = ", ".join(f"{count} {kill_phase}" for kill_phase, count in phases.most_common())
    print(
        f"kill -9: {kills} kills ({counts}) in {runs} runs, all resumed; {runs - different} of {runs} runs "
        "ended with the weights, optimizer state and losses of the uninterrupted one, bit for bit"
    )
    return 1 if different else 0


def wait_until_kill(out: Path, during_save: bool, rng: random.Random, duration: float) -> None:
    """Wait until a random time in a run of `duration` seconds, or until the run saves."""
    deadline = time.monotonic() + rng.uniform(0.2, 1.0) * duration
    if during_save:
        skip = rng.randrange(4)  # not always the first save
        while time.monotonic() < deadline + duration and skip >= 0:
            if phase(out) != "between saves":
                skip -= 1
                if skip < 0:
                    time.sleep(rng.uniform(0, 0.01))
                    return
                while phase(out) != "between saves" and time.monotonic() < deadline + duration:
                    pass
        return
    time.sleep(max(0.0, deadline - time.monotonic()))


def phase(out: Path) -> str:
    """Whether a run is saving now: whether there are temporary files in its folder."""
    try:
        names = [path.name for path in out.iterdir()]
    except OSError:
        return "between saves"
    saving = any(name.startswith(".") and name.endswith((".tmp", ".old")) for name in names)
    return "during saves" if saving else "between saves"


def leftover_files(out: Path) -> list[str]:
    """Temporary files that a finished run must not leave behind."""
    return [p.name for p in out.iterdir() if p.name.startswith(".") and p.name not in (".lock", ".run.json")]


if __name__ == "__main__":
    sys.exit(main())
