"""Prepare a corpus in shards, with many workers on one machine or on several that share a folder.

    out_dir/train_00003.bin               the training tokens of shard 3, which is finished
    out_dir/.shards/plan.json             which part of the source each shard contains
    out_dir/.shards/shard_00003.json      marks shard 3 as finished; contains its sizes and checksums
    out_dir/.shards/val_00003.bin         the validation tokens of shard 3
    out_dir/.shards/part_00003-<random>/  temporary files of a worker that is making shard 3

Workers do not wait for each other, and there are no locks. Each file is written under a temporary name,
synced to the disk, and renamed. If two workers make the same file, they write the same bytes, so it does not
matter which of them is later. The worker that finds all shards finished joins the validation tokens to
val.bin, and writes tokenizer.json and, last, meta.json. A corpus with a meta.json is therefore complete.
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

from fradique.data.build import check_replaceable, make_metadata
from fradique.data.console import progress_bar
from fradique.data.encode import MIN_TOKENS, check_splits, encode_splits
from fradique.data.shard_plan import Job, ShardPlan
from fradique.data.shard_progress import WORK_FOLDER, ShardCount, count_shards, restart_hint, sidecar_name
from fradique.data.token_files import find_token_files
from fradique.io.files import checksum, fsync, read_json, write_json
from fradique.tokenizer.tokenizer import save_tokenizer, tokenizer_from_json

MAX_SHOWN_CHARS = 60  # of one value in an error message


@dataclass(frozen=True)
class Worker:
    """Worker number `index`, from 0, of `count`. It makes the shards k with k mod count == index."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Worker:
        """Parse the value of --worker, such as "3/16". Raises ValueError if there is no such worker."""
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
    """Make the missing shards of `worker`, and the corpus if all shards are then finished.

    Returns the content of meta.json, or the number of finished shards if some are missing. Raises ValueError
    if the source or `out_dir` cannot be used, and OSError if files cannot be read or written. After an error,
    the finished shards are kept, and the same call makes the missing ones.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file, not a folder: choose another folder with --out_dir")
    if meta := _finished_corpus(job, out_dir):
        # the worker that finished the corpus may have been killed before it removed the work folder
        shutil.rmtree(out_dir / WORK_FOLDER, ignore_errors=True)
        return meta
    _check_no_other_shards(out_dir)
    with _work_folder(out_dir) as work_dir:
        try:
            plan, plan_sha256 = _load_or_make_plan(job, work_dir)
            builder = _ShardBuilder(job, out_dir, plan, plan_sha256)
            for shard in builder.missing(worker):
                builder.make(shard)
            return builder.finish()
        except (OSError, ValueError):
            # it is no error if another worker finished the corpus meanwhile and removed the work folder
            if meta := _finished_corpus(job, out_dir):
                return meta
            raise


def _finished_corpus(job: Job, out_dir: Path) -> dict[str, Any] | None:
    """The content of meta.json; None if there is none. Raises ValueError if another job made it."""
    try:
        meta = read_json(out_dir / "meta.json")
    except FileNotFoundError:
        return None
    except ValueError:
        meta = None
    if isinstance(meta, dict) and meta.get("made_from") == _json_roundtrip(job.request):
        return meta
    raise ValueError(
        f"{out_dir} contains another corpus: its meta.json is damaged, or was not made from this text with "
        "these flags. Shards never replace a corpus: delete it first, or choose another folder with --out_dir"
    )


def _check_no_other_shards(out_dir: Path) -> None:
    """Raise ValueError if there are token files without the plan of a preparation in shards."""
    if (out_dir / WORK_FOLDER / "plan.json").exists():
        return
    if token_files := find_token_files(out_dir):
        raise ValueError(
            f"{out_dir} contains {token_files[0].name}, which belongs to another corpus. Shards never "
            "replace a corpus: delete it first, or choose another folder with --out_dir"
        )
    check_replaceable(out_dir)


@contextlib.contextmanager
def _work_folder(out_dir: Path) -> Iterator[Path]:
    """Make the folder .shards and `out_dir`. At the end, remove those that are new and still empty."""
    new_folders = [folder for folder in (out_dir / WORK_FOLDER, out_dir) if not folder.exists()]
    (out_dir / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        yield out_dir / WORK_FOLDER
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _load_or_make_plan(job: Job, work_dir: Path) -> tuple[ShardPlan, str]:
    """Read plan.json, or make it if it is missing. Returns the plan and the SHA-256 of the file.

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
    planned, requested = plan["asked"], _json_roundtrip(job.request)
    if planned != requested:
        differences = [
            f"{name}: {_shorten(planned.get(name))}, not {_shorten(value)}"
            for name, value in (dict.fromkeys(planned) | requested).items()
            if planned.get(name) != value
        ]
        raise ValueError(
            f"{work_dir.parent} has shards of another preparation "
            f"({', '.join(differences) or 'an older version'}). Use the original text and flags, or start "
            f"over: {restart_hint(work_dir)}"
        )
    return plan, hashlib.sha256(data).hexdigest()


