"""Settings chosen for a machine, a corpus and a time budget: what config/auto.py asks for.

A larger model learns more from each token, and sees fewer tokens in the time. The presets are tried from
small to large, each for about a second, until the next one would lose more by its fewer tokens than it gains
by its size. The presets and the coefficients come from the sweeps described in config/auto.py.
"""

from __future__ import annotations

import contextlib
import gc
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fradique.checkpointing import run_folder
from fradique.distributed import process_group
from fradique.training import setup
from fradique.training.logger import format_count
from fradique.training.time_budget import parse_duration

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer
    from train import TrainSettings

# What all presets have in common. Settings that the user gives are never changed.
COMMON: dict[str, Any] = {
    "position": "rope",
    "activation": "relu2",
    "optimizer": "muon",
    "muon_momentum": 0.9,
    "beta2": 0.95,
    "min_lr": 0.0,
    "lr_schedule": "wsd",
    "decay_frac": 0.8,
    "gradient_accumulation_steps": 1,
    "max_iters": 10**9,  # the clock ends the run
}
TRIAL_SECONDS, MAX_TRIAL_STEPS = 1.0, 12  # for which each preset is tried
SEARCH_FRACTION = 0.1  # of the budget, after which no larger preset is tried
WARMUP_FRACTION = 0.05  # of the steps
NUM_EVALUATIONS = 4  # during training, so that there is a curve to look at
EVALUATION_FRACTION = 0.05  # of the time, for evaluations
EVALUATION_BATCHES = 20  # of each split: enough for a steady curve
MAX_PARAMETERS_PER_TOKEN = 4  # parameters of the blocks for each token of the corpus
# Dropout by epochs (how often the corpus is seen). Measured: 0.1 is worse than none at 2 epochs (shakespeare
# in GPT-2's BPE, 4.955 and 4.903) and at 4.6 (machado_char, 1.393 and 1.341), and better at 7
# (shakespeare_char, 1.483 and 1.488) and at 8 (machado_char, 1.319 and 1.350). Beyond that: extrapolated.
DROPOUT_BY_EPOCHS = {0.0: 0.0, 5.0: 0.1, 15.0: 0.2}
# Measured at 22 epochs (shakespeare in GPT-2's BPE, 6,405 steps): 4.480 with weight decay, 4.568 without.
WEIGHT_DECAY_BY_EPOCHS = {0.0: 0.0, 15.0: 0.1}
# A model of N parameters that saw D tokens has a reducible loss of N^-SIZE_EXPONENT + TOKEN_COEFFICIENT / D.
# Fitted to which of the widths 64, 128, 192 and 256 won after one and five minutes, with characters and BPE.
# (Scaling laws, as Hoffmann et al. 2022, have a root of D: they describe runs that are trained to the end.)
SIZE_EXPONENT, TOKEN_COEFFICIENT = 0.3, 3.3e4


@dataclass(frozen=True)
class Preset:
    """A model size with the batch and the learning rates that suit it."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float


PRESETS = (
    Preset(3, 2, 64, 64, 16, 5e-3, 1e-2),
    Preset(4, 2, 128, 128, 8, 5e-3, 1e-2),
    Preset(4, 3, 192, 128, 16, 5e-3, 1e-2),
    Preset(5, 4, 256, 128, 24, 5e-3, 1e-2),
    # extrapolated, not measured: for hours on a CPU, or minutes on a GPU
    Preset(6, 6, 384, 256, 32, 3e-3, 1e-2),
    Preset(8, 8, 512, 512, 32, 2e-3, 1e-2),
    Preset(12, 12, 768, 1024, 32, 1e-3, 1e-2),
)


@dataclass(frozen=True)
class Throughput:
    """What a preset achieves on this machine."""

    parameters: int  # of the blocks; embedding tables are only looked up
    corpus_tokens: int  # in the training split
    tokens_per_step: int
    step_seconds: float
    elapsed: float  # seconds since the start of the program, this trial included

    def steps(self, budget: float) -> int:
        """Steps that fit into what is left of `budget` seconds."""
        return max(1, int((budget - self.elapsed) / self.step_seconds))

    def tokens(self, budget: float) -> int:
        """Tokens that are seen in that time."""
        return self.steps(budget) * self.tokens_per_step

    def by_epochs(self, table: dict[float, float], budget: float) -> float:
        """The value in a table {minimum number of epochs: value} for the epochs in that time."""
        epochs = self.tokens(budget) / self.corpus_tokens
        return max(value for min_epochs, value in table.items() if epochs >= min_epochs)

    def reducible_loss(self, budget: float) -> float:
        """The expected loss above the smallest possible one, up to a factor that all sizes share."""
        return self.parameters**-SIZE_EXPONENT + TOKEN_COEFFICIENT / self.tokens(budget)


def autotune(
    settings: TrainSettings,
    fixed: dict[str, Any],
    time_step: Callable[[Trainer], float],
    device: torch.device,
    started: float,
) -> tuple[TrainSettings, tuple[str, ...]]:
    """Choose all settings that are not in `fixed` for settings.time_budget, by trying presets here.

    `time_step` makes a training step and returns its seconds; `device` is that of the run; `started` is
    time.monotonic() at the start of the process. Returns the settings and notes for the log; equal on all
    ranks.
    """
    budget = parse_duration(settings.time_budget)
    run_folder.check_available(Path(settings.out_dir), settings.overwrite)

    def measure(changes: dict[str, Any]) -> Throughput:
        return _measure(replace(settings, **changes), time_step, device, started)

    changes, notes = choose_preset(budget, fixed, measure, process_group.rank_info().world)
    settings = replace(settings, **changes)
    if problems := replace(settings, auto=False).problems():
        raise ValueError("; ".join(problems))
    return settings, tuple(notes)


def _measure(
    settings: TrainSettings, time_step: Callable[[Trainer], float], device: torch.device, started: float
) -> Throughput:
    """Train with these settings for about a second, in a temporary folder and without output."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),  # the run itself will repeat its warnings
    ):
        trial = replace(settings, out_dir=f"{scratch}/run", compile=False, wandb_log=False, auto=False)
        t = setup.setup_training(trial, average_gradients=False, device=device)
        try:
            time_step(t)  # the first one is slow
            (seconds,) = t.runtime.max(time_step(t))  # ranks must make the same number of steps
            count = min(MAX_TRIAL_STEPS, max(1, int(TRIAL_SECONDS / seconds)))
            step_seconds = min(time_step(t) for _ in range(count))  # other processes only make steps slower
        finally:
            t.close()
        step_seconds, elapsed = t.runtime.max(step_seconds, time.monotonic() - started)
        throughput = Throughput(
            parameters=sum(p.numel() for p in t.model.transformer["h"].parameters()),
            corpus_tokens=t.corpus.train.tokens,
            tokens_per_step=t.tokens_per_step,
            step_seconds=step_seconds,
            elapsed=elapsed,
        )
        del t
        gc.collect()  # free the model and its optimizer before the next trial
        return throughput


