"""Train a GPT: settings -> corpus -> model -> optimizer -> loop -> checkpoints in out/<run>/.

    python train.py config/train_eca_char.py
    python train.py config/train_eca_char.py --n_layer=4 --time_budget=5m
    python train.py --init_from=resume --out_dir=out/eca-char
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

A config file is Python and is run as such: run only those that you trust.
"""

import time

START = time.monotonic()  # before the imports: --time_budget includes the seconds that importing torch takes

from fradique.runtime import mps, openmp

openmp.limit_spinning()  # before torch is imported
mps.fall_back_to_cpu()

import math
import statistics
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from configurator import Resolved, command, setting
from fradique.checkpointing.run_files import LOSS_PLOT_FILE
from fradique.data.sampler import derive_seed
from fradique.distributed import lost_ranks, process_group
from fradique.io.terminal import shell_command
from fradique.nn.functional import ACTIVATIONS
from fradique.optim import lr_schedule, optimizer
from fradique.runtime import device, signals
from fradique.runtime.device import DTYPES
from fradique.runtime.memory_limits import OomReport
from fradique.training import autoconfig, evaluation, outputs, resume, setup, skip_step, thread_choice
from fradique.training.model_setup import model_config
from fradique.training.time_budget import format_duration, parse_duration
from fradique.training.trainer import Trainer, TrainState
from model import NORM_PLACES, NORMS, POSITIONS


