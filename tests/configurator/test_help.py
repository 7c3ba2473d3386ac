"""What --help and --print_settings print."""

IMPORTS


def test_help_shows_meaning_range_and_default_by_group():
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
