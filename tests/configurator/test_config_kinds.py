"""Config files that set nothing, files of other kinds, and the settings.json of a run as a config file."""

import json
import re
from dataclasses import dataclass

import pytest
from example_settings import Settings, get, problem, write

from configurator import resolve, setting


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer: 2\n", r"line 1: 'n_layer: 2' sets nothing: write n_layer = 2"),
        ("n_layer: int\n", r"line 1: 'n_layer: int' sets nothing: write n_layer = <value>"),
        ("seed: int | None\n", r"sets nothing: write seed = <value>"),
        ("n_embd: 64 * n_head\n", r"sets nothing: write n_embd = 64 \* n_head"),
        ("if 0:\n    bias: true\n", r"line 2: 'bias: true' sets nothing: write bias = True"),
        (
            "seed = 3\nn_layers: 2\n",
            r"line 2: .*: 'n_layers' is an unknown setting \(did you mean n_layer\?\)",
        ),
        ("qqqq: 2\n", r"'qqqq' is an unknown setting \(--help=all shows all settings\)"),
        ("n_layer == 2\n", r"line 1: 'n_layer == 2' sets nothing: write n_layer = 2"),
        ("n_layer, 2\n", r"sets nothing: write n_layer = 2"),
        ("n_layer\n", r"line 1: 'n_layer' sets nothing: write n_layer = <value>"),
        ("if seed:\n    n_layer: 2\nelse:\n    n_head: 3\n", r"line 2: .*(\n|.)*line 4: 'n_head: 3'"),
        ("for _i in range(2):\n    n_layer == _i\n", "line 2: 'n_layer == _i' sets nothing"),
        ("try:\n    n_layer: 2\nfinally:\n    pass\n", "line 2: 'n_layer: 2' sets nothing"),
        ("with open('x.py'):\n    n_layer: 2\n", "line 2: 'n_layer: 2' sets nothing"),
        (
            "class Config:\n    n_layer = 2\n",
            r"line 1: 'class Config:' sets nothing: write n_layer = 2 outside of the class",
        ),
        ('{"n_layer": 2, "seed": 3}\n', r"line 1: .* sets nothing: write n_layer = 2; seed = 3"),
        ('{"model": {"n_layer": 2}}\n', "sets nothing: write n_layer = 2"),
        ("dict(n_layer=2, out='x')\n", "sets nothing: write n_layer = 2$"),
        ("[n_layer, 2]\n", r"'\[n_layer, 2\]' sets nothing: write n_layer = 2"),
        ("('n_layer', 2), ('seed', 3)\n", "sets nothing: write n_layer = 2; seed = 3"),
        ("n_layer - 2\n", "'n_layer - 2' sets nothing: write n_layer = 2"),
        ("n_layer * 2\n", r"sets nothing: write n_layer = n_layer \* 2"),
        ("n_layer == 2 and n_head == 2\n", "sets nothing: write n_layer = 2; n_head = 2"),
        ("not n_layer == 2\n", "sets nothing: write n_layer = 2"),
        ("n_layer == 2 if seed else n_layer == 3\n", "sets nothing: write n_layer = 2; n_layer = 3"),
        ("match seed:\n    case 1337:\n        n_layer == 2\n", "line 3: 'n_layer == 2' sets nothing"),
    ],
)
def test_statements_that_set_nothing_are_reported(text, message):
    assert re.search(message, problem(write("x.py", text)))


MAIN = "seed = 3\nif __name__ == '__main__':\n    n_layer = 2\nelse:\n    n_head = 3\n"
MAIN_CALL = "def main():\n    global n_layer\n    n_layer = 2\nif '__main__' == __name__:\n    main()\n"
LOCAL = "def _small():\n    n_layer = 2\n    n_head = 3\n    return n_head\n_small()\n"


@pytest.mark.parametrize(("text", "line"), [(MAIN, 2), (MAIN_CALL, 4)])
def test_a_main_block_that_would_set_something_is_reported(text, line):
    message = "sets nothing: its block does not run in a config file. Write n_layer = 2 outside of it"
    assert re.search(f"^x.py line {line}: .*{message}$", problem(write("x.py", text)))


def test_a_main_block_without_settings_is_no_problem():
    text = "n_layer = 2\nif __name__ == '__main__':\n    print(n_layer)\n"
    assert get(write("x.py", text + "if __name__ != '__main__':\n    n_head = 3\n")).n_head == 3


def test_a_local_variable_named_like_a_setting_is_reported():
    message = "x.py line 2: 'n_layer = 2' sets nothing: it is a local variable. Write global n_layer in the "
    assert problem(write("x.py", LOCAL)) == message + "function _small, before it"
    both = "def f():\n    n_layer, n_head = 2, 3\nif seed:\n    f()\n"
    assert "Write global n_layer, n_head in the function f" in problem(write("x.py", both))


@pytest.mark.parametrize(
    "text",
    [
        LOCAL.replace("n_layer = 2", "global n_layer; n_layer = 2"),
        LOCAL.replace("n_layer = 2", "n_layer = 2; globals().update(locals())"),
        LOCAL.replace("n_layer = 2\n", "n_layer, n_head = 2, 3\n"),
        LOCAL.replace("_small():\n", "_small(n_layer=0):\n", 1),
        LOCAL.removesuffix("_small()\n"),
        "class _Small:\n    n_layer = 2\n    def f(self):\n        seed = 3\nn_head = _Small.n_layer\n",
        "n_layer > 2 or print('a small model')\nprint(n_layer) if n_layer else None\n",
        "assert n_layer == 12\nprint(dict(n_layer=2))\n(n_layer := 3)\n[print(n_layer)]\n'n_layer = 2'\n",
    ],
)
def test_statements_that_have_an_effect_are_no_problem(text):
    get(write("x.py", text))


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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_utf16_file_is_named_with_what_to_do(folder, encoding):
    (folder / "x.py").write_bytes("n_layer = 2\n".encode(encoding))
    assert re.search(r"^x\.py: not UTF-8 text but UTF-16 or binary: save it as UTF-8", problem("x.py"))


def test_a_utf8_file_may_begin_with_a_byte_order_mark(folder):
    (folder / "x.py").write_bytes("n_layer = 2\n".encode("utf-8-sig"))
    assert get("x.py").n_layer == 2


@dataclass(frozen=True)
class LoadSettings:
    """python toy.py: a command that loads a run"""

    out_dir: str = setting("out", "folder of the run")
    init_from: str = setting("resume", "resume, or a path")
    seed: int = setting(1, "random seed")


@dataclass(frozen=True)
class TrainSettings(LoadSettings):
    """python toy.py: a command that trains"""

    init_from: str = setting("scratch", "scratch, resume, or a path")


@pytest.mark.parametrize("saved", ["scratch", "gpt2"])
def test_a_command_that_loads_a_run_ignores_its_init_from(saved):
    settings = {"out_dir": "out/a", "init_from": saved, "seed": 7}
    path = write("run/settings.json", json.dumps({"settings": settings}))
    assert resolve(LoadSettings, [path]).settings == LoadSettings("out/a", "resume", 7)
    assert resolve(LoadSettings, [path]).explicit == {"out_dir", "seed"}
    assert resolve(LoadSettings, [path, "--init_from=b"]).settings.init_from == "b"
    assert resolve(TrainSettings, [path]).settings == TrainSettings("out/a", saved, 7)
