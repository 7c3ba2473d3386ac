"""Documents from files of all kinds and from a fake Hugging Face hub."""

import codecs
import gzip
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_helpers import write_documents

from fradique.data import documents, sources
from fradique.data.input_files import find_files
from fradique.data.shard_build import Worker, prepare_shards
from fradique.data.shard_plan import DocumentJob

DOCS = ["Um gato.", "", "Dois gatos\r\ne uma lua — 🙂.", "x" * 5000, "<|endoftext|> é texto."]


def write_document_files(folder: Path, docs: list[str]) -> dict[str, Path]:
    """Write `docs` to a file of each kind. Returns {file name: path}."""
    table = pa.table({"id": range(len(docs)), "text": docs})
    lines = "".join(json.dumps({"text": doc, "more": 1}) + "\n" for doc in docs)
    pq.write_table(table, folder / "d.parquet", row_group_size=2)
    (folder / "d.jsonl").write_text(lines + "\n", encoding="utf-8")
    with gzip.open(folder / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    return {path.name: path for path in folder.iterdir()}


def test_all_kinds_of_files_give_the_same_documents(tmp_path):
    for path in write_document_files(tmp_path, DOCS).values():
        assert ["".join(doc) for doc in documents.local_documents([path])] == DOCS
    (tmp_path / "a.txt").write_bytes(DOCS[2].encode())
    (tmp_path / "b.txt").write_bytes(DOCS[3].encode())
    files = find_files([tmp_path], (".txt",))
    assert ["".join(doc) for doc in documents.local_documents(files)] == DOCS[2:4]
    assert len(find_files([tmp_path], documents.ENDINGS)) == 5


BROKEN_LINES = [
    (b'{"text": "a"}\n{"text": 3}\n', "line 2 is not an object with a text"),
    (b'{"text": "a"}\n\n["a"]\n', "line 3 is not an object with a text"),
    (b'{"body": "a"}\n', "line 1 is not an object with a text"),
    (b'{"text": "a"\n', "line 1 is not JSON"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', "byte 0xff at offset 24 "),
    (b'{"text": "\\ud800"}\n', "line 1: half of a surrogate pair"),
    (b"[" * 100_000 + b"\n", "line 1 is not JSON"),
]


@pytest.mark.parametrize(("data", "message"), BROKEN_LINES, ids=[message for _, message in BROKEN_LINES])
def test_an_invalid_line_of_json_is_reported(tmp_path, data, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.jsonl") as caught:
        list(documents.local_documents([path]))
    assert message in str(caught.value)


def test_a_line_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 20)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * 30 + '"}\n')
    with pytest.raises(ValueError, match=r"line 1 is longer than"):
        list(documents.local_documents([tmp_path / "a.jsonl"]))


def test_damaged_files_and_unknown_kinds_are_reported(tmp_path):
    files = write_document_files(tmp_path, ["uma casa"] * 500)
    for name in ("d.parquet", "d.jsonl.gz"):
        files[name].write_bytes(files[name].read_bytes()[:-20])
        with pytest.raises(ValueError, match=name):
            list(documents.local_documents([files[name]]))
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "no_text.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "number.parquet")
    (tmp_path / "a.csv").write_text("text\na\n")
    for name, message in (
        ("no_text.parquet", "no column 'text'"),
        ("number.parquet", "row 0"),
        ("a.csv", "none of"),
    ):
        with pytest.raises(ValueError, match=message):
            list(documents.local_documents([tmp_path / name]))


def test_documents_are_counted_and_read_from_any_index(tmp_path):
    docs = write_documents(tmp_path)
    counts = [documents.count_documents(path) for path in sorted(tmp_path.iterdir())]
    assert counts == [50, 30, 40, 1]
    for path, count in zip(sorted(tmp_path.iterdir()), counts, strict=True):
        for first in range(0, count + 1, 9):
            assert ["".join(doc) for doc in documents.read_documents(path, first)] == docs[first:count]
        docs = docs[count:]


# The Hugging Face hub


class FakeStream:
    """A fake `datasets` package that yields two rows and then raises a network error."""

    def load_dataset(self, name, **options):
        self.call = name, options
        yield {"text": "uma casa"}
        yield {"text": "uma lua"}
        raise ConnectionError("the cable was cut\nlong traceback")


def test_a_broken_stream_from_the_hub_suggests_input(monkeypatch):
    fake = FakeStream()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    stream = documents.hub_documents(sources.OPENWEBTEXT)
    assert [next(stream), next(stream)] == [("uma casa",), ("uma lua",)]
    with pytest.raises(ValueError, match=r"ConnectionError: the cable was cut\).*--input") as caught:
        next(stream)
    assert "\n" not in str(caught.value)
    assert fake.call[0] == "Skylion007/openwebtext" and fake.call[1]["streaming"] is True


@pytest.mark.parametrize("row", [{"content": "uma lua"}, {"content": "a", "text": None}, {"text": 5}])
def test_a_data_set_without_text_is_no_network_problem(monkeypatch, row):
    fake = FakeStream()
    fake.load_dataset = lambda name, **options: iter([row])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(ValueError, match=r"has no column 'text' of text, only \w+") as caught:
        next(documents.hub_documents("someone/words"))
    assert "network" not in str(caught.value) and "someone/words" in str(caught.value)


class FakeHub:
    """A fake `datasets` package whose data set consists of local files."""

    def __init__(self, urls):
        self.config, self.data_files = self, {"train": urls}

    def load_dataset_builder(self, name, **options):
        if not self.data_files["train"]:
            raise ConnectionError("no route")
        return self


def test_shards_of_files_on_the_hub_equal_those_of_local_files(tmp_path, monkeypatch):
    write_documents(tmp_path / "source")
    shutil.copy(tmp_path / "source" / "a.parquet", tmp_path / "b.parquet")
    paths = [tmp_path / "source" / "a.parquet", tmp_path / "b.parquet"]
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([path.as_uri() for path in paths]))
    files = documents.hub_files(sources.OPENWEBTEXT)
    assert [file.size for file in files] == [path.stat().st_size for path in paths]
    hub_job = DocumentJob(files, "a test", "gpt2", 0.2, 3)
    local_job = DocumentJob(paths, "a test", "gpt2", 0.2, 3)
    prepare_shards(hub_job, tmp_path / "hub", Worker())
    prepare_shards(local_job, tmp_path / "local", Worker())
    for name in ("val.bin", *(f"train_{i:05d}.bin" for i in range(3))):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(documents.HubFile, "open", lambda file, mode: 1 // 0)  # not an OSError
        with pytest.raises(ValueError, match=r"a.parquet cannot be streamed .*ZeroDivisionError.*--input"):
            documents.count_documents(files[0])
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([]))
    with pytest.raises(ValueError, match=r"ConnectionError: no route\).*--input"):
        documents.hub_files(sources.OPENWEBTEXT)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_skipped(tmp_path, name):
    data = codecs.BOM_UTF8 + '{"text": "é"}\n{"text": "b"}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    texts = ["".join(pieces) for pieces in documents.local_documents([tmp_path / name])]
    assert texts == ["é", "b"]


def test_positions_after_a_byte_order_mark_are_exact(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="at offset 13"):
        list(documents.local_documents([tmp_path / "a.jsonl"]))
