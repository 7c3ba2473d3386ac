"""Measures of repetition in short sequences, and the lab.sampling command."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import run_lab, run_training

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")

from lab import sampling


def test_distinct_share_counts_different_n_grams():
    assert sampling.distinct_share([1, 2, 1, 2, 1], 1) == 2 / 5
    assert sampling.distinct_share([1, 2, 1, 2, 1], 2) == 2 / 4
    assert sampling.distinct_share([1, 2, 3, 4], 2) == 1.0
    assert sampling.distinct_share([1], 2) == 1.0


def test_tokens_that_occurred_before_are_repeated():
    ids = [1, 2, 3, 4, 9, 1, 2, 3, 4, 8]
    assert np.flatnonzero(sampling.repeated_tokens(ids, length=3)).tolist() == [7, 8]
    assert not sampling.repeated_tokens(list(range(20)), length=3).any()


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4))
def test_repeated_tokens_agree_with_a_text_search(ids, length):
    text = "".join(map(str, ids))
    expected = [
        end >= length and text.find(text[end - length : end]) < end - length
        for end in range(1, len(text) + 1)
    ]
    assert sampling.repeated_tokens(ids, length).tolist() == expected


def test_loop_length_finds_the_shortest_loop_at_the_end():
    assert sampling.loop_length([5, 6, 1, 2, 1, 2, 1, 2]) == 2
    assert sampling.loop_length([7, 7, 7]) == 1
    assert sampling.loop_length([1, 2, 3, 1, 2, 3]) == 0  # it must repeat three times
    assert sampling.loop_length([]) == 0


def test_the_command_compares_greedy_and_sampled_text(settings, tmp_path):
    run_training(settings)
    options = [f"--out_dir={settings.out_dir}", "--start=amor", f"--to={tmp_path / 's'}", "--tokens=120"]
    options += ["--temperatures=0,1", "--samples=2", f"--save_arrays={tmp_path / 'x'}"]
    result = run_lab("lab.sampling", *options)
    assert result.returncode == 0, result.stderr
    greedy = re.search(r"^\| greedy \|(.+)\|$", result.stdout, re.M)[1].split("|")
    sampled = re.search(r"^\| temperature 1 \|(.+)\|$", result.stdout, re.M)[1].split("|")
    assert float(greedy[3]) < float(sampled[3])  # distinct-4
    assert "tokens" in greedy[-1] and "–" in sampled[-1]  # after 20 steps, greedy text loops
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["greedy"].shape == (1, 120) and arrays["temperature 1"].shape == (2, 120)
    text = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert "<h2>greedy</h2>" in text and "<mark>" in text
    assert (tmp_path / "s.png").stat().st_size > 5000
    result = run_lab("lab.sampling", f"--out_dir={settings.out_dir}", "--temperatures=-1,x")
    assert result.returncode == 2 and "comma-separated numbers" in result.stderr
