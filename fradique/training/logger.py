"""The logger of a run: console, metrics.jsonl, samples.txt and Weights & Biases."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fradique.checkpointing.metrics_file import METRICS_FILE, SAMPLE_HEADER, SAMPLES_FILE, WANDB_ID_FILE
from fradique.io import files
from fradique.io.terminal import is_closed_pipe

REFRESH_SECONDS = 1.0  # the shortest time between two updates of the progress bar


class RunLogger:
    """Console and JSONL logger; silent on ranks other than 0, and without files if `folder` is None.

    If stderr is a terminal, a progress bar shows loss, speed and time. Otherwise each training record is
    printed as a line.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        enabled: bool,
        total: float,
        unit: str,
        start: float = 0,
        wandb: dict[str, Any] | None = None,
    ) -> None:
        """Open metrics.jsonl and the progress bar, and start wandb.

        total, start: the last and the first position of the progress bar, in units of `unit`, "step" or "s".
        wandb: the arguments of `start_wandb` after the folder; None: no wandb.
        """
        self.enabled, self.folder = enabled, folder
        self.output_closed = False  # whether stdout or stderr turned out to be a closed pipe
        self._shown_warnings: set[str] = set()
        self._bar_update_time = time.monotonic()
        writes = enabled and folder is not None
        self.wandb = start_wandb(folder, **wandb) if wandb and writes else None
        self.file = (folder / METRICS_FILE).open("a", encoding="utf-8", newline="\n") if writes else None
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=start, unit=unit, bar_format=_bar_format(unit), **_size_options()
            )

    def info(self, text: str) -> None:
        """Print a line to stdout, above the progress bar."""
        if self.enabled:
            with self._survive_closed_output(sys.stdout):
                tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning to stderr."""
        if self.enabled:
            with self._survive_closed_output(sys.stderr):
                tqdm.write(f"warning: {text}", file=sys.stderr)

    def warn_once(self, text: str) -> None:
        """Print a warning unless this logger has printed it already."""
        if text not in self._shown_warnings:
            self._shown_warnings.add(text)
            self.warn(text)

    @contextmanager
    def _survive_closed_output(self, stream: TextIO) -> Iterator[None]:
        """Ignore an OSError of the output, such as a closed terminal or a full disk, and all later output.

        The run must not end because of it.
        """
        try:
            yield
        except OSError as error:
            self.output_closed |= is_closed_pipe(error)
            # replace the stream by /dev/null; ValueError: a stream that is not a file has no descriptor
            with suppress(OSError, ValueError):
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, stream.fileno())
                os.close(devnull)

    def move(self, folder: Path) -> None:
        """Write to another folder from now on, after the run folder was moved or created again."""
        if self.folder is not None:
            self.folder = folder
        if self.file is not None:
            self.file.close()
            self.file = (folder / METRICS_FILE).open("a", encoding="utf-8", newline="\n")

    def rewrite(self, function: Callable[[], None]) -> None:
        """Call `function`, which replaces metrics.jsonl, with the file closed: Windows keeps open files."""
        if self.file is not None:
            self.file.close()
        try:
            function()
        finally:
            self.move(self.folder)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and log it to wandb."""
        if not self.enabled:
            return
        try:
            if self.file is not None:
                self.file.write(json.dumps(record, allow_nan=False) + "\n")
                self.file.flush()
        except OSError as error:  # such as a full disk: continue without this record
            self.warn_once(f"{METRICS_FILE} cannot be written: {error}")
        if self.wandb is not None:
            self.wandb.log(record, step=record["step"])

    def show_record(self, position: float, record: dict[str, Any]) -> None:
        """Show the loss and speed of a training record in the progress bar, or print them without one.

        `position`: where the bar moves to, in its unit.
        """
        if self.bar is None:
            self.info(_format_record(record))
            return
        with self._survive_closed_output(sys.stderr):
            self.bar.set_postfix_str(_format_speed(record), refresh=False)
        self._move_bar(position)

    def advance(self, position: float) -> None:
        """Move the progress bar, at most once per REFRESH_SECONDS: cheap enough to call at every step."""
        if self.bar is not None and time.monotonic() - self._bar_update_time >= REFRESH_SECONDS:
            self._move_bar(position)

    def finish_bar(self) -> None:
        """Show the progress bar at 100%."""
        if self.bar is not None:
            self._move_bar(self.bar.total)

    def _move_bar(self, position: float) -> None:
        self._bar_update_time = time.monotonic()
        with self._survive_closed_output(sys.stderr):
            self.bar.n = min(position, self.bar.total)
            self.bar.refresh()

    def sample(self, step: int, text: str) -> None:
        """Append a generated text to samples.txt."""
        if not self.enabled or self.folder is None:
            return
        try:
            with (self.folder / SAMPLES_FILE).open("a", encoding="utf-8", newline="\n") as file:
                file.write(f"{SAMPLE_HEADER.format(step=step)}{text}\n\n")
        except OSError as error:
            self.warn_once(f"{SAMPLES_FILE} cannot be written: {error}")

    def close(self) -> None:
        """Close the bar, the file and the wandb run."""
        if self.bar is not None:
            with self._survive_closed_output(sys.stderr):
                self.bar.close()
        if self.file is not None:
            with suppress(OSError):  # `write` has already printed a warning
                self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.bar = self.file = self.wandb = None


