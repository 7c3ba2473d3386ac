"""A model in parts: each rank keeps its share of every parameter, gradient and optimizer state (FSDP2, Zhao
et al. 2023), and all of them write one checkpoint and read one, however many they are.

torch.distributed.checkpoint plans who writes what; the file that comes of it is the one that a single process
writes, byte for byte, so it is read everywhere, and goes on with any number of ranks.
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

# As safetensors calls them, in the order in which it lays tensors down.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Share a model out over all ranks, in place: block by block, then what is left (embeddings and norms).

    Only one block at a time lies whole on the device. Forward and backward passes of all ranks must go in
    step from now on, since each gathers the block that it is in.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors of all ranks into one safetensors file. All ranks call it, on a file system that they
    share.

    Raises OSError, on every rank, where one of them cannot write.
    """
    try:
        dcp.save({name: x.detach() for name, x in tensors.items()}, storage_writer=SafetensorsWriter(path))
    except dcp.CheckpointException as error:
        raise OSError(_reasons(error)) from error


class SafetensorsWriter(dcp.StorageWriter):
    """One safetensors file, into which every rank writes its parts at their places."""

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
        """On rank 0, before any other writes: the header, and a file as long as it will be."""
        items = {item.index.fqn: item.tensor_data for plan in plans for item in plan.items}
        sizes = {n: math.prod(x.size) * x.properties.dtype.itemsize for n, x in items.items()}
        kinds = list(DTYPES)
        order = sorted(items, key=lambda name: (kinds.index(items[name].properties.dtype), name))
        header, end = {}, 0
        for name in order:
            start, end = end, end + sizes[name]
            kind = DTYPES[items[name].properties.dtype]
            header[name] = {"dtype": kind, "shape": list(items[name].size), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        places = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in order}
        return [replace(plan, storage_data=places) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done = []
        with self.path.open("r+b") as file:
            for item in plan.items:
                data = planner.resolve_data(item).detach().cpu().contiguous()
                file.seek(plan.storage_data[item.index.fqn] + _bytes_before(item))
                file.write(data.view(-1).view(torch.uint8).numpy())
                done.append(WriteResult(item.index, data.nbytes, None))
            file.flush()
            os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(done)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass


def _bytes_before(item: WriteItem) -> int:
    """How far into its tensor a part begins. Parts are rows, which lie one after another."""
    chunk, whole_size = item.tensor_data.chunk, item.tensor_data.size
    assert list(chunk.sizes[1:]) == list(whole_size[1:]), item
    row = math.prod(whole_size[1:]) * item.tensor_data.properties.dtype.itemsize
    return chunk.offsets[0] * row if len(whole_size) else 0


def read_safetensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, this rank's parts of some or all that the safetensors files of `folder` hold.

    Raises ValueError where they do not fit.
    """
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except dcp.CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {_reasons(error)}") from error


def _reasons(error: dcp.CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {why}" for rank, (why, _) in sorted(error.failures.items()))


class ShardedWriter:
    """All ranks at one checkpoint, whose tensors they hold in parts: the other way is `checkpoint.Alone`."""

    @staticmethod
    def write(path: Path, tensors: dict[str, Tensor]) -> None:
        write_safetensors(path, tensors)

    @staticmethod
    def once(do: Callable[[], T]) -> T:
        return process_group.broadcast_from_rank0(do)

    @staticmethod
    def every(sound: bool) -> bool:
        """Whether it is so on every rank."""
        told = torch.tensor(sound)
        dist.all_reduce(told, dist.ReduceOp.MIN)
        return bool(told)
