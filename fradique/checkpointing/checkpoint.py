"""Checkpoints: safetensors and JSON with checksums, written atomically; the most recent ones and the best.

A run folder holds `step-00002000/`, ... (the most recent ones) and `best/`. A checkpoint is written to a
temporary folder, synced and renamed; `manifest.json`, with the sha256 of every other file, is written last.
So a folder under its final name is complete, and a file that is damaged later has another checksum.
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
FORMAT = 1
MAX_WARNINGS = 5  # one for each damaged checkpoint
# What a crash can leave behind: .best.123.tmp, .step-00000020.old, .settings.json.123.tmp
STEP_NAME = re.compile(r"step-[0-9]{1,18}")
LEFTOVER_NAME = re.compile(r"\.(step-\d+|best|\w+\.(json|jsonl|txt))(\.\d+)?\.(tmp|old)")


@dataclass
class Checkpoint:
    """The content of a checkpoint folder."""

    config: dict[str, Any]  # model.json: the GPTConfig
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # `<field>/<parameter>`
    state: dict[str, Any]  # state.json: step, best loss, scaler, clock
    run: str | None = None  # id of its run, as in settings.json
    folder: Path | None = None  # it was read from


def step_folder(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / f"step-{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    folders = [path for path in run.glob("step-*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a step checkpoint."""
    return int(folder.name.removeprefix("step-"))


class CheckpointWriter(Protocol):
    """Who writes the tensors of a checkpoint: one process (LocalWriter) or all ranks (fsdp.ShardedWriter)."""

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write a safetensors file."""

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on every rank."""

    def all_ranks(self, value: bool) -> bool:
        """Whether `value` is true on every rank."""


class LocalWriter:
    """The CheckpointWriter of a single process that holds whole tensors."""

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        safetensors.torch.save_file({name: x.detach().contiguous() for name, x in tensors.items()}, path)

    def on_rank0(self, function: Callable[[], T]) -> T:
        return function()

    def all_ranks(self, value: bool) -> bool:
        return value


def write_checkpoint(folder: Path, checkpoint: Checkpoint, writer: CheckpointWriter | None = None) -> None:
    """Write `folder` atomically. Raises ValueError if it cannot be written."""
    writer = writer or LocalWriter()
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        writer.on_rank0(lambda: _make_empty(temporary))
        writer.write_tensors(temporary / "model.safetensors", checkpoint.model)
        writer.write_tensors(temporary / "optimizer.safetensors", checkpoint.optimizer)
        writer.on_rank0(lambda: _complete(temporary, folder, checkpoint))
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"the checkpoint {folder} could not be written: {error}. Earlier checkpoints are untouched; free "
            "disk space or make the folder writable, then continue with --init_from=resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(temporary: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """Add the JSON files and the checksums to the tensors, and rename `temporary` to `folder`."""
    (temporary / "model.json").write_text(format_json(checkpoint.config), encoding="utf-8")
    (temporary / "state.json").write_text(format_json(checkpoint.state), encoding="utf-8")
    for path in temporary.glob("*.safetensors"):  # safetensors makes them readable only by their owner
        shutil.copymode(temporary / "model.json", path)
    checksums = {path.name: files.checksum(path) for path in sorted(temporary.iterdir())}
    manifest = format_json({"format": FORMAT, "run": checkpoint.run, "sha256": checksums})
    (temporary / "manifest.json").write_text(manifest, encoding="utf-8")
    replace_folder(temporary, folder)


def save_and_prune(
    run: Path, checkpoint: Checkpoint, *, best: bool, keep: int, writer: CheckpointWriter | None = None
) -> None:
    """Write the step checkpoint, and `best/` if it is the best; remove all but the last `keep` steps.

    Raises ValueError, and writes nothing, if a weight or the optimizer state is not finite.
    """
    writer = writer or LocalWriter()
    step = checkpoint.state["step"]
    for name, tensors in (("weights", checkpoint.model), ("optimizer state", checkpoint.optimizer)):
        if not writer.all_ranks(all_finite(tensors)):
            raise ValueError(
                f"the {name} at step {step} are not finite and are not saved; the checkpoints in {run} are "
                "good: continue from the last one with --init_from=resume and a lower learning_rate"
            )
    if best:
        # Before the step checkpoint, so that a crash between the two leaves no step whose best/ is missing;
        # and a copy, so that no damaged file affects both. It is for inference: no optimizer state.
        write_checkpoint(run / "best", replace(checkpoint, optimizer={}), writer)
    write_checkpoint(step_folder(run, step), checkpoint, writer)
    writer.on_rank0(lambda: prune_checkpoints(run, keep))


def recover_run_folder(run: Path) -> None:
    """Clean up after a crash: restore folders that were being replaced, remove incomplete files."""
    for old in [path for path in run.glob(".*.old") if LEFTOVER_NAME.fullmatch(path.name)]:
        original = run / old.name[1 : -len(".old")]
        if original.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(original)
    for temporary in [path for path in run.glob(".*.tmp") if LEFTOVER_NAME.fullmatch(path.name)]:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def set_aside_later_checkpoints(run: Path, step: int) -> None:
    """Rename checkpoints after `step` to damaged-step-...: a resumed run skipped them and writes new ones."""
    for folder in step_folders(run):
        if step_of(folder) > step:
            renamed = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            folder.rename(renamed)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the last `keep` step checkpoints, but not `best/`. Best effort: errors are ignored."""
    for folder in step_folders(run)[:-keep]:
        temporary = folder.with_name(f".{folder.name}.tmp")  # a half-removed folder is no checkpoint
        with suppress(OSError):
            folder.rename(temporary)
            shutil.rmtree(temporary, ignore_errors=True)


