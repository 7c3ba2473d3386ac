"""Settings: what wins, what is refused and how that is told, and what the command line does with it."""

import os
import subprocess
import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import configurator
from configurator import Resolved, command, format_help, format_settings, resolve, setting

ROOT = Path(configurator.__file__).parent
steady = hypothesis_settings(derandomize=True, deadline=None, max_examples=200, database=None)


@dataclass(frozen=True)
class Settings:
    """python toy.py [config/file.py ...] [--key=value ...]"""

    out_dir: str = setting("out", "folder of the run", group="run")
    wandb_log: bool = setting(False, "log to wandb")
    wandb_run_name: str = setting("toy", "name of the run")
    overwrite: bool = setting(False, "replace a run that is there")
    seed: int = setting(1337, "random seed")
    start: str = setting("\n", "prompt")
    dataset: str = setting("toy", "corpus")
    n_layer: int = setting(12, "blocks", lo=1, group="model")
    n_head: int = setting(12, "heads", lo=1)
    n_embd: int = setting(768, "width", lo=1)
    dropout: float = setting(0.0, "share of activations dropped", lo=0.0, hi=1.0)
    bias: bool = setting(False, "biases")
    gradient_accumulation_steps: int = setting(40, "micro-batches", lo=1, group="optimization")
    max_iters: int = setting(600000, "steps", lo=0)
    lr_decay_iters: int = setting(600000, "steps of decay", lo=0)
    learning_rate: float = setting(6e-4, "peak learning rate", above=0)
    top_k: int | None = setting(None, "keep the k likeliest", lo=-1)
    min_p: float | None = setting(0.1, "keep tokens this likely", lo=0, hi=1)
    compile: bool | str = setting("auto", "torch.compile", choices=("auto", True, False))
    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))

    def problems(self) -> list[str]:
        if self.n_embd % self.n_head:
            return [f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}"]
        return []


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, text):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


def get(*argv):
    return resolve(Settings, argv).settings


def told(*argv, **options):
    with pytest.raises(ValueError) as raised:
        resolve(Settings, argv, **options)
    return str(raised.value)


# ------------------------------------------------------------------------------------------ what wins


def test_without_arguments_every_setting_is_its_default():
    resolved = resolve(Settings, [])
    assert resolved.settings == Settings()
    assert set(resolved.sources.values()) == {"default"}
    assert resolved.explicit == frozenset()


def test_files_win_from_left_to_right_and_flags_win_over_files_wherever_they_stand():
    one = write("config/one.py", "n_layer = 1\nn_head = 1\nseed = 1\n")
    two = write("config/two.py", "n_head = 2\nseed = 2\n")
    resolved = resolve(Settings, ["--seed=3", one, two])
    assert (resolved.settings.n_layer, resolved.settings.n_head, resolved.settings.seed) == (1, 2, 3)
    assert resolved.sources["n_layer"] == "config/one.py"
    assert resolved.sources["n_head"] == "config/two.py"
    assert resolved.sources["seed"] == "--seed"
    assert resolved.sources["dropout"] == "default"
    assert resolved.explicit == {"n_layer", "n_head", "seed"}


def test_the_base_wins_over_defaults_only():
    base = {"n_layer": 2, "n_head": 2, "seed": 2, "a_key_of_an_older_version": [1]}
    one = write("one.py", "n_head = 4\nn_embd = n_layer * 8\n")
    resolved = resolve(Settings, [one, "--seed=6"], base=base, base_name="out/settings.json")
    assert (resolved.settings.n_layer, resolved.settings.n_head, resolved.settings.seed) == (2, 4, 6)
    assert resolved.settings.n_embd == 16
    assert resolved.sources["n_layer"] == "out/settings.json"
    assert resolved.explicit == {"n_head", "n_embd", "seed"}


def test_values_of_the_base_are_checked_and_a_flag_mends_them():
    message = told(base={"n_layer": "four", "n_head": 4.0}, base_name="out/settings.json")
    assert message == "out/settings.json, n_layer = 'four': must be a whole number, at least 1"
    assert resolve(Settings, ["--n_layer=4"], base={"n_layer": "four"}).settings.n_layer == 4


def test_of_a_flag_given_twice_the_last_wins():
    assert get("--seed=1", "--seed=2").seed == 2
    assert get("--n_layer=four", "--n_layer=4").n_layer == 4


# ------------------------------------------------------------------------------------------ config files


