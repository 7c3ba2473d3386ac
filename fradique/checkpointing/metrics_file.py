"""Read and rewind metrics.jsonl, the log of a run, and samples.txt, its generated text."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fradique.io import files

METRICS_FILE, SAMPLES_FILE, WANDB_ID_FILE = "metrics.jsonl", "samples.txt", "wandb_id.txt"
SAMPLE_HEADER = "=== step {step} ===\n"
SAMPLE_START = re.compile(r"^=== step ([0-9]{1,18}) ===\n", re.MULTILINE)
NUMERIC_FIELDS = (
    "tokens",
    "seconds",
    "loss",
    "eval_train_loss",
    "eval_val_loss",
    "final_loss",
)  # of a record


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first."""
    return list(iterate_metrics(folder))


def iterate_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run one at a time, oldest first.

    Lines that are not valid records are skipped, such as a last line that a crash cut short.
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
    """Whether `record` is an object with a step, and its numeric fields are finite numbers."""
    if not isinstance(record, dict) or not files.is_count(record.get("step")):
        return False
    bits = record.get("final_bits_per_byte")  # null if the number of bytes of the text is unknown
    return (bits is None or _is_number(bits)) and all(
        _is_number(record[name]) for name in NUMERIC_FIELDS if name in record
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def rewind_metrics(folder: Path, step: int) -> None:
    """Remove records and samples after `step`, and the final ones: a resumed run writes them again."""
    records = read_metrics(folder)
    finished = any("final_loss" in record and record["step"] == step for record in records)
    earlier_records = [record for record in records if record["step"] <= step and "final_loss" not in record]
    files.write_text(folder / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in earlier_records))
    if (folder / SAMPLES_FILE).exists():
        samples = read_samples(folder)
        if finished and samples and samples[-1][0] == step:
            samples.pop()  # the final sample
        kept_text = (SAMPLE_HEADER.format(step=n) + text for n, text in samples if n <= step)
        files.write_text(folder / SAMPLES_FILE, "".join(kept_text))


def read_samples(folder: Path) -> list[tuple[int, str]]:
    """The samples of a run as (step, text), oldest first."""
    path = folder / SAMPLES_FILE
    parts = SAMPLE_START.split("".join(_read_lines(path)))
    return [(int(step), text) for step, text in zip(parts[1::2], parts[2::2], strict=True)]
