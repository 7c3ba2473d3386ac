"""Repetition in texts made by hand, and the command that shows it."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import run_lab, run_training

from lab import sampling

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")


def test_distinct_n_is_the_share_of_n_grams_that_differ():
    assert sampling.distinct([1, 2, 1, 2, 1], 1) == 2 / 5
    assert sampling.distinct([1, 2, 1, 2, 1], 2) == 2 / 4
    assert sampling.distinct([1, 2, 3, 4], 2) == 1.0
    assert sampling.distinct([1], 2) == 1.0


def test_what_stood_before_is_repeated():
    ids = [1, 2, 3, 4, 9, 1, 2, 3, 4, 8]
    assert np.flatnonzero(sampling.repeats(ids, long=3)).tolist() == [7, 8]
    assert not sampling.repeats(list(range(20)), long=3).any()


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4))
def test_repeats_agree_with_a_search_through_the_text(ids, long):
    text = "".join(map(str, ids))
    expected = [
        end >= long and text.find(text[end - long : end]) < end - long for end in range(1, len(text) + 1)
    ]
    assert sampling.repeats(ids, long).tolist() == expected


def test_a_loop_is_the_shortest_piece_that_a_text_ends_with():
    assert sampling.loop([5, 6, 1, 2, 1, 2, 1, 2]) == 2
    assert sampling.loop([7, 7, 7]) == 1
    assert sampling.loop([1, 2, 3, 1, 2, 3]) == 0  # twice is no loop
    assert sampling.loop([]) == 0


def test_the_command_shows_greedy_text_beside_drawn(settings, tmp_path):
    run_training(settings)
    words = [f"--out_dir={settings.out_dir}", "--start=amor", f"--to={tmp_path / 's'}", "--tokens=120"]
    words += ["--temperatures=0,1", "--samples=2", f"--save_arrays={tmp_path / 'x'}"]
    done = run_lab("lab.sampling", *words)
    assert done.returncode == 0, done.stderr
    greedy = re.search(r"^\| greedy \|(.+)\|$", done.stdout, re.M)[1].split("|")
    drawn = re.search(r"^\| temperature 1 \|(.+)\|$", done.stdout, re.M)[1].split("|")
    assert float(greedy[3]) < float(drawn[3])  # distinct-4
    assert "tokens" in greedy[-1] and "–" in drawn[-1]  # a model of 20 steps goes in a circle
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["greedy"].shape == (1, 120) and arrays["temperature 1"].shape == (2, 120)
    text = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert "<h2>greedy</h2>" in text and "<mark>" in text
    assert (tmp_path / "s.png").stat().st_size > 5000
    refused = run_lab("lab.sampling", f"--out_dir={settings.out_dir}", "--temperatures=-1,x")
    assert refused.returncode == 2 and "numbers with commas between them" in refused.stderr