def verify_checkpoint(folder: Path, run: str | None = None) -> None:
    """Raise ValueError naming the first file that is missing or damaged; or if it is not of the run `run`."""
    manifest = read_json_object(folder / "manifest.json")
    checksums = manifest.get("sha256")
    if manifest.get("format") != FORMAT or not isinstance(checksums, dict):
        raise ValueError(f"{folder / 'manifest.json'} is of another version or damaged")
    if run is not None and manifest.get("run") not in (None, run):
        raise ValueError(f"{folder} is a checkpoint of another run: it was copied or moved here")
    for name in ("model.safetensors", "model.json", "optimizer.safetensors", "state.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        try:
            checksum = files.checksum(folder / name)
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read: {error.strerror}") from error
        if checksums.get(name) != checksum:
            raise ValueError(f"{folder / name} is damaged: its sha256 is not the one in manifest.json")


def read_checkpoint_metadata(folder: Path) -> Checkpoint:
    """A checkpoint without its tensors. Raises ValueError naming a damaged file."""
    config, state = read_json_object(folder / "model.json"), read_json_object(folder / "state.json")
    return Checkpoint(config, {}, {}, state, folder=folder)


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The shapes of the tensors in a file, as meta tensors. Raises ValueError if it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read_checkpoint(folder: Path, with_optimizer: bool = True, verified: bool = False) -> Checkpoint:
    """Verify (unless `verified`) and read a checkpoint. Raises ValueError naming a damaged file."""
    if not verified:
        verify_checkpoint(folder)
    try:
        model = _read_tensors(folder / "model.safetensors")
        optimizer = _read_tensors(folder / "optimizer.safetensors") if with_optimizer else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from error
    return replace(read_checkpoint_metadata(folder), model=model, optimizer=optimizer)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Copies of the tensors in a file, which is mapped again for each: the pages read are freed each time."""
    with safetensors.safe_open(path, framework="pt") as file:
        names = list(file.keys())
    tensors = {}
    for name in names:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors[name] = file.get_tensor(name).clone()
    return tensors


def newest_checkpoint(run: Path, warn: Callable[[str], None], run_id: str | None = None) -> Path:
    """The newest complete step checkpoint of a run.

    Damaged ones, and those of another run than `run_id`, are skipped with a warning. Raises ValueError if
    there is none.
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
                warn(f"and {skipped - MAX_WARNINGS:,} more checkpoints were skipped")
            return folder
    raise ValueError(
        f"{run} has no checkpoint to resume from"
        + (f": all {len(folders)} are damaged" if folders else "")
        + (f"; --init_from={run} starts with its best weights" if (run / "best").exists() else "")
        + "; --overwrite starts again"
    )


def check_tensors_match(expected: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Raise ValueError listing every tensor that is missing, unexpected, or of another shape or dtype."""
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not in this model" for name in tensors if name not in expected]
    shared = [(name, tensors[name], tensor) for name, tensor in expected.items() if name in tensors]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, and {tuple(parameter.shape)} in this model"
        for name, tensor, parameter in shared
        if tensor.shape != parameter.shape
    ]
    problems += [
        f"{name} has dtype {tensor.dtype}, and {parameter.dtype} in this model"
        for name, tensor, parameter in shared
        if tensor.dtype != parameter.dtype
    ]
    if problems:
        lines = "\n  - ".join(problems)
        raise ValueError(f"{source} does not fit this model, {len(problems)} tensors differ:\n  - {lines}")


def assign_parameters(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Make `tensors` the parameters of `model`, which may be on the meta device, without copying them.

    Raises ValueError if they do not match (see check_tensors_match) or are not finite.
    """
    parameters = dict(model.named_parameters())  # tied parameters once, under their first name
    check_tensors_match(parameters, tensors, source)
    if not all_finite(tensors):
        raise ValueError(f"{source} has NaN or infinity in its weights: use an earlier checkpoint")
    replacements = {id(p): nn.Parameter(tensors[name], p.requires_grad) for name, p in parameters.items()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, replacements[id(parameter)])


def copy_parameters(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors` into the parameters of `model`. Raises ValueError if they do not match."""
    parameters = dict(model.named_parameters())  # tied parameters once, under their first name
    check_tensors_match(parameters, tensors, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def all_finite(tensors: dict[str, Tensor]) -> bool:
    """Whether all elements of all tensors are finite; of sharded tensors, those of this rank."""
    return all(bool(torch.isfinite(local_tensor(tensor)).all()) for tensor in tensors.values())
