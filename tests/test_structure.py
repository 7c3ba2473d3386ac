"""Limits on the length of files and functions."""

import ast

import pytest
from support import ROOT

MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60
FILES = [p for pattern in ("*.py", "fradique/**/*.py", "lab/*.py", "bench/*.py") for p in ROOT.glob(pattern)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
