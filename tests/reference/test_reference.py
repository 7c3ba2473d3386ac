"""The documentation of reference/: quoted code, formulas, file names and the make target."""

import re
import shutil
import subprocess

import pytest
from support import ROOT

FOLDER = ROOT / "reference"
SOURCES = [*sorted(FOLDER.glob("*.py")), FOLDER / "gpt2.c"]


def test_code_quoted_in_the_notes_is_in_the_sources():
    lines = {line.strip() for source in SOURCES for line in source.read_text(encoding="utf-8").splitlines()}
    quoted = re.findall(r"```(?:python|c)\n(.*?)```", (FOLDER / "NOTES.md").read_text(encoding="utf-8"), re.S)
    assert len(quoted) >= 10
    for block in quoted:
        for line in block.splitlines():
            assert line.strip() in lines, line


def test_formulas_of_the_notes_render_on_github():
    """Formulas must be in ```math or in $`…`$: elsewhere Markdown removes backslashes and underscores."""
    text = (FOLDER / "NOTES.md").read_text(encoding="utf-8")
    assert text.count("```math") >= 15
    without_code = re.sub(r"\$`[^`]+`\$|```.*?```|`[^`]*`", "", text, flags=re.S)
    assert "$" not in without_code and "\\" not in without_code


def test_files_named_in_the_notes_exist():
    for page in ("NOTES.md", "README.md"):
        text = (FOLDER / page).read_text(encoding="utf-8")
        for name in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (FOLDER / name).exists(), name
        for name in re.findall(r"`(tests/[\w/]+\.py|reference/\w+\.\w+)`", text):
            assert (ROOT / name).exists(), name


@pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("cc") is None, reason="make or a C compiler is missing"
)
def test_make_reference_builds_the_c_program(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(FOLDER, tmp_path / "reference", ignore=shutil.ignore_patterns("build", "__pycache__"))
    make = subprocess.run(
        ["make", "reference", "CFLAGS=-O0"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert make.returncode == 0, make.stderr
    program = subprocess.run([tmp_path / "reference/build/gpt2"], capture_output=True, text=True, check=False)
    assert program.returncode == 2 and "usage: gpt2" in program.stderr
