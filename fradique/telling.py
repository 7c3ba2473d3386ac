"""What a run says of itself: before it begins, at a step, and after an evaluation."""

from __future__ import annotations

import math

from torch import Tensor

from fradique import finetune, metrics, stability
from fradique.training import Training, tokens_per_step


def introduce(t: Training) -> None:
    """Say what is about to run, and what was chosen by itself."""
    size = metrics.human(t.model.num_params(non_embedding=False))
    part = finetune.trained(t.model)
    some = f", {metrics.human(part)} of them trained," if part < t.model.num_params(False) else ""
    step = f"{tokens_per_step(t.settings):,} tokens a step"
    t.log.say(f"{size} parameters{some} on {t.runtime.describe()}; {step}")
    here, there = t.corpus.train.tokens, t.corpus.val.tokens
    t.log.say(f"{t.corpus.folder}: {here:,} tokens to train on, {there:,} to validate")
    for note in t.runtime.notes:
        t.log.say(note)
    if t.settings.init_from == "resume":
        t.log.say(f"going on at step {t.state.step}")


def log_step(t: Training, loss: Tensor, norm: Tensor) -> None:
    """One line of metrics: the loss (mean over ranks) of the step just done, and the speed since the last."""
    if not t.settings.skip_nonfinite:
        stability.check_finite(t, t.state.step, loss, norm)
    loss = t.runtime.sum(loss.item())[0] / t.runtime.world
    tokens = tokens_per_step(t.settings)
    step_seconds = t.pace.step_seconds(t.state.step)
    speed = tokens / step_seconds
    peak = t.runtime.peak_flops()
    record = {
        "step": t.state.step,
        "loss": loss,
        "lr": t.optimizers[-1].param_groups[0]["lr"],  # AdamW's, where there are two
        "grad_norm": norm.item() if math.isfinite(norm) else None,
        "tokens": t.state.step * tokens,
        "seconds": t.pace.elapsed(),
        "step_seconds": step_seconds,
        "tokens_per_second": speed,
        "mfu": speed * t.model.flops_per_token() / peak if peak else None,
    }
    if t.state.past.skipped:
        record["skipped"] = t.state.past.skipped
    if not math.isfinite(loss):  # of a step that was left out
        del record["loss"]
    t.log.write(record)
    t.log.progress(t.state.step if t.pace.budget is None else t.pace.elapsed(), record)


def log_evaluation(t: Training, losses: dict[str, float]) -> None:
    step = t.state.step
    best = " (best)" if t.state.best_step == step else ""
    t.log.say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}{best}")
    record = {"step": step, "eval_train_loss": losses["train"], "eval_val_loss": losses["val"]}
    tokens = step * tokens_per_step(t.settings)
    t.log.write(record | {"tokens": tokens, "seconds": t.pace.elapsed()})
