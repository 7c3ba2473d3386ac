"""Make one corpus of numbered shards with many workers, on one machine or on many that share a folder.

    out_dir/train_00003.bin               a finished shard of the training split
    out_dir/.shards/plan.json             what all shards contain; written by the first worker
    out_dir/.shards/shard_00003.json      records that shard 3 is finished, with its sizes and checksums
    out_dir/.shards/val_00003.bin         the part of val.bin that belongs to shard 3
    out_dir/.shards/part_00003-<random>/  temporary files of a worker that is making shard 3

Workers do not wait for each other, and there are no locks. Each file is written under a temporary name,
synced and renamed. Two workers that make the same file write the same bytes, so either may win. The worker
that finds all shards finished writes tokenizer.json, val.bin and, last, meta.json: the corpus is complete.
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

from fradique.data.build import make_metadata
from fradique.data.console import progress_bar
from fradique.data.encode import MIN_TOKENS, check_splits, encode_splits
from fradique.data.shard_plan import Job, ShardPlan
from fradique.data.shard_progress import WORK_FOLDER, ShardCount, count_shards, restart_hint, sidecar_name
from fradique.io.files import fsync, read_json, write_json
from fradique.tokenizer import tokenizer as tokenizers


@dataclass(frozen=True)
class Worker:
    """One of `count` workers, counted from 0; it makes the shards k with k mod count == index."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Worker:
        """Read the value of --worker, such as "3/16". Raises ValueError if it is not a worker."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if not match or int(match[2]) < 1:
            raise ValueError(f"--worker {text}: give it as I/N, for example 0/16, the first of 16 workers")
        index, count = int(match[1]), int(match[2])
        if index >= count:
            raise ValueError(
                f"--worker {text}: workers are counted from 0, so from 0/{count} to {count - 1}/{count}"
            )
        return cls(index, count)


def prepare_shards(job: Job, out_dir: Path, worker: Worker) -> dict[str, Any] | ShardCount:
    """Make the missing shards of `worker`; meta.json if all shards are then finished, else their count.

    Raises ValueError for a mistake of the user, and OSError if files cannot be written. Finished shards are
    kept, and the same call continues with the rest.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file, not a folder: choose another folder with --out_dir")
    if meta := _finished_corpus(job, out_dir):
        # the worker that finished the corpus may have been killed before it removed this
        shutil.rmtree(out_dir / WORK_FOLDER, ignore_errors=True)
        return meta
    _check_no_other_shards(out_dir)
    with _work_folder(out_dir) as work_dir:
        try:
            shards = _ShardBuilder(job, out_dir, *_load_or_make_plan(job, work_dir))
            for shard in shards.missing(worker):
                shards.make(shard)
            return shards.finish()
        except (OSError, ValueError):
            if meta := _finished_corpus(
                job, out_dir
            ):  # by another worker, which then removed the work folder
                return meta
            raise


def _finished_corpus(job: Job, out_dir: Path) -> dict[str, Any] | None:
    """The meta.json of the finished corpus, or None. Raises ValueError if it was made by another job."""
    try:
        meta = read_json(out_dir / "meta.json")
    except FileNotFoundError:
        return None
    except ValueError:
        meta = None
    if isinstance(meta, dict) and meta.get("made_from") == _json_roundtrip(job.request):
        return meta
    raise ValueError(
        f"{out_dir} contains another corpus: its meta.json was not made from this text with these flags. "
        "Shards never replace a corpus: delete it first, or choose another folder with --out_dir"
    )


def _check_no_other_shards(out_dir: Path) -> None:
    """Raise ValueError if there are token files but no plan."""
    names = sorted(path.name for path in out_dir.glob("*.bin") if re.match(r"(train|val)[_.]", path.name))
    if names and not (out_dir / WORK_FOLDER / "plan.json").exists():
        raise ValueError(
            f"{out_dir} contains {names[0]}, which belongs to another corpus. Shards never replace a corpus: "
            "delete it first, or choose another folder with --out_dir"
        )