# fmt: off
@dataclass(frozen=True)
class TrainSettings:
    """python train.py [config/<name>.py ...] [--key=value ...]

    Trains a GPT on a prepared corpus. nanoGPT's names and defaults are kept, so its config files run unchanged.
    """

    out_dir: str = setting("out", "folder of this run: settings, metrics, samples, checkpoints", common=True, group="run", path=True)
    init_from: str = setting("scratch", "scratch; resume (continue the run in out_dir); gpt2, gpt2-medium, ...; or a path: run folder, ckpt.pt, Hugging Face folder", common=True, path=True)
    overwrite: bool = setting(False, "delete the run in out_dir and start again", common=True)
    max_iters: int = setting(600000, "number of training steps", common=True, lo=0)
    auto: bool = setting(False, "choose model size, batch size and schedule for this machine, corpus and time_budget; settings that you give are kept", common=True)
    time_budget: str = setting("", "stop after this much time (evaluation included) instead of max_iters, for example 90s, 10m, 1h30m; the learning rate schedule follows the clock", common=True)
    slow_time_budget: str = setting("", "time_budget for auto on a slow machine, which would see fewer than 500,000 tokens in the given one")
    seed: int = setting(1337, "random seed for weights, batches and dropout; the same seed, on the same number of threads, repeats the run exactly", lo=0, hi=2**62)
    debug: bool = setting(False, "show the traceback of an error")

    dataset: str = setting("openwebtext", "name of the corpus: a folder in data_dir", common=True, group="data", path=True)
    data_dir: str = setting("data", "folder that contains the corpora", path=True)
    batch_size: int = setting(12, "sequences per micro-batch", common=True, lo=1, hi=2**20)
    block_size: int = setting(1024, "context length in tokens", common=True, lo=1, hi=2**30)
    gradient_accumulation_steps: int = setting(40, "micro-batches per step, summed over all processes", common=True, lo=1, hi=2**20)

    n_layer: int = setting(12, "number of transformer blocks", common=True, lo=1, hi=10_000, group="model")
    n_head: int = setting(12, "number of attention heads", common=True, lo=1, hi=2**20)
    n_embd: int = setting(768, "embedding width; must be a multiple of n_head", common=True, lo=1, hi=2**20)
    dropout: float = setting(0.0, "dropout probability; 0 for large corpora, 0.1 to 0.3 for small ones", common=True, lo=0.0, hi=0.99)
    flash: bool = setting(True, "use PyTorch's fused attention (scaled_dot_product_attention); False: explicit softmax attention")

    bias: bool = setting(False, "use biases in linear layers and layer norms, as GPT-2 does; without them training is slightly faster", group="architecture")
    activation: str = setting("gelu", "activation function of the MLP; swiglu and geglu are gated", choices=tuple(ACTIVATIONS))
    n_inner: int = setting(0, "hidden width of the MLP; 0: 4 * n_embd, or two thirds of that for a gated activation", lo=0, hi=2**24)
    n_kv_head: int = setting(0, "key and value heads (grouped-query attention); 1: multi-query attention; 0: same as n_head", lo=0)
    position: str = setting("learned", "positional encoding", choices=POSITIONS)
    rope_theta: float = setting(10000.0, "base of the rotary embedding's frequencies (with position=rope)", above=0.0)
    norm: str = setting("layernorm", "normalization layer", choices=NORMS)
    norm_place: str = setting("pre", "where normalization is applied: before each sublayer (pre), after it (post), or after it with a scaled residual (deepnorm)", choices=NORM_PLACES)
    qk_norm: bool = setting(False, "normalize queries and keys in each attention head")
    embd_norm: bool = setting(False, "normalize the token embeddings, as BLOOM does")
    parallel_block: bool = setting(False, "compute attention and MLP in parallel from the same input, as PaLM and GPT-J do")
    prefix_len: int = setting(0, "prefix LM: the first prefix_len tokens attend to each other in both directions and are not predicted; 0: causal", lo=0)
    sliding_window: int = setting(0, "number of tokens that each token attends to, including itself; 0: all earlier tokens", lo=0)
    tie_weights: bool = setting(True, "share one matrix between the token embedding and the output layer")
    logit_softcap: float = setting(0.0, "limit logits to (-c, c) with c * tanh(logits / c); 0: no limit", lo=0.0)
    ngram_max: int = setting(1, "also embed n-grams: each token with the one, two, ... tokens before it, up to this length; a small model learns faster; 1: tokens alone", lo=1, hi=16)
    ngram_rows: int = setting(16384, "rows of the table for each length of n-grams, which share them by a hash", lo=1, hi=2**28)
    ngram_dropout: float = setting(0.0, "probability that a token loses its longer n-grams in training, as if they were new; for several epochs", lo=0.0, hi=0.99)

    freeze: str = setting("", "parameters that are not trained, separated by commas, for example wte,wpe,h.0-5,h.6.attn", group="fine-tuning")
    lora_rank: int = setting(0, "rank of the LoRA adapters, which are trained instead of the weights; 0: no LoRA", lo=0)
    lora_alpha: float = setting(16.0, "LoRA scale: the adapter's output is multiplied by lora_alpha / lora_rank", above=0.0)
    lora_targets: str = setting("c_attn,c_proj,c_fc", "linear layers that get a LoRA adapter: endings of their names, separated by commas")

    optimizer: str = setting("adamw", "adamw; or muon for the matrices in the blocks and adamw for all other parameters", common=True, choices=optimizer.OPTIMIZERS, group="optimizer")
    learning_rate: float = setting(6e-4, "peak learning rate of AdamW", common=True, above=0.0)
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon; it follows the same schedule", above=0.0)
    muon_momentum: float = setting(0.95, "momentum of Muon", lo=0.0, hi=0.999999)
    lr_schedule: str = setting("cosine", "learning rate schedule after warm-up", choices=tuple(lr_schedule.SCHEDULES))
    decay_lr: bool = setting(True, "use warm-up and the schedule; False: constant learning_rate")
    warmup_iters: int = setting(2000, "steps of linear learning rate warm-up", common=True, lo=0)
    lr_decay_iters: int = setting(0, "step at which the learning rate reaches min_lr; 0: max_iters", lo=0)
    min_lr: float = setting(6e-5, "final learning rate", lo=0.0)
    decay_frac: float = setting(0.5, "fraction of the run in which the learning rate decays (with lr_schedule=wsd)", lo=0.0, hi=1.0)
    weight_decay: float = setting(0.1, "weight decay of matrices and embeddings", lo=0.0)
    beta1: float = setting(0.9, "AdamW's decay rate of the first moment", lo=0.0, hi=0.999999)
    beta2: float = setting(0.95, "AdamW's decay rate of the second moment", lo=0.0, hi=0.999999)
    grad_clip: float = setting(1.0, "clip gradients to this norm; 0: no clipping", lo=0.0)
    skip_nonfinite: bool = setting(False, "skip a step whose loss or gradient is not finite, instead of stopping the run")
    spike_sigmas: float = setting(0.0, "treat a loss or gradient norm this many standard deviations above the mean of the last 128 steps as not finite; 0: off", lo=0.0)

    eval_interval: int = setting(2000, "steps between evaluations (and checkpoints)", common=True, lo=1, group="evaluation and log")
    eval_iters: int = setting(200, "batches per split in each evaluation; always the same batches", common=True, lo=1)
    eval_only: bool = setting(False, "evaluate once, print the result and exit")
    final_eval: str = setting("budget", "text of the final measurement: the whole validation split (whole); or with a time_budget, if it would take too long, windows spread evenly over it (budget)", choices=("whole", "budget"))
    early_stop_evals: int = setting(0, "stop after this many evaluations without a better validation loss; 0: never", lo=0)
    always_save_checkpoint: bool = setting(True, "save a checkpoint at every evaluation; False: only when the validation loss improves, and at the end")
    keep_checkpoints: int = setting(2, "number of most recent step checkpoints to keep", lo=1)
    log_interval: int = setting(1, "steps between log lines", lo=1)
    sample_interval: int = setting(0, "steps between text samples (in samples.txt); 0: one sample at the end", lo=0)
    sample_start: str = setting("", "prompt of those samples; in a flag \\n is a newline; empty: start of a line", escapes=True)
    sample_tokens: int = setting(200, "length of those samples in tokens", lo=1)
    snapshot_interval: int = setting(0, "steps between saved embeddings for lab.movie (small files); 0: none", lo=0)
    wandb_log: bool = setting(False, "also log to Weights & Biases")
    wandb_project: str = setting("fradique", "Weights & Biases project")
    wandb_run_name: str = setting("", "Weights & Biases run name; empty: the name of out_dir")

    device: str = setting("auto", "auto, cpu, mps, cuda or cuda:N", common=True, group="machine")
    dtype: str = setting("auto", "dtype of the forward pass; weights stay in float32", choices=("auto", *DTYPES))
    threads: int = setting(0, "threads of the CPU; 0: the number that trains fastest, chosen by timing, and again if training slows down", common=True, lo=0, hi=4096)
    compile: bool | str = setting("auto", "use torch.compile; auto: if the run is long enough to benefit", common=True, choices=("auto", True, False))
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, about a third slower")
    parallel: str = setting("ddp", "under torchrun: ddp (each process holds the whole model) or fsdp (the model is sharded over the processes)", choices=("ddp", "fsdp"))
    backend: str = setting("auto", "torch.distributed backend under torchrun", choices=("auto", "nccl", "gloo"))
    dist_timeout: float = setting(600.0, "seconds that a process waits for the others under torchrun", above=0.0)
    # fmt: on

    def problems(self) -> list[str]:
        """Error messages for settings that are valid one by one but contradict each other."""
        # auto will choose the settings that these two checks are about
        problems = [] if self.auto else model_config(self, vocab_size=1).problems()
        if not self.auto and self.decay_lr and self.lr_schedule != "constant" and self.min_lr > self.learning_rate:
            problems.append(f"min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}")
        for name in ("time_budget", "slow_time_budget"):
            try:
                parse_duration(getattr(self, name), name)
            except ValueError as error:
                problems.append(str(error))
        if self.auto and self.init_from not in ("scratch", "resume"):
            problems.append("auto chooses a model to train from scratch: remove --init_from or --auto")
        if self.auto and not self.time_budget and self.init_from == "scratch":
            problems.append("auto needs to know how much time there is: add --time_budget=5m, for example")
        if self.lora_rank and self.init_from == "scratch":
            problems.append(
                f"lora_rank = {self.lora_rank} adapts existing weights, and init_from=scratch has none: set "
                "--init_from to a run folder, gpt2, …, or leave lora_rank at 0"
            )
        for name, chosen in (("optimizer", self.optimizer == "muon"), ("ngram_max", self.ngram_max > 1)):
            if chosen and self.parallel == "fsdp":
                problems.append(
                    f"{name} = {getattr(self, name)!r} needs whole matrices, but parallel = 'fsdp' shards them: change "
                    "one of the two"
                )
        if self.overwrite and self.init_from == "resume":
            problems.append("overwrite deletes the run that init_from=resume would continue: use one of them")
        return problems


