"""The run folder out/<run>/: its lock, and settings.json with the settings and origin of the run."""

import contextlib
import importlib.metadata
import platform
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fradique.checkpointing import checkpoint, embedding_snapshots, metrics_file
from fradique.io import files, folder_lock
from fradique.tokenizer import tokenizer as tokenizers

SETTINGS_FILE, TOKENIZER_FILE, LOSS_PLOT_FILE = "settings.json", "tokenizer.json", "loss.png"
RUN_FILES = (
    SETTINGS_FILE,
    TOKENIZER_FILE,
    LOSS_PLOT_FILE,
    metrics_file.METRICS_FILE,
    metrics_file.SAMPLES_FILE,
    metrics_file.WANDB_ID_FILE,
    embedding_snapshots.SNAPSHOT_FOLDER,
    "wandb",
    "best",
)
MAX_LISTED_RUNS = 10  # in an error message


@dataclass
class RunLock:
    """A run folder that this process has locked and writes to."""

    run_id: str  # in settings.json and in every checkpoint
    lock: folder_lock.FolderLock
    metadata: dict[str, Any]  # settings.json
    tokenizer: tokenizers.Tokenizer

    def write_metadata(self) -> None:
        """Write settings.json and tokenizer.json, so that the folder is self-contained."""
        files.write_json(self.lock.folder / SETTINGS_FILE, self.metadata)
        tokenizers.save_tokenizer(self.tokenizer, self.lock.folder / TOKENIZER_FILE)

    def follow_folder(self) -> tuple[Path, str | None]:
        """The current path of the folder, and a warning if somebody has moved or deleted it.

        A deleted folder is created again.
        """
        previous = self.lock.folder
        current = self.lock.current_path()
        if current == previous:
            return current, None
        if current is not None:
            self.lock.folder = current
            return current, f"{previous} was moved to {current}: the run continues there"
        self.lock.release()
        previous.mkdir(parents=True, exist_ok=True)
        self.lock = folder_lock.FolderLock(previous)
        self.write_metadata()
        return (
            previous,
            f"{previous} was deleted: the run continues in a new folder, without its earlier files",
        )


