"""Text files have the same bytes on every system: UTF-8, lines that end in \\n; CRLF is read too."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from support import run_lab, run_training
from windows.sitecustomize import windows_open

from fradique.checkpointing import metrics_file
from fradique.data.build import prepare_text
from fradique.data.text import files_text


@pytest.fixture
def windows_text_mode(monkeypatch):
    """Text that is written without `newline` gets CRLF, and the default encoding is cp1252, as on Windows."""
    monkeypatch.setattr(io, "open", windows_open)
    monkeypatch.setattr("builtins.open", windows_open)


def text_files(folder: Path) -> list[Path]:
    suffixes = (".json", ".jsonl", ".txt", ".html", ".svg", "")
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix in suffixes]


def test_a_run_writes_no_carriage_returns(settings, windows_text_mode):
    run_training(replace(settings, max_iters=10, sample_interval=5, wandb_log=False))
    paths = text_files(Path(settings.out_dir))
    assert {"settings.json", "metrics.jsonl", "samples.txt", "model.json"} <= {path.name for path in paths}
    for path in paths:
        assert b"\r" not in path.read_bytes(), path
    assert run_training(replace(settings, init_from="resume", max_iters=12))[0] == 0
    assert [step for step, _ in metrics_file.read_samples(Path(settings.out_dir))] == [5, 10, 12]


def test_a_corpus_and_pages_have_no_carriage_returns(settings, tmp_path, windows_text_mode):
    source = tmp_path / "book.txt"
    source.write_bytes("É o começo.\n".encode() * 200)
    prepare_text(files_text([source], "a book"), tmp_path / "corpus")
    run_training(replace(settings, max_iters=5))
    for name in ("lab.anatomy", "lab.curves", "lab.tokens"):
        result = run_lab(
            name, f"--out_dir={settings.out_dir}", *(["--start=amor"] if "tokens" in name else [])
        )
        assert result.returncode == 0, result.stderr
    for path in [*text_files(tmp_path / "corpus"), *text_files(Path(settings.out_dir))]:
        assert b"\r" not in path.read_bytes().split(b"<script", 1)[0], path


def write_samples(folder: Path, text: str) -> None:
    (folder / "samples.txt").write_bytes(text.encode())
    (folder / "metrics.jsonl").write_bytes(b'{"step": 5}\r\n{"step": 10}\r\n')


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_samples_with_either_line_end_survive_a_resumption(tmp_path, end):
    write_samples(
        tmp_path, end.join(["=== step 5 ===", "amor", "=== step 10 ===", "casa", "=== step 20 ===", ""])
    )
    metrics_file.rewind_metrics(tmp_path, 10)
    assert (tmp_path / "samples.txt").read_bytes() == b"=== step 5 ===\namor\n=== step 10 ===\ncasa\n"
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 5}\n{"step": 10}\n'


def test_samples_with_mixed_line_ends_and_notes_survive(tmp_path):
    """A run of an older version on Windows, continued by this one, with a note of the user at the top."""
    write_samples(
        tmp_path, "my note\n=== step 5 ===\r\na\r\n=== step 10 ===\na generated \r\n\n=== step 12 ===\nz"
    )
    metrics_file.rewind_metrics(tmp_path, 10)
    expected = b"my note\n=== step 5 ===\na\n=== step 10 ===\na generated \r\n\n"
    assert (tmp_path / "samples.txt").read_bytes() == expected
