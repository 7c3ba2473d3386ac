"""TODO."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fradique.io import files

METRICS_FILE, SAMPLES_FILE, WANDB_ID_FILE = "metrics.jsonl", "samples.txt", "wandb_id.txt"
SAMPLE_HEADER = "=== step {step} ===\n"
SAMPLE_START = re.compile(r"^=== step ([0-9]{1,18}) ===\n", re.MULTILINE)
NUMBERS = ("tokens", "seconds", "loss", "eval_train_loss", "eval_val_loss", "final_loss")  # in a record


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first."""
    return list(iterate_metrics(folder))


def iterate_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """One after another: those of a long run are many. A last line that a crash cut short, and any other that
    is no record of ours, is passed over."""
    for line in _lines(folder / METRICS_FILE):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_record(record):
            yield record


def _lines(path: Path) -> Iterator[str]:
    """Those of a text file; none where there is no such file. Bytes that are not UTF-8 become U+FFFD."""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from file


def _is_record(record: Any) -> bool:
    """Whether it is one of ours: an object with a step, and with finite numbers where there are numbers."""
    if not isinstance(record, dict) or not files.is_count(record.get("step")):
        return False
    bits = record.get("final_bits_per_byte")  # null where the text's bytes are not known
    return (bits is None or _is_number(bits)) and all(
        _is_number(record[name]) for name in NUMBERS if name in record
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def rewind_metrics(folder: Path, step: int) -> None:
    """Forget what was written after `step`, and the end of a run: a resumed run goes there again."""
    records = read_metrics(folder)
    ended = any("final_loss" in record and record["step"] == step for record in records)
    kept = [record for record in records if record["step"] <= step and "final_loss" not in record]
    files.write_text(folder / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in kept))
    if (folder / SAMPLES_FILE).exists():
        samples = read_samples(folder)
        if ended and samples and samples[-1][0] == step:
            samples.pop()  # the one that ended the run
        kept_text = (SAMPLE_HEADER.format(step=n) + text for n, text in samples if n <= step)
        files.write_text(folder / SAMPLES_FILE, "".join(kept_text))


def read_samples(folder: Path) -> list[tuple[int, str]]:
    """The steps after which a run wrote, and what, oldest first."""
    path = folder / SAMPLES_FILE
    parts = SAMPLE_START.split("".join(_lines(path)))
    return [(int(step), text) for step, text in zip(parts[1::2], parts[2::2], strict=True)]