def test_a_config_file_computes_with_the_settings_so_far():
    one = write("one.py", "max_iters = 1e5\n")
    two = write("two.py", "lr_decay_iters = max_iters\nlearning_rate *= 2\nn_embd = n_head * 64\n")
    settings = get(one, two)
    assert settings.max_iters == 100000 and type(settings.max_iters) is int
    assert settings.lr_decay_iters == 100000 and type(settings.lr_decay_iters) is int
    assert settings.learning_rate == 12e-4


def test_a_name_that_a_file_only_reads_is_not_set_by_it():
    path = write("x.py", "lr_decay_iters = max_iters if n_layer else seed\n")
    assert resolve(Settings, [path]).explicit == {"lr_decay_iters"}


def test_a_name_that_a_file_sets_to_its_default_is_set_by_it():
    path = write("x.py", "n_layer = 12\ndropout += 0\n")
    assert resolve(Settings, [path]).explicit == {"n_layer", "dropout"}


def test_names_set_in_branches_loops_and_functions_count():
    text = """
for _i in range(3):
    n_layer = _i + 1
if n_layer == 3:
    n_head = 2
def _shrink():
    global n_embd
    n_embd = 8 * n_head
_shrink()
globals()["seed"] = 5
globals().update(max_iters=7)
(dropout, bias) = 0.5, True
"""
    resolved = resolve(Settings, [write("x.py", text)])
    assert resolved.explicit == {"n_layer", "n_head", "n_embd", "seed", "max_iters", "dropout", "bias"}
    assert (resolved.settings.n_embd, resolved.settings.seed, resolved.settings.max_iters) == (16, 5, 7)


def test_a_setting_that_a_file_deletes_keeps_its_value():
    assert resolve(Settings, [write("x.py", "n_layer = 4\ndel n_layer\n")]).settings.n_layer == 12


def test_a_file_may_have_names_of_its_own():
    text = """
import math
import os.path as paths
from math import pi
from time import time
class Helper:
    width = 64
def heads():
    return n_layer // 2
_private = 3
n_layer = 4
n_head = heads()
n_embd = Helper.width
seed = int(pi)
out_dir = paths.basename(__file__)
"""
    settings = get(write("config/x.py", text))
    assert (settings.n_head, settings.n_embd, settings.seed, settings.out_dir) == (2, 64, 3, "x.py")


def test_nanogpt_config_files_run_unchanged():
    path = write(
        "config/finetune.py",
        """
import time

out_dir = 'out-shakespeare'
wandb_log = False # feel free to turn on
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
gradient_accumulation_steps = 5 * 8
max_iters = 20
learning_rate = 3e-5
device = 'cpu'  # run on cpu only
compile = False # do not torch compile the model
""",
    )
    settings = get(path)
    assert settings.gradient_accumulation_steps == 40
    assert settings.wandb_run_name.startswith("ft-1")
    assert settings.compile is False


def test_an_unknown_name_in_a_file_is_told_with_its_line_and_the_nearest_name():
    path = write("config/x.py", "n_layer = 4\n\nn_layers = 5\n")
    assert told(path) == "config/x.py line 3: unknown setting 'n_layers' (did you mean 'n_layer'?)"


def test_a_helper_without_underscore_is_told_how_to_be_one():
    path = write("x.py", "for i in range(3):\n    seed = i\n")
    assert told(path) == "x.py line 1: unknown setting 'i' (begin a name of your own with _, as in _i)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\nn_layer = \n", "x.py line 2: SyntaxError: invalid syntax"),
        ("seed = 1\nn_layer = nn_layer\n", "x.py line 2: NameError: name 'nn_layer' is not defined"),
        ("seed = 1 / 0\n", "x.py line 1: ZeroDivisionError: division by zero"),
        ("import sys\n\nsys.exit('no')\n", "x.py line 3: SystemExit: no"),
        ("import a_module_that_is_not_there\n", "x.py line 1: ModuleNotFoundError: No module named"),
        ("open('not_there.txt')\n", "x.py line 1: FileNotFoundError: [Errno 2] No such file"),
        ("def f():\n    raise OSError\n\nf()\n", "x.py line 2: OSError"),
        ("compile('(', 'elsewhere', 'exec')\n", "x.py line 1: TypeError: 'str' object is not callable"),
    ],
)
def test_an_error_in_a_file_is_told_with_its_line(text, message):
    assert told(write("x.py", text)).startswith(message)