def main(resolved: Resolved[TrainSettings]) -> int:
    """Train or evaluate as the settings say. Returns the exit status."""
    with OomReport() as oom:
        return run(resolved, oom)


def run(resolved: Resolved[TrainSettings], oom: OomReport) -> int:
    """`main` without its report of an out-of-memory error. Returns the exit status."""
    settings, notes = resolved.settings, ()  # notes: what autotune chose, for the log
    with lost_ranks.report_lost_ranks():
        chosen_device = device.configure_process(
            settings.device,
            parallel=settings.parallel,
            backend=settings.backend,
            timeout=settings.dist_timeout,
        )
        settings = process_group.broadcast_from_rank0(lambda: setup.settings_after_restart(settings))
        if settings.auto and settings.init_from == "scratch" and not settings.eval_only:
            fixed = {key: getattr(settings, key) for key in resolved.explicit}  # set by the user
            settings, notes = autoconfig.autotune(settings, fixed, time_step, chosen_device, START)
        t = setup.setup_training(settings, notes, device=chosen_device, started=START, oom=oom)
        outputs.log_ignored_settings(t, {key: getattr(settings, key) for key in resolved.explicit})
    try:
        status = report_evaluation(t) if t.settings.eval_only else train(t)
        t.forward = t.model  # frees the DDP wrapper, which must not outlive the process group
        t.runtime.barrier()
        return status
    finally:
        t.close()
        t.runtime.close()


