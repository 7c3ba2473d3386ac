"""Many workers, on one machine or many, make one corpus of numbered shards in one shared folder.

    out_dir/train_00003.bin               a finished shard of the training split, in its place
    out_dir/.shards/plan.json             what all shards are made of: the first worker makes it
    out_dir/.shards/shard_00003.json      that shard 3 is finished, and what is in it
    out_dir/.shards/val_00003.bin         its part of val.bin
    out_dir/.shards/part_00003-<random>/  being made by somebody

Workers never wait for each other and there are no locks. Each file is made beside its place, synced and
renamed. Two who make the same file make the same bytes, so it does not matter whose is there. Whoever finds
that all shards are finished puts val.bin and tokenizer.json in place, then meta.json, and it is a corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fradique.data.build import MIN_TOKENS, check_splits, encode_splits, make_metadata
from fradique.data.shard_plan import Job, ShardPlan
from fradique.data.shard_progress import WORK_FOLDER, ShardCount, count_shards, restart_hint, sidecar_name
from fradique.data.text_index import progress_bar
from fradique.io.files import fsync, write_json
from fradique.tokenizer import tokenizer as tokenizers


@dataclass(frozen=True)
class Worker:
    """One of `count` workers, counted from 0: it makes the shards k with k mod count == index."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, words: str) -> Worker:
        """Read "3/16". Raises ValueError for anything that names no worker."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", words)
        if not match or int(match[2]) < 1:
            raise ValueError(f"--worker {words}: give it as I/N, for example 0/16, the first of 16 workers")
        index, count = int(match[1]), int(match[2])
        if index >= count:
            raise ValueError(
                f"--worker {words}: workers are counted from 0, so from 0/{count} to {count - 1}/{count}"
            )
        return cls(index, count)


def prepare_shards(job: Job, out_dir: Path, worker: Worker) -> dict[str, Any] | ShardCount:
    """Make the shards of `worker` that are not there; meta.json if all are there then, else how many are.

    Raises ValueError for what the user can mend, and OSError for what the disk refuses. Finished shards stay,
    and the same call goes on with the rest.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file, not a folder: choose another place with --out_dir")
    if meta := _finished(job, out_dir):
        shutil.rmtree(out_dir / WORK_FOLDER, ignore_errors=True)  # left by who was killed at the very end
        return meta
    _refuse_others(out_dir)
    with _work_folder(out_dir) as work:
        try:
            shards = _Shards(job, out_dir, *_have_plan(job, work))
            for shard in shards.missing(worker):
                shards.make(shard)
            return shards.finish()
        except (OSError, ValueError):
            if meta := _finished(job, out_dir):  # another worker was the last, and has swept what we read
                return meta
            raise


def _finished(job: Job, out_dir: Path) -> dict[str, Any] | None:
    """meta.json of the corpus, where it is there. Raises ValueError where it is another corpus's."""
    path = out_dir / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        meta = None
    if isinstance(meta, dict) and meta.get("made_from") == _as_json(job.asked):
        return meta
    raise ValueError(
        f"{out_dir} holds another corpus: its meta.json was not made from this text with these flags. Shards "
        "never replace one: delete it first, or choose another place with --out_dir"
    )


def _refuse_others(out_dir: Path) -> None:
    """Raise ValueError where there are shards that no plan tells of."""
    there = sorted(path.name for path in out_dir.glob("*.bin") if re.match(r"(train|val)[_.]", path.name))
    if there and not (out_dir / WORK_FOLDER / "plan.json").exists():
        raise ValueError(
            f"{out_dir} holds {there[0]}, which is not of this corpus. Shards never replace another: delete "
            "it first, or choose another place with --out_dir"
        )


