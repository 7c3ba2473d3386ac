"""Damaged run folders: metrics, samples, settings.json, and embedding snapshots."""

import json

import numpy as np
import pytest
from damaged_files import edit_json, error_of
from faults import seeds

from fradique.checkpointing import embedding_snapshots, metrics_file, run_folder
from fradique.training import loss_plot
from lab import report
from model import GPTConfig

RECORD = {"step": 2, "loss": 1.5, "tokens": 10, "seconds": 1.0}


# metrics.jsonl


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "7",
        "null",
        '"x"',
        "{}",
        '{"step": "x", "loss": 1}',
        '{"step": 1, "loss": "x", "tokens": 1, "seconds": 1}',
        '{"step": 1, "loss": NaN, "tokens": 1, "seconds": 1}',
        '{"step": 1, "final_loss": 1.0, "seconds": 1, "final_bits_per_byte": {}}',
        '{"step": 1e999, "loss": 1, "tokens": 1, "seconds": 1}',
        '{"step": 1, "loss": 1e999999999, "tokens": 1, "seconds": 1}',
        "[" * 100_000,
        "9" * 100_000,
        "\ud800",
        "\x00",
    ],
    ids=lambda line: ascii(line[:40]),
)
def test_an_invalid_line_of_metrics_is_skipped(tmp_path, line):
    text = f"{line}\n{json.dumps(RECORD)}\n"
    (tmp_path / metrics_file.METRICS_FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert metrics_file.read_metrics(tmp_path) == [RECORD]
    metrics_file.rewind_metrics(tmp_path, 2)
    assert metrics_file.read_metrics(tmp_path) == [RECORD]


def test_incomplete_records_are_left_out_of_plots(tmp_path):
    records = [{"step": 1, "loss": 1.0}, {"step": 1, "eval_val_loss": 1.0, "tokens": 1, "seconds": 1}]
    records += [{"step": 1, "final_loss": 1.0}, RECORD, RECORD | {"tokens": 20, "seconds": 2.0}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / metrics_file.METRICS_FILE).write_text(text)
    curves = loss_plot.read_curves(tmp_path)
    assert curves.batch["loss"].tolist() == [1.5, 1.5]
    assert not curves.evaluated["val"].size
    metrics = metrics_file.read_metrics(tmp_path)
    assert len(metrics) == 5
    assert report.speed_section(metrics, {"decided": {"notes": 7}, "versions": {}, "git_commit": None})


@pytest.mark.parametrize("loss", [10**30, 1e308, -(10**30)])
def test_a_loss_whose_perplexity_overflows_is_reported(loss):
    records = [{"step": 4, "seconds": 1.0, "final_loss": loss}]
    assert "perplexity" in report.summary(records, GPTConfig(n_layer=1, n_head=1, n_embd=8), 1)


# Other files


def test_invalid_bytes_in_samples_are_skipped(tmp_path):
    (tmp_path / metrics_file.SAMPLES_FILE).write_bytes(
        b"\xff=== step 1 ===\n=== step 2 ===\num\xff\n\n=== step " + b"9" * 5000 + b" ===\n"
    )
    assert [step for step, _ in metrics_file.read_samples(tmp_path)] == [2]


@pytest.mark.parametrize("key", ["settings", "decided", "versions"])
@pytest.mark.parametrize("value", [[], None, "x", 7])
def test_settings_json_with_a_value_of_the_wrong_type_is_refused(run, key, value):
    edit_json(run / "settings.json", key, to=value)
    error_of(run_folder.run_metadata, run, match=run / "settings.json")


@pytest.mark.parametrize(
    "array", [np.zeros(3, np.float16), np.zeros((2, 0), np.float16), np.full((2, 2), np.nan, np.float16)]
)
def test_a_snapshot_that_is_not_a_table_of_numbers_is_refused(tmp_path, array):
    (tmp_path / embedding_snapshots.SNAPSHOT_FOLDER).mkdir()
    path = tmp_path / embedding_snapshots.SNAPSHOT_FOLDER / "step-1.safetensors"
    path.write_bytes(seeds.to_safetensors({"tokens": array}))
    assert "delete it" in error_of(embedding_snapshots.read_snapshots, tmp_path, match=path)


def test_snapshots_of_different_sizes_are_refused(tmp_path):
    folder = tmp_path / embedding_snapshots.SNAPSHOT_FOLDER
    folder.mkdir()
    for step, rows in ((1, 4), (2, 5)):
        table = seeds.floats(rows, 8).astype(np.float16)
        (folder / f"step-{step}.safetensors").write_bytes(seeds.to_safetensors({"tokens": table}))
    error_of(embedding_snapshots.read_snapshots, tmp_path, match="step-2.safetensors")