def _size_options() -> dict[str, Any]:
    """tqdm's options for the size: that of the terminal; 80 x 24 if the terminal does not report its size."""
    try:
        has_size = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # ValueError: the stream has no descriptor
        has_size = False
    return {"dynamic_ncols": True} if has_size else {"ncols": 80, "nrows": 24}


def _bar_format(unit: str) -> str:
    """tqdm's format. With a time budget the position is the elapsed time, so tqdm's own clock is left out."""
    if unit == "s":
        return "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    return "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"


def _format_speed(record: dict[str, Any]) -> str:
    """A training record for the progress bar, such as "loss 2.500, 12.3k tok/s, MFU 45.1%"."""
    loss = f"loss {record['loss']:.3f}" if "loss" in record else "skipped"
    mfu = f", MFU {record['mfu']:.1%}" if record.get("mfu") is not None else ""
    return f"{loss}, {format_count(record['tokens_per_second'])} tok/s{mfu}"


def _format_record(record: dict[str, Any]) -> str:
    """A training record as a line of its own."""
    milliseconds = 1000 * record["step_seconds"]
    return (
        f"step {record['step']}: {_format_speed(record)}, {milliseconds:.1f} ms/step, lr {record['lr']:.2e}"
    )


def format_count(number: float) -> str:
    """A number with three significant digits and a letter for thousands, millions, ...: 1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


# Weights & Biases


def check_wandb() -> None:
    """Raise ValueError if wandb is not installed, or has no API key and no terminal to ask for one."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb_log=True, but wandb is not installed: pip install wandb") from error
    offline = os.environ.get("WANDB_MODE", "online") != "online"
    if not (offline or os.environ.get("WANDB_API_KEY") or wandb.api.api_key or sys.stdin.isatty()):
        raise ValueError(
            "wandb_log=True, but wandb has no API key: run `wandb login`, or set WANDB_MODE=offline to keep "
            "the log on this machine, or leave wandb_log off"
        )


def start_wandb(folder: Path, project: str, name: str, config: dict[str, Any]) -> Any:
    """Start the wandb run of a run folder, or continue it. Raises ValueError if wandb cannot start."""
    try:
        import wandb

        return wandb.init(
            project=project, name=name, config=config, dir=str(folder), id=_wandb_id(folder), resume="allow"
        )
    except Exception as error:  # wandb's errors have no common base class
        raise ValueError(
            f"wandb_log=True, but wandb could not start: {error}. Log in with `wandb login`, or set "
            "WANDB_MODE=offline to keep the log on this machine, or leave wandb_log off"
        ) from error


def _wandb_id(folder: Path) -> str:
    """The run's wandb id, kept in its folder so that a resumed run continues the same chart."""
    path = folder / WANDB_ID_FILE
    if not path.exists():
        files.write_text(path, f"{time.time_ns():x}")
    return path.read_text(encoding="utf-8").strip()
