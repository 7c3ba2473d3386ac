"""The command: exit status, error messages, --debug, --help, --print_settings and resumed runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from example_settings import ROOT, Settings, write

from configurator import command

SCRIPT = """
import os, sys
from dataclasses import dataclass
from configurator import command, setting

@dataclass(frozen=True)
class Settings:
    '''python toy.py: a toy'''
    mode: str = setting("show", "what to do", group="toy")
    n_layer: int = setting(12, "blocks", lo=1, common=COMMON)
    DEBUG_FIELD

def main(resolved):
    settings = resolved.settings
    if settings.mode == "show":
        print(settings.n_layer, resolved.sources["n_layer"])
    if settings.mode == "value":
        raise ValueError("the corpus is missing")
    if settings.mode == "memory":
        raise MemoryError
    if settings.mode == "empty":
        raise ValueError
    if settings.mode == "library":
        __import__("statistics").mean([])
    if settings.mode == "builtin":
        int("x")
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
    """A function that runs SCRIPT in a process: (exit status, stdout, stderr)."""

    def run(*argv, debug_field=False, common="False"):
        line = 'debug: bool = setting(False, "show the traceback")' if debug_field else ""
        script = SCRIPT.replace("DEBUG_FIELD", line).replace("COMMON", common)
        Path("toy.py").write_text(script, encoding="utf-8")
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run([sys.executable, "toy.py", *argv], capture_output=True, text=True, env=env)
        return result.returncode, result.stdout, result.stderr

    return run


def run_in_process(main, *argv, base=None):
    return command(main, Settings, argv, base=base)


HINT = "(--debug=True shows where it was raised)\n"


def test_a_command_returns_the_status_of_main(toy):
    assert toy("--n_layer=4") == (0, "4 --n_layer\n", "")
    assert toy("--mode=three") == (3, "", "")


def test_invalid_settings_give_one_message_and_status_2(toy):
    message = "error: --n_layers=4: unknown setting 'n_layers' (did you mean 'n_layer'?)\n"
    assert toy("--n_layers=4") == (2, "", message)


def test_a_mistake_of_the_user_gives_one_message_and_status_2(toy):
    assert toy("--mode=value") == (2, "", "error: the corpus is missing\n")
    assert toy("--mode=os") == (2, "", "error: not/there.txt: No such file or directory\n")


def test_a_memory_error_gives_one_message_and_status_2(toy):
    assert toy("--mode=memory") == (2, "", "error: not enough memory\n" + HINT)


def test_only_unexpected_errors_suggest_debug(toy):
    assert toy("--mode=library") == (2, "", "error: mean requires at least one data point\n" + HINT)
    message = "error: invalid literal for int() with base 10: 'x'\n"
    assert toy("--mode=builtin") == (2, "", message + HINT)
    assert toy("--mode=empty") == (2, "", "error: ValueError\n" + HINT)


@pytest.mark.parametrize("debug_field", [True, False])
def test_debug_shows_the_traceback(toy, debug_field):
    for flag in ("--debug", "--debug=True"):
        status, out, err = toy("--mode=value", flag, debug_field=debug_field)
        assert (status, out) == (2, "")
        assert err.startswith("Traceback") and err.endswith("ValueError: the corpus is missing\n")
        assert HINT not in err
    status, _, err = toy("--mode=builtin", "--debug=False", debug_field=debug_field)
    assert (status, err.startswith("error: "), err.endswith(HINT)) == (2, True, True)


def test_debug_in_a_config_file_shows_the_traceback(toy):
    path = write("x.py", "debug = True\nmode = 'value'\n")
    assert toy(path, debug_field=True)[2].startswith("Traceback")


def test_debug_shows_the_line_of_a_failed_config_file(toy):
    status, _, err = toy(write("x.py", "n_layer = 1 / 0\n"), "--debug")
    assert status == 2
    assert 'File "x.py", line 1' in err and "n_layer = 1 / 0" in err


