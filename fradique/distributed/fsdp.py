"""FSDP2 (Zhao et al. 2023, arXiv:2304.11277): shard a model over all ranks; write and read its checkpoints.

Each rank holds some rows of every parameter, gradient and optimizer state: its shards. It writes them to the
checkpoint with torch.distributed.checkpoint (dcp). The files are byte for byte those that a single process
writes, so a run can resume with any number of ranks.
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

# dtype -> its name in safetensors. A file stores its tensors in this order of dtypes, then by name.
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Shard a model over all ranks, in place: each block, then the other layers (embeddings, norms).

    From now on, a block's forward and backward pass gather its parameters from all ranks and free them again.
    So all ranks must run the same forward and backward passes.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write sharded tensors to one safetensors file. All ranks must call this and share the file system.

    Raises OSError on every rank if one rank cannot write.
    """
    try:
        dcp.save({name: x.detach() for name, x in tensors.items()}, storage_writer=SafetensorsWriter(path))
    except dcp.CheckpointException as error:
        raise OSError(_describe_failures(error)) from error


class SafetensorsWriter(dcp.StorageWriter):
    """Write one safetensors file: rank 0 writes the header, then each rank writes its own shards.

    dcp.save calls the methods. Each rank lists its shards in a plan; rank 0 receives all plans.
    """

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
        """Write the header and set the length of the file. Called on rank 0, before any rank writes shards.

        Layout: 8 bytes with the length of the header, the header (JSON, padded with spaces to a multiple of 8
        bytes), the tensors. Adds the position of each tensor in the file to the plans.
        """
        tensors = {item.index.fqn: item.tensor_data for plan in plans for item in plan.items}
        dtypes = {name: tensor.properties.dtype for name, tensor in tensors.items()}
        dtype_order = list(SAFETENSORS_DTYPES)
        header: dict[str, Any] = {}
        starts, data_size = {}, 0  # the offset of each tensor after the header, and the size so far, in bytes
        for name in sorted(tensors, key=lambda name: (dtype_order.index(dtypes[name]), name)):
            shape, dtype = list(tensors[name].size), dtypes[name]
            starts[name] = data_size
            data_size += math.prod(shape) * dtype.itemsize
            offsets = [starts[name], data_size]
            header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": offsets}
        header_bytes = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        header_bytes += b" " * (-len(header_bytes) % 8)
        header_size = 8 + len(header_bytes)
        with self.path.open("wb") as file:
            file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
            file.truncate(header_size + data_size)
        positions = {name: header_size + start for name, start in starts.items()}
        return [replace(plan, storage_data=positions) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the shards of this rank. `plan` contains the positions from `prepare_global_plan`."""
        results = []
        with self.path.open("r+b") as file:
            for item in plan.items:
                shard = planner.resolve_data(item).detach().cpu().contiguous()
                file.seek(plan.storage_data[item.index.fqn] + _offset_in_tensor(item))
                file.write(shard.view(-1).view(torch.uint8).numpy())  # as bytes: numpy has no bfloat16
                results.append(WriteResult(item.index, shard.nbytes, None))
            file.flush()
            os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass


def _offset_in_tensor(item: WriteItem) -> int:
    """The offset of a shard in its tensor, in bytes. A shard consists of consecutive complete rows."""
    shard, shape = item.tensor_data.chunk, item.tensor_data.size
    if len(shape) == 0:  # a scalar
        return 0
    assert list(shard.sizes[1:]) == list(shape[1:]), item
    row_bytes = math.prod(shape[1:]) * item.tensor_data.properties.dtype.itemsize
    return shard.offsets[0] * row_bytes


def read_safetensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read the safetensors files of `folder` into `tensors`, in place. These may be sharded.

    Other tensors in the files are ignored. Raises ValueError if a tensor is missing or has another shape.
    """
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except dcp.CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {_describe_failures(error)}") from error


def _describe_failures(error: dcp.CheckpointException) -> str:
    """For example: rank 0: No space left on device; rank 3: Input/output error"""
    failures = sorted(error.failures.items())  # (rank, (exception, traceback))
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