def test_an_error_in_a_file_hides_no_other_problem():
    path = write("x.py", "n_layer = 0\nseed = 1 / 0\n")
    lines = told(path, "--dropuot=0.1").splitlines()
    assert lines == [
        "3 problems with the settings:",
        "  - x.py line 2: ZeroDivisionError: division by zero",
        "  - --dropuot=0.1: unknown setting 'dropuot' (did you mean 'dropout'?)",
        "  - x.py line 1, n_layer = 0: must be at least 1",
    ]


def test_a_file_that_is_not_utf8_is_told():
    Path("x.py").write_bytes(b"seed = 1\nout_dir = '\xe7'\n")
    assert told("x.py").startswith("x.py")
    assert "utf-8" in told("x.py") and len(told("x.py").splitlines()) == 1
    Path("y.py").write_bytes(b"\0")
    assert told("y.py").startswith("y.py")


def test_a_file_that_is_not_there_is_told_with_the_nearest():
    write("config/train_eca_char.py", "")
    meant = "(did you mean config/train_eca_char.py?)"
    for name in ("config/train_eca_chr.py", "config/train_eca_char", "train_eca_char.py", "train_eca_char"):
        assert told(name) == f"{name}: no such config file {meant}"
    assert told("elsewhere/quite_different.py") == "elsewhere/quite_different.py: no such config file"


def test_a_word_that_looks_like_a_flag_is_told_as_one():
    assert told("n_layer=4") == "n_layer=4: no such config file (did you mean --n_layer=4?)"
    assert told("-n_layer=4") == "-n_layer=4: no such config file (did you mean --n_layer=4?)"
    assert told("overwrite") == "overwrite: no such config file (did you mean --overwrite?)"


def test_a_folder_or_an_impossible_path_is_no_config_file():
    Path("config").mkdir()
    assert told("config") == "config: Is a directory"
    assert told("") == "'': Is a directory"
    assert "null" in told("a\0b.py")
    assert told("x" * 5000).startswith("xxx")


def test_resolve_and_importing_print_nothing(capfd):
    resolve(Settings, [write("x.py", "n_layer = 2\n"), "--seed=1"])
    told("--nothing")
    subprocess.run([sys.executable, "-c", "import configurator"], cwd=ROOT, check=True)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------ flags


def test_a_value_may_follow_after_a_space():
    settings = get("--n_layer", "4", "--top_k", "-1", "--start", "-", "--out_dir", "a b", "--dropout", ".5")
    assert (settings.n_layer, settings.top_k, settings.start) == (4, -1, "-")
    assert (settings.out_dir, settings.dropout) == ("a b", 0.5)


def test_dashes_in_a_key_are_underscores():
    assert get("--n-layer=4", "--out-dir", "a-b").n_layer == 4
    assert get("--out-dir", "a-b").out_dir == "a-b"


def test_text_is_kept_as_it_is():
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


def test_bool_or_text_takes_either():
    assert get("--compile", "auto", "--seed=1").compile == "auto"
    assert told("--compile", "fasle") == (
        "--compile=fasle: must be one of 'auto', True, False (did you mean False?)"
    )


def test_whole_numbers_have_many_spellings():
    for text in ("100000", "1e5", "100_000", "100000.0", "+100000", "1.0e+5"):
        assert get(f"--max_iters={text}").max_iters == 100000
        assert type(get(f"--max_iters={text}").max_iters) is int


def test_whole_numbers_become_floats_for_a_float():
    assert repr(get("--dropout=1").dropout) == "1.0"
    assert repr(get(write("x.py", "dropout = 1\n")).dropout) == "1.0"


def test_none_is_a_value_only_where_it_may_be():
    assert get("--top_k=None").top_k is None and get("--min_p", "none").min_p is None
    assert get(write("x.py", "min_p = None\ntop_k = 40.0\n")).min_p is None
    assert told("--n_layer=None") == "--n_layer=None: must be a whole number, at least 1"


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flag", "problem"),
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
        ("--zzz=4", "unknown setting 'zzz' (--help lists them)"),
        ("--", "unknown setting '' (--help lists them)"),
        ("--n_layer", "needs a value, as in --n_layer=12"),
        ("--out_dir", "needs a value, as in --out_dir='out'"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line(flag, problem):
    assert told(flag) == f"{flag}: {problem}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("n_layer = '4'", "must be a whole number, at least 1"),
        ("n_layer = True", "must be a whole number, at least 1"),
        ("n_layer = 1.5", "must be a whole number, at least 1"),
        ("dropout = False", "must be a number, between 0.0 and 1.0"),
        ("learning_rate = 'fast'", "must be a number, above 0"),
        ("wandb_log = 1", "must be True or False"),
        ("out_dir = None", "must be text"),
        ("compile = 1", "must be one of 'auto', True, False"),
        ("seed = [1]", "must be a whole number"),
    ],
)
def test_a_wrong_value_in_a_file_is_told_with_its_line(line, problem):
    path = write("config/x.py", f"# a comment\n{line}\n")
    assert told(path) == f"config/x.py line 2, {line}: {problem}"


