"""Finding, decoding and cutting text files, compared with Python's decoder and GPT-2's tokens."""

import pytest
from corpus_helpers import STORY, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fradique.data.input_files import find_files
from fradique.data.text import cut_pieces, files_text, read_file
from fradique.tokenizer import tokenizer

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)
# all kinds of white space, so that the text is cut at all kinds of positions
SPACED = st.text("ab1é.'s \u00a0\u2003\x1c\t\r\n", max_size=120)


@PROPERTY
@given(
    string=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60).filter(
        lambda s: not s.startswith("\ufeff")
    ),
    block=st.integers(1, 9),
)
def test_blocks_of_any_size_give_the_same_text(tmp_path_factory, string, block):
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(string.encode())
    chunks = list(read_file(path, block))
    assert "".join(chunks) == string
    assert "" not in chunks


@PROPERTY
@given(
    prefix=st.text("aé日🙂", max_size=12),
    invalid=st.sampled_from(
        [b"\xff", b"\xc3", b"\xe6\x97", b"\xf0\x9f\x99", b"\xc0\x80", b"\xed\xa0\x80", b"\x80"]
    ),
    suffix=st.text("aé日🙂", max_size=12),
    block=st.integers(1, 9),
)
def test_the_first_byte_that_is_not_utf8_is_reported(tmp_path_factory, prefix, invalid, suffix, block):
    path = tmp_path_factory.getbasetemp() / "broken.txt"
    data = prefix.encode() + invalid + suffix.encode()
    path.write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as reference:
        data.decode("utf-8")
    with pytest.raises(ValueError) as caught:
        list(read_file(path, block))
    offset = reference.value.start
    assert f"byte 0x{data[offset]:02x} at offset {offset} " in str(caught.value)
    assert "broken.txt" in str(caught.value) and "iconv -f" in str(caught.value)


def test_newlines_are_kept_and_a_byte_order_mark_is_removed(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    files = find_files([tmp_path / "a.txt"])
    assert "".join(files_text(files, "").chunks()) == "one\r\ntwo\rthree\n"
    assert "".join(read_file(files[0], 1)) == "one\r\ntwo\rthree\n"
    assert "a.txt begins with a byte-order mark" in capsys.readouterr().err


def test_the_error_for_a_utf16_file_shows_how_to_convert_it(tmp_path):
    (tmp_path / "a.txt").write_bytes("olá".encode("utf-16"))
    with pytest.raises(ValueError, match=r"iconv -f UTF-16"):
        list(read_file(tmp_path / "a.txt"))


WESTERN = "Era uma vez um gato."
ENCODINGS = {
    "utf-32": (WESTERN.encode("utf-32"), "iconv -f UTF-32 "),
    "utf-32-be": (b"\0\0\xfe\xff" + WESTERN.encode("utf-32-be"), "iconv -f UTF-32 "),
    "utf-16": (WESTERN.encode("utf-16"), "iconv -f UTF-16 "),
    "utf-16-be": (b"\xfe\xff" + WESTERN.encode("utf-16-be"), "iconv -f UTF-16 "),
    "japanese utf-16": ("日本語のテキスト".encode("utf-16"), "iconv -f UTF-16 "),
    "utf-16-le": (WESTERN.encode("utf-16-le"), "iconv -f UTF-16LE "),
    "latin-1": ("garça".encode("latin-1"), "iconv -f WINDOWS-1252 "),
    "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1", "seems to be no text"),
    "mp3": (b"\xff\xfb\x90\x04\x0f\x02\x05\x1c", "seems to be no text"),
    "bytes": (bytes(range(256)), "seems to be no text"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_encoding_of_a_file_that_is_not_utf8_is_guessed(tmp_path, name):
    data, advice = ENCODINGS[name]
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match="is not UTF-8 text") as caught:
        list(read_file(tmp_path / "a.txt"))
    assert advice in str(caught.value)
    assert name in ("jpeg", "mp3", "bytes") or "seems to be no text" not in str(caught.value)


@pytest.mark.parametrize("block", [1, 4, 1 << 20])
def test_a_nul_byte_anywhere_in_a_file_is_refused(tmp_path, block):
    (tmp_path / "a b.txt").write_bytes("olá".encode() * 9 + b"\0z")
    with pytest.raises(ValueError, match=r"NUL byte at offset 36 .*tr -d .*'a b-utf8\.txt'"):
        list(read_file(tmp_path / "a b.txt", block))


def test_files_are_joined_with_a_newline_only_if_one_is_missing(tmp_path):
    for name, content in {"1": "a\n", "2": "b", "3": "c\n\n", "4": "d"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    assert "".join(files_text(find_files([tmp_path]), "").chunks()) == "a\nb\nc\n\nd"


@PROPERTY
@given(
    contents=st.lists(st.text("aé🙂\n\ufeff", max_size=6), min_size=1, max_size=5),
    has_bom=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_files_can_be_read_from_any_character(tmp_path_factory, contents, has_bom):
    folder = tmp_path_factory.getbasetemp()
    paths = [folder / f"part{i}.txt" for i in range(len(contents))]
    for path, content, bom in zip(paths, contents, has_bom, strict=False):
        path.write_bytes(b"\xef\xbb\xbf" * bom + content.encode())
    text = files_text(paths, "")
    joined = "".join(text.chunks())
    for i in range(len(joined) + 1):
        assert "".join(text.from_byte(len(joined[:i].encode()))) == joined[i:]
        assert "".join(text_of(joined, 2).from_byte(len(joined[:i].encode()))) == joined[i:]


@PROPERTY
@given(string=SPACED, chunk=st.integers(1, 9), piece_chars=st.integers(1, 9))
def test_pieces_have_the_tokens_of_the_whole_text(string, chunk, piece_chars):
    pieces = list(cut_pieces(text_of(string, chunk).chunks(), piece_chars, 1000))
    gpt2 = tokenizer.GPT2Tokenizer()
    assert "".join(pieces) == string
    assert [i for piece in pieces for i in gpt2.encode(piece)] == gpt2.encode(string).tolist()


def test_real_sentences_are_cut_into_many_pieces():
    pieces = list(cut_pieces(text_of(STORY, 100).chunks(), 30, 1000))
    assert "".join(pieces) == STORY
    assert max(map(len, pieces)) <= 60 and len(pieces) > len(STORY) / 60


@pytest.mark.parametrize(
    "string",
    ["x" * 1000, " " * 1000, "日" * 1000, "a " + "b" * 998],
    ids=["letters", "spaces", "Japanese", "one long word"],
)
def test_a_text_without_white_space_is_cut_at_the_limit(string):
    pieces = list(cut_pieces(text_of(string, 7).chunks(), 10, 80))
    assert "".join(pieces) == string
    assert max(map(len, pieces)) <= 80


def test_the_iconv_command_works_for_any_file_name(tmp_path):
    path = tmp_path / "um livro.jsonl"
    path.write_bytes(b"gar\xe7a")
    with pytest.raises(ValueError) as caught:
        list(read_file(path))
    assert f"-f WINDOWS-1252 -t UTF-8 '{path}' > 'um livro-utf8.jsonl'," in str(caught.value)
