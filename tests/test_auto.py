"""What is chosen for a machine and a time: the rule with made-up machines, and a whole run."""

import itertools
import json
from pathlib import Path

import pytest
from conftest import run_script

from fradique import auto
from fradique.auto import LADDER, Trial


class Machine:
    """One that takes `step_seconds` for each size of the ladder, and a second to try it."""

    def __init__(self, *step_seconds, parameters=(100, 1000, 2000, 4000, 8000, 16_000, 32_000), start=2.0):
        self.step_seconds, self.parameters, self.spent = step_seconds, parameters, start
        self.tried = []

    def __call__(self, changes):
        rung = len(self.tried)
        self.tried.append(changes)
        self.spent += 1.0
        tokens = LADDER[rung].batch_size * LADDER[rung].block_size
        return Trial(self.parameters[rung] * 1000, tokens, self.step_seconds[rung], self.spent)


def test_a_fast_machine_takes_the_largest_and_a_slow_one_the_smallest():
    fast, slow = Machine(*[1e-4] * 7), Machine(1.0, 10.0)
    assert auto.choose(600.0, {}, fast)[0]["n_embd"] == LADDER[-1].n_embd
    assert auto.choose(600.0, {}, slow)[0]["n_embd"] == LADDER[0].n_embd
    assert len(slow.tried) == 2  # no more than it takes to see


def test_more_time_never_gives_a_smaller_model():
    widths = [
        auto.choose(minutes * 60.0, {}, Machine(0.02, 0.03, 0.08, 0.2, 1.8, 50.0))[0]["n_embd"]
        for minutes in (1, 2, 5, 15, 60)
    ]
    assert widths == sorted(widths) and len(set(widths)) > 2


def test_no_more_than_a_part_of_the_time_goes_into_trying():
    machine = Machine(1e-4)
    changes, (said,) = auto.choose(25.0, {}, machine)
    assert len(machine.tried) == 1 and changes["n_embd"] == LADDER[0].n_embd
    assert "no time was left to try a larger one" in said


def test_what_is_set_by_hand_stays_and_is_tried_so():
    machine = Machine(0.02, 0.03, 0.08, 0.2, 0.9)
    fixed = {"n_layer": 5, "optimizer": "adamw", "warmup_iters": 7}
    changes, _ = auto.choose(300.0, fixed, machine)
    assert not any(fixed.keys() & some.keys() for some in [changes, *machine.tried])


@pytest.mark.parametrize("fixed", [{"n_embd": 36}, {"n_embd": 7}, {"n_head": 5}, {"n_embd": 30, "n_head": 3}])
def test_heads_and_width_go_together_whatever_is_set(fixed):
    for size in LADDER:
        found = auto.changes_of(size, fixed) | fixed
        assert found["n_embd"] % found["n_head"] == 0
        assert found["n_embd"] % (2 * found["n_head"]) == 0 or found["n_embd"] % 2


def test_the_schedule_fits_the_steps_that_there_is_time_for():
    changes, (said,) = auto.choose(63.0, {}, Machine(0.05, 10.0))
    steps = (63 - 3) / 0.05
    assert changes["warmup_iters"] == pytest.approx(auto.WARM_UP * steps, abs=1)
    assert changes["eval_interval"] == pytest.approx(steps / auto.EVALUATIONS, rel=0.1)
    assert "steps of 50 ms" in said and "and wants" in said


def test_the_ladder_climbs():
    for low, high in itertools.pairwise(LADDER):
        assert low.n_layer * low.n_embd**2 < high.n_layer * high.n_embd**2 and low.enough <= high.enough
    assert LADDER[0].enough == 0


def test_a_run_says_what_was_chosen_and_keeps_it_when_it_is_resumed(data_dir, tmp_path):
    folder = tmp_path / "run"
    words = ["config/auto.py", f"--out_dir={folder}", f"--data_dir={data_dir}", "--dataset=tiny"]
    words += ["--time_budget=6s", "--block_size=16", "--n_embd=16", "--device=cpu", "--eval_iters=1"]
    done = run_script("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nauto: ") == 1
    saved = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    settings = saved["settings"]
    assert settings["n_embd"] == 16 and settings["block_size"] == 16
    assert settings["n_layer"] == LADDER[0].n_layer and settings["optimizer"] == "muon"
    assert any(note.startswith("auto: ") for note in saved["decided"]["notes"])
    again = run_script("train.py", "--init_from=resume", f"--out_dir={folder}", "--time_budget=8s")
    assert again.returncode == 0, again.stderr
    assert "\nauto: " not in again.stdout
    after = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["settings"]
    assert after == settings | {"time_budget": "8s"}
    refused = run_script("train.py", *words)
    assert refused.returncode == 2 and "already holds a run" in refused.stderr


def test_auto_without_a_time_is_refused(tmp_path):
    done = run_script("train.py", "config/auto.py", "--time_budget=", f"--out_dir={tmp_path / 'run'}")
    assert done.returncode == 2 and "auto chooses for a time: give --time_budget=5m" in done.stderr
    assert not Path(tmp_path / "run").exists()
