"""Weights from the Hugging Face hub, by name.

config.json comes first. The weights are downloaded only if they are no larger than a model of that shape, and
every file is compared with the checksum that the hub gives for it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fradique.io import files
from fradique.io.download import MAX_BYTES
from fradique.pretrained import hf_config, hf_weights
from fradique.pretrained.weight_files import INDEX_FILE, PICKLE_FILE, SAFETENSORS_FILE
from model import GPTConfig

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG_FILES = ("config.json", "tokenizer.json", "vocab.json")
WEIGHT_FILES = (SAFETENSORS_FILE, "model-*.safetensors", INDEX_FILE)
PICKLE_FILES = (PICKLE_FILE,)  # only if there are no safetensors
# More than float32: the file may contain causal masks, and the same weights again in other shards.
BYTES_PER_PARAMETER = 16


def is_hub_name(path: Path, source: str) -> bool:
    """Whether `source` can be a name on the hub: owner/name, unless ./owner is a folder (then it is a
    misspelt path)."""
    is_file = path.suffix in (".safetensors", ".pt", ".bin")
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not is_file and not path.parent.exists()
    return source in HUB_NAMES or bool(named)


def download_weights(name: str) -> Path:
    """Download config.json and the weights, or find them in the cache. Returns their folder.

    Raises ValueError, with what to do, if the hub cannot be reached or does not have them, if they are larger
    than config.json says, or if a file does not have the hub's checksum.
    """
    folder = _download(name, CONFIG_FILES, MAX_BYTES)
    commit = folder.name  # the weights are taken from the same commit
    config_path = folder / "config.json"
    layout, config = hf_config.config_from_hf(files.read_json_object(config_path), str(config_path))
    max_bytes = BYTES_PER_PARAMETER * _count_parameters(config, layout) + MAX_BYTES
    folder = _download(name, WEIGHT_FILES, max_bytes, commit)
    if any(folder.glob("*.safetensors")):
        return folder
    return _download(name, PICKLE_FILES, max_bytes, commit)


def _download(name: str, patterns: tuple[str, ...], max_bytes: int, commit: str | None = None) -> Path:
    """Download the files that match, of at most `max_bytes` together. Returns their folder.

    If the hub does not list its files, those in the cache are used.
    """
    import huggingface_hub  # slow to import, and rarely needed

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
                revision=commit if list_error is None else None,
                allow_patterns=list(patterns),
                local_files_only=list_error is not None,
            )
        )
    except Exception as error:  # of huggingface_hub, httpx or requests: the types differ between versions
        first_error = list_error or error
        reason = str(first_error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} is no file or folder here, and could not be downloaded from the Hugging Face hub "
            f"({type(first_error).__name__}: {reason}). Without a network, earlier downloads are found in "
            "its cache (HF_HOME, by default ~/.cache/huggingface); or copy the model's config.json and "
            "model.safetensors into a folder and give that folder"
        ) from error
    checksums = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in listed}
    for path in sorted(folder.iterdir()):
        if _matches(path.name, patterns):
            _check_checksum(path, checksums.get(path.name) or path.resolve().name)
    return folder


def _list_files(
    name: str, patterns: tuple[str, ...], commit: str | None
) -> tuple[list[RepoSibling], Exception | None]:
    """The files on the hub that match, with sizes and checksums; or no files and the reason."""
    import huggingface_hub

    try:
        info = huggingface_hub.model_info(name, revision=commit, files_metadata=True, timeout=30.0)
        listed = [file for file in info.siblings or [] if _matches(file.rfilename, patterns)]
        if any(file.size is None for file in listed):
            raise ValueError(f"the hub does not give the sizes of the files of {name}")
    except Exception as error:  # as in _download
        return [], error
    return listed, None


def _count_parameters(config: GPTConfig, layout: hf_weights.Layout) -> int:
    """From the shapes of one and of two layers: n_layer, of which there may be any number, makes no table."""
    one_layer, two_layers = (
        sum(map(math.prod, hf_weights.expected_shapes(replace(config, n_layer=n), layout).values()))
        for n in (1, 2)
    )
    return one_layer + (config.n_layer - 1) * (two_layers - one_layer)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _check_checksum(path: Path, expected: str) -> None:
    """Raise ValueError if a file does not have the hub's checksum: SHA-256 of large files, git's SHA-1 of
    small ones.

    The hub's cache names files by this checksum, so it is known offline too. On systems without links
    (Windows, sometimes) `expected` is then a file name, and nothing is compared.
    """
    stored = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", expected):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", expected):
        digest = hashlib.sha1(b"blob %d\0" % stored.stat().st_size, usedforsecurity=False)
    else:
        return
    checksum = files.checksum(stored, digest)
    if checksum != expected:
        raise ValueError(
            f"{path} is damaged: its checksum is {checksum}, and the Hugging Face hub gave {expected}. It "
            f"was not used; delete {stored} and run this again"
        )
