"""What a run tells: metrics.jsonl, a progress bar, log lines, and wandb where it is asked for."""

import json
import math
import os
import re
import reprlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fradique import checkpoint, reading

METRICS, SAMPLES, WANDB_ID = "metrics.jsonl", "samples.txt", "wandb_id.txt"
SAMPLE_HEADER = "=== step {step} ===\n"
SAMPLE_START = re.compile(r"^=== step ([0-9]{1,18}) ===\n", re.MULTILINE)
NUMBERS = ("tokens", "seconds", "loss", "eval_train_loss", "eval_val_loss", "final_loss")  # in a record


class RunLog:
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
        self.file = (folder / METRICS).open("a", encoding="utf-8") if folder and speak else None
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
            self.file = (folder / METRICS).open("a", encoding="utf-8")

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
            self.warn_once(f"{METRICS} cannot be written: {error}")
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
            with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
                file.write(f"{SAMPLE_HEADER.format(step=step)}{text}\n\n")
        except OSError as error:
            self.warn_once(f"{SAMPLES} cannot be written: {error}")

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


class Pace:
    """How long a run has taken, how fast it goes, and whether its time is up.

    The clock counts all of it, importing and evaluating too; the speed counts training alone.
    """

    def __init__(self, started: float, earlier: float, budget: float | None) -> None:
        self.started, self.earlier, self.budget = started, earlier, budget
        self.now = earlier  # seconds, as all ranks agreed last
        self.closing = 0.0  # seconds that what follows the last step is expected to take
        self.begun = 0.0  # when training began
        self.last_step = 0.0  # seconds
        self.writing = 0.0  # seconds that the last sample took
        self.marked, self.marked_step, self.away = time.monotonic(), 0, 0.0

    def elapsed(self) -> float:
        return self.earlier + time.monotonic() - self.started

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is not training: evaluation, checkpoints, samples."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.away += time.monotonic() - start

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of training: the next is expected to take as long."""
        start = time.monotonic()
        yield
        self.last_step = time.monotonic() - start

    def mark(self, step: int) -> None:
        self.marked, self.marked_step, self.away = time.monotonic(), step, 0.0

    def step_seconds(self, step: int) -> float:
        """Seconds a step since the last mark, without the time aside. Marks."""
        spent = time.monotonic() - self.marked - self.away
        per_step = max(spent, 1e-9) / max(1, step - self.marked_step)
        self.mark(step)
        return per_step

    @property
    def too_short(self) -> bool:
        """Whether what follows the last step would take more than half of the budget."""
        return self.budget is not None and self.closing > (self.budget - self.begun) / 2

    @property
    def ends(self) -> float:
        """When training has to be over. Half of the time is for it in any case: a run that has only evaluated
        is of no use, and how long the end takes may have been foretold on a machine that was busy."""
        return self.budget - min(self.closing, (self.budget - self.begun) / 2)

    def time_is_up(self) -> bool:
        """Whether one more step would leave too little time for what follows the last."""
        return self.budget is not None and self.now + self.last_step >= self.ends


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
    shown = [loss, f"{human(record['tokens_per_second'])} tok/s"]
    if record.get("mfu") is not None:
        shown.append(f"MFU {record['mfu']:.1%}")
    return ", ".join(shown)


def _line(record: dict[str, Any]) -> str:
    milliseconds = 1000 * record["step_seconds"]
    return f"step {record['step']}: {_speed(record)}, {milliseconds:.1f} ms a step, lr {record['lr']:.2e}"


def human(number: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """75.3 -> 1m15s."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s"
    return (
        f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    )


DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def seconds(text: str) -> float | None:
    """90, 90s, 10m, 1h30m -> seconds; "" -> None. Raises ValueError where it is no length of time."""
    if not text:
        return None
    parts = DURATION.fullmatch(text.strip().lower())
    total = (
        sum(float(p or 0) * unit for p, unit in zip(parts.groups(), (3600, 60, 1), strict=True))
        if parts
        else 0
    )
    if not 0 < total < math.inf:
        raise ValueError(f"time_budget = {reprlib.repr(text)} is no length of time: write 90s, 10m or 1h30m")
    return total


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first."""
    return list(records(folder))


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """One after another: those of a long run are many. A last line that a crash cut short, and any other that
    is no record of ours, is passed over."""
    for line in _lines(folder / METRICS):
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
    if not isinstance(record, dict) or not reading.is_count(record.get("step")):
        return False
    bits = record.get("final_bits_per_byte")  # null where the text's bytes are not known
    return (bits is None or _is_number(bits)) and all(
        _is_number(record[name]) for name in NUMBERS if name in record
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def rewind(folder: Path, step: int) -> None:
    """Forget what was written after `step`, and the end of a run: a resumed run goes there again."""
    records = read(folder)
    ended = any("final_loss" in record and record["step"] == step for record in records)
    kept = [record for record in records if record["step"] <= step and "final_loss" not in record]
    checkpoint.write_atomically(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
    if (folder / SAMPLES).exists():
        samples = read_samples(folder)
        if ended and samples and samples[-1][0] == step:
            samples.pop()  # the one that ended the run
        kept_text = (SAMPLE_HEADER.format(step=n) + text for n, text in samples if n <= step)
        checkpoint.write_atomically(folder / SAMPLES, "".join(kept_text))


def read_samples(folder: Path) -> list[tuple[int, str]]:
    """The steps after which a run wrote, and what, oldest first."""
    path = folder / SAMPLES
    parts = SAMPLE_START.split("".join(_lines(path)))
    return [(int(step), text) for step, text in zip(parts[1::2], parts[2::2], strict=True)]


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
    path = folder / WANDB_ID
    if not path.exists():
        checkpoint.write_atomically(path, f"{time.time_ns():x}")
    return path.read_text(encoding="utf-8").strip()
