"""The command that trains on a new corpus, so that it works as it is printed."""

import re
from typing import Any

from fradique.io.files import PROJECT_FOLDER
from fradique.io.terminal import quote, relative_path

AUTO_BLOCK_SIZE = 256  # the smallest that config/auto.py chooses
DEFAULT_BLOCK_SIZE = 1024  # of train.py


def complete_command(command: str, meta: dict[str, Any]) -> str:
    """`command`, such as "python train.py config/auto.py", for this folder and a corpus with this meta.json.

    It gets the path of train.py, and a smaller --block_size if a split is too short for that of its config.
    """
    script = quote(relative_path(PROJECT_FOLDER / "train.py").as_posix())
    max_block_size = min(  # a block and its last target are in one file
        max(shard["tokens"] for shard in split["shards"]) - 1 for split in meta["splits"].values()
    )
    is_too_short = max_block_size < _block_size(command)
    command = re.sub(r"(?<= )train\.py\b", lambda _: script, command, count=1)
    return command + (f" --block_size={max_block_size}" if is_too_short else "")


def _block_size(command: str) -> int:
    """The block size of the config in a training command; 0 if it names no config of this project."""
    name = re.search(r"\bconfig/\w+\.py\b", command)
    if name is None or not (PROJECT_FOLDER / name[0]).is_file():
        return 0
    if name[0] == "config/auto.py":
        return AUTO_BLOCK_SIZE
    text = (PROJECT_FOLDER / name[0]).read_text(encoding="utf-8")
    value = re.search(r"^block_size *= *([0-9]+)", text, re.MULTILINE)
    return int(value[1]) if value else DEFAULT_BLOCK_SIZE
