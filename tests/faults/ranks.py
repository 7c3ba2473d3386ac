"""Lose a rank of four: one that is killed, and one that is stopped and answers no more. torchrun starts all
of them again, and the run ends with the weights and losses of an undisturbed one, bit for bit.

    python tests/faults/ranks.py [--rounds 3] [--seed 0] [--ranks 4] [--parallel ddp,fsdp]
        [--signals SIGKILL,SIGSTOP] [--patience 15]
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from harness import children, losses, prepare, ranks_of, run, start, step, stop, sums, wait_for, words

STEPS = {"max_iters": 60, "dropout": 0.1}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--parallel", default="ddp,fsdp")
    parser.add_argument("--signals", default="SIGKILL,SIGSTOP")
    parser.add_argument("--patience", type=int, default=15, help="seconds for which a rank waits for another")
    args = parser.parse_args()
    rng, cases, failed = random.Random(args.seed), 0, 0
    steps = STEPS | {"dist_timeout": args.patience}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare(folder)
        for parallel in args.parallel.split(","):
            whole = folder / parallel
            run(words(data, whole, parallel=parallel, **steps), args.ranks)
            truth = (sums(whole), losses(whole))
            for number in range(args.rounds):
                for what in (signal.Signals[name] for name in args.signals.split(",")):
                    out = folder / f"{parallel}-{what.name}-{number}"
                    lost, at = rng.randrange(args.ranks), rng.randrange(1, 55)
                    flags = words(data, out, parallel=parallel, **steps)
                    start_time = time.monotonic()
                    problems = case(flags, args.ranks, out, what, lost, at, truth)
                    cases, failed = cases + 1, failed + bool(problems)
                    print(
                        f"{parallel}, {what.name} of rank {lost} at step {at}: "
                        f"{'; '.join(problems) or 'went on, the same to the last bit'} "
                        f"({time.monotonic() - start_time:.0f} s)",
                        flush=True,
                    )
    well = f"{cases - failed} of {cases} runs"
    print(f"ranks: {well} that lost a rank of {args.ranks} ended as the undisturbed one")
    return 1 if failed else 0


def case(
    flags: list[str], ranks: int, out: Path, what: signal.Signals, lost: int, at: int, truth: tuple
) -> list[str]:
    """What was not as it should be."""
    process = start(flags, ranks, restarts=3)
    assert wait_for(lambda: step(out) >= at, process), process.communicate()
    os.kill(ranks_of(process.pid)[lost], what)
    said = process.communicate(timeout=300)[0]
    problems = []
    if process.returncode:
        problems.append(f"exit status {process.returncode}: {said[-2000:]}")
    if "resuming at step" not in said and at >= 5:
        problems.append("it did not go on from a checkpoint")
    if what == signal.SIGSTOP and not re.search(rf"error: rank \d: rank {lost} \(.*does not answer", said):
        problems.append(f"the lost rank is not named: {said[-2000:]}")
    if (sums(out), losses(out)) != truth:
        problems.append("other weights or losses")
    if alive := children(process.pid):
        problems.append(f"processes left: {alive}")
        stop(process)
    return problems


if __name__ == "__main__":
    sys.exit(main())
