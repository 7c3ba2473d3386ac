"""Download weights from the Hugging Face hub by name.

config.json is downloaded first. The weights are downloaded only if their size is plausible for the model that
it describes. Every file is compared with the checksum that the hub gives for it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fradique.io.download import MAX_BYTES
from fradique.io.files import checksum, read_json_object
from fradique.pretrained.hf_config import config_from_hf
from fradique.pretrained.hf_weights import Layout, expected_shapes
from fradique.pretrained.weight_files import INDEX_FILE, PICKLE_FILE, SAFETENSORS_FILE
from model import GPTConfig

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names without an owner
# Patterns of file names.
CONFIG_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json"),
    *("special_tokens_map.json", "merges.txt"),
)
WEIGHT_FILES = (SAFETENSORS_FILE, "model-*.safetensors", INDEX_FILE)
PICKLE_FILES = (PICKLE_FILE,)  # downloaded only if there are no safetensors files
# The largest plausible size. float32 takes 4 bytes, but files may also contain causal masks, and a repository
# may have the same weights as one file and as several.
MAX_BYTES_PER_PARAMETER = 16


def is_hub_name(path: Path, source: str) -> bool:
    """Whether `source`, which is no file or folder, can be a name on the hub, such as gpt2 or owner/name.

    path: `source` as a path. A name that ends like a file, or whose parent folder exists, is a misspelt path.
    """
    if source in HUB_NAMES:
        return True
    is_misspelt_path = path.suffix in (".safetensors", ".pt", ".bin") or path.parent.exists()
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)) and not is_misspelt_path


def download_weights(name: str) -> Path:
    """Download config.json and the weights, unless the cache has them. Returns their folder.

    Raises ValueError if the hub cannot be reached or does not have the files, if the weights are too large
    for the model in config.json, or if a file has the wrong checksum. The message says what to do.
    """
    folder = _download(name, CONFIG_FILES, MAX_BYTES)
    commit = folder.name  # the weights must be those of the same commit
    config_path = folder / "config.json"
    layout, config = config_from_hf(read_json_object(config_path), str(config_path))
    max_bytes = MAX_BYTES_PER_PARAMETER * _count_parameters(config, layout) + MAX_BYTES
    folder = _download(name, WEIGHT_FILES, max_bytes, commit)
    if any(folder.glob("*.safetensors")):
        return folder
    return _download(name, PICKLE_FILES, max_bytes, commit)


def _download(name: str, patterns: tuple[str, ...], max_bytes: int, commit: str | None = None) -> Path:
    """Download the files that match `patterns`, at most `max_bytes` together. Returns their folder.

    If the hub does not list its files, the files in the cache are used.
    """
    import huggingface_hub  # imported here because it takes long and is rarely needed

    listed, list_error = _list_files(name, patterns, commit)
    size = sum(file.size for file in listed)
    if size > max_bytes:
        raise ValueError(
            f"{name} on the Hugging Face hub is not what its config.json describes: {', '.join(patterns)} "
            f"have {size:,} bytes there, but such a model needs at most {max_bytes:,}; nothing was downloaded"
        )
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name,
                revision=commit if list_error is None else None,  # None: the last one that was downloaded
                allow_patterns=list(patterns),
                local_files_only=list_error is not None,
            )
        )
    except Exception as error:  # the types of errors differ between versions of huggingface_hub
        first_error = list_error or error
        reason = str(first_error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} is no file or folder here, and could not be downloaded from the Hugging Face hub "
            f"({type(first_error).__name__}: {reason}). Without a network, only earlier downloads can be "
            "used, which are in HF_HOME (by default ~/.cache/huggingface). Or copy the model's config.json "
            "and model.safetensors into a folder, and use the path of that folder"
        ) from error
    checksums = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in listed}
    for path in sorted(folder.iterdir()):
        if _matches(path.name, patterns):
            # the files in the folder are links to files that the cache names by their checksum
            _check_checksum(path, checksums.get(path.name) or path.resolve().name)
    return folder


def _list_files(
    name: str, patterns: tuple[str, ...], commit: str | None
) -> tuple[list[RepoSibling], Exception | None]:
    """Ask the hub for the files that match `patterns`, with their sizes and checksums.

    Returns (files, None), or ([], error) if the hub does not answer.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.model_info(name, revision=commit, files_metadata=True, timeout=30.0)
        listed = [file for file in info.siblings or [] if _matches(file.rfilename, patterns)]
        if any(file.size is None for file in listed):
            raise ValueError(f"the hub does not give the sizes of the files of {name}")
    except Exception as error:  # of many types, as in _download
        return [], error
    return listed, None


def _count_parameters(config: GPTConfig, layout: Layout) -> int:
    """The number of parameters of a model, from the shapes of models with one and two layers.

    The n_layer of a file from the hub can be huge, so a table of all shapes could fill the memory.
    """

    def count(n_layer: int) -> int:
        shapes = expected_shapes(replace(config, n_layer=n_layer), layout)
        return sum(math.prod(shape) for shape in shapes.values())

    per_layer = count(2) - count(1)
    return count(1) + (config.n_layer - 1) * per_layer


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file name matches one of `patterns`, such as model-*.safetensors."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _check_checksum(path: Path, expected: str) -> None:
    """Raise ValueError if a file does not have the checksum that the hub gave.

    That is the SHA-256 of a large file, or git's SHA-1 of a small one. If the cache has no links, as on some
    Windows systems, and the hub cannot be reached, `expected` is a file name, and nothing is compared.
    """
    stored = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", expected):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", expected):
        git_header = b"blob %d\0" % stored.stat().st_size
        digest = hashlib.sha1(git_header, usedforsecurity=False)
    else:
        return
    actual = checksum(stored, digest)
    if actual != expected:
        raise ValueError(
            f"{path} is damaged: its checksum is {actual}, and the Hugging Face hub gave {expected}. It was "
            f"not used; delete {stored} and run this again"
        )
