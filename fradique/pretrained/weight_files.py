"""Read tensors from untrusted files: safetensors, in one file or in several, and pickles.

No code in a pickle is run. Callers check the names and shapes of the tensors. Every error names the file and
says what to do.
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

from fradique.io.files import is_plain_name, read_json_object
from fradique.io.safe_pickle import LEGACY_PICKLES, requested_globals

# A folder in Hugging Face's layout may have several of these three; the weights are read from the first.
SAFETENSORS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
FRADIQUE_TOKENIZER_FILE = "fradique_tokenizer.json"  # in folders that export.py writes

# The classes and functions, as "module name", that pickles of torch.save import. torch.load allows more. Some
# of these can take much memory.
WRAPPER_PREFIXES = re.compile(r"^(_orig_mod\.|module\.)+")  # of torch.compile, DDP and DataParallel
ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.storage \w+Storage"
    r"|torch (\w+Storage|Size|device|[a-z]+[0-9]+\w*)|torch\.nn\.parameter Parameter"
)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files by name (see `_short_name`); iteration begins with the largest.

    Each look-up maps the file to memory again, and returns a view of the map. To copy all tensors, a caller
    needs only the memory of the copies and of one tensor.
    """

    def __init__(self, files: Iterable[Path], prefix: str = "") -> None:
        self.locations: dict[str, tuple[Path, str]] = {}  # name -> file, name in the file
        for file in files:
            with _open_safetensors(file) as stored:
                for name in stored.keys():  # noqa: SIM118 (a safetensors file is not iterable)
                    self.locations[_short_name(name, prefix)] = file, name
        self.names = sorted(self.locations, key=lambda name: -self[name].numel())

    def __getitem__(self, name: str) -> Tensor:
        file, stored_name = self.locations[name]
        with _open_safetensors(file) as stored:
            return stored.get_tensor(stored_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    """safetensors.safe_open, but raises ValueError for a file that is missing or damaged."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not a plain file; copy or download it again")
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            yield stored
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; copy or download it again") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{file} is truncated, or not safetensors ({error}). Copy or download it again; a pickle can be "
            "converted with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        ) from error


def has_weights(folder: Path) -> bool:
    """Whether a folder contains weights in Hugging Face's layout."""
    return any((folder / name).exists() for name in (SAFETENSORS_FILE, INDEX_FILE, PICKLE_FILE))


def open_weight_folder(folder: Path, prefix: str) -> Mapping[str, Tensor]:
    """The tensors of a folder in Hugging Face's layout, by name without `prefix`.

    The folder has one safetensors file, or several with an index, or a pickle. Raises ValueError if they
    cannot be read.
    """
    index, pickled = folder / INDEX_FILE, folder / PICKLE_FILE
    if (folder / SAFETENSORS_FILE).exists():
        return TensorFiles([folder / SAFETENSORS_FILE], prefix)
    if index.exists():
        return TensorFiles((folder / name for name in _shard_names(index)), prefix)
    return strip_prefixes(load_plain_pickle(pickled), pickled, prefix)


def _shard_names(index: Path) -> list[str]:
    """The names of the files in an index. Raises ValueError for a name that leads out of the folder."""
    weight_map = read_json_object(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(map(is_plain_name, names)):
        raise ValueError(f"{index} is damaged: its weight_map does not name files of this folder")
    return sorted(set(names))


def load_plain_pickle(path: Path) -> Any:
    """The value in a file of torch.save. No code in the file is run.

    Raises ValueError if the value contains more than tensors and plain data, or cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a plain file; copy or download it again")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # since torch 1.6; older files cannot be memory-mapped
        _check_pickles(path, is_zip)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickles that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle can raise almost anything
        # a refused class or function is in the messages of _check_globals and of torch
        if requested := re.search(r"GLOBAL (\S{1,200})", str(error)):
            raise ValueError(
                f"{path} is a pickle of more than tensors and plain data: it asks for {requested[1]}, which "
                "could run code, so it was not opened; nanoGPT's ckpt.pt needs nothing of the kind"
            ) from error
        # torch's message begins with long advice; the first sentence after this label is the reason
        _, _, message = str(error).rpartition("WeightsUnpickler error: ")
        reason = re.split(r"\. |\n", message.strip())[0]
        raise ValueError(
            f"{path} cannot be read: it is truncated or damaged, or not written by torch.save "
            f"({type(error).__name__}: {reason[:300]}); copy it again"
        ) from error


def strip_prefixes(state: Any, path: Path, prefix: str) -> dict[str, Tensor]:
    """A state dict from a pickle, by names without `prefix` and the prefixes of torch.compile and DDP.

    path: the file, for messages. Raises ValueError if `state` is not a dict of complete tensors.
    """
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(
            f"{path} does not contain a model: it is neither nanoGPT's ckpt.pt nor a dict of tensors by name"
        )
    for name, tensor in state.items():
        if not _is_complete(tensor):
            raise ValueError(
                f"{path}: the tensor {reprlib.repr(name)} has more elements than the file stores; the file "
                "is damaged, or not a model: copy it again"
            )
    return {_short_name(str(name), prefix): tensor for name, tensor in state.items()}


def _short_name(name: str, prefix: str) -> str:
    """The name of a tensor without `prefix` and the prefixes of torch.compile and DDP."""
    return WRAPPER_PREFIXES.sub("", name).removeprefix(prefix)


def _check_pickles(path: Path, is_zip: bool) -> None:
    """Raise ValueError if a file could fill the memory, or imports more than tensors need."""
    if not is_zip:
        with path.open("rb") as file:
            _check_globals(requested_globals(file, LEGACY_PICKLES))
        return
    with zipfile.ZipFile(path) as archive:
        # torch.save does not compress, and a small compressed file could fill the memory when it is unpacked
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is a compressed archive, which torch never writes")
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as file:
                    _check_globals(requested_globals(file))


def _check_globals(names: Iterable[str]) -> None:
    """Raise ValueError for a class or function, written as "module name", that is not in ALLOWED_GLOBALS."""
    for name in names:
        if not ALLOWED_GLOBALS.fullmatch(name):
            raise ValueError(f"GLOBAL {name.replace(' ', '.')}")


def _is_complete(tensor: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, and not larger than its storage.

    With a stride of 0, a tensor of any size can have a storage of one number.
    """
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized
    if not is_dense or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
