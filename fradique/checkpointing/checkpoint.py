"""Checkpoints: atomic, checksummed, safetensors + JSON; the newest complete one, and the best.

A run folder holds `step-00002000/`, … (the last k) and `best/`. Each is made beside its place, synced, and
renamed; `manifest.json`, with the sha256 of every other file, is written last. So a folder under its final
name is complete, and a file that was damaged later is found out by its sum.
"""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fradique.distributed.process_group import local_tensor
from fradique.io import files
from fradique.io.files import format_json, fsync, read_json_object, replace_folder

T = TypeVar("T")
FORMAT = 1
MAX_NAMED = 5  # damaged checkpoints that are named one by one
# What a crash may leave: .best.123.tmp, .step-00000020.old, .settings.json.123.tmp
STEP = re.compile(r"step-[0-9]{1,18}")
LEFTOVER = re.compile(r"\.(step-\d+|best|\w+\.(json|jsonl|txt))(\.\d+)?\.(tmp|old)")


@dataclass
class Checkpoint:
    """What a checkpoint folder holds, in memory."""

    config: dict[str, Any]  # model.json: the GPTConfig
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # `<field>/<parameter>`
    state: dict[str, Any]  # state.json: step, best loss, scaler, clock
    run: str | None = None  # the name of the run that it is of: settings.json has the same
    folder: Path | None = None  # that it was read from


def step_folder(run: Path, step: int) -> Path:
    return run / f"step-{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    found = [p for p in run.glob("step-*") if STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


class LocalWriter:
    """One process that writes a checkpoint by itself: the other way is `sharding.Together`."""

    @staticmethod
    def write(path: Path, tensors: dict[str, Tensor]) -> None:
        safetensors.torch.save_file({n: x.detach().contiguous() for n, x in tensors.items()}, path)

    @staticmethod
    def once(do: Callable[[], T]) -> T:
        """Do what one process does for all."""
        return do()

    @staticmethod
    def every(sound: bool) -> bool:
        return sound