def _parse_plan(data: bytes, path: Path) -> ShardPlan:
    """The plan in `data`, the content of the file `path`. Raises ValueError if it is damaged."""
    try:
        plan = json.loads(data)
        tokenizer_from_json(plan["tokenizer"])  # raises ValueError for a damaged tokenizer
        plan["asked"].items()  # raises AttributeError if it is not a dict
        of_documents = plan["bytes"] is None
        if ("counts" in plan) != of_documents or ("survey" in plan) == of_documents:
            raise ValueError("its entries contradict each other")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Start over: {restart_hint(path.parent)}") from error
    return plan


def _json_roundtrip(value: Any) -> Any:
    """`value` as it would be read back from JSON, where tuples become lists."""
    return json.loads(json.dumps(value))


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


@contextlib.contextmanager
def _temporary_folder(work_dir: Path, name: str) -> Iterator[Path]:
    """Make a folder for one worker, and remove it at the end. Another worker may make the same shard."""
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
        self.tokenizer = tokenizer_from_json(plan["tokenizer"])

    def missing(self, worker: Worker) -> Iterator[int]:
        """The unfinished shards of `worker`. Other workers may finish some of them during the iteration."""
        assigned = range(worker.index, self.job.shards, worker.count)
        with progress_bar(len(assigned), "encoding", "shard") as bar:
            for shard in assigned:
                if self.finished_splits(shard) is None:
                    yield shard
                bar.update()

    def finished_splits(self, shard: int) -> dict[str, Any] | None:
        """Split -> entry for meta.json of the token file of a shard; None if the shard is not finished.

        A shard with a missing or truncated file is not finished. Raises ValueError if the shard was made from
        another plan.
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
        """Split -> path of the token file of a shard."""
        return {
            "train": self.out_dir / f"train_{shard:05d}.bin",
            "val": self.work_dir / f"val_{shard:05d}.bin",
        }

    def make(self, shard: int) -> None:
        """Encode one shard, move its token files to their final folders, and mark it as finished."""
        was_finished = (self.work_dir / sidecar_name(shard)).exists()  # and its token file damaged since
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
                    self._move(folder / entry["file"], path, is_own=was_finished)
                    fsync(path.parent)
                write_json(folder / "shard.json", {"plan": self.plan_sha256, "splits": entries})
                (folder / "shard.json").replace(self.work_dir / sidecar_name(shard))
                fsync(self.work_dir)
        except FileNotFoundError:
            # another worker may have finished the same shard and removed this temporary folder, see below
            if self.finished_splits(shard) is None:
                raise
        # temporary folders of workers that were killed, or that are making this shard again
        for folder in self.work_dir.glob(f"part_{shard:05d}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> dict[str, Any] | ShardCount:
        """Complete the corpus and return its meta.json, or return the count if shards are missing."""
        done = count_shards(self.work_dir).done
        if done < self.job.shards:
            # another worker may have completed the corpus and removed the work folder
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
            meta = make_metadata(self.tokenizer, self.job.source, self.job.val_split, splits)
            meta |= {"made_from": self.plan["asked"]}
            save_tokenizer(self.tokenizer, folder / "tokenizer.json")
            write_json(folder / "meta.json", meta)
            for name in ("tokenizer.json", "val.bin", "meta.json"):
                self._move(folder / name, self.out_dir / name)
                fsync(self.out_dir)
        shutil.rmtree(self.work_dir, ignore_errors=True)
        return meta

    def _move(self, source: Path, target: Path, is_own: bool = False) -> None:
        """Move a file to its final name.

        An existing file with this name is replaced only if it has the same content, as the file of another
        worker has, or if it `is_own`: made by a worker and damaged since. Raises ValueError for any other.
        """
        if target.exists() and not is_own and checksum(target) != checksum(source):
            raise ValueError(
                f"{target} exists, and prepare.py has not made it: move it to another folder, then run the "
                "same command again"
            )
        source.replace(target)

    def _join_val(self, entries: list[dict[str, Any]], path: Path) -> dict[str, Any]:
        """Concatenate the validation files of all shards. Returns the entry of the split in meta.json.

        `entries` are the entries of the files. Raises ValueError if the checksum of a file is wrong, and
        deletes the file, so that its shard is made again.
        """
        joined_digest = hashlib.sha256()
        with path.open("wb") as file:
            for entry in entries:
                shard_path, digest = self.work_dir / entry["file"], hashlib.sha256()
                with shard_path.open("rb") as shard_file:
                    while block := shard_file.read(1 << 20):
                        file.write(block)
                        digest.update(block)
                        joined_digest.update(block)
                if digest.hexdigest() != entry["sha256"]:
                    shard_path.unlink(missing_ok=True)
                    raise ValueError(f"{shard_path} is damaged: run the same command again")
            file.flush()
            os.fsync(file.fileno())
        split = _sum_entries(entries)
        split["shards"] = [
            {
                "file": path.name,
                "tokens": split["tokens"],
                "bytes": split["bytes"],
                "sha256": joined_digest.hexdigest(),
            }
        ]
        return split


def _sum_entries(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of a split in meta.json, from the entries of its files."""
    n_tokens, n_bytes = sum(entry["tokens"] for entry in entries), sum(entry["bytes"] for entry in entries)
    return {"tokens": n_tokens, "bytes": n_bytes, "shards": entries}
