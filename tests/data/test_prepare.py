"""The prepare.py of each corpus, as a user runs it: flags, messages, exit status; downloads from here."""

import ast
import errno
import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

from fradique.data import build, sources
from fradique.data.prepare import CorpusSpec, main
from fradique.data.text import Text
from fradique.io import download
from fradique.io.download import Download, fetch

CORPORA = ROOT.parent / "shared" / "corpora"
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason=f"the real corpora are not in {CORPORA}")
SCRIPTS = sorted((ROOT / "data").glob("*/prepare.py"))
SHIPPED = {
    *(
        "python_char",
        "eca_char",
        "eca",
        "machado_char",
        "machado",
        "machado_romances_char",
        "shakespeare_char",
    ),
    *("shakespeare", "golden_age_char", "openwebtext", "custom"),
}
STORY = "Era uma vez um gato que não dormia, e uma lua: a lua de Lisboa — 🙂.\n" * 60


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_prepare(script: Path, *words: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", str(script), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(STORY, encoding="utf-8")
    return path


@pytest.fixture
def clone(tmp_path) -> Path:
    """The repository as a fresh clone has it, without what corpora and runs have left."""
    ignore = shutil.ignore_patterns("*.bin", "*.json", "raw", "__pycache__")
    for name in ("fradique", "data"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=ignore)
    return tmp_path / "clone"


# The scripts


def test_every_corpus_has_its_script():
    assert {script.parent.name for script in SCRIPTS} >= SHIPPED


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_a_script_is_short_and_says_what_it_makes_and_how(script):
    source = script.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    assert f"python data/{script.parent.name}/prepare.py" in ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_a_script_runs_from_anywhere_on_a_text_at_hand(script, tmp_path, book):
    (tmp_path / "more").mkdir()
    for i in range(7):
        shutil.copy(book, tmp_path / "more" / f"{i}.txt")
    words = ["--input", book, tmp_path / "more", "--val_fraction=0.5", "--out_dir", tmp_path / "made"]
    done = run_prepare(script, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "made") == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    meta = json.loads((tmp_path / "made" / "meta.json").read_text(encoding="utf-8"))
    assert sum(split["bytes"] for split in meta["splits"].values()) == 8 * len(STORY.encode())
    assert meta["source"] == "book.txt, 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt"
    assert f"vocabulary of {meta['vocab_size']:,} ({meta['tokenizer']})" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_a_script_explains_its_flags(script, tmp_path):
    done = run_prepare(script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in ("--input", "--val_fraction", "--out_dir"))
    assert ("--tokenizer" in done.stdout) == ("--name" in done.stdout) == (script.parent.name == "custom")


def test_the_embedded_corpus_needs_no_network_and_no_flag(clone):
    done = run_prepare(clone / "data" / "python_char" / "prepare.py", cwd=clone)
    assert done.returncode == 0, done.stderr
    assert "next: python train.py config/train_python_char.py" in done.stdout
    meta = json.loads((clone / "data" / "python_char" / "meta.json").read_text())
    assert meta["vocab_size"] <= 96


@pytest.mark.parametrize(("flag", "kind"), [("char", "char"), ("gpt2", "gpt2"), ("bpe:300", "bpe")])
def test_a_text_of_ones_own_gets_a_name_and_a_tokenizer(clone, book, flag, kind):
    script = clone / "data" / "custom" / "prepare.py"
    done = run_prepare(script, "--input", book, "--tokenizer", flag, "--name", "os_lusíadas", cwd=clone)
    assert done.returncode == 0, done.stderr
    meta = json.loads((clone / "data" / "os_lusíadas" / "meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer"] == kind
    assert "--dataset=os_lusíadas" in done.stdout


@needs_corpora
def test_eca_from_a_folder_is_the_works_in_the_order_of_the_list(tmp_path):
    done = run_prepare(
        ROOT / "data" / "eca_char" / "prepare.py",
        "--input",
        CORPORA / "eca",
        "--out_dir",
        tmp_path,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    order = [item.name for item in sources.ECA]
    whole = b"".join((CORPORA / "eca" / name).read_bytes() for name in order).decode()
    chars = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["chars"]
    ids = np.concatenate([np.fromfile(tmp_path / f"{split}.bin", "<u2") for split in ("train", "val")])
    assert chars == "".join(sorted(set(whole)))
    assert "".join(chars[i] for i in ids.tolist()) == whole


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "missing.txt"], "error: --input: there is no file or folder missing.txt"),
        (["--input", "empty.txt"], "error: --input: empty.txt is empty"),
        (["--input", "latin1.txt"], "error: latin1.txt is not UTF-8 text: byte 0xe9 at offset 3"),
        (["--input", "book.txt", "--val_fraction", "2"], "error: --val_fraction is 2.0"),
        (
            ["--input", "book.txt", "--tokenizer", "bpe:12"],
            "error: a BPE vocabulary of 12 tokens is out of range",
        ),
        (["--input", "book.txt", "--tokenizer", "words"], "error: unknown tokenizer 'words'"),
        (["--input", "book.txt", "--out_dir", "book.txt"], "error: book.txt is a file, not a folder"),
        (["--input", "tiny.txt"], "error: the text is too small"),
        (["--input", "book.txt", "--name", "../x"], "error: --name '../x' is not a plain folder name"),
        (["--input", "book.txt", "--name", ".."], "error: --name '..' is not a plain folder name"),
        (["--input", "book.txt", "--name", "eca_char"], "error: --name eca_char: "),
        (["--input", "book.txt", "--name", "a", "--out_dir", "b"], "error: --name and --out_dir"),
        ([], "error: the following arguments are required: --input"),
        (["--input", "book.txt", "--val_fracton", "0.2"], "error: unrecognized arguments: --val_fracton"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_message_and_status_2_and_leaves_nothing(clone, words, message):
    here = clone / "here"
    here.mkdir()
    (here / "empty.txt").touch()
    (here / "book.txt").write_text(STORY, encoding="utf-8")
    (here / "tiny.txt").write_text("a")
    (here / "latin1.txt").write_bytes("um\ncaf\u00e9".encode("latin-1").replace(b"caf", b""))
    before = sorted(path for path in clone.rglob("*") if "__pycache__" not in path.parts)
    done = run_prepare(clone / "data" / "custom" / "prepare.py", *words, cwd=here)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert sorted(path for path in clone.rglob("*") if "__pycache__" not in path.parts) == before


def test_debug_shows_the_traceback(tmp_path):
    script = ROOT / "data" / "custom" / "prepare.py"
    for flag in ("--debug", "--debug=True"):
        done = run_prepare(script, "--input", "missing.txt", flag, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" in done.stderr and "no file or folder" in done.stderr


def recipe(folder: Path, text: Text | None = None) -> CorpusSpec:
    made = text or Text("a test", len(STORY), lambda: iter([STORY]))
    return CorpusSpec(folder=folder, about="A test.", tokenizer="char", then="go {name}", text=lambda _: made)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build._Shard, "write", full)
    assert main(recipe(tmp_path / "made"), []) == 2
    assert "error: the disk is full" in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "made").mkdir(mode=0o500)
    assert main(recipe(tmp_path / "made"), []) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_a_number_of_documents_below_one_is_refused(tmp_path, book, limit):
    script = ROOT / "data" / "openwebtext" / "prepare.py"
    done = run_prepare(script, "--input", book, "--max_documents", limit, "--out_dir", "x", cwd=tmp_path)
    assert done.returncode == 2 and "--max_documents" in done.stderr
    assert names(tmp_path) == ["book.txt"]


# Stopped on the way

SLOW = """
import sys, time
from pathlib import Path
from fradique.data.prepare import CorpusSpec, main
from fradique.data.text import Text
passes = []
def chunks():
    passes.append(0)
    for i in range(400):
        yield "uma casa " * 1000 * (1 + 300 * (len(passes) > 1))
        if len(passes) > 1 and i == 3:
            print("encoding", flush=True)
        if len(passes) > 1 and i > 3:
            time.sleep(0.1)
out = Path(sys.argv[1])
sys.exit(main(CorpusSpec(out, "a test", "char", "go", lambda folder: Text("a test", 1, chunks)), []))
"""


def stopped(folder: Path, number: signal.Signals) -> tuple[int, str]:
    """The status and messages of a prepare that got a signal while it was writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "encoding\n"
    assert [path.name for path in folder.glob(".prepare-*/*.bin")]
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    return process.returncode, told


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_prepare_that_is_asked_to_stop_leaves_nothing(tmp_path, number, status):
    returned, told = stopped(tmp_path / "made", number)
    assert returned == status
    assert told == "stopped; nothing half-made is left\n"
    assert names(tmp_path) == []


def test_a_prepare_that_is_killed_leaves_no_corpus_and_the_next_one_sweeps_up(tmp_path):
    assert stopped(tmp_path, signal.SIGKILL)[0] == -signal.SIGKILL
    left = names(tmp_path)
    assert len(left) == 1 and left[0].startswith(".prepare-")
    assert main(recipe(tmp_path), []) == 0
    assert names(tmp_path) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_killed_prepare_keeps_the_corpus_that_was_there(tmp_path):
    assert main(recipe(tmp_path), []) == 0
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    stopped(tmp_path, signal.SIGKILL)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_training_a_bpe_can_be_stopped(tmp_path):
    """Hugging Face's trainer works outside Python, for minutes on such a text; signals act all the same."""
    code = (
        "import random, sys; from fradique.tokenizer import bpe\n"
        "texts = [''.join(random.Random(i).choices('acgt', k=16384)) for i in range(300)]\n"
        "print('training', flush=True)\n"
        "bpe.train_merges(texts, 20000)\n"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "training\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]


# Downloads

PAGE = "O mar é grande.\n".encode() * 100
SUM = hashlib.sha256(PAGE).hexdigest()


class Page(http.server.BaseHTTPRequestHandler):
    """One page, served well and badly."""

    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.rsplit("/", 1)[-1]
        if kind in ("moved.txt", "gone_away.txt"):
            self.send_response(302)
            away = "http://example.invalid/" if kind == "gone_away.txt" else ""
            self.send_header("Location", f"{away}good.txt")
            self.end_headers()
            return
        self.send_response(404 if kind == "gone.txt" else 200)
        if kind != "endless.txt":
            self.send_header("Content-Length", str(len(PAGE) + 10 * (kind == "short.txt")))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; `.url(name)` is the address of a page, `.asked` what was asked for."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as httpd:
        httpd.asked = []
        httpd.url = lambda name: f"http://127.0.0.1:{httpd.server_port}/a%C3%A7/{name}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def test_a_file_is_fetched_checked_and_not_fetched_again(server, tmp_path):
    path = tmp_path / "raw" / "good.txt"
    assert fetch(server.url("good.txt"), SUM, path).read_bytes() == PAGE
    assert fetch(server.url("good.txt"), SUM, path).read_bytes() == PAGE
    assert server.asked == ["/a%C3%A7/good.txt"]
    assert names(path.parent) == ["good.txt"]


def test_a_kept_file_that_is_damaged_is_fetched_again(server, tmp_path):
    path = tmp_path / "good.txt"
    path.write_bytes(PAGE[:-1])
    assert fetch(server.url("good.txt"), SUM, path).read_bytes() == PAGE


@pytest.mark.parametrize(
    ("name", "sha256", "words"),
    [
        ("good.txt", "0" * 64, f"its sha256 is {SUM}, not 000"),
        ("short.txt", SUM, "was cut short"),
        ("gone.txt", SUM, "the server answers 404"),
    ],
)
def test_a_download_that_fails_names_the_address_and_the_way_out(server, tmp_path, name, sha256, words):
    path = tmp_path / name
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=words) as caught:
        fetch(server.url(name), sha256, path)
    assert server.url(name) in str(caught.value) and "--input" in str(caught.value)
    assert names(tmp_path) == [name] and path.read_bytes() == b"old"


def test_a_redirect_is_followed_but_not_away_from_https(server, tmp_path):
    assert fetch(server.url("moved.txt"), SUM, tmp_path / "moved.txt").read_bytes() == PAGE
    with pytest.raises(ValueError, match=r"http://example.invalid/good.txt is not an https address"):
        fetch(server.url("gone_away.txt"), SUM, tmp_path / "gone_away.txt")
    assert names(tmp_path) == ["moved.txt"]


@pytest.mark.parametrize("name", ["good.txt", "endless.txt"])
def test_a_download_is_bounded_with_and_without_a_length(server, tmp_path, name):
    with pytest.raises(ValueError, match=r"too large"):
        fetch(server.url(name), SUM, tmp_path / name, max_bytes=len(PAGE) - 1)
    assert names(tmp_path) == []
    assert fetch(server.url(name), SUM, tmp_path / name, max_bytes=len(PAGE)).read_bytes() == PAGE


def test_no_network_names_the_address_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.txt"
        with pytest.raises(ValueError, match=r"a\.txt cannot be reached .*refused.*--input"):
            fetch(url, SUM, tmp_path / "a.txt")
    assert names(tmp_path) == []


def test_a_server_that_says_nothing_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.txt"
        with pytest.raises(ValueError, match=r"cannot be reached .*timed out"):
            fetch(url, SUM, tmp_path / "a.txt", timeout=0.2)


@pytest.mark.parametrize(
    "url", ["http://example.org/a", "ftp://127.0.0.1/a", "file:///etc/hosts", "a.txt", ""]
)
def test_only_https_is_fetched_from_elsewhere(tmp_path, url):
    with pytest.raises(ValueError, match=r"is not an https address"):
        fetch(url, SUM, tmp_path / "a")
    assert names(tmp_path) == []


def test_processes_of_one_number_fetch_the_same_file_at_the_same_time(server, tmp_path, monkeypatch):
    """As pods do, which share a disk: each has a part of its own."""
    monkeypatch.setattr(download.os, "getpid", lambda: 7)
    real, parts = download._blocks, []

    def blocks(*words):
        yield from real(*words)
        parts.append([path.name for path in tmp_path.glob(".*.tmp")])
        if len(parts) == 1:
            fetch(server.url("good.txt"), SUM, tmp_path / "good.txt")

    monkeypatch.setattr(download, "_blocks", blocks)
    fetch(server.url("good.txt"), SUM, tmp_path / "good.txt")
    assert [len(there) for there in parts] == [1, 2] and names(tmp_path) == ["good.txt"]


def test_parts_that_nobody_writes_any_more_are_swept(server, tmp_path):
    old, new = (tmp_path / f".good.txt.{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (1e9, 1e9))
    fetch(server.url("good.txt"), SUM, tmp_path / "good.txt")
    assert names(tmp_path) == [new.name, "good.txt"]


def test_a_disk_error_is_not_blamed_on_the_network(server, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left"):
        fetch(server.url("good.txt"), SUM, tmp_path / "good.txt")
    assert names(tmp_path) == []


def test_a_corpus_is_downloaded_in_the_order_of_names_and_then_needs_no_network(server, tmp_path, capsys):
    items = tuple(Download(server.url(name), SUM) for name in ("b.txt", "a%C3%A9.txt"))
    made = CorpusSpec(tmp_path, "A test.", "char", "go", text=sources.download_text(items))
    assert main(made, []) == 0
    assert names(tmp_path / "raw") == ["aé.txt", "b.txt"]
    assert server.asked == ["/a%C3%A7/a%C3%A9.txt", "/a%C3%A7/b.txt"]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["source"] == ", ".join(item.url for item in reversed(items))
    assert sum(split["bytes"] for split in meta["splits"].values()) == 2 * len(PAGE)
    assert main(made, []) == 0
    assert len(server.asked) == 2
    assert "go" in capsys.readouterr().out


def test_a_failed_download_keeps_what_came_before_it_and_makes_no_corpus(server, tmp_path, capsys):
    items = (Download(server.url("a.txt"), SUM), Download(server.url("gone.txt"), SUM))
    assert main(CorpusSpec(tmp_path, "A test.", "char", "go", text=sources.download_text(items)), []) == 2
    assert "error: http://127.0.0.1" in capsys.readouterr().err
    assert names(tmp_path) == ["raw"] and names(tmp_path / "raw") == ["a.txt"]


def test_every_source_is_a_fixed_version_of_a_file_with_its_sum():
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
def test_the_sums_are_those_of_the_list():
    lines = [line.split()[:2] for line in (CORPORA / "SHA256SUMS").read_text().splitlines()]
    listed = {name: sha256 for sha256, name in lines}
    assert [(f"eca/{item.name}", item.sha256) for item in sources.ECA] == sorted(
        pair for pair in listed.items() if pair[0].startswith("eca/")
    )
    others = {"machado_contos": sources.MACHADO_TALES, "machado_romances": sources.MACHADO_NOVELS}
    others |= {"shakespeare": sources.SHAKESPEARE, "golden_age": sources.GOLDEN_AGE}
    for name, (item,) in others.items():
        assert listed[f"{name}.txt"] == item.sha256
