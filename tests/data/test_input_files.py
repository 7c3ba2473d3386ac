"""The files that --input means: folders, hidden files, copies, and files that are no text."""

import gzip
import os
import zipfile

import pytest

from fradique.data import input_files
from fradique.data.documents import ENDINGS
from fradique.data.input_files import MAX_NAMES, find_files


def write_files(folder, *names):
    """Write files whose content is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(folder, *inputs, endings=(".txt",)):
    """The names of the files that are found, relative to `folder`."""
    return [os.path.relpath(path, folder) for path in find_files([folder, *inputs], endings)]


def test_folders_are_searched_recursively_and_sorted_by_name(tmp_path, capsys):
    for name in ("b.txt", "a/z.txt", "a.txt", "B.TXT", "c.md", "a/y/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    names = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])]
    assert names == ["B.TXT", "a.txt", "a/y/x.txt", "a/z.txt", "b.txt"]
    assert "empty.txt is empty" in capsys.readouterr().err
    # any ending is allowed for a file that is given by name
    assert find_files([tmp_path / "c.md", tmp_path / "a"])[0] == tmp_path / "c.md"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "no file or folder"),
        ("empty.txt", "is empty"),
        ("folder", "no non-empty .txt file"),
        ("pipe", "plain file"),
    ],
)
def test_an_input_that_cannot_be_read_is_reported(tmp_path, name, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.pdf").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=message) as caught:
        find_files([tmp_path / name])
    assert name in str(caught.value) and "--input" in str(caught.value)


@pytest.mark.parametrize(
    "hidden",
    [".book.txt", ".git/a.txt", "a/.ipynb_checkpoints/a-checkpoint.txt", "a/._book.txt", ".b/c/d.txt"],
)
def test_hidden_files_of_a_folder_are_named_and_skipped(tmp_path, capsys, hidden):
    write_files(tmp_path, "book.txt", hidden)
    assert found(tmp_path) == ["book.txt"]
    name = hidden[: hidden.index("/", hidden.index("."))] if "/" in hidden[hidden.index(".") :] else hidden
    assert f"hidden in {tmp_path}, skipped: {name}\n" in capsys.readouterr().err


def test_other_hidden_files_are_not_named(tmp_path, capsys):
    write_files(tmp_path, "book.txt", ".DS_Store")
    assert found(tmp_path) == ["book.txt"]
    assert capsys.readouterr().err == ""


def test_a_hidden_file_or_folder_given_by_name_is_used(tmp_path):
    write_files(tmp_path, ".books/a.txt", ".b.txt")
    assert found(tmp_path / ".books", tmp_path / ".b.txt") == ["a.txt", "../.b.txt"]


def test_only_some_of_many_hidden_files_are_named(tmp_path, capsys):
    write_files(tmp_path, "book.txt", *(f".{i}.txt" for i in range(MAX_NAMES + 3)))
    found(tmp_path)
    assert ".4.txt and 3 more\n" in capsys.readouterr().err


def test_a_copy_in_the_same_folder_is_read_once(tmp_path, capsys):
    write_files(tmp_path, "a.txt", "b.txt")
    (tmp_path / "z.txt").write_text("a.txt")
    assert found(tmp_path) == ["a.txt", "b.txt"]
    expected = f"the same content as {tmp_path / 'a.txt'}, read only once: {tmp_path / 'z.txt'}\n"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("second", ["a.txt", ".", "./a.txt", "link.txt", "../link/a.txt"])
def test_a_file_given_twice_is_read_once(tmp_path, capsys, second):
    folder = tmp_path / "folder"
    write_files(folder, "a.txt")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "link.txt").symlink_to(folder / "a.txt")
    path = tmp_path / "link.txt" if second == "link.txt" else folder / second
    assert found(folder, path) == ["a.txt"]
    assert "read only once" in capsys.readouterr().err


def test_the_same_path_object_twice_is_read_once(tmp_path):
    write_files(tmp_path, "a.txt")
    assert find_files([tmp_path / "a.txt"] * 2) == [tmp_path / "a.txt"]


def test_files_of_equal_size_and_other_content_are_kept(tmp_path, capsys):
    write_files(tmp_path, "a.txt", "b.txt")
    assert found(tmp_path) == ["a.txt", "b.txt"]
    assert capsys.readouterr().err == ""


def test_copies_of_files_with_documents_are_read_once(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    assert found(tmp_path, endings=ENDINGS) == ["a.jsonl"]


COPIES = {
    "bom.txt": b"\xef\xbb\xbfone\ntwo\r\rthree\n\n",
    "crlf.txt": b"one\r\ntwo\r\rthree\r\n\r\n",
    "both.txt": b"\xef\xbb\xbfone\r\ntwo\r\rthree\n\r\n",
}
OTHERS = {
    "shorter.txt": b"one\ntwo\r\rthree\n",
    "longer.txt": b"one\ntwo\r\rthree\n\n\r",
    "cr.txt": b"one\rtwo\r\rthree\n\n",
    "bom_inside.txt": b"one\n\xef\xbb\xbftwo\r\rthree\n\n",
}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 16])
def test_line_ends_and_byte_order_marks_make_no_other_text(tmp_path, monkeypatch, size):
    monkeypatch.setattr(input_files, "FIRST_BYTES", size)
    monkeypatch.setattr(input_files, "HASHED_BYTES", max(4, size))  # a byte-order mark has three bytes
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\r\rthree\n\n")
    for name, content in (COPIES | OTHERS).items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(input_files, "_check_text", lambda *_: None)
    assert found(tmp_path) == ["a.txt", *sorted(OTHERS)]


def test_copies_of_json_lines_in_other_forms_are_read_once(tmp_path, capsys):
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "c.jsonl").write_bytes(lines.replace(b"\n", b"\r\n"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.replace(b"two", b"2"), 1))
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])  # its reader reports the damage
    assert found(tmp_path, endings=ENDINGS) == ["a.jsonl", "e.jsonl.gz", "f.jsonl.gz"]
    note = capsys.readouterr().err
    assert all(f"{name}.jsonl" in note for name in "bcd")


def test_parquet_files_of_other_sizes_are_not_read(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(input_files, "checksum", lambda path: read.append(path.name) or path.name)
    for name, size in {"a": 100, "b": 101, "c": 102, "d": 102}.items():
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1" + b"\0" * size)
    assert len(found(tmp_path, endings=ENDINGS)) == 4
    assert read == ["c.parquet", "d.parquet"]


def test_a_text_unlike_all_others_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(input_files, "_content_checksum", lambda path: pytest.fail(str(path)))
    write_files(tmp_path, "a.txt", "b.txt", "c/d.txt")
    assert len(found(tmp_path)) == 3


@pytest.mark.parametrize("name", ["linked", "linked.txt"])
def test_a_linked_folder_is_named_and_skipped(tmp_path, capsys, name):
    write_files(tmp_path, "books/a.txt", "elsewhere/b.txt")
    (tmp_path / "books" / name).symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "books") == ["a.txt"]
    note = capsys.readouterr().err
    assert f"linked folder in {tmp_path / 'books'}, skipped" in note and note.endswith(f": {name}\n")
    assert found(tmp_path / "books", tmp_path / "books" / name) == ["a.txt", f"{name}/b.txt"]


def test_a_folder_whose_name_ends_in_txt_gets_no_note(tmp_path, capsys):
    write_files(tmp_path, "x.txt/a.txt", "b.txt")
    assert found(tmp_path) == ["b.txt", "x.txt/a.txt"]
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_files(tmp_path, "a.txt", "closed/b.txt")
    list_folder = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        find_files([tmp_path])


TOKENS = (10, 262, 11, 13, 50256, 262, 198) * 200
FILES_THAT_ARE_NO_TEXT = {
    "lines.ndjson": (b'{"text": "a"}\n', r"rename it to \.jsonl, then prepare its documents with"),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', r"rename it to \.jsonl, then prepare"),
    "book.rar": (b"Rar!\x1a\x07\x01\x00text", "RAR archive"),
    "book.txt.lz4": (b"\x04\x22\x4d\x18text", "unlz4"),
    "book.db": (b"SQLite format 3\0", "SQLite database"),
    "book.tar": (b"book.txt".ljust(257, b"\0") + b"ustar", "tar archive"),
    "val.bin": (b"".join(token.to_bytes(2, "little") for token in TOKENS), "seems to be no text"),
    "zeros.txt": (b"text" + bytes(9), r"NUL byte at offset 4 .* tr -d '\\000' < "),
    "le.txt": (("uma árvore\n" * 9).encode("utf-16-le"), "iconv -f UTF-16LE"),
    "be.txt": (("uma árvore\n" * 9).encode("utf-16-be"), "iconv -f UTF-16BE"),
    "utf32.txt": ("uma árvore".encode("utf-32"), "iconv -f UTF-32"),
    "book.txt.gz": (gzip.compress(b"text"), "gunzip -k"),
    "book.docx": (b"", "save its text as UTF-8"),
    "book.pdf": (b"%PDF-1.7", "pdftotext"),
    "book.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "save its text as UTF-8"),
    "book.rtf": (b"{\\rtf1 text}", "save its text as UTF-8"),
    "book.txt.bz2": (b"BZh91AY", "bunzip2"),
    "docs.jsonl": (b'{"text": "a"}', "data/openwebtext/prepare.py --input"),
    "docs.parquet": (b"PAR1", "data/openwebtext/prepare.py --input"),
    "renamed.txt": (b"%PDF-1.7", "pdftotext"),
}


@pytest.mark.parametrize("name", FILES_THAT_ARE_NO_TEXT)
def test_a_file_that_is_no_text_is_named_with_what_to_do(tmp_path, name):
    content, advice = FILES_THAT_ARE_NO_TEXT[name]
    path = tmp_path / name
    path.write_bytes(content)
    if name == "book.docx":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "<a/>")
    with pytest.raises(ValueError, match=advice) as caught:
        find_files([path])
    assert str(path) in str(caught.value)


def test_files_with_documents_are_checked_too(tmp_path):
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        (tmp_path / name).write_bytes(FILES_THAT_ARE_NO_TEXT["book.txt.gz"][0] + name.encode())
    assert len(find_files([tmp_path], ENDINGS)) == 3  # each is read by its own reader
    (tmp_path / "d.txt").write_bytes(b"%PDF-1.7")
    with pytest.raises(ValueError, match="pdftotext"):
        find_files([tmp_path], ENDINGS)


def test_a_folder_without_text_says_what_it_has(tmp_path):
    write_files(tmp_path, "a.docx", "b/c.docx", "d.txt.gz", "README", ".x.docx")
    with pytest.raises(ValueError, match=r"it has 2 \.docx, 1 without ending, 1 \.txt\.gz"):
        find_files([tmp_path])


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["a.jsonl", "b.docx"], "data/openwebtext/prepare.py --input"),
        (["a.parquet"], "data/openwebtext/prepare.py --input"),
        (["a.pdf", "b.txt.gz"], None),
        (["a.pdf", "b.md"], "Files with another ending can be given by name"),
    ],
)
def test_the_advice_for_a_folder_fits_what_it_has(tmp_path, names, advice):
    write_files(tmp_path, *names)
    with pytest.raises(ValueError, match="it has") as caught:
        find_files([tmp_path])
    assert advice in str(caught.value) if advice else "can be given" not in str(caught.value)
    assert ("by name" in str(caught.value)) == (advice is not None and "by name" in advice)


def test_json_lines_with_another_ending_are_to_be_renamed(tmp_path):
    for name in ("a.ndjson", "b.json"):
        (tmp_path / name).write_text('{"text": "a"}\n')
        with pytest.raises(ValueError, match=r"rename it to \.jsonl$"):
            find_files([tmp_path / name], ENDINGS)
    (tmp_path / "c.json").write_text('{\n "name": 1\n}\n')
    assert find_files([tmp_path / "c.json"]) == [tmp_path / "c.json"]  # JSON can be a text to learn from
