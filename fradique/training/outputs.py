"""The outputs of a run: checkpoints, embedding snapshots, samples, the loss plot, log records."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fradique.checkpointing import checkpoint, embedding_snapshots, run_files
from fradique.data.sampler import derive_seed
from fradique.distributed import process_group
from fradique.nn import lora
from fradique.optim import optimizer
from fradique.tokenizer.tokenizer import encode_prompt
from fradique.training import skip_step
from fradique.training.logger import format_count
from fradique.training.time_budget import format_duration

if TYPE_CHECKING:
    from fradique.training.evaluation import SplitLoss
    from fradique.training.trainer import Trainer
    from train import TrainSettings

SAMPLE_TEMPERATURE = 0.8
MEASURED_TOKENS = 16  # of a sample, to estimate how long all of its tokens take


# Checkpoints


def save_checkpoint(t: Trainer, best: bool = False) -> None:
    """Write a step checkpoint, and `best/` too if `best`. Remove the oldest step checkpoints.

    Rank 0 writes, and the other ranks wait. Each rank of a sharded model writes its shards. Raises ValueError
    if a tensor is not finite, or a file cannot be written.
    """
    if t.runtime.is_main or t.runtime.sharded:
        saved = checkpoint.Checkpoint(
            config=asdict(t.model.config) | lora.lora_metadata(t.model),
            model={name: p.detach() for name, p in t.model.named_parameters()},
            optimizer=optimizer.state_by_name(t.optimizers),
            state=t.state_dict(),
            run_id=t.lock.run_id if t.lock else None,
        )
        writer: checkpoint.CheckpointWriter = checkpoint.LocalWriter()
        if t.runtime.sharded:
            from fradique.distributed import fsdp

            t.model.reshard()  # after an evaluation the parameters are still gathered
            writer = fsdp.ShardedWriter()
        checkpoint.save_and_prune(t.folder, saved, best=best, keep=t.settings.keep_checkpoints, writer=writer)
    t.saved_step = t.state.step
    t.runtime.barrier()


def read_best_state(t: Trainer) -> tuple[dict | None, str]:
    """The content of best/state.json, if its checkpoint is not damaged; else None, and the problem.

    Only rank 0 calls this.
    """
    folder = t.folder / "best"
    if not folder.exists():
        return None, f"{folder} is missing"
    try:
        checkpoint.verify_checkpoint(folder, t.lock.run_id if t.lock else None)
        state = checkpoint.read_checkpoint_metadata(folder).state
        if not isinstance(state.get("step"), int) or not isinstance(state.get("best_val_loss"), float):
            raise ValueError(f"{folder / 'state.json'} is damaged")
    except ValueError as error:
        return None, str(error)
    return state, ""


def load_best_weights(t: Trainer) -> int | None:
    """Copy the weights of `best/` into the model, and return their step.

    Returns None, after a warning, if `best/` is missing or damaged; the model is then unchanged.
    """
    best, problem = process_group.broadcast_from_rank0(lambda: read_best_state(t))
    if best is None:
        t.log.warn(f"the best weights cannot be used: {problem}. The run ends with its last weights")
        return None
    if best["step"] != t.state.step:
        copy_best_weights(t)
    return best["step"]


def copy_best_weights(t: Trainer) -> None:
    """Copy the weights of `best/`, which was verified, into the model."""
    folder = t.folder / "best"
    if not t.runtime.sharded:
        weights = checkpoint.read_checkpoint(folder, with_optimizer=False, verified=True).model
        checkpoint.copy_parameters(t.model, weights, str(folder))
        return
    from fradique.distributed import fsdp

    t.model.reshard()
    fsdp.read_safetensors(folder, {name: p.detach() for name, p in t.model.named_parameters()})


def follow_moved_folder(t: Trainer) -> None:
    """Continue in the run folder's new path if somebody has moved it; create it again if it was deleted."""
    # a lambda, because t.lock is None on ranks other than 0
    folder, warning = process_group.broadcast_from_rank0(lambda: t.lock.follow_folder())
    if warning:
        t.log.warn(warning)
        t.folder = folder
        t.log.move(folder)


# Other files


def save_snapshot(t: Trainer, last: bool = False) -> None:
    """Save the embeddings for lab.movie, every snapshot_interval steps and after the `last` step.

    Best effort: a failure only warns.
    """
    interval, step = t.settings.snapshot_interval, t.state.step
    if not interval or not (last or step % interval == 0):
        return
    with t.budget.pause():
        tables = embedding_snapshots.embedding_tables(t.model)  # gathered from all ranks if sharded
        if t.runtime.is_main:
            try:
                embedding_snapshots.write_snapshot(t.folder, step, tables)
            except OSError as error:
                t.log.warn_once(f"embeddings cannot be saved for lab.movie: {error.strerror or error}")


