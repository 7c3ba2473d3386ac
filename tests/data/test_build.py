"""Text and documents -> shards, against plain code that holds everything in memory at once."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from fradique.data import build, documents, sources
from fradique.data.build import prepare_documents, prepare_text
from fradique.data.text import Text, cut_pieces, files_text, find_files, read_file
from fradique.io import folder_lock
from fradique.tokenizer import tokenizer

CORPORA = ROOT.parent / "shared" / "corpora"
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason=f"the real corpora are not in {CORPORA}")
PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)
STORY = "Era uma vez um gato que não dormia, e uma lua: a lua de Lisboa — 🙂.\r\n\tFim. " * 40
# much white space of all kinds, so that cuts fall into all places
SPACED = st.text("ab1é.'s \u00a0\u2003\x1c\t\r\n", max_size=120)


def of(string: str, chunk: int = 50) -> Text:
    """A text that comes in chunks of so many characters."""
    return Text("a test", len(string), lambda: (string[i : i + chunk] for i in range(0, len(string), chunk)))


def read_ids(folder: Path, split: str) -> np.ndarray:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return np.fromfile(folder / f"{split}.bin", dtype={"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Reading and cutting


@PROPERTY
@given(string=st.text(max_size=60).filter(lambda s: not s.startswith("\ufeff")), block=st.integers(1, 9))
def test_a_file_reads_the_same_in_blocks_of_any_size(tmp_path_factory, string, block):
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(string.encode())
    chunks = list(read_file(path, block))
    assert "".join(chunks) == string
    assert "" not in chunks


@PROPERTY
@given(
    start=st.text("aé日🙂", max_size=12),
    broken=st.sampled_from(
        [b"\xff", b"\xc3", b"\xe6\x97", b"\xf0\x9f\x99", b"\xc0\x80", b"\xed\xa0\x80", b"\x80"]
    ),
    end=st.text("aé日🙂", max_size=12),
    block=st.integers(1, 9),
)
def test_the_first_byte_that_is_not_utf8_is_named_wherever_blocks_end(
    tmp_path_factory, start, broken, end, block
):
    path = tmp_path_factory.getbasetemp() / "broken.txt"
    data = start.encode() + broken + end.encode()
    path.write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as oracle:
        data.decode("utf-8")
    with pytest.raises(ValueError) as caught:
        list(read_file(path, block))
    offset = oracle.value.start
    assert f"byte 0x{data[offset]:02x} at offset {offset} " in str(caught.value)
    assert "broken.txt" in str(caught.value) and "iconv -f" in str(caught.value)


def test_newlines_stay_as_they_are_and_a_byte_order_mark_goes(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    files = find_files([tmp_path / "a.txt"])
    assert "".join(files_text(files, "").chunks()) == "one\r\ntwo\rthree\n"
    assert "".join(read_file(files[0], 1)) == "one\r\ntwo\rthree\n"
    assert "a.txt begins with a byte-order mark" in capsys.readouterr().err


def test_a_utf16_file_is_told_from_others(tmp_path):
    (tmp_path / "a.txt").write_bytes("olá".encode("utf-16"))
    with pytest.raises(ValueError, match=r"iconv -f UTF-16"):
        list(read_file(tmp_path / "a.txt"))


def test_files_are_joined_by_a_newline_only_where_one_is_missing(tmp_path):
    for name, content in {"1": "a\n", "2": "b", "3": "c\n\n", "4": "d"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    assert "".join(files_text(find_files([tmp_path]), "").chunks()) == "a\nb\nc\n\nd"


def test_folders_are_read_recursively_in_the_order_of_names(tmp_path, capsys):
    for name in ("b.txt", "a/z.txt", "a.txt", "B.TXT", "c.md", "a/y/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])]
    assert found == ["B.TXT", "a.txt", "a/y/x.txt", "a/z.txt", "b.txt"]
    assert "empty.txt is empty" in capsys.readouterr().err
    assert find_files([tmp_path / "c.md", tmp_path / "a"])[0] == tmp_path / "c.md"  # a file is taken as it is


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "no file or folder"),
        ("empty.txt", "is empty"),
        ("folder", "no .txt file"),
        ("pipe", "plain file"),
    ],
)
def test_what_cannot_be_read_as_text_gets_a_message(tmp_path, name, words):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.pdf").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=words) as caught:
        find_files([tmp_path / name])
    assert name in str(caught.value) and "--input" in str(caught.value)


@PROPERTY
@given(string=SPACED, chunk=st.integers(1, 9), piece=st.integers(1, 9))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(string, chunk, piece):
    pieces = list(cut_pieces(of(string, chunk).chunks(), piece, 1000))
    gpt2 = tokenizer.GPT2Tokenizer()
    assert "".join(pieces) == string
    assert [i for part in pieces for i in gpt2.encode(part)] == gpt2.encode(string).tolist()


def test_real_sentences_are_cut_into_many_pieces():
    pieces = list(cut_pieces(of(STORY, 100).chunks(), 30, 1000))
    assert "".join(pieces) == STORY
    assert max(map(len, pieces)) <= 60 and len(pieces) > len(STORY) / 60


@pytest.mark.parametrize("string", ["x" * 1000, " " * 1000, "日" * 1000, "a " + "b" * 998])
def test_a_text_without_a_place_to_cut_is_cut_anyway(string):
    pieces = list(cut_pieces(of(string, 7).chunks(), 10, 80))
    assert "".join(pieces) == string
    assert max(map(len, pieces)) <= 80


# Splits and shards


@settings(PROPERTY, max_examples=20)
@given(n=st.integers(20, 3000))
def test_the_split_is_where_nanogpt_has_it(tmp_path_factory, n):
    folder = tmp_path_factory.getbasetemp() / "split"
    meta = prepare_text(of("ab" * n, 97), folder)
    assert meta["splits"]["train"]["tokens"] == int(2 * n * 0.9)
    assert meta["splits"]["val"]["tokens"] == 2 * n - int(2 * n * 0.9)


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe:300"])
@pytest.mark.parametrize("val_fraction", [0.1, 0.5, 0.05])
def test_shards_hold_the_tokens_of_each_split(tmp_path, kind, val_fraction):
    meta = prepare_text(of(STORY, 33), tmp_path, kind, val_fraction)
    made = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
    cut = int(len(STORY) * (1 - val_fraction))
    for split, part in (("train", STORY[:cut]), ("val", STORY[cut:])):
        ids = read_ids(tmp_path, split)
        if kind == "char":
            alphabet = sorted(set(STORY))
            assert ids.tolist() == [alphabet.index(char) for char in part]
        assert ids.tolist() == made.encode(part).tolist()
        assert made.decode(ids) == part
        data = (tmp_path / f"{split}.bin").read_bytes()
        shard = {"file": f"{split}.bin", "tokens": len(ids), "bytes": len(part.encode())}
        shard["sha256"] = hashlib.sha256(data).hexdigest()
        assert meta["splits"][split] == {"tokens": len(ids), "bytes": shard["bytes"], "shards": [shard]}
    assert json.loads((tmp_path / "meta.json").read_text(encoding="utf-8")) == meta
    expected = {"format": 1, "dtype": "uint16", "vocab_size": made.vocab_size, "tokenizer": made.kind}
    assert meta.items() >= expected.items() and meta["source"] == "a test"
    assert names(tmp_path) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_large_vocabulary_is_written_as_uint32(tmp_path):
    string = "".join(chr(i) for i in [*range(0xD800), *range(0xE000, 0x14000)])
    meta = prepare_text(of(string * 2, 10_000), tmp_path)
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == len(string) > 65_536
    assert read_ids(tmp_path, "train")[: len(string)].tolist() == list(range(len(string)))


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe:300"])
def test_the_same_text_gives_the_same_files(tmp_path, kind):
    for name, chunk in (("a", 10), ("b", 1000)):
        prepare_text(of(STORY, chunk), tmp_path / name, kind)
    for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@needs_corpora
@pytest.mark.parametrize(("kind", "train", "val"), [("char", 1003854, 111540), ("gpt2", 301966, 36059)])
def test_shakespeare_has_the_tokens_that_nanogpt_publishes(tmp_path, kind, train, val):
    meta = prepare_text(files_text([CORPORA / "shakespeare.txt"], ""), tmp_path, kind)
    assert (meta["splits"]["train"]["tokens"], meta["splits"]["val"]["tokens"]) == (train, val)
    assert meta["vocab_size"] == {"char": 65, "gpt2": 50257}[kind]


# What can go wrong


@pytest.mark.parametrize(
    ("string", "words"), [("", "is empty"), ("a", "too small"), ("ab" * 4, "val split has 1 ")]
)
def test_a_text_too_small_for_one_block_is_refused_and_leaves_nothing(tmp_path, string, words):
    with pytest.raises(ValueError, match=words):
        prepare_text(of(string), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_small_validation_split_gets_a_note(tmp_path, capsys):
    prepare_text(of("ab" * 50), tmp_path)
    assert "validation split has only 10 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_fraction_that_is_none_is_refused(tmp_path, val_fraction):
    with pytest.raises(ValueError, match=r"--val_fraction"):
        prepare_text(of(STORY), tmp_path, val_fraction=val_fraction)
    with pytest.raises(ValueError, match=r"--val_fraction"):
        prepare_documents([["a"]], "", tmp_path, val_fraction=val_fraction)


def test_a_failure_keeps_the_corpus_that_was_there(tmp_path):
    prepare_text(of(STORY), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def breaks_off():
        yield STORY
        raise ValueError("broken")

    for call in (
        lambda: prepare_text(Text("", 1, breaks_off), tmp_path),
        lambda: prepare_documents(([piece] for piece in breaks_off()), "", tmp_path, val_fraction=0.5),
    ):
        with pytest.raises(ValueError, match=r"broken"):
            call()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_corpus_replaces_the_old_one_and_its_other_shards(tmp_path):
    for name in (
        "train_00000.bin",
        "train_00001.bin",
        "val_00000.bin",
        "train.bin",
        "meta.json",
        "other.bin",
    ):
        (tmp_path / name).write_text("old")
    prepare_text(of(STORY), tmp_path)
    assert names(tmp_path) == [
        "meta.json",
        "other.bin",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]


def test_whoever_is_stopped_while_files_are_put_in_place_leaves_no_corpus(tmp_path, monkeypatch):
    prepare_text(of(STORY), tmp_path)
    replace = Path.replace

    def stops_at_meta(path, target):
        if path.name == "meta.json":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stops_at_meta)
    with pytest.raises(KeyboardInterrupt):
        prepare_text(of(STORY), tmp_path)
    assert names(tmp_path) == []


def test_files_are_put_in_place_so_that_no_shard_is_ever_there_without_its_tokenizer(tmp_path, monkeypatch):
    replace, order = Path.replace, []

    def recorded(path, target):
        if target.parent == tmp_path:
            order.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", recorded)
    prepare_text(of(STORY), tmp_path)
    assert order == ["tokenizer.json", "val.bin", "train.bin", "meta.json"]


def test_a_text_that_changes_between_the_passes_is_refused(tmp_path):
    lengths = iter([1000, 1001])
    with pytest.raises(ValueError, match=r"changed while it was read"):
        prepare_text(Text("", 1, lambda: iter(["a" * next(lengths)])), tmp_path)


def test_what_a_killed_process_left_is_swept_and_what_a_live_one_makes_is_not(tmp_path):
    dead, live, new, old = (tmp_path / f".prepare-{name}" for name in ("dead", "live", "new", "old"))
    for folder in (dead, live, new, old):
        folder.mkdir()
        (folder / "train.bin").write_text("half")
    (dead / folder_lock.LOCK_FILE).write_text("{}")
    os.utime(old, (1e9, 1e9))  # left before there were locks
    held = folder_lock.FolderLock(live)
    prepare_text(of(STORY), tmp_path)
    assert not dead.exists() and not old.exists()
    assert (live / "train.bin").exists() and (new / "train.bin").exists()
    held.release()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "corpus").write_text("x")
    with pytest.raises(ValueError, match=r"corpus is a file, not a folder"):
        prepare_text(of(STORY), tmp_path / "corpus")


# The BPE's sample


def test_a_small_text_trains_a_bpe_whole():
    sample = build.TrainingSample(of(STORY, 100), 700)
    assert "".join(sample) == STORY[:700]
    assert sample.n_chars == 700


def test_a_large_text_trains_a_bpe_on_pieces_spread_over_all_of_it(monkeypatch):
    monkeypatch.setattr(build, "SAMPLE_CHARS", 2000)
    monkeypatch.setattr(build, "SAMPLE_PIECE", 100)
    string = " ".join(f"{i:05d}" for i in range(5000))
    numbers = [int(word) for word in "".join(build.TrainingSample(of(string, 90), len(string))).split()]
    assert 300 <= len(numbers) <= 360
    assert max(np.diff(numbers)) < 500 and numbers[-1] > 4500


def test_a_text_of_ever_new_words_trains_a_bpe_on_a_part_that_memory_can_hold(monkeypatch):
    monkeypatch.setattr(build, "SAMPLE_PIECE", 100)
    monkeypatch.setattr(build, "SAMPLE_WORD_BYTES", 3000)
    new = " ".join(f"{i:05d}" for i in range(5000))
    assert 1500 < len("".join(build.TrainingSample(of(new, 90), len(new)))) < 3200
    old = "lua mar " * 5000
    assert "".join(build.TrainingSample(of(old, 90), len(old))) == old


def test_a_bpe_of_a_sample_and_a_smaller_bpe_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "SAMPLE_CHARS", 500)
    monkeypatch.setattr(build, "SAMPLE_PIECE", 100)
    meta = prepare_text(of(STORY), tmp_path, "bpe:9000")
    told = capsys.readouterr().err
    assert "the BPE was trained on" in told
    assert f"enough for {meta['vocab_size']:,} tokens only, not for the 9,000 asked for" in told


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    """A process that prepares 20 MB more has about the same peak."""
    code = (
        "import sys; from pathlib import Path; from fradique.data import build\n"
        "from fradique.data.text import files_text\n"
        "build.MAX_THREADS = 2\n"
        "build.prepare_text(files_text([Path(sys.argv[1])], ''), Path(sys.argv[2]), sys.argv[3])\n"
        "peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')][0]\n"
        "print(int(peak.split()[1]) // 1024)\n"
    )
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghiéã", k=rng.randint(1, 9))) for _ in range(3000)]
    peaks = []
    for megabytes in (8, 28):
        path = tmp_path / f"{megabytes}.txt"
        line = " ".join(rng.choices(words, k=20_000)) + "\n"
        path.write_text(line * (megabytes * 1_000_000 // len(line.encode())), encoding="utf-8")
        command = [sys.executable, "-c", code, str(path), str(tmp_path / "out"), kind]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 250 and peaks[1] - peaks[0] < 16, peaks


# Documents

DOCS = ["Um gato.", "", "Dois gatos\r\ne uma lua — 🙂.", "x" * 5000, "<|endoftext|> é texto."]


def plain_splits(docs: list[str], val_fraction: float) -> dict[str, list[int]]:
    """The ids of both splits, a document after the other, with the splits that ours chose."""
    gpt2, splits = tokenizer.GPT2Tokenizer(), {"train": [], "val": []}
    for index, doc in enumerate(docs):
        split = "val" if build._uniform(index) < val_fraction else "train"
        splits[split] += [*gpt2.encode(doc).tolist(), 50256]
    return splits


def test_each_document_ends_with_end_of_text(tmp_path):
    docs = DOCS * 40
    meta = prepare_documents(([doc] for doc in docs), "a test", tmp_path, val_fraction=0.2)
    for split, ids in plain_splits(docs, 0.2).items():
        assert read_ids(tmp_path, split).tolist() == ids
    assert sum(meta["splits"][split]["bytes"] for split in ("train", "val")) == len("".join(docs).encode())
    made = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
    val = meta["splits"]["val"]
    assert made.byte_lengths()[read_ids(tmp_path, "val")].sum() == val["bytes"]


def test_max_documents_takes_the_first_and_changes_no_split(tmp_path):
    docs = [f"documento {i}" for i in range(300)]
    prepare_documents(([doc] for doc in docs), "", tmp_path, val_fraction=0.2, max_documents=100)
    assert read_ids(tmp_path, "val").tolist() == plain_splits(docs[:100], 0.2)["val"]


def test_empty_documents_without_end_do_not_fill_the_memory():
    batches = build._batches((("train", None) for _ in range(10_000)), 10_000)
    assert max(map(len, batches)) <= 100


def test_about_the_asked_fraction_of_documents_validates():
    share = np.mean([build._uniform(i) < 0.0005 for i in range(400_000)])
    assert abs(share - 0.0005) < 0.00015
    assert len({build._uniform(i) for i in range(1000)}) == 1000


def test_too_few_documents_for_a_validation_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"val split has 0 tokens.*--val_fraction"):
        prepare_documents([["a b c"]], "", tmp_path)


def write_rows(folder: Path, docs: list[str]) -> dict[str, Path]:
    """`docs` in each kind of file that holds documents."""
    table = pa.table({"id": range(len(docs)), "text": docs})
    lines = "".join(json.dumps({"text": doc, "more": 1}) + "\n" for doc in docs)
    pq.write_table(table, folder / "d.parquet", row_group_size=2)
    (folder / "d.jsonl").write_text(lines + "\n", encoding="utf-8")
    with gzip.open(folder / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    return {path.name: path for path in folder.iterdir()}


def test_parquet_json_lines_and_text_files_hold_the_same_documents(tmp_path):
    for path in write_rows(tmp_path, DOCS).values():
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


@pytest.mark.parametrize(("data", "words"), BROKEN_LINES, ids=[words for _, words in BROKEN_LINES])
def test_a_broken_line_of_json_is_named(tmp_path, data, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.jsonl") as caught:
        list(documents.local_documents([path]))
    assert words in str(caught.value)


def test_a_line_longer_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 20)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * 30 + '"}\n')
    with pytest.raises(ValueError, match=r"line 1 is longer than"):
        list(documents.local_documents([tmp_path / "a.jsonl"]))


def test_broken_parquet_and_gzip_files_and_other_kinds_are_named(tmp_path):
    files = write_rows(tmp_path, ["uma casa"] * 500)
    for name in ("d.parquet", "d.jsonl.gz"):
        files[name].write_bytes(files[name].read_bytes()[:-20])
        with pytest.raises(ValueError, match=name):
            list(documents.local_documents([files[name]]))
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "no_text.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "number.parquet")
    (tmp_path / "a.csv").write_text("text\na\n")
    for name, words in (
        ("no_text.parquet", "no column 'text'"),
        ("number.parquet", "row 0"),
        ("a.csv", "none of"),
    ):
        with pytest.raises(ValueError, match=words):
            list(documents.local_documents([tmp_path / name]))


class FakeDatasets:
    """Stands in for the package `datasets`: two rows, then the network breaks."""

    def load_dataset(self, name, **options):
        self.asked = name, options
        yield {"text": "uma casa"}
        yield {"text": "uma lua"}
        raise ConnectionError("the cable was cut\nlong traceback")


def test_the_hub_is_streamed_and_a_broken_stream_says_what_to_do(monkeypatch):
    fake = FakeDatasets()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    stream = documents.hub_documents(sources.OPENWEBTEXT)
    assert [next(stream), next(stream)] == [("uma casa",), ("uma lua",)]
    with pytest.raises(ValueError, match=r"ConnectionError: the cable was cut\).*--input") as caught:
        next(stream)
    assert "\n" not in str(caught.value)
    assert fake.asked[0] == "Skylion007/openwebtext" and fake.asked[1]["streaming"] is True


# Python's library


def test_the_librarys_text_is_plain_ascii_bounded_and_always_the_same():
    library = sources.python_library(Path())
    string = "".join(library.chunks())
    assert set(string) <= {"\n", *map(chr, range(32, 127))}
    assert len(string) == library.size <= 8_000_000
    assert string == "".join(sources.python_library(Path()).chunks())
    assert "class Thread" in string and "def namedtuple" in string
    assert "Python 3" in library.source


def test_the_librarys_validation_split_is_a_sample_of_all_of_it():
    string = "".join(sources.python_library(Path()).chunks())
    train, val = string[: int(len(string) * 0.9)], string[int(len(string) * 0.9) :]
    shares = [
        np.bincount(np.frombuffer(part.encode(), np.uint8), minlength=128) / len(part)
        for part in (train, val)
    ]
    assert np.abs(shares[0] - shares[1]).sum() < 0.2


def test_only_the_library_is_taken_from_its_folder(tmp_path, monkeypatch):
    taken = {"a.py": "a = 1\r\n", "email/b.py": "b = 2\n"}
    left = [
        "site-packages/x.py",
        "test/x.py",
        "_sysconfigdata_1.py",
        "lib2to3/x.py",
        "x.txt",
        "sitecustomize.py",
    ]
    for name, content in {**taken, **dict.fromkeys(left, "x = 0\n"), "é.py": "é = 'não'\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "nowhere.py").symlink_to(tmp_path / "missing")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    chunks = list(sources.python_library(Path()).chunks())
    assert sorted(chunks) == ["a = 1\n", "b = 2\n"]


def test_a_python_without_sources_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"no sources in .*--input"):
        sources.python_library(Path())
