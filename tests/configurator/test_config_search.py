"""Where config files are looked for: in the current folder, then beside train.py."""

import os
import shutil
from pathlib import Path

import pytest
from example_settings import ROOT, problem, write
from support import run_script

from configurator import resolve
from train import TrainSettings

ECA = "config/train_eca_char.py"


@pytest.mark.parametrize("name", [ECA, "config/arch/llama.py", "./config/train_eca_char.py"])
def test_a_config_is_found_beside_train_py_from_any_folder(name):
    resolved, expected = resolve(TrainSettings, [name]), resolve(TrainSettings, [str(ROOT / name)])
    assert resolved == expected
    assert str(ROOT / name) in resolved.sources.values()


def test_several_configs_are_found_one_by_one(folder):
    write("mine.py", "n_layer = 3\n")
    resolved = resolve(TrainSettings, [ECA, "config/arch/llama.py", "mine.py"])
    assert resolved.settings.n_layer == 3 and resolved.settings.position == "rope"
    sources = {"default", str(ROOT / ECA), "mine.py", str(ROOT / "config/arch/llama.py")}
    assert set(resolved.sources.values()) == sources


def test_the_current_folder_is_looked_in_first():
    write(ECA, "n_layer = 77\n")
    resolved = resolve(TrainSettings, [ECA])
    assert (resolved.settings.n_layer, resolved.sources["n_layer"]) == (77, ECA)


def test_a_missing_config_names_the_absolute_paths(folder):
    name = "config/train_eca_chr.py"
    looked = f"looked for {folder / name} and {ROOT / name}"
    assert problem(name) == f"{name}: no such config file (did you mean {ECA}?); {looked}"


def test_beside_train_py_only_one_path_is_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    name = "config/quite_different.py"
    assert problem(name) == f"{name}: no such config file; looked for {ROOT / name}"


def test_an_absolute_path_is_named_once(folder):
    name = str(folder / "zzz.py")
    assert problem(name) == f"{name}: no such config file"


def test_a_suggestion_can_be_typed_as_it_is():
    for name in ("train_eca_chr.py", "config/train_eca_chr.py"):
        assert f"(did you mean {ECA}?)" in problem(name)
    write("mine/train_machado.py", "")
    assert "(did you mean mine/train_machado.py?)" in problem("mine/train_machad.py")
    assert f"(did you mean {ROOT}/config/arch/llama.py?)" in problem(f"{ROOT}/config/arch/lama.py")


def test_a_misspelt_flag_names_no_folders():
    assert problem("n_layer=4") == "n_layer=4: no such config file (did you mean --n_layer=4?)"


@pytest.mark.skipif(os.name == "nt", reason="Windows does not delete a folder that a process is in")
def test_a_deleted_current_folder_is_no_obstacle(folder, monkeypatch):
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    shutil.rmtree(folder / "gone")
    assert resolve(TrainSettings, [ECA]).settings.dataset == "eca_char"
    assert problem("zzz.py") == f"zzz.py: no such config file; looked for {ROOT / 'zzz.py'}"
    monkeypatch.chdir(folder)


def test_a_folder_is_not_replaced_by_a_file_beside_train_py():
    Path("train.py").mkdir()
    assert problem("train.py").startswith("train.py: a folder, not a config file")


def test_train_py_runs_in_another_folder(folder):
    result = run_script("train.py", ECA, "--print_settings", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert f"# {ROOT / ECA}" in result.stdout
    result = run_script("train.py", "config/zzz.py", cwd=folder)
    assert result.returncode == 2
    assert f"looked for {folder}/config/zzz.py and {ROOT}/config/zzz.py" in result.stderr