def write_sample(t: Trainer) -> str:
    """Generate sample_tokens tokens after sample_start, append the text to samples.txt, and return it."""
    # all ranks of a sharded model must run its forward passes; with the same seed they sample the same tokens
    if not (t.runtime.is_main or t.runtime.sharded):
        return ""
    text = t.corpus.tokenizer.decode(_generate_sample(t, t.settings.sample_tokens))
    t.log.sample(t.state.step, text)
    return text


def measure_sample(t: Trainer) -> None:
    """Estimate how long a sample takes, from its first tokens. All ranks call this."""
    n_tokens, start = min(MEASURED_TOKENS, t.settings.sample_tokens), time.monotonic()
    if t.runtime.is_main or t.runtime.sharded:
        _generate_sample(t, n_tokens)
    seconds = (time.monotonic() - start) * t.settings.sample_tokens / n_tokens
    t.budget.sampled(t.runtime.max(seconds)[0])


def _generate_sample(t: Trainer, n_tokens: int) -> list[int]:
    """The tokens of sample_start, and `n_tokens` that the model generates after them."""
    settings, tokenizer = t.settings, t.corpus.tokenizer
    prompt = encode_prompt(tokenizer, settings.sample_start)
    prompt_batch = torch.from_numpy(prompt.astype("int64"))[None].to(t.runtime.device)  # (1, T)
    generator = torch.Generator(t.runtime.device)
    generator.manual_seed(derive_seed(settings.seed, t.state.step))
    with t.runtime.autocast():
        tokens = t.model.generate(
            prompt_batch,
            n_tokens,
            temperature=SAMPLE_TEMPERATURE,
            n_vocab=tokenizer.vocab_size,
            generator=generator,
        )
    return tokens[0].tolist()


def draw_loss_plot(t: Trainer) -> float:
    """Draw loss.png from metrics.jsonl on rank 0. Best effort: a failure only warns. Returns the seconds."""
    if not t.runtime.is_main:
        return 0.0
    start = time.monotonic()
    try:
        from fradique.training import loss_plot  # here, because it imports matplotlib, which is optional

        loss_plot.save_plot([loss_plot.read_curves(t.folder)], t.folder / run_files.LOSS_PLOT_FILE)
    except ImportError:
        t.log.warn_once("matplotlib is not installed, so there is no loss.png: pip install matplotlib")
    except (OSError, ValueError) as error:
        t.log.warn_once(f"loss.png cannot be drawn: {error}")
    return time.monotonic() - start


# Log records


def log_startup(t: Trainer) -> None:
    """Print the size of the model and of the corpus, the device, and the automatic choices."""
    parameters, trainable = t.model.num_params(non_embedding=False), lora.count_trainable(t.model)
    trainable_note = f" ({format_count(trainable)} trainable)" if trainable < parameters else ""
    t.log.info(
        f"{format_count(parameters)} parameters{trainable_note} on {t.runtime.describe()}; "
        f"{t.tokens_per_step:,} tokens per step"
    )
    train_tokens, val_tokens = t.corpus.train.tokens, t.corpus.val.tokens
    t.log.info(f"{t.corpus.folder}: {train_tokens:,} training tokens, {val_tokens:,} validation tokens")
    for note in t.runtime.notes:
        t.log.info(note)
    for warning in t.runtime.warnings:
        t.log.warn(warning)
    if t.settings.init_from == "resume":
        t.log.info(f"resuming at step {t.state.step}")
        if not t.settings.eval_only and (finished := describe_end(t)):
            t.log.info(f"the run is finished: {finished}")
    if t.budget.limit is None and not t.settings.eval_only:
        warn_about_schedule(t, t.settings.max_iters)


def describe_end(t: Trainer) -> str:
    """How a run that is resumed has come to its end, and what trains it longer; "" if it has not."""
    settings, step, limit = t.settings, t.state.step, t.budget.limit
    if limit is None and step >= settings.max_iters:
        return (
            f"it has made {step} of max_iters = {settings.max_iters} steps. To train longer, use "
            f"--max_iters={2 * max(settings.max_iters, step)}"
        )
    used = t.state.seconds
    if limit is not None and used >= 0.99 * t.budget.training_ends:  # a step more would take too long
        return (
            f"it has used {format_duration(used)} of time_budget = {settings.time_budget}. To train longer, "
            f"use --time_budget={format_duration(2 * max(limit, used))}"
        )
    return ""