def choose_preset(
    budget: float, fixed: dict[str, Any], measure: Callable[[dict[str, Any]], Throughput], world: int = 1
) -> tuple[dict[str, Any], list[str]]:
    """Settings for `budget` seconds on `world` processes, besides those in `fixed`; and notes for the log.

    `measure` tries the changes that it is given. If it raises for a larger preset (too large for the GPU, a
    context longer than the corpus), the smaller one is taken; an error of the smallest is the user's to fix.
    """
    changes = preset_settings(PRESETS[0], fixed, world)
    best, reason = measure(changes), ""
    for preset in PRESETS[1:]:
        larger = preset_settings(preset, fixed, world)
        name = describe_settings(larger | fixed)
        if best.elapsed > SEARCH_FRACTION * budget:
            reason = "; no time was left to try a larger one"
            break
        try:
            trial = measure(larger)
        except (ValueError, torch.OutOfMemoryError) as error:
            reason = f"; {name} cannot be trained here ({str(error).splitlines()[0][:100]})"
            break
        if trial.reducible_loss(budget) > best.reducible_loss(budget):
            reason = f"; {name} would see {format_count(trial.tokens(budget))} tokens, too few for its size"
            break
        if trial.parameters > MAX_PARAMETERS_PER_TOKEN * trial.corpus_tokens:
            reason = f"; {name} would memorize so small a corpus"
            break
        changes, best = larger, trial
    changes |= {k: v for k, v in schedule_settings(best, budget).items() if k not in fixed}
    return changes, [_note(changes | fixed, best, budget) + reason]


def schedule_settings(throughput: Throughput, budget: float) -> dict[str, Any]:
    """Regularization, warm-up and evaluations for the steps that fit into the budget."""
    steps = throughput.steps(budget)
    # evaluating a batch of both splits takes as long as two thirds of a step
    eval_iters = int(EVALUATION_FRACTION * steps / (NUM_EVALUATIONS + 1) * 3 / 2)
    return {
        "dropout": throughput.by_epochs(DROPOUT_BY_EPOCHS, budget),
        "weight_decay": throughput.by_epochs(WEIGHT_DECAY_BY_EPOCHS, budget),
        "warmup_iters": max(1, int(WARMUP_FRACTION * steps)),
        "eval_interval": max(1, steps // NUM_EVALUATIONS),
        "eval_iters": min(EVALUATION_BATCHES, max(1, eval_iters)),
        "log_interval": max(1, steps // 50),
    }


def preset_settings(preset: Preset, fixed: dict[str, Any], world: int = 1) -> dict[str, Any]:
    """The settings of a preset that are not fixed. The width is a multiple of the number of heads, and the
    batch a multiple of the number of processes."""
    settings = COMMON | asdict(preset)
    settings["batch_size"] = -(-preset.batch_size // world) * world
    if "n_embd" in fixed:  # RoPE rotates pairs: the head dimension must be even
        heads = [n for n in range(1, preset.n_head + 1) if fixed["n_embd"] % (2 * n) == 0]
        settings["n_head"] = max(heads, default=1)
    elif "n_head" in fixed:
        multiple = 2 * fixed["n_head"]
        settings["n_embd"] = -(-preset.n_embd // multiple) * multiple
    return {key: value for key, value in settings.items() if key not in fixed}


def describe_settings(settings: dict[str, Any]) -> str:
    """4 layers 128 wide on 8 x 128 tokens."""
    layers, width, rows, context = (
        settings[key] for key in ("n_layer", "n_embd", "batch_size", "block_size")
    )
    return f"{layers} layers {width} wide on {rows} x {context} tokens"


def _note(settings: dict[str, Any], throughput: Throughput, budget: float) -> str:
    decay = settings["weight_decay"]
    return (
        f"auto: {describe_settings(settings)}: about {throughput.steps(budget):,} steps of "
        f"{1000 * throughput.step_seconds:.0f} ms (not compiled) in {budget:.0f} s, "
        f"{format_count(throughput.tokens(budget))} tokens, dropout {settings['dropout']}"
        + (f", weight decay {decay}" if decay else "")
    )
