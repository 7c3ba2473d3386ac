"""kill -9 at random moments of a run, in the middle of saves too: it goes on every time, to the same weights.

    python tests/faults/kill_run.py [--kills 200] [--seed 0]

A run of 40 steps is killed and resumed until it ends, then another begins, until there were so many kills.
Half of the moments are drawn from the time that the run takes, half lie within a save. Prints what happened;
ends with 1 where any run came to other weights, or could not go on.
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

from harness import checkpoint, ended, fork, losses, prepare, sums, words

STEPS = 40
SIZE = {
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
        return storm(Path(name), args.kills, random.Random(args.seed))


def storm(folder: Path, kills: int, rng: random.Random) -> int:
    data, said = prepare(folder), folder / "said.txt"
    whole = folder / "undisturbed"
    start = time.monotonic()
    assert ended(fork(words(data, whole, **SIZE), said)) == 0, said.read_text()
    length, truth = time.monotonic() - start, (sums(whole), losses(whole))
    done, runs, bad, where = 0, 0, 0, Counter()
    while done < kills:
        runs += 1
        out = folder / f"run-{runs}"
        status = None
        while status != 0:
            began = bool(checkpoint.step_folders(out)) if out.exists() else False
            way = ["--init_from=resume"] if began else ["--overwrite"]
            pid = fork([*words(data, out, **SIZE), *way], said)
            if done < kills:
                inside = rng.random() < 0.5
                wait(out, inside, rng, length)
                phase = moment(out)
                os.kill(pid, signal.SIGKILL)
            status = ended(pid)
            if status == -signal.SIGKILL:
                done, where[phase] = done + 1, where[phase] + 1
            elif status != 0:
                print(said.read_text()[-3000:])
                return 1
        if (sums(out), losses(out)) != truth or litter(out):
            bad += 1
            print(f"run {runs} differs from the undisturbed one: {litter(out)}")
        shutil.rmtree(out)
    phases = ", ".join(f"{count} {phase}" for phase, count in where.most_common())
    print(f"kill -9: {done} kills ({phases}) of {runs} runs, each resumed every time; {runs - bad} of {runs} "
          f"ended with the weights, optimizer and losses of the undisturbed one, bit for bit")  # fmt: skip
    return 1 if bad else 0


def wait(out: Path, inside: bool, rng: random.Random, length: float) -> None:
    """Until the moment of a kill: any, or one inside the next save."""
    end = time.monotonic() + rng.uniform(0.2, 1.0) * length
    if inside:
        skip = rng.randrange(4)  # not always the first save
        while time.monotonic() < end + length and skip >= 0:
            if moment(out) != "between saves":
                skip -= 1
                if skip < 0:
                    time.sleep(rng.uniform(0, 0.01))
                    return
                while moment(out) != "between saves" and time.monotonic() < end + length:
                    pass
        return
    time.sleep(max(0.0, end - time.monotonic()))


def moment(out: Path) -> str:
    """What a run is doing, by what lies in its folder."""
    try:
        names = [path.name for path in out.iterdir()]
    except OSError:
        return "between saves"
    return (
        "within saves"
        if any(n.startswith(".") and n.endswith((".tmp", ".old")) for n in names)
        else "between saves"
    )


def litter(out: Path) -> list[str]:
    """What a run should not leave."""
    return [p.name for p in out.iterdir() if p.name.startswith(".") and p.name != ".lock"]


if __name__ == "__main__":
    sys.exit(main())
