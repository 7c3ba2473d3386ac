"""Fixtures: intact folders, which the tests then damage."""

import json

import pytest
from faults import seeds


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    seeds.write_corpus(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    """A run folder with one checkpoint, step-00000005."""
    folder = tmp_path / "run"
    folder.mkdir()
    seeds.write_run(folder)
    return folder


@pytest.fixture
def gpt2(tmp_path):
    """A tiny GPT-2 in Hugging Face's layout, with a Fradique tokenizer file."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(seeds.HF_WEIGHTS)
    (folder / "config.json").write_text(json.dumps(seeds.HF_CONFIG))
    (folder / "fradique_tokenizer.json").write_bytes(seeds.tokenizer_json()[0])
    return folder
