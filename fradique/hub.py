"""Weights from the Hugging Face hub, by name: config.json first, then weights that are no larger than what it
describes, each file held to the sum that the hub gave with it."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
from pathlib import Path
from typing import Any

from fradique import checkpoint, layouts
from fradique.download import MAX_BYTES

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# Beside float32 there may be masks in the file, and the same weights again in another number of files.
BYTES_A_PARAMETER = 16


def may_have(path: Path, source: str) -> bool:
    """Whether `source` reads like a name there, and not like a misspelt path into a folder that is here."""
    is_file = path.suffix in (".safetensors", ".pt", ".bin")
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not is_file and not path.parent.exists()
    return source in NAMES or bool(named)


def weights(name: str) -> Path:
    """Download config.json and the weights, or find them in the cache; the folder where they lie.

    Raises ValueError, with what to do, where the hub cannot be reached or does not have them, where they are
    larger than config.json says, or a file is not the one whose sum the hub gave.
    """
    folder = _download(name, ("config.json", "tokenizer.json", "vocab.json"), MAX_BYTES)
    described = folder / "config.json"
    layout, config = layouts.config_of_json(checkpoint.read_json(described), str(described))
    most = BYTES_A_PARAMETER * _parameters(config, layout) + MAX_BYTES  # known before gigabytes come
    folder = _download(
        name, ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"), most
    )
    return folder if any(folder.glob("*.safetensors")) else _download(name, ("pytorch_model.bin",), most)


def _download(name: str, patterns: tuple[str, ...], most: int) -> Path:
    """Have the files that match, of no more than `most` bytes together; the folder where they lie."""
    import huggingface_hub  # slow to import, and few need it

    try:
        listed = huggingface_hub.model_info(name, files_metadata=True, timeout=30.0).siblings or []
    except Exception:  # no network: what was downloaded before is in the cache; what is wrong comes next
        listed = []
    size = sum(one.size or 0 for one in listed if _matches(one.rfilename, patterns))
    if size > most:
        raise ValueError(
            f"{name} on the Hugging Face hub is not what its config.json describes: {', '.join(patterns)} "
            f"have {size:,} bytes there, and {most:,} are enough; nothing of it was downloaded"
        )
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # its own, httpx's, requests': they differ from version to version
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} is no file or folder here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {why}). Without a network, what was downloaded before is found in its "
            "cache (HF_HOME, by default ~/.cache/huggingface); or copy the model's config.json and "
            "model.safetensors into a folder and give that"
        ) from error
    for path in sorted(folder.iterdir()):
        if _matches(path.name, patterns):
            _check_sum(path)
    return folder


def _parameters(config: dict[str, Any], layout: layouts.Layout) -> int:
    """How many there are, without a table of each layer's: `n_layer` may be any number."""
    one, two = (
        sum(map(math.prod, layouts.expected(config | {"n_layer": n}, layout).values())) for n in (1, 2)
    )
    return one + (config["n_layer"] - 1) * (two - one)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _check_sum(path: Path) -> None:
    """Raise ValueError where a file of the hub's cache does not have the sum that the hub gave it.

    The cache calls a file by that sum: git's SHA-1 of a small one, and the SHA-256 of a large one. Where
    there are no links (Windows, at times), files have their own names, and no sum is known.
    """
    kept = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", kept.name):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", kept.name):
        digest = hashlib.sha1(b"blob %d\0" % kept.stat().st_size, usedforsecurity=False)
    else:
        return
    with kept.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != kept.name:
        raise ValueError(
            f"{path} is damaged: its sum is {digest.hexdigest()}, and the Hugging Face hub gave it as "
            f"{kept.name}. It was not used; delete {kept} and run this again"
        )