def log_ignored_settings(t: Trainer, given: dict[str, Any]) -> None:
    """Log the settings that the user gave, and that the loaded weights define otherwise."""
    ignored = [
        f"{key}={value} (it is {getattr(t.settings, key)})"
        for key, value in sorted(given.items())
        if getattr(t.settings, key) != value
    ]
    if ignored:
        source = t.settings.init_from
        t.log.info(f"ignored, because the weights of {source} define the model: {', '.join(ignored)}")


def warn_about_schedule(t: Trainer, total_steps: int) -> None:
    """Warn once about settings that do not fit into a run of `total_steps` steps, unless auto chose them."""
    if t.schedule_checked or t.settings.auto:
        return
    t.schedule_checked = True
    for warning in schedule_warnings(t.settings, total_steps):
        t.log.warn(warning)


def schedule_warnings(settings: TrainSettings, total_steps: int) -> list[str]:
    """Warnings about warm-up, decay and evaluations that do not fit into a run of `total_steps` steps."""
    warnings = []
    warmup, fraction = settings.warmup_iters, max(1, total_steps // 20)
    # with a time budget, or a constant rate, lr_decay_iters has no effect
    decays = settings.lr_schedule != "constant" and not settings.time_budget
    decay_end = settings.lr_decay_iters if decays else 0
    if settings.decay_lr and 1 < total_steps <= warmup:
        reached = settings.learning_rate * total_steps / (warmup + 1)
        warnings.append(
            f"warmup_iters = {warmup} is not shorter than the run of {total_steps} steps: the learning rate "
            f"rises only to {reached:.1e} of {settings.learning_rate:.1e}. Use --warmup_iters={fraction}"
        )
    if settings.decay_lr and 0 < decay_end <= warmup:
        warnings.append(
            f"lr_decay_iters = {decay_end} is not above warmup_iters = {warmup}: after the warm-up the "
            "learning rate falls to min_lr at once. Use --lr_decay_iters=0, which decays it until the end"
        )
    if settings.eval_interval > total_steps > 1:
        warnings.append(
            f"eval_interval = {settings.eval_interval} is above the {total_steps} steps of the run: it is "
            f"evaluated only at its start and end. Use --eval_interval={max(1, total_steps // 5)}"
        )
    return warnings


MIN_TIMED_STEPS = 10  # after which the number of steps in a time budget is estimated


def check_schedule(t: Trainer) -> None:
    """In a run with a time budget, after MIN_TIMED_STEPS steps: warn about settings that do not fit."""
    budget, step = t.budget, t.state.step
    if budget.limit is not None and step >= MIN_TIMED_STEPS and not t.schedule_checked:
        steps_left = (budget.training_ends - budget.now) / max(budget.step_seconds, 1e-9)
        warn_about_schedule(t, step + max(0, int(steps_left)))


def log_step(t: Trainer, loss: Tensor, norm: Tensor) -> None:
    """Log the loss of the last step, as the mean over the ranks, and the speed since the last record."""
    if not t.settings.skip_nonfinite:
        skip_step.check_finite(t, t.state.step, loss, norm)
    mean_loss = t.runtime.sum(loss.item())[0] / t.runtime.world
    step_seconds = t.budget.seconds_per_step(t.state.step)
    tokens_per_second = t.tokens_per_step / step_seconds
    peak_flops = t.runtime.peak_flops()
    record = {
        "step": t.state.step,
        "loss": mean_loss,
        "lr": t.state.learning_rate,
        "grad_norm": norm.item() if math.isfinite(norm) else None,
        "tokens": t.state.step * t.tokens_per_step,
        "seconds": t.budget.elapsed(),
        "step_seconds": step_seconds,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * t.model.flops_per_token() / peak_flops if peak_flops else None,
    }
    if t.state.past.skipped:
        record["skipped"] = t.state.past.skipped
    if not math.isfinite(mean_loss):  # the step was skipped; JSON has no NaN
        del record["loss"]
    t.log.write(record)
    t.log.show_record(bar_position(t), record)


def bar_position(t: Trainer) -> float:
    """The position of the progress bar: the step, or with a time budget the elapsed seconds."""
    return t.state.step if t.budget.limit is None else t.budget.elapsed()


def log_evaluation(t: Trainer, losses: dict[str, SplitLoss]) -> None:
    """Log the losses of an evaluation."""
    step, train, val = t.state.step, losses["train"].loss, losses["val"].loss
    best = " (best)" if t.state.best_step == step else ""
    t.log.info(f"step {step}: train loss {train:.4f}, val loss {val:.4f}{best}")
    record = {"step": step, "eval_train_loss": train, "eval_val_loss": val}
    t.log.write(record | {"tokens": step * t.tokens_per_step, "seconds": t.budget.elapsed()})
