"""Helpers of the lab commands: token labels, output paths, comma-separated numbers, error messages."""

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")

from fradique.tokenizer import tokenizer as tokenizers
from lab import common


def test_token_labels_show_whitespace_and_broken_utf8():
    characters = tokenizers.CharTokenizer("a \n\u0007")
    ids = np.array(characters.encode("a \n\u0007"))
    assert common.token_labels(characters, ids) == ["a", "␣", "⏎", "‹7›"]
    gpt2 = tokenizers.GPT2Tokenizer()
    ids = np.append(gpt2.encode("日")[:1], gpt2.end_of_text)
    assert common.token_labels(gpt2, ids) == ["‹e6›‹97›", "⟨end⟩"]


def test_output_paths_have_no_known_extension(tmp_path):
    assert common.output_path_in(str(tmp_path), "", "movie") == tmp_path / "movie"
    assert common.output_path_in("out", str(tmp_path / "new" / "a.png"), "movie") == tmp_path / "new" / "a"
    assert (tmp_path / "new").is_dir()
    assert common.output_path_in("out", str(tmp_path / "v1.5"), "movie") == tmp_path / "v1.5"


def test_extensions_keep_a_dot_in_the_name(tmp_path):
    path = common.output_path_in("out", str(tmp_path / "run-1.5"), "report")
    assert common.add_extension(path, ".html") == tmp_path / "run-1.5.html"


def test_number_lists_are_parsed_and_checked():
    assert common.parse_numbers("0.5, 1,") == [0.5, 1.0]
    assert common.number_problems("t", "0,1", minimum=0.0) == []
    for text, message in (
        ("", "is empty"),
        ("1,x", "comma-separated"),
        ("-1", "at least 0"),
        ("inf", "finite"),
    ):
        (problem,) = common.number_problems("t", text, minimum=0.0)
        assert message in problem
    (problem,) = common.number_problems("t", "0,1", minimum=0.0, exclusive=True)
    assert "above 0" in problem


def test_out_of_memory_gives_one_message_and_status_2(capsys):
    def main(resolved):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    assert common.command(main, common.ModelSettings, []) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory: ") and "Traceback" not in message
