"""lab.journey: runs are trained, resumed or reused, and then compared."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import run_forked, run_script, run_training

from configurator import command
from fradique.checkpointing import metrics_file

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")

from lab import common, journey

SMALL_CONFIG = """
data_dir = {data!r}
dataset = "tiny"
out_dir = {out!r}
n_layer = 1
n_head = 2
n_embd = {width}
block_size = 16
batch_size = 4
gradient_accumulation_steps = 1
max_iters = 6
eval_interval = 3
eval_iters = 2
warmup_iters = 1
compile = False
device = "cpu"
"""


@pytest.fixture
def configs(data_dir, tmp_path):
    """The paths of two configs: models of width 8 and 16."""
    paths = []
    for width in (8, 16):
        path = tmp_path / f"wide{width}.py"
        out = str(tmp_path / f"wide-{width}")
        path.write_text(SMALL_CONFIG.format(data=str(data_dir), out=out, width=width), encoding="utf-8")
        paths.append(path)
    return paths


@pytest.fixture
def run_journey(monkeypatch, capsys):
    """A function that runs lab.journey in this process; its runs of train.py are forks."""
    monkeypatch.setattr(journey, "subprocess", SimpleNamespace(run=run_forked))

    def run(*arguments):
        own_flags, configs, train_flags = journey.split_arguments([*map(str, arguments)])
        main = lambda resolved: journey.main(resolved, configs, train_flags)  # noqa: E731
        status = command(main, journey.JourneySettings, own_flags)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run


def test_runs_are_trained_once_and_compared(configs, run_journey, tmp_path):
    to, arrays = tmp_path / "pictures" / "journey", tmp_path / "x.npz"
    options = [*configs, f"--to={to}", f"--save_arrays={arrays}"]
    result = run_journey(*options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("python train.py ") >= 2 and "is already trained" not in result.stdout
    for name in ("wide-8", "wide-16"):
        records = metrics_file.read_metrics(tmp_path / name)
        best = min(record["eval_val_loss"] for record in records if "eval_val_loss" in record)
        assert f"| {name} |" in result.stdout and f"| {best:.3f} |" in result.stdout
    assert to.with_suffix(".png").exists() and to.with_suffix(".html").exists()
    columns = np.load(arrays)
    assert columns["parameters"][0] < columns["parameters"][1]
    assert columns["name"].tolist() == ["wide-8", "wide-16"]
    metrics_before = (tmp_path / "wide-8" / metrics_file.METRICS_FILE).read_bytes()
    result = run_journey(*options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is already trained") == 2
    assert (tmp_path / "wide-8" / metrics_file.METRICS_FILE).read_bytes() == metrics_before


def test_an_interrupted_run_is_resumed(configs, tmp_path):
    """The command, and train.py in a new process."""
    result = run_script("train.py", configs[0])
    assert result.returncode == 0, result.stderr
    path = tmp_path / "wide-8" / metrics_file.METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(line + "\n" for line in lines if "final_loss" not in line), encoding="utf-8")
    result = run_script("lab.journey", configs[0], f"--to={tmp_path / 'x'}")
    assert result.returncode == 0, result.stderr
    assert "--init_from=resume" in result.stdout
    assert "final_loss" in json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def test_a_run_with_different_settings_is_refused(configs, run_journey, tmp_path):
    options = [configs[0], f"--to={tmp_path / 'x'}"]
    assert run_journey(*options).returncode == 0
    result = run_journey(*options, "--max_iters=3")
    assert result.returncode == 2
    assert "other settings (max_iters was 6 and is 3 now). Move that folder" in result.stderr
    result = run_journey(*options, "--max_iters=3", "--overwrite=True")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "wide-8" / "settings.json").read_text())["settings"]["max_iters"] == 3


def test_errors_are_reported_before_any_training(configs, tmp_path):
    result = run_script("lab.journey")
    assert result.returncode == 2 and "no configs to compare" in result.stderr
    result = run_script("lab.journey", configs[0], configs[0])
    assert result.returncode == 2 and "several configs have the same out_dir" in result.stderr
    result = run_script("lab.journey", configs[0], "--n_layers=3")
    assert result.returncode == 2 and "n_layer" in result.stderr
    assert not (tmp_path / "wide-8").exists()
    result = run_script("lab.journey", configs[0], "--dataset=nothing")
    assert result.returncode == 2 and "failed with status 2; see its message above" in result.stderr


def test_a_result_has_the_values_in_the_metrics(settings):
    run_training(settings)
    folder = Path(settings.out_dir)
    (folder / metrics_file.METRICS_FILE).write_text(
        "".join(
            json.dumps(record) + "\n"
            for record in [
                {"step": 0, "eval_train_loss": 3.0, "eval_val_loss": 3.1, "tokens": 0, "seconds": 0.0},
                {"step": 5, "eval_train_loss": 2.0, "eval_val_loss": 2.2, "tokens": 5, "seconds": 1.0},
                {"step": 10, "eval_train_loss": 1.5, "eval_val_loss": 2.4, "tokens": 10, "seconds": 2.0},
                {"step": 10, "final_loss": 2.25, "final_bits_per_byte": 3.25, "seconds": 2.5},
            ]
        ),
        encoding="utf-8",
    )
    result = journey.read_result(folder)
    assert (result.best_step, result.best_val_loss, result.train_loss) == (5, 2.2, 2.0)
    assert (result.loss, result.bits_per_byte, result.seconds) == (2.25, 3.25, 2.5)


def test_samples_cannot_break_the_table():
    result = journey.RunResult("a", 1000, 2.0, 1.9, 5, 2.1, 3.0, 75.3, "x | y\nz")
    rows = journey.table_rows([result, replace(result, name="b")])
    row = common.markdown_table(journey.TABLE_HEADER, rows).splitlines()[2]
    assert row == "| a | 1k | 2.000 | 3.000 | 5 | 1m15s | x␣\\|␣y⏎z |"
