"""Property tests: valid values round-trip, and any other input raises ValueError."""

from pathlib import Path

import pytest
from example_settings import Settings, get
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configurator import Resolved, format_settings, resolve

deterministic = hypothesis_settings(derandomize=True, deadline=None, max_examples=200, database=None)


@deterministic
@given(st.integers())
def test_any_int_round_trips(value):
    assert get(f"--seed={value}").seed == value
    assert get("--seed", str(value)).seed == value


@deterministic
@given(st.floats(min_value=0, max_value=1))
def test_any_float_round_trips(value):
    assert get(f"--dropout={value}").dropout == value


@deterministic
@given(st.booleans())
def test_any_bool_round_trips(value):
    assert get(f"--overwrite={value}").overwrite is value


@deterministic
@given(st.text())
def test_any_text_round_trips(value):
    assert get(f"--start={value}").start == value


@deterministic
@given(st.text(), st.floats(min_value=0, max_value=1), st.none() | st.integers(min_value=-1), st.booleans())
def test_printed_settings_are_a_config_file(start, dropout, top_k, bias):
    settings = Settings(start=start, dropout=dropout, top_k=top_k, bias=bias)
    text = format_settings(Resolved(settings, dict.fromkeys(vars(settings), "somewhere")))
    Path("again.py").write_text(text, encoding="utf-8")
    assert get("again.py") == settings


arguments = st.text(max_size=12) | st.sampled_from(
    [
        "--",
        "-",
        "--n_layer",
        "--n_layer=",
        "--start",
        "--top_k",
        "-1",
        "--compile",
        "auto",
        "x.py",
        "=",
        "--=",
    ]
)


@deterministic
@given(st.lists(arguments, max_size=6))
def test_any_command_line_resolves_or_raises_value_error(argv):
    try:
        assert isinstance(resolve(Settings, argv).settings, Settings)
    except ValueError as error:
        assert str(error)


@deterministic
@given(st.text(alphabet="n_layer = 4\n'\\#[]:+*", max_size=40))
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_config_file_resolves_or_raises_value_error(text):
    Path("any.py").write_text(text, encoding="utf-8")
    try:
        resolve(Settings, ["any.py"])
    except ValueError as error:
        assert str(error)
