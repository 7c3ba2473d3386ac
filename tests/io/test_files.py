"""Atomic writes, size limits, JSON, checksums."""

import codecs
import errno
import hashlib
import os
from pathlib import Path

import pytest

from fradique.io import files


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a longer old text")
    files.write_text(path, "new")
    assert path.read_bytes() == b"new" and file_names(tmp_path) == ["a.txt"]


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path and temporary.name == f".a.txt.{os.getpid()}.tmp"
    assert path.read_text() == "half" and file_names(tmp_path) == ["a.txt"]


def test_an_error_keeps_only_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stopped"), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stopped")
    assert path.read_text() == "old" and file_names(tmp_path) == ["a.txt"]


def test_a_full_disk_keeps_only_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def raise_disk_full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and file_names(tmp_path) == ["a.bin"]


def test_an_error_before_the_first_write_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_path(tmp_path / "a.txt"):
        raise RuntimeError
    assert file_names(tmp_path) == []


def test_a_temporary_name_can_have_a_writer_id_and_the_suffix(tmp_path):
    path = tmp_path / "loss.png"
    with files.atomic_path(path, writer_id="host-7", keep_suffix=True) as temporary:
        assert temporary.name == ".loss.host-7.tmp.png"
        temporary.write_bytes(b"png")
    assert path.read_bytes() == b"png"


def test_text_files_are_utf8_with_lf_line_ends(tmp_path):
    files.write_text(tmp_path / "a.txt", "é\nb\r\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\nb\r\n"


def test_text_files_are_written_without_newline_translation(tmp_path, monkeypatch):
    """With the default, Windows would write CRLF."""
    path_open, newlines = Path.open, []

    def record_newline(path, *args, **options):
        newlines.append(options.get("newline"))
        return path_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", record_newline)
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert newlines == ["\n"]
    assert (tmp_path / "a.json").read_bytes() == b'{\n "a": 1\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"loss": [-float("inf")]}])
def test_json_refuses_nan_and_infinity(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.format_json(value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", value)
    assert file_names(tmp_path) == []


def test_written_json_is_read_unchanged(tmp_path):
    value = {"é": [1, 2.5, None, True], "a": {}}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == files.read_json_object(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b"", "is damaged"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_damaged_json_is_reported(tmp_path, data, message):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.json .*{message}"):
        files.read_json(path)


def test_a_missing_file_or_a_json_list_is_not_an_object(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json is missing"):
        files.read_json_object(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json is damaged: not a JSON object"):
        files.read_json_object(tmp_path / "a.json")


def test_read_small_file_refuses_a_larger_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert files.read_small_file(path, 5) == b"12345"
    with pytest.raises(ValueError, match="is larger than 0 MB"):
        files.read_small_file(path, 4)


def test_read_small_file_refuses_a_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a plain file"):
        files.read_small_file(tmp_path, 10)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_read_small_file_refuses_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a plain file"):
        files.read_small_file(tmp_path / "pipe", 10)


def test_read_small_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.read_small_file(tmp_path / "a", 10)


def test_replace_folder_keeps_only_files_that_it_does_not_own(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "old" / "mine").touch()
    files.replace_folder(tmp_path / "new", tmp_path / "old", owned=["old", "new"])
    assert file_names(tmp_path) == ["old"] and file_names(tmp_path / "old") == ["mine", "new"]


def test_checksum_is_sha256_or_the_given_digest(tmp_path):
    data = b"ab" * 1_000_000  # more than one block
    (tmp_path / "a").write_bytes(data)
    assert files.checksum(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    assert files.checksum(tmp_path / "a", hashlib.md5()) == hashlib.md5(data).hexdigest()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "c:", "a\n", None, 3])
def test_paths_and_special_names_are_not_plain_names(name):
    assert not files.is_plain_name(name)
    assert files.is_plain_name("train.bin")


@pytest.mark.parametrize("value", [-1, 1 << 63, True, 1.0, "1", None])
def test_only_non_negative_64_bit_integers_are_counts(value):
    assert not files.is_count(value)
    assert files.is_count(0) and files.is_count((1 << 63) - 1)


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    assert files.read_json_object(tmp_path / "a.json") == {"a": 1}
