"""What a run tells: metrics.jsonl, a progress bar, log lines, and wandb where it is asked for."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fradique.checkpointing.metrics_file import METRICS_FILE, SAMPLE_HEADER, SAMPLES_FILE, WANDB_ID_FILE
from fradique.io import files


class RunLogger:
    """The voice of a run: silent on ranks that do not `speak`; without a `folder` it writes no file.

    On a terminal a bar shows loss, speed and time left; elsewhere (a file, a scheduler's log) lines do.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        speak: bool,
        total: float,
        unit: str,
        start: float = 0,
        wandb: dict[str, Any] | None = None,
    ) -> None:
        self.speak, self.folder = speak, folder
        self.warned: set[str] = set()
        self.broken = False  # nobody reads the output any more
        self.wandb = start_wandb(folder, **wandb) if wandb and folder and speak else None
        self.file = (folder / METRICS_FILE).open("a", encoding="utf-8") if folder and speak else None
        on_terminal = speak and sys.stderr.isatty()
        self.bar = (
            tqdm(total=total, initial=start, unit=unit, bar_format=_bar_format(unit), **_width())
            if on_terminal
            else None
        )

    def say(self, text: str) -> None:
        if self.speak:
            with self._unheard(sys.stdout):
                tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def warn(self, text: str) -> None:
        if self.speak:
            with self._unheard(sys.stderr):
                tqdm.write(f"warning: {text}", file=sys.stderr)

    @contextmanager
    def _unheard(self, stream: TextIO) -> Iterator[None]:
        """A terminal that was closed, or a full disk behind the output, is no reason to lose a run."""
        try:
            yield
        except OSError as error:
            self.broken |= isinstance(error, BrokenPipeError)
            with suppress(OSError, ValueError):  # a stand-in for a stream has no number
                number = os.open(os.devnull, os.O_WRONLY)
                os.dup2(number, stream.fileno())
                os.close(number)

    def move(self, folder: Path) -> None:
        """Go on in another folder: the run's own was moved, or is a new one."""
        if self.folder is not None:
            self.folder = folder
        if self.file is not None:
            self.file.close()
            self.file = (folder / METRICS_FILE).open("a", encoding="utf-8")

    def warn_once(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            self.warn(text)

    def write(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to wandb."""
        if not self.speak:
            return
        try:
            if self.file is not None:
                self.file.write(json.dumps(record, allow_nan=False) + "\n")
                self.file.flush()
        except OSError as error:  # a full disk: losing lines is better than losing the run
            self.warn_once(f"{METRICS_FILE} cannot be written: {error}")
        if self.wandb is not None:
            self.wandb.log(record, step=record["step"])

    def progress(self, place: float, record: dict[str, Any]) -> None:
        """Move the bar to `place` (steps or seconds) and show the loss and speed of a training record."""
        if self.bar is None:
            self.say(_line(record))
            return
        with self._unheard(sys.stderr):
            self.bar.n = min(place, self.bar.total)
            self.bar.set_postfix_str(_speed(record))

    def sample(self, step: int, text: str) -> None:
        if not self.speak or self.folder is None:
            return
        try:
            with (self.folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{SAMPLE_HEADER.format(step=step)}{text}\n\n")
        except OSError as error:
            self.warn_once(f"{SAMPLES_FILE} cannot be written: {error}")

    def close(self) -> None:
        if self.bar is not None:
            with self._unheard(sys.stderr):
                self.bar.close()
        if self.file is not None:
            with suppress(OSError):  # `write` has warned of a full disk already
                self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.bar = self.file = self.wandb = None


def _width() -> dict[str, Any]:
    """The bar follows the terminal's width; one that does not tell its width gets 80 columns."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # a stand-in for a terminal has no number or no size
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}


def _bar_format(unit: str) -> str:
    place = "{n:.0f}/{total:.0f} " + unit if unit == "s" else "{n_fmt}/{total_fmt} steps"
    return "{percentage:3.0f}%|{bar}| " + place + " [{elapsed}<{remaining}{postfix}]"


def _speed(record: dict[str, Any]) -> str:
    loss = f"loss {record['loss']:.3f}" if "loss" in record else "left out"
    shown = [loss, f"{format_count(record['tokens_per_second'])} tok/s"]
    if record.get("mfu") is not None:
        shown.append(f"MFU {record['mfu']:.1%}")
    return ", ".join(shown)


def _line(record: dict[str, Any]) -> str:
    milliseconds = 1000 * record["step_seconds"]
    return f"step {record['step']}: {_speed(record)}, {milliseconds:.1f} ms a step, lr {record['lr']:.2e}"


def format_count(number: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def check_wandb() -> None:
    """Raise ValueError where wandb is missing, or would ask for a key where nobody can answer."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb_log=True, but wandb is not installed: pip install wandb") from error
    offline = os.environ.get("WANDB_MODE", "online") != "online"
    if not (offline or os.environ.get("WANDB_API_KEY") or wandb.api.api_key or sys.stdin.isatty()):
        raise ValueError(
            "wandb_log=True, but nobody is logged in: run `wandb login`, or set WANDB_MODE=offline to keep "
            "the log on this machine, or leave wandb_log off"
        )


def start_wandb(folder: Path, project: str, name: str, config: dict[str, Any]) -> Any:
    """Begin a wandb run, or go on with the one of this folder. Raises ValueError where wandb cannot start."""
    try:
        import wandb

        return wandb.init(
            project=project, name=name, config=config, dir=str(folder), id=_wandb_id(folder), resume="allow"
        )
    except Exception as error:  # wandb's errors have many classes; a user needs one message
        raise ValueError(
            f"wandb_log=True, but wandb could not start: {error}. Log in with `wandb login`, or set "
            "WANDB_MODE=offline to keep the log on this machine, or leave wandb_log off"
        ) from error


def _wandb_id(folder: Path) -> str:
    """A name for the run that is kept in its folder, so that a resumed run goes on in the same chart."""
    path = folder / WANDB_ID_FILE
    if not path.exists():
        files.write_text(path, f"{time.time_ns():x}")
    return path.read_text(encoding="utf-8").strip()
