"""The training and the validation split of a text: its end, or blocks spread evenly over it."""

import itertools
import json

import pytest
from corpus_helpers import STORY, read_ids, story_spec, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fradique.data import splits
from fradique.data.build import prepare_documents, prepare_text
from fradique.data.encode import split_pieces
from fradique.data.prepare import main
from fradique.data.shard_build import Worker, prepare_shards
from fradique.data.shard_plan import TextJob
from fradique.data.splits import Part, count_chars, divide_text
from fradique.data.text_index import index_text
from fradique.tokenizer.tokenizer import load_tokenizer

LINES = "".join(f"linha {i} {'palavra ' * (i % 9)}\n" for i in range(4000))  # 166 KB


def divide(string, val_fraction=0.1, chunk=1000):
    return divide_text(text_of(string, chunk), len(string), val_fraction, "blocks")


def blocks(parts):
    return [part for part in parts if part.split == "val"]


def assert_whole(parts, n_chars):
    """The parts are in order, without a gap or overlap, and cover the text."""
    assert parts[0].start == 0 and parts[-1].end == n_chars
    for part, following in itertools.pairwise(parts):
        assert part.start <= part.end == following.start and part.split != following.split


@pytest.mark.parametrize("val_fraction", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_blocks_hold_the_fraction_and_begin_at_line_starts(val_fraction):
    parts = divide(LINES, val_fraction)
    assert_whole(parts, len(LINES))
    held_out = count_chars(parts, "val")
    assert held_out == pytest.approx(val_fraction * len(LINES), rel=0.02)
    for part in blocks(parts):
        assert LINES[part.start - 1] == "\n" and LINES[part.end - 1] == "\n"
        assert part.end - part.start > 0


def test_blocks_are_spread_evenly():
    found = blocks(divide(LINES * 8))
    assert len(found) == len(LINES) * 8 // 10 // splits.BLOCK_CHARS == 17
    starts = [part.start for part in found]
    distances = [b - a for a, b in itertools.pairwise(starts)]
    assert max(distances) < 1.01 * min(distances)
    # as much text before the first block as after the last one
    assert starts[0] == pytest.approx(len(LINES) * 8 - found[-1].end, rel=0.05)


def test_the_number_of_blocks_has_limits(monkeypatch):
    assert len(blocks(divide(LINES[:5000]))) == splits.MIN_BLOCKS
    monkeypatch.setattr(splits, "BLOCK_CHARS", 10)
    assert len(blocks(divide(LINES))) == splits.MAX_BLOCKS


@pytest.mark.parametrize("end_of_line", ["\n", "\r\n"])
def test_a_block_begins_after_a_whole_line_end(end_of_line):
    string = LINES.replace("\n", end_of_line)
    for part in blocks(divide(string)):
        assert string[: part.start].endswith(end_of_line) and string[: part.end].endswith(end_of_line)


def test_without_line_ends_a_block_begins_between_two_words():
    string = "palavra " * 20_000
    parts = divide(string)
    assert_whole(parts, len(string))
    for part in blocks(parts):
        assert string[part.start] == string[part.end] == " "


def test_without_white_space_blocks_have_their_exact_size():
    parts = divide("x" * 100_000)
    assert_whole(parts, 100_000)
    assert {part.end - part.start for part in blocks(parts)} == {10_000 // splits.MIN_BLOCKS}


@settings(deadline=None, max_examples=200)
@given(
    string=st.text("a \n", min_size=1, max_size=300),
    val_fraction=st.floats(0.001, 0.999),
    chunk=st.integers(1, 50),
)
def test_any_text_is_divided_whole_whatever_its_chunks(string, val_fraction, chunk):
    parts = divide(string, val_fraction, chunk)
    assert_whole(parts, len(string))
    assert parts == divide(string, val_fraction, 1000)
    pieces = list(split_pieces((string[i : i + 7] for i in range(0, len(string), 7)), parts))
    for split in ("train", "val"):
        expected = "".join(string[part.start : part.end] for part in parts if part.split == split)
        assert "".join(piece for name, piece in pieces if name == split) == expected


def test_the_tail_is_the_end_of_the_text_as_in_nanogpt():
    assert divide_text(text_of(STORY), 1001, 0.1, "tail") == [Part("train", 0, 900), Part("val", 900, 1001)]


SEPARATOR = "<|endoftext|>"


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("shift", range(-3, 17))
@pytest.mark.parametrize("chunk", [1, 1000])
def test_the_tail_never_begins_inside_a_separator(indexed, shift, chunk):
    string = "x" * (90 - shift) + SEPARATOR
    string += "y" * (120 - len(string))
    text = text_of(string, chunk)
    index = index_text(text) if indexed else None
    train, val = divide_text(text, 120, 0.25, "tail", SEPARATOR, index)
    inside = 0 < shift < len(SEPARATOR)
    assert train.end == val.start == (90 - shift + len(SEPARATOR) if inside else 90)
    assert divide_text(text, 120, 0.25, "tail")[0].end == 90  # without a separator, as in nanoGPT
    assert divide_text(text, 120, 0.25, "tail", "</s>", index)[0].end == 90


@pytest.mark.parametrize("separator", ["|", "</s>", SEPARATOR, "a" + "b" * 98 + "c"])
@pytest.mark.parametrize("chunk", [7, 10_000])
@pytest.mark.parametrize("distance", [0, 1, 5, 40, 3000])
def test_blocks_do_not_begin_inside_a_separator(separator, chunk, distance):
    string = ("x" * distance + separator) * 300
    parts = divide_text(text_of(string, chunk), len(string), 0.2, "blocks", separator)
    assert_whole(parts, len(string))
    for part in parts:
        assert (part.start % (distance + len(separator))) <= distance
    texts = [string[part.start : part.end] for part in parts]
    assert sum(text.count(separator) for text in texts) == 300


def test_a_separator_changes_no_block_of_a_text_with_lines():
    marked = LINES.replace("palavra palavra", f"palavra{SEPARATOR}palavra")
    parts = divide_text(text_of(marked), len(marked), 0.1, "blocks", SEPARATOR)
    assert parts == divide(marked)


@settings(deadline=None, max_examples=200)
@given(
    string=st.lists(st.sampled_from(["a", " ", "\n", "<>", "<"]), min_size=1, max_size=150).map("".join),
    val_fraction=st.floats(0.001, 0.999),
    val_split=st.sampled_from(["tail", "blocks"]),
    chunk=st.integers(1, 50),
)
def test_no_cut_of_any_text_is_inside_a_separator(string, val_fraction, val_split, chunk):
    parts = divide_text(text_of(string, chunk), len(string), val_fraction, val_split, "<>")
    assert_whole(parts, len(string))
    assert all(string[part.end - 1 : part.end + 1] != "<>" or part.end == 0 for part in parts)


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe:300"])
@pytest.mark.parametrize("n", [1, 7])
def test_shards_have_the_blocks_of_a_single_process(tmp_path, kind, n):
    prepare_text(text_of(LINES), tmp_path / "one", kind, 0.2, "blocks")
    meta = prepare_shards(TextJob(text_of(LINES), kind, 0.2, n, "blocks"), tmp_path / "many", Worker())
    train = b"".join((tmp_path / "many" / f"train_{i:05d}.bin").read_bytes() for i in range(n))
    assert train == (tmp_path / "one" / "train.bin").read_bytes()
    assert (tmp_path / "many" / "val.bin").read_bytes() == (tmp_path / "one" / "val.bin").read_bytes()
    assert meta["val_split"] == "blocks"
    tokenizer = load_tokenizer(tmp_path / "one" / "tokenizer.json")
    parts = divide(LINES, 0.2)
    expected = "".join(LINES[part.start : part.end] for part in blocks(parts))
    assert tokenizer.decode(read_ids(tmp_path / "one", "val")) == expected


def test_a_plan_of_an_older_version_can_be_finished(tmp_path):
    """It has no parts, because the only validation split was the tail."""
    job = TextJob(text_of(LINES), "char", 0.1, 2)
    prepare_shards(job, tmp_path / "many", Worker(0, 2))
    path = tmp_path / "many" / ".shards" / "plan.json"
    plan = json.loads(path.read_text(encoding="utf-8"))
    expected = list(job.pieces(plan, 1))
    del plan["survey"]["parts"]
    assert list(job.pieces(plan, 1)) == expected


def test_meta_json_says_where_the_validation_split_is_from(tmp_path):
    assert prepare_text(text_of(STORY), tmp_path / "a")["val_split"] == "tail"
    assert prepare_text(text_of(STORY), tmp_path / "b", val_split="blocks")["val_split"] == "blocks"
    documents = ([f"documento {i}"] for i in range(100))
    assert prepare_documents(documents, "", tmp_path / "c", val_fraction=0.2)["val_split"] == "documents"


def test_an_unknown_way_to_split_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="--val_split must be tail or blocks, not 'random'"):
        prepare_text(text_of(STORY), tmp_path / "new", val_split="random")
    with pytest.raises(SystemExit):
        main(story_spec(tmp_path / "new"), ["--val_split=random"])
    assert "blocks" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_flag_chooses_blocks(tmp_path):
    assert main(story_spec(tmp_path / "a"), ["--val_split=blocks"]) == 0
    meta = json.loads((tmp_path / "a" / "meta.json").read_text(encoding="utf-8"))
    assert meta["val_split"] == "blocks"
