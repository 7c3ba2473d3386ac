"""Train a GPT: settings -> corpus -> model -> optimizer -> loop -> checkpoints in out/<run>/.

    python train.py config/train_eca_char.py
    python train.py config/train_eca_char.py --n_layer=4 --time_budget=5m
    python train.py --init_from=resume --out_dir=out/eca-char
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

A config file is Python and is run as such: run only those that you trust.
"""

import time

START = time.monotonic()  # the clock of --time_budget runs from here: importing torch is part of the wait

import contextlib
import gc
import io
import math
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configurator import Resolved, command, setting
from fradique import (
    auto,
    checkpoint,
    dataset,
    evaluation,
    finetune,
    keeping,
    layouts,
    limits,
    metrics,
    optimizer,
    pretrained,
    ranks,
    restart,
    run,
    runtime,
    schedule,
    stability,
    starting,
    telling,
)
from fradique import tokenizer as tokenizers
from fradique.state import TrainState
from fradique.training import Training, tokens_per_step
from model import ACTIVATIONS, GPT, NORM_PLACES, NORMS, POSITIONS, GPTConfig

TRIAL_SECONDS = 1.0  # for which `auto` tries a size


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
    lr_schedule: str = setting("cosine", "shape after the warm-up", choices=tuple(schedule.SCHEDULES))
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
    dtype: str = setting("auto", "of the forward pass; weights stay float32", choices=("auto", *runtime.DTYPES))
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
            metrics.seconds(self.time_budget)
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


@limits.explained
def main(resolved: Resolved[TrainSettings]) -> int:
    settings, notes = resolved.settings, ()
    with ranks.named_if_lost():
        runtime.join(settings.device, settings.backend, settings.dist_timeout)
        settings = ranks.agree(lambda: restart.after_restart(settings))
        if settings.auto and settings.init_from == "scratch" and not settings.eval_only:
            settings, notes = choose(settings, {key: getattr(settings, key) for key in resolved.explicit})
        t = set_up(settings, notes)
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


def train(t: Training) -> int:
    """The loop. Returns the exit status: 0, or 128 + n after signal n."""
    stop = runtime.StopSignal()
    with ranks.named_if_lost(lambda: stop.number != 0):
        return loop(t, stop)


def loop(t: Training, stop: runtime.StopSignal) -> int:
    settings, state = t.settings, t.state
    try:
        while not finished(t):
            if state.step % settings.eval_interval == 0:
                evaluate_and_save(t)
                if out_of_patience(t) or finished(t):
                    break
            keeping.keep_snapshot(t)
            with t.pace.step():
                loss, norm = train_step(t, learning_rate(t))
            state.step += 1
            if state.step % settings.log_interval == 0:
                telling.log_step(t, loss, norm)
            if settings.sample_interval and state.step % settings.sample_interval == 0:
                with t.pace.aside():
                    keeping.write_sample(t)
            if t.log.broken:  # python train.py | head
                stop.number = stop.number or runtime.SIGPIPE
            if stop.heard(t.runtime):
                return leave_early(t, stop)
        evaluate_and_save(t, last=True)
        keeping.keep_snapshot(t, last=True)
        if t.pace.too_short:
            ends, closing = (metrics.duration(s) for s in (t.pace.elapsed() + t.pace.closing, t.pace.closing))
            trained = f"{state.step} steps were made" if state.step else "no time was left to train"
            t.log.warn(f"{trained}: the evaluations alone take {closing}, until {ends}; give a longer budget")
    finally:
        stop.forget()
    finish(t)
    return 0


def learning_rate(t: Training) -> float:
    """Of the step to come: by its number, or by the clock where a time budget ends the run."""
    s, pace = t.settings, t.pace
    total = s.lr_decay_iters or s.max_iters
    if pace.budget is not None:
        total = schedule.steps_by_clock(t.state.step, pace.now, max(1.0, pace.ends))
    return schedule.learning_rate(
        t.state.step,
        schedule=s.lr_schedule if s.decay_lr else "constant",
        peak=s.learning_rate,
        floor=s.min_lr,
        warmup=s.warmup_iters if s.decay_lr else 0,
        total=total,
        decay_frac=s.decay_frac,
    )


