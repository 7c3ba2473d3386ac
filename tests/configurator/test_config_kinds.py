"""Config files that set nothing, files of other kinds, and the settings.json of a run as a config file."""

import json
import re

import pytest
from example_settings import Settings, get, problem, write

from configurator import resolve


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer: 2\n", r"line 1: 'n_layer: 2' sets nothing: write n_layer = 2"),
        ("seed = 3\nn_layers: 2\n", r"line 2: 'n_layers: 2' sets nothing: write n_layers = 2"),
        ("n_layer == 2\n", r"line 1: 'n_layer == 2' sets nothing: write n_layer = 2"),
        ("n_layer, 2\n", r"sets nothing: write n_layer = 2"),
        ("n_layer\n", r"line 1: 'n_layer' sets nothing: write n_layer = \.\.\."),
        ("if seed:\n    n_layer: 2\nelse:\n    n_head: 3\n", r"line 2: .*(\n|.)*line 4: 'n_head: 3'"),
        ("for _i in range(2):\n    n_layer == _i\n", "line 2: 'n_layer == _i' sets nothing"),
        ("try:\n    n_layer: 2\nfinally:\n    pass\n", "line 2: 'n_layer: 2' sets nothing"),
        ("with open('x.py'):\n    n_layer: 2\n", "line 2: 'n_layer: 2' sets nothing"),
        (
            "class Config:\n    n_layer = 2\n",
            r"line 1: 'class Config:' sets nothing: write n_layer = \.\.\. outside",
        ),
    ],
)
def test_statements_that_set_nothing_are_reported(text, message):
    assert re.search(message, problem(write("x.py", text)))


def test_helpers_and_annotated_settings_are_no_problem():
    text = '"""A docstring."""\nn_layer: int = 2\n_width: int\nprint\n'
    text += "def _f():\n    n_layer == 2\nclass _C:\n    x = 1\n"
    assert get(write("x.py", text)).n_layer == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.yaml", "n_layer: 2\n", r"x\.yaml: YAML, but a config file is Python: write n_layer = 12"),
        ("x.YML", "n_layer: 2\n", r"YAML, but a config file is Python"),
        ("x.toml", "n_layer = 2\n", r"TOML, but a config file is Python"),
        ("x.json", '{"n_layer": 2}', r"x\.json: JSON that is not the settings\.json of a run"),
        ("x.json", "[" * 100_000, r"JSON that is not the settings\.json of a run"),
        ("x.json", '{"settings": [2]}', r"JSON that is not the settings\.json of a run"),
    ],
)
def test_files_of_other_kinds_are_named(name, text, message):
    assert re.search(message, problem(write(name, text)))


def test_the_settings_of_a_run_are_a_config_file():
    saved = {"n_layer": 3, "seed": 7, "debug": True, "overwrite": True, "unknown": 1}
    path = write("settings.json", json.dumps({"run": "id", "settings": saved}))
    resolved = resolve(Settings, [path, "--seed=8"])
    assert (resolved.settings.n_layer, resolved.settings.seed) == (3, 8)
    assert resolved.sources["n_layer"] == path and getattr(resolved.settings, "debug", False) is False


def test_invalid_values_in_settings_json_are_reported():
    path = write("settings.json", json.dumps({"settings": {"n_layer": "two"}}))
    assert "settings.json, n_layer = 'two': must be a whole number" in problem(path)
