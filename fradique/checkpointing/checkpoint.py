"""Checkpoints: folders of safetensors and JSON files with checksums, written atomically.

A run folder contains the most recent step checkpoints (`step-00002000/`, ...) and the best one (`best/`). A
checkpoint is written to a temporary folder, synced to the disk, and renamed, so under its final name it is
complete. Its `manifest.json` contains the SHA-256 of every other file, so later damage is noticed.
"""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fradique.distributed.process_group import local_tensor
from fradique.io import files
from fradique.io.files import format_json, read_json_object, replace_folder

T = TypeVar("T")
FORMAT = 1  # version of the checkpoint format, in manifest.json
MAX_WARNINGS = 5  # about damaged checkpoints
FILES = ("model.safetensors", "optimizer.safetensors", "model.json", "state.json", "manifest.json")
SAFETENSORS_TEMPORARY = re.compile(r"\.tmp\w+")  # left if the process was killed while it wrote weights
STEP_NAME = re.compile(r"step-[0-9]{1,18}")
# What a crash can leave behind: .best.123.tmp, .step-00000020.old, .settings.json.123.tmp, .loss.123.tmp.png
LEFTOVER_NAME = re.compile(
    r"\.(step-\d+|best)(\.\d+)?\.(tmp|old)|\.loss\.\d+\.tmp\.png"
    r"|\.(settings\.json|tokenizer\.json|metrics\.jsonl|samples\.txt|wandb_id\.txt|\.run\.json)\.\d+\.tmp"
)


@dataclass
class Checkpoint:
    """The content of a checkpoint folder."""

    config: dict[str, Any]  # model.json: the GPTConfig
    model: dict[str, Tensor]  # parameter name -> weights
    optimizer: dict[str, Tensor]  # for example, exp_avg/transformer.wte.weight -> that state of AdamW
    state: dict[str, Any]  # state.json: step, best loss, scaler, clock
    run_id: str | None = None  # "run" in manifest.json and in settings.json
    folder: Path | None = None  # from which the checkpoint was read


def step_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint at `step`."""
    return run / f"step-{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """The folders of the step checkpoints of a run, oldest first."""
    folders = [path for path in run.glob("step-*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a step checkpoint."""
    return int(folder.name.removeprefix("step-"))


class CheckpointWriter(Protocol):
    """How a checkpoint is written: by one process (LocalWriter) or by all ranks (fsdp.ShardedWriter)."""

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write a safetensors file. Raises OSError or SafetensorError."""

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on every rank."""

    def all_ranks(self, value: bool) -> bool:
        """Whether `value` is true on every rank."""


class LocalWriter:
    """The CheckpointWriter of a single process, whose tensors are not sharded."""

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        safetensors.torch.save_file({name: x.detach().contiguous() for name, x in tensors.items()}, path)

    def on_rank0(self, function: Callable[[], T]) -> T:
        return function()

    def all_ranks(self, value: bool) -> bool:
        return value


