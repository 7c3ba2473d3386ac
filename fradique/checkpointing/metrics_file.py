"""Read and rewind metrics.jsonl (the log of a run) and samples.txt (the text that the model generated).

Rewinding removes what a run wrote after the step from which it resumes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fradique.io import files

METRICS_FILE, SAMPLES_FILE, WANDB_ID_FILE = "metrics.jsonl", "samples.txt", "wandb_id.txt"
SAMPLE_HEADER = "=== step {step} ===\n"
SAMPLE_HEADER_LINE = re.compile(r"^=== step ([0-9]{1,18}) ===(\r?)\n", re.MULTILINE)
# Fields of a record that must be numbers if they are present.
NUMERIC_FIELDS = ("tokens", "seconds", "loss", "eval_train_loss", "eval_val_loss", "final_loss")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The valid records of a run, oldest first."""
    return list(iterate_metrics(folder))


def iterate_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The valid records of a run one at a time, oldest first.

    Other lines are skipped: a crash can leave an incomplete last line.
    """
    for line in _read_lines(folder / METRICS_FILE):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_record(record):
            yield record


def _read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file; none if it does not exist. Bytes that are not UTF-8 become U+FFFD."""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from file


def _is_record(record: Any) -> bool:
    """Whether `record` is a dict with a step, and its numeric fields are finite numbers."""
    if not isinstance(record, dict) or not files.is_count(record.get("step")):
        return False
    bits_per_byte = record.get("final_bits_per_byte")  # None if the number of bytes of the text is unknown
    if bits_per_byte is not None and not _is_finite_number(bits_per_byte):
        return False
    return all(_is_finite_number(record[name]) for name in NUMERIC_FIELDS if name in record)


def _is_finite_number(value: Any) -> bool:
    """Whether `value` is a finite int or float (not a bool) that fits into a float."""
    return type(value) in (int, float) and abs(value) < 1e300


def rewind_metrics(folder: Path, step: int) -> None:
    """Remove the records and samples after `step`, and those of the end of the run.

    A finished run ends with a record that has the field final_loss, and with a final sample. A run that
    resumes at `step` writes them again.
    """
    records = read_metrics(folder)
    finished_at_step = any("final_loss" in record and record["step"] == step for record in records)
    kept_records = [record for record in records if record["step"] <= step and "final_loss" not in record]
    files.write_text(folder / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in kept_records))
    if (folder / SAMPLES_FILE).exists():
        preface, samples = _split_samples(folder)
        kept_samples = [(n, text) for n, text in samples if n <= step]
        if finished_at_step and kept_samples and kept_samples[-1][0] == step:
            kept_samples.pop()  # the final sample
        kept_text = "".join(SAMPLE_HEADER.format(step=n) + text for n, text in kept_samples)
        files.write_text(folder / SAMPLES_FILE, preface + kept_text)


def set_aside_evaluations(folder: Path) -> None:
    """Rename the losses of all evaluations so far, which are of other text than the next ones.

    eval_val_loss becomes eval_val_loss_before. Curves and tables then show only losses that can be compared.
    """
    records = [
        {
            f"{key}_before" if key in ("eval_train_loss", "eval_val_loss") else key: value
            for key, value in record.items()
        }
        for record in read_metrics(folder)
    ]
    files.write_text(folder / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in records))


def read_samples(folder: Path) -> list[tuple[int, str]]:
    """The samples of a run as (step, text), oldest first."""
    return _split_samples(folder)[1]


def _split_samples(folder: Path) -> tuple[str, list[tuple[int, str]]]:
    """The text before the first sample, and the samples.

    Lines may end in CRLF, because older versions wrote them so on Windows.
    """
    text = "".join(_read_lines(folder / SAMPLES_FILE))
    preface, *parts = SAMPLE_HEADER_LINE.split(text)  # parts: step, "" or CR, sample, step, ...
    samples = []
    for step, carriage_return, sample in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        samples.append((int(step), sample.replace("\r\n", "\n") if carriage_return else sample))
    return preface, samples