def test_a_number_too_large_for_a_float_is_refused():
    assert "must be a number" in told(write("x.py", "learning_rate = 10**400\n"))


def test_a_missing_value_before_another_flag_is_told():
    assert told("--n_layer", "--seed=1") == "--n_layer: needs a value, as in --n_layer=12"


def test_all_problems_are_told_at_once():
    path = write("config/x.py", "n_layers = 4\nbias = 'no'\n")
    assert told(path, "--dropout=1.5", "--n_haed", "4", "missing.py", "--device=gpu").splitlines() == [
        "6 problems with the settings:",
        "  - config/x.py line 1: unknown setting 'n_layers' (did you mean 'n_layer'?)",
        "  - missing.py: no such config file",
        "  - --n_haed=4: unknown setting 'n_haed' (did you mean 'n_head'?)",
        "  - config/x.py line 2, bias = 'no': must be True or False",
        "  - --dropout=1.5: must be between 0.0 and 1.0",
        "  - --device=gpu: must be one of 'auto', 'cpu', 'cuda', 'mps' (did you mean 'cpu'?)",
    ]


def test_contradictions_are_told_once_each_value_is_sound():
    contradiction = "n_embd=100 is not divisible by n_head=12"
    assert told("--n_embd=100") == contradiction
    assert told("--n_embd=100", "--n_haed=1").splitlines()[0] == "2 problems with the settings:"
    assert contradiction in told("--n_embd=100", "--n_haed=1")
    assert contradiction not in told("--n_embd=100", "--dropout=2")
    assert contradiction not in told("--n_embd=100", "missing.py")


def test_a_settings_class_is_checked_as_well():
    strange = make_dataclass("Strange", [("sizes", list, field(default=None))])
    with pytest.raises(AssertionError, match=r"Strange\.sizes"):
        resolve(strange, [])
    with pytest.raises(ValueError, match="at least 1"):
        resolve(make_dataclass("Wrong", [("n_layer", int, setting(0, "blocks", lo=1))]), [])


def test_plain_fields_are_settings_too():
    plain = make_dataclass("Plain", [("n", int, 3), ("ratio", float, 1)], frozen=True)
    resolved = resolve(plain, ["--n=4"])
    assert (resolved.settings.n, repr(resolved.settings.ratio)) == (4, "1.0")


# ------------------------------------------------------------------------------------------ for any value


@steady
@given(st.integers())
def test_any_int_comes_back(value):
    assert get(f"--seed={value}").seed == value
    assert get("--seed", str(value)).seed == value


@steady
@given(st.floats(min_value=0, max_value=1))
def test_any_float_comes_back(value):
    assert get(f"--dropout={value}").dropout == value


@steady
@given(st.booleans())
def test_any_bool_comes_back(value):
    assert get(f"--overwrite={value}").overwrite is value


@steady
@given(st.text())
def test_any_text_comes_back(value):
    assert get(f"--start={value}").start == value


@steady
@given(st.text(), st.floats(min_value=0, max_value=1), st.none() | st.integers(min_value=-1), st.booleans())
def test_printed_settings_are_a_config_file_that_gives_them_again(start, dropout, top_k, bias):
    settings = Settings(start=start, dropout=dropout, top_k=top_k, bias=bias)
    text = format_settings(Resolved(settings, dict.fromkeys(vars(settings), "somewhere")))
    Path("again.py").write_text(text, encoding="utf-8")
    assert get("again.py") == settings