def write_checkpoint(folder: Path, checkpoint: Checkpoint, writer: CheckpointWriter | None = None) -> None:
    """Write a checkpoint to `folder` atomically. Raises ValueError if it cannot be written.

    All ranks must call this if `writer` is a ShardedWriter. The default is a LocalWriter.
    """
    writer = writer or LocalWriter()
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        writer.on_rank0(lambda: _make_empty_folder(temporary))
        writer.write_tensors(temporary / "model.safetensors", checkpoint.model)
        writer.write_tensors(temporary / "optimizer.safetensors", checkpoint.optimizer)
        writer.on_rank0(lambda: _write_json_and_rename(temporary, folder, checkpoint))
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"the checkpoint {folder} could not be written: {error}. Earlier checkpoints are untouched. Free "
            "disk space or make the folder writable, then continue with --init_from=resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_json_and_rename(temporary: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """Add the JSON files to the safetensors files in `temporary`, and rename it to `folder`."""
    (temporary / "model.json").write_text(format_json(checkpoint.config), encoding="utf-8", newline="\n")
    (temporary / "state.json").write_text(format_json(checkpoint.state), encoding="utf-8", newline="\n")
    for path in temporary.glob("*.safetensors"):
        shutil.copymode(temporary / "model.json", path)  # safetensors lets only the owner read its files
    checksums = {path.name: files.checksum(path) for path in sorted(temporary.iterdir())}
    manifest = format_json({"format": FORMAT, "run": checkpoint.run_id, "sha256": checksums})
    (temporary / "manifest.json").write_text(manifest, encoding="utf-8", newline="\n")
    replace_folder(temporary, folder, FILES)


def save_and_prune(
    run: Path, checkpoint: Checkpoint, *, best: bool, keep: int, writer: CheckpointWriter | None = None
) -> None:
    """Write a step checkpoint, and also `best/` if `best`. Remove all but the last `keep` step checkpoints.

    Raises ValueError if a weight or the optimizer state is not finite (then nothing is written), or if a
    checkpoint cannot be written.
    """
    writer = writer or LocalWriter()
    step = checkpoint.state["step"]
    for subject, tensors in (("weights are", checkpoint.model), ("optimizer state is", checkpoint.optimizer)):
        if not writer.all_ranks(all_finite(tensors)):
            raise ValueError(
                f"step {step} was not saved, because its {subject} not finite (NaN or infinity). Continue "
                f"from the last checkpoint in {run} with --init_from=resume and a lower --learning_rate"
            )
    if best:
        # best/ is written first, so that a crash between the two leaves no step checkpoint without its best/.
        # It is a copy and not a link, so that damage to a file affects only one of them. It has no optimizer
        # state, because it serves for inference.
        write_checkpoint(run / "best", replace(checkpoint, optimizer={}), writer)
    write_checkpoint(step_folder(run, step), checkpoint, writer)
    writer.on_rank0(lambda: prune_checkpoints(run, keep))


def recover_run_folder(run: Path) -> None:
    """Clean up a run after a crash: restore folders that were being replaced, and remove temporary files."""
    for old in [path for path in run.glob(".*.old") if LEFTOVER_NAME.fullmatch(path.name)]:
        original = run / old.name.removeprefix(".").removesuffix(".old")
        if original.exists():  # the crash came after the new folder was renamed
            files.merge_old_folder(old, original, FILES)
        else:
            old.rename(original)
    leftovers = [*run.glob(".*.tmp"), *run.glob(".*.tmp.png")]
    for temporary in [path for path in leftovers if LEFTOVER_NAME.fullmatch(path.name)]:
        if temporary.is_dir():
            delete_checkpoint(temporary)
        else:
            temporary.unlink(missing_ok=True)


def set_aside_later_checkpoints(run: Path, step: int) -> None:
    """Rename the checkpoints after `step` to damaged-step-..., before a run resumes at `step`.

    The run skipped them because they are damaged or of another run, and writes these steps again.
    """
    for folder in step_folders(run):
        if step_of(folder) > step:
            renamed = folder.with_name(f"damaged-{folder.name}")
            delete_checkpoint(renamed)
            if not renamed.exists():
                folder.rename(renamed)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the last `keep` >= 1 step checkpoints. Best effort: errors are ignored."""
    for folder in step_folders(run)[:-keep]:
        # Renamed first, so that a crash leaves no incomplete folder with the name of a checkpoint.
        temporary = folder.with_name(f".{folder.name}.tmp")
        with suppress(OSError):
            folder.rename(temporary)
            delete_checkpoint(temporary)


def delete_checkpoint(folder: Path) -> None:
    """Delete the files of a checkpoint, and its folder. Best effort: errors are ignored.

    If somebody has put other files into the folder, they stay, in a folder with the prefix "files-of-".
    """
    with suppress(OSError):
        for path in folder.iterdir():
            if (path.name in FILES or SAFETENSORS_TEMPORARY.fullmatch(path.name)) and not path.is_dir():
                path.unlink(missing_ok=True)
        if any(folder.iterdir()):
            name = folder.name.removeprefix(".").removesuffix(".tmp")
            folder.rename(folder.with_name(f"files-of-{name}"))
        else:
            folder.rmdir()


