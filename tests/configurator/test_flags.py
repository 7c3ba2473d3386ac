"""Flags on the command line: how values are written, and which are rejected."""

import pytest
from example_settings import get, problem, write


def test_a_value_may_follow_after_a_space():
    settings = get("--n_layer", "4", "--top_k", "-1", "--start", "-", "--out_dir", "a b", "--dropout", ".5")
    assert (settings.n_layer, settings.top_k, settings.start) == (4, -1, "-")
    assert (settings.out_dir, settings.dropout) == ("a b", 0.5)


def test_dashes_in_a_key_mean_underscores():
    assert get("--n-layer=4", "--out-dir", "a-b").n_layer == 4
    assert get("--out-dir", "a-b").out_dir == "a-b"


def test_text_values_are_not_changed():
    for text in ("a=b", "'quoted'", '"', "\\n", "", " x ", "None", "true", "1e5", "--", "é\n"):
        assert get(f"--start={text}").start == text


def test_a_bare_flag_is_true_and_takes_no_config_file():
    path = write("x.py", "n_layer = 4\n")
    settings = get("--overwrite", path)
    assert settings.overwrite is True and settings.n_layer == 4
    settings = get("--compile", path, "--wandb_log")
    assert settings.compile is True and settings.wandb_log is True and settings.n_layer == 4


@pytest.mark.parametrize("text", ["True", "true", "1", "yes", "YES"])
def test_true_has_many_spellings(text):
    assert get(f"--overwrite={text}").overwrite is True
    assert get("--overwrite", text).overwrite is True
    assert get(f"--compile={text}").compile is True


@pytest.mark.parametrize("text", ["False", "false", "0", "no"])
def test_false_has_many_spellings(text):
    assert get("--overwrite=True", f"--overwrite={text}").overwrite is False
    assert get("--overwrite", "--overwrite", text).overwrite is False
    assert get("--compile", text).compile is False


def test_a_bool_or_text_setting_accepts_both():
    assert get("--compile", "auto", "--seed=1").compile == "auto"
    assert problem("--compile", "fasle") == (
        "--compile=fasle: must be one of 'auto', True, False (did you mean False?)"
    )


def test_whole_numbers_have_many_spellings():
    for text in ("100000", "1e5", "100_000", "100000.0", "+100000", "1.0e+5"):
        assert get(f"--max_iters={text}").max_iters == 100000
        assert type(get(f"--max_iters={text}").max_iters) is int


def test_a_whole_number_becomes_a_float():
    assert repr(get("--dropout=1").dropout) == "1.0"
    assert repr(get(write("x.py", "dropout = 1\n")).dropout) == "1.0"


def test_none_is_accepted_only_by_optional_settings():
    assert get("--top_k=None").top_k is None and get("--min_p", "none").min_p is None
    assert get(write("x.py", "min_p = None\ntop_k = 40.0\n")).min_p is None
    assert problem("--n_layer=None") == "--n_layer=None: must be a whole number, at least 1"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--n_layer=four", "must be a whole number, at least 1"),
        ("--n_layer=1.5", "must be a whole number, at least 1"),
        ("--n_layer=True", "must be a whole number, at least 1"),
        ("--n_layer=", "must be a whole number, at least 1"),
        ("--n_layer=0", "must be at least 1"),
        ("--n_layer=inf", "must be finite"),
        ("--seed=1e999", "must be finite"),
        ("--dropout=abc", "must be a number, between 0.0 and 1.0"),
        ("--dropout=1.5", "must be between 0.0 and 1.0"),
        ("--dropout=-0.1", "must be between 0.0 and 1.0"),
        ("--dropout=nan", "must be finite"),
        ("--learning_rate=0", "must be above 0"),
        ("--learning_rate=-inf", "must be finite"),
        ("--top_k=-2", "must be at least -1"),
        ("--top_k=x", "must be a whole number or None, at least -1"),
        ("--overwrite=maybe", "must be True or False"),
        ("--device=CPU", "must be one of 'auto', 'cpu', 'cuda', 'mps' (did you mean 'cpu'?)"),
        ("--device=tpu", "must be one of 'auto', 'cpu', 'cuda', 'mps' (did you mean 'cpu'?)"),
        ("--device=qqq", "must be one of 'auto', 'cpu', 'cuda', 'mps'"),
        ("--n_haed=4", "unknown setting 'n_haed' (did you mean 'n_head'?)"),
        ("--print_setting", "unknown setting 'print_setting' (did you mean 'print_settings'?)"),
        ("--zzz=4", "unknown setting 'zzz' (--help=all shows all settings)"),
        ("--", "unknown setting '' (--help=all shows all settings)"),
        ("--n_layer", "needs a value, for example --n_layer=12"),
        ("--out_dir", "needs a value, for example --out_dir='out'"),
    ],
)
def test_an_invalid_flag_is_reported_in_one_line(flag, message):
    assert problem(flag) == f"{flag}: {message}"


def test_a_missing_value_before_a_flag_is_reported():
    assert problem("--n_layer", "--seed=1") == "--n_layer: needs a value, for example --n_layer=12"