words = st.text(max_size=12) | st.sampled_from(
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


@steady
@given(st.lists(words, max_size=6))
def test_any_command_line_gives_settings_or_a_value_error(argv):
    try:
        assert isinstance(resolve(Settings, argv).settings, Settings)
    except ValueError as error:
        assert str(error)


@steady
@given(st.text(alphabet="n_layer = 4\n'\\#[]:+*", max_size=40))
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_config_file_gives_settings_or_a_value_error(text):
    Path("any.py").write_text(text, encoding="utf-8")
    try:
        resolve(Settings, ["any.py"])
    except ValueError as error:
        assert str(error)


# ------------------------------------------------------------------------------------------ what it shows


def test_help_shows_every_key_with_default_range_and_meaning_under_its_heading():
    text = " ".join(format_help(Settings).split())
    assert text.startswith("python toy.py [config/file.py ...]")
    assert "--out_dir folder of the run (text; default 'out')" in text
    assert "--n_layer blocks (a whole number, at least 1; default 12)" in text
    assert "--dropout share of activations dropped (a number, between 0.0 and 1.0; default 0.0)" in text
    assert "--learning_rate peak learning rate (a number, above 0; default 0.0006)" in text
    assert "--device where to run (one of 'auto', 'cpu', 'cuda', 'mps'; default 'auto')" in text
    order = ["run:", "--out_dir", "--dataset", "model:", "--n_layer", "optimization:", "every command:"]
    places = [text.index(f" {word} ") for word in [*order, "--print_settings", "--debug"]]
    assert places == sorted(places)
    assert max(map(len, format_help(Settings).splitlines())) <= 110


def test_printed_settings_show_what_each_came_from():
    path = write("config/x.py", "n_layer = 4\n")
    lines = format_settings(resolve(Settings, [path, "--seed=1"])).splitlines()
    printed = dict(line.split("  # ") for line in lines)
    assert {key.strip(): source for key, source in printed.items()}.items() >= {
        ("out_dir = 'out'", "default"),
        ("n_layer = 4", "config/x.py"),
        ("seed = 1", "--seed"),
    }
    assert len(lines) == len(vars(Settings()))


# ------------------------------------------------------------------------------------------ the command

SCRIPT = """
import os, sys
from dataclasses import dataclass
from configurator import command, setting

@dataclass(frozen=True)
class Settings:
    '''python toy.py: a toy'''
    mode: str = setting("show", "what to do", group="toy")
    n_layer: int = setting(12, "blocks", lo=1)
    DEBUG_FIELD

def main(resolved):
    settings = resolved.settings
    if settings.mode == "show":
        print(settings.n_layer, resolved.sources["n_layer"])
    if settings.mode == "value":
        raise ValueError("the corpus is missing")
    if settings.mode == "empty":
        raise ValueError
    if settings.mode == "os":
        open("not/there.txt")
    if settings.mode == "bug":
        raise KeyError("ours")
    if settings.mode == "interrupt":
        raise KeyboardInterrupt
    if settings.mode == "three":
        return 3
    if settings.mode == "lines":
        for number in range(100000):
            print(number)
    if settings.mode == "pipe":
        raise BrokenPipeError(32, "Broken pipe")

if __name__ == "__main__":
    sys.exit(command(main, Settings))
"""


@pytest.fixture
def toy(folder):
    def run(*argv, debug_field=False):
        line = 'debug: bool = setting(False, "show the traceback")' if debug_field else ""
        Path("toy.py").write_text(SCRIPT.replace("DEBUG_FIELD", line), encoding="utf-8")
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "toy.py", *argv], capture_output=True, text=True, env=env)
        return done.returncode, done.stdout, done.stderr

    return run


def in_process(main, *argv, base=None):
    return command(main, Settings, argv, base=base)


HINT = "(--debug=True shows where it was raised)\n"


def test_a_command_runs_main_and_ends_with_its_status(toy):
    assert toy("--n_layer=4") == (0, "4 --n_layer\n", "")
    assert toy("--mode=three") == (3, "", "")


def test_wrong_settings_end_with_one_message_and_status_2(toy):
    message = "error: --n_layers=4: unknown setting 'n_layers' (did you mean 'n_layer'?)\n"
    assert toy("--n_layers=4") == (2, "", message + HINT)


def test_a_users_mistake_in_main_ends_with_one_message_and_status_2(toy):
    assert toy("--mode=value") == (2, "", "error: the corpus is missing\n" + HINT)
    assert toy("--mode=os") == (2, "", "error: not/there.txt: No such file or directory\n" + HINT)


