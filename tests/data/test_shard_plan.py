"""The contents of each shard, and plans, texts and flags that are refused."""

import shutil

import pytest
from corpus_helpers import (
    STORY,
    checksums,
    document_job,
    story_spec,
    text_job,
    text_of,
    write_documents,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fradique.data import shard_plan
from fradique.data.dataset import open_corpus
from fradique.data.prepare import main
from fradique.data.shard_build import Worker, prepare_shards
from fradique.data.shard_plan import TextJob
from fradique.tokenizer import tokenizer

pytestmark = pytest.mark.usefixtures("small_shards")
PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
SPACED = st.text("ab1é.'s \u00a0\u2003\x1c\t\r\n", max_size=120)  # cuts fall at all kinds of positions


@PROPERTY
@given(string=SPACED.filter(lambda s: len(s) > 1), n=st.integers(1, 9))
def test_shards_have_the_tokens_of_the_whole_text(string, n):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_plan, "MIN_SHARD_CHARS", 1)
        n = min(n, int(len(string) * 0.7))
        job = TextJob(text_of(string, 9), "gpt2", 0.3, n)
        plan = job.make_plan()
    gpt2, ids = tokenizer.GPT2Tokenizer(), {"train": [], "val": []}
    cut, offset, cuts_at_spaces = int(len(string) * 0.7), {"train": 0, "val": int(len(string) * 0.7)}, True
    text = {"train": "", "val": ""}
    for shard in range(n):
        for split in ("train", "val"):
            shard_text = "".join(piece for s, piece in job.pieces(plan, shard) if s == split)
            start, text[split] = offset[split] + len(text[split]), text[split] + shard_text
            if start not in (0, cut, len(string)):
                cuts_at_spaces &= not string[start - 1].isspace() and string[start] in " \t\r\n"
            ids[split] += gpt2.encode(shard_text).tolist()
    assert text == {"train": string[:cut], "val": string[cut:]}
    expected = {split: gpt2.encode(split_text).tolist() for split, split_text in text.items()}
    # where no space is suitable, the text is cut elsewhere, which may change its tokens
    assert ids == expected or not cuts_at_spaces


def test_the_suggested_number_of_shards_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shard_plan, "MIN_SHARD_CHARS", 150)
    assert main(story_spec(tmp_path), ["--shards=46"]) == 2
    assert "--shards 45 at most" in capsys.readouterr().err
    assert main(story_spec(tmp_path), ["--shards=45"]) == 0
    assert len(list(tmp_path.glob("train_*.bin"))) == 45


def test_a_shard_without_tokens_is_refused(tmp_path):
    """The text of the shard is part of one long word, which can only be cut at its end."""
    with pytest.raises(ValueError, match=r"shard 1 of 8 has 0 tokens to train on.*smaller --shards"):
        prepare_shards(text_job("x" * 400 + " " + "y" * 1600, "gpt2", 8, 0.5), tmp_path / "out", Worker())


def test_too_few_documents_for_the_shards_are_refused(tmp_path):
    write_documents(tmp_path / "source")
    with pytest.raises(
        ValueError, match=r"--shards 200 is too many for 121 documents: use --shards 121 at most"
    ):
        prepare_shards(document_job(tmp_path / "source", 200), tmp_path / "out", Worker())
    assert not (tmp_path / "out").exists()


def test_a_text_that_differs_in_one_letter_is_refused(tmp_path):
    prepare_shards(text_job(), tmp_path, Worker(1, 3))
    with pytest.raises(ValueError, match=r"the text has changed since"):
        prepare_shards(text_job("Ela" + STORY[3:]), tmp_path, Worker(0, 3))


def test_a_file_of_documents_that_differs_is_refused(tmp_path):
    write_documents(tmp_path / "source")
    prepare_shards(document_job(tmp_path / "source"), tmp_path / "out", Worker(1, 3))
    path = tmp_path / "source" / "d.txt"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"another preparation \(files: "):
        prepare_shards(document_job(tmp_path / "source"), tmp_path / "out", Worker(0, 3))


@pytest.mark.parametrize(
    ("changed_job", "difference"),
    [
        (text_job(n=6), "shards: 7, not 6"),
        (text_job(val_fraction=0.2), "val_fraction: 0.1, not 0.2"),
        (text_job(kind="gpt2"), "tokenizer: char, not gpt2"),
        (text_job(STORY + "x"), r"size: \d+, not \d+"),
    ],
    ids=["shards", "val_fraction", "tokenizer", "text"],
)
def test_changed_flags_are_refused_and_change_no_files(tmp_path, changed_job, difference):
    prepare_shards(text_job(), tmp_path, Worker(1, 3))
    before = checksums(tmp_path)
    with pytest.raises(
        ValueError, match=rf"shards of another preparation \({difference}\).*start over: delete"
    ):
        prepare_shards(changed_job, tmp_path, Worker(2, 3))
    assert checksums(tmp_path) == before
    prepare_shards(text_job(), tmp_path, Worker())
    with pytest.raises(ValueError, match=r"contains another corpus.*delete it first"):
        prepare_shards(changed_job, tmp_path, Worker())


def test_shards_from_different_plans_are_not_mixed(tmp_path):
    """Two workers start at the same time on different texts of equal size; the last plan is kept."""
    prepare_shards(text_job("Ela" + STORY[3:]), tmp_path / "a", Worker(0, 2))
    prepare_shards(text_job(), tmp_path / "b", Worker(1, 2))
    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"shard 1 .* was made from another plan.*Start over: delete"):
        prepare_shards(text_job("Ela" + STORY[3:]), tmp_path / "b", Worker())
    assert not (tmp_path / "b" / "meta.json").exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'{"asked": {}}', b"\xff", b"[" * 100_000],
    ids=lambda data: str(data[:20]),
)
def test_a_damaged_plan_is_reported(tmp_path, data):
    prepare_shards(text_job(), tmp_path, Worker(1, 3))
    (tmp_path / ".shards" / "plan.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"plan.json is damaged .*delete"):
        prepare_shards(text_job(), tmp_path, Worker())
    with pytest.raises(ValueError, match=r"is not finished, and .*plan.json is damaged"):
        open_corpus(tmp_path, 8)
