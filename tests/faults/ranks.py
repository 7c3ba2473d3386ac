"""Kill one of four ranks (SIGKILL), or stop it so that it no longer answers (SIGSTOP).

torchrun restarts all ranks, and the run must end with exactly the weights and losses of an uninterrupted run.

    python tests/faults/ranks.py [--rounds 3] [--seed 0] [--ranks 4] [--parallel ddp,fsdp]
        [--signals SIGKILL,SIGSTOP] [--patience 15] [--steps 60] [--kill]

torchrun waits 30 seconds for a stopped rank before it kills it; `--kill` does not wait for that.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import (
    TIMEOUT,
    descendants,
    fork_ranks,
    kill_all,
    last_step,
    losses,
    rank_pids,
    start_train,
    tensor_checksums,
    train_flags,
    wait_for,
    write_tiny_corpus,
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--parallel", default="ddp,fsdp")
    parser.add_argument("--signals", default="SIGKILL,SIGSTOP")
    parser.add_argument("--patience", type=int, default=15, help="seconds that ranks wait for each other")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kill", action="store_true", help="kill a stopped rank when the others have ended")
    args = parser.parse_args()
    rng, cases, failed = random.Random(args.seed), 0, 0
    changes = {"max_iters": args.steps, "dropout": 0.1, "dist_timeout": args.patience}  # to harness.RUN
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_tiny_corpus(folder)
        for parallel in args.parallel.split(","):
            reference = folder / parallel
            flags = train_flags(data, reference, parallel=parallel, **changes)
            fork_ranks(flags, args.ranks, folder / f"{parallel}.txt")
            expected = (tensor_checksums(reference), losses(reference))
            for number in range(args.rounds):
                for sig in (signal.Signals[name] for name in args.signals.split(",")):
                    out = folder / f"{parallel}-{sig.name}-{number}"
                    lost_rank, step = rng.randrange(args.ranks), rng.randrange(1, args.steps - 5)
                    flags = train_flags(data, out, parallel=parallel, **changes)
                    start_time = time.monotonic()
                    problems = run_case(flags, args, out, sig, lost_rank, step, expected)
                    cases, failed = cases + 1, failed + bool(problems)
                    print(
                        f"{parallel}, {sig.name} of rank {lost_rank} at step {step}: "
                        f"{'; '.join(problems) or 'resumed, identical'} "
                        f"({time.monotonic() - start_time:.0f} s)",
                        flush=True,
                    )
    print(
        f"ranks: {cases - failed} of {cases} runs that lost one of {args.ranks} ranks ended like the "
        "uninterrupted one"
    )
    return 1 if failed else 0


def run_case(
    flags: list[str],
    args: argparse.Namespace,
    out: Path,
    sig: signal.Signals,
    lost_rank: int,
    step: int,
    expected: tuple,
) -> list[str]:
    """Send a signal to rank `lost_rank` after step `step`. Returns the problems."""
    gate = out.with_name(f"{out.name}-gate")  # the run waits for it, so that it cannot end before the signal
    flags = [str(step + 4), str(gate), *flags]
    process = start_train(flags, args.ranks, restarts=3, script="tests/faults/gated_train.py")
    try:
        assert wait_for(lambda: last_step(out) >= step, process), process.communicate()
        pids = rank_pids(process.pid)
        lost = pids.pop(lost_rank)
        os.kill(lost, sig)
        gate.touch()
        if sig == signal.SIGSTOP and args.kill:
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), process)
            os.kill(lost, signal.SIGKILL)
        output = process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        kill_all(process)
        return [f"it does not end within {TIMEOUT} s"]
    problems = []
    if process.returncode:
        problems.append(f"exit status {process.returncode}: {output[-2000:]}")
    if "resuming at step" not in output and step >= 5:
        problems.append("it did not resume from a checkpoint")
    message = rf"error: rank \d: rank {lost_rank} \(.*does not answer"
    if sig == signal.SIGSTOP and not re.search(message, output):
        problems.append(f"the lost rank is not named: {output[-2000:]}")
    if (tensor_checksums(out), losses(out)) != expected:
        problems.append("other weights or losses")
    if alive := descendants(process.pid):
        problems.append(f"processes left: {alive}")
        kill_all(process)
    return problems


if __name__ == "__main__":
    sys.exit(main())