@contextlib.contextmanager
def _work_folder(out_dir: Path) -> Iterator[Path]:
    """The folder .shards; at the end it is removed, and so is `out_dir`, if it is new and empty."""
    new_folders = [folder for folder in (out_dir / WORK_FOLDER, out_dir) if not folder.exists()]
    (out_dir / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        yield out_dir / WORK_FOLDER
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _load_or_make_plan(job: Job, work_dir: Path) -> tuple[ShardPlan, str]:
    """Read plan.json, or make it if it is missing; the plan and its sha256.

    Raises ValueError if the plan is damaged or was made for another job.
    """
    path = work_dir / "plan.json"
    if not path.exists():
        plan = job.make_plan()
        if not path.exists():  # another worker may have written it meanwhile
            with _temporary_folder(work_dir, "plan") as folder:
                write_json(folder / "plan.json", plan)
                (folder / "plan.json").replace(path)
            fsync(work_dir)
    data = path.read_bytes()
    plan = _parse_plan(data, path)
    if plan["asked"] != (request := _json_roundtrip(job.request)):
        different = [name for name in request if plan["asked"].get(name) != request[name]]
        differences = ", ".join(
            f"{name}: {_shorten(plan['asked'].get(name))}, not {_shorten(request[name])}"
            for name in different
        )
        raise ValueError(
            f"{work_dir.parent} has shards of another preparation ({differences or 'an older version'}). Use "
            f"the original text and flags, or start over: {restart_hint(work_dir)}"
        )
    return plan, hashlib.sha256(data).hexdigest()


def _parse_plan(data: bytes, path: Path) -> ShardPlan:
    try:
        plan = json.loads(data)
        tokenizers.tokenizer_from_json(plan["tokenizer"])
        plan["asked"].items()
        if (plan["bytes"] is None) != ("counts" in plan) or (plan["bytes"] is None) == ("survey" in plan):
            raise ValueError("its entries contradict each other")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Start over: {restart_hint(path.parent)}") from error
    return plan


def _json_roundtrip(value: Any) -> Any:
    """`value` as it would be read back from JSON, where tuples become lists."""
    return json.loads(json.dumps(value))


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextlib.contextmanager
def _temporary_folder(work_dir: Path, name: str) -> Iterator[Path]:
    """A folder that no other worker uses, even one that makes the same shard; removed at the end."""
    folder = work_dir / f"part_{name}-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _ShardBuilder:
    """Makes the shards of a plan, and the corpus once all of them are finished."""

    def __init__(self, job: Job, out_dir: Path, plan: ShardPlan, plan_sha256: str) -> None:
        self.job, self.out_dir, self.work_dir = job, out_dir, out_dir / WORK_FOLDER
        self.plan, self.plan_sha256 = plan, plan_sha256
        self.tokenizer = tokenizers.tokenizer_from_json(plan["tokenizer"])

    def missing(self, worker: Worker) -> Iterator[int]:
        """The unfinished shards of `worker`; each is checked only when the previous one is made."""
        assigned = range(worker.index, self.job.shards, worker.count)
        with progress_bar(len(assigned), "encoding", "shard") as bar:
            for shard in assigned:
                if self.finished_splits(shard) is None:
                    yield shard
                bar.update()

    def finished_splits(self, shard: int) -> dict[str, Any] | None:
        """The meta.json entries of a finished shard's files by split; None if it is missing or incomplete.

        Raises ValueError if the shard was made from another plan.
        """
        try:
            record = read_json(self.work_dir / sidecar_name(shard))
            plan_sha256, splits = record["plan"], record["splits"]
            sizes = {
                path: splits[split]["tokens"] * self.tokenizer.dtype.itemsize
                for split, path in self._paths(shard).items()
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        if plan_sha256 != self.plan_sha256:
            raise ValueError(
                f"shard {shard} in {self.out_dir} was made from another plan: the workers did not read the "
                f"same text, or have different versions. Start over: {restart_hint(self.work_dir)}"
            )
        try:
            complete = all(path.stat().st_size == size for path, size in sizes.items())
        except FileNotFoundError:
            return None
        return splits if complete else None

    def _paths(self, shard: int) -> dict[str, Path]:
        """The token files of a finished shard by split."""
        return {
            "train": self.out_dir / f"train_{shard:05d}.bin",
            "val": self.work_dir / f"val_{shard:05d}.bin",
        }

    def make(self, shard: int) -> None:
        """Encode one shard, move its files into place, and record that it is finished."""
        try:
            with _temporary_folder(self.work_dir, f"{shard:05d}") as folder:
                splits = encode_splits(self.job.pieces(self.plan, shard), self.tokenizer, folder)
                if splits["train"]["tokens"] < MIN_TOKENS:
                    raise ValueError(
                        f"shard {shard} of {self.job.shards} has {splits['train']['tokens']} tokens to train "
                        f"on, and a block needs at least {MIN_TOKENS}: use a smaller --shards"
                    )
                entries = {}
                for split, path in self._paths(shard).items():
                    (entry,) = splits[split]["shards"]
                    entries[split] = entry | {"file": path.name}
                    (folder / entry["file"]).replace(path)
                    fsync(path.parent)
                write_json(folder / "shard.json", {"plan": self.plan_sha256, "splits": entries})
                (folder / "shard.json").replace(self.work_dir / sidecar_name(shard))
                fsync(self.work_dir)
        except FileNotFoundError:
            # another worker may have finished the same shard and removed this temporary folder
            if self.finished_splits(shard) is None:
                raise
        for folder in self.work_dir.glob(f"part_{shard:05d}-*"):  # of workers that were killed, or are late
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> dict[str, Any] | ShardCount:
        """Make the corpus and return its meta.json, if all shards are finished; else return their count."""
        if (done := count_shards(self.work_dir).done) < self.job.shards:
            return _finished_corpus(self.job, self.out_dir) or ShardCount(done, self.job.shards)
        shards = [self.finished_splits(shard) for shard in range(self.job.shards)]
        if None in shards:
            shard = shards.index(None)
            raise ValueError(
                f"shard {shard} in {self.out_dir} was finished, but is incomplete now: run --worker "
                f"{shard}/{self.job.shards} to make it again"
            )
        with _temporary_folder(self.work_dir, "meta") as folder:
            train = _sum_entries([splits["train"] for splits in shards])
            val = self._join_val([splits["val"] for splits in shards], folder / "val.bin")
            splits = {"train": train, "val": val}
            check_splits(splits)
            if self.plan["bytes"] not in (None, train["bytes"] + val["bytes"]):
                raise ValueError(
                    f"the text changed while it was read. Start over: {restart_hint(self.work_dir)}"
                )
            meta = make_metadata(self.tokenizer, self.job.source, splits) | {"made_from": self.plan["asked"]}
            tokenizers.save_tokenizer(self.tokenizer, folder / "tokenizer.json")
            write_json(folder / "meta.json", meta)
            for name in ("tokenizer.json", "val.bin", "meta.json"):
                (folder / name).replace(self.out_dir / name)
                fsync(self.out_dir)
        shutil.rmtree(self.work_dir, ignore_errors=True)
        return meta

    def _join_val(self, parts: list[dict[str, Any]], path: Path) -> dict[str, Any]:
        """Concatenate the shards' validation files into `path`, and return the split's entry in meta.json.

        Raises ValueError if the checksum of a part is wrong; the part is then deleted.
        """
        joined_digest = hashlib.sha256()
        with path.open("wb") as file:
            for part in parts:
                part_path, digest = self.work_dir / part["file"], hashlib.sha256()
                with part_path.open("rb") as source:
                    while block := source.read(1 << 20):
                        file.write(block)
                        digest.update(block)
                        joined_digest.update(block)
                if digest.hexdigest() != part["sha256"]:
                    part_path.unlink(missing_ok=True)
                    raise ValueError(f"{part_path} is damaged: run the same command again")
            file.flush()
            os.fsync(file.fileno())
        split = _sum_entries(parts)
        entry = {"file": path.name, "tokens": split["tokens"], "bytes": split["bytes"]}
        return split | {"shards": [entry | {"sha256": joined_digest.hexdigest()}]}


def _sum_entries(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of a split in meta.json, from the entries of its files."""
    n_tokens, n_bytes = sum(entry["tokens"] for entry in entries), sum(entry["bytes"] for entry in entries)
    return {"tokens": n_tokens, "bytes": n_bytes, "shards": entries}
