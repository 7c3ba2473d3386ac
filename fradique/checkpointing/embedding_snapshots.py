"""Snapshots: embedding tables that are saved during training, for `lab.movie`.

The file `<run>/snapshots/step-00000250.safetensors` contains float16 tables: "tokens" (n_tokens, C), and also
"positions" (n_positions, C) if the model has a learned positional embedding. Only the first 2,000 rows of a
table are saved. In a BPE vocabulary these are the most frequent tokens.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fradique.distributed import process_group
from fradique.io import files

SNAPSHOT_FOLDER = "snapshots"
MAX_ROWS = 2000  # rows that are saved of each table
SNAPSHOT_NAME = re.compile(r"step-([0-9]{1,18})\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """The embedding tables after `step` training steps, converted to float32."""

    step: int
    tokens: np.ndarray  # (n_tokens, C)
    positions: np.ndarray | None  # (n_positions, C)


def embedding_tables(model: nn.Module) -> dict[str, Tensor]:
    """The tables of a GPT that a snapshot saves. All ranks of a sharded model must call this."""
    tables = {}
    for name, layer in (("tokens", "wte"), ("positions", "wpe")):
        if layer in model.transformer:  # there is no wpe without a learned positional embedding
            weight = model.transformer[layer].weight.detach()
            tables[name] = process_group.full_tensor(weight)[:MAX_ROWS]
    return tables


def write_snapshot(run: Path, step: int, tables: dict[str, Tensor]) -> None:
    """Write a snapshot into the run folder, atomically."""
    folder = run / SNAPSHOT_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    arrays = {name: table.to("cpu", torch.float16).contiguous().numpy() for name, table in tables.items()}
    files.write_bytes(path, safetensors.numpy.save(arrays))


def snapshot_paths(run: Path) -> dict[int, Path]:
    """The snapshot files of a run, oldest first: step -> path."""
    paths = {}
    for path in (run / SNAPSHOT_FOLDER).glob("*.safetensors"):
        if match := SNAPSHOT_NAME.fullmatch(path.name):
            paths[int(match[1])] = path
    return dict(sorted(paths.items()))


def read_snapshots(run: Path) -> list[Snapshot]:
    """All snapshots of a run, oldest first. Raises ValueError if there are none or one is damaged."""
    snapshots = []
    for step, path in snapshot_paths(run).items():
        try:
            arrays = safetensors.numpy.load_file(path)
            tokens = _checked_table(arrays, "tokens")
            positions = _checked_table(arrays, "positions") if "positions" in arrays else None
        # TypeError and AttributeError: numpy does not have the dtype
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it") from error
        if snapshots and tokens.shape != snapshots[0].tokens.shape:
            raise ValueError(f"{path} does not have the shape of the first snapshot: delete it")
        snapshots.append(Snapshot(step, tokens, positions))
    if not snapshots:
        raise ValueError(
            f"{run} has no snapshots of its embeddings: train with --snapshot_interval=50 to save a snapshot "
            "every 50 steps"
        )
    return snapshots


def _checked_table(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A table as float32. Raises ValueError if it is missing or not a matrix of finite numbers."""
    if name not in arrays:
        raise ValueError(f"it has no table {name!r}")
    table = arrays[name]
    if table.ndim != 2 or not table.size or table.dtype.kind != "f" or not np.isfinite(table).all():
        raise ValueError(f"{name!r} is not a matrix of finite numbers")
    return table.astype(np.float32)


def rewind_snapshots(run: Path, step: int) -> None:
    """Delete the snapshots after `step`, because a run that resumes at `step` writes them again."""
    for snapshot_step, path in snapshot_paths(run).items():
        if snapshot_step > step:
            path.unlink()