def train_step(t: Training, lr: float) -> tuple[Tensor, Tensor]:
    """One update: the loss of its batch and the norm of its gradient, as tensors on the device.

    Dropout is seeded by (seed, step, rank), so a step is a function of weights and settings. Raises
    ValueError, before the weights are touched, where the loss or the gradient is not finite (on CUDA that is
    looked at when the loss is logged, so as not to wait for the card at every step).
    """
    settings, place = t.settings, t.runtime
    place.seed(dataset.hash_numbers(settings.seed, t.state.step, place.rank))
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
    optimizer.find_gradients(t.optimizers)
    for one in t.optimizers:
        t.scaler.unscale_(one)
    norm = optimizer.clip_gradients(t.model, settings.grad_clip)
    sound = stability.is_sound(t, total, norm)
    if sound and (not t.scaler.is_enabled() or math.isfinite(norm)):  # float16: all optimizers step, or none
        for one in t.optimizers:
            t.scaler.step(one)
    t.scaler.update()
    t.model.zero_grad(set_to_none=True)
    for one in t.optimizers:  # Muon's views of the gradients too
        one.zero_grad(set_to_none=True)
    return total, norm


def choose(settings: TrainSettings, fixed: dict[str, Any]) -> tuple[TrainSettings, tuple[str, ...]]:
    """What `auto` leaves open, by trying sizes on this machine, and what to say of it. All ranks agree."""
    budget = metrics.seconds(settings.time_budget)
    run.check_free(Path(settings.out_dir), settings.overwrite)

    def measure(changes: dict[str, Any]) -> auto.Trial:
        with (
            tempfile.TemporaryDirectory() as scratch,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),  # what is worth a warning is told again by the run
        ):
            there = {"out_dir": f"{scratch}/run", "compile": False, "wandb_log": False, "auto": False}
            t = set_up(replace(settings, **changes | there), share=False)
            try:
                time_step(t)
                (first,) = t.runtime.max(time_step(t))  # ranks must agree on how many there are
                count = min(12, max(1, int(TRIAL_SECONDS / first)))
                pace = min(time_step(t) for _ in range(count))  # what else is busy here only adds to it
            finally:
                t.close()
            pace, spent = t.runtime.max(pace, time.monotonic() - START)
            trial = auto.Trial(
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
    changes, said = auto.choose(budget, fixed, measure, world)
    settings = replace(settings, **changes)
    if problems := replace(settings, auto=False).problems():
        raise ValueError("; ".join(problems))
    return settings, tuple(said)


def time_step(t: Training) -> float:
    """Seconds of a step, until its loss is there."""
    start = time.monotonic()
    loss, _ = train_step(t, learning_rate(t))
    loss.item()
    return time.monotonic() - start


def set_up(settings: TrainSettings, notes: tuple[str, ...] = (), share: bool = True) -> Training:
    """Everything that the loop needs, checked before anything is written; `notes` are told with its own.
    Without `share` each rank keeps its gradients to itself.

    Raises ValueError, with what to do, where corpus, weights, machine or out_dir do not fit the settings.
    """
    folder = Path(settings.out_dir)
    writes = not settings.eval_only
    runtime.join(settings.device, settings.backend, settings.dist_timeout)
    if writes:
        new = settings.init_from != "resume"
        ranks.agree(lambda: run.check_free(folder, settings.overwrite) if new else run.check_unheld(folder))
    corpus = dataset.open_corpus(Path(settings.data_dir) / settings.dataset, settings.block_size)
    torch.manual_seed(settings.seed)
    model, settings, held = make_model(settings, corpus)
    budget = metrics.seconds(settings.time_budget)
    place = runtime.start(
        device=settings.device,
        dtype=settings.dtype,
        compile=settings.compile if writes else False,
        backend=settings.backend,
        parallel=settings.parallel if share else "ddp",
        timeout=settings.dist_timeout,
        n_embd=model.config.n_embd,
        vocab_size=model.config.vocab_size,
        run_flops=float(model.flops_per_token() * tokens_per_step(settings) * settings.max_iters),
        run_seconds=budget,
    )
    place = replace(place, notes=(*notes, *place.notes))
    sampler = dataset.Sampler(
        corpus.train,
        settings.block_size,
        settings.batch_size,
        settings.gradient_accumulation_steps,
        settings.seed,
    )
    sampler.share(place.world)
    if place.sharded:
        from fradique import sharding  # torch takes a second to import what it needs

        sharding.shard(model, model.transformer["h"], place.device)
    else:
        model.to(place.device)
    model.gradient_checkpointing = settings.gradient_checkpointing
    state = TrainState.read(held.state) if held else TrainState()
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)
    optimizers = optimizer.build(
        model,
        name=settings.optimizer,
        learning_rate=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        muon_learning_rate=settings.muon_learning_rate,
        muon_momentum=settings.muon_momentum,
    )
    if held:
        if place.sharded:
            held = starting.read_parts(held, model, optimizers)
        optimizer.load_state_by_name(optimizers, held.optimizer)
        if place.dtype == torch.float16 and state.scaler:  # the run may have begun in another dtype
            scaler.load_state_dict(state.scaler)
    if settings.wandb_log and writes:
        metrics.check_wandb()
    tokenizers.encode_prompt(corpus.tokenizer, settings.sample_start)  # else it would fail at the first sample
    place.wait()  # until every rank has looked at the folder as it was
    ours = None
    if writes and place.is_main:
        decided = {"device": place.describe(), "compile": place.compile, "notes": list(place.notes)}
        ours = run.take(
            folder,
            asdict(settings),
            decided | {"launch": ranks.launch()},
            corpus.tokenizer,
            go_on_from=state.step if held else None,
            overwrite=settings.overwrite,
        )
    place.wait()
    log = metrics.RunLog(
        folder if writes else None,
        speak=place.is_main,
        total=budget or settings.max_iters,
        start=state.seconds if budget else state.step,
        unit="s" if budget else "step",
        wandb=wandb_options(settings) if writes else None,
    )
    t = Training(
        settings=settings,
        runtime=place,
        corpus=corpus,
        sampler=sampler,
        model=model,
        forward=model,
        optimizers=optimizers,
        scaler=scaler,
        state=state,
        pace=metrics.Pace(START, state.seconds, budget),
        log=log,
        held=ours,
        saved_step=state.step if held else -1,
    )
    telling.introduce(t)
    t.forward = compile_forward(t) if place.compile else model
    if share:
        t.forward = place.wrap(t.forward)
    if share and place.world > 1 and not place.sharded:
        try_pass(t, t.forward)  # DDP then lays gradients out for good: sums are in one order, resumed or not
    t.pace.closing, t.pace.writing = state.closing_seconds, state.writing_seconds
    t.pace.mark(state.step)
    return t


