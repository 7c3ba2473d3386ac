"""The progress of a corpus whose shards are still being made, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fradique.io.files import read_json

WORK_FOLDER = ".shards"  # in the folder of the corpus, until the corpus is finished


@dataclass(frozen=True)
class ShardCount:
    """The number of finished shards and of all shards."""

    done: int
    total: int


def sidecar_name(shard: int) -> str:
    """The name of the file that records that a shard is finished."""
    return f"shard_{shard:05d}.json"


def count_shards(work_dir: Path) -> ShardCount:
    """Count the finished shards in a `.shards` folder; the total is 0 if its plan cannot be read."""
    try:
        total = int(read_json(work_dir / "plan.json")["asked"]["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        total = 0
    return ShardCount(sum(1 for _ in work_dir.glob("shard_*.json")), total)


def restart_hint(work_dir: Path) -> str:
    """How to discard unfinished shards, for messages."""
    return f"delete {work_dir} and the train_*.bin beside it"


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` has shards of a corpus that is not finished."""
    return (folder / WORK_FOLDER / "plan.json").exists() and not (folder / "meta.json").exists()


def check_finished(folder: Path) -> None:
    """Raise ValueError, with the progress and the command that continues, if the corpus is unfinished."""
    if not is_unfinished(folder):
        return
    work_dir = folder / WORK_FOLDER
    count = count_shards(work_dir)
    raise ValueError(
        f"the corpus {folder} is not finished: {count.done} of {count.total} shards are there. Run the other "
        f"workers, or any worker again, with the original flags (prepare.py --shards {count.total} "
        f"--worker I/N); finished shards are not made again. To discard them, {restart_hint(work_dir)}"
    )
