"""The index of a text: sizes, alphabet, and verified reading from any character."""

import pytest
from corpus_helpers import STORY, text_of

from fradique.data import text_index


def test_any_range_of_an_indexed_text_is_read_and_verified(monkeypatch):
    monkeypatch.setattr(text_index, "BLOCK_CHARS", 64)
    string = STORY[:500]
    index = text_index.index_text(text_of(string, 30))
    assert (index.chars, index.bytes) == (500, len(string.encode()))
    assert index.alphabet == "".join(sorted(set(string))) and len(index.blocks) == 8
    for start in range(0, 500, 7):
        for end in (start, start + 1, start + 64, 500):
            text = "".join(text_index.read_between(text_of(string, 30), index, start, min(end, 500)))
            assert text == string[start : min(end, 500)]
    for changed in (string[:400] + "x" + string[401:], string[:450], string[1:]):
        with pytest.raises(ValueError, match=r"the text has changed since"):
            list(text_index.read_between(text_of(changed, 30), index, 390, 500))