def make_model(
    settings: TrainSettings, corpus: dataset.Corpus
) -> tuple[GPT, TrainSettings, checkpoint.Checkpoint | None]:
    """The model by init_from, the settings with its true shape, and the checkpoint where a run is resumed."""
    if settings.init_from == "resume":
        return resumed_model(settings, corpus)
    if settings.init_from != "scratch":
        return adopted_model(settings, corpus)
    shape = model_config(settings, starting.padded(corpus.tokenizer))
    starting.expect_memory(settings, shape)
    model = GPT(shape)
    starting.choose_trained(model, settings)
    return model, settings, None


def resumed_model(
    settings: TrainSettings, corpus: dataset.Corpus
) -> tuple[GPT, TrainSettings, checkpoint.Checkpoint]:
    """That of the newest checkpoint in out_dir that is whole."""
    folder = Path(settings.out_dir)
    run.check_tokenizer(folder, corpus.tokenizer, corpus.folder)
    latest = ranks.agree(
        lambda: checkpoint.newest(
            folder, lambda text: print(f"warning: {text}", file=sys.stderr), run.name_of(folder)
        )
    )
    in_parts = settings.parallel == "fsdp" and ranks.here()[2] > 1
    held = checkpoint.describe(latest) if in_parts else checkpoint.load(latest, verified=True)
    described = {name: value for name, value in held.config.items() if name != finetune.ALPHA}
    tensors = checkpoint.shapes(latest / "model.safetensors") if in_parts else held.model
    layouts.check_ours(described, tensors, str(latest / "model.json"))
    shape = model_config(settings, held.config["vocab_size"])
    with torch.device("cpu" if in_parts else "meta"):  # no memory yet: it adopts what was loaded
        model = GPT(shape)
        starting.choose_trained(model, settings)
    starting.expect_memory(settings, shape, finetune.trained(model))
    if not in_parts:
        checkpoint.adopt(model, held.model, str(latest))
    starting.check_same_shape(shape, held.config, folder)
    return model, settings, held


