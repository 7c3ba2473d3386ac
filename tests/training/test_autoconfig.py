"""The preset chosen for a machine and a time budget: on simulated machines, and in real runs."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ROOT, losses, run_ranks, run_script

from fradique.training import autoconfig
from fradique.training.autoconfig import PRESETS_OF_BPE, PRESETS_OF_CHARACTERS, Throughput

CLOCKED_TRAIN = "tests/fake_clock.py"  # train.py with a simulated clock


class Machine:
    """A simulated machine: the seconds per step of each preset, and one second for each trial."""

    PARAMETERS = (150, 790, 1770, 3930, 10_600, 25_200, 85_000)  # thousands

    def __init__(self, *step_seconds, corpus=10**9):
        self.step_seconds, self.spent = step_seconds, 2.0
        self.corpus, self.tried = corpus, []

    def __call__(self, changes):
        index = len(self.tried)
        self.tried.append(changes)
        self.spent += 1.0
        tokens = PRESETS_OF_CHARACTERS[index].batch_size * PRESETS_OF_CHARACTERS[index].block_size
        size = self.PARAMETERS[index] * 1000
        return Throughput(size, self.corpus, tokens, self.step_seconds[index], self.spent)


def test_the_preset_fits_the_speed_of_the_machine():
    fast, slow = Machine(*[1e-4] * 7), Machine(1.0, 10.0)
    assert autoconfig.choose_preset(600.0, {}, fast)[0]["n_embd"] == PRESETS_OF_CHARACTERS[-1].n_embd
    assert autoconfig.choose_preset(600.0, {}, slow)[0]["n_embd"] == PRESETS_OF_CHARACTERS[0].n_embd
    assert len(slow.tried) == 2  # larger presets are not tried


def test_more_time_never_gives_a_smaller_model():
    widths = [
        autoconfig.choose_preset(minutes * 60.0, {}, Machine(0.02, 0.03, 0.08, 0.2, 1.8, 50.0))[0]["n_embd"]
        for minutes in (1, 2, 5, 15, 60)
    ]
    assert widths == sorted(widths) and len(set(widths)) > 2


def test_a_slow_machine_takes_the_longer_time(monkeypatch):
    """In 60 s it would see fewer than 500,000 tokens."""
    slow, fast = Machine(0.2, 10.0), Machine(0.1, 10.0)
    changes, notes = autoconfig.choose_preset(60.0, {}, slow, slow_budget=180.0)
    assert changes["time_budget"] == "180s"
    assert notes[0].startswith("auto: this machine is slow: the run takes 3m00s instead of 1m00s")
    assert "in 180 s" in notes[1]
    for machine, slow_budget in ((fast, 180.0), (Machine(0.2, 10.0), None), (Machine(0.2, 10.0), 30.0)):
        changes, notes = autoconfig.choose_preset(60.0, {}, machine, slow_budget=slow_budget)
        assert "time_budget" not in changes and len(notes) == 1


def test_the_search_takes_only_a_fraction_of_the_time():
    machine = Machine(1e-4)
    changes, (note,) = autoconfig.choose_preset(25.0, {}, machine)
    assert len(machine.tried) == 1 and changes["n_embd"] == PRESETS_OF_CHARACTERS[0].n_embd
    assert "no time was left to try a larger one" in note


def test_a_small_corpus_gets_no_model_that_memorizes_it():
    changes, (note,) = autoconfig.choose_preset(600.0, {}, Machine(*[1e-4] * 7, corpus=500_000))
    assert changes["n_embd"] == PRESETS_OF_CHARACTERS[2].n_embd
    assert "would memorize so small a corpus" in note


def test_a_preset_that_fails_ends_the_search_with_a_note():
    for error in (torch.OutOfMemoryError("CUDA out of memory"), ValueError("val.bin is too short")):
        machine = Machine(*[1e-4] * 7)

        def measure(changes, machine=machine, error=error):
            if len(machine.tried) == 2:
                raise error
            return machine(changes)

        changes, (note,) = autoconfig.choose_preset(600.0, {}, measure)
        assert changes["n_embd"] == PRESETS_OF_CHARACTERS[1].n_embd
        assert f"cannot be trained here ({error})" in note
    with pytest.raises(ValueError, match="too short"):  # an error of the smallest preset is the user's to fix
        autoconfig.choose_preset(600.0, {}, lambda changes: (_ for _ in ()).throw(ValueError("too short")))


@pytest.mark.parametrize("world", [1, 3, 8, 12])
def test_the_batch_size_is_a_multiple_of_the_processes(world):
    for preset in PRESETS_OF_CHARACTERS:
        rows = autoconfig.preset_settings(preset, {}, world)["batch_size"]
        assert rows % world == 0 and preset.batch_size <= rows < preset.batch_size + world


def test_explicit_settings_are_not_changed():
    machine = Machine(0.02, 0.03, 0.08, 0.2, 0.9)
    fixed = {"n_layer": 5, "optimizer": "adamw", "warmup_iters": 7}
    changes, _ = autoconfig.choose_preset(300.0, fixed, machine)
    assert not any(fixed.keys() & chosen.keys() for chosen in [changes, *machine.tried])


@pytest.mark.parametrize("fixed", [{"n_embd": 36}, {"n_embd": 10}, {"n_head": 5}])
def test_explicit_width_or_heads_give_an_even_head_dimension(fixed):
    for preset in PRESETS_OF_CHARACTERS:
        settings = autoconfig.preset_settings(preset, fixed) | fixed
        assert settings["n_embd"] % (2 * settings["n_head"]) == 0  # heads of equal, even width


def test_the_schedule_fits_the_expected_number_of_steps():
    changes, (note,) = autoconfig.choose_preset(63.0, {}, Machine(0.05, 10.0))
    steps = (63 - 3) / 0.05
    assert changes["warmup_iters"] == pytest.approx(autoconfig.WARMUP_FRACTION * steps, abs=1)
    assert changes["eval_interval"] == pytest.approx(steps / autoconfig.NUM_EVALUATIONS, rel=0.1)
    assert changes["eval_iters"] == int(0.015 * steps) < autoconfig.EVALUATION_BATCHES
    assert "steps of 50 ms" in note and "too little for its size" in note


@pytest.mark.parametrize(
    ("tokens", "corpus", "expected"),
    [
        (7.2e6, 1.55e6, 0.0),  # machado_char in 5 minutes: 1.341, and 1.393 with 0.1
        (11.9e6, 1.55e6, 0.1),  # in 15 minutes: 1.319, and 1.350 without
        (7.0e6, 1.0e6, 0.1),  # shakespeare_char in 5 minutes: 1.483, and 1.488 without
        (7.2e6, 1e9, 0.0),
    ],
)
def test_dropout_depends_on_the_number_of_epochs(tokens, corpus, expected):
    throughput = Throughput(10**9, int(corpus), int(tokens), 1.0, 0.0)
    assert autoconfig.schedule_settings(throughput, 1.0)["dropout"] == expected


@pytest.mark.parametrize(
    ("tokens", "corpus", "expected"),
    [
        (0.6e6, 0.3e6, 0.0),  # shakespeare in GPT-2's BPE in a minute: 4.903, and 4.955 with 0.1
        (2.0e6, 0.3e6, 0.1),  # in five: 4.596, and 4.562 with 0.2
        (9.2e6, 0.63e6, 0.2),  # machado in BPE of 1,024 tokens in 15 minutes
    ],
)
def test_dropout_of_bpe_begins_after_fewer_epochs(tokens, corpus, expected):
    throughput = Throughput(10**9, int(corpus), int(tokens), 1.0, 0.0, bytes_per_token=2.45)
    assert autoconfig.schedule_settings(throughput, 1.0)["dropout"] == expected


@pytest.mark.parametrize(("parameters", "expected"), [(390_000, 0.0), (1_770_000, 0.1)])
def test_small_layers_get_no_dropout(parameters, expected):
    """2 layers of width 128, and 4 of width 192, on machado_char for 8 epochs."""
    throughput = Throughput(parameters, 1_552_000, 1024, 0.01, 0.0)
    assert autoconfig.schedule_settings(throughput, 120.0)["dropout"] == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(6.56e6, 0.1), (2.0e6, 0.0)],  # shakespeare in GPT-2's BPE in 15 minutes: 4.480, and 4.568 without; in 5
)
def test_weight_decay_depends_on_the_number_of_epochs(tokens, expected):
    changes, (note,) = autoconfig.choose_preset(
        100.0, {}, Machine(100 * 4 * 256 / tokens, 10.0, corpus=302_000)
    )
    assert changes["weight_decay"] == expected
    assert ("weight decay 0.1" in note) == (expected > 0)
    changes, _ = autoconfig.choose_preset(
        100.0, {"weight_decay": 0.3}, Machine(100 * 4 * 256 / tokens, 10.0, corpus=302_000)
    )
    assert "weight_decay" not in changes


def test_explicit_dropout_is_not_changed():
    changes, (note,) = autoconfig.choose_preset(300.0, {"dropout": 0.3}, Machine(0.01, 10.0, corpus=20_000))
    assert "dropout" not in changes and "dropout 0.3" in note


@pytest.mark.parametrize("presets", [PRESETS_OF_CHARACTERS, PRESETS_OF_BPE])
def test_presets_are_sorted_by_size(presets):
    for smaller, larger in itertools.pairwise(presets):
        assert smaller.min_text < larger.min_text
        assert smaller.n_layer * smaller.n_embd**2 < larger.n_layer * larger.n_embd**2


@pytest.mark.parametrize(
    ("bytes_per_token", "step_seconds", "presets", "index"),
    [
        (1.0, 0.03, PRESETS_OF_CHARACTERS, 0),  # two million characters
        (1.4, 0.02, PRESETS_OF_CHARACTERS, 1),  # three million: 4.2 MB
        (2.4, 0.03, PRESETS_OF_BPE, 1),
        (2.4, 0.2, PRESETS_OF_BPE, 0),
    ],
)
def test_the_text_that_a_run_sees_decides(bytes_per_token, step_seconds, presets, index):
    machine = Machine(step_seconds, step_seconds, 10.0)
    trial = lambda changes: replace(machine(changes), bytes_per_token=bytes_per_token)  # noqa: E731
    assert autoconfig.choose_preset(62.0, {}, trial)[0]["n_layer"] == presets[index].n_layer


@pytest.mark.parametrize("bytes_per_token", [1.0, 3.0])
def test_more_epochs_give_shorter_ngrams(bytes_per_token):
    """The tables would learn the text by heart."""
    lengths = []
    for corpus in (10**9, 10**6, 3 * 10**5):
        machine = Machine(0.06, 10.0, corpus=corpus)
        trial = lambda changes, machine=machine: replace(machine(changes), bytes_per_token=bytes_per_token)  # noqa: E731
        lengths.append(autoconfig.choose_preset(62.0, {}, trial)[0]["ngram_max"])
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1] >= 2


def test_wide_presets_have_no_ngrams():
    changes = autoconfig.choose_preset(600.0, {}, Machine(*[1e-4] * 7))[0]
    assert changes["n_embd"] > autoconfig.MAX_NGRAM_WIDTH and changes["ngram_max"] == 1


def test_explicit_ngrams_are_not_changed():
    fixed = {"ngram_max": 4, "ngram_rows": 99, "ngram_dropout": 0.25}
    changes = autoconfig.choose_preset(60.0, fixed, Machine(0.06, 10.0))[0]
    assert not fixed.keys() & changes.keys()


def auto_arguments(data_dir, folder):
    """A run of ten seconds on a simulated machine whose training step takes 0.1 s."""
    arguments = ["config/auto.py", f"--out_dir={folder}", f"--data_dir={data_dir}", "--dataset=tiny"]
    return [
        *arguments,
        "--time_budget=10s",
        "--block_size=16",
        "--n_embd=16",
        "--device=cpu",
        "--eval_iters=1",
    ]


def test_a_run_reports_its_choice_and_keeps_it_when_resumed(data_dir, tmp_path):
    folder = tmp_path / "run"
    arguments = auto_arguments(data_dir, folder)
    result = run_script(CLOCKED_TRAIN, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\nauto: 1 layer 16 wide on 4 x 16 tokens: about ") == 1
    assert "no time was left to try a larger one" in result.stdout
    assert result.stderr == ""  # the trials print nothing
    steps = max(losses(folder))
    assert 70 < steps < 90  # of 0.1 s; the trials took 1.2 s of the ten
    saved = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    settings = saved["settings"]
    assert settings["n_embd"] == 16 and settings["block_size"] == 16
    assert settings["n_layer"] == PRESETS_OF_CHARACTERS[0].n_layer and settings["optimizer"] == "muon"
    assert any(note.startswith("auto: ") for note in saved["decided"]["notes"])
    resumed = run_script(CLOCKED_TRAIN, "--init_from=resume", f"--out_dir={folder}", "--time_budget=12s")
    assert resumed.returncode == 0, resumed.stderr
    assert "\nauto: " not in resumed.stdout
    assert 10 < max(losses(folder)) - steps < 25
    settings_after = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["settings"]
    assert settings_after == settings | {"time_budget": "12s"}
    repeated = run_script("train.py", *arguments)
    assert repeated.returncode == 2 and "already holds a run" in repeated.stderr


def test_processes_agree_on_the_choice(data_dir, tmp_path):
    result = run_ranks(2, *auto_arguments(data_dir, tmp_path / "run"), program=ROOT / CLOCKED_TRAIN)
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout and result.stdout.count("\nauto: ") == 1


def test_auto_reports_contradictions_before_any_trial(tmp_path):
    arguments = ["config/auto.py", f"--out_dir={tmp_path / 'run'}"]
    result = run_script("train.py", *arguments, "--init_from=gpt2")
    assert result.returncode == 2 and "auto chooses a model to train from scratch" in result.stderr
    assert not (tmp_path / "run").exists()


def test_auto_without_a_time_budget_is_rejected(tmp_path):
    result = run_script("train.py", "config/auto.py", "--time_budget=", f"--out_dir={tmp_path / 'run'}")
    assert (
        result.returncode == 2
        and "auto needs to know how much time there is: add --time_budget=5m" in result.stderr
    )
    assert not Path(tmp_path / "run").exists()
