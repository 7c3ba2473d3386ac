"""What prepare.py prints: a training command that works as it is, notes, and errors of the file system."""

import errno
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from corpus_helpers import STORY, story_spec, text_of
from support import ROOT

from fradique.data import train_command
from fradique.data.prepare import AUTO_COMMAND, main
from fradique.training.autoconfig import PRESETS_OF_BPE, PRESETS_OF_CHARACTERS
from train import TrainSettings


@pytest.mark.parametrize("name", ["um livro", "preço $HOME", "a'b", "{name}"])
@pytest.mark.parametrize("inside", [True, False])
def test_the_printed_command_works_as_it_is(tmp_path, capsys, monkeypatch, name, inside):
    """In any folder, and for a name that a shell would change."""
    monkeypatch.chdir(ROOT if inside else tmp_path)
    spec = replace(story_spec(tmp_path / "my data" / "story"), next_command=AUTO_COMMAND)
    assert main(spec, ["--out_dir", str(tmp_path / "my data" / name)]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    train = "train.py" if inside else str(ROOT / "train.py")
    assert words == ["python", train, "config/auto.py", f"--dataset={name}", f"--out_dir=out/{name}"]


@pytest.mark.parametrize(
    ("command", "characters", "expected"),
    [
        (AUTO_COMMAND, 400, " --block_size=39"),
        (AUTO_COMMAND, 2560, " --block_size=255"),
        (AUTO_COMMAND, 2570, ""),
        ("python train.py config/train_machado_char_cpu.py", 320, " --block_size=31"),
        ("python train.py config/train_machado_char_cpu.py", 330, ""),
        ("python train.py config/train_gpt2.py", 10_240, " --block_size=1023"),
        ("python train.py config/train_gpt2.py", 10_250, ""),
        ("go", 20, ""),
    ],
)
def test_a_short_text_gets_a_smaller_block_size(tmp_path, capsys, command, characters, expected):
    text = text_of((STORY * 2)[:characters])
    spec = replace(story_spec(tmp_path / "data" / "story"), next_command=command, text=lambda _: text)
    assert main(spec, []) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"next: {command.format(name='story')}{expected}"


def test_the_block_size_of_auto_is_its_smallest():
    presets = PRESETS_OF_CHARACTERS + PRESETS_OF_BPE
    assert min(preset.block_size for preset in presets) == train_command.AUTO_BLOCK_SIZE
    assert TrainSettings().block_size == train_command.DEFAULT_BLOCK_SIZE


@pytest.mark.parametrize(("separator", "noted"), [("</s>", True), ("gato", False), ("none", False)])
@pytest.mark.parametrize("flags", [[], ["--shards=2"]])
def test_a_separator_that_no_text_has_is_noted(tmp_path, capsys, separator, noted, flags):
    (tmp_path / "a.txt").write_text(STORY, encoding="utf-8")
    spec = replace(story_spec(tmp_path / "data" / "custom"), text=None, tokenizer="bpe:300")
    flags = ["--input", str(tmp_path / "a.txt"), "--tokenizer=bpe:300", *flags]
    assert main(spec, [*flags, "--name=a", f"--document_separator={separator}"]) == 0
    assert ("the text has no '</s>'" in capsys.readouterr().err) == noted
    assert main(spec, [*flags, "--name=b"]) == 0  # the usual separator need not occur
    assert "the text has no" not in capsys.readouterr().err


# Errors of the file system


def test_a_name_that_is_not_utf8_is_refused(tmp_path, capsys):
    folder = os.fsdecode(os.fsencode(tmp_path / "livro") + b"\xe9")
    assert main(story_spec(tmp_path / "data"), ["--out_dir", folder]) == 2
    assert "the name is not UTF-8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "Choose another folder with --out_dir"),
        (errno.EACCES, "chmod"),
        (errno.ENOSPC, "Free some space"),
        (errno.EEXIST, "is a file, not a folder. Choose another folder"),
        (errno.ENOTDIR, "is a file, not a folder. Choose another folder"),
    ],
)
def test_an_error_of_the_file_system_says_what_to_do(tmp_path, capsys, monkeypatch, number, advice):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number), "/some/path")

    monkeypatch.setattr(Path, "mkdir", fail)
    assert main(story_spec(tmp_path / "data"), []) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: /some/path: ") and advice in message


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_of_the_output_is_not_that_of_the_corpus(tmp_path, unbuffered):
    (tmp_path / "book.txt").write_text(STORY, encoding="utf-8")
    command = [sys.executable, ROOT / "data/custom/prepare.py", "--input", "book.txt", "--out_dir", "made"]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        result = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert result.returncode == 2 and "error: standard output: No space left on device" in result.stderr
    assert "--out_dir" not in result.stderr and (tmp_path / "made" / "meta.json").exists()
