"""Weights from the Hugging Face hub, by name: config.json first, then weights that are no larger than what it
describes, each file held to the sum that the hub gave with it."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
from pathlib import Path
from typing import Any

from fradique.io import files
from fradique.io.download import MAX_BYTES
from fradique.io.files import checksum
from fradique.pretrained import hf_config, hf_weights

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG_FILES = ("config.json", "tokenizer.json", "vocab.json")
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLE_FILES = ("pytorch_model.bin",)  # where there is none of the large ones
# Beside float32 there may be masks in the file, and the same weights again in another number of files.
BYTES_PER_PARAMETER = 16


def is_hub_name(path: Path, source: str) -> bool:
    """Whether `source` reads like a name there, and not like a misspelt path into a folder that is here."""
    is_file = path.suffix in (".safetensors", ".pt", ".bin")
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not is_file and not path.parent.exists()
    return source in HUB_NAMES or bool(named)


def download_weights(name: str) -> Path:
    """Download config.json and the weights, or find them in the cache; the folder where they lie.

    Raises ValueError, with what to do, where the hub cannot be reached or does not have them, where they are
    larger than config.json says, or a file is not the one whose sum the hub gave.
    """
    folder = _download(name, CONFIG_FILES, MAX_BYTES)
    commit = folder.name  # of which the weights are too
    described = folder / "config.json"
    layout, config = hf_config.config_from_hf(files.read_json_object(described), str(described))
    most = BYTES_PER_PARAMETER * _parameters(config, layout) + MAX_BYTES  # known before gigabytes come
    folder = _download(name, WEIGHT_FILES, most, commit)
    return folder if any(folder.glob("*.safetensors")) else _download(name, PICKLE_FILES, most, commit)


def _download(name: str, patterns: tuple[str, ...], most: int, commit: str | None = None) -> Path:
    """Have the files that match, of no more than `most` bytes together; the folder where they lie. Where the
    hub does not say what it has, there are those of the cache."""
    import huggingface_hub  # slow to import, and few need it

    listed, unlisted = _listing(name, patterns, commit)
    size = sum(one.size for one in listed)
    if size > most:
        raise ValueError(
            f"{name} on the Hugging Face hub is not what its config.json describes: {', '.join(patterns)} "
            f"have {size:,} bytes there, and {most:,} are enough; nothing of it was downloaded"
        )
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name,
                revision=commit if unlisted is None else None,
                allow_patterns=list(patterns),
                local_files_only=unlisted is not None,
            )
        )
    except Exception as error:  # its own, httpx's, requests': they differ from version to version
        first = unlisted or error
        why = str(first).strip().partition("\n")[0]
        raise ValueError(
            f"{name} is no file or folder here, and the Hugging Face hub did not give it "
            f"({type(first).__name__}: {why}). Without a network, what was downloaded before is found in its "
            "cache (HF_HOME, by default ~/.cache/huggingface); or copy the model's config.json and "
            "model.safetensors into a folder and give that"
        ) from error
    sums = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in listed}
    for path in sorted(folder.iterdir()):
        if _matches(path.name, patterns):
            _check_sum(path, sums.get(path.name) or path.resolve().name)
    return folder


def _listing(name: str, patterns: tuple[str, ...], commit: str | None) -> tuple[list[Any], Exception | None]:
    """The files that match, with their sizes and sums; or why the hub does not tell them."""
    import huggingface_hub

    try:
        info = huggingface_hub.model_info(name, revision=commit, files_metadata=True, timeout=30.0)
        listed = [one for one in info.siblings or [] if _matches(one.rfilename, patterns)]
        if any(one.size is None for one in listed):
            raise ValueError(f"the sizes of {name}'s files are not told")
    except Exception as error:  # as below
        return [], error
    return listed, None


def _parameters(config: dict[str, Any], layout: hf_weights.Layout) -> int:
    """How many there are, without a table of each layer's: `n_layer` may be any number."""
    one, two = (
        sum(map(math.prod, hf_weights.expected_shapes(config | {"n_layer": n}, layout).values()))
        for n in (1, 2)
    )
    return one + (config["n_layer"] - 1) * (two - one)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _check_sum(path: Path, expected: str) -> None:
    """Raise ValueError where a file does not have the sum that the hub gave with it: git's SHA-1 of a small
    one, the SHA-256 of a large one. The hub's cache calls a file by that sum, so it is known offline too;
    where the cache has no links (Windows, at times), `expected` is then a name, and nothing is compared."""
    kept = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", expected):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", expected):
        digest = hashlib.sha1(b"blob %d\0" % kept.stat().st_size, usedforsecurity=False)
    else:
        return
    if (found := checksum(kept, digest)) != expected:
        raise ValueError(
            f"{path} is damaged: its sum is {found}, and the Hugging Face hub gave it as "
            f"{expected}. It was not used; delete {kept} and run this again"
        )
