"""Windows, as far as Linux can simulate it (see sitecustomize.py): imports, a whole run, messages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fork_server import TIMEOUT
from support import ROOT

from fradique.data import text
from fradique.io import terminal
from fradique.training import compile_choice

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="simulates Windows on Linux")
HERE = Path(__file__).parent
BOOK = "É o começo — “garça” 日本.\n" * 200  # cp1252 has no Japanese characters
# sitecustomize.py's name for the project's files: their imports are those of Windows
IN_PRODUCT = f"{{'__file__': {str(ROOT / 'train.py')!r}}}"
FILES = [
    path.relative_to(ROOT)
    for pattern in ("*.py", "fradique/**/*.py", "lab/*.py", "bench/*.py", "reference/*.py", "data/*/*.py")
    for path in sorted(ROOT.glob(pattern))
]


def environment(**variables):
    paths = os.pathsep.join(map(str, (HERE, ROOT)))
    return {**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"} | variables


def run_commands(folder, *commands, **variables):
    """Run commands in one process of a simulated Windows. Returns their exit statuses, and all output."""
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-W", "error", HERE / "run_commands.py", "commands.json", "statuses.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=environment(**variables),
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stdout
    return json.loads((folder / "statuses.json").read_text(encoding="utf-8")), result.stdout


def run_code(folder, code):
    statuses, output = run_commands(folder, ["-c", code])
    assert statuses == [0], output.decode()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a corpus `data/livro`, a finished run `run`, and the output of all commands."""
    folder = tmp_path_factory.mktemp("windows")
    (folder / "book.txt").write_text(BOOK, encoding="utf-8")
    prepare = [str(ROOT / "data/custom/prepare.py"), "--input", "book.txt", "--out_dir"]
    train = [str(ROOT / "train.py"), "--data_dir=data", "--dataset=livro", "--device=cpu", "--compile=False"]
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2"]
    shape += ["--gradient_accumulation_steps=1"]
    steps = [
        "--max_iters=4",
        "--eval_interval=2",
        "--eval_iters=1",
        "--warmup_iters=1",
        "--snapshot_interval=2",
    ]
    sample = ["--sample_start=É “", "--sample_tokens=20"]
    start = "--start=É 日本"
    commands = [
        [*prepare, "data/livro"],
        [*prepare, "data/livro", "--tokenizer", "bpe:300"],
        [*prepare, "data/shards", "--tokenizer", "bpe:300", "--shards", "2"],
        [*prepare, "data/livro"],
        [*train, *shape, *steps, *sample, "--out_dir=run"],
        [*train, *shape, *steps, *sample, "--out_dir=run", "--overwrite"],
        [*train, "--out_dir=run", "--init_from=resume", "--max_iters=6", "--eval_iters=2"],
        [*train, *shape, *steps, "--out_dir=tuned", "--init_from=run"],
        [str(ROOT / "sample.py"), "--out_dir=run", start, "--max_new_tokens=20"],
        ["fradique.pretrained", "export", "--out_dir=run", "--to=exported"],
        *([f"lab.{name}", "--out_dir=run"] for name in ("report", "anatomy", "curves")),
        ["lab.movie", "--out_dir=run", "--seconds=1", "--fps=2"],
        ["lab.attention", "--out_dir=run", start],
    ]
    statuses, output = run_commands(folder, *commands)
    assert statuses == [0] * len(commands), output.decode()
    return folder, output.decode("utf-8")


def test_the_simulation_lacks_what_windows_lacks(tmp_path):
    code = f"""
import io, os, pathlib
for statement in ("import fcntl", "import resource", "from os import fork", "from signal import SIGHUP"):
    try:
        exec(statement, {IN_PRODUCT})
    except ImportError:
        continue
    raise AssertionError(statement)
import fcntl  # what a library imports is there
path = pathlib.Path("open.txt")
actions = (path.unlink, lambda: path.rename("new"), lambda: pathlib.Path("x").replace(path), path.resolve)
pathlib.Path("x").write_text("é")
assert pathlib.Path("x").read_bytes() == b"\\xe9"
refused = []
with path.open("w"):
    for action in actions:
        try:
            action()
        except PermissionError:
            refused.append(action)
assert refused == list(actions[:3])
path.unlink()
for name in ("a:b", "nul.txt", "end."):
    try:
        open(name, "w")
    except OSError:
        continue
    raise AssertionError(name)
"""
    run_code(tmp_path, code)


def test_every_module_can_be_imported(tmp_path):
    modules = []
    for path in FILES:
        is_module = path.parts[0] not in ("data", "reference")
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        modules.append(name if is_module else str(ROOT / path))
    statuses, output = run_commands(tmp_path, *(["import", module] for module in modules))
    failed = [module for module, status in zip(modules, statuses, strict=True) if status]
    assert not failed, output.decode()


