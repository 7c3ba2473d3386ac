"""Train a GPT: settings -> corpus -> model -> optimizer -> loop -> checkpoints in out/<run>/.

    python train.py config/train_eca_char.py
    python train.py config/train_eca_char.py --n_layer=4 --time_budget=5m
    python train.py --init_from=resume --out_dir=out/eca-char
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

A config file is Python and is run as such: run only those that you trust.
"""

import time

START = time.monotonic()  # the clock of --time_budget runs from here: importing torch is part of the wait

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from configurator import Resolved, command, setting
from fradique.checkpointing import run_folder
from fradique.data import sampler as samplers
from fradique.distributed import lost_ranks, process_group
from fradique.nn.functional import ACTIVATIONS
from fradique.optim import lr_schedule, optimizer
from fradique.runtime import device, memory_limits, signals
from fradique.runtime.device import DTYPES
from fradique.training import evaluation, outputs, setup, skip_step, time_budget
from fradique.training.autoconfig import autotune
from fradique.training.outputs import draw_loss_plot
from fradique.training.setup import model_config, setup_training
from fradique.training.trainer import Trainer
from model import NORM_PLACES, NORMS, POSITIONS


# fmt: off
@dataclass(frozen=True)
class TrainSettings:
    """python train.py [config/<name>.py ...] [--key=value ...]

    Trains a GPT on a prepared corpus. nanoGPT's names and defaults are kept, so its config files run unchanged.
    """

    out_dir: str = setting("out", "folder of the run: settings, metrics, samples, checkpoints", group="run")
    init_from: str = setting("scratch", "scratch | resume | gpt2, gpt2-medium, … | a run folder, ckpt.pt, or Hugging Face folder")
    overwrite: bool = setting(False, "delete the run that out_dir holds and begin anew")
    max_iters: int = setting(600000, "steps of training", lo=0)
    auto: bool = setting(False, "choose model, batch and schedule for this machine, corpus and time_budget; what is set stays")
    time_budget: str = setting("", "end after this long instead, evaluation included: 90s, 10m, 1h30m; the schedule follows the clock")
    seed: int = setting(1337, "of weights, batches and dropout; the same seed gives the same run", lo=0, hi=2**62)
    debug: bool = setting(False, "show the traceback of an error")

    dataset: str = setting("openwebtext", "corpus: a folder under data_dir", group="data")
    data_dir: str = setting("data", "where the corpora lie")
    batch_size: int = setting(12, "sequences in a micro-batch", lo=1, hi=2**20)
    block_size: int = setting(1024, "tokens of context", lo=1, hi=2**30)
    gradient_accumulation_steps: int = setting(40, "micro-batches a step, over all processes together", lo=1, hi=2**20)

    n_layer: int = setting(12, "blocks", lo=1, hi=10_000, group="model")
    n_head: int = setting(12, "attention heads", lo=1, hi=2**20)
    n_embd: int = setting(768, "width; a multiple of n_head", lo=1, hi=2**20)
    dropout: float = setting(0.0, "0 to train on plenty of text; 0.1 to 0.3 on little", lo=0.0, hi=0.99)
    bias: bool = setting(False, "biases in linear layers and layer norms, as GPT-2 has them; without is a bit faster")
    activation: str = setting("gelu", "of the MLP; swiglu and geglu pass it through a gate", choices=tuple(ACTIVATIONS))
    n_inner: int = setting(0, "width of the MLP; 0: 4 n_embd, two thirds of it with a gate", lo=0, hi=2**24)
    n_kv_head: int = setting(0, "heads of keys and values, shared by groups of queries; 1: multi-query; 0: n_head", lo=0)
    position: str = setting("learned", "how a token knows its place", choices=POSITIONS)
    rope_theta: float = setting(10000.0, "position=rope: the longest wavelength is 2π times this", above=0.0)
    norm: str = setting("layernorm", "what keeps the stream in bounds", choices=NORMS)
    norm_place: str = setting("pre", "before each part, after it, or after it with a weighted stream", choices=NORM_PLACES)
    qk_norm: bool = setting(False, "normalise queries and keys, head by head")
    embd_norm: bool = setting(False, "normalise the embedding, as BLOOM does")
    parallel_block: bool = setting(False, "attention and MLP side by side, as in PaLM and GPT-J")
    prefix_len: int = setting(0, "tokens at the beginning of a block that see one another both ways, unpredicted", lo=0)
    sliding_window: int = setting(0, "how many tokens a layer sees, the one itself among them; 0: all", lo=0)
    tie_weights: bool = setting(True, "one matrix for the embedding and the output layer")
    logit_softcap: float = setting(0.0, "c: bend logits into (-c, c); 0: leave them", lo=0.0)
    flash: bool = setting(True, "torch's fused attention; False: the plain softmax")

    freeze: str = setting("", "parts that are not trained: wte,wpe,h.0-5,h.6.attn", group="fine-tuning")
    lora_rank: int = setting(0, "train a difference of this rank beside frozen weights (LoRA); 0: train the weights", lo=0)
    lora_alpha: float = setting(16.0, "the difference counts lora_alpha / lora_rank times", above=0.0)
    lora_targets: str = setting("c_attn,c_proj,c_fc", "the linear layers that get one, by the end of their names")

    optimizer: str = setting("adamw", "adamw; or muon for the matrices inside the blocks, adamw for the rest", choices=optimizer.OPTIMIZERS, group="optimizer")
    learning_rate: float = setting(6e-4, "the peak of AdamW's", above=0.0)
    muon_learning_rate: float = setting(0.02, "the peak of Muon's, on the same schedule", above=0.0)
    muon_momentum: float = setting(0.95, "Muon's memory of the gradient", lo=0.0, hi=0.999999)
    lr_schedule: str = setting("cosine", "shape after the warm-up", choices=tuple(lr_schedule.SCHEDULES))
    decay_lr: bool = setting(True, "False: learning_rate throughout, without warm-up")
    warmup_iters: int = setting(2000, "steps of linear warm-up", lo=0)
    lr_decay_iters: int = setting(0, "step at which min_lr is reached; 0: max_iters", lo=0)
    min_lr: float = setting(6e-5, "the floor", lo=0.0)
    decay_frac: float = setting(0.5, "lr_schedule=wsd: the part of the run that decays", lo=0.0, hi=1.0)
    weight_decay: float = setting(0.1, "of matrices and embeddings", lo=0.0)
    beta1: float = setting(0.9, "AdamW's memory of the gradient", lo=0.0, hi=0.999999)
    beta2: float = setting(0.95, "AdamW's memory of its square", lo=0.0, hi=0.999999)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping", lo=0.0)
    skip_nonfinite: bool = setting(False, "leave out a step whose loss or gradient is not finite, instead of stopping")
    spike_sigmas: float = setting(0.0, "a loss or gradient so many deviations above the last 128 counts as not finite; 0: none does", lo=0.0)

    eval_interval: int = setting(2000, "steps between evaluations and checkpoints", lo=1, group="evaluation and log")
    eval_iters: int = setting(200, "batches of each split in an evaluation; always the same ones", lo=1)
    eval_only: bool = setting(False, "evaluate, report, and stop")
    early_stop_evals: int = setting(0, "stop after so many evaluations without a better one; 0: never", lo=0)
    always_save_checkpoint: bool = setting(True, "False: between start and end, only when the validation loss is the best yet")
    keep_checkpoints: int = setting(2, "how many of the last step checkpoints stay", lo=1)
    log_interval: int = setting(1, "steps between log lines", lo=1)
    sample_interval: int = setting(0, "steps between samples into samples.txt; 0: one at the end", lo=0)
    sample_start: str = setting("", "the prompt of those samples; empty: the beginning of a line")
    sample_tokens: int = setting(200, "their length", lo=1)
    snapshot_interval: int = setting(0, "steps between embeddings kept for lab.movie, in small files; 0: none", lo=0)
    wandb_log: bool = setting(False, "log to Weights & Biases too")
    wandb_project: str = setting("fradique", "its project")
    wandb_run_name: str = setting("", "its name there; empty: the name of out_dir")

    device: str = setting("auto", "auto | cpu | mps | cuda | cuda:N", group="machine")
    dtype: str = setting("auto", "of the forward pass; weights stay float32", choices=("auto", *DTYPES))
    compile: bool | str = setting("auto", "torch.compile; auto: when the run is long enough", choices=("auto", True, False))
    gradient_checkpointing: bool = setting(False, "keep the blocks' inputs alone, and run them twice: less memory, a third more time")
    parallel: str = setting("ddp", "under torchrun: ddp, each process has the whole model; fsdp, each a part of it", choices=("ddp", "fsdp"))
    backend: str = setting("auto", "of torch.distributed under torchrun: auto | nccl | gloo", choices=("auto", "nccl", "gloo"))
    dist_timeout: float = setting(600.0, "seconds for which a process waits for another under torchrun", above=0.0)
    # fmt: on

    def problems(self) -> list[str]:
        """Contradictions between settings that are each sound by themselves."""
        found = [] if self.auto else model_config(self, vocab_size=1).problems()  # auto has yet to choose these
        if not self.auto and self.decay_lr and self.lr_schedule != "constant" and self.min_lr > self.learning_rate:
            found.append(f"min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}")
        try:
            time_budget.parse_duration(self.time_budget)
        except ValueError as error:
            found.append(str(error))
        if self.auto and self.init_from not in ("scratch", "resume"):
            found.append("auto chooses a model to train from scratch: leave init_from, or auto, as it was")
        if self.auto and not self.time_budget and self.init_from == "scratch":
            found.append("auto chooses for a time: give --time_budget=5m, or as long as you have")
        if self.lora_rank and self.init_from == "scratch":
            found.append(
                f"lora_rank = {self.lora_rank} adapts weights that are there, and init_from=scratch has none: "
                "give --init_from a run folder, gpt2, …, or leave lora_rank at 0"
            )
        if self.parallel == "fsdp" and self.optimizer == "muon":
            found.append("optimizer = 'muon' needs whole matrices, and parallel = 'fsdp' parts them: change one of the two")
        if self.overwrite and self.init_from == "resume":
            found.append("overwrite deletes the run that init_from=resume would go on with: give one of the two")
        return found


