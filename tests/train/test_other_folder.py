"""Training in another folder than that of train.py: the corpus is found beside train.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import run_training

from fradique.io import files


@pytest.fixture
def elsewhere(settings, tmp_path, monkeypatch):
    """An empty current folder; the folder `data` of the settings is beside train.py."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(files, "PROJECT_FOLDER", Path(settings.data_dir).parent)
    return replace(settings, data_dir=Path(settings.data_dir).name, out_dir="out/run", max_iters=2)


def test_a_corpus_is_found_beside_train_py(settings, elsewhere, tmp_path, capsys):
    status, t = run_training(elsewhere)
    assert (status, t.corpus.folder) == (0, Path(settings.data_dir) / "tiny")
    assert f"run folder: {tmp_path / 'elsewhere' / 'out' / 'run'}" in capsys.readouterr().out
    saved = json.loads(Path("out/run/settings.json").read_text())["settings"]
    assert (saved["data_dir"], saved["out_dir"]) == (elsewhere.data_dir, "out/run")
    assert run_training(replace(elsewhere, init_from="resume", max_iters=4))[0] == 0


def test_a_corpus_in_the_current_folder_comes_first(settings, elsewhere):
    Path(elsewhere.data_dir).symlink_to(settings.data_dir)
    _, t = run_training(elsewhere)
    assert t.corpus.folder == Path(elsewhere.data_dir, "tiny")


def test_a_missing_corpus_names_the_absolute_paths(settings, elsewhere, tmp_path):
    with pytest.raises(ValueError, match="there is no corpus in") as caught:
        run_training(replace(elsewhere, dataset="nowhere"))
    beside = Path(settings.data_dir) / "nowhere"
    here = tmp_path / "elsewhere" / elsewhere.data_dir / "nowhere"
    assert f"(looked for {here} and {beside}); prepared: tiny" in str(caught.value)
