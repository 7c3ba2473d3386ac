"""FSDP2 (Zhao et al. 2023, arXiv:2304.11277): shard a model over all ranks; write and read its checkpoints.

Each rank keeps its rows of every parameter, gradient and optimizer state. torch.distributed.checkpoint
decides which rank writes what. The checkpoint files are byte for byte those that a single process writes, so
any number of ranks can read them and resume from them.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.futures import Future

from fradique.distributed import process_group

T = TypeVar("T")

# safetensors' names of the dtypes, in the order in which it stores tensors.
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Shard a model over all ranks, in place: each block, then the rest (embeddings and norms).

    Each block is gathered for its forward and its backward pass and freed again, so all ranks must run the
    same forward and backward passes from now on.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write sharded tensors to one safetensors file. All ranks must call it, and share the file system.

    Raises OSError on every rank if one of them cannot write.
    """
    try:
        dcp.save({name: x.detach() for name, x in tensors.items()}, storage_writer=SafetensorsWriter(path))
    except dcp.CheckpointException as error:
        raise OSError(_failures(error)) from error


class SafetensorsWriter(dcp.StorageWriter):
    """Write one safetensors file: rank 0 writes the header, then each rank its shards at their offsets."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return str(checkpoint_id).endswith(".safetensors")

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        self.path = self.path if checkpoint_id is None else Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Write the header and set the length of the file; called on rank 0, before any rank writes data."""
        items = {item.index.fqn: item.tensor_data for plan in plans for item in plan.items}
        dtype_order = list(SAFETENSORS_DTYPES)
        names = sorted(items, key=lambda name: (dtype_order.index(items[name].properties.dtype), name))
        header, data_size = {}, 0
        for name in names:
            size, dtype = items[name].size, items[name].properties.dtype
            start, data_size = data_size, data_size + math.prod(size) * dtype.itemsize
            offsets = [start, data_size]
            header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(size), "data_offsets": offsets}
        header_bytes = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        header_bytes += b" " * (-len(header_bytes) % 8)
        data_start = 8 + len(header_bytes)
        with self.path.open("wb") as file:
            file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
            file.truncate(data_start + data_size)
        tensor_starts = {name: data_start + header[name]["data_offsets"][0] for name in names}
        return [replace(plan, storage_data=tensor_starts) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the shards of this rank."""
        results = []
        with self.path.open("r+b") as file:
            for item in plan.items:
                data = planner.resolve_data(item).detach().cpu().contiguous()
                file.seek(plan.storage_data[item.index.fqn] + _offset_in_tensor(item))
                file.write(data.view(-1).view(torch.uint8).numpy())
                results.append(WriteResult(item.index, data.nbytes, None))
            file.flush()
            os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass


def _offset_in_tensor(item: WriteItem) -> int:
    """The byte offset of a shard in its tensor. A shard is some consecutive rows."""
    chunk, size = item.tensor_data.chunk, item.tensor_data.size
    assert list(chunk.sizes[1:]) == list(size[1:]), item
    row_bytes = math.prod(size[1:]) * item.tensor_data.properties.dtype.itemsize
    return chunk.offsets[0] * row_bytes if len(size) else 0


def read_safetensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read the safetensors files of `folder` into `tensors`, which are whole or this rank's shards.

    The files may hold more tensors. Raises ValueError if one is missing or has another shape.
    """
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except dcp.CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {_failures(error)}") from error


def _failures(error: dcp.CheckpointException) -> str:
    failures = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {exception}" for rank, (exception, _) in failures)


class ShardedWriter:
    """The checkpoint.CheckpointWriter of a sharded model: all ranks write to one file."""

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        write_safetensors(path, tensors)

    def on_rank0(self, function: Callable[[], T]) -> T:
        return process_group.broadcast_from_rank0(function)

    def all_ranks(self, value: bool) -> bool:
        """Whether `value` is true on every rank."""
        result = torch.tensor(value)
        dist.all_reduce(result, dist.ReduceOp.MIN)
        return bool(result)