@memory_limits.report_oom
def main(resolved: Resolved[TrainSettings]) -> int:
    settings, notes = resolved.settings, ()
    with lost_ranks.report_lost_ranks():
        device.join_run(settings.device, settings.backend, settings.dist_timeout)
        settings = process_group.broadcast_from_rank0(lambda: setup.settings_after_restart(settings))
        if settings.auto and settings.init_from == "scratch" and not settings.eval_only:
            fixed = {key: getattr(settings, key) for key in resolved.explicit}
            settings, notes = autotune(settings, fixed, time_step, START)
        t = setup_training(settings, notes, started=START)
    try:
        if t.settings.eval_only:
            report_evaluation(t)
            status = 0
        else:
            status = train(t)
        t.forward = t.model  # a DDP wrapper must go before its process group does
        t.runtime.wait()
        return status
    finally:
        t.close()
        t.runtime.close()


def train(t: Trainer) -> int:
    """The loop. Returns the exit status: 0, or 128 + n after signal n."""
    stop = signals.StopSignal()
    with lost_ranks.report_lost_ranks(lambda: stop.number != 0):
        return loop(t, stop)


def loop(t: Trainer, stop: signals.StopSignal) -> int:
    settings, state = t.settings, t.state
    try:
        while not finished(t):
            if state.step % settings.eval_interval == 0:
                evaluate_and_save(t)
                if out_of_patience(t) or finished(t):
                    break
            outputs.save_snapshot(t)
            with t.pace.step():
                loss, norm = train_step(t, learning_rate(t))
            state.step += 1
            if state.step % settings.log_interval == 0:
                outputs.log_step(t, loss, norm)
            if settings.sample_interval and state.step % settings.sample_interval == 0:
                with t.pace.aside():
                    outputs.write_sample(t)
            if t.log.broken:  # python train.py | head
                stop.number = stop.number or signals.SIGPIPE
            if stop.heard(t.runtime):
                return leave_early(t, stop)
        evaluate_and_save(t, last=True)
        outputs.save_snapshot(t, last=True)
        if t.pace.too_short:
            ends, closing = (time_budget.format_duration(s) for s in (t.pace.elapsed() + t.pace.closing, t.pace.closing))
            trained = f"{state.step} steps were made" if state.step else "no time was left to train"
            t.log.warn(f"{trained}: the evaluations alone take {closing}, until {ends}; give a longer budget")
    finally:
        stop.forget()
    finish(t)
    return 0


