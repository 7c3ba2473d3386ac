"""Fixtures for the corpus tests."""

import os

import pytest
from download_server import server  # noqa: F401

from fradique.data import shard_plan, token_files

# name -> the size up to which token files are cached, and the function that reads larger files
READERS = {"cached": (64 << 20, "pread"), "pread": (0, "pread"), "seek": (0, "_seek_and_read")}


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    """Run the test with each method of reading tokens: from memory, with os.pread, with seek (Windows)."""
    max_cached_bytes, function = READERS[request.param]
    monkeypatch.setattr(token_files, "MAX_CACHED_BYTES", max_cached_bytes)
    if function != "pread":
        monkeypatch.setattr(token_files, "_read", token_files._seek_and_read)
    elif not hasattr(os, "pread"):
        pytest.skip("this system has no os.pread")


@pytest.fixture
def small_shards(monkeypatch):
    """Allow shards of 10 characters, so that tests need little text."""
    monkeypatch.setattr(shard_plan, "MIN_SHARD_CHARS", 10)
