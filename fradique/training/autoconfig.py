"""Settings chosen for a machine, a corpus and a time budget (`--auto`, config/auto.py).

A larger model learns more from each token, but sees fewer tokens in the same time. The presets are tried from
small to large, each for about a second, until the next one would see too little text for its size. How much
that is does not depend on the machine: the numbers come from the measurements in config/auto.py.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fradique.checkpointing import run_folder
from fradique.data import dataset
from fradique.distributed import process_group
from fradique.training import setup
from fradique.training.logger import format_count
from fradique.training.time_budget import format_duration, parse_duration

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer
    from train import TrainSettings

T = TypeVar("T")
# Settings that all presets share. Settings that the user gives are never changed.
COMMON: dict[str, Any] = {
    "position": "rope",
    "activation": "relu2",
    "optimizer": "muon",
    "muon_momentum": 0.9,
    "beta2": 0.95,
    "qk_norm": True,
    "min_lr": 0.0,
    "lr_schedule": "wsd",
    "decay_frac": 0.8,
    "gradient_accumulation_steps": 1,
    "ngram_max": 4,  # in the trials; afterwards by the number of epochs
    "max_iters": 10**9,  # the clock ends the run
}
TRIAL_SECONDS, MAX_TRIAL_STEPS = 1.0, 12  # each trial ends at the first of the two
SEARCH_FRACTION = 0.1  # once this fraction of the budget is used, no larger preset is tried
WARMUP_FRACTION = 0.05  # of all steps
NUM_EVALUATIONS = 4  # during training, after the one at step 0: enough to draw a loss curve
EVALUATION_FRACTION = 0.05  # of the training time, for all evaluations together
EVALUATION_BATCHES = 20  # at most, per split: enough for a smooth loss curve
MIN_TOKENS = 500_000  # with fewer, even the smallest preset writes no words: see slow_time_budget
MAX_PARAMETERS_PER_TOKEN = 4  # parameters of the blocks per token of the corpus: more would memorize it
# {minimum number of epochs: dropout}. Validation losses measured with dropout 0.1 and without dropout:
#   2 epochs (shakespeare in GPT-2's BPE): 4.955 and 4.903
#   4.6 epochs (machado_char): 1.393 and 1.341
#   7 epochs (shakespeare_char): 1.483 and 1.488
#   8 epochs (machado_char): 1.319 and 1.350
# Beyond 8 epochs the values are extrapolated.
DROPOUT_OF_CHARACTERS = {0.0: 0.0, 5.0: 0.1, 15.0: 0.2}
DROPOUT_OF_BPE = {0.0: 0.0, 4.0: 0.1, 10.0: 0.2}
# Fewer parameters of the blocks per token of the corpus get no dropout. machado_char, 2 layers of width 128
# (0.25), 6 epochs, n-gram dropout 0.5: 1.382 without dropout, 1.418 with 0.1.
MIN_MEMORIZING_PARAMETERS = 0.5
# {minimum number of epochs: weight decay}. Validation losses measured at 22 epochs (shakespeare in GPT-2's
# BPE, 6,405 steps): 4.480 with weight decay 0.1, 4.568 without.
WEIGHT_DECAY_BY_EPOCHS = {0.0: 0.0, 15.0: 0.1}
# {minimum number of epochs: ngram_max, ngram_rows, ngram_dropout}, for characters and for tokens of BPE: the
# tables learn the text by heart over several epochs. Measurements: docs/BENCHMARKS.md. Beyond 6 epochs of
# characters the values are extrapolated.
NGRAMS_OF_CHARACTERS = {
    0.0: (5, 32768, 0.0),
    2.5: (4, 16384, 0.3),
    4.0: (4, 16384, 0.5),
    10.0: (3, 16384, 0.5),
}
NGRAMS_OF_BPE = {0.0: (3, 32768, 0.0), 2.0: (2, 32768, 0.3), 4.0: (2, 16384, 0.5)}
MIN_BYTES_OF_BPE = 1.5  # of text per token
MAX_NGRAM_WIDTH = 256  # wider models were not measured with n-grams


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
    min_text: float  # megabytes of text: a run that sees less is better with the next smaller preset


# n_layer, n_head, n_embd, block_size, batch_size, the learning rates of AdamW and Muon, and min_text.
# Extrapolated, not measured: these need hours on a CPU, or minutes on a GPU.
LARGE_PRESETS = (
    Preset(6, 6, 384, 256, 32, 3e-3, 1e-2, 60.0),
    Preset(8, 8, 512, 512, 32, 2e-3, 1e-2, 200.0),
    Preset(12, 12, 768, 1024, 32, 1e-3, 1e-2, 1000.0),
)
PRESETS_OF_CHARACTERS = (
    Preset(1, 2, 128, 256, 4, 5e-3, 1e-2, 0.0),
    Preset(2, 2, 128, 256, 4, 5e-3, 1e-2, 3.0),
    Preset(3, 3, 192, 256, 8, 5e-3, 1e-2, 8.0),
    Preset(5, 4, 256, 256, 12, 5e-3, 1e-2, 20.0),
    *LARGE_PRESETS,
)
# N-grams of BPE's tokens are rarer and help less: more layers do their work. The first preset is the same.
PRESETS_OF_BPE = (
    PRESETS_OF_CHARACTERS[0],
    Preset(4, 2, 128, 256, 4, 5e-3, 1e-2, 1.0),
    Preset(4, 3, 192, 256, 8, 5e-3, 1e-2, 4.0),
    Preset(6, 4, 256, 256, 12, 5e-3, 1e-2, 40.0),  # extrapolated
    *LARGE_PRESETS,
)


@dataclass(frozen=True)
class Throughput:
    """The measured speed of a model size on this machine, and what it would reach in a given time."""

    parameters: int  # of the blocks: embeddings are left out, because looking them up takes no time
    corpus_tokens: int  # in the training split
    tokens_per_step: int
    step_seconds: float
    elapsed: float  # seconds from the start of the program to the end of this trial
    bytes_per_token: float = 1.0  # of the text

    @property
    def of_characters(self) -> bool:
        """Whether the tokens are characters, or nearly so."""
        return self.bytes_per_token < MIN_BYTES_OF_BPE

    def steps(self, budget: float) -> int:
        """Steps that fit into the rest of a budget of `budget` seconds, which began with the program."""
        return max(1, int((budget - self.elapsed) / self.step_seconds))

    def tokens(self, budget: float) -> int:
        """Training tokens in the steps that fit into the budget."""
        return self.steps(budget) * self.tokens_per_step

    def by_epochs(self, table: dict[float, T], budget: float) -> T:
        """The value in a table {minimum number of epochs: value} for the epochs that fit into the budget."""
        epochs = self.tokens(budget) / self.corpus_tokens
        return table[max(min_epochs for min_epochs in table if epochs >= min_epochs)]

    def megabytes(self, budget: float) -> float:
        """The text in these tokens."""
        return self.tokens(budget) * self.bytes_per_token / 1e6


def autotune(
    settings: TrainSettings,
    fixed: dict[str, Any],
    time_step: Callable[[Trainer], float],
    device: torch.device,
    started: float,
) -> tuple[TrainSettings, tuple[str, ...]]:
    """Try presets on this machine, and choose the settings that are not in `fixed` for the time budget.

    fixed: the settings that the user gave. time_step: runs one training step and returns its seconds.
    device: the device of the run. started: time.monotonic() at the start of the process. Returns the settings
    and notes for the log, equal on all ranks. Raises ValueError if the settings do not fit together.
    """
    budget, slow_budget = parse_duration(settings.time_budget), parse_duration(settings.slow_time_budget)
    run_folder.check_available(Path(settings.out_dir), settings.overwrite)

    def measure(changes: dict[str, Any]) -> Throughput:
        return _measure(replace(settings, **changes), time_step, device, started)

    world = process_group.rank_info().world
    changes, notes = choose_preset(budget, fixed, measure, world, slow_budget)
    settings = replace(settings, **changes)
    if problems := replace(settings, auto=False).problems():
        raise ValueError("; ".join(problems))
    return settings, tuple(notes)


def _bytes_per_token(corpus: dataset.Corpus) -> float:
    return corpus.train.count_text_bytes(corpus.tokenizer) / corpus.train.tokens


def _measure(
    settings: TrainSettings, time_step: Callable[[Trainer], float], device: torch.device, started: float
) -> Throughput:
    """Train with these settings for about a second, in a temporary folder and without output."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),  # the real run prints these warnings again
    ):
        trial = replace(settings, out_dir=f"{scratch}/run", compile=False, wandb_log=False, auto=False)
        t = setup.setup_training(trial, average_gradients=False, device=device)
        try:
            time_step(t)  # warm-up
            (seconds,) = t.runtime.max(time_step(t))  # the maximum: all ranks must run equally many steps
            count = min(MAX_TRIAL_STEPS, max(1, int(TRIAL_SECONDS / seconds)))
            # the minimum is the time on an idle machine: other processes can only make a step slower
            step_seconds = min(time_step(t) for _ in range(count))
        finally:
            t.close()
        step_seconds, elapsed = t.runtime.max(step_seconds, time.monotonic() - started)
        throughput = Throughput(
            parameters=sum(p.numel() for p in t.model.transformer["h"].parameters()),
            corpus_tokens=t.corpus.train.tokens,
            tokens_per_step=t.tokens_per_step,
            step_seconds=step_seconds,
            elapsed=elapsed,
            bytes_per_token=_bytes_per_token(t.corpus),
        )
        del t
        gc.collect()  # free the model and its optimizer before the next trial
        return throughput


