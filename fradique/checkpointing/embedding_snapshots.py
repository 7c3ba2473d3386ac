"""Embeddings kept on the way, for `lab.movie`: small files beside the checkpoints, one for each time.

`<run>/snapshots/step-00000250.safetensors` holds, in float16, "tokens" (n, C), of a large vocabulary the
first 2,000 (in BPE, the most frequent), and "positions" (P, C) where the model learns them.
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
MAX_ROWS = 2000  # tokens, and positions
SNAPSHOT_NAME = re.compile(r"step-([0-9]{1,18})\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """The embeddings after `step`: tokens (n, C), positions (P, C) or None, float32."""

    step: int
    tokens: np.ndarray
    positions: np.ndarray | None


def embedding_tables(model: nn.Module) -> dict[str, Tensor]:
    """The embeddings of a GPT that are kept."""
    tables = {"tokens": "wte", "positions": "wpe"}
    there = {name: key for name, key in tables.items() if key in model.transformer}
    return {
        name: process_group.full_tensor(model.transformer[key].weight.detach())[:MAX_ROWS]
        for name, key in there.items()
    }


def write_snapshot(run: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Write embeddings into the run folder, whole or not at all."""
    folder = run / SNAPSHOT_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    arrays = {name: x.to("cpu", torch.float16).contiguous().numpy() for name, x in tensors.items()}
    files.write_bytes(path, safetensors.numpy.save(arrays))


def snapshot_paths(run: Path) -> dict[int, Path]:
    """The snapshots of a run by their steps, oldest first."""
    found = {
        path: SNAPSHOT_NAME.fullmatch(path.name) for path in (run / SNAPSHOT_FOLDER).glob("*.safetensors")
    }
    return dict(sorted((int(name[1]), path) for path, name in found.items() if name))


def read_snapshots(run: Path) -> list[Snapshot]:
    """All snapshots of a run, oldest first. Raises ValueError, saying what to do, where there are none."""
    found = []
    for step, path in snapshot_paths(run).items():
        try:
            tensors = safetensors.numpy.load_file(path)
            tokens, positions = _table(tensors, "tokens"), None
            if "positions" in tensors:
                positions = _table(tensors, "positions")
        except (OSError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it") from error
        if found and tokens.shape != found[0].tokens.shape:
            raise ValueError(f"{path} is not of the run that the others are of: delete it")
        found.append(Snapshot(step, tokens, positions))
    if not found:
        raise ValueError(
            f"{run} holds no snapshots of its embeddings: train with --snapshot_interval=50, which keeps "
            "them every 50 steps"
        )
    return found


def _table(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """(n, C) float32. Raises ValueError where it is no table of finite numbers, KeyError where it is none."""
    table = tensors[name]
    if table.ndim != 2 or not table.size or table.dtype.kind != "f" or not np.isfinite(table).all():
        raise ValueError(f"{name!r} is no table of finite numbers")
    return table.astype(np.float32)


def rewind_snapshots(run: Path, step: int) -> None:
    """Forget what was kept after `step`: a resumed run goes there again."""
    for later, path in snapshot_paths(run).items():
        if later > step:
            path.unlink()
