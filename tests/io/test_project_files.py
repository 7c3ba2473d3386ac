"""`find_beside_project`: the current folder first, then the folder of train.py."""

from pathlib import Path

import pytest
from support import ROOT

from fradique.io import files
from fradique.io.files import PROJECT_FOLDER, describe_search, find_beside_project


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project folder with a corpus, and another folder, which is the current one."""
    (tmp_path / "project" / "data" / "eca").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(files, "PROJECT_FOLDER", tmp_path / "project")
    return tmp_path / "project"


def test_the_project_folder_is_that_of_train_py():
    assert (PROJECT_FOLDER, (PROJECT_FOLDER / "train.py").exists()) == (ROOT, True)


def test_what_is_not_here_is_found_beside_train_py(project):
    assert find_beside_project(Path("data/eca")) == project / "data" / "eca"
    Path("data").mkdir()  # of another project, without this corpus
    assert find_beside_project(Path("data/eca")) == project / "data" / "eca"


def test_the_current_folder_comes_first():
    Path("data/eca").mkdir(parents=True)
    assert find_beside_project(Path("data/eca")) == Path("data/eca")


def test_what_is_nowhere_is_returned_unchanged(project):
    paths = (Path("data/machado"), project / "data" / "machado", Path("x" * 5000), Path("a\0b"), Path())
    for path in paths:
        assert find_beside_project(path) == path


def test_the_searched_paths_are_absolute_and_named_once(project, tmp_path, monkeypatch):
    path = Path("data/machado")
    assert describe_search(path) == f"{tmp_path / 'here' / path} and {project / path}"
    assert describe_search(project / path) == str(project / path)
    monkeypatch.chdir(project)
    assert describe_search(path) == str(project / path)
