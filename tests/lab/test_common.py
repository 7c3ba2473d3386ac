"""Helpers of the lab commands: default prompts, token labels, output paths, numbers, error messages."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make_text, run_lab, run_training, write_corpus

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")

from fradique.tokenizer import tokenizer as tokenizers
from lab import common, tokens


@pytest.fixture(scope="module")
def gpt2():
    return tokenizers.GPT2Tokenizer()


def test_token_labels_show_whitespace_and_broken_utf8(gpt2):
    characters = tokenizers.CharTokenizer("a \n\u0007\u0301")
    ids = np.array(characters.encode("a \n\u0007\u0301"))
    assert common.token_labels(characters, ids) == ["a", "␣", "⏎", "‹7›", "◌\u0301"]
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


# Default prompts

COMMANDS = {  # command: the flags that make it fast
    "lab.attention": ["--layer=0", "--head=0"],
    "lab.tokens": ["--top=2", "--temperatures=1"],
    "lab.sampling": ["--tokens=9", "--temperatures=0"],
}
VAL_TEXT = "ra, lua\njardim era casa\nmar, amor "


def write_small_corpus(settings, text=VAL_TEXT):
    """Write a corpus of the run whose validation split is `text`."""
    train_text = make_text(500)
    fraction = len(text) / len(train_text + text)
    write_corpus(Path(settings.data_dir) / settings.dataset, train_text + text, fraction)


@pytest.fixture
def run(settings, tmp_path):
    """The settings of a finished run with a corpus of its own."""
    settings = replace(settings, data_dir=str(tmp_path / "data"), dataset="own", max_iters=1)
    write_small_corpus(settings)
    run_training(settings)
    return settings


def test_the_default_prompt_is_a_line_of_the_validation_text(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "write_temperature_gif", lambda logits, order, labels, path: path.touch())
    for command, options in COMMANDS.items():
        arrays = tmp_path / f"{command}.npz"
        options = [*options, f"--to={tmp_path / 'x'}", f"--save_arrays={arrays}"]
        result = run_lab(command, f"--out_dir={run.out_dir}", *options)
        assert result.returncode == 0 and not result.stderr
        # the block size is 16 tokens
        message = "prompt, the beginning of the run's validation text: 'jardim era casa'\n"
        assert result.stdout.startswith(message)
        if command != "lab.sampling":
            assert len(np.load(arrays)["ids"]) == len("jardim era casa")


def test_a_run_in_init_from_has_its_own_prompt(run, tmp_path):
    options = [*COMMANDS["lab.sampling"], f"--to={tmp_path / 'x'}"]
    for source in (run.out_dir, f"{run.out_dir}/best"):  # a run folder, and one of its checkpoints
        result = run_lab("lab.sampling", f"--init_from={source}", *options)
        assert result.returncode == 0 and "'jardim era casa'" in result.stdout, result.stderr


def test_without_its_corpus_a_run_has_a_fixed_prompt(run, tmp_path):
    """Its characters are in the vocabulary of the model, which has no capital A."""
    shutil.rmtree(run.data_dir)
    for command, prompt in (("lab.attention", " figura é poética"), ("lab.sampling", " casa")):
        result = run_lab(command, f"--out_dir={run.out_dir}", f"--to={tmp_path / 'x'}", *COMMANDS[command])
        assert result.returncode == 0, result.stderr
        assert f"note: the prompt is {prompt[:16]!r}, because no validation text was found: " in result.stderr
        assert "there is no corpus in" in result.stderr and "validation text" not in result.stdout


def test_a_corpus_with_another_tokenizer_is_not_used(run, tmp_path):
    write_small_corpus(run, "a\nÀ\n")
    result = run_lab("lab.sampling", f"--out_dir={run.out_dir}", "--tokens=9", f"--to={tmp_path / 'x'}")
    assert result.returncode == 0
    assert "note: the prompt is ' casa'" in result.stderr and "another tokenizer" in result.stderr


def test_pretrained_weights_have_a_fixed_prompt(gpt2, capsys):
    loaded = SimpleNamespace(tokenizer=gpt2, model=SimpleNamespace(config=SimpleNamespace(block_size=1024)))
    settings = common.PromptSettings(init_from="gpt2")
    ids = common.prompt_tokens(loaded, settings, 24, fallback="A figura é poética")
    assert gpt2.decode(ids) == "A figura é poética"
    output = capsys.readouterr()
    assert output.err == (
        "note: the prompt is 'A figura é poética', because no validation text was found: gpt2 is not a run "
        "folder\n"
    )
    assert not output.out


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("b c\n\n  de fgh\nij", "de fgh\nij"),  # 9 of at most 12 tokens
        ("b c\nde fgh\nijklmn", "de fgh"),  # the last word does not fit
        ("b c\nde fghijklmnopqrs", "de"),
        ("b cd efg", "cd efg"),  # no line: from the first whole word on
        ("abcdefghijklmnop", "abcdefghijkl"),  # one long word
        ("a\n", "a"),
        (" \n ", ""),
    ],
)
def test_a_prompt_has_whole_words_from_a_line_start(text, prompt):
    tokenizer = tokenizers.CharTokenizer("".join(sorted(set(text))))
    assert common.beginning_of_text(tokenizer, tokenizer.encode(text), max_tokens=12) == prompt


def test_a_line_begins_at_the_end_of_a_document(gpt2):
    ids = gpt2.encode("b<|endoftext|>c d<|endoftext|>e")
    assert common.beginning_of_text(gpt2, ids, max_tokens=9) == "c d\ne"


@given(st.text(st.sampled_from("ab \n\t日é😀\u0301"), min_size=1), st.integers(1, 8), st.booleans())
def test_a_prompt_is_part_of_the_text_and_short(gpt2, text, max_tokens, is_char):
    tokenizer = tokenizers.CharTokenizer("".join(sorted(set(text)))) if is_char else gpt2
    prompt = common.beginning_of_text(tokenizer, tokenizer.encode(text), max_tokens)
    assert prompt in text and prompt == prompt.strip()
    assert len(tokenizer.encode(prompt)) <= max_tokens
