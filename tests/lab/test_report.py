"""The report of a run is complete, small and self-contained."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import run_lab, run_training

from fradique.checkpointing import metrics_file

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")
pytest.importorskip("sklearn", reason="t-SNE and PCA need scikit-learn")

from lab import common, report
from model import GPTConfig

SECTIONS = [
    "Settings",
    "Loss curves",
    "Samples during training",
    "Loss of each token of a text",
    "Most probable tokens after the text",
    "Attention weights",
    "Embeddings",
    "Embeddings during training",
    "Architecture",
    "Speed and machine",
]


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_report_is_complete_and_self_contained(settings, position):
    settings = replace(settings, position=position, sample_interval=10, snapshot_interval=5)
    run_training(settings)
    folder = Path(settings.out_dir)
    result = run_lab("lab.report", f"--out_dir={folder}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"wrote {folder / 'report.html'}\n"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2 id=[^>]*>([^<]*)</h2>", text) == SECTIONS
    for anchor in re.findall(r'<a href="#([^"]*)"', text):
        assert f'id="{anchor}"' in text
    assert len(text.encode()) < 15e6
    body = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', body)  # nothing is loaded from the network
    assert "data:image/gif;base64," in body and "<td>n_layer</td><td>2</td><td>12</td>" in body
    final = metrics_file.read_metrics(folder)[-1]
    assert f"loss {final['final_loss']:.4f}" in body
    assert not list(folder.glob(".report*"))


@pytest.mark.parametrize(("tokens", "part"), [(900, "whole validation split"), (256, "256 tokens of the")])
def test_the_report_says_on_which_text_the_loss_is(tokens, part):
    final = {"step": 5, "final_loss": 2.0, "final_bits_per_byte": 3.0, "seconds": 9.0}
    measured = {"final_tokens": tokens, "final_split_tokens": 900}
    assert part in report.summary([final | measured], GPTConfig(), 1000)
    assert "whole validation split" in report.summary([final], GPTConfig(), 1000)  # an older run


def test_the_report_says_which_data_are_missing(settings):
    run_training(replace(settings, position="rope"))
    folder = Path(settings.out_dir)
    (folder / metrics_file.SAMPLES_FILE).unlink()
    result = run_lab("lab.report", f"--out_dir={folder}", "--start=ola")
    assert result.returncode == 0, result.stderr
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "The run has no samples" in text and "train with snapshots: --snapshot_interval=50" in text


def test_without_samples_the_report_analyzes_validation_text(settings, data_dir, capsys):
    run_training(replace(settings, max_iters=1))
    report_settings = report.ReportSettings(out_dir=settings.out_dir)
    loaded = common.open_model(report_settings)
    ids = report.text_to_analyze(loaded, report_settings, samples=[])
    val_text = loaded.tokenizer.decode(np.fromfile(data_dir / "tiny" / "val.bin", "<u2"))
    assert 1 < len(ids) <= 16 and loaded.tokenizer.decode(ids) in val_text
    assert "prompt, the beginning of the run's validation text: " in capsys.readouterr().out


def test_a_report_without_a_run_is_refused(settings, tmp_path):
    result = run_lab("lab.report", f"--out_dir={tmp_path / 'nothing'}")
    assert result.returncode == 2 and "no trained model in" in result.stderr
    result = run_lab("lab.report", "--init_from=gpt2")
    assert result.returncode == 2 and "a report needs a run folder" in result.stderr


def test_only_the_last_of_two_samples_of_one_step_is_open():
    """A run that ends at a multiple of sample_interval has two samples of its last step."""
    _, parts = report.samples_section([(10, "a"), (20, "b"), (20, "c")])
    assert ["<details open" in part for part in parts] == [False, False, True]


def test_the_speed_is_that_of_training_without_pauses():
    """An evaluation between two records takes time, but not tokens per second."""
    records = [
        {"step": 10, "tokens": 1000, "seconds": 1.0, "tokens_per_second": 1000.0, "step_seconds": 0.1},
        {"step": 20, "tokens": 2000, "seconds": 9.0, "tokens_per_second": 1000.0, "step_seconds": 0.1},
    ]
    assert [value for _, value in report.speed_rows(records)] == ["1,000", "100 ms", "2,000"]
    assert report.speed_rows([{"step": 0, "eval_val_loss": 3.0}]) == []


def test_the_number_of_edges_is_limited():
    weights = np.tril(np.random.default_rng(0).random((4, 8, 40, 40)))
    threshold = report.edge_threshold(weights, max_edges=500)
    assert (weights >= threshold).sum() <= 501 and (weights > threshold).sum() >= 499
    assert report.edge_threshold(np.zeros((1, 1, 2, 2))) == report.attention.MIN_WEIGHT