def verify_checkpoint(folder: Path, run_id: str | None = None) -> None:
    """Raise ValueError naming the first file of a checkpoint that is missing or damaged.

    Also raises ValueError if `run_id` is given and the checkpoint is of another run.
    """
    manifest = read_json_object(folder / "manifest.json")
    checksums = manifest.get("sha256")
    if manifest.get("format") != FORMAT or not isinstance(checksums, dict):
        raise ValueError(f"{folder / 'manifest.json'} is damaged or of another version of Fradique")
    if run_id is not None and manifest.get("run") not in (None, run_id):  # None: written by an older version
        raise ValueError(f"{folder} is a checkpoint of another run: it was copied or moved here")
    for name in ("model.safetensors", "model.json", "optimizer.safetensors", "state.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        try:
            checksum = files.checksum(folder / name)
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read: {error.strerror}") from error
        if checksums.get(name) != checksum:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the one in manifest.json")


def read_checkpoint_metadata(folder: Path) -> Checkpoint:
    """A checkpoint without its tensors. Raises ValueError naming a damaged file."""
    config, state = read_json_object(folder / "model.json"), read_json_object(folder / "state.json")
    return Checkpoint(config, model={}, optimizer={}, state=state, folder=folder)


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The shapes of the tensors in a safetensors file, as float32 tensors on the meta device.

    Raises ValueError if the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read_checkpoint(folder: Path, with_optimizer: bool = True, verified: bool = False) -> Checkpoint:
    """Read a checkpoint, after verifying it unless `verified`. Raises ValueError naming a damaged file."""
    if not verified:
        verify_checkpoint(folder)
    try:
        model = _read_tensors(folder / "model.safetensors")
        optimizer = _read_tensors(folder / "optimizer.safetensors") if with_optimizer else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    return replace(read_checkpoint_metadata(folder), model=model, optimizer=optimizer)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Copies of the tensors in a safetensors file.

    The file is mapped into memory anew for each tensor. A single mapping would keep all pages that were read
    in memory until the last tensor is copied.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        names = list(file.keys())
    tensors = {}
    for name in names:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors[name] = file.get_tensor(name).clone()
    return tensors


def newest_checkpoint(run: Path, warn: Callable[[str], None], run_id: str | None = None) -> Path:
    """The folder of the newest step checkpoint of a run that is not damaged.

    Damaged checkpoints are skipped with a warning; so are those of another run, if `run_id` is given. Raises
    ValueError if none is left.
    """
    folders, skipped = step_folders(run), 0
    for folder in reversed(folders):
        try:
            verify_checkpoint(folder, run_id)
        except ValueError as error:
            skipped += 1
            if skipped <= MAX_WARNINGS:
                warn(f"{error}; skipping this checkpoint")
        else:
            if skipped > MAX_WARNINGS:
                warn(f"skipped {skipped:,} checkpoints in all")
            return folder
    has_best = (run / "best").exists()
    raise ValueError(
        f"{run} has no checkpoint to resume from"
        + (": all of them are damaged or of another run. " if folders else ". ")
        + (
            f"To train its best weights further: --init_from={run} and another --out_dir. "
            if has_best
            else ""
        )
        + "To start again: --overwrite"
    )


def check_tensors_match(expected: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Raise ValueError listing every tensor that is missing, unexpected, or of another shape or dtype."""
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not in this model" for name in tensors if name not in expected]
    for name, parameter in expected.items():
        tensor = tensors.get(name, parameter)
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, and {tuple(parameter.shape)} in this model"
            problems.append(f"{name} has shape {shapes}")
        if tensor.dtype != parameter.dtype:
            problems.append(f"{name} has dtype {tensor.dtype}, and {parameter.dtype} in this model")
    if problems:
        raise ValueError(f"{source} does not fit this model:\n  - " + "\n  - ".join(problems))


def assign_parameters(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Make `tensors` the parameters of `model` without copying them. The model may be on the meta device.

    Raises ValueError if they do not match (see check_tensors_match) or are not finite.
    """
    parameters = dict(model.named_parameters())  # tied parameters once, under their first name
    check_tensors_match(parameters, tensors, source)
    if not all_finite(tensors):
        raise ValueError(f"{source} has NaN or infinity in its weights: use an earlier checkpoint")
    new_parameters = {p: nn.Parameter(tensors[name], p.requires_grad) for name, p in parameters.items()}
    for module in model.modules():
        # remove_duplicate=False: a tied parameter is replaced under each of its names
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, new_parameters[parameter])


def copy_parameters(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors` into the parameters of `model`. Raises ValueError if they do not match."""
    parameters = dict(model.named_parameters())  # tied parameters once, under their first name
    check_tensors_match(parameters, tensors, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def all_finite(tensors: dict[str, Tensor]) -> bool:
    """Whether all elements of all tensors are finite. Of a sharded tensor, only this rank's shard counts."""
    return all(bool(torch.isfinite(local_tensor(tensor)).all()) for tensor in tensors.values())
