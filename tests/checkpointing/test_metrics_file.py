"""metrics.jsonl and samples.txt: reading, and rewinding when a run resumes."""

import json

from fradique.checkpointing import metrics_file


def test_a_line_truncated_by_a_crash_is_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert metrics_file.read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_rewinding_removes_later_records_and_samples(tmp_path):
    records = [{"step": step} for step in range(1, 6)]
    samples = [f"=== step {n} ===\ntext of {n}\n=== not a header\n\n\n" for n in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "samples.txt").write_text("".join(samples))
    metrics_file.rewind_metrics(tmp_path, 3)
    assert metrics_file.read_metrics(tmp_path) == records[:3]
    assert (tmp_path / "samples.txt").read_text() == "".join(samples[:3])
    metrics_file.rewind_metrics(tmp_path, 0)
    assert metrics_file.read_metrics(tmp_path) == [] and (tmp_path / "samples.txt").read_text() == ""


def test_rewinding_an_empty_folder_does_nothing(tmp_path):
    metrics_file.rewind_metrics(tmp_path, 5)
    assert metrics_file.read_metrics(tmp_path) == []
