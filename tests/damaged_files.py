"""Helpers for tests/hostile: damage files, and check error messages."""

import json
from pathlib import Path

import pytest
from faults import seeds

from sample import load_model

STEP = "step-00000005"  # the checkpoint in the `run` fixture


def edit_json(path: Path, *keys, to) -> None:
    """Set the value at `keys` within a JSON file."""
    content = json.loads(path.read_bytes())
    parent = content
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = to
    path.write_text(json.dumps(content))


def error_of(function, *arguments, match) -> str:
    """Call a function that must raise a plain ValueError with `match` in its message; return the message."""
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert type(caught.value) is ValueError and str(match) in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def replace_checkpoint_file(run: Path, name: str, content: bytes) -> None:
    """Replace a file in the run's checkpoint, and write a manifest with its checksum."""
    (run / STEP / name).write_bytes(content)
    seeds.write_manifest(run / STEP)


def load_newest(run: Path) -> None:
    load_model(str(run), checkpoint_name="newest", device="cpu", dtype="float32")