def choose_preset(
    budget: float,
    fixed: dict[str, Any],
    measure: Callable[[dict[str, Any]], Throughput],
    world: int = 1,
    slow_budget: float | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The settings to change for `budget` seconds on `world` processes, without those in `fixed`, and notes
    for the log.

    measure: trains with the changed settings that it gets and returns the throughput. If it raises for a
    preset, for example because the model does not fit into the GPU's memory, the previous preset is chosen.
    An error of the smallest preset is raised. slow_budget: the seconds instead of `budget` on a machine on
    which the smallest preset sees too few tokens.
    """
    changes = preset_settings(PRESETS_OF_CHARACTERS[0], fixed, world)
    best = measure(changes)
    notes, longer = [], {}
    if slow_budget and slow_budget > budget and best.tokens(budget) < MIN_TOKENS:
        longer = {"time_budget": f"{slow_budget:g}s"}
        notes.append(_slow_note(best, budget, slow_budget))
        budget = slow_budget
    reason = ""  # why no larger preset was chosen
    presets = PRESETS_OF_CHARACTERS if best.of_characters else PRESETS_OF_BPE
    for preset in presets[1:]:
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
        if trial.megabytes(budget) < preset.min_text:
            reason = f"; {name} would see {trial.megabytes(budget):.1f} MB of text, too little for its size"
            break
        if trial.parameters > MAX_PARAMETERS_PER_TOKEN * trial.corpus_tokens:
            reason = f"; {name} would memorize so small a corpus"
            break
        changes, best = larger, trial
    schedule = schedule_settings(best, budget)
    if (changes | fixed)["n_embd"] > MAX_NGRAM_WIDTH:
        schedule |= {"ngram_max": 1, "ngram_dropout": 0.0}
    changes |= {key: value for key, value in schedule.items() if key not in fixed}
    return changes | longer, [*notes, _note(changes | fixed, best, budget) + reason]


def schedule_settings(throughput: Throughput, budget: float) -> dict[str, Any]:
    """Regularization, warm-up and intervals for the steps that fit into the budget."""
    steps = throughput.steps(budget)
    # A step is a forward pass and a backward pass of twice its cost. So a forward pass of one batch of each
    # split takes as long as 2/3 of a step.
    can_memorize = throughput.parameters >= MIN_MEMORIZING_PARAMETERS * throughput.corpus_tokens
    if throughput.of_characters:
        ngrams, dropout = NGRAMS_OF_CHARACTERS, DROPOUT_OF_CHARACTERS
    else:
        ngrams, dropout = NGRAMS_OF_BPE, DROPOUT_OF_BPE
    ngram_max, ngram_rows, ngram_dropout = throughput.by_epochs(ngrams, budget)
    eval_iters = int(EVALUATION_FRACTION * steps / (NUM_EVALUATIONS + 1) * 3 / 2)
    return {
        "ngram_max": ngram_max,
        "ngram_rows": ngram_rows,
        "ngram_dropout": ngram_dropout,
        "dropout": throughput.by_epochs(dropout, budget) if can_memorize else 0.0,
        "weight_decay": throughput.by_epochs(WEIGHT_DECAY_BY_EPOCHS, budget),
        "warmup_iters": max(1, int(WARMUP_FRACTION * steps)),
        "eval_interval": max(1, steps // NUM_EVALUATIONS),
        "eval_iters": min(EVALUATION_BATCHES, max(1, eval_iters)),
        "log_interval": max(1, steps // 50),
    }


def preset_settings(preset: Preset, fixed: dict[str, Any], world: int = 1) -> dict[str, Any]:
    """The settings of a preset, without those in `fixed`.

    The width becomes a multiple of twice the number of heads, because RoPE needs an even head dimension, and
    the batch size a multiple of the number of processes.
    """
    settings = COMMON | asdict(preset)
    del settings["min_text"]
    settings["batch_size"] = _round_up(preset.batch_size, world)
    if "n_embd" in fixed:
        head_counts = [n for n in range(1, preset.n_head + 1) if fixed["n_embd"] % (2 * n) == 0]
        settings["n_head"] = max(head_counts, default=1)
    elif "n_head" in fixed:
        settings["n_embd"] = _round_up(preset.n_embd, 2 * fixed["n_head"])
    return {key: value for key, value in settings.items() if key not in fixed}


def _round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return math.ceil(number / multiple) * multiple


def describe_settings(settings: dict[str, Any]) -> str:
    """The sizes as text, such as "4 layers 128 wide on 8 x 128 tokens"."""
    layers = settings["n_layer"]
    return (
        f"{layers} {'layer' if layers == 1 else 'layers'} {settings['n_embd']} wide on "
        f"{settings['batch_size']} x {settings['block_size']} tokens"
    )


def _note(settings: dict[str, Any], throughput: Throughput, budget: float) -> str:
    """The note for the log: the chosen model, and the steps and tokens that are expected."""
    decay, ngram_max = settings["weight_decay"], settings["ngram_max"]
    return (
        f"auto: {describe_settings(settings)}: about {throughput.steps(budget):,} steps of "
        f"{1000 * throughput.step_seconds:.0f} ms (not compiled) in {budget:.0f} s, "
        f"{format_count(throughput.tokens(budget))} tokens, dropout {settings['dropout']}"
        + (f", weight decay {decay}" if decay else "")
        + (f", n-grams up to {ngram_max} (dropout {settings['ngram_dropout']})" if ngram_max > 1 else "")
    )


def _slow_note(throughput: Throughput, budget: float, slow_budget: float) -> str:
    """The note for the log that the run takes longer, and how to prevent that."""
    tokens = format_count(throughput.tokens(budget))
    return (
        f"auto: this machine is slow: the run takes {format_duration(slow_budget)} instead of "
        f"{format_duration(budget)}, in which it would see only {tokens} tokens (--slow_time_budget= keeps "
        f"{format_duration(budget)})"
    )
