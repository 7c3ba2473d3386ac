"""Whether a run is compiled: if it is long enough, and if compiled passes turn out to be faster."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from fradique.runtime.device import compile_with_fallback
from fradique.training.time_budget import format_duration

if TYPE_CHECKING:
    from torch import nn

    from fradique.training.trainer import Trainer

# Seconds that the rest of a run must take. Compiling takes 20 to 60 s, and makes passes 1.1 to 1.5 times as
# fast, depending on the processor and on the model.
MIN_RUN_SECONDS = {"cpu": 300.0, "cuda": 60.0}
ROUNDS = 3  # compiled and plain passes are timed in turn


def prepare(
    t: Trainer, warmup: Callable[[nn.Module], None], time_pass: Callable[[nn.Module], float]
) -> nn.Module:
    """The model of a run, compiled or not; the choice is kept in t.state.compiled.

    warmup: a pass that raises an error if the compiled model does not work. time_pass: the seconds of a
    forward and backward pass of a model. The setting `compile` decides if it is True or False; in a resumed
    run, what was chosen at its start: the two differ in the last bits.
    """
    setting, known = t.settings.compile, t.state.compiled
    if t.settings.eval_only:
        wanted = False
    elif setting == "auto" and known is None:
        wanted, reason = is_worthwhile(t, time_pass)
        t.log.info(f"{'compiling' if wanted else 'not compiling'}: {reason}")
    else:
        wanted = known if setting == "auto" else setting
    model = compile_with_fallback(t.model, warmup, t.log.warn) if wanted else t.model
    if setting == "auto" and known is None and model is not t.model:
        plain, compiled = (1000 * seconds for seconds in compare_passes(t, model, time_pass))
        if compiled < plain:
            t.log.info(f"compiled: a pass takes {compiled:.1f} ms instead of {plain:.1f}")
        else:
            t.log.info(f"not compiled after all: a pass would take {compiled:.1f} ms instead of {plain:.1f}")
            model = t.model
    t.state.compiled = model is not t.model
    return model


def is_worthwhile(t: Trainer, time_pass: Callable[[nn.Module], float]) -> tuple[bool, str]:
    """Whether to compile the model of a run, and the reason: the same on all ranks."""
    device = t.runtime.device.type
    if device not in MIN_RUN_SECONDS:
        return False, f"not supported on {device}"
    if device == "cpu" and not has_compiler():
        return False, "no C++ compiler found"
    seconds = remaining_seconds(t, time_pass)
    if seconds >= MIN_RUN_SECONDS[device]:
        return True, f"training is long enough (about {format_duration(seconds)}) to save time"
    return False, f"training is too short (about {format_duration(seconds)}) to save time"


def has_compiler() -> bool:
    """Whether one of the C++ compilers is installed that inductor looks for."""
    compilers = ("cl",) if sys.platform == "win32" else ("g++", "clang++")
    return any(map(shutil.which, compilers))


def remaining_seconds(t: Trainer, time_pass: Callable[[nn.Module], float]) -> float:
    """About how long the run will take: by its time budget, or by its steps and a timed pass."""
    if t.budget.limit is not None:
        seconds = t.budget.limit - t.budget.elapsed()
    else:
        time_pass(t.model)  # the first pass is slower
        batches = t.sampler.micro_batches(t.state.step, t.runtime.rank, t.runtime.world)
        passes = len(t.runtime.split_microbatches(batches)) * (t.settings.max_iters - t.state.step)
        seconds = passes * time_pass(t.model)
    return t.runtime.max(seconds)[0]


def compare_passes(
    t: Trainer, compiled: nn.Module, time_pass: Callable[[nn.Module], float]
) -> tuple[float, float]:
    """The median seconds of a plain and of a compiled pass, each that of the slowest rank."""
    times: list[tuple[float, float]] = []
    for _ in range(ROUNDS):  # in turn, so that a short disturbance does not hit one of them alone
        times.append((time_pass(t.model), time_pass(compiled)))
    plain, with_compiler = (statistics.median(seconds) for seconds in zip(*times, strict=True))
    return tuple(t.runtime.max(plain, with_compiler))
