"""prepare.py --shards as a command: interruptions, messages, exit status."""

import errno
import os
import runpy
import signal
from pathlib import Path

import pytest
from corpus_helpers import checksums, story_spec, text_job, write_documents
from support import ROOT

from fradique.data import shard_build
from fradique.data.dataset import open_corpus
from fradique.data.prepare import CorpusSpec, main
from fradique.data.shard_build import Worker, prepare_shards

pytestmark = pytest.mark.usefixtures("small_shards")


def interrupt_after(monkeypatch, count, fail):
    """Make `prepare_shards` call `fail` when it has encoded shard number `count`, counted from 0."""
    encode_splits, calls = shard_build.encode_splits, []

    def encode_or_fail(pieces, tokenizer, folder):
        splits = encode_splits(pieces, tokenizer, folder)
        calls.append(folder)
        if len(calls) > count:
            fail()
        return splits

    monkeypatch.setattr(shard_build, "encode_splits", encode_or_fail)


def raise_disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fail", "status", "message"),
    [
        (raise_interrupt, 130, "stopped: finished shards are kept; run the same command to continue"),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, "stopped: finished shards are kept"),
        (raise_disk_full, 2, "error: the disk is full"),
    ],
    ids=["Ctrl-C", "SIGTERM", "full disk"],
)
def test_finished_shards_are_kept_and_not_made_again(tmp_path, monkeypatch, capsys, fail, status, message):
    prepare_shards(text_job(), tmp_path / "reference", Worker())
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, fail)
        assert main(story_spec(out), ["--shards=7"]) == status
    assert message in capsys.readouterr().err
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("train_*.bin")}
    assert sorted(times) == [f"train_{i:05d}.bin" for i in range(3)]
    assert not list(out.glob(".shards/part_*"))
    assert main(story_spec(out), ["--shards=7"]) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert checksums(out) == checksums(tmp_path / "reference")
    assert "train_00000.bin to train_00006.bin, val.bin" in capsys.readouterr().out


def test_a_finished_corpus_is_reported_and_not_made_again(tmp_path, monkeypatch, capsys):
    assert main(story_spec(tmp_path), ["--shards=7"]) == 0
    output = capsys.readouterr().out
    (tmp_path / ".shards").mkdir()  # as after a worker that was killed at the very end
    (tmp_path / ".shards" / "plan.json").write_text("{}")
    monkeypatch.setattr(shard_build, "encode_splits", None)
    assert main(story_spec(tmp_path), ["--shards=7", "--worker=2/3"]) == 0
    assert capsys.readouterr().out == output and not (tmp_path / ".shards").exists()


def test_opening_an_unfinished_corpus_reports_its_progress(tmp_path):
    prepare_shards(text_job(), tmp_path / "data" / "book", Worker(1, 3))
    (tmp_path / "data" / "book" / "val.bin").write_bytes(b"left by a worker that was killed at the very end")
    with pytest.raises(
        ValueError, match=r"2 of 7 shards are finished. Run .*--shards 7 makes all .*--worker"
    ):
        open_corpus(tmp_path / "data" / "book", 8)
    with pytest.raises(ValueError, match=r"there is no corpus in") as caught:
        open_corpus(tmp_path / "data" / "nothing", 8)
    assert "prepared: book" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards=7", "--worker=5/4"], "--worker 5/4: workers are counted from 0, so from 0/4 to 3/4"),
        (["--shards=7", "--worker=4/4"], "--worker 4/4: workers are counted from 0"),
        (["--shards=7", "--worker=0/0"], "--worker 0/0: give it as I/N"),
        (["--shards=7", "--worker=abc"], "--worker abc: give it as I/N"),
        (["--shards=7", "--worker="], "--worker : give it as I/N"),
        (["--shards=7", "--worker=-1/2"], "--worker -1/2: give it as I/N"),
        (["--worker=0/2"], "--worker needs --shards"),
        (["--shards=0"], "--shards must be from 1 to 100,000, not 0"),
        (["--shards=-3"], "--shards must be from 1 to 100,000, not -3"),
        (["--shards=100001"], "--shards must be from 1 to 100,000, not 100001"),
        (
            ["--shards=900"],
            "--shards 900 is too many for 6,750 characters to train on: use --shards 675 at most",
        ),
        (["--shards=7", "--val_fraction=2"], "--val_fraction must be between 0 and 1, not 2.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_gives_one_message_and_leaves_no_files(tmp_path, capsys, arguments, message):
    assert main(story_spec(tmp_path / "out"), arguments) == 2
    output = capsys.readouterr().err
    assert f"error: {message}" in output and output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_stream_without_files_cannot_be_sharded(tmp_path, capsys):
    stream = CorpusSpec(tmp_path, "A test.", "gpt2", "go", documents=lambda: iter([["a"]]))
    assert main(stream, ["--shards=2"]) == 2
    assert "error: this corpus cannot be made in shards from its default source" in capsys.readouterr().err


def test_the_openwebtext_script_makes_shards_of_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    write_documents(tmp_path / "source")
    spec = runpy.run_path(str(ROOT / "data" / "openwebtext" / "prepare.py"))["CORPUS"]
    flags = ["--input", str(tmp_path / "source"), "--val_fraction=0.2", "--out_dir", str(tmp_path / "out")]
    assert main(spec, [*flags, "--shards=5", "--worker=0/2"]) == 0
    output = capsys.readouterr().out
    assert "out: this worker's shards are finished; 3 of 5 shards are finished in total" in output
    next_command = output.splitlines()[-1]
    assert next_command.startswith("next: python data/openwebtext/prepare.py --input ")
    assert next_command.endswith(" --shards=5")  # without --worker: makes all remaining shards
    assert main(spec, [*flags, "--shards=5", "--worker=1/2"]) == 0
    assert "train_00000.bin to train_00004.bin, val.bin" in capsys.readouterr().out


def test_help_explains_how_workers_are_counted(capsys):
    with pytest.raises(SystemExit):
        main(story_spec(Path()), ["--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "make only the shards k with k mod N = I, for an I from 0 to N-1" in output


def test_a_damaged_plan_is_reported_with_how_to_start_over(tmp_path):
    prepare_shards(text_job(), tmp_path / "book", Worker(1, 3))
    (tmp_path / "book" / ".shards" / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json is damaged. To start over, delete .*\.shards"):
        open_corpus(tmp_path / "book", 8)


def test_shards_do_not_replace_a_tokenizer_of_something_else(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"contains tokenizer\.json, which prepare\.py has not made"):
        prepare_shards(text_job(), tmp_path, Worker())
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
