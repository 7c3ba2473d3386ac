"""Several problems in one message, contradictions, and mistakes in a settings class."""

from dataclasses import field, make_dataclass
from pathlib import Path

import pytest
from example_settings import ROOT, problem, write

from configurator import resolve, setting


def test_all_problems_are_reported_at_once():
    path = write("config/x.py", "n_layers = 4\nbias = 'no'\n")
    assert problem(path, "--dropout=1.5", "--n_haed", "4", "missing.py", "--device=gpu").splitlines() == [
        "6 problems with the settings:",
        "  - config/x.py line 1: unknown setting 'n_layers' (did you mean 'n_layer'?)",
        f"  - missing.py: no such config file; looked for {Path.cwd()}/missing.py and {ROOT}/missing.py",
        "  - --n_haed=4: unknown setting 'n_haed' (did you mean 'n_head'?)",
        "  - config/x.py line 2, bias = 'no': must be True or False",
        "  - --dropout=1.5: must be between 0.0 and 1.0",
        "  - --device=gpu: must be one of 'auto', 'cpu', 'cuda', 'mps' (did you mean 'cpu'?)",
    ]


def test_only_the_first_twenty_problems_are_listed():
    flags = [f"--no_such_setting_{i}={'x' * 300}" for i in range(500)]
    lines = problem(*flags).splitlines()
    assert lines[0] == "500 problems with the settings:" and lines[-1] == "and 480 more"
    assert len(lines) == 22 and "no_such_setting_19" in lines[-2]


def test_contradictions_are_checked_if_all_values_are_valid():
    contradiction = "n_embd=100 is not divisible by n_head=12"
    assert problem("--n_embd=100") == contradiction
    assert problem("--n_embd=100", "--n_haed=1").splitlines()[0] == "2 problems with the settings:"
    assert contradiction in problem("--n_embd=100", "--n_haed=1")
    assert contradiction not in problem("--n_embd=100", "--dropout=2")
    assert contradiction not in problem("--n_embd=100", "missing.py")


def test_types_and_defaults_of_the_class_are_checked():
    unsupported = make_dataclass("Strange", [("sizes", list, field(default=None))])
    with pytest.raises(AssertionError, match=r"Strange\.sizes"):
        resolve(unsupported, [])
    with pytest.raises(ValueError, match="at least 1"):
        resolve(make_dataclass("Wrong", [("n_layer", int, setting(0, "blocks", lo=1))]), [])


def test_plain_dataclass_fields_are_settings():
    plain = make_dataclass("Plain", [("n", int, 3), ("ratio", float, 1)], frozen=True)
    resolved = resolve(plain, ["--n=4"])
    assert (resolved.settings.n, repr(resolved.settings.ratio)) == (4, "1.0")
