"""The run folder: who may write in it, and what it says of how the run was made."""

import contextlib
import platform
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from importlib import metadata
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
MAX_LISTED_RUNS = 10  # in a message


@dataclass
class RunLock:
    """A run folder that this process writes to."""

    name: str  # of the run: its settings.json and its checkpoints have it
    lock: folder_lock.FolderLock
    about: dict[str, Any]  # settings.json
    tokenizer: tokenizers.Tokenizer

    def describe(self) -> None:
        """Let the folder stand by itself: settings.json and tokenizer.json."""
        files.write_json(self.lock.folder / SETTINGS_FILE, self.about)
        tokenizers.save_tokenizer(self.tokenizer, self.lock.folder / TOKENIZER_FILE)

    def place(self) -> tuple[Path, str | None]:
        """Where the folder is now, and what to say where it is not where it was: it may have been moved. One
        that is gone is made anew."""
        before = self.lock.folder
        now = self.lock.current_path()
        if now == before:
            return now, None
        if now is not None:
            self.lock.folder = now
            return now, f"{before} is {now} now: the run goes on there"
        self.lock.release()
        before.mkdir(parents=True, exist_ok=True)
        self.lock = folder_lock.FolderLock(before)
        self.describe()
        return before, f"{before} was deleted: the run goes on in a new one, without what it had saved there"


def check_available(run: Path, overwrite: bool) -> None:
    """Raise ValueError where `run` holds another run and `overwrite` is not set, or is no folder."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"out_dir={run} is a file: choose another folder")
    check_unlocked(run)
    if (run / "train.bin").exists() or (run / "ckpt.pt").exists():
        raise ValueError(f"out_dir={run} holds a corpus or a run of nanoGPT: choose another --out_dir")
    held = [name for name in RUN_FILES if (run / name).exists()] or checkpoint.step_folders(run)
    if held and not overwrite:
        raise ValueError(
            f"out_dir={run} already holds a run: go on with it by --init_from=resume, begin anew by "
            "--overwrite (which deletes it), or choose another --out_dir"
        )


def check_unlocked(run: Path) -> None:
    """Raise ValueError where another process writes to `run`."""
    if who := folder_lock.lock_holder(run):
        raise ValueError(folder_lock.in_use_message(run, who))


def delete_run(run: Path) -> None:
    """Delete what a run wrote into `run`, and nothing else."""
    for path in [
        *(run / name for name in RUN_FILES),
        *checkpoint.step_folders(run),
        *run.glob("damaged-step-*"),
    ]:
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
    go_on_from: int | None,
    overwrite: bool,
) -> RunLock:
    """Make the folder ours, and let it stand by itself: settings.json and tokenizer.json.

    A run that goes on forgets what it wrote after step `go_on_from`; a new one (None) deletes what is there,
    where `overwrite` allows it. Raises ValueError where the folder cannot be written to, or another process
    writes to it.
    """
    name = uuid.uuid4().hex
    with contextlib.ExitStack() as undo:
        try:
            run.mkdir(parents=True, exist_ok=True)
            own = folder_lock.FolderLock(run)
            undo.callback(own.release)
            checkpoint.recover_run_folder(run)
            if go_on_from is not None:
                began = saved_settings(run).get("init_from", "scratch")
                settings = settings | {"init_from": began}
                name = run_id(run) or name
                checkpoint.set_aside_later_checkpoints(run, go_on_from)
                metrics_file.rewind_metrics(run, go_on_from)
                embedding_snapshots.rewind_snapshots(run, go_on_from)
            elif overwrite:
                delete_run(run)
            about = {"run": name, "settings": settings, "decided": decided}
            about |= {"versions": versions(), "git_commit": git_commit()}
            held = RunLock(name, own, about, tokenizer)
            held.describe()
            undo.pop_all()
            return held
        except OSError as error:
            raise ValueError(
                f"out_dir={run} cannot be written to: {error.strerror or error}. Make room or the folder "
                "writable, or choose another --out_dir"
            ) from error


def saved_settings(run: Path) -> dict[str, Any]:
    """The settings of a run. Raises ValueError naming other runs if `run` is not a run folder."""
    if not (run / SETTINGS_FILE).exists():
        raise ValueError(_no_run_message(run))
    return run_metadata(run)["settings"]


def _no_run_message(folder: Path) -> str:
    """no trained model in out/. Found: out/eca, out/machado. Try --out_dir=out/eca (the newest)."""
    paths = [*folder.glob(f"*/{SETTINGS_FILE}"), *folder.parent.glob(f"*/{SETTINGS_FILE}")]
    newest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    runs = [str(path.parent) for path in newest_first]
    if not runs:
        return f"no trained model in {folder}/. Train one with: make demo"
    listed = ", ".join(runs[:MAX_LISTED_RUNS]) + (" ..." if len(runs) > MAX_LISTED_RUNS else "")
    return f"no trained model in {folder}/. Found: {listed}. Try --out_dir={runs[0]}"


def run_metadata(run: Path) -> dict[str, Any]:
    """settings.json: the settings, and what was decided, with which versions, at which git commit.

    Raises ValueError where it is missing or damaged.
    """
    held = {"decided": {}, "versions": {}, "git_commit": None} | files.read_json_object(run / SETTINGS_FILE)
    for name in ("settings", "decided", "versions"):
        if not isinstance(held.get(name), dict):
            raise ValueError(f"{run / SETTINGS_FILE} is damaged: it has no {name}")
    return held


def run_id(run: Path) -> str | None:
    """The name of the run in a folder; None where it began before runs had one. Raises ValueError."""
    name = files.read_json_object(run / SETTINGS_FILE).get("run")
    return name if isinstance(name, str) else None


def was_started_by(run: Path, launch: str | None) -> bool:
    """Whether this call of torchrun has begun the run in a folder, and starts it again."""
    if launch is None or not (run / SETTINGS_FILE).exists():
        return False
    decided = files.read_json_object(run / SETTINGS_FILE).get("decided")
    return isinstance(decided, dict) and decided.get("launch") == launch


def check_tokenizer(run: Path, tokenizer: tokenizers.Tokenizer, corpus: Path) -> None:
    """Raise ValueError where a corpus was not encoded with the tokenizer of the run that goes on with it."""
    if tokenizers.load_tokenizer(run / TOKENIZER_FILE) != tokenizer:
        raise ValueError(
            f"the run in {run} was trained with another tokenizer than {corpus} is encoded with now ("
            f"{tokenizer.kind}, {tokenizer.vocab_size} tokens): prepare the corpus as it was, or begin anew"
        )


def versions() -> dict[str, str]:
    """Of what the numbers of a run may depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "numpy", "safetensors", "tokenizers", "tiktoken"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the code that runs, with "+" where files differ from it; None outside a checkout."""
    home = Path(__file__).resolve().parent
    try:
        answers = [
            subprocess.run(
                ["git", "-C", str(home), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return answers[0] + ("+" if answers[1] else "")
