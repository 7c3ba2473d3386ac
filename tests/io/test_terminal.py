"""Paths in flags and settings: ~ is expanded, and an empty path is refused, in every script."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest

from configurator import resolve, setting
from fradique.data.prepare import _make_parser, main
from fradique.io.files import expand_home
from fradique.io.terminal import path_argument, wrap
from fradique.pretrained import __main__ as pretrained
from lab.common import ModelSettings
from sample import SampleSettings, read_prompt
from train import TrainSettings


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_the_home_folder_is_expanded_only_at_the_start(home):
    assert expand_home("~/runs/a") == f"{home}/runs/a" and expand_home("~") == str(home)
    assert (
        expand_home("runs/~/a") == "runs/~/a"
        and expand_home("./~x") == "./~x"
        and expand_home("gpt2") == "gpt2"
    )
    with pytest.raises(ValueError, match=r"no home folder '~nobody-here'; a folder .* is \./~nobody-here"):
        expand_home("~nobody-here/runs")


@pytest.mark.parametrize(
    ("cls", "key"),
    [
        (TrainSettings, "out_dir"),
        (TrainSettings, "data_dir"),
        (TrainSettings, "init_from"),
        (SampleSettings, "out_dir"),
        (SampleSettings, "init_from"),
        (ModelSettings, "out_dir"),
        (ModelSettings, "to"),
        (ModelSettings, "save_arrays"),
    ],
)
def test_path_settings_expand_the_home_folder(cls, key, home, tmp_path):
    assert getattr(resolve(cls, [f"--{key}=~/a"]).settings, key) == f"{home}/a"
    config = tmp_path / "config.py"
    config.write_text(f'{key} = "~/b"\n')
    assert getattr(resolve(cls, [str(config)]).settings, key) == f"{home}/b"


def test_each_of_several_paths_is_expanded(home):
    from lab.curves import CurveSettings

    settings = resolve(CurveSettings, ["--out_dir=~/a,out/b,~/c"]).settings
    assert settings.out_dir == f"{home}/a,out/b,{home}/c"


@pytest.mark.parametrize(
    ("cls", "key"),
    [
        (TrainSettings, "out_dir"),
        (TrainSettings, "dataset"),
        (SampleSettings, "out_dir"),
        (ModelSettings, "out_dir"),
    ],
)
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_path_is_refused(cls, key, value):
    """--out_dir="$OUT" of a shell in which OUT is not set."""
    with pytest.raises(ValueError, match=rf"--{key}= ?: is empty: name a folder"):
        resolve(cls, [f"--{key}={value}"])


def test_a_path_that_is_empty_by_default_may_be_empty():
    @dataclass(frozen=True)
    class Toy:
        """toy"""

        to: str = setting("", "output", path=True)

    assert resolve(Toy, ["--to="]).settings.to == ""


def test_flags_of_argparse_are_paths_too(home):
    assert path_argument("~/a") == home / "a"
    for text, message in (("", "empty"), ("~nobody-here/a", "no home folder")):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            path_argument(text)


def test_prepare_expands_and_refuses(home, capsys):
    from corpus_helpers import story_spec

    args = _make_parser(story_spec(Path())).parse_args(["--out_dir=~/corpus", "--input", "~/a.txt", "b.txt"])
    assert args.out_dir == home / "corpus" and args.input == [home / "a.txt", Path("b.txt")]
    with pytest.raises(SystemExit):
        main(story_spec(Path()), ["--out_dir="])
    assert "argument --out_dir: empty: name a file or folder" in capsys.readouterr().err


def test_exports_expand_and_refuse(capsys):
    assert (
        pretrained._make_parser()
        .parse_args(["export", "--out_dir=~/a", "--to=~/b"])
        .out_dir.endswith("home/a")
    )
    with pytest.raises(SystemExit):
        pretrained.main(["export", "--out_dir=", "--to=b"])
    assert "empty: name a file or folder" in capsys.readouterr().err


def test_a_prompt_file_may_be_in_the_home_folder(home):
    (home / "prompt.txt").write_text("Era uma vez")
    assert read_prompt("FILE:~/prompt.txt") == "Era uma vez"


def test_wrapped_text_does_not_break_quoted_commands():
    assert wrap("run `a b c` now", 9, 2) == "  run\n  a b c\n  now"
