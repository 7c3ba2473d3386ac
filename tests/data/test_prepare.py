"""Each corpus's prepare.py, run as a command: flags, messages, exit status."""

import ast
import errno
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import CORPORA, file_names, needs_corpora, story_spec
from fork_server import TIMEOUT
from support import ROOT

from fradique.data import encode, prepare, sources
from fradique.data.dataset import open_corpus
from fradique.data.prepare import main
from fradique.tokenizer.tokenizer import encode_prompt, load_tokenizer

SCRIPTS = sorted((ROOT / "data").glob("*/prepare.py"))
SHIPPED = {
    "custom",
    "eca",
    "eca_char",
    "golden_age_char",
    "machado",
    "machado_char",
    "machado_romances_char",
    "openwebtext",
    "python_char",
    "shakespeare",
    "shakespeare_char",
}
AUTO = "python train.py config/auto.py --dataset="
STORY = "Era uma vez um gato que não dormia, e uma lua: a lua de Lisboa — 🙂.\n" * 60


def run_prepare(script: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=TIMEOUT)


@pytest.fixture
def text_file(tmp_path) -> Path:
    """A file with STORY."""
    path = tmp_path / "book.txt"
    path.write_text(STORY, encoding="utf-8")
    return path


@pytest.fixture
def clone(tmp_path) -> Path:
    """The repository without prepared corpora."""
    ignore = shutil.ignore_patterns("*.bin", "*.json", "raw", "__pycache__")
    for name in ("fradique", "data"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=ignore)
    return tmp_path / "clone"


# The scripts