def adopted_model(settings: TrainSettings, corpus: dataset.Corpus) -> tuple[GPT, TrainSettings, None]:
    """GPT-2's, or that of another run: its shape takes the place of the settings' own."""
    weights = pretrained.load(settings.init_from)
    with torch.device("meta"):
        model = GPT(GPTConfig(**weights.config | {"dropout": settings.dropout, "flash": settings.flash}))
    checkpoint.adopt(model, weights.tensors, weights.source)
    pretrained.check_tokenizer(weights, corpus.tokenizer, corpus.folder)
    if weights.tokenizer is None:
        print(
            f"warning: {weights.source} comes without a tokenizer that this program knows: whether the "
            f"tokens of {corpus.folder} mean the same to it cannot be checked",
            file=sys.stderr,
        )
    if settings.block_size < model.config.block_size:
        model.crop_block_size(settings.block_size)
    elif settings.block_size > model.config.block_size:
        raise ValueError(
            f"block_size = {settings.block_size} is longer than the {model.config.block_size} positions of "
            f"{weights.source}: choose --block_size={model.config.block_size} or less"
        )
    starting.choose_trained(model, settings)
    starting.expect_memory(settings, model.config, finetune.trained(model))
    shape = {name: value for name, value in asdict(model.config).items() if hasattr(settings, name)}
    return model, replace(settings, **shape), None


def model_config(settings: TrainSettings, vocab_size: int) -> GPTConfig:
    shape = {name: getattr(settings, name) for name in GPTConfig.names() if hasattr(settings, name)}
    return GPTConfig(vocab_size=vocab_size, **shape)


def wandb_options(settings: TrainSettings) -> dict[str, Any] | None:
    if not settings.wandb_log:
        return None
    name = settings.wandb_run_name or Path(settings.out_dir).name
    return {"project": settings.wandb_project, "name": name, "config": asdict(settings)}


def compile_forward(t: Training) -> nn.Module:
    """The compiled model, tried on a forward and backward pass; eager where that fails."""

    return runtime.compiled(t.model, lambda forward: try_pass(t, forward), t.log.warn)


def try_pass(t: Training, forward: nn.Module) -> None:
    """A forward and a backward pass of the batch to come, of which nothing stays."""
    batches = t.sampler.micro_batches(t.state.step, t.runtime.rank, t.runtime.world)
    x, y = t.runtime.move(*t.runtime.slices(batches)[0])
    with t.runtime.autocast():
        loss = forward(x, y, with_logits=False)[1]
    loss.backward()
    t.model.zero_grad(set_to_none=True)


def fixed_losses(t: Training, seconds: list[float] | None = None) -> dict[str, float]:
    s, place = t.settings, t.runtime
    return evaluation.fixed_losses(
        t.model, t.corpus, s.block_size, s.batch_size, s.eval_iters, place, seconds
    )


def whole_validation(t: Training) -> evaluation.WholeSplit:
    s = t.settings
    return evaluation.whole_validation(t.model, t.corpus, s.block_size, s.batch_size, t.runtime)


def evaluate_and_save(t: Training, last: bool = False) -> None:
    """Evaluate, log, draw, and keep a checkpoint, once a step; the last step is kept in any case."""
    state = t.state
    keeping.follow(t)
    if state.last_eval_step == state.step:
        if last and t.saved_step != state.step:
            keeping.save(t)
        return
    with t.pace.aside():
        seconds: list[float] = []  # that a window took, of each batch
        losses = fixed_losses(t, seconds)
        evaluated = time.monotonic()
        stability.check_finite(t, state.step, sum(losses.values()))
        state.last_eval_step = state.step
        improved = state.best_val_loss is None or losses["val"] < state.best_val_loss
        if improved:
            state.best_val_loss, state.best_step, state.evals_since_best = losses["val"], state.step, 0
        else:
            state.evals_since_best += 1
        telling.log_evaluation(t, losses)
        if t.runtime.is_main:
            draw_curve(t)
        window = statistics.median(seconds)
        t.pace.closing = closing_seconds(t, window, 0.0)  # a checkpoint tells it
        if improved or last or t.settings.always_save_checkpoint:
            keeping.save(t, best=improved)
        in_keeping = time.monotonic() - evaluated
        if t.pace.budget is not None and not t.pace.writing:
            keeping.write_sample(t)  # the last step is followed by one: see how long it takes
    t.pace.closing = closing_seconds(t, window, in_keeping)
    if not state.step:
        t.pace.begun = t.pace.elapsed()


