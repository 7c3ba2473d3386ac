"""How far the shards of a corpus have come that workers are still making, for whoever wants to read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

WORK_FOLDER = ".shards"  # in the corpus's folder, until it is finished


@dataclass(frozen=True)
class ShardCount:
    """How many shards are finished, and of how many."""

    done: int
    total: int


def sidecar_name(shard: int) -> str:
    """The file that tells that a shard is finished."""
    return f"shard_{shard:05d}.json"


def count_shards(work: Path) -> ShardCount:
    """What is finished in the folder `work` of a corpus; of 0 where its plan cannot be read."""
    try:
        total = int(json.loads((work / "plan.json").read_text(encoding="utf-8"))["asked"]["shards"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        total = 0
    return ShardCount(sum(1 for _ in work.glob("shard_*.json")), total)


def restart_hint(work: Path) -> str:
    """What to do with shards that cannot be gone on with."""
    return f"delete {work} and the train_*.bin beside it"


def is_unfinished(folder: Path) -> bool:
    """Whether workers have begun to make a corpus in `folder`, and it is not finished."""
    return (folder / WORK_FOLDER / "plan.json").exists() and not (folder / "meta.json").exists()


def check_finished(folder: Path) -> None:
    """Raise ValueError where a corpus is unfinished, that says how far it is and how to go on."""
    if not is_unfinished(folder):
        return
    work = folder / WORK_FOLDER
    count = count_shards(work)
    raise ValueError(
        f"the corpus {folder} is not finished: {count.done} of {count.total} shards are there. Run the other "
        f"workers, or any of them again (prepare.py --shards {count.total} --worker I/N, with the flags that "
        f"it was begun with): finished shards are not made again. To give it up, {restart_hint(work)}"
    )
