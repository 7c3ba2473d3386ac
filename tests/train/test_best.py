"""The best checkpoint of a run that is resumed: on another corpus, on other windows, or without best/."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support import flags, make_text, run_ranks, run_training, same_folder, stop_at, write_corpus

from fradique.checkpointing import checkpoint, metrics_file
from fradique.pretrained import loader
from fradique.training import evaluation, loss_plot, outputs, setup


def best_state(folder):
    return checkpoint.read_checkpoint_metadata(Path(folder) / "best").state


def loss_of(settings, folder):
    """The validation loss of the weights in a checkpoint folder, on the windows of `settings`."""
    t = setup.setup_training(replace(settings, init_from=str(folder), eval_only=True))
    try:
        return evaluation.estimate_loss(t)["val"].loss
    finally:
        t.close()


@pytest.fixture
def finished(settings):
    """A run of 20 steps whose best step is the last one."""
    run_training(settings)
    assert best_state(settings.out_dir)["step"] == 20
    return settings


def copy_of_corpus(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    return tmp_path / "data"


def another_corpus(settings, tmp_path):
    """Another text with the same characters, under another name."""
    data = copy_of_corpus(Path(settings.data_dir), tmp_path)
    write_corpus(data / "other", make_text(2000, seed=1)[::-1])
    return {"data_dir": str(data), "dataset": "other"}


def prepared_again(settings, tmp_path):
    """Another text with the same characters, under the same name."""
    data = copy_of_corpus(Path(settings.data_dir), tmp_path)
    write_corpus(data / "tiny", make_text(2000, seed=1)[::-1])
    return {"data_dir": str(data)}


CHANGES = {
    "another corpus": another_corpus,
    "prepared again": prepared_again,
    "eval_iters": lambda settings, tmp_path: {"eval_iters": 5},
    "batch_size": lambda settings, tmp_path: {"batch_size": 8},
    "another text for validation": lambda settings, tmp_path: {
        "data_dir": str(write_corpus(tmp_path / "data" / "tiny", make_text(2000), 0.2).parent)
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_on_another_yardstick_the_best_is_evaluated_again(finished, tmp_path, capsys, change):
    before = best_state(finished.out_dir)
    shutil.copytree(Path(finished.out_dir) / "best", tmp_path / "best")
    changed = replace(finished, max_iters=25, **CHANGES[change](finished, tmp_path))
    capsys.readouterr()
    _, t = run_training(replace(changed, init_from="resume"))
    output = capsys.readouterr().out
    expected = loss_of(changed, tmp_path / "best")
    assert expected != before["best_val_loss"]
    message = f"the best weights, of step 20, have the validation loss {expected:.4f} now, and had "
    assert f"{message}{before['best_val_loss']:.4f} before" in output
    assert t.state.eval_fingerprint != before["eval_fingerprint"]
    # step 20 is evaluated again on the new windows, and is no better than itself
    records = metrics_file.read_metrics(t.folder)
    again = [r for r in records if r["step"] == 20 and "eval_val_loss" in r]
    assert [r["eval_val_loss"] for r in again] == [pytest.approx(expected, abs=1e-6)]
    # curves have only losses that can be compared; the others keep another name
    curves = loss_plot.read_curves(t.folder).evaluated
    assert curves["step"].tolist() == [20, 25]
    assert [r["step"] for r in records if "eval_val_loss_before" in r] == [0, 5, 10, 15, 20]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 26))
    records = {
        r["step"]: r["eval_val_loss"] for r in metrics_file.read_metrics(t.folder) if "eval_val_loss" in r
    }
    best_step = 25 if records[25] < expected else 20
    assert t.state.best_step == best_state(t.folder)["step"] == best_step
    assert t.state.best_val_loss == pytest.approx(min(records[25], expected), abs=1e-9)


def test_the_weights_continue_unchanged_after_the_evaluation_of_the_best(finished, tmp_path):
    """The best weights are in the model only during their evaluation."""
    for name in ("a", "b"):
        shutil.copytree(finished.out_dir, tmp_path / name)
    settings = replace(finished, max_iters=25, init_from="resume", lr_decay_iters=20)
    run_training(replace(settings, out_dir=str(tmp_path / "a")))
    run_training(replace(settings, out_dir=str(tmp_path / "b"), eval_iters=5))
    assert same_folder(tmp_path / "a" / "step-00000025", tmp_path / "b" / "step-00000025")


def test_a_best_of_other_windows_is_evaluated_again(finished, tmp_path, capsys):
    """A best/ from before the corpus was prepared again was put back."""
    shutil.copytree(Path(finished.out_dir) / "best", tmp_path / "best")
    changed = replace(finished, init_from="resume", max_iters=25, **prepared_again(finished, tmp_path))
    run_training(changed)
    shutil.rmtree(Path(finished.out_dir) / "best")
    shutil.copytree(tmp_path / "best", Path(finished.out_dir) / "best")
    capsys.readouterr()
    _, t = run_training(replace(changed, max_iters=26))
    expected = loss_of(changed, tmp_path / "best")
    before = best_state(tmp_path)["best_val_loss"]
    message = f"step 20, have the validation loss {expected:.4f} now, and had {before:.4f} before"
    assert message in capsys.readouterr().out
    assert t.state.best_val_loss <= expected and t.state.evals_since_best <= 1


def test_early_stopping_counts_anew_on_another_yardstick(settings, tmp_path):
    settings = replace(settings, learning_rate=0.3, lr_schedule="constant", warmup_iters=0, max_iters=40)
    settings = replace(settings, eval_interval=2, keep_checkpoints=20)
    _, t = run_training(settings)
    assert t.state.evals_since_best > 3
    changed = replace(settings, init_from="resume", max_iters=60, early_stop_evals=3)
    changed = replace(changed, **prepared_again(settings, tmp_path))
    _, t = run_training(changed)
    assert t.state.step > 42


@pytest.mark.parametrize("init", ["resume", "same corpus"])
def test_on_the_same_yardstick_nothing_is_said(finished, tmp_path, capsys, init):
    data = copy_of_corpus(Path(finished.data_dir), tmp_path) if init != "resume" else finished.data_dir
    before = best_state(finished.out_dir)
    _, t = run_training(replace(finished, init_from="resume", data_dir=str(data), max_iters=21))
    captured = capsys.readouterr()
    assert "earlier evaluations" not in captured.out and "best/" not in captured.out + captured.err
    assert t.state.eval_fingerprint == before["eval_fingerprint"]


def test_a_run_of_an_older_version_keeps_its_best(finished, capsys):
    """Its state.json has no fingerprint."""
    for folder in [*checkpoint.step_folders(Path(finished.out_dir)), Path(finished.out_dir) / "best"]:
        saved = checkpoint.read_checkpoint(folder)
        for name in ("eval_fingerprint", "learning_rate"):
            del saved.state[name]
        checkpoint.write_checkpoint(folder, saved)
    capsys.readouterr()
    _, t = run_training(replace(finished, init_from="resume", max_iters=21, eval_iters=5))
    assert "earlier evaluations" not in capsys.readouterr().out
    assert t.state.best_val_loss <= best_state(finished.out_dir)["best_val_loss"]


# best/ is newer, older, missing or damaged


def remove_newest(folder):
    shutil.rmtree(checkpoint.step_folders(Path(folder))[-1])


def test_the_step_of_best_itself_is_told(finished, capsys):
    """The newest step folder is gone, and the run is resumed with fewer steps than best/ has."""
    remove_newest(finished.out_dir)
    capsys.readouterr()
    run_training(replace(finished, init_from="resume", max_iters=17))
    output = capsys.readouterr().out
    assert "where step 15 was the best, and best/ has the weights of step 20" in output
    assert "(best weights, of step 20)" in output
    final = metrics_file.read_metrics(Path(finished.out_dir))[-1]
    assert final["step"] == 17 and final["best_step"] == 20
    t = setup.setup_training(
        replace(finished, init_from=str(Path(finished.out_dir) / "best"), eval_only=True)
    )
    assert final["final_loss"] == pytest.approx(evaluation.evaluate_val_split(t).loss, abs=1e-6)
    t.close()


def test_an_older_best_is_told_and_used(finished, tmp_path, capsys):
    best = Path(finished.out_dir) / "best"
    older = checkpoint.read_checkpoint(checkpoint.step_folders(Path(finished.out_dir))[0])
    assert older.state["step"] == 15
    checkpoint.write_checkpoint(best, older)
    capsys.readouterr()
    _, t = run_training(replace(finished, init_from="resume"))
    output = capsys.readouterr().out
    assert "where step 20 was the best, and best/ has the weights of step 15" in output
    assert "(best weights, of step 15)" in output and t.state.best_val_loss == older.state["best_val_loss"]


@pytest.mark.parametrize("damage", ["missing", "damaged", "of another run", "no state"])
def test_a_missing_best_is_told_at_the_start(finished, capsys, damage):
    """The run ends with its last weights, which are the best that are left."""
    best = Path(finished.out_dir) / "best"
    if damage == "missing":
        shutil.rmtree(best)
    elif damage == "damaged":
        (best / "model.safetensors").write_bytes(b"x")
    elif damage == "no state":
        (best / "state.json").unlink()
    else:
        checkpoint.write_checkpoint(best, replace(checkpoint.read_checkpoint(best), run_id="other"))
    capsys.readouterr()
    run_training(replace(finished, init_from="resume"))
    captured = capsys.readouterr()
    assert "the best weights so far, of step 20, are lost" in captured.err and str(best) in captured.err
    assert "(best weights, of step 20)" in captured.out and loader.load_weights(finished.out_dir).tensors
    assert metrics_file.read_metrics(Path(finished.out_dir))[-1]["best_step"] == 20


def test_a_lost_best_is_written_again_by_the_next_evaluation(finished, capsys):
    shutil.rmtree(Path(finished.out_dir) / "best")
    _, t = run_training(replace(finished, init_from="resume", max_iters=25))
    assert t.state.best_step == best_state(finished.out_dir)["step"] == 25
    assert loader.load_weights(finished.out_dir).config.n_layer == 2


def test_a_best_that_is_deleted_during_the_run_ends_it_with_a_warning(settings, monkeypatch, capsys):
    load = outputs.load_best_weights

    def delete_first(t):
        shutil.rmtree(t.folder / "best")
        return load(t)

    monkeypatch.setattr(outputs, "load_best_weights", delete_first)
    status, _ = run_training(settings)
    captured = capsys.readouterr()
    assert status == 0
    assert "best weights cannot be used" in captured.err and "(last weights, of step 20)" in captured.out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_evaluate_the_best_again_together(settings, tmp_path, parallel):
    settings = replace(settings, max_iters=5, gradient_accumulation_steps=2, parallel=parallel)
    assert run_ranks(2, *flags(settings)).returncode == 0
    before = best_state(settings.out_dir)["best_val_loss"]
    shutil.copytree(Path(settings.out_dir) / "best", tmp_path / "best")
    arguments = ["--init_from=resume", f"--out_dir={settings.out_dir}", "--eval_iters=5", "--max_iters=6"]
    result = run_ranks(2, *arguments)
    assert result.returncode == 0, result.stderr
    expected = loss_of(replace(settings, eval_iters=5, parallel="ddp"), tmp_path / "best")
    assert expected != before
    assert f"have the validation loss {expected:.4f} now, and had {before:.4f} before" in result.stdout


# The learning rate


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learning_rate": 1e-3}, True),
        ({"learning_rate": 2e-2}, True),
        ({"max_iters": 400}, True),
        ({"decay_lr": False}, True),
        ({"lr_schedule": "constant"}, True),
        ({"learning_rate": 1.01e-2}, False),
        ({"max_iters": 40, "lr_decay_iters": 20}, False),
        ({"dropout": 0.2}, False),
    ],
)
def test_a_jump_of_the_learning_rate_is_reported(settings, monkeypatch, capsys, change, expected):
    stop_at(monkeypatch, 10)
    run_training(settings)
    monkeypatch.undo()
    records = metrics_file.read_metrics(Path(settings.out_dir))
    last_rate = [r["lr"] for r in records if "lr" in r][-1]
    capsys.readouterr()
    stop_at(monkeypatch, 11)
    run_training(replace(settings, **change, init_from="resume"))
    output = capsys.readouterr().out
    assert ("the learning rate jumps" in output) == expected and "Muon" not in output
    if expected:
        assert f"step 11 was made with {last_rate:.2e}, and these settings" in output


@pytest.mark.parametrize(("rate", "expected"), [(0.9, True), (0.02, False), (0.0201, False)])
def test_a_jump_of_muons_learning_rate_is_reported(settings, monkeypatch, capsys, rate, expected):
    settings = replace(settings, optimizer="muon", muon_learning_rate=0.02)
    stop_at(monkeypatch, 10)
    run_training(settings)
    monkeypatch.undo()
    stop_at(monkeypatch, 11)
    run_training(replace(settings, muon_learning_rate=rate, init_from="resume"))
    output = capsys.readouterr().out
    assert ("Muon's learning rate jumps" in output) == expected and "the learning rate jumps" not in output