def closing_seconds(t: Training, window: float, in_keeping: float) -> float:
    """How long the end of the run will take: an evaluation, keeping it, the whole split, and a sample.

    `window`: seconds that one takes to evaluate, as most did just now. The first are slow, and so is one
    beside which the machine had other work.
    """
    size, count = t.settings.block_size, t.settings.eval_iters * t.settings.batch_size
    here, there = (split.count_windows(size) for split in (t.corpus.train, t.corpus.val))
    windows = min(count, here) + min(count, there) + there
    return 1.1 * (window * windows / t.runtime.world + in_keeping + t.pace.writing)


def draw_curve(t: Training) -> None:
    """Refresh loss.png in the run folder. A picture that cannot be drawn is no reason to stop a run."""
    folder = Path(t.settings.out_dir)
    try:
        from lab import curves

        # a figure is a ring of objects: what comes to be old while it is drawn would pile up for long
        gc.disable()
        curves.draw([curves.read(folder)], folder / run.CURVE)
    except ImportError:
        t.log.warn_once("there is no matplotlib, so no loss.png: pip install matplotlib")
    except (OSError, ValueError) as error:
        t.log.warn_once(f"loss.png cannot be drawn: {error}")
    finally:
        gc.enable()
        gc.collect(1)


def finished(t: Training) -> bool:
    pace = t.pace
    if pace.budget is None:
        return t.state.step >= t.settings.max_iters
    # one clock for all ranks: where one went on and another did not, they would wait for each other for ever
    told = t.runtime.max(pace.elapsed(), pace.closing, pace.begun, pace.last_step)
    pace.now, pace.closing, pace.begun, pace.last_step = told
    return pace.time_is_up()


def out_of_patience(t: Training) -> bool:
    limit = t.settings.early_stop_evals
    if not limit or t.state.evals_since_best < limit:
        return False
    t.log.say(f"no better validation loss in {limit} evaluations: stopping at step {t.state.step}")
    return True


def leave_early(t: Training, stop: runtime.StopSignal) -> int:
    """After a signal: save and go. A resumed run continues as if nothing had happened."""
    keeping.follow(t)
    keeping.save(t)
    t.log.say(
        f"{stop.name}: saved step {t.state.step}; go on with: "
        f"python train.py --init_from=resume --out_dir={t.settings.out_dir}"
    )
    return 128 + stop.number


def finish(t: Training) -> None:
    """The whole validation split, once, by the best checkpoint; a sample; and where all this lies."""
    folder, state = Path(t.settings.out_dir), t.state
    if state.best_step not in (None, state.step):
        keeping.load_best(t, folder / "best")
    final = whole_validation(t)
    record = {"step": state.step, "best_step": state.best_step, "seconds": t.pace.elapsed()}
    t.log.write(record | {f"final_{key}": value for key, value in asdict(final).items()})
    sample = keeping.write_sample(t)
    t.log.close()
    t.log.say(
        f"\n{sample}\n\nwhole validation split: {final} (weights of step {state.best_step}, the best)\n"
        f"{state.step} steps in {metrics.duration(t.pace.elapsed())}; the run lies in {folder}"
        + (f", its loss curve is {folder / run.CURVE}" if (folder / run.CURVE).exists() else "")
        + f"\nmore text: python sample.py --out_dir={folder}"
    )


def report_evaluation(t: Training) -> None:
    """What eval_only prints: both splits on the fixed windows, then the whole validation split."""
    losses = fixed_losses(t)
    t.log.say(f"train loss {losses['train']:.4f}, val loss {losses['val']:.4f} (fixed windows)")
    t.log.say(f"whole validation split: {whole_validation(t)}")


if __name__ == "__main__":
    ranks.end(command(main, TrainSettings, base=restart.settings_of_the_run))