def train(t: Trainer) -> int:
    """Train, evaluate and finish. Returns the exit status: 0, or 128 + n after signal n."""
    stop = signals.StopSignal()
    with lost_ranks.report_lost_ranks(stop_requested=lambda: stop.number != 0):
        try:
            evaluation.limit_windows(t)
            resume.check_best(t)
            resume.report_rate_jump(t, expected=learning_rate_at(t, max(0, t.state.step - 1)))
            stopped = loop(t, stop)
            if stopped:
                return 128 + stop.number
        finally:
            stop.restore()
        finish(t)
    return 0


def loop(t: Trainer, stop: signals.StopSignal) -> bool:
    """The training loop. Returns True if a signal ended it."""
    settings, state = t.settings, t.state
    while not is_finished(t):
        if state.step % settings.eval_interval == 0 and t.budget.allows("evaluation"):
            evaluate_and_save(t)
            if should_early_stop(t) or is_finished(t):
                break
        outputs.save_snapshot(t)
        with t.budget.step():
            state.learning_rate = learning_rate_at(t, state.step)
            loss, norm = train_step(t, state.learning_rate)
        if settings.optimizer == "muon":
            state.muon_learning_rate = t.optimizers[0].param_groups[0]["lr"]
        state.step += 1
        outputs.check_schedule(t)
        thread_choice.watch(t, lambda: setup.time_pass(t, t.model))
        t.log.advance(outputs.bar_position(t))
        if state.step % settings.log_interval == 0:
            outputs.log_step(t, loss, norm)
        if settings.sample_interval and state.step % settings.sample_interval == 0 and t.budget.allows("sample"):
            with t.budget.pause():
                outputs.write_sample(t)
            t.budget.spent("sample", t.budget.sample_seconds)
        if t.log.output_closed and stop.number == 0:  # as in `python train.py | head`
            stop.number = signals.SIGPIPE
        if stop.requested(t.runtime):
            save_and_exit(t, stop)
            return True
    evaluate_and_save(t, last=True)
    outputs.save_snapshot(t, last=True)
    return False


def learning_rate_at(t: Trainer, step: int) -> float:
    """The learning rate of the training step after `step` steps.

    With a time budget the length of the schedule is the number of steps that fit into it at the speed so far.
    """
    settings, budget = t.settings, t.budget
    total_steps = settings.lr_decay_iters or settings.max_iters
    if budget.limit is not None:
        training_seconds = max(1.0, budget.training_ends)  # from the start of the run
        total_steps = lr_schedule.estimate_total_steps(t.state.step, budget.now, training_seconds)
    return lr_schedule.learning_rate(
        step,
        schedule=settings.lr_schedule if settings.decay_lr else "constant",
        peak=settings.learning_rate,
        floor=settings.min_lr,
        warmup=settings.warmup_iters if settings.decay_lr else 0,
        total=total_steps,
        decay_frac=settings.decay_frac,
    )


