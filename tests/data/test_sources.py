"""The sources of the corpora: Python's standard library, and downloads from a local server."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import CORPORA, file_names, needs_corpora
from download_server import PAGE, PAGE_SHA256

from fradique.data import sources
from fradique.data.prepare import CorpusSpec, main
from fradique.io.download import RemoteFile

# Python's standard library


def test_the_python_text_is_ascii_limited_and_reproducible():
    library = sources.python_library(Path())
    string = "".join(library.chunks())
    assert set(string) <= {"\n", *map(chr, range(32, 127))}
    assert len(string) == library.size <= 8_000_000
    assert string == "".join(sources.python_library(Path()).chunks())
    assert "class Thread" in string and "def namedtuple" in string
    assert "Python 3" in library.source


def test_the_python_validation_split_is_representative():
    string = "".join(sources.python_library(Path()).chunks())
    train, val = string[: int(len(string) * 0.9)], string[int(len(string) * 0.9) :]
    frequencies = [
        np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=128) / len(text)
        for text in (train, val)
    ]
    assert np.abs(frequencies[0] - frequencies[1]).sum() < 0.2


def test_files_outside_the_python_library_are_excluded(tmp_path, monkeypatch):
    included = {"a.py": "a = 1\r\n", "email/b.py": "b = 2\n"}
    excluded = [
        "site-packages/x.py",
        "test/x.py",
        "_sysconfigdata_1.py",
        "lib2to3/x.py",
        "x.txt",
        "sitecustomize.py",
    ]
    for name, content in {**included, **dict.fromkeys(excluded, "x = 0\n"), "é.py": "é = 'não'\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "broken_link.py").symlink_to(tmp_path / "missing")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    chunks = list(sources.python_library(Path()).chunks())
    assert sorted(chunks) == ["a = 1\n", "b = 2\n"]


def test_a_python_without_source_files_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"no source code in .*--input"):
        sources.python_library(Path())


# Downloads


def test_downloads_are_sorted_by_name_and_kept(server, tmp_path, capsys):
    items = tuple(RemoteFile(server.url(name), PAGE_SHA256) for name in ("b.txt", "a%C3%A9.txt"))
    spec = CorpusSpec(tmp_path, "A test.", "char", "go", text=sources.download_text(items))
    assert main(spec, []) == 0
    assert file_names(tmp_path / "raw") == ["aé.txt", "b.txt"]
    assert server.requests == ["/a%C3%A7/a%C3%A9.txt", "/a%C3%A7/b.txt"]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["source"] == ", ".join(item.url for item in reversed(items))
    assert sum(split["bytes"] for split in meta["splits"].values()) == 2 * len(PAGE)
    assert main(spec, []) == 0
    assert len(server.requests) == 2
    assert "go" in capsys.readouterr().out


def test_a_failed_download_keeps_earlier_files(server, tmp_path, capsys):
    items = (RemoteFile(server.url("a.txt"), PAGE_SHA256), RemoteFile(server.url("gone.txt"), PAGE_SHA256))
    assert main(CorpusSpec(tmp_path, "A test.", "char", "go", text=sources.download_text(items)), []) == 2
    assert "error: http://127.0.0.1" in capsys.readouterr().err
    assert file_names(tmp_path) == ["raw"] and file_names(tmp_path / "raw") == ["a.txt"]


def test_every_source_has_a_fixed_version_and_a_sha256():
    groups = (
        sources.ECA,
        sources.MACHADO_TALES,
        sources.MACHADO_NOVELS,
        sources.SHAKESPEARE,
        sources.GOLDEN_AGE,
    )
    items = [item for group in groups for item in group]
    assert len(items) == 21 + 4
    for item in items:
        assert item.url.startswith("https://raw.githubusercontent.com/") and item.url.isascii()
        assert len(item.url.split("/")[5]) == 40  # a commit
        assert len(bytes.fromhex(item.sha256)) == 32
    assert len({item.sha256 for item in items}) == len({item.url for item in items}) == 25
    assert all("/E%C3%A7a/archive/" in item.url for item in sources.ECA)


@needs_corpora
def test_the_sha256_sums_match_those_of_the_corpora():
    lines = [line.split()[:2] for line in (CORPORA / "SHA256SUMS").read_text().splitlines()]
    listed = {name: sha256 for sha256, name in lines}
    assert [(f"eca/{item.name}", item.sha256) for item in sources.ECA] == sorted(
        pair for pair in listed.items() if pair[0].startswith("eca/")
    )
    single_files = {"machado_contos": sources.MACHADO_TALES, "machado_romances": sources.MACHADO_NOVELS}
    single_files |= {"shakespeare": sources.SHAKESPEARE, "golden_age": sources.GOLDEN_AGE}
    for name, (item,) in single_files.items():
        assert listed[f"{name}.txt"] == item.sha256
