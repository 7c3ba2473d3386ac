"""The output of the commands: UTF-8 in files and pipes, replaced characters on consoles, closed streams."""

import importlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_helpers import story_spec
from support import ROOT

import sample
import train
from configurator import command
from fradique.data import prepare
from fradique.io.terminal import SIGPIPE_STATUS, command_output
from fradique.training import logger

NOTE = "lacks some characters, shown as ?"
TEXT = "é — “日本”"
FULL = Path("/dev/full")
ENCODINGS = ("ascii", "cp1252", "shift_jis", "utf-8")


class Stream(io.TextIOWrapper):
    """Standard output or error as Python opens it: strict, for a console or a file of some encoding."""

    def __init__(self, encoding: str, is_console: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="\n")
        self.is_console = is_console

    def isatty(self):
        return self.is_console

    def text(self, encoding="utf-8"):
        self.flush()
        return self.buffer.getvalue().decode(encoding)


@pytest.fixture
def streams(monkeypatch):
    """A function that replaces stdout and stderr by two `Stream`s, and returns them."""

    def replace(encoding, is_console):
        out, err = Stream(encoding, is_console), Stream(encoding, is_console)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return replace


def print_both(text):
    with command_output():
        print(text)
        print(text, file=sys.stderr)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_redirected_output_is_utf8_in_every_encoding(streams, encoding):
    out, err = streams(encoding, is_console=False)
    print_both(TEXT)
    assert (out.text(), err.text()) == (f"{TEXT}\n", f"{TEXT}\n")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "? ? ????"), ("cp1252", "é — “??”"), ("shift_jis", "? ― “日本”")]
)
def test_a_console_gets_a_replacement_and_one_note(streams, encoding, shown):
    out, err = streams(encoding, is_console=True)
    print_both(TEXT.replace("—", "―") if encoding == "shift_jis" else TEXT)
    assert out.text(encoding) == f"{shown}\n"
    lines = err.text(encoding).splitlines()
    assert lines[0] == shown and len(lines) == 2
    assert lines[1].startswith(f"note: this terminal's encoding ({encoding}) {NOTE}")
    assert "PYTHONIOENCODING=utf-8" in lines[1]


@pytest.mark.parametrize(("encoding", "text"), [("utf-8", TEXT), ("cp1252", "é — “a”"), ("ascii", "a")])
def test_a_console_that_has_every_character_gets_no_note(streams, encoding, text):
    out, err = streams(encoding, is_console=True)
    print_both(text)
    assert (out.text(encoding), err.text(encoding)) == (f"{text}\n", f"{text}\n")


