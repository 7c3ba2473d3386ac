"""Fixtures for the tests of tokenizers: GPT-2's, and a small trained one."""

import pytest
from tokenizer_texts import SAMPLE

from fradique.tokenizer import tokenizer
from fradique.tokenizer.tokenizer import BPETokenizer, GPT2Tokenizer


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return tokenizer.train_bpe([SAMPLE] * 3 + ["a casa da lua, o mar e a ilha da casa " * 20], 300)