def train_step(t: Trainer, lr: float) -> tuple[Tensor, Tensor]:
    """One update of the weights. Returns the loss of this rank's batch and the gradient norm, before clipping,
    as scalar tensors on the device.

    Dropout is seeded by (seed, step, rank), so that a resumed run makes the same steps. If the loss or the
    gradient is not finite, skips the update or raises ValueError before it (see skip_step).
    """
    settings, runtime = t.settings, t.runtime
    runtime.seed_dropout(derive_seed(settings.seed, t.state.step, runtime.rank))
    optimizer.set_learning_rate(t.optimizers, lr)
    batches = runtime.split_microbatches(t.sampler.micro_batches(t.state.step, runtime.rank, runtime.world))
    total_loss = torch.zeros((), device=runtime.device)
    with runtime.autocast():  # around all micro-batches: autocast keeps its casts of the weights until it ends
        for i, batch in enumerate(batches):
            x, y = runtime.to_device(*batch)  # (B, T) each
            if runtime.world > 1 and not runtime.sharded:  # DDP: all-reduce in the last backward pass only
                t.forward.require_backward_grad_sync = i == len(batches) - 1
            _, mean_loss = t.forward(x, y, with_logits=False)
            loss = mean_loss / len(batches)
            with runtime.autocast(enabled=False):
                t.scaler.scale(loss).backward()
            total_loss += loss.detach()
    optimizer.assign_gradients(t.optimizers)  # Muon updates views of the parameters
    for opt in t.optimizers:
        t.scaler.unscale_(opt)
    norm = optimizer.clip_gradients(t.model, settings.grad_clip)
    accepted = skip_step.accept_step(t, total_loss, norm)
    # The GradScaler of float16 decides for each optimizer: one overflow must skip the step of all of them.
    overflow = t.scaler.is_enabled() and not math.isfinite(norm)
    if accepted and not overflow:
        for opt in t.optimizers:
            t.scaler.step(opt)
    t.scaler.update()
    t.model.zero_grad(set_to_none=True)
    for opt in t.optimizers:  # frees Muon's views of the gradients too
        opt.zero_grad(set_to_none=True)
    return total_loss, norm


def time_step(t: Trainer) -> float:
    """Run one training step and return its seconds."""
    start = time.monotonic()
    loss, _ = train_step(t, learning_rate_at(t, t.state.step))
    loss.item()  # waits for the device
    return time.monotonic() - start


def evaluate_and_save(t: Trainer, last: bool = False) -> None:
    """Evaluate, log, draw the loss curve and save a checkpoint.

    A step that was evaluated already is not evaluated again. `last`: save in any case.
    """
    state, budget = t.state, t.budget
    outputs.follow_moved_folder(t)
    if state.last_eval_step == state.step:
        if last and t.saved_step != state.step:
            outputs.save_checkpoint(t)
        return
    with budget.pause():
        start = time.monotonic()
        losses = evaluation.estimate_loss(t)
        evaluation_end = time.monotonic()
        # a rank may have no windows; TimeBudget.synchronize takes the maximum over the ranks
        all_seconds = [s for split in losses.values() for s in split.window_seconds] or [0.0]
        window_seconds = statistics.median(all_seconds)
        skip_step.check_finite(t, state.step, sum(split.loss for split in losses.values()))
        improved = record_evaluation(state, losses["val"].loss)
        outputs.log_evaluation(t, losses)
        plot_seconds = outputs.draw_loss_plot(t) if last or budget.allows("loss plot") else 0.0
        budget.evaluated(window_seconds)  # before the checkpoint, which contains the estimate
        if improved or last or t.settings.always_save_checkpoint:
            outputs.save_checkpoint(t, best=improved)
        end = time.monotonic()
        if budget.limit is not None and not budget.sample_seconds:
            outputs.measure_sample(t)  # the run ends with a sample
    budget.evaluated(window_seconds, end - evaluation_end)
    if budget.limit is not None:
        seconds, plot_seconds = t.runtime.max(end - start, plot_seconds)
        budget.spent("evaluation", seconds - plot_seconds)
        if plot_seconds:
            budget.spent("loss plot", plot_seconds)
    if state.step == 0:
        budget.begin_training()


