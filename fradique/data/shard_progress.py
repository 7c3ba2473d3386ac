"""The progress of a corpus whose shards are still being made, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fradique.io.files import read_json

WORK_FOLDER = ".shards"  # in the folder of the corpus, until the corpus is finished


@dataclass(frozen=True)
class ShardCount:
    """How many shards of a corpus are finished."""

    done: int
    total: int  # 0: unknown


def sidecar_name(shard: int) -> str:
    """The name of the JSON file that marks a shard as finished."""
    return f"shard_{shard:05d}.json"


def count_shards(work_dir: Path) -> ShardCount:
    """Count the finished shards in a `.shards` folder; the total is 0 if its plan cannot be read."""
    try:  # "asked": what the command line asked for
        total = int(read_json(work_dir / "plan.json")["asked"]["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        total = 0
    return ShardCount(sum(1 for _ in work_dir.glob("shard_*.json")), total)


def restart_hint(work_dir: Path) -> str:
    """How to start the preparation over, for error messages."""
    return f"delete {work_dir} and the train_*.bin beside it"


def is_unfinished(folder: Path) -> bool:
    """Whether a preparation in shards has started in `folder`, and has not finished."""
    return (folder / WORK_FOLDER / "plan.json").exists() and not (folder / "meta.json").exists()


def check_no_unfinished_shards(folder: Path) -> None:
    """Raise ValueError with the progress and how to continue, if the corpus is unfinished."""
    if not is_unfinished(folder):
        return
    work_dir = folder / WORK_FOLDER
    count = count_shards(work_dir)
    if not count.total:
        raise ValueError(
            f"the corpus {folder} is not finished, and {work_dir / 'plan.json'} is damaged. To start over, "
            f"{restart_hint(work_dir)}"
        )
    raise ValueError(
        f"the corpus {folder} is not finished: {count.done} of {count.total} shards are finished. Run "
        f"prepare.py again with the original flags: --shards {count.total} makes all that are missing, and "
        f"--worker I/N the shards of one worker. To start over, {restart_hint(work_dir)}"
    )