def learning_rate(t: Trainer) -> float:
    """Of the step to come: by its number, or by the clock where a time budget ends the run."""
    s, pace = t.settings, t.pace
    total = s.lr_decay_iters or s.max_iters
    if pace.budget is not None:
        total = lr_schedule.estimate_total_steps(t.state.step, pace.now, max(1.0, pace.ends))
    return lr_schedule.learning_rate(
        t.state.step,
        schedule=s.lr_schedule if s.decay_lr else "constant",
        peak=s.learning_rate,
        floor=s.min_lr,
        warmup=s.warmup_iters if s.decay_lr else 0,
        total=total,
        decay_frac=s.decay_frac,
    )


def train_step(t: Trainer, lr: float) -> tuple[Tensor, Tensor]:
    """One update: the loss of its batch and the norm of its gradient, as tensors on the device.

    Dropout is seeded by (seed, step, rank), so a step is a function of weights and settings. Raises
    ValueError, before the weights are touched, where the loss or the gradient is not finite (on CUDA that is
    looked at when the loss is logged, so as not to wait for the card at every step).
    """
    settings, place = t.settings, t.runtime
    place.seed(samplers.derive_seed(settings.seed, t.state.step, place.rank))
    optimizer.set_learning_rate(t.optimizers, lr)
    batches = place.slices(t.sampler.micro_batches(t.state.step, place.rank, place.world))
    total = torch.zeros((), device=place.device)
    with place.autocast():  # around them all: the weights are cast once
        for i, batch in enumerate(batches):
            x, y = place.move(*batch)
            if place.world > 1 and not place.sharded:  # gradients are shared once, with the last slice
                t.forward.require_backward_grad_sync = i == len(batches) - 1
            loss = t.forward(x, y, with_logits=False)[1] / len(batches)
            with place.autocast(enabled=False):
                t.scaler.scale(loss).backward()
            total += loss.detach()
    optimizer.assign_gradients(t.optimizers)
    for one in t.optimizers:
        t.scaler.unscale_(one)
    norm = optimizer.clip_gradients(t.model, settings.grad_clip)
    sound = skip_step.accept_step(t, total, norm)
    if sound and (not t.scaler.is_enabled() or math.isfinite(norm)):  # float16: all optimizers step, or none
        for one in t.optimizers:
            t.scaler.step(one)
    t.scaler.update()
    t.model.zero_grad(set_to_none=True)
    for one in t.optimizers:  # Muon's views of the gradients too
        one.zero_grad(set_to_none=True)
    return total, norm


