"""The run folder out/<run>/: check it, lock it, and write and read its settings.json.

settings.json contains the metadata of the run: its id, its settings, what was chosen automatically
("decided"), the versions of the packages, and the git commit.
"""

import contextlib
import importlib.metadata
import platform
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fradique.checkpointing import checkpoint, embedding_snapshots, metrics_file, run_files
from fradique.checkpointing.run_files import SETTINGS_FILE, TOKENIZER_FILE
from fradique.io import files, folder_lock
from fradique.io.terminal import quote, shell_command
from fradique.tokenizer.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, tokenizer_checksum

DEMO_CONFIG = "config/train_python_char.py"
MAX_LISTED_RUNS = MAX_LISTED_FILES = 10  # in an error message


@dataclass
class RunLock:
    """A run folder that this process has locked and writes to."""

    run_id: str  # written in settings.json and in every checkpoint
    lock: folder_lock.FolderLock
    metadata: dict[str, Any]  # the content of settings.json
    tokenizer: Tokenizer

    def write_metadata(self) -> None:
        """Write settings.json and tokenizer.json. sample.py then needs only the run folder."""
        files.write_json(self.lock.folder / SETTINGS_FILE, self.metadata)
        save_tokenizer(self.tokenizer, self.lock.folder / TOKENIZER_FILE)

    def follow_folder(self) -> tuple[Path, str | None]:
        """The current path of the folder, and a warning if somebody has moved or deleted it.

        A deleted folder is created again and locked.
        """
        previous = self.lock.folder
        current = self.lock.current_path()
        if current == previous:
            return current, None
        if current is not None:
            self.lock.folder = current
            return current, f"{previous} was moved to {current}: the run continues there"
        self.lock.release()
        folder = previous
        while run_files.foreign_files(folder) or run_files.is_run(folder):  # made by somebody since then
            folder = folder.with_name(f"{folder.name}-continued")
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = folder_lock.FolderLock(folder)
        run_files.mark_run(folder, self.run_id)
        self.write_metadata()
        where = "a new folder" if folder == previous else folder
        return folder, f"{previous} was deleted: the run continues in {where}, without its earlier files"


def check_available(run: Path, overwrite: bool) -> None:
    """Raise ValueError if a new run cannot be written to `run`.

    That is, if `run` is a file, is locked by another process, belongs to something else than a run, contains
    files that no run has written and that this run would replace, or contains a run and `overwrite` is not
    set.
    """
    if link := files.broken_link(run):
        raise ValueError(
            f"out_dir={run}: {link} is a symbolic link to {link.readlink()}, which leads nowhere: remove it, "
            "or choose another --out_dir"
        )
    if run.exists() and not run.is_dir():
        raise ValueError(f"out_dir={run} is a file: choose another folder")
    if content := run_files.other_content(run):
        suggestion = quote(f"out/{files.absolute_path(run).name or 'my'}-run")
        raise ValueError(
            f"out_dir={run} is {content}: choose a folder for this run, such as --out_dir={suggestion}"
        )
    check_unlocked(run)
    if names := run_files.foreign_files(run):
        raise ValueError(
            f"out_dir={run} has files that no run has written and that this run would replace: "
            f"{', '.join(names[:MAX_LISTED_FILES])}. Choose another --out_dir"
        )
    if run_files.is_run(run) and not overwrite:
        raise ValueError(
            f"out_dir={run} already holds a run: continue it with --init_from=resume, delete it and start "
            "again with --overwrite, or choose another --out_dir"
        )


def check_unlocked(run: Path) -> None:
    """Raise ValueError if another process writes to `run`."""
    if holder := folder_lock.lock_holder(run):
        raise ValueError(folder_lock.in_use_message(run, holder))


def claim_run_folder(
    run: Path,
    settings: dict[str, Any],
    decided: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    resume_step: int | None,
    overwrite: bool,
) -> RunLock:
    """Lock the folder `run`, create it if necessary, and write settings.json and tokenizer.json.

    decided: what was chosen automatically, such as the device.
    resume_step: the step at which the run resumes; the files that it wrote after this step are removed. None
        for a new run.
    overwrite: whether a new run deletes an earlier run in the folder.

    Raises ValueError if the folder cannot be written to, or another process has locked it.
    """
    run_id = uuid.uuid4().hex
    with contextlib.ExitStack() as on_error:  # after an error, this calls lock.release
        try:
            run.mkdir(parents=True, exist_ok=True)
            lock = folder_lock.FolderLock(run)
            on_error.callback(lock.release)
            if run_files.is_run(run):
                checkpoint.recover_run_folder(run)
            if resume_step is not None:
                # Keep the init_from of the first start, from which the weights came. It is "resume" now.
                settings = settings | {"init_from": saved_settings(run).get("init_from", "scratch")}
                run_id = saved_run_id(run) or run_id
                checkpoint.set_aside_later_checkpoints(run, resume_step)
                metrics_file.rewind_metrics(run, resume_step)
                embedding_snapshots.rewind_snapshots(run, resume_step)
            elif overwrite:
                run_files.delete_run(run)
            run_files.mark_run(run, run_id)
            metadata = {"run": run_id, "settings": settings, "decided": decided}
            metadata |= {"tokenizer_sha256": tokenizer_checksum(tokenizer)}
            metadata |= {"versions": versions(), "git_commit": git_commit()}
            run_lock = RunLock(run_id, lock, metadata, tokenizer)
            run_lock.write_metadata()
            on_error.pop_all()  # no error: keep the lock
            return run_lock
        except OSError as error:
            raise ValueError(
                f"out_dir={run} cannot be written to: {error.strerror or error}. Free disk space, make the "
                "folder writable, or choose another --out_dir"
            ) from error