def check_available(run: Path, overwrite: bool) -> None:
    """Raise ValueError if `run` is no folder, or has a run already and `overwrite` is not set."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"out_dir={run} is a file: choose another folder")
    check_unlocked(run)
    if (run / "train.bin").exists() or (run / "ckpt.pt").exists():
        raise ValueError(f"out_dir={run} holds a corpus or a run of nanoGPT: choose another --out_dir")
    existing = [name for name in RUN_FILES if (run / name).exists()] or checkpoint.step_folders(run)
    if existing and not overwrite:
        raise ValueError(
            f"out_dir={run} already holds a run: continue it with --init_from=resume, delete it and start "
            "again with --overwrite, or choose another --out_dir"
        )


def check_unlocked(run: Path) -> None:
    """Raise ValueError if another process writes to `run`."""
    if holder := folder_lock.lock_holder(run):
        raise ValueError(folder_lock.in_use_message(run, holder))


def delete_run(run: Path) -> None:
    """Delete the files of a run, and no other files in its folder."""
    paths = [run / name for name in RUN_FILES]
    for path in [*paths, *checkpoint.step_folders(run), *run.glob("damaged-step-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def claim_run_folder(
    run: Path,
    settings: dict[str, Any],
    decided: dict[str, Any],
    tokenizer: tokenizers.Tokenizer,
    *,
    resume_step: int | None,
    overwrite: bool,
) -> RunLock:
    """Lock the folder and write settings.json and tokenizer.json.

    A run that resumes at `resume_step` removes what it wrote after that step; a new run (None) deletes an
    earlier run if `overwrite`. `decided`: what was chosen automatically. Raises ValueError if the folder is
    not writable, or another process writes to it.
    """
    identity = uuid.uuid4().hex
    with contextlib.ExitStack() as on_error:
        try:
            run.mkdir(parents=True, exist_ok=True)
            lock = folder_lock.FolderLock(run)
            on_error.callback(lock.release)
            checkpoint.recover_run_folder(run)
            if resume_step is not None:
                settings = settings | {"init_from": saved_settings(run).get("init_from", "scratch")}
                identity = run_id(run) or identity
                checkpoint.set_aside_later_checkpoints(run, resume_step)
                metrics_file.rewind_metrics(run, resume_step)
                embedding_snapshots.rewind_snapshots(run, resume_step)
            elif overwrite:
                delete_run(run)
            metadata = {"run": identity, "settings": settings, "decided": decided}
            metadata |= {"versions": versions(), "git_commit": git_commit()}
            run_lock = RunLock(identity, lock, metadata, tokenizer)
            run_lock.write_metadata()
            on_error.pop_all()
            return run_lock
        except OSError as error:
            raise ValueError(
                f"out_dir={run} cannot be written to: {error.strerror or error}. Free disk space, make the "
                "folder writable, or choose another --out_dir"
            ) from error


def saved_settings(run: Path) -> dict[str, Any]:
    """The settings of a run. Raises ValueError naming other runs if `run` is not a run folder."""
    if not (run / SETTINGS_FILE).exists():
        raise ValueError(_no_run_message(run))
    return run_metadata(run)["settings"]


def _no_run_message(folder: Path) -> str:
    """An error message that lists the runs in and beside `folder`, newest first."""
    paths = [*folder.glob(f"*/{SETTINGS_FILE}"), *folder.parent.glob(f"*/{SETTINGS_FILE}")]
    newest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    runs = [str(path.parent) for path in newest_first]
    if not runs:
        return f"no trained model in {folder}/. Train one with: make demo"
    listed = ", ".join(runs[:MAX_LISTED_RUNS]) + (" ..." if len(runs) > MAX_LISTED_RUNS else "")
    return f"no trained model in {folder}/. Found: {listed}. Try --out_dir={runs[0]}"


def run_metadata(run: Path) -> dict[str, Any]:
    """settings.json: the settings, automatic choices, package versions and git commit.

    Raises ValueError if it is missing or damaged.
    """
    defaults: dict[str, Any] = {"decided": {}, "versions": {}, "git_commit": None}
    values = defaults | files.read_json_object(run / SETTINGS_FILE)
    for name in ("settings", "decided", "versions"):
        if not isinstance(values.get(name), dict):
            raise ValueError(f"{run / SETTINGS_FILE} is damaged: it has no {name}")
    return values


def run_id(run: Path) -> str | None:
    """The id of the run in a folder; None for old runs without one. Raises ValueError if it is damaged."""
    identity = files.read_json_object(run / SETTINGS_FILE).get("run")
    return identity if isinstance(identity, str) else None


def was_started_by(run: Path, launch: str | None) -> bool:
    """Whether the run in a folder was started by this call of torchrun, which restarts it now."""
    if launch is None or not (run / SETTINGS_FILE).exists():
        return False
    decided = files.read_json_object(run / SETTINGS_FILE).get("decided")
    return isinstance(decided, dict) and decided.get("launch") == launch


def check_tokenizer(run: Path, tokenizer: tokenizers.Tokenizer, corpus: Path) -> None:
    """Raise ValueError if the corpus of a resumed run is now encoded with another tokenizer."""
    if tokenizers.load_tokenizer(run / TOKENIZER_FILE) != tokenizer:
        raise ValueError(
            f"the run in {run} was trained with another tokenizer than {corpus} is encoded with now ("
            f"{tokenizer.kind}, {tokenizer.vocab_size} tokens): prepare it as before, or begin a new run"
        )


def versions() -> dict[str, str]:
    """Versions of Python, the platform, and the packages that the results of a run depend on."""
    result = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "numpy", "safetensors", "tokenizers", "tiktoken"):
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def git_commit() -> str | None:
    """The commit of this code, with "+" if files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parent
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")
