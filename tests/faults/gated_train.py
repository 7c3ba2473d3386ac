"""train.py, but it waits before a step until a file exists.

So the run cannot end before a fault, however fast the machine is. Before training begins, the ranks of one
machine also wait until all of them have imported torch, which dist_timeout need not include then.

    python tests/faults/gated_train.py <step> <file> <flags of train.py>
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch._dynamo  # noqa: E402, F401  # which the first optimizer imports

import train  # noqa: E402
from configurator import command  # noqa: E402
from fradique.distributed import process_group  # noqa: E402
from fradique.training import outputs, setup  # noqa: E402


def main(step: int, gate: Path, flags: list[str]) -> None:
    ranks, restart = process_group.rank_info(), process_group.restart_count()
    if ranks.local_world == ranks.world:  # several machines do not restart at the same time
        wait_for_ranks(gate, ranks, restart)
    wait_before_step(step, gate)
    outputs.draw_loss_plot = lambda t: None  # importing matplotlib takes longer than the run
    status = command(train.main, train.TrainSettings, flags, base=setup.saved_run_settings)
    process_group.exit_process(status)


def wait_for_ranks(gate: Path, ranks: process_group.RankInfo, restart: int) -> None:
    """Wait until all ranks are here."""
    ready = [gate.with_name(f"{gate.name}-{restart}-{rank}") for rank in range(ranks.world)]
    ready[ranks.rank].touch()
    while not all(path.exists() for path in ready):
        time.sleep(0.01)


def wait_before_step(step: int, gate: Path) -> None:
    """Have training wait before `step` until the file `gate` exists."""
    train_step = train.train_step

    def gated_step(t: train.Trainer, lr: float) -> tuple:
        while t.state.step >= step and not gate.exists():
            time.sleep(0.01)
        return train_step(t, lr)

    train.train_step = gated_step


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
