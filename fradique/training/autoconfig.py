"""A model and its training, chosen for a machine, a corpus and a time: what config/auto.py asks for.

The larger a model, the more it makes of a token, and the fewer tokens it sees in the time. So a ladder of
sizes is climbed as long as the next one, by the speed measured on this machine, gains more by its size than
it loses by its tokens. The ladder, and what weighs one against the other, come from the sweeps told in
config/auto.py.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fradique.checkpointing import run_folder
from fradique.training import time_budget
from fradique.training.logger import format_count
from fradique.training.setup import setup_training
from fradique.training.trainer import tokens_per_step

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer
    from train import TrainSettings

TRIAL_SECONDS = 1.0  # for which `auto` tries a size


def autotune(
    settings: TrainSettings,
    fixed: dict[str, Any],
    time_step: Callable[[Trainer], float],
    started: float,
) -> tuple[TrainSettings, tuple[str, ...]]:
    """What `auto` leaves open, by trying sizes on this machine, and what to say of it. All ranks agree."""
    budget = time_budget.parse_duration(settings.time_budget)
    run_folder.check_available(Path(settings.out_dir), settings.overwrite)

    def measure(changes: dict[str, Any]) -> Throughput:
        with (
            tempfile.TemporaryDirectory() as scratch,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),  # what is worth a warning is told again by the run
        ):
            there = {"out_dir": f"{scratch}/run", "compile": False, "wandb_log": False, "auto": False}
            t = setup_training(replace(settings, **changes | there), share=False)
            try:
                time_step(t)
                (first,) = t.runtime.max(time_step(t))  # ranks must agree on how many there are
                count = min(12, max(1, int(TRIAL_SECONDS / first)))
                pace = min(time_step(t) for _ in range(count))  # what else is busy here only adds to it
            finally:
                t.close()
            pace, spent = t.runtime.max(pace, time.monotonic() - started)
            trial = Throughput(
                parameters=sum(p.numel() for p in t.model.transformer["h"].parameters()),
                corpus_tokens=t.corpus.train.tokens,
                tokens_per_step=tokens_per_step(t.settings),
                step_seconds=pace,
                spent=spent,
            )
            del t
            gc.collect()  # the model and its optimizer: the next one wants the memory
            return trial

    world = int(os.environ.get("WORLD_SIZE", 1))
    changes, said = choose_preset(budget, fixed, measure, world)
    settings = replace(settings, **changes)
    if problems := replace(settings, auto=False).problems():
        raise ValueError("; ".join(problems))
    return settings, tuple(said)


# What all sizes have in common; none of it is touched where it was set by hand.
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
WARMUP_FRACTION = 0.05  # part of the steps
NUM_EVALUATIONS = 4  # on the way, so that there is a curve to look at
EVALUATION_FRACTION = 0.05  # part of the time that they may take, and batches of each split that are enough
EVALUATION_BATCHES = 20
SEARCH_FRACTION = 0.1  # part of the budget after which no larger size is tried
MAX_PARAMETERS_PER_TOKEN = 4  # of the layers, for each token of the corpus
# Dropout, by how often the corpus is seen. Measured: 0.1 is worse than none at 2 epochs (shakespeare in
# GPT-2's BPE, 4.955 and 4.903) and at 4.6 (machado_char, 1.393 and 1.341), and better at 7 (shakespeare_char,
# 1.483 and 1.488) and at 8 (machado_char, 1.319 and 1.350). What is beyond goes by the trend.
DROPOUT_BY_EPOCHS = {0.0: 0.0, 5.0: 0.1, 15.0: 0.2}
# Weight decay likewise. Measured at 22 epochs (shakespeare in GPT-2's BPE, 6,405 steps): 4.480, and 4.568
# without.
WEIGHT_DECAY_BY_EPOCHS = {0.0: 0.0, 15.0: 0.1}
# What a size gains and costs: N parameters that saw D tokens have a loss of N^-OF_SIZE + OF_TOKENS / D beyond
# what all sizes share. Fitted to which of 64, 128, 192 and 256 wide won in one and five minutes, by letters
# and by BPE. (In scaling laws, as Hoffmann et al. 2022, D has a root: they tell of runs trained to the end.)
SIZE_EXPONENT, TOKEN_COEFFICIENT = 0.3, 3.3e4


@dataclass(frozen=True)
class Preset:
    """A rung of the ladder: a shape, and what it is best trained with."""

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
    # from here on by the trend, not measured: for hours on a CPU, or minutes on a GPU
    Preset(6, 6, 384, 256, 32, 3e-3, 1e-2),
    Preset(8, 8, 512, 512, 32, 2e-3, 1e-2),
    Preset(12, 12, 768, 1024, 32, 1e-3, 1e-2),
)


@dataclass(frozen=True)
class Throughput:
    """What some settings do on this machine."""

    parameters: int  # of the layers; tables of tokens and positions are looked up
    corpus_tokens: int  # that there are to train on
    tokens_per_step: int
    step_seconds: float
    spent: float  # seconds since the start of the program, this trial included

    def steps(self, budget: float) -> int:
        """How many of them the rest of the budget has room for."""
        return max(1, int((budget - self.spent) / self.step_seconds))

    def tokens(self, budget: float) -> int:
        """How many of them it sees in that time."""
        return self.steps(budget) * self.tokens_per_step

    def by_epochs(self, table: dict[float, float], budget: float) -> float:
        """What a table says of a corpus that is seen so often."""
        epochs = self.tokens(budget) / self.corpus_tokens
        return max(value for least, value in table.items() if epochs >= least)

    def dropout(self, budget: float) -> float:
        """How much there should be, as the corpus is seen again and again."""
        return self.by_epochs(DROPOUT_BY_EPOCHS, budget)

    def left_to_learn(self, budget: float) -> float:
        """What the loss is above the least that there can be, but for a factor that all sizes share."""
        return self.parameters**-SIZE_EXPONENT + TOKEN_COEFFICIENT / self.tokens(budget)


def choose_preset(
    budget: float, fixed: dict[str, Any], measure: Callable[[dict[str, Any]], Throughput], world: int = 1
) -> tuple[dict[str, Any], list[str]]:
    """Settings for `budget` seconds, and what to say of them. Those in `fixed`, set by hand, stay.

    `measure` tries the changes that it is given; where it raises for a larger size (too large for the card, a
    context longer than the corpus) the smaller is taken.
    """
    changes = preset_settings(PRESETS[0], fixed, world)
    trial, beyond = measure(changes), ""
    for size in PRESETS[1:]:
        larger = preset_settings(size, fixed, world)
        name = describe_settings(larger | fixed)
        if trial.spent > SEARCH_FRACTION * budget:
            beyond = "; no time was left to try a larger one"
            break
        try:
            tried = measure(larger)
        except (ValueError, torch.OutOfMemoryError) as error:
            beyond = f"; {name} cannot be trained here ({str(error).splitlines()[0][:100]})"
            break
        if tried.left_to_learn(budget) > trial.left_to_learn(budget):
            beyond = f"; {name} would see {format_count(tried.tokens(budget))}, too few for its size"
            break
        if tried.parameters > MAX_PARAMETERS_PER_TOKEN * tried.corpus_tokens:
            beyond = f"; {name} would learn so small a corpus by heart"
            break
        changes, trial = larger, tried
    steps = trial.steps(budget)
    last = {
        "dropout": trial.dropout(budget),
        "weight_decay": trial.by_epochs(WEIGHT_DECAY_BY_EPOCHS, budget),
        "warmup_iters": max(1, int(WARMUP_FRACTION * steps)),
        "eval_interval": max(1, steps // NUM_EVALUATIONS),
        # a batch of both splits takes as long as two thirds of a step
        "eval_iters": min(
            EVALUATION_BATCHES, max(1, int(EVALUATION_FRACTION * steps / (NUM_EVALUATIONS + 1) * 3 / 2))
        ),
        "log_interval": max(1, steps // 50),
    }
    decay = fixed.get("weight_decay", last["weight_decay"])
    said = [
        f"auto: {describe_settings(changes | fixed)}: about {steps:,} steps of "
        f"{1000 * trial.step_seconds:.0f} ms (not compiled) in {budget:.0f} s, "
        f"{format_count(trial.tokens(budget))} tokens, "
        f"dropout {fixed.get('dropout', last['dropout'])}"
        + (f", weight decay {decay}" if decay else "")
        + beyond
    ]
    return changes | {key: value for key, value in last.items() if key not in fixed}, said


def describe_settings(settings: dict[str, Any]) -> str:
    layers, width, rows, context = (
        settings[key] for key in ("n_layer", "n_embd", "batch_size", "block_size")
    )
    return f"{layers} layers {width} wide on {rows} x {context} tokens"


def preset_settings(size: Preset, fixed: dict[str, Any], world: int = 1) -> dict[str, Any]:
    """The settings that a size gives beside those that are fixed: heads and width must go together, and each
    of the processes have its part of a batch."""
    given = COMMON | asdict(size)
    given["batch_size"] = -(-size.batch_size // world) * world
    if "n_embd" in fixed:
        fits = [n for n in range(1, size.n_head + 1) if fixed["n_embd"] % (2 * n) == 0]  # rope turns pairs
        given["n_head"] = max(fits, default=1)
    elif "n_head" in fixed:
        pair = 2 * fixed["n_head"]
        given["n_embd"] = -(-size.n_embd // pair) * pair
    return {key: value for key, value in given.items() if key not in fixed}
