"""A long run of small steps, whose memory and open files must not grow.

    python tests/faults/soak.py [--steps 100000] [--to docs/soak.png]

Trains a tiny model with evaluations, checkpoints, samples and snapshots, and records the resident memory and
open files of the process every second. The exit status is 1 if either grew.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from harness import last_step, start_train, train_flags, write_tiny_corpus

from fradique.io.terminal import path_argument

# changes to harness.RUN
CHANGES = {
    "eval_interval": 500,
    "log_interval": 10,
    "sample_interval": 1000,
    "snapshot_interval": 5000,
    "gradient_accumulation_steps": 1,
    "n_embd": 16,
    "block_size": 16,
    "dropout": 0.1,
    "learning_rate": 1e-3,
    "min_lr": 1e-4,
}
ALLOWED_MB, ALLOWED_FILES = 8.0, 0  # growth from the second tenth of the run to the last


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--to", type=path_argument, help="plot both to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out, output = folder / "run", (folder / "output.txt").open("w")
        start = time.monotonic()
        flags = train_flags(write_tiny_corpus(folder), out, max_iters=args.steps, **CHANGES)
        process = start_train(flags, stdout=output)
        rows = []  # seconds, MB, files
        while process.poll() is None:
            row = measure(process.pid)
            if row:
                rows.append((time.monotonic() - start, *row))
            time.sleep(1)
        output.close()
        assert process.returncode == 0, (folder / "output.txt").read_text()[-3000:]
        assert last_step(out) == args.steps
    tenth = max(1, len(rows) // 10)
    early, late = rows[tenth : 2 * tenth], rows[-tenth - 1 : -1]
    memory = [statistics.median(row[1] for row in period) for period in (early, late)]
    files = [statistics.median(row[2] for row in period) for period in (early, late)]
    if args.to:
        plot(rows, args.steps, args.to)
    grew = memory[1] - memory[0] > ALLOWED_MB or files[1] - files[0] > ALLOWED_FILES
    print(
        f"soak: {args.steps:,} steps in {rows[-1][0]:.0f} s; resident memory {memory[0]:.1f} MB in the "
        f"second tenth, {memory[1]:.1f} MB in the last; open files {files[0]:g} and {files[1]:g}"
    )
    return 1 if grew else 0


def measure(pid: int) -> tuple[float, int] | None:
    """Resident MB and open files of a process; None if it has just exited."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return None
    resident = next((line for line in status.splitlines() if line.startswith("VmRSS")), None)
    return (int(resident.split()[1]) / 1024, files) if resident else None


def plot(rows: list[tuple[float, float, int]], steps: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    memory_axes, files_axes = figure.subplots(2, 1, sharex=True)
    seconds = [row[0] for row in rows]
    memory_axes.plot(seconds, [row[1] for row in rows], color="#0072B2")
    memory_axes.set_ylabel("resident memory, MB")
    memory_axes.set_ylim(bottom=0)
    files_axes.plot(seconds, [row[2] for row in rows], color="#D55E00")
    files_axes.set_ylabel("open files")
    files_axes.set_ylim(bottom=0)
    files_axes.set_xlabel("seconds")
    memory_axes.set_title(f"{steps:,} steps of training")
    for axes in (memory_axes, files_axes):
        axes.grid(alpha=0.25)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
