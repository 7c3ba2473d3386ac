"""Embeddings saved during training, for `lab.movie`.

`<run>/snapshots/step-00000250.safetensors` contains, in float16, "tokens" (n, C), at most the first 2,000 (in
BPE, the most frequent ones), and "positions" (P, C) if the model has a learned positional embedding.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from fradique.distributed import process_group
from fradique.io import files

SNAPSHOT_FOLDER = "snapshots"
MAX_ROWS = 2000  # of each table
SNAPSHOT_NAME = re.compile(r"step-([0-9]{1,18})\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """The embeddings after `step`: tokens (n, C), positions (P, C) or None, float32."""

    step: int
    tokens: np.ndarray
    positions: np.ndarray | None


def embedding_tables(model: nn.Module) -> dict[str, Tensor]:
    """The embedding tables of a GPT that a snapshot saves, gathered from all ranks."""
    modules = {"tokens": "wte", "positions": "wpe"}
    return {
        name: process_group.full_tensor(model.transformer[key].weight.detach())[:MAX_ROWS]
        for name, key in modules.items()
        if key in model.transformer
    }


def write_snapshot(run: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Write a snapshot into the run folder, atomically."""
    folder = run / SNAPSHOT_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    arrays = {name: x.to("cpu", torch.float16).contiguous().numpy() for name, x in tensors.items()}
    files.write_bytes(path, safetensors.numpy.save(arrays))


def snapshot_paths(run: Path) -> dict[int, Path]:
    """The snapshots of a run by their steps, oldest first."""
    paths = (run / SNAPSHOT_FOLDER).glob("*.safetensors")
    matches = [(SNAPSHOT_NAME.fullmatch(path.name), path) for path in paths]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def read_snapshots(run: Path) -> list[Snapshot]:
    """All snapshots of a run, oldest first. Raises ValueError if there are none or one is damaged."""
    snapshots = []
    for step, path in snapshot_paths(run).items():
        try:
            tensors = safetensors.numpy.load_file(path)
            tokens, positions = _table(tensors, "tokens"), None
            if "positions" in tensors:
                positions = _table(tensors, "positions")
        except (OSError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it") from error
        if snapshots and tokens.shape != snapshots[0].tokens.shape:
            raise ValueError(f"{path} is a snapshot of another model than the others: delete it")
        snapshots.append(Snapshot(step, tokens, positions))
    if not snapshots:
        raise ValueError(
            f"{run} has no snapshots of its embeddings: train with --snapshot_interval=50, which saves one "
            "every 50 steps"
        )
    return snapshots


def _table(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A float32 table (n, C). Raises KeyError if it is missing, ValueError if it is not a finite matrix."""
    table = tensors[name]
    if table.ndim != 2 or not table.size or table.dtype.kind != "f" or not np.isfinite(table).all():
        raise ValueError(f"{name!r} is not a matrix of finite numbers")
    return table.astype(np.float32)


def rewind_snapshots(run: Path, step: int) -> None:
    """Delete the snapshots after `step`: a resumed run writes them again."""
    for snapshot_step, path in snapshot_paths(run).items():
        if snapshot_step > step:
            path.unlink()