def write_checkpoint(folder: Path, checkpoint: Checkpoint, way: type[LocalWriter] = LocalWriter) -> None:
    """Write `folder`, whole or not at all. Raises ValueError where it cannot be written."""
    beside = folder.with_name(f".{folder.name}.tmp")
    try:
        way.once(lambda: _make_anew(beside))
        way.write(beside / "model.safetensors", checkpoint.model)
        way.write(beside / "optimizer.safetensors", checkpoint.optimizer)
        way.once(lambda: _complete(beside, folder, checkpoint))
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"the checkpoint {folder} could not be written: {error}. Earlier checkpoints are untouched; make "
            "room or the folder writable, then go on with --init_from=resume"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(beside: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """What belongs to the tensors, the sums of all files, and the name under which they are found."""
    (beside / "model.json").write_text(format_json(checkpoint.config), encoding="utf-8")
    (beside / "state.json").write_text(format_json(checkpoint.state), encoding="utf-8")
    for path in beside.glob("*.safetensors"):  # written for the owner alone; others may read them too
        shutil.copymode(beside / "model.json", path)
    sums = {path.name: files.checksum(path) for path in sorted(beside.iterdir())}
    manifest = format_json({"format": FORMAT, "run": checkpoint.run, "sha256": sums})
    (beside / "manifest.json").write_text(manifest, encoding="utf-8")
    for path in [*beside.iterdir(), beside]:
        fsync(path)
    replace_folder(beside, folder)


def save_and_prune(
    run: Path, checkpoint: Checkpoint, *, best: bool, last: int, way: type[LocalWriter] = LocalWriter
) -> None:
    """Save a step of a run, as `best` too where it is that, and let all but the `last` steps go.

    Raises ValueError where weights or optimizer are not finite: nothing is written, and what is there stays.
    """
    step = checkpoint.state["step"]
    for what, tensors in (("weights", checkpoint.model), ("optimizer's averages", checkpoint.optimizer)):
        if not way.every(all_finite(tensors)):
            raise ValueError(
                f"the {what} at step {step} are not finite and are not saved; the checkpoints in {run} are "
                "good: go on from the last with --init_from=resume and a lower learning_rate"
            )
    if best:  # first, and a copy of its own: no crash between the two, and no damage, takes it from the run
        write_checkpoint(
            run / "best", replace(checkpoint, optimizer={}), way
        )  # to write with, no optimizer is needed
    write_checkpoint(step_folder(run, step), checkpoint, way)
    way.once(lambda: prune_checkpoints(run, last))


def recover_run_folder(run: Path) -> None:
    """Clear up after a crash: put back what had stepped aside, remove what was never finished."""
    for aside in [path for path in run.glob(".*.old") if LEFTOVER.fullmatch(path.name)]:
        place = run / aside.name[1 : -len(".old")]
        if place.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(place)
    for unfinished in [path for path in run.glob(".*.tmp") if LEFTOVER.fullmatch(path.name)]:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def set_aside_later_checkpoints(run: Path, step: int) -> None:
    """Rename checkpoints after `step` to damaged-…: a resumed run passed over them, and goes there anew."""
    for folder in step_folders(run):
        if int(folder.name[5:]) > step:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the last `keep` step checkpoints. `best/` stays."""
    for folder in step_folders(run)[:-keep]:
        doomed = folder.with_name(f".{folder.name}.tmp")  # under this name it is no checkpoint any more
        with suppress(OSError):  # a folder that will not go is no reason to stop a run
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def verify_checkpoint(folder: Path, run: str | None = None) -> None:
    """Raise ValueError naming the first file of a checkpoint that is missing or has another sum; or where it
    is of another run than `run`, if that is given."""
    manifest = read_json_object(folder / "manifest.json")
    sums = manifest.get("sha256")
    if manifest.get("format") != FORMAT or not isinstance(sums, dict):
        raise ValueError(f"{folder / 'manifest.json'} is of another version or damaged")
    if run is not None and manifest.get("run") not in (None, run):
        raise ValueError(f"{folder} is a checkpoint of another run: it was copied or moved here")
    for name in ("model.safetensors", "model.json", "optimizer.safetensors", "state.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        try:
            found = files.checksum(folder / name)
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read: {error.strerror}") from error
        if sums.get(name) != found:
            raise ValueError(f"{folder / name} is damaged: its sha256 is not the one in manifest.json")


def read_checkpoint_metadata(folder: Path) -> Checkpoint:
    """A checkpoint without its tensors. Raises ValueError naming what is damaged."""
    return Checkpoint(
        read_json_object(folder / "model.json"),
        {},
        {},
        read_json_object(folder / "state.json"),
        folder=folder,
    )


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file without their numbers, on the meta device. Raises ValueError."""
    try:
        with safetensors.safe_open(path, framework="pt") as stored:
            sizes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error
    return {name: torch.empty(size, device="meta") for name, size in sizes.items()}


def read_checkpoint(folder: Path, with_optimizer: bool = True, verified: bool = False) -> Checkpoint:
    """Read a checkpoint, on the CPU, after verifying it. Raises ValueError naming what is damaged."""
    if not verified:
        verify_checkpoint(folder)
    try:
        model = _read(folder / "model.safetensors")
        optimizer = _read(folder / "optimizer.safetensors") if with_optimizer else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from error
    return replace(read_checkpoint_metadata(folder), model=model, optimizer=optimizer)


def _read(path: Path) -> dict[str, Tensor]:
    """Copies of the tensors in a file, which is mapped for one at a time: they do not hang on it, and memory
    never holds more than they and one page of it."""
    with safetensors.safe_open(path, framework="pt") as stored:
        names = list(stored.keys())
    tensors = {}
    for name in names:
        with safetensors.safe_open(path, framework="pt") as stored:
            tensors[name] = stored.get_tensor(name).clone()
    return tensors


def newest_checkpoint(run: Path, warn: Callable[[str], None], name: str | None = None) -> Path:
    """The newest complete step checkpoint of a run. One that is damaged, or of another run than the one of
    this `name`, is told to `warn` and passed over.

    Raises ValueError where none is left.
    """
    folders, passed = step_folders(run), 0
    for folder in reversed(folders):
        try:
            verify_checkpoint(folder, name)
        except ValueError as error:
            passed += 1
            if passed <= MAX_NAMED:
                warn(f"{error}; skipping this checkpoint")
        else:
            if passed > MAX_NAMED:
                warn(f"and {passed - MAX_NAMED:,} more checkpoints were skipped")
            return folder
    raise ValueError(
        f"{run} holds no checkpoint to go on from"
        + (f": all {len(folders)} are damaged" if folders else "")
        + (f"; --init_from={run} begins with its best weights" if (run / "best").exists() else "")
        + "; --overwrite begins anew"
    )


def check_tensors_match(expected: dict[str, Tensor], found: dict[str, Tensor], source: str) -> None:
    """Raise ValueError with every tensor of `found` that is missing, extra, or of another shape or type."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in this model" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)} there and {tuple(tensor.shape)} in this model"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    problems += [
        f"{name} is of {found[name].dtype} there and {tensor.dtype} in this model"
        for name, tensor in expected.items()
        if name in found and found[name].dtype != tensor.dtype
    ]
    if problems:
        listed = "\n  - ".join(problems)
        raise ValueError(f"{source} does not fit this model, {len(problems)} tensors differ:\n  - {listed}")


def assign_parameters(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Make tensors the model's parameters, without a copy: it may have been built on the meta device.

    Raises ValueError, by `fit`, where any differs.
    """
    parameters = dict(model.named_parameters())  # a tied parameter stands here once, under its first name
    check_tensors_match(parameters, tensors, source)
    if not all_finite(tensors):
        raise ValueError(f"{source} holds NaN or infinity among its weights: use an earlier checkpoint")
    adopted = {id(p): nn.Parameter(tensors[name], p.requires_grad) for name, p in parameters.items()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, adopted[id(parameter)])


def copy_parameters(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into the parameters of those names. Raises ValueError, by `fit`, where any differs."""
    parameters = dict(model.named_parameters())  # a tied parameter stands here once, under its first name
    check_tensors_match(parameters, tensors, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def all_finite(tensors: dict[str, Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity: what is not finite is never saved over a good one."""
    return all(bool(torch.isfinite(local_tensor(tensor)).all()) for tensor in tensors.values())
