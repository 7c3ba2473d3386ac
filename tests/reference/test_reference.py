"""What reference/ says of itself: it stands alone, and its notes quote the code as it is."""

import re
import shutil
import subprocess

import pytest
from support import ROOT

FOLDER = ROOT / "reference"
SOURCES = [*sorted(FOLDER.glob("*.py")), FOLDER / "gpt2.c"]


def test_every_line_that_the_notes_quote_stands_in_the_code():
    lines = {line.strip() for source in SOURCES for line in source.read_text(encoding="utf-8").splitlines()}
    quoted = re.findall(r"```(?:python|c)\n(.*?)```", (FOLDER / "NOTES.md").read_text(encoding="utf-8"), re.S)
    assert len(quoted) >= 10
    for block in quoted:
        for line in block.splitlines():
            assert line.strip() in lines, line


def test_the_mathematics_of_the_notes_is_written_so_that_github_renders_it():
    """In ```math and in $`…`$: elsewhere Markdown takes backslashes and underscores away."""
    text = (FOLDER / "NOTES.md").read_text(encoding="utf-8")
    assert text.count("```math") >= 15
    bare = re.sub(r"\$`[^`]+`\$|```.*?```|`[^`]*`", "", text, flags=re.S)
    assert "$" not in bare and "\\" not in bare


def test_the_files_that_the_notes_name_are_there():
    for page in ("NOTES.md", "README.md"):
        text = (FOLDER / page).read_text(encoding="utf-8")
        for name in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (FOLDER / name).exists(), name
        for name in re.findall(r"`(tests/[\w/]+\.py|reference/\w+\.\w+)`", text):
            assert (ROOT / name).exists(), name


@pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("cc") is None, reason="no make or C compiler here"
)
def test_make_reference_builds_the_c_program(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(FOLDER, tmp_path / "reference", ignore=shutil.ignore_patterns("build", "__pycache__"))
    result = subprocess.run(
        ["make", "reference", "CFLAGS=-O0"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    told = subprocess.run([tmp_path / "reference/build/gpt2"], capture_output=True, text=True, check=False)
    assert told.returncode == 2 and "usage: gpt2" in told.stderr
