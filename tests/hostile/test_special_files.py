"""Pipes, folders, endless devices and symlink loops in place of files."""

import os
import warnings
from pathlib import Path

import pytest
from damaged_files import error_of, load_newest

from fradique.checkpointing import run_folder
from fradique.data import dataset
from fradique.pretrained import loader
from sample import read_prompt


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["pipe", "folder", "endless device", "loop of links"])
@pytest.mark.parametrize(
    "name",
    [
        "corpus/meta.json",
        "corpus/tokenizer.json",
        "corpus/train.bin",
        "gpt2/config.json",
        "gpt2/model.safetensors",
        "run/settings.json",
        "run/tokenizer.json",
        "run/step-00000005/manifest.json",
        "run/step-00000005/state.json",
    ],
)
def test_a_special_file_is_refused(corpus, gpt2, run, kind, name):
    path = corpus.parent / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "endless device" else path)

    def read_everything():
        dataset.open_corpus(corpus, 8)
        loader.load_weights(str(gpt2))
        load_newest(run)
        run_folder.run_metadata(run)

    with pytest.raises((ValueError, OSError)) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_everything()
    assert type(caught.value) is ValueError or caught.value.strerror


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_an_endless_prompt_is_refused():
    error_of(read_prompt, "FILE:/dev/zero", match="/dev/zero is longer than 4 MB")
