"""Config files: what they may contain, and how their mistakes are reported."""

from pathlib import Path

import pytest
from example_settings import Settings, get, problem, write

from configurator import resolve


def test_a_config_file_can_read_earlier_settings():
    first = write("one.py", "max_iters = 1e5\n")
    second = write("two.py", "lr_decay_iters = max_iters\nlearning_rate *= 2\nn_embd = n_head * 64\n")
    settings = get(first, second)
    assert settings.max_iters == 100000 and type(settings.max_iters) is int
    assert settings.lr_decay_iters == 100000 and type(settings.lr_decay_iters) is int
    assert settings.learning_rate == 12e-4


def test_reading_a_setting_does_not_set_it():
    path = write("x.py", "lr_decay_iters = max_iters if n_layer else seed\n")
    assert resolve(Settings, [path]).explicit == {"lr_decay_iters"}


def test_assigning_the_default_counts_as_set():
    path = write("x.py", "n_layer = 12\ndropout += 0\n")
    assert resolve(Settings, [path]).explicit == {"n_layer", "dropout"}


def test_assignments_in_loops_and_functions_count():
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


def test_a_deleted_setting_keeps_its_value():
    assert resolve(Settings, [write("x.py", "n_layer = 4\ndel n_layer\n")]).settings.n_layer == 12


def test_a_config_file_may_define_helpers():
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


RESET = 'reset("model")\n'


def test_reset_sets_a_group_to_its_defaults():
    first = write("one.py", "n_layer = 3\nn_head = 4\nbias = True\nseed = 5\n")
    second = write("two.py", RESET + "n_head = 6\n")
    resolved = resolve(Settings, [first, second])
    assert resolved.settings == Settings(n_head=6, seed=5)
    assert resolved.sources["seed"] == "one.py"
    model_settings = {"n_layer", "n_head", "n_embd", "dropout", "bias"}
    assert {key for key, source in resolved.sources.items() if source == "two.py"} == model_settings
    assert resolved.explicit == model_settings | {"seed"}


def test_flags_and_later_files_override_a_reset():
    first, second = write("one.py", RESET), write("two.py", "n_layer = 3\n")
    assert resolve(Settings, ["--n_head=6", first, second]).settings == Settings(n_layer=3, n_head=6)
    assert get(write("x.py", "n_layer = 3\n" + RESET + "n_embd = 2 * n_embd\n")) == Settings(n_embd=1536)


def test_reset_sets_defaults_and_not_the_values_of_a_resumed_run():
    resolved = resolve(Settings, [write("x.py", RESET)], base={"n_layer": 2, "seed": 3}, base_name="saved")
    assert resolved.settings == Settings(seed=3) and resolved.sources["n_layer"] == "x.py"


def test_reset_replaces_an_invalid_value():
    assert get(write("one.py", "n_layer = 0\n"), write("two.py", RESET)).n_layer == 12


def test_an_unknown_group_is_reported_with_line_and_suggestion():
    message = "x.py line 2: ValueError: reset('modle'): unknown group of settings (did you mean 'model'?)"
    assert problem(write("x.py", "seed = 1\nreset('modle')\n")) == message
    groups = "(the groups are 'run', 'model', 'optimization')"
    for argument in ("None", "'zzzz'", "3"):
        message = f"x.py line 1: ValueError: reset({argument}): unknown group of settings {groups}"
        assert problem(write("x.py", f"reset({argument})\n")) == message


def test_a_config_file_may_define_its_own_reset():
    assert get(write("x.py", "def reset(n):\n    return n\nn_layer = reset(4)\n")).n_layer == 4


def test_an_unknown_name_is_reported_with_line_and_suggestion():
    path = write("config/x.py", "n_layer = 4\n\nn_layers = 5\n")
    assert problem(path) == "config/x.py line 3: unknown setting 'n_layers' (did you mean 'n_layer'?)"


def test_a_plain_variable_must_start_with_an_underscore():
    path = write("x.py", "for i in range(3):\n    seed = i\n")
    assert problem(path) == "x.py line 1: unknown setting 'i' (start names of your own with _: _i)"


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
def test_an_exception_is_reported_with_its_line(text, message):
    assert problem(write("x.py", text)).startswith(message)


def test_an_exception_does_not_hide_other_problems():
    path = write("x.py", "n_layer = 0\nseed = 1 / 0\n")
    lines = problem(path, "--dropuot=0.1").splitlines()
    assert lines == [
        "3 problems with the settings:",
        "  - x.py line 2: ZeroDivisionError: division by zero",
        "  - --dropuot=0.1: unknown setting 'dropuot' (did you mean 'dropout'?)",
        "  - x.py line 1, n_layer = 0: must be at least 1",
    ]


def test_a_file_that_is_not_utf8_is_rejected():
    Path("x.py").write_bytes(b"seed = 1\nout_dir = '\xe7'\n")
    assert problem("x.py").startswith("x.py")
    assert "utf-8" in problem("x.py") and len(problem("x.py").splitlines()) == 1
    Path("y.py").write_bytes(b"\0")
    assert problem("y.py").startswith("y.py")


def test_a_missing_file_is_reported_with_a_similar_name():
    write("config/train_eca_char.py", "")
    suggestion = "(did you mean config/train_eca_char.py?)"
    for name in ("config/train_eca_chr.py", "config/train_eca_char", "train_eca_char.py", "train_eca_char"):
        assert problem(name).startswith(f"{name}: no such config file {suggestion}; looked for ")
    name = "elsewhere/quite_different.py"
    assert problem(name).startswith(f"{name}: no such config file; looked for ")


def test_a_flag_without_dashes_is_suggested():
    assert problem("n_layer=4") == "n_layer=4: no such config file (did you mean --n_layer=4?)"
    assert problem("-n_layer=4") == "-n_layer=4: no such config file (did you mean --n_layer=4?)"
    assert problem("overwrite") == "overwrite: no such config file (did you mean --overwrite?)"


def test_a_folder_or_invalid_path_is_not_a_config_file():
    Path("config").mkdir()
    message = "a folder, not a config file: name a file, such as config/x.py, or write --out_dir="
    assert problem("config") == f"config: {message}config"
    Path("my run").mkdir()
    assert problem("my run") == f"my run: {message}'my run'"
    assert problem("").startswith("'': an empty argument: name a config file")
    assert "null" in problem("a\0b.py")
    assert problem("x" * 5000).startswith("xxx")


@pytest.mark.parametrize(
    ("line", "message"),
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
def test_an_invalid_value_is_reported_with_its_line(line, message):
    path = write("config/x.py", f"# a comment\n{line}\n")
    assert problem(path) == f"config/x.py line 2, {line}: {message}"


def test_a_number_too_large_for_a_float_is_rejected():
    assert "must be a number" in problem(write("x.py", "learning_rate = 10**400\n"))
