"""What --help and --print_settings print."""

from dataclasses import dataclass

import pytest
from example_settings import Settings, write

from configurator import format_help, format_settings, resolve, setting


def test_help_shows_meaning_range_and_default_by_group():
    text = " ".join(format_help(Settings).split())
    assert text.startswith("python toy.py [config/file.py ...]")
    assert "--out_dir folder of the run (text; default 'out')" in text
    assert "--n_layer blocks (a whole number, at least 1; default 12)" in text
    assert "--dropout share of activations dropped (a number, between 0.0 and 1.0; default 0.0)" in text
    assert "--learning_rate peak learning rate (a number, above 0; default 0.0006)" in text
    assert "--device device (one of 'auto', 'cpu', 'cuda', 'mps'; default 'auto')" in text
    order = ["run:", "--out_dir", "--dataset", "model:", "--n_layer", "optimization:", "general:"]
    positions = [text.index(f" {name} ") for name in [*order, "--print_settings", "--debug"]]
    assert positions == sorted(positions)


@pytest.mark.parametrize(("columns", "width"), [("20", 60), ("72", 72), ("100", 100), ("300", 100)])
def test_help_fits_the_terminal(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    lengths = [len(line) for line in format_help(Settings).splitlines()]
    assert width - 20 < max(lengths) <= width


def test_a_class_without_common_settings_shows_all_of_them():
    assert format_help(Settings) == format_help(Settings, show_all=True)
    assert "most used" not in format_help(Settings)


COMMAND = "python toy.py --path=config/a-very-long-file-name.py --another-flag"


@dataclass(frozen=True)
class Toy:
    """python toy.py [config/file.py ...] [--key=value ...] [another argument that makes this line long]

    Does something with a corpus, and is explained in a sentence that takes more than a line of a terminal.

        python toy.py --path=config/a-very-long-file-name.py --another-flag [--help]
    """

    path: str = setting("a b c d e f g h i j k l m n o p q r s t u v", f"made by `{COMMAND}`", group="files")
    n_layer: int = setting(12, "blocks", group="model", common=True)
    n_head: int = setting(12, "heads")
    seed: int = setting(1337, "random seed", group="run", common=True)


def test_help_shows_only_common_settings_under_their_groups():
    text = format_help(Toy)
    assert "The 2 most used of 4 settings; --help=all shows all:" in text
    assert "--n_layer" in text and "--seed" in text and "--n_head" not in text and "--path " not in text
    assert "\nmodel:\n" in text and "\nrun:\n" in text and "files:" not in text
    for switch in ("--help", "--print_settings", "--debug"):
        assert f"\n  {switch} " in text


def test_help_all_shows_every_setting():
    text = format_help(Toy, show_all=True)
    assert all(f"\n  --{name} " in text for name in ("path", "n_layer", "n_head", "seed", "help"))
    assert "most used" not in text


@pytest.mark.parametrize("columns", ["60", "80", "100"])
def test_help_does_not_break_commands_paths_and_defaults(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    lines = format_help(Toy, show_all=True).splitlines()
    assert lines[0].startswith("python toy.py [config/file.py ...] [--key=value ...] [another argument")
    assert lines[0].endswith("makes this line long]")
    assert sum(COMMAND in line for line in lines) == 2
    assert sum("'a b c d e f g h i j k l m n o p q r s t u v'" in line for line in lines) == 1
    assert sum("key = value" in line for line in lines) == 1
    assert "Does something with a corpus" in lines[2] and len(lines[2]) <= int(columns)


def test_printed_settings_show_their_sources():
    path = write("config/x.py", "n_layer = 4\n")
    lines = format_settings(resolve(Settings, [path, "--seed=1"])).splitlines()
    printed = dict(line.split("  # ") for line in lines)
    assert {key.strip(): source for key, source in printed.items()}.items() >= {
        ("out_dir = 'out'", "default"),
        ("n_layer = 4", "config/x.py"),
        ("seed = 1", "--seed"),
    }
    assert len(lines) == len(vars(Settings()))