def time_step(t: Trainer) -> float:
    """Seconds of a step, until its loss is there."""
    start = time.monotonic()
    loss, _ = train_step(t, learning_rate(t))
    loss.item()
    return time.monotonic() - start


def fixed_losses(t: Trainer, seconds: list[float] | None = None) -> dict[str, float]:
    s, place = t.settings, t.runtime
    return evaluation.estimate_loss(
        t.model, t.corpus, s.block_size, s.batch_size, s.eval_iters, place, seconds
    )


def whole_validation(t: Trainer) -> evaluation.SplitMetrics:
    s = t.settings
    return evaluation.evaluate_val_split(t.model, t.corpus, s.block_size, s.batch_size, t.runtime)


def evaluate_and_save(t: Trainer, last: bool = False) -> None:
    """Evaluate, log, draw, and keep a checkpoint, once a step; the last step is kept in any case."""
    state = t.state
    outputs.follow_moved_folder(t)
    if state.last_eval_step == state.step:
        if last and t.saved_step != state.step:
            outputs.save_checkpoint(t)
        return
    with t.pace.aside():
        seconds: list[float] = []  # that a window took, of each batch
        losses = fixed_losses(t, seconds)
        evaluated = time.monotonic()
        skip_step.check_finite(t, state.step, sum(losses.values()))
        state.last_eval_step = state.step
        improved = state.best_val_loss is None or losses["val"] < state.best_val_loss
        if improved:
            state.best_val_loss, state.best_step, state.evals_since_best = losses["val"], state.step, 0
        else:
            state.evals_since_best += 1
        outputs.log_evaluation(t, losses)
        if t.runtime.is_main:
            draw_loss_plot(t)
        window = statistics.median(seconds)
        t.pace.closing = closing_seconds(t, window, 0.0)  # a checkpoint tells it
        if improved or last or t.settings.always_save_checkpoint:
            outputs.save_checkpoint(t, best=improved)
        in_keeping = time.monotonic() - evaluated
        if t.pace.budget is not None and not t.pace.writing:
            outputs.write_sample(t)  # the last step is followed by one: see how long it takes
    t.pace.closing = closing_seconds(t, window, in_keeping)
    if not state.step:
        t.pace.begun = t.pace.elapsed()