def test_a_bug_keeps_its_traceback(toy):
    status, _, err = toy("--mode=bug")
    assert status == 1
    assert err.startswith("Traceback") and "KeyError: 'ours'" in err


def test_an_interrupt_prints_nothing(toy):
    assert toy("--mode=interrupt") == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe raises another error on Windows")
@pytest.mark.parametrize("flags", [["--mode=lines"], ["--help"]])
def test_a_closed_stdout_is_not_an_error(toy, flags):
    toy()  # writes the script
    reading, writing = os.pipe()
    os.close(reading)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "toy.py", *flags], stdout=writing, stderr=subprocess.PIPE, env=env
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, b"")


def test_a_broken_pipe_other_than_stdout_is_reported(toy):
    status, _, err = toy("--mode=pipe")
    assert status == 2
    assert "Broken pipe" in err


def test_help_works_with_an_invalid_config_file(toy):
    invalid = write("wrong.py", "n_layer = \n")
    for flags in (["--help"], ["-h"], [invalid, "--help", "--nothing"]):
        status, out, err = toy(*flags)
        assert (status, err) == (0, "")
        assert out.startswith("python toy.py: a toy") and "--n_layer" in out


def test_help_shows_common_settings_and_help_all_shows_all(toy):
    for flags in (["--help"], ["-h"], ["--help=True"]):
        status, out, err = toy(*flags, common="True")
        assert (status, err) == (0, "")
        assert "--n_layer" in out and "--mode" not in out and "1 most used of 2 settings" in out
    for flags in (["--help=all"], ["--help", "all"], ["-h", "all"]):
        status, out, err = toy(*flags, common="True")
        assert (status, err) == (0, "")
        assert "--n_layer" in out and "--mode" in out and "most used" not in out
    assert toy("--help=False", "--n_layer=4") == (0, "4 --n_layer\n", "")


def test_print_settings_does_not_run_main(toy):
    path = write("config/x.py", "n_layer = 4\n")
    for flag in ("--print_settings", "--print-settings", "--print_settings=True"):
        status, out, err = toy(path, flag, "--mode=value")
        assert (status, err) == (0, "")
        assert out == "mode = 'value'  # --mode\nn_layer = 4     # config/x.py\n"


@pytest.mark.parametrize("flag", ["--print_settings=foo", "--debug=2", "--debug=no way"])
def test_a_switch_takes_only_booleans(toy, flag):
    status, out, err = toy(flag)
    assert status == 2 and out == "" and flag.partition("=")[0] in err and "True or False" in err


def test_print_settings_reports_invalid_settings(toy):
    status, out, err = toy("--print_settings", "--n_layer=0")
    assert (status, out) == (2, "")
    assert err.startswith("error: --n_layer=0: must be at least 1\n")


def test_a_command_can_start_from_saved_settings(capsys):
    saved = {"n_head": 6, "n_embd": 384, "seed": 7}

    def base(settings):
        return (saved, "out/toy/settings.json") if settings.out_dir == "out/toy" else None

    results = []
    # n_embd=390 is divisible by the n_head=6 of the saved run, but not by the default n_head=12
    argv = ("--out_dir=out/toy", "--n_embd=390")
    assert run_in_process(results.append, *argv, base=base) == 0
    assert (results[0].settings.n_head, results[0].settings.n_embd, results[0].settings.seed) == (6, 390, 7)
    assert results[0].sources["seed"] == "out/toy/settings.json"
    assert results[0].explicit == {"out_dir", "n_embd"}
    assert run_in_process(results.append, "--out_dir=out/new", base=base) == 0
    assert results[1].sources["seed"] == "default"
    assert run_in_process(results.append, *argv, "--print_settings", base=base) == 0
    assert "# out/toy/settings.json" in capsys.readouterr().out


def test_settings_are_checked_before_the_saved_run_is_read(capsys):
    def base(settings):
        raise AssertionError("was called")

    assert run_in_process(print, "--n_layer=0", base=base) == 2
    assert "--n_layer=0: must be at least 1" in capsys.readouterr().err
