"""Whether a run is compiled, with a simulated compiler and simulated times of a pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import run_training, stop_at

from fradique.io import files
from fradique.training import compile_choice, setup
from fradique.training.trainer import TrainState


@pytest.fixture
def compiled(monkeypatch):
    """The models that were compiled, by a compiler that changes nothing."""
    models = []

    class Compiled(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            models.append(self)

        def forward(self, *arguments, **options):
            return self.model(*arguments, **options)

    monkeypatch.setattr(torch, "compile", Compiled)
    monkeypatch.setattr(compile_choice, "has_compiler", lambda: True)
    return models


def simulate_times(monkeypatch, plain, with_compiler=0.0):
    """A pass of the plain model takes `plain` seconds, of the compiled one `with_compiler`."""
    measured = setup.time_pass

    def time_pass(t, model):
        measured(t, model)
        return plain if model is t.model else with_compiler

    monkeypatch.setattr(setup, "time_pass", time_pass)


def set_up(settings, **changes):
    """A run's Trainer, closed, with compile=auto."""
    t = setup.setup_training(replace(settings, **{"compile": "auto", "overwrite": True} | changes))
    t.close()
    return t


def test_a_long_run_is_compiled_if_that_makes_it_faster(settings, monkeypatch, compiled, capsys):
    simulate_times(monkeypatch, plain=1.0, with_compiler=0.75)
    t = set_up(settings, max_iters=300)  # 300 passes of a second
    assert compiled == [t.forward] and t.state.compiled is True
    output = capsys.readouterr().out
    assert "compiling: training is long enough (about 5m00s) to save time" in output
    assert "compiled: a pass takes 750.0 ms instead of 1000.0" in output


def test_a_slower_compiled_model_is_dropped(settings, monkeypatch, compiled, capsys):
    simulate_times(monkeypatch, plain=1.0, with_compiler=1.0)
    t = set_up(settings, max_iters=300)
    assert len(compiled) == 1 and t.forward is t.model and t.state.compiled is False
    assert "not compiled after all: a pass would take 1000.0 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_iters": 299}, "training is too short (about 4m59s) to save time"),
        # two passes of a micro-batch each per step
        ({"max_iters": 140, "gradient_accumulation_steps": 2}, "too short (about 4m40s)"),
        ({"max_iters": 10**6, "time_budget": "299s"}, "training is too short (about 4m5"),
    ],
)
def test_a_short_run_is_not_compiled(settings, monkeypatch, compiled, capsys, changes, reason):
    simulate_times(monkeypatch, plain=1.0)
    t = set_up(settings, **changes)
    assert compiled == [] and t.forward is t.model and t.state.compiled is False
    assert reason in capsys.readouterr().out


def test_a_time_budget_decides_whatever_a_pass_takes(settings, monkeypatch, compiled):
    simulate_times(monkeypatch, plain=1e-6, with_compiler=1e-7)
    assert set_up(settings, time_budget="20m").forward in compiled


def test_nothing_is_compiled_without_a_compiler(settings, monkeypatch, compiled, capsys):
    simulate_times(monkeypatch, plain=10.0)
    monkeypatch.setattr(compile_choice, "has_compiler", lambda: False)
    assert set_up(settings, max_iters=10**6).state.compiled is False
    assert compiled == [] and "not compiling: no C++ compiler found" in capsys.readouterr().out


@pytest.mark.parametrize("setting", [True, False])
def test_the_setting_decides_if_it_is_given(settings, monkeypatch, compiled, setting):
    monkeypatch.setattr(compile_choice, "is_worthwhile", None)  # it is not asked
    monkeypatch.setattr(compile_choice, "compare_passes", None)
    t = set_up(settings, compile=setting)
    assert len(compiled) == setting and t.state.compiled is setting


@pytest.mark.parametrize("fast", [True, False])
def test_a_resumed_run_keeps_the_choice(settings, monkeypatch, compiled, fast):
    """Compiled or not differs in the last bits, and another process could measure other times."""
    simulate_times(monkeypatch, plain=1e3 if fast else 1e-3, with_compiler=1e-3)
    settings = replace(settings, compile="auto")
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        run_training(settings)
    newest = max(Path(settings.out_dir).glob("step-*"))
    assert files.read_json_object(newest / "state.json")["compiled"] is fast
    simulate_times(monkeypatch, plain=1e-3 if fast else 1e3, with_compiler=1e-3)
    monkeypatch.setattr(compile_choice, "is_worthwhile", None)  # it is not asked again
    run_training(replace(settings, init_from="resume"))
    assert len(compiled) == 2 * fast


@pytest.mark.parametrize("value", [1, "yes", 0.5, [True]])
def test_a_damaged_choice_is_found(value):
    with pytest.raises(ValueError, match=r"compiled = .*use an earlier checkpoint"):
        TrainState.read({"step": 1, "compiled": value})
    assert TrainState.read({"step": 1}).compiled is None  # of an older version
