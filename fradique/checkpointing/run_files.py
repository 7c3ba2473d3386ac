"""Which files in a folder a run has written: only these are ever deleted or overwritten.

A run writes `.run.json` into its folder before any other file. It lists the names that the run writes at the
top of the folder. Checkpoints, snapshots and the folders of wandb are recognized by their names and by the
names of their files. Runs of older versions have no `.run.json`, but a settings.json by which they are
recognized.
"""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from fradique.checkpointing import checkpoint, embedding_snapshots, metrics_file
from fradique.data.token_files import find_token_files
from fradique.io import files

MARKER = ".run.json"
SETTINGS_FILE, TOKENIZER_FILE, LOSS_PLOT_FILE = "settings.json", "tokenizer.json", "loss.png"
TOP_FILES = (  # that a run writes at the top of its folder
    SETTINGS_FILE,
    TOKENIZER_FILE,
    LOSS_PLOT_FILE,
    metrics_file.METRICS_FILE,
    metrics_file.SAMPLES_FILE,
    metrics_file.WANDB_ID_FILE,
)
CHECKPOINT_NAME = re.compile(r"best|(damaged-)?step-[0-9]{1,18}")
WANDB_FOLDER = "wandb"
WANDB_LINKS = ("latest-run", "debug.log", "debug-internal.log")  # symbolic links to files of the last run
CONTENTS = {  # what a folder is, and patterns of the file names by which it is recognized
    "a corpus": (".shards", "meta.pkl"),
    "the folder of a corpus": ("prepare.py",),  # not prepared yet
    "a run of nanoGPT": ("ckpt.pt",),
    "a checkpoint of a run": ("manifest.json",),
    "a pretrained model": (
        "config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        "pytorch_model*.bin*",
        "*.gguf",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
    ),
}
# Settings that settings.json of every version has; another program's settings.json does not have them all.
KNOWN_SETTINGS = {"out_dir", "init_from", "max_iters", "n_layer"}


def is_run(folder: Path) -> bool:
    """Whether a run of Fradique has written to `folder`."""
    return (folder / MARKER).exists() or _is_settings_of_a_run(folder / SETTINGS_FILE)


def mark_run(folder: Path, run_id: str) -> None:
    """Write the marker. From then on the names that it lists are the run's."""
    files.write_json(folder / MARKER, {"format": 1, "run": run_id, "files": list(TOP_FILES)})


def foreign_files(folder: Path) -> list[str]:
    """Names that a new run would write and that exist in `folder`, although no run has written them."""
    if is_run(folder):
        return []
    names = [name for name in TOP_FILES if _exists(folder / name)]
    names += [path.name for path in sorted(folder.glob("*")) if CHECKPOINT_NAME.fullmatch(path.name)]
    snapshots = embedding_snapshots.snapshot_paths(folder).values()
    return names + [f"{path.parent.name}/{path.name}" for path in snapshots]


def delete_run(folder: Path) -> None:
    """Delete the files that a run has written, the marker last. All other files stay."""
    id_file = folder / metrics_file.WANDB_ID_FILE
    wandb_id = id_file.read_text("utf-8") if id_file.is_file() else ""
    # first: if the folder is not writable, an OSError is raised before any change
    for name in _listed_files(folder):
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
    _delete_wandb_files(folder / WANDB_FOLDER, wandb_id)
    for path in embedding_snapshots.snapshot_paths(folder).values():
        path.unlink()
    _remove_if_empty(folder / embedding_snapshots.SNAPSHOT_FOLDER)
    for path in list(folder.glob("*")):
        if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            checkpoint.delete_checkpoint(path)
    (folder / MARKER).unlink(missing_ok=True)


def other_content(folder: Path) -> str | None:
    """What `folder` holds if it belongs to something else than a run: a corpus, a model, ...; None if not."""
    for content, patterns in CONTENTS.items():
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return content
    if find_token_files(folder):
        return "a corpus"
    path = files.absolute_path(folder)
    with suppress(RuntimeError):  # the user has no home folder
        if path == files.absolute_path(Path.home()):
            return "your home folder"
    if path == Path.cwd():
        return "the current folder"
    return "the root folder" if path == Path(path.anchor) else None


def _listed_files(folder: Path) -> list[str]:
    """The names in the marker; TOP_FILES for a run of an older version, and if the marker is damaged."""
    try:
        names = files.read_json_object(folder / MARKER)["files"]
    except (ValueError, KeyError):
        return list(TOP_FILES)
    return [name for name in names if name in TOP_FILES] if isinstance(names, list) else list(TOP_FILES)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a broken link would be replaced


def _is_settings_of_a_run(path: Path) -> bool:
    try:
        settings = files.read_json_object(path)["settings"]
    except (OSError, ValueError, KeyError):
        return False
    return isinstance(settings, dict) and settings.keys() >= KNOWN_SETTINGS


def _delete_wandb_files(folder: Path, wandb_id: str) -> None:
    """Delete the folders that wandb made for the run with this id, and its links to the last of them."""
    if not wandb_id.strip() or folder.is_symlink():
        return
    name = re.compile(rf"(offline-)?run-[0-9_]+-{re.escape(wandb_id.strip())}")
    for path in folder.glob("*"):
        if path.is_symlink() and path.name in WANDB_LINKS:
            path.unlink()
        elif name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it contains other files, or does not exist
        folder.rmdir()
