import io
import json
import sys

import pytest

from fradique.checkpointing import metrics_file
from fradique.training import logger, time_budget


def log(folder, **changes):
    options = {"enabled": True, "total": 10, "unit": "step"} | changes
    return logger.RunLogger(folder, **options)


RECORD = {"step": 3, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 12345.0, "step_seconds": 0.01, "mfu": None}


def test_records_are_written_as_they_come_and_read_back(tmp_path):
    with_log = log(tmp_path)
    with_log.write(RECORD)
    assert metrics_file.read_metrics(tmp_path) == [RECORD]  # before it is closed
    with_log.write(RECORD | {"step": 4})
    with_log.close()
    assert [r["step"] for r in metrics_file.read_metrics(tmp_path)] == [3, 4]


def test_a_line_that_a_crash_cut_short_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert metrics_file.read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_rewind_forgets_what_came_after_the_step(tmp_path):
    with_log = log(tmp_path)
    for step in range(1, 6):
        with_log.write({"step": step})
        with_log.sample(step, f"text of {step}\n=== not a header\n")
    with_log.close()
    metrics_file.rewind_metrics(tmp_path, 3)
    assert [r["step"] for r in metrics_file.read_metrics(tmp_path)] == [1, 2, 3]
    samples = (tmp_path / "samples.txt").read_text()
    assert samples == "".join(f"=== step {n} ===\ntext of {n}\n=== not a header\n\n\n" for n in (1, 2, 3))
    metrics_file.rewind_metrics(tmp_path, 0)
    assert metrics_file.read_metrics(tmp_path) == [] and (tmp_path / "samples.txt").read_text() == ""


def test_rewinding_an_empty_folder_is_no_error(tmp_path):
    metrics_file.rewind_metrics(tmp_path, 5)
    assert metrics_file.read_metrics(tmp_path) == []


def test_other_ranks_are_silent_and_write_nothing(tmp_path, capsys):
    quiet = log(tmp_path, enabled=False)
    quiet.info("hello")
    quiet.warn("beware")
    quiet.write(RECORD)
    quiet.sample(1, "text")
    quiet.close()
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_without_a_terminal_progress_is_lines(tmp_path, capsys):
    plain = log(tmp_path)
    plain.show_record(3, RECORD)
    plain.close()
    assert capsys.readouterr().out == "step 3: loss 2.500, 12.3k tok/s, 10.0 ms/step, lr 1.00e-03\n"


def test_on_a_terminal_progress_is_a_bar_with_loss_speed_mfu_and_time(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    shown = log(tmp_path)
    shown.show_record(3, RECORD | {"mfu": 0.451})
    shown.bar.refresh()
    shown.close()
    assert "3/10 steps" in screen.getvalue()
    assert "loss 2.500, 12.3k tok/s, MFU 45.1%" in screen.getvalue()
    assert capsys.readouterr().out == ""


def test_a_full_disk_costs_lines_and_one_warning_and_not_the_run(tmp_path, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    broken = log(tmp_path)
    broken.file.close()
    broken.file = Full()
    for _ in range(3):
        broken.write(RECORD)
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written: [Errno 28]") == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), (" 2M ", 120), ("1h1m1s", 3661)],
)
def test_lengths_of_time_are_read(text, seconds):
    assert time_budget.parse_duration(text) == seconds


def test_no_length_of_time_is_none():
    assert time_budget.parse_duration("") is None


@pytest.mark.parametrize("text", ["soon", "0", "0s", "-5m", "10 m", "5d", "m", "1m1h", "nan", "inf"])
def test_what_is_no_length_of_time_is_refused(text):
    with pytest.raises(ValueError, match="is not a duration: write 90s, 10m or 1h30m"):
        time_budget.parse_duration(text)


def test_numbers_and_durations_are_short_to_read():
    assert [logger.format_count(n) for n in (0.5, 12, 1234, 1234567, 2.5e9, 3e12)] == [
        "0.5", "12", "1.23k", "1.23M", "2.5G", "3T",
    ]  # fmt: skip
    assert [time_budget.format_duration(s) for s in (1.234, 59.4, 75.3, 3600, 5430)] == [
        "1.2s",
        "59.4s",
        "1m15s",
        "1h00m",
        "1h30m",
    ]


def test_pace_counts_all_time_but_speed_without_what_is_aside(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    budget = time_budget.TimeBudget(started=90.0, limit=60.0)
    budget.resume(5.0, 0.0, 0.0)
    assert budget.elapsed() == 15.0
    budget.mark(0)
    now[0] += 4.0
    with budget.pause():
        now[0] += 10.0
    assert budget.seconds_per_step(8) == pytest.approx(0.5)
    now[0] += 1.0
    assert budget.seconds_per_step(9) == pytest.approx(1.0)
    assert budget.elapsed() == 30.0


def test_a_closing_longer_than_half_of_the_time_leaves_half_of_it_for_training():
    """It may have been foretold on a busy machine, or comes late in any case."""
    budget = time_budget.TimeBudget(started=0.0, limit=60.0)
    budget.training_began, budget.finish_seconds, budget.now = 20.0, 300.0, 39.0
    assert not budget.is_over() and budget.too_short and budget.training_ends == 40.0
    budget.now = 40.0
    assert budget.is_over()


def test_time_is_up_when_no_more_than_the_closing_is_left():
    budget = time_budget.TimeBudget(started=0.0, limit=60.0)
    budget.now, budget.finish_seconds = 50.0, 9.0
    assert not budget.is_over()
    budget.finish_seconds = 10.0
    assert budget.is_over()
    assert not time_budget.TimeBudget(0.0).is_over()


def test_metrics_are_json_that_any_reader_takes(tmp_path):
    with_log = log(tmp_path)
    with_log.write(RECORD | {"text": "poética"})
    with_log.close()
    for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN, no Infinity