def test_every_corpus_has_a_script():
    assert {script.parent.name for script in SCRIPTS} >= SHIPPED


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_a_script_is_short_and_documents_its_command(script):
    source = script.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    assert f"python data/{script.parent.name}/prepare.py" in ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_a_script_runs_from_any_folder_on_a_local_text(script, tmp_path, text_file):
    (tmp_path / "more").mkdir()
    for i in range(7):  # each another text: copies are read once
        (tmp_path / "more" / f"{i}.txt").write_text(f"{i}{STORY[1:]}", encoding="utf-8")
    flags = ["--input", text_file, tmp_path / "more", "--val_fraction=0.5", "--out_dir", tmp_path / "made"]
    result = run_prepare(script, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert file_names(tmp_path / "made") == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    meta = json.loads((tmp_path / "made" / "meta.json").read_text(encoding="utf-8"))
    assert sum(split["bytes"] for split in meta["splits"].values()) == 8 * len(STORY.encode())
    assert meta["source"] == "book.txt, 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt"
    assert f"vocabulary of {meta['vocab_size']:,} ({meta['tokenizer']})" in result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_a_script_explains_its_flags(script, tmp_path):
    result = run_prepare(script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert all(flag in result.stdout for flag in ("--input", "--val_fraction", "--out_dir"))
    assert ("--tokenizer" in result.stdout) == ("--name" in result.stdout) == (script.parent.name == "custom")


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_help_fits_the_terminal_and_breaks_no_path(script, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    spec = runpy.run_path(str(script))["CORPUS"]
    with pytest.raises(SystemExit):
        main(spec, ["--help"])
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= columns
    assert {word for word in spec.description.split() if "/" in word} <= set(output.split())
    commands = re.findall(r"^    python .*", spec.description, re.MULTILINE)
    joined = re.sub(r" \\\n +", " ", output)  # join long commands, which continue after a backslash
    assert commands and all(command in joined.splitlines() for command in commands)


@pytest.mark.parametrize(
    ("next_command", "out_dir", "expected"),
    [
        ("go", "data/story", "go"),
        ("go {name}", "data/story", "go story"),
        ("go", "data/other", AUTO + "other --out_dir=out/other"),
        ("go {name}", "data/other", AUTO + "other --out_dir=out/other"),
        ("go", "else/other", AUTO + "other --out_dir=out/other --data_dir={}/else"),
    ],
)
def test_the_output_ends_with_the_training_command(tmp_path, capsys, next_command, out_dir, expected):
    """A config of this corpus is named only for its own folder."""
    spec = replace(story_spec(tmp_path / "data" / "story"), next_command=next_command)
    assert main(spec, ["--out_dir", str(tmp_path / out_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1] == f"next: {expected.format(tmp_path)}"


def test_a_config_for_a_gpu_is_named_beside_one_for_any_machine(tmp_path, capsys):
    spec = replace(story_spec(tmp_path / "data" / "story"), gpu_command="go fast")
    assert main(spec, []) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["next: go story", "on a GPU: go fast"]
    assert main(spec, ["--out_dir", str(tmp_path / "other")]) == 0
    assert "go fast" not in capsys.readouterr().out


CONFIG = re.compile(r"config/\w+\.py")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_the_named_configs_are_of_this_corpus_or_auto(script):
    spec = runpy.run_path(str(script))["CORPUS"]
    for command in filter(None, (spec.next_command, spec.gpu_command)):
        (name,) = CONFIG.findall(command)
        if name == "config/auto.py":
            assert "--dataset={name}" in command
        else:
            assert f'dataset = "{script.parent.name}"' in (ROOT / name).read_text(encoding="utf-8")
    if spec.gpu_command:  # the other command is for a CPU
        assert "cpu" in spec.next_command or "auto" in spec.next_command


def test_the_python_corpus_needs_no_network_and_no_flag(clone):
    result = run_prepare(clone / "data" / "python_char" / "prepare.py", cwd=clone)
    assert result.returncode == 0, result.stderr
    assert "next: python train.py config/train_python_char.py" in result.stdout
    meta = json.loads((clone / "data" / "python_char" / "meta.json").read_text())
    assert meta["vocab_size"] <= 96


@pytest.mark.parametrize(
    ("text_bytes", "tokenizer"),
    [
        (0, "char"),
        (255_999, "char"),
        (256_000, "bpe:512"),
        (1_100_000, "bpe:1024"),
        (1_780_000, "bpe:1024"),
        (3_000_000, "bpe:2048"),
        (10**10, "bpe:4096"),
    ],
)
def test_the_automatic_tokenizer_depends_on_the_length_of_the_text(text_bytes, tokenizer):
    assert prepare.automatic_tokenizer(text_bytes) == tokenizer


@pytest.mark.parametrize(
    ("flag", "kind"), [("char", "char"), ("gpt2", "gpt2"), ("bpe:300", "bpe"), ("auto", "char")]
)
def test_a_custom_text_gets_the_given_name_and_tokenizer(clone, text_file, flag, kind):
    script = clone / "data" / "custom" / "prepare.py"
    result = run_prepare(
        script, "--input", text_file, "--tokenizer", flag, "--name", "os_lusíadas", cwd=clone
    )
    assert result.returncode == 0, result.stderr
    meta = json.loads((clone / "data" / "os_lusíadas" / "meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer"] == kind
    assert "--dataset=os_lusíadas" in result.stdout


@needs_corpora
def test_eca_joins_the_listed_works_in_order(tmp_path):
    script = ROOT / "data" / "eca_char" / "prepare.py"
    result = run_prepare(script, "--input", CORPORA / "eca", "--out_dir", tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    order = [item.name for item in sources.ECA]
    text = b"".join((CORPORA / "eca" / name).read_bytes() for name in order).decode()
    chars = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["chars"]
    ids = np.concatenate([np.fromfile(tmp_path / f"{split}.bin", "<u2") for split in ("train", "val")])
    assert chars == "".join(sorted(set(text)))
    assert "".join(chars[i] for i in ids.tolist()) == text


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "missing.txt"], "error: --input: there is no file or folder missing.txt"),
        (["--input", "empty.txt"], "error: --input: empty.txt is empty"),
        (["--input", "latin1.txt"], "error: latin1.txt is not UTF-8 text: byte 0xe9 at offset 3"),
        (
            ["--input", "book.txt", "--val_fraction", "2"],
            "error: --val_fraction must be between 0 and 1, not 2.0",
        ),
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
def test_an_error_gives_one_message_and_leaves_no_files(clone, arguments, message):
    folder = clone / "folder"
    folder.mkdir()
    (folder / "empty.txt").touch()
    (folder / "book.txt").write_text(STORY, encoding="utf-8")
    (folder / "tiny.txt").write_text("a")
    (folder / "latin1.txt").write_bytes("um\ncaf\u00e9".encode("latin-1").replace(b"caf", b""))
    before = sorted(path for path in clone.rglob("*") if "__pycache__" not in path.parts)
    result = run_prepare(clone / "data" / "custom" / "prepare.py", *arguments, cwd=folder)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert sorted(path for path in clone.rglob("*") if "__pycache__" not in path.parts) == before


def test_debug_shows_the_traceback(tmp_path):
    script = ROOT / "data" / "custom" / "prepare.py"
    for flag in ("--debug", "--debug=True"):
        result = run_prepare(script, "--input", "missing.txt", flag, cwd=tmp_path)
        assert (
            result.returncode == 1 and "Traceback" in result.stderr and "no file or folder" in result.stderr
        )


def test_a_full_disk_is_reported_and_leaves_no_files(tmp_path, capsys, monkeypatch):
    def raise_disk_full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(encode.TokenFileWriter, "write", raise_disk_full)
    assert main(story_spec(tmp_path / "made"), []) == 2
    assert "error: the disk is full" in capsys.readouterr().err
    assert file_names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_reported(tmp_path, capsys):
    (tmp_path / "made").mkdir(mode=0o500)
    assert main(story_spec(tmp_path / "made"), []) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_a_number_of_documents_below_one_is_refused(tmp_path, text_file, limit):
    script = ROOT / "data" / "openwebtext" / "prepare.py"
    result = run_prepare(
        script, "--input", text_file, "--max_documents", limit, "--out_dir", "x", cwd=tmp_path
    )
    assert result.returncode == 2 and "--max_documents" in result.stderr
    assert file_names(tmp_path) == ["book.txt"]


# Signals


SLOW_PREPARE = """
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
            time.sleep(600)  # until the signal
out = Path(sys.argv[1])
sys.exit(main(CorpusSpec(out, "a test", "char", "go", lambda folder: Text("a test", 1, chunks)), []))
"""


def stop_prepare(folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Send a signal to prepare.py while it encodes. Returns its exit status and standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_PREPARE, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "encoding\n"
    assert [path.name for path in folder.glob(".prepare-*/*.bin")]
    process.send_signal(number)
    _, messages = process.communicate(timeout=TIMEOUT)
    return process.returncode, messages


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_the_preparation_and_leaves_no_files(tmp_path, number, status):
    returncode, messages = stop_prepare(tmp_path / "made", number)
    assert returncode == status
    assert messages == "stopped: no partial files are left\n"
    assert file_names(tmp_path) == []


def test_the_next_run_removes_the_files_of_a_killed_run(tmp_path):
    assert stop_prepare(tmp_path, signal.SIGKILL)[0] == -signal.SIGKILL
    remaining = file_names(tmp_path)
    assert len(remaining) == 1 and remaining[0].startswith(".prepare-")
    assert main(story_spec(tmp_path), []) == 0
    assert file_names(tmp_path) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_killed_preparation_keeps_the_old_corpus(tmp_path):
    assert main(story_spec(tmp_path), []) == 0
    before = {name: (tmp_path / name).read_bytes() for name in file_names(tmp_path)}
    stop_prepare(tmp_path, signal.SIGKILL)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_bpe_training_can_be_interrupted(tmp_path):
    """Hugging Face's trainer would run for 20 seconds here, outside Python; signals must still stop it."""
    resource = pytest.importorskip("resource")
    code = (
        "import random, sys, time; from fradique.tokenizer import bpe\n"
        "texts = [''.join(random.Random(i).choices('acgt', k=16384)) for i in range(300)]\n"
        "print('training', time.process_time(), flush=True)\n"
        "bpe.train_merges(texts, 20000)\n"
    )
    earlier = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    name, preparation = process.stdout.readline().split()
    assert name == "training"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=TIMEOUT)[1]
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    # in seconds of the processor, on any machine: the training takes 25 times as many as its preparation
    assert usage.ru_utime - earlier.ru_utime < 5 + 5 * float(preparation)


def test_a_second_signal_does_not_interrupt_the_cleanup():
    previous = signal.getsignal(signal.SIGHUP)
    with prepare._handle_signals():
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)  # the terminal is closed meanwhile
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is previous


# Separators of documents


SEPARATED = "Um gato.\n<|endoftext|>\nUma lua.</s>Fim.\n" * 60


@pytest.mark.parametrize(
    ("flags", "separator"),
    [([], "<|endoftext|>"), (["--document_separator=</s>"], "</s>"), (["--document_separator=none"], None)],
)
@pytest.mark.parametrize("kind", ["gpt2", "bpe:300"])
@pytest.mark.parametrize("shards", [[], ["--shards=2"]])
def test_a_separator_means_the_same_in_corpus_and_prompt(tmp_path, flags, separator, kind, shards):
    (tmp_path / "book.txt").write_text(SEPARATED, encoding="utf-8")
    spec = replace(story_spec(tmp_path / "made"), tokenizer=kind)
    assert main(spec, ["--input", str(tmp_path / "book.txt"), *flags, *shards]) == 0
    corpus = open_corpus(tmp_path / "made", 8)
    meta = json.loads((tmp_path / "made" / "meta.json").read_text(encoding="utf-8"))
    assert meta["document_separator"] == corpus.tokenizer.document_separator == separator
    ids = [token for split in (corpus.train, corpus.val) for chunk in chunks_of(split) for token in chunk]
    assert ids.count(corpus.tokenizer.end_of_text) == (60 if separator else 0)
    assert corpus.tokenizer.decode(ids) == SEPARATED
    assert sum(meta["splits"][name]["bytes"] for name in ("train", "val")) == len(SEPARATED.encode())
    for text in ("<|endoftext|>", "</s>"):
        is_special = encode_prompt(corpus.tokenizer, text).tolist() == [corpus.tokenizer.end_of_text]
        assert is_special == (text == separator)


def chunks_of(split):
    """The tokens of a split, file by file."""
    for i in range(len(split.token_files)):
        yield from (chunk.tolist() for chunk in split.token_files.chunks(i))


def test_documents_can_have_another_separator_in_their_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a</s>b<|endoftext|>"}\n' * 400, encoding="utf-8")
    spec = runpy.run_path(str(ROOT / "data" / "openwebtext" / "prepare.py"))["CORPUS"]
    flags = ["--input", str(tmp_path / "a.jsonl"), "--val_fraction=0.5", "--out_dir", str(tmp_path / "made")]
    assert main(spec, [*flags, "--document_separator=</s>"]) == 0
    train = np.fromfile(tmp_path / "made" / "train.bin", dtype="<u2").tolist()
    tokenizer = load_tokenizer(tmp_path / "made" / "tokenizer.json")
    assert train[:2] == [*tokenizer.encode("a"), 50256]
    per_document = [*tokenizer.encode("a</s>b<|endoftext|>").tolist(), 50256]
    assert train == per_document * (len(train) // len(per_document))


@pytest.mark.parametrize("flag", ["two words", "", "x" * 101])
def test_a_separator_that_cannot_be_used_is_reported(tmp_path, capsys, flag):
    spec = replace(story_spec(tmp_path / "made"), tokenizer="gpt2")
    assert main(spec, [f"--document_separator={flag}"]) == 2
    assert "without white space" in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_a_character_corpus_has_no_separator(tmp_path, clone, text_file):
    script = clone / "data" / "custom" / "prepare.py"
    result = run_prepare(script, "--input", text_file, "--document_separator=###", cwd=clone)
    assert result.returncode == 2 and "no token that ends a document" in result.stderr
    assert not (clone / "data" / "custom" / "meta.json").exists()
