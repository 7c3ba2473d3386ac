"""The precedence of the sources of a setting: defaults, a resumed run, config files, flags."""

import subprocess
import sys

from example_settings import ROOT, Settings, get, problem, write

from configurator import resolve


def test_without_arguments_every_setting_is_its_default():
    resolved = resolve(Settings, [])
    assert resolved.settings == Settings()
    assert set(resolved.sources.values()) == {"default"}
    assert resolved.explicit == frozenset()


def test_later_files_override_earlier_and_flags_override_files():
    first = write("config/one.py", "n_layer = 1\nn_head = 1\nseed = 1\n")
    second = write("config/two.py", "n_head = 2\nseed = 2\n")
    resolved = resolve(Settings, ["--seed=3", first, second])
    assert (resolved.settings.n_layer, resolved.settings.n_head, resolved.settings.seed) == (1, 2, 3)
    assert resolved.sources["n_layer"] == "config/one.py"
    assert resolved.sources["n_head"] == "config/two.py"
    assert resolved.sources["seed"] == "--seed"
    assert resolved.sources["dropout"] == "default"
    assert resolved.explicit == {"n_layer", "n_head", "seed"}


def test_settings_of_a_resumed_run_override_only_defaults():
    base = {"n_layer": 2, "n_head": 2, "seed": 2, "a_key_of_an_older_version": [1]}
    first = write("one.py", "n_head = 4\nn_embd = n_layer * 8\n")
    resolved = resolve(Settings, [first, "--seed=6"], base=base, base_name="out/settings.json")
    assert (resolved.settings.n_layer, resolved.settings.n_head, resolved.settings.seed) == (2, 4, 6)
    assert resolved.settings.n_embd == 16
    assert resolved.sources["n_layer"] == "out/settings.json"
    assert resolved.explicit == {"n_head", "n_embd", "seed"}


def test_settings_of_a_resumed_run_are_checked_after_flags():
    message = problem(base={"n_layer": "four", "n_head": 4.0}, base_name="out/settings.json")
    assert message == "out/settings.json, n_layer = 'four': must be a whole number, at least 1"
    assert resolve(Settings, ["--n_layer=4"], base={"n_layer": "four"}).settings.n_layer == 4


def test_the_last_of_two_equal_flags_is_used():
    assert get("--seed=1", "--seed=2").seed == 2
    assert get("--n_layer=four", "--n_layer=4").n_layer == 4


def test_resolve_and_import_print_nothing(capfd):
    resolve(Settings, [write("x.py", "n_layer = 2\n"), "--seed=1"])
    problem("--nothing")
    subprocess.run([sys.executable, "-c", "import configurator"], cwd=ROOT, check=True)
    assert capfd.readouterr() == ("", "")