@pytest.mark.parametrize("is_console", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_that_are_not_utf8_are_printed_as_escapes(streams, encoding, is_console):
    out, err = streams(encoding, is_console)
    print_both(f"wrote a{os.fsdecode(bytes([0xFF]))}.txt \ud800")
    assert out.text() == err.text() == "wrote a\\udcff.txt \\ud800\n"


def test_closed_streams_are_no_error(monkeypatch):
    """`python train.py >&- 2>&-`: Python sets both to None."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    print_both(TEXT + "\udcff")
    assert not sys.stdout.isatty() and not sys.stderr.isatty()


def test_output_without_an_encoding_is_left_as_it_is(monkeypatch):
    """The streams of a notebook, and of contextlib.redirect_stdout, cannot be reconfigured."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    print_both(TEXT)
    assert sys.stdout.getvalue() == sys.stderr.getvalue() == f"{TEXT}\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_progress_bar_is_drawn_on_any_console(streams, encoding):
    out, err = streams(encoding, is_console=True)
    with command_output():
        log = logger.RunLogger(None, enabled=True, total=10, unit="step")
        log.info(f"corpus {TEXT}")
        log.warn(f"run {TEXT}")
        log.finish_bar()
        log.close()
    assert out.text(encoding).startswith("corpus ?" if encoding == "ascii" else "corpus é")
    assert "100%|#" in err.text(encoding) and err.text(encoding).count(NOTE) == 1


# The commands


def settings_command(name):
    """A command whose settings are a dataclass: call it with arguments."""
    module = importlib.import_module(name)
    names = [name for name in vars(module) if name.endswith("Settings")]
    (cls,) = {vars(module)[name] for name in names if vars(module)[name].__module__ == module.__name__}
    return lambda *arguments: command(module.main, cls, arguments)


def argparse_command(name):
    """A command whose `main` parses sys.argv."""
    module = importlib.import_module(name)
    return lambda *arguments: call_main(module.main, *arguments)


def prepare_command(name):
    corpus = runpy.run_path(str(ROOT / "data" / name / "prepare.py"))["CORPUS"]
    return lambda *arguments: call_main(lambda: prepare.main(corpus), *arguments)


def call_main(main, *arguments):
    """The exit status of a `main` for the arguments in sys.argv."""
    sys.argv = ["a command", *arguments]
    try:
        return main() or 0
    except SystemExit as error:
        return error.code or 0


LAB = ("anatomy", "attention", "curves", "embeddings", "journey", "movie", "report", "sampling", "tokenizers")
BENCH = (
    "architectures",
    "data",
    "dataloader",
    "gpu_check",
    "memory",
    "quality",
    "reference",
    "sample",
    "textbook",
)
CORPORA = sorted(path.parent.name for path in ROOT.glob("data/*/prepare.py"))
COMMANDS = {
    **dict.fromkeys(("train", "sample", *(f"lab.{name}" for name in (*LAB, "tokens"))), settings_command),
    **dict.fromkeys(("fradique.pretrained.__main__", "bench.train"), argparse_command),
    **dict.fromkeys((f"bench.{name}" for name in BENCH), argparse_command),
    **dict.fromkeys(CORPORA, prepare_command),
}


def test_every_command_is_tested():
    files = [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ROOT.glob("bench/*.py")]
    scripts = [path for path in files if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in scripts} - {"configurator"}
    assert modules | {"fradique.pretrained.__main__", *CORPORA} == set(COMMANDS)


@pytest.fixture(params=COMMANDS)
def run(request, monkeypatch):
    """Each command, as a function of its arguments that returns the exit status."""
    monkeypatch.setattr(sys, "argv", sys.argv)  # restored after the test
    return COMMANDS[request.param](request.param)


def test_help_never_fails(run, streams):
    out, err = streams("utf-8", is_console=False)
    assert run("--help") == 0 and err.text() == ""
    expected = out.text()
    for encoding in ENCODINGS:
        out, err = streams(encoding, is_console=False)
        assert run("--help") == 0 and (out.text(), err.text()) == (expected, "")
        out, err = streams(encoding, is_console=True)
        assert run("--help") == 0
        shown = expected.encode(encoding, "replace")
        assert (out.buffer.getvalue(), NOTE in err.text(encoding)) == (
            shown,
            shown.decode(encoding) != expected,
        )


def test_help_never_fails_without_a_stdout(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run("--help") == 0


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe raises another error on Windows")
def test_help_into_a_closed_pipe_has_the_status_of_sigpipe(run, monkeypatch):
    """`python train.py --help | head -1`"""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="cp1252") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run("--help") == SIGPIPE_STATUS


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe raises another error on Windows")
@pytest.mark.parametrize("buffering", [1, -1], ids=["lines", "blocks"])
def test_a_corpus_is_made_whole_while_nobody_reads_the_output(monkeypatch, tmp_path, capsys, buffering):
    """`python prepare.py | head -1`; with line buffering, print itself raises the error."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as caught:
            prepare.main(story_spec(tmp_path / "made"), [])
    assert caught.value.code == SIGPIPE_STATUS and "error" not in capsys.readouterr().err
    assert (tmp_path / "made" / "meta.json").exists()


@pytest.mark.skipif(not FULL.exists(), reason="needs a disk that is always full")
def test_help_on_a_full_disk_is_an_error_in_one_line(run, streams, monkeypatch):
    _, err = streams("utf-8", is_console=False)
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run("--help") == 2
        assert err.text() == "error: standard output: No space left on device\n"


@pytest.mark.parametrize("is_console", [False, True])
def test_a_finished_corpus_is_reported_on_any_console(streams, is_console, tmp_path):
    out, err = streams("ascii", is_console)
    assert prepare.main(story_spec(tmp_path), [f"--out_dir={tmp_path / 'ficção'}"]) == 0
    assert ("fic??o: " if is_console else "ficção: ") in out.text()
    assert err.text().count(NOTE) == is_console and "error" not in err.text()


def test_a_flag_that_is_not_utf8_gives_a_message_on_any_console(streams):
    for run in (
        lambda: command(sample.main, sample.SampleSettings, ["--start=\udcff日"]),
        lambda: command(train.main, train.TrainSettings, ["\udcff日.py"]),
        lambda: call_main(lambda: prepare.main(story_spec(ROOT), ["--shards=\udcff日"])),
    ):
        _, err = streams("cp1252", is_console=True)
        assert run() == 2
        assert "\\udcff?" in err.text("cp1252") and "Traceback" not in err.text("cp1252")


@pytest.mark.parametrize("is_console", [False, True])
def test_the_reference_in_plain_python_prints_any_text(streams, is_console, tmp_path, monkeypatch):
    main = runpy.run_path(str(ROOT / "reference" / "gpt_python.py"))["main"]
    (tmp_path / "book.txt").write_text("日本" * 20, encoding="utf-8")
    flags = [f"--input={tmp_path / 'book.txt'}", "--steps=1", "--batch=1", "--width=4", "--write=9"]
    monkeypatch.setattr(sys, "argv", ["gpt_python.py", *flags])
    out, _ = streams("cp1252", is_console)
    main()
    assert set(out.text("cp1252" if is_console else "utf-8").splitlines()[-1]) == set(
        "?" if is_console else "日本"
    )


SCRIPT = """
import sys
from fradique.io.terminal import command_output
with command_output():
    print("é — “日本”")
    print("é — “日本”", file=sys.stderr)
"""


def test_python_itself_writes_utf8_into_pipes():
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    arguments = [sys.executable, "-W", "error", "-c", SCRIPT]
    result = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, check=True)
    assert result.stdout.decode().splitlines() == result.stderr.decode().splitlines() == [TEXT]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals of this kind")
def test_python_itself_replaces_characters_on_a_terminal():
    import pty

    reading, writing = pty.openpty()
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    arguments = [sys.executable, "-W", "error", "-c", SCRIPT]
    subprocess.run(arguments, cwd=ROOT, env=env, stdout=writing, stderr=writing, check=True)
    lines = os.read(reading, 4096).decode("cp1252").splitlines()
    os.close(reading)
    os.close(writing)
    assert sorted(lines[:2]) == ["é — “??”"] * 2 and len(lines) == 3 and NOTE in lines[2]
