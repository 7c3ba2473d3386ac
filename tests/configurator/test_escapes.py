"""\\n, \\t and \\\\ in flags of settings with escapes=True. Config files and saved values are not changed."""

import json
import re
from dataclasses import asdict, dataclass

import pytest
from example_settings import get, write
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configurator import format_help, format_settings, resolve, setting
from sample import SampleSettings
from train import TrainSettings

NEWLINE, TAB, BACKSLASH = chr(10), chr(9), chr(92)
SETTINGS = [(TrainSettings, "sample_start"), (SampleSettings, "start"), (SampleSettings, "stop")]


@dataclass(frozen=True)
class Toy:
    """toy"""

    start: str = setting(r"\n", "prompt", escapes=True)
    path: str = setting("a", "path", path=True)
    top_k: int | str = setting(3, "a number or text", escapes=True)


def typed(cls, key, text):
    """The value of a flag, written in both ways."""
    (value,) = {
        getattr(resolve(cls, argv).settings, key) for argv in ([f"--{key}={text}"], [f"--{key}", text])
    }
    return value


@pytest.mark.parametrize(("cls", "key"), SETTINGS)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"Era uma vez\n", f"Era uma vez{NEWLINE}"),
        (r"\n", NEWLINE),
        (r"a\n\n\tb", f"a{NEWLINE}{NEWLINE}{TAB}b"),
        (r"\\n", f"{BACKSLASH}n"),
        (r"\\\n", f"{BACKSLASH}{NEWLINE}"),
        (r"\\\\", f"{BACKSLASH}{BACKSLASH}"),
        (r"\alpha \x41 \u00e9 \"q\" \0 \r", r"\alpha \x41 \u00e9 \"q\" \0 \r"),
        ("a\\", "a\\"),
        (f"a{NEWLINE}b{TAB}", f"a{NEWLINE}b{TAB}"),
        ("-", "-"),
        ("", ""),
        ("é — 日本", "é — 日本"),
    ],
)
def test_escapes_in_prompts_and_stop_texts_are_replaced(cls, key, text, value):
    assert typed(cls, key, text) == value


@pytest.mark.parametrize("path", [r"FILE:C:\new\text.txt", r"FILE:\\host\notes\t.txt", r"FILE:~\n.txt"])
def test_the_path_of_a_prompt_file_is_not_changed(path):
    assert typed(SampleSettings, "start", path) == path


def test_other_settings_keep_their_backslashes():
    assert typed(Toy, "path", r"C:\new\text") == r"C:\new\text"
    assert typed(TrainSettings, "out_dir", r"out\new") == r"out\new"
    assert get(r"--start=a\n").start == r"a\n"  # without escapes=True
    assert typed(Toy, "top_k", "5") == 5 and typed(Toy, "top_k", r"a\tb") == f"a{TAB}b"


@pytest.mark.parametrize(("cls", "key"), SETTINGS)
def test_a_config_file_and_saved_settings_are_not_changed(cls, key, tmp_path):
    texts = (f"a{NEWLINE}b", r"a\nb", r"\\", f"{BACKSLASH}{NEWLINE}")
    for text in texts:
        config = tmp_path / "config.py"
        config.write_text(f"{key} = {text!r}\n")
        assert getattr(resolve(cls, [str(config)]).settings, key) == text
        saved = tmp_path / "settings.json"
        saved.write_text(json.dumps({"settings": {key: text}}))
        assert getattr(resolve(cls, [str(saved)]).settings, key) == text
        assert getattr(resolve(cls, [], base={key: text}).settings, key) == text  # of a resumed run
    assert resolve(Toy, []).settings.start == r"\n"  # a default is not changed either


@pytest.mark.parametrize(("cls", "key"), SETTINGS)
def test_a_typed_newline_survives_printing_saving_and_resuming(cls, key, tmp_path):
    resolved = resolve(cls, [rf"--{key}=a\n\\n\tb"])
    assert getattr(resolved.settings, key) == f"a{NEWLINE}{BACKSLASH}n{TAB}b"
    printed = write(str(tmp_path / "printed.py"), format_settings(resolved))
    assert resolve(cls, [printed]).settings == resolved.settings
    saved = json.loads(json.dumps(asdict(resolved.settings)))
    assert resolve(cls, [], base=saved).settings == resolved.settings


@hypothesis_settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(st.text(st.sampled_from("\\nt\n\té"), max_size=12))
def test_any_text_can_be_typed_with_escapes(text):
    """The reverse: each backslash is doubled, and newlines and tabs are written as escapes."""
    escapes = {"\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    assert typed(Toy, "start", "".join(escapes.get(char, char) for char in text)) == text


@pytest.mark.parametrize(("cls", "key"), SETTINGS)
def test_help_explains_the_newline(cls, key):
    text = " ".join(format_help(cls, show_all=True).split())
    assert r"\n" in re.search(rf"--{key} (.*?) --", text)[1]