def saved_settings(run: Path) -> dict[str, Any]:
    """The settings of a run. If `run` is not a run folder, raises ValueError that lists runs near it."""
    if not (run / SETTINGS_FILE).exists():
        raise ValueError(_no_run_message(run))
    return run_metadata(run)["settings"]


def _no_run_message(folder: Path) -> str:
    """The error message for a folder without a run. It lists the runs in and beside it, newest first."""
    paths = [*folder.glob(f"*/{SETTINGS_FILE}"), *folder.parent.glob(f"*/{SETTINGS_FILE}")]
    newest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    runs = [str(path.parent) for path in newest_first]
    where = f"{folder}/" if folder.is_absolute() else f"{folder}/ (in {Path.cwd()})"
    if not runs:
        prepare, train = shell_command("data/python_char/prepare.py"), shell_command("train.py", DEMO_CONFIG)
        return f"no trained model in {where}. Train one with: make demo, or: {prepare}, then: {train}"
    listed = ", ".join(runs[:MAX_LISTED_RUNS]) + (" ..." if len(runs) > MAX_LISTED_RUNS else "")
    return f"no trained model in {where}. Found: {listed}. Try --out_dir={quote(runs[0])}"


def run_metadata(run: Path) -> dict[str, Any]:
    """The content of settings.json: settings, decided, versions, git_commit, run (its id).

    Raises ValueError if the file is missing or damaged.
    """
    # defaults of what older versions did not write
    defaults: dict[str, Any] = {"decided": {}, "versions": {}, "git_commit": None}
    metadata = defaults | files.read_json_object(run / SETTINGS_FILE)
    for name in ("settings", "decided", "versions"):
        if not isinstance(metadata.get(name), dict):
            raise ValueError(f"{run / SETTINGS_FILE} is damaged: {name!r} is missing or not an object")
    return metadata


def saved_run_id(run: Path) -> str | None:
    """The id in settings.json; None for old runs without one.

    Raises ValueError if the file is missing or damaged.
    """
    run_id = files.read_json_object(run / SETTINGS_FILE).get("run")
    return run_id if isinstance(run_id, str) else None


def was_started_by(run: Path, launch: str | None) -> bool:
    """Whether the torchrun command with the id `launch` (see process_group.launch_id) started the run."""
    if launch is None or not (run / SETTINGS_FILE).exists():
        return False
    decided = files.read_json_object(run / SETTINGS_FILE).get("decided")
    return isinstance(decided, dict) and decided.get("launch") == launch


def load_run_tokenizer(run: Path) -> Tokenizer | None:
    """The tokenizer of a run; None if its tokenizer.json is missing.

    Raises ValueError if the file is damaged, or is not the one that the run wrote.
    """
    if not (run / TOKENIZER_FILE).exists():
        return None
    tokenizer = load_tokenizer(run / TOKENIZER_FILE)
    saved = None  # older versions wrote no checksum, and weights can be loaded without settings.json
    with contextlib.suppress(ValueError):
        saved = files.read_json_object(run / SETTINGS_FILE).get("tokenizer_sha256")
    if saved is not None and saved != tokenizer_checksum(tokenizer):
        raise ValueError(
            f"{run / TOKENIZER_FILE} is not the tokenizer of this run: its tokens would mean other text. Put "
            "the run's own file back"
        )
    return tokenizer


def check_tokenizer(run: Path, tokenizer: Tokenizer, corpus: Path) -> None:
    """Raise ValueError if a run was not trained with `tokenizer`, which is now that of its corpus.

    Also if the tokenizer.json of the run is missing, damaged, or is not the one that the run wrote.
    """
    own = load_run_tokenizer(run)
    if own is None:
        raise ValueError(f"{run / TOKENIZER_FILE} is missing: put the run's own file back")
    if own == tokenizer:
        return
    if own.has_same_vocabulary(tokenizer):
        raise ValueError(
            f"the run in {run} was trained with {_describe_separator(own)} between documents, and {corpus} "
            f"has {_describe_separator(tokenizer)} now. Prepare the corpus with --document_separator="
            f"{quote(own.document_separator or 'none')}, or start a new run"
        )
    raise ValueError(
        f"the run in {run} was trained with another tokenizer ({own.kind}, {own.vocab_size} tokens) than "
        f"that of {corpus} now ({tokenizer.kind}, {tokenizer.vocab_size} tokens). Prepare the corpus as "
        "before, or start a new run"
    )


def _describe_separator(tokenizer: Tokenizer) -> str:
    separator = tokenizer.document_separator
    return "no separator" if separator is None else f"the separator {separator!r}"


def versions() -> dict[str, str]:
    """Versions of Python, the operating system, and the packages on which the results of a run depend."""
    result = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "numpy", "safetensors", "tokenizers", "tiktoken"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[package] = importlib.metadata.version(package)
    return result


def git_commit() -> str | None:
    """The git commit of this code, followed by "+" if files were changed since; None without git."""
    try:
        commit = _git_output("rev-parse", "HEAD")
        changes = _git_output("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):  # git is not installed, or this is not a git checkout
        return None
    return f"{commit}+" if changes else commit


def _git_output(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return result.stdout.strip()
