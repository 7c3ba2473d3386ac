"""The logger: lines, progress bar, metrics.jsonl."""

import io
import json
import re
import sys

import pytest

from fradique.checkpointing import metrics_file
from fradique.training import logger, time_budget


def log(folder, **changes):
    options = {"enabled": True, "total": 10, "unit": "step"} | changes
    return logger.RunLogger(folder, **options)


RECORD = {"step": 3, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 12345.0, "step_seconds": 0.01, "mfu": None}


def test_records_are_written_at_once_and_can_be_read_back(tmp_path):
    run_log = log(tmp_path)
    run_log.write(RECORD)
    assert metrics_file.read_metrics(tmp_path) == [RECORD]  # before it is closed
    run_log.write(RECORD | {"step": 4})
    run_log.close()
    assert [r["step"] for r in metrics_file.read_metrics(tmp_path)] == [3, 4]


def test_samples_are_appended_with_their_steps(tmp_path):
    run_log = log(tmp_path)
    for step in (1, 2):
        run_log.sample(step, f"text of {step}\n=== not a header\n")
    run_log.close()
    samples = (tmp_path / "samples.txt").read_text()
    assert samples == "".join(f"=== step {n} ===\ntext of {n}\n=== not a header\n\n\n" for n in (1, 2))
    assert metrics_file.read_samples(tmp_path)[1][0] == 2


def test_other_ranks_print_and_write_nothing(tmp_path, capsys):
    silent = log(tmp_path, enabled=False)
    silent.info("hello")
    silent.warn("beware")
    silent.write(RECORD)
    silent.sample(1, "text")
    silent.close()
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_without_a_terminal_each_record_is_printed_as_a_line(tmp_path, capsys):
    run_log = log(tmp_path)
    run_log.show_record(3, RECORD)
    run_log.close()
    assert capsys.readouterr().out == "step 3: loss 2.500, 12.3k tok/s, 10.0 ms/step, lr 1.00e-03\n"


def use_terminal(monkeypatch):
    """Replace stderr by a terminal that records its output."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


@pytest.fixture
def clock(monkeypatch):
    """A fake time.monotonic() for the logger: tests change the only element of the list."""
    seconds = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: seconds[0])
    return seconds


def test_the_bar_shows_loss_speed_mfu_and_time(tmp_path, monkeypatch, capsys):
    terminal = use_terminal(monkeypatch)
    run_log = log(tmp_path)
    run_log.show_record(3, RECORD | {"mfu": 0.451})
    run_log.close()
    assert "3/10 steps" in terminal.getvalue()
    assert "loss 2.500, 12.3k tok/s, MFU 45.1%" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_the_bar_moves_within_two_seconds_between_records(tmp_path, monkeypatch, clock):
    terminal = use_terminal(monkeypatch)
    run_log = log(tmp_path, total=1000)
    for step in range(1, 31):
        clock[0] += 0.5
        run_log.advance(step)
    run_log.close()
    positions = [int(n) for n in re.findall(r"(\d+)/1000 steps", terminal.getvalue())]
    assert sorted(set(positions)) == [0, *range(2, 31, 2)]  # a new position every second


def test_the_bar_of_a_time_budget_shows_seconds_and_ends_at_100(tmp_path, monkeypatch):
    terminal = use_terminal(monkeypatch)
    run_log = log(tmp_path, total=60.0, unit="s", start=0)
    run_log.show_record(57.3, RECORD)
    run_log.finish_bar()
    run_log.close()
    lines = [line for line in re.split(r"[\r\n]", terminal.getvalue()) if line.strip()]
    assert "57/60 s, loss 2.500" in terminal.getvalue() and not re.search(r"\d\d:\d\d", terminal.getvalue())
    assert lines[-1].startswith("100%") and "60/60 s" in lines[-1]


def test_a_full_disk_gives_one_warning_and_no_error(tmp_path, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    run_log = log(tmp_path)
    run_log.file.close()
    run_log.file = Full()
    for _ in range(3):
        run_log.write(RECORD)
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written: [Errno 28]") == 1


def test_numbers_and_durations_have_a_short_form():
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


def test_metrics_are_standard_json(tmp_path):
    run_log = log(tmp_path)
    run_log.write(RECORD | {"text": "poética"})
    run_log.close()
    for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN, no Infinity