@pytest.mark.parametrize("debug_field", [True, False])
def test_debug_shows_the_traceback(toy, debug_field):
    for flag in ("--debug", "--debug=True"):
        status, out, err = toy("--mode=value", flag, debug_field=debug_field)
        assert (status, out) == (2, "")
        assert err.startswith("Traceback") and err.endswith("ValueError: the corpus is missing\n")
        assert HINT not in err
    assert toy("--mode=value", "--debug=False", debug_field=debug_field)[2].endswith(HINT)


def test_debug_in_a_config_file_shows_the_traceback(toy):
    path = write("x.py", "debug = True\nmode = 'value'\n")
    assert toy(path, debug_field=True)[2].startswith("Traceback")


def test_debug_shows_where_a_config_file_failed(toy):
    status, _, err = toy(write("x.py", "n_layer = 1 / 0\n"), "--debug")
    assert status == 2
    assert 'File "x.py", line 1' in err and "n_layer = 1 / 0" in err


def test_our_own_bugs_keep_their_traceback(toy):
    status, _, err = toy("--mode=bug")
    assert status == 1
    assert err.startswith("Traceback") and "KeyError: 'ours'" in err


def test_an_interrupt_is_quiet(toy):
    assert toy("--mode=interrupt") == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error on Windows")
@pytest.mark.parametrize("flags", [["--mode=lines"], ["--help"]])
def test_a_reader_that_stops_reading_is_no_error(toy, flags):
    toy()  # writes the script
    reading, writing = os.pipe()
    os.close(reading)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "toy.py", *flags], stdout=writing, stderr=subprocess.PIPE, env=env)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_is_told(toy):
    status, _, err = toy("--mode=pipe")
    assert status == 2
    assert "Broken pipe" in err


def test_help_works_even_when_a_config_file_is_wrong(toy):
    wrong = write("wrong.py", "n_layer = \n")
    for flags in (["--help"], ["-h"], [wrong, "--help", "--nothing"]):
        status, out, err = toy(*flags)
        assert (status, err) == (0, "")
        assert out.startswith("python toy.py: a toy") and "--n_layer" in out


def test_print_settings_stops_before_main(toy):
    path = write("config/x.py", "n_layer = 4\n")
    for flag in ("--print_settings", "--print-settings", "--print_settings=True"):
        status, out, err = toy(path, flag, "--mode=value")
        assert (status, err) == (0, "")
        assert out == "mode = 'value'  # --mode\nn_layer = 4     # config/x.py\n"


def test_print_settings_tells_wrong_settings(toy):
    status, out, err = toy("--print_settings", "--n_layer=0")
    assert (status, out) == (2, "")
    assert err.startswith("error: --n_layer=0: must be at least 1\n")


def test_an_error_without_words_has_its_name(toy):
    assert toy("--mode=empty")[2].startswith("error: ValueError\n")


def test_a_command_may_resume_on_the_settings_of_a_saved_run(capsys):
    saved = {"n_head": 6, "n_embd": 384, "seed": 7}

    def base(settings):
        return (saved, "out/toy/settings.json") if settings.out_dir == "out/toy" else None

    seen = []
    # n_embd=390 contradicts the default n_head=12, and goes with the n_head=6 of the saved run
    argv = ("--out_dir=out/toy", "--n_embd=390")
    assert in_process(seen.append, *argv, base=base) == 0
    assert (seen[0].settings.n_head, seen[0].settings.n_embd, seen[0].settings.seed) == (6, 390, 7)
    assert seen[0].sources["seed"] == "out/toy/settings.json"
    assert seen[0].explicit == {"out_dir", "n_embd"}
    assert in_process(seen.append, "--out_dir=out/new", base=base) == 0
    assert seen[1].sources["seed"] == "default"
    assert in_process(seen.append, *argv, "--print_settings", base=base) == 0
    assert "# out/toy/settings.json" in capsys.readouterr().out


def test_settings_are_checked_before_a_saved_run_is_looked_for(capsys):
    def base(settings):
        raise AssertionError("looked for")

    assert in_process(print, "--n_layer=0", base=base) == 2
    assert "--n_layer=0: must be at least 1" in capsys.readouterr().err


def test_of_many_problems_the_first_twenty_are_told():
    flags = [f"--no_such_setting_{i}={'x' * 300}" for i in range(500)]
    lines = told(*flags).splitlines()
    assert lines[0] == "500 problems with the settings:" and lines[-1] == "and 480 more"
    assert len(lines) == 22 and "no_such_setting_19" in lines[-2]
