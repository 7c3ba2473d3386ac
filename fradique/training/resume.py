"""What a run checks before its first step: whether its best checkpoint and its learning rate still hold.

The validation loss of the best checkpoint can be compared with later ones only if they are of the same text
and the same windows of it. So state.json has a fingerprint of the corpus and of the evaluation windows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fradique.checkpointing import metrics_file
from fradique.distributed import process_group
from fradique.training import evaluation, outputs

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer

MAX_RATE_CHANGE = 0.1  # of the learning rate between two runs; a larger one is reported


def check_best(t: Trainer) -> None:
    """Set the fingerprint of the evaluations; in a resumed run, check the best checkpoint first.

    If `best/` is missing or damaged, the best loss is forgotten. If the corpus or the evaluation windows are
    not those of the best loss, the best weights are evaluated again. If `best/` has the weights of another
    step than state.json says, they are the best. All of this is reported. All ranks call this.
    """
    state, fingerprint = t.state, evaluation.eval_fingerprint(t)
    earlier, state.eval_fingerprint = state.eval_fingerprint, fingerprint
    if t.saved_step < 0 or state.best_step is None:
        return
    best, problem = process_group.broadcast_from_rank0(lambda: outputs.read_best_state(t))
    if best is None:
        t.log.warn(
            f"{problem}: the best weights so far, of step {state.best_step}, are lost. From now on, the run "
            "looks for new ones"
        )
        state.best_step, state.best_val_loss, state.evals_since_best = None, None, 0
        state.last_eval_step = -1  # evaluate this step again: it may be the last one, and then the best
    elif best.get("eval_fingerprint", "") not in ("", fingerprint):  # "": saved by an older version
        _evaluate_best_again(t, best)
    elif best["step"] != state.best_step:
        # A later one if the run was killed after it wrote best/, or if its newest checkpoints are gone.
        t.log.info(
            f"the run resumes at step {state.step}, where step {state.best_step} was the best, and best/ has "
            f"the weights of step {best['step']}: they stay the best until a validation loss is lower"
        )
        state.best_step, state.best_val_loss, state.evals_since_best = best["step"], best["best_val_loss"], 0
    if earlier not in ("", fingerprint):
        state.last_eval_step = -1  # this step was evaluated on other windows
        if t.runtime.is_main:
            t.log.rewrite(lambda: metrics_file.set_aside_evaluations(t.folder))


def _evaluate_best_again(t: Trainer, best: dict) -> None:
    """Replace the best loss by that of the best weights on the windows of now. `best`: of best/state.json."""
    state = t.state
    with t.budget.pause(), torch.no_grad():
        if t.runtime.sharded:
            t.model.reshard()
        last_weights = {name: p.detach().clone() for name, p in t.model.named_parameters()}
        outputs.copy_best_weights(t)
        state.best_val_loss = evaluation.mean_loss_on_fixed_windows(t, t.corpus.val).loss
        if t.runtime.sharded:
            t.model.reshard()
        for name, p in t.model.named_parameters():
            p.copy_(last_weights[name])
    state.best_step, state.evals_since_best = best["step"], 0
    t.log.info(
        "the corpus or the evaluation windows (eval_iters, batch_size, block_size) are not those of the "
        f"earlier evaluations: the best weights, of step {state.best_step}, have the validation loss "
        f"{state.best_val_loss:.4f} now, and had {best['best_val_loss']:.4f} before"
    )


def report_rate_jump(t: Trainer, expected: float) -> None:
    """Report a learning rate that is not the one with which the run would have continued.

    expected: what the schedule of now gives for the last step that was made.
    """
    settings = t.settings
    _report_jump(t, "the learning rate", t.state.learning_rate, expected)
    if settings.optimizer == "muon":
        expected *= settings.muon_learning_rate / settings.learning_rate
        _report_jump(t, "Muon's learning rate", t.state.muon_learning_rate, expected)


def _report_jump(t: Trainer, name: str, made_with: float, expected: float) -> None:
    """Report a rate that differs much from the one with which the last step was made; 0: it is not known."""
    if t.saved_step < 0 or not made_with or not math.isfinite(expected):
        return
    if abs(expected - made_with) > MAX_RATE_CHANGE * max(made_with, expected):
        t.log.info(
            f"{name} jumps: step {t.state.step} was made with {made_with:.2e}, and these settings "
            f"would have given {expected:.2e}. If this is not wanted, resume with the earlier "
            "learning_rate, min_lr, warmup_iters, lr_schedule and, if max_iters has changed, lr_decay_iters"
        )