def record_evaluation(state: TrainState, val_loss: float) -> bool:
    """Update the best loss and its step. Returns True if this evaluation is the best so far.

    The best step may lie ahead, if the run resumed before it. If the run makes it again, it is the best again.
    """
    state.last_eval_step = state.step
    best, best_step = state.best_val_loss, state.best_step
    improved = best is None or val_loss < best or (val_loss == best and state.step == best_step)
    if improved:
        state.best_val_loss, state.best_step, state.evals_since_best = val_loss, state.step, 0
    elif state.step > best_step:
        state.evals_since_best += 1
    return improved


def is_finished(t: Trainer) -> bool:
    """Whether training has reached max_iters or the end of its time; the same answer on all ranks."""
    if t.budget.limit is None:
        return t.state.step >= t.settings.max_iters
    t.budget.synchronize(t.runtime)
    return t.budget.is_over()


def should_early_stop(t: Trainer) -> bool:
    """Whether the last early_stop_evals evaluations all failed to improve the validation loss."""
    limit = t.settings.early_stop_evals
    if not limit or t.state.evals_since_best < limit:
        return False
    t.log.info(f"no better validation loss in {limit} evaluations: stopping at step {t.state.step}")
    return True


def save_and_exit(t: Trainer, stop: signals.StopSignal) -> None:
    """After a signal: save a checkpoint, and print the command that resumes the run."""
    outputs.follow_moved_folder(t)
    outputs.save_checkpoint(t)
    t.log.info(
        f"{stop.name}: saved step {t.state.step}; continue with: "
        + shell_command("train.py", "--init_from=resume", f"--out_dir={t.folder}")
    )


def finish(t: Trainer) -> None:
    """Measure the best weights on the validation split, write a sample, and print the results."""
    state, budget = t.state, t.budget
    if budget.too_short:
        finish_time = format_duration(budget.finish_seconds)
        end_time = format_duration(budget.elapsed() + budget.finish_seconds)
        trained = f"only {state.step} steps were made" if state.step else "no time was left to train"
        t.log.warn(
            f"{trained}: the last evaluations alone take {finish_time}, and the run ends after {end_time}; "
            "use a longer --time_budget"
        )
    best_step = None if state.best_step is None else outputs.load_best_weights(t)
    kind, weights_step = ("last", state.step) if best_step is None else ("best", best_step)
    metrics = evaluation.evaluate_val_split(t, int(t.runtime.max(budget.final_windows)[0]))
    record = {"step": state.step, "best_step": weights_step, "seconds": budget.elapsed()}
    t.log.write(record | {f"final_{key}": value for key, value in asdict(metrics).items()})
    sample = outputs.write_sample(t)
    t.log.finish_bar()
    t.log.close()
    plot = t.folder / LOSS_PLOT_FILE
    t.log.info(
        f"\n{sample}\n\n{'whole ' if metrics.is_whole else ''}validation split: {metrics} ({kind} weights, of step {weights_step})\n"
        f"{state.step} steps in {format_duration(budget.elapsed())}; run folder: {t.folder.resolve()}"
        + (f"; loss curve: {plot}" if plot.exists() else "")
        + "\nnext: " + shell_command("sample.py", f"--out_dir={t.folder}")
    )


def report_evaluation(t: Trainer) -> int:
    """For eval_only: print the losses of both splits on fixed windows, then of the whole validation split.

    Returns the exit status.
    """
    losses = evaluation.estimate_loss(t)
    t.log.info(f"train loss {losses['train'].loss:.4f}, val loss {losses['val'].loss:.4f} (fixed windows)")
    t.log.info(f"whole validation split: {evaluation.evaluate_val_split(t)}")
    return 0


if __name__ == "__main__":
    try:
        status = command(
            main, TrainSettings, base=setup.saved_run_settings, report_error=process_group.report_error
        )
    except SystemExit as error:  # on ranks other than 0, after rank 0 has failed: rank 0 prints the error
        status = error.code
    process_group.exit_process(status)
