"""Files of tensors that others wrote: safetensors, one or many, and old pickles of plain data.

Nothing here knows what the tensors mean. Every refusal names the file and what to do.
"""

import re
import reprlib
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from fradique.io import files as file_io
from fradique.io import safe_pickle

# The globals that torch.save's pickles need. torch.load allows more, some of which cost memory.
ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.storage \w+Storage"
    r"|torch (\w+Storage|Size|device|[a-z]+[0-9]+\w*)|torch\.nn\.parameter Parameter"
)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, the largest first, without the `prefix` that some have.

    Each look-up maps its file anew and gives a view of it, so nothing is held here: who copies them one by
    one never has more than the copies and one tensor in memory.
    """

    def __init__(self, files: Iterable[Path], prefix: str = "") -> None:
        self.places: dict[str, tuple[Path, str]] = {}
        for file in files:
            with _opened(file) as stored:
                self.places |= {name.removeprefix(prefix): (file, name) for name in stored.keys()}  # noqa: SIM118
        self.names = sorted(self.places, key=lambda name: -self[name].numel())

    def __getitem__(self, name: str) -> Tensor:
        file, stored_name = self.places[name]
        with _opened(file) as stored:
            return stored.get_tensor(stored_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not a plain file; copy or download it again")
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            yield stored
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; copy or download it again") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{file} is truncated, or a pickle or something else instead of safetensors ({error}); copy or "
            "download it again, or save the model anew with save_pretrained of transformers"
        ) from error


def open_weight_folder(folder: Path, prefix: str) -> Mapping[str, Tensor] | None:
    """The tensors of a Hugging Face folder: one file, several with an index, or, long ago, a pickle.

    None where there are none.
    """
    index, pickled = folder / "model.safetensors.index.json", folder / "pytorch_model.bin"
    if (folder / "model.safetensors").exists():
        return TensorFiles([folder / "model.safetensors"], prefix)
    if index.exists():
        return TensorFiles((folder / name for name in _shard_names(index)), prefix)
    return strip_prefixes(load_plain_pickle(pickled), pickled, prefix) if pickled.exists() else None


def _shard_names(index: Path) -> list[str]:
    names = file_io.read_json_object(index).get("weight_map")
    files = [*names.values()] if isinstance(names, dict) else []
    if not files or not all(map(file_io.is_plain_name, files)):
        raise ValueError(f"{index} is damaged: its weight_map names no files of this folder")
    return sorted(set(files))


def load_plain_pickle(path: Path) -> Any:
    """What torch.save wrote. Raises ValueError where it is more than plain data: that is never run."""
    if not path.is_file():
        raise ValueError(f"{path} is not a plain file; copy or download it again")
    try:
        with path.open("rb") as file:
            mappable = file.read(4) == b"PK\x03\x04"  # the zip format, of torch 1.6 and later
        _check_pickles(path, mappable)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of pickles that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a damaged pickle raises almost anything
        if asked := re.search(r"GLOBAL (\S{1,200})", str(error)):
            raise ValueError(
                f"{path} is a pickle of more than tensors and plain data: it asks for {asked[1]}, which "
                "could run code, so it was not opened; nanoGPT's ckpt.pt needs nothing of the kind"
            ) from error
        why = re.split(r"\. |\n", str(error).rpartition("WeightsUnpickler error: ")[2].strip())[0]
        raise ValueError(
            f"{path} cannot be read: it is truncated or damaged, or not written by torch.save "
            f"({type(error).__name__}: {why[:300]}); copy it again"
        ) from error


def strip_prefixes(state: Any, path: Path, prefix: str) -> dict[str, Tensor]:
    """A dict of tensors by name, without the prefix of torch.compile's wrapper and `prefix`."""
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()) or not state:
        raise ValueError(f"{path} holds no model: neither nanoGPT's ckpt.pt nor a dict of tensors by name")
    for name, tensor in state.items():
        if not _is_whole(tensor):
            raise ValueError(
                f"{path}: the tensor {reprlib.repr(name)} claims more numbers than the file holds of it; the "
                "file is damaged, or no model: copy it again"
            )
    return {str(name).removeprefix("_orig_mod.").removeprefix(prefix): t for name, t in state.items()}


def _check_pickles(path: Path, zipped: bool) -> None:
    """Raise ValueError for what would take memory or time without end, or asks for more than tensors need."""
    if not zipped:
        with path.open("rb") as file:
            _check_asked(safe_pickle.requested_globals(file, safe_pickle.LEGACY_PICKLES))
        return
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is a packed archive, and torch packs none")  # a small file, a large content
        for name in [name for name in archive.namelist() if name.endswith("data.pkl")]:
            with archive.open(name) as file:
                _check_asked(safe_pickle.requested_globals(file))


def _check_asked(names: Iterable[str]) -> None:
    for name in names:
        if not ALLOWED_GLOBALS.fullmatch(name):
            raise ValueError(f"GLOBAL {name.replace(' ', '.')}")


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one with as many numbers as are stored of it: strides can repeat one number
    without end."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