def test_text_becomes_a_model_text_and_pictures(finished):
    folder, output = finished
    assert "resuming at step 4" in output and "6 steps" in output
    assert "É 日本" in output  # redirected output is UTF-8
    written = {path.name for path in (folder / "run").iterdir()}
    pictures = {"report.html", "anatomy.svg", "loss.png", "movie.gif", "attention.html"}
    assert pictures <= written and (folder / "exported/model.safetensors").exists()


def test_no_file_is_left_because_it_could_not_be_deleted(finished):
    folder, _ = finished
    names = {path.name for path in folder.rglob("*")}
    assert not [
        name for name in names if name.endswith((".tmp", ".old")) or name.startswith((".prepare", "files-of"))
    ]
    steps = {path.name for path in (folder / "run").iterdir() if path.name.startswith("step-")}
    assert steps == {"step-00000004", "step-00000006"}


def test_a_console_shows_question_marks_and_a_note(finished):
    folder, _ = finished
    command = [str(ROOT / "sample.py"), "--out_dir=run", "--start=É 日", "--max_new_tokens=5"]
    statuses, output = run_commands(folder, command, SIMULATED_CONSOLE="1")
    assert statuses == [0] and "É ?".encode("cp1252") in output and b"chcp 65001" in output


@pytest.mark.parametrize("program", ["train.py", "sample.py", "data/custom/prepare.py"])
def test_help_into_a_closed_pipe_has_the_status_of_sigpipe(program):
    command = [sys.executable, ROOT / program, "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, env=environment(), timeout=TIMEOUT
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (terminal.SIGPIPE_STATUS, b"")


def test_a_run_folder_is_locked(tmp_path):
    code = """
import pathlib
from fradique.io.folder_lock import FolderLock, lock_holder
folder = pathlib.Path("run")
folder.mkdir()
lock = FolderLock(folder)
assert "process" in lock_holder(folder) and lock.current_path() == folder
try:
    FolderLock(folder)
except ValueError as error:
    assert "is in use" in str(error)
else:
    raise AssertionError("locked twice")
lock.release()
assert lock_holder(folder) is None
FolderLock(folder).release()
"""
    run_code(tmp_path, code)


def test_ctrl_break_ends_a_run_as_sigterm_does(tmp_path):
    code = """
import signal, torch
from fradique.runtime.device import Runtime
from fradique.runtime.signals import StopSignal
stop = StopSignal()
signal.raise_signal(signal.SIGUSR1)  # the simulated SIGBREAK
assert stop.requested(Runtime(torch.device("cpu"), torch.float32, False))
stop.restore()
"""
    run_code(tmp_path, code)


@pytest.fixture
def on_windows(monkeypatch):
    monkeypatch.setattr(terminal, "os", SimpleNamespace(name="nt"))


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("C:\\runs\\a", "C:\\runs\\a"),
        ("data/meu_livro/", "data/meu_livro/"),
        ("my book.txt", '"my book.txt"'),
        ("--start=Era uma", '--start="Era uma"'),
        ("C:\\my runs\\", '"C:\\my runs\\\\"'),  # Windows' rules: a backslash before " is doubled
        ('say "é"', '"say \\"é\\""'),
        ("a&b", '"a&b"'),
        ("", '""'),
    ],
)
def test_a_word_is_quoted_as_windows_reads_it(on_windows, word, quoted):
    assert terminal.quote(word) == quoted
    if not word.startswith("--"):
        assert subprocess.list2cmdline([word]) in (quoted, word)  # which knows no & but all else


def test_advice_names_no_program_that_windows_lacks(on_windows, monkeypatch, tmp_path):
    monkeypatch.setattr(text, "os", SimpleNamespace(name="nt"), raising=False)
    data = "São Paulo".encode("latin-1")
    for error in (
        text.not_utf8_error(tmp_path / "a.txt", 1, data, 1),
        text.nul_error(tmp_path / "a.txt", 1, b"a\0 plain text", 1),
    ):
        assert "iconv" not in str(error) and "tr -d" not in str(error) and "UTF-8" in str(error)


def test_a_folder_as_config_file_gets_the_same_message(tmp_path):
    statuses, output = run_commands(tmp_path, [str(ROOT / "train.py"), "."])
    assert statuses == [2] and b"a folder, not a config file" in output


@pytest.mark.parametrize(("compiler", "found"), [("g++", False), ("cl", True)])
def test_a_model_is_compiled_with_visual_c(monkeypatch, compiler, found):
    """inductor looks for no other compiler on Windows."""
    monkeypatch.setattr(compile_choice, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(compile_choice.shutil, "which", lambda name: name if name == compiler else None)
    assert compile_choice.has_compiler() == found