@contextlib.contextmanager
def _work_folder(out_dir: Path) -> Iterator[Path]:
    """The folder .shards; where nothing came of it, it goes, and so does an `out_dir` that is new."""
    new = [folder for folder in (out_dir / WORK_FOLDER, out_dir) if not folder.exists()]
    (out_dir / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        yield out_dir / WORK_FOLDER
    finally:
        for folder in new:
            with contextlib.suppress(OSError):  # it is used
                folder.rmdir()


def _have_plan(job: Job, work: Path) -> tuple[ShardPlan, str]:
    """The plan that is there, or else the one that we make; and its sum. Raises ValueError for another's."""
    path = work / "plan.json"
    if not path.exists():
        made = _as_json(job.plan())
        if not path.exists():
            with _part(work, "plan") as folder:
                write_json(folder / "plan.json", made)
                (folder / "plan.json").replace(path)
            fsync(work)
    data = path.read_bytes()
    plan = _parse(data, path)
    if plan["asked"] != (asked := _as_json(job.asked)):
        differ = [name for name in asked if plan["asked"].get(name) != asked[name]]
        told = ", ".join(
            f"{name}: {_short(plan['asked'].get(name))}, not {_short(asked[name])}" for name in differ
        )
        raise ValueError(
            f"{work.parent} holds shards of another preparation ({told or 'an older one'}). Give the flags "
            f"and the text that it was begun with, or begin anew: {restart_hint(work)}"
        )
    return plan, hashlib.sha256(data).hexdigest()


def _parse(data: bytes, path: Path) -> ShardPlan:
    try:
        plan = json.loads(data)
        tokenizers.tokenizer_from_json(plan["tokenizer"])
        plan["asked"].items()
        if (plan["bytes"] is None) != ("counts" in plan) or (plan["bytes"] is None) == ("survey" in plan):
            raise ValueError("its parts contradict each other")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Begin anew: {restart_hint(path.parent)}") from error
    return plan


def _as_json(value: Any) -> Any:
    """`value` as it is read back: tuples are lists."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    words = str(value)
    return words if len(words) <= 60 else f"{words[:57]}..."


@contextlib.contextmanager
def _part(work: Path, name: str) -> Iterator[Path]:
    """A folder of one's own, whoever else makes the same."""
    folder = work / f"part_{name}-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Shards:
    """The shards of one plan, in their places and in the making."""

    def __init__(self, job: Job, out_dir: Path, plan: ShardPlan, plan_sum: str) -> None:
        self.job, self.out_dir, self.work = job, out_dir, out_dir / WORK_FOLDER
        self.plan, self.plan_sum = plan, plan_sum
        self.tokenizer = tokenizers.tokenizer_from_json(plan["tokenizer"])

    def missing(self, worker: Worker) -> Iterator[int]:
        """The shards of `worker` that are not finished, each looked for when the one before it is made."""
        mine = range(worker.index, self.job.shards, worker.count)
        with progress_bar(len(mine), "encoding", "shard") as bar:
            for shard in mine:
                if self.sidecar(shard) is None:
                    yield shard
                bar.update()

    def sidecar(self, shard: int) -> dict[str, Any] | None:
        """What is in a finished shard, or None where it is not finished, or not whole."""
        try:
            found = json.loads((self.work / sidecar_name(shard)).read_text(encoding="utf-8"))
            if found["plan"] != self.plan_sum:
                raise ValueError(
                    f"shard {shard} in {self.out_dir} was made from another plan: the workers did not read "
                    f"the same text, or are of different versions. Begin anew: {restart_hint(self.work)}"
                )
            for split, path in self._places(shard).items():
                size = found["splits"][split]["tokens"] * self.tokenizer.dtype.itemsize
                if path.stat().st_size != size:
                    return None
            return found["splits"]
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            return None

    def _places(self, shard: int) -> dict[str, Path]:
        return {
            "train": self.out_dir / f"train_{shard:05d}.bin",
            "val": self.work / f"val_{shard:05d}.bin",
        }

    def make(self, shard: int) -> None:
        """Encode one shard and put it in its place."""
        places = self._places(shard)
        try:
            with _part(self.work, f"{shard:05d}") as folder:
                splits = encode_splits(self.job.items(self.plan, shard), self.tokenizer, folder)
                if splits["train"]["tokens"] < MIN_TOKENS:
                    raise ValueError(
                        f"shard {shard} of {self.job.shards} has {splits['train']['tokens']} tokens to train "
                        f"on, and a block needs {MIN_TOKENS} at least: give a smaller --shards"
                    )
                told = {}
                for split, path in places.items():
                    (entry,) = splits[split]["shards"]
                    told[split] = entry | {"file": path.name}
                    (folder / entry["file"]).replace(path)
                    fsync(path.parent)
                write_json(folder / "shard.json", {"plan": self.plan_sum, "splits": told})
                (folder / "shard.json").replace(self.work / sidecar_name(shard))
                fsync(self.work)
        except FileNotFoundError:
            if self.sidecar(shard) is None:  # else another has finished the same shard, and swept ours
                raise
        for left in self.work.glob(f"part_{shard:05d}-*"):  # by who was killed, or makes it a second time
            shutil.rmtree(left, ignore_errors=True)

    def finish(self) -> dict[str, Any] | ShardCount:
        """Make the corpus of the shards, if all are finished; else how many are."""
        if (done := count_shards(self.work).done) < self.job.shards:
            return _finished(self.job, self.out_dir) or ShardCount(done, self.job.shards)
        found = [self.sidecar(shard) for shard in range(self.job.shards)]
        if None in found:
            raise ValueError(
                f"shard {found.index(None)} in {self.out_dir} was finished, and is not whole now: run "
                f"--worker {found.index(None)}/{self.job.shards}, which makes it anew"
            )
        with _part(self.work, "meta") as folder:
            train = _sum([splits["train"] for splits in found])
            val = self._join_val([splits["val"] for splits in found], folder / "val.bin")
            splits = {"train": train, "val": val}
            check_splits(splits)
            if self.plan["bytes"] not in (None, train["bytes"] + val["bytes"]):
                raise ValueError(f"the text changed while it was read. Begin anew: {restart_hint(self.work)}")
            meta = make_metadata(self.tokenizer, self.job.source, splits) | {"made_from": self.plan["asked"]}
            tokenizers.save_tokenizer(self.tokenizer, folder / "tokenizer.json")
            write_json(folder / "meta.json", meta)
            for name in ("tokenizer.json", "val.bin", "meta.json"):
                (folder / name).replace(self.out_dir / name)
                fsync(self.out_dir)
        shutil.rmtree(self.work, ignore_errors=True)
        return meta

    def _join_val(self, parts: list[dict[str, Any]], path: Path) -> dict[str, Any]:
        """Write val.bin, which is one file: its parts in order, each checked. What meta.json says of it."""
        whole = hashlib.sha256()
        with path.open("wb") as file:
            for part in parts:
                digest = hashlib.sha256()
                with (self.work / part["file"]).open("rb") as source:
                    while block := source.read(1 << 20):
                        file.write(block)
                        digest.update(block)
                        whole.update(block)
                if digest.hexdigest() != part["sha256"]:
                    (self.work / part["file"]).unlink(missing_ok=True)
                    raise ValueError(f"{self.work / part['file']} is damaged: run the same command again")
            file.flush()
            os.fsync(file.fileno())
        tokens, size = sum(part["tokens"] for part in parts), sum(part["bytes"] for part in parts)
        entry = {"file": path.name, "tokens": tokens, "bytes": size, "sha256": whole.hexdigest()}
        return {"tokens": tokens, "bytes": size, "shards": [entry]}


def _sum(entries: list[dict[str, Any]]) -> dict[str, Any]:
    tokens, size = sum(entry["tokens"] for entry in entries), sum(entry["bytes"] for entry in entries)
    return {"tokens": tokens, "bytes": size, "shards": entries}