def closing_seconds(t: Trainer, window: float, in_keeping: float) -> float:
    """How long the end of the run will take: an evaluation, keeping it, the whole split, and a sample.

    `window`: seconds that one takes to evaluate, as most did just now. The first are slow, and so is one
    beside which the machine had other work.
    """
    size, count = t.settings.block_size, t.settings.eval_iters * t.settings.batch_size
    here, there = (split.count_windows(size) for split in (t.corpus.train, t.corpus.val))
    windows = min(count, here) + min(count, there) + there
    return 1.1 * (window * windows / t.runtime.world + in_keeping + t.pace.writing)


def finished(t: Trainer) -> bool:
    pace = t.pace
    if pace.budget is None:
        return t.state.step >= t.settings.max_iters
    # one clock for all ranks: where one went on and another did not, they would wait for each other for ever
    told = t.runtime.max(pace.elapsed(), pace.closing, pace.begun, pace.last_step)
    pace.now, pace.closing, pace.begun, pace.last_step = told
    return pace.time_is_up()


def out_of_patience(t: Trainer) -> bool:
    limit = t.settings.early_stop_evals
    if not limit or t.state.evals_since_best < limit:
        return False
    t.log.say(f"no better validation loss in {limit} evaluations: stopping at step {t.state.step}")
    return True


def leave_early(t: Trainer, stop: signals.StopSignal) -> int:
    """After a signal: save and go. A resumed run continues as if nothing had happened."""
    outputs.follow_moved_folder(t)
    outputs.save_checkpoint(t)
    t.log.say(
        f"{stop.name}: saved step {t.state.step}; go on with: "
        f"python train.py --init_from=resume --out_dir={t.settings.out_dir}"
    )
    return 128 + stop.number


def finish(t: Trainer) -> None:
    """The whole validation split, once, by the best checkpoint; a sample; and where all this lies."""
    folder, state = Path(t.settings.out_dir), t.state
    if state.best_step not in (None, state.step):
        outputs.load_best_weights(t, folder / "best")
    final = whole_validation(t)
    record = {"step": state.step, "best_step": state.best_step, "seconds": t.pace.elapsed()}
    t.log.write(record | {f"final_{key}": value for key, value in asdict(final).items()})
    sample = outputs.write_sample(t)
    t.log.close()
    t.log.say(
        f"\n{sample}\n\nwhole validation split: {final} (weights of step {state.best_step}, the best)\n"
        f"{state.step} steps in {time_budget.format_duration(t.pace.elapsed())}; the run lies in {folder}"
        + (f", its loss curve is {folder / run_folder.LOSS_PLOT_FILE}" if (folder / run_folder.LOSS_PLOT_FILE).exists() else "")
        + f"\nmore text: python sample.py --out_dir={folder}"
    )


def report_evaluation(t: Trainer) -> None:
    """What eval_only prints: both splits on the fixed windows, then the whole validation split."""
    losses = fixed_losses(t)
    t.log.say(f"train loss {losses['train']:.4f}, val loss {losses['val']:.4f} (fixed windows)")
    t.log.say(f"whole validation split: {whole_validation(t)}")


if __name__ == "__main__":
    process_group.exit_process(command(main, TrainSettings, base=setup.saved_run_settings))
