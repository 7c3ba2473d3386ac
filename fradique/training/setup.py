"""A run that goes on: by --init_from=resume, or because torchrun lost a process and starts all again."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fradique.checkpointing import checkpoint, run_folder
from fradique.data import dataset
from fradique.data import sampler as samplers
from fradique.distributed import process_group
from fradique.nn import lora
from fradique.optim import optimizer
from fradique.pretrained import hf_config, loader
from fradique.runtime import device, memory_estimate, memory_limits
from fradique.tokenizer import tokenizer as tokenizers
from fradique.training import logger, outputs, time_budget
from fradique.training.trainer import Settings, Trainer, TrainState, tokens_per_step
from model import GPT, GPTConfig

if TYPE_CHECKING:
    from train import TrainSettings


def setup_training(
    settings: TrainSettings, notes: tuple[str, ...] = (), share: bool = True, started: float | None = None
) -> Trainer:
    """Everything that the loop needs, checked before anything is written; `notes` are told with its own.
    Without `share` each rank keeps its gradients to itself.

    Raises ValueError, with what to do, where corpus, weights, machine or out_dir do not fit the settings.
    """
    folder = Path(settings.out_dir)
    writes = not settings.eval_only
    device.join_run(settings.device, settings.backend, settings.dist_timeout)
    if writes:
        new = settings.init_from != "resume"
        process_group.broadcast_from_rank0(
            lambda: (
                run_folder.check_available(folder, settings.overwrite)
                if new
                else run_folder.check_unlocked(folder)
            )
        )
    corpus = dataset.open_corpus(Path(settings.data_dir) / settings.dataset, settings.block_size)
    torch.manual_seed(settings.seed)
    model, settings, held = make_model(settings, corpus)
    budget = time_budget.parse_duration(settings.time_budget)
    place = device.setup_runtime(
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
    sampler = samplers.Sampler(
        corpus.train,
        settings.block_size,
        settings.batch_size,
        settings.gradient_accumulation_steps,
        settings.seed,
    )
    sampler.share(place.world)
    if place.sharded:
        from fradique.distributed import fsdp  # torch takes a second to import what it needs

        fsdp.shard_model(model, model.transformer["h"], place.device)
    else:
        model.to(place.device)
    model.gradient_checkpointing = settings.gradient_checkpointing
    state = TrainState.read(held.state) if held else TrainState()
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)
    optimizers = optimizer.build_optimizers(
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
            held = read_sharded_state(held, model, optimizers)
        optimizer.load_state_by_name(optimizers, held.optimizer)
        if place.dtype == torch.float16 and state.scaler:  # the run may have begun in another dtype
            scaler.load_state_dict(state.scaler)
    if settings.wandb_log and writes:
        logger.check_wandb()
    tokenizers.encode_prompt(
        corpus.tokenizer, settings.sample_start
    )  # else it would fail at the first sample
    place.wait()  # until every rank has looked at the folder as it was
    ours = None
    if writes and place.is_main:
        decided = {"device": place.describe(), "compile": place.compile, "notes": list(place.notes)}
        ours = run_folder.claim_run_folder(
            folder,
            asdict(settings),
            decided | {"launch": process_group.launch_id()},
            corpus.tokenizer,
            go_on_from=state.step if held else None,
            overwrite=settings.overwrite,
        )
    place.wait()
    log = logger.RunLogger(
        folder if writes else None,
        speak=place.is_main,
        total=budget or settings.max_iters,
        start=state.seconds if budget else state.step,
        unit="s" if budget else "step",
        wandb=wandb_options(settings) if writes else None,
    )
    t = Trainer(
        settings=settings,
        runtime=place,
        corpus=corpus,
        sampler=sampler,
        model=model,
        forward=model,
        optimizers=optimizers,
        scaler=scaler,
        state=state,
        pace=time_budget.TimeBudget(time.monotonic() if started is None else started, state.seconds, budget),
        log=log,
        held=ours,
        saved_step=state.step if held else -1,
    )
    outputs.log_startup(t)
    t.forward = compile_forward(t) if place.compile else model
    if share:
        t.forward = place.wrap(t.forward)
    if share and place.world > 1 and not place.sharded:
        warmup_pass(
            t, t.forward
        )  # DDP then lays gradients out for good: sums are in one order, resumed or not
    t.pace.closing, t.pace.writing = state.closing_seconds, state.writing_seconds
    t.pace.mark(state.step)
    return t


def make_model(
    settings: TrainSettings, corpus: dataset.Corpus
) -> tuple[GPT, TrainSettings, checkpoint.Checkpoint | None]:
    """The model by init_from, the settings with its true shape, and the checkpoint where a run is resumed."""
    if settings.init_from == "resume":
        return resume_model(settings, corpus)
    if settings.init_from != "scratch":
        return load_pretrained_model(settings, corpus)
    shape = model_config(settings, padded_vocab_size(corpus.tokenizer))
    warn_if_too_large(settings, shape)
    model = GPT(shape)
    select_trainable(model, settings)
    return model, settings, None


def resume_model(
    settings: TrainSettings, corpus: dataset.Corpus
) -> tuple[GPT, TrainSettings, checkpoint.Checkpoint]:
    """That of the newest checkpoint in out_dir that is whole."""
    folder = Path(settings.out_dir)
    run_folder.check_tokenizer(folder, corpus.tokenizer, corpus.folder)
    latest = process_group.broadcast_from_rank0(
        lambda: checkpoint.newest_checkpoint(
            folder, lambda text: print(f"warning: {text}", file=sys.stderr), run_folder.run_id(folder)
        )
    )
    in_parts = settings.parallel == "fsdp" and process_group.rank_info()[2] > 1
    held = (
        checkpoint.read_checkpoint_metadata(latest)
        if in_parts
        else checkpoint.read_checkpoint(latest, verified=True)
    )
    described = {name: value for name, value in held.config.items() if name != lora.LORA_ALPHA}
    tensors = checkpoint.read_shapes(latest / "model.safetensors") if in_parts else held.model
    hf_config.check_model_config(described, tensors, str(latest / "model.json"))
    shape = model_config(settings, held.config["vocab_size"])
    with torch.device("cpu" if in_parts else "meta"):  # no memory yet: it adopts what was loaded
        model = GPT(shape)
        select_trainable(model, settings)
    warn_if_too_large(settings, shape, lora.count_trainable(model))
    if not in_parts:
        checkpoint.assign_parameters(model, held.model, str(latest))
    check_same_shape(shape, held.config, folder)
    return model, settings, held


def load_pretrained_model(settings: TrainSettings, corpus: dataset.Corpus) -> tuple[GPT, TrainSettings, None]:
    """GPT-2's, or that of another run: its shape takes the place of the settings' own."""
    weights = loader.load_weights(settings.init_from)
    with torch.device("meta"):
        model = GPT(GPTConfig(**weights.config | {"dropout": settings.dropout, "flash": settings.flash}))
    checkpoint.assign_parameters(model, weights.tensors, weights.source)
    loader.check_tokenizer_matches(weights, corpus.tokenizer, corpus.folder)
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
    select_trainable(model, settings)
    warn_if_too_large(settings, model.config, lora.count_trainable(model))
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


def compile_forward(t: Trainer) -> nn.Module:
    """The compiled model, tried on a forward and backward pass; eager where that fails."""

    return device.compile_with_fallback(t.model, lambda forward: warmup_pass(t, forward), t.log.warn)


def warmup_pass(t: Trainer, forward: nn.Module) -> None:
    """A forward and a backward pass of the batch to come, of which nothing stays."""
    batches = t.sampler.micro_batches(t.state.step, t.runtime.rank, t.runtime.world)
    x, y = t.runtime.move(*t.runtime.slices(batches)[0])
    with t.runtime.autocast():
        loss = forward(x, y, with_logits=False)[1]
    loss.backward()
    t.model.zero_grad(set_to_none=True)


def settings_after_restart(settings: Settings) -> Settings:
    """The settings; where torchrun starts again what it had begun, such that the run goes on."""
    if not is_torchrun_restart(settings):
        return settings
    if checkpoint.step_folders(Path(settings.out_dir)):
        return replace(settings, init_from="resume", overwrite=False)
    return settings if settings.init_from == "resume" else replace(settings, overwrite=True)


def is_torchrun_restart(settings: Settings) -> bool:
    """Whether torchrun has lost a process of this very run, and starts all of them again."""
    here = Path(settings.out_dir)
    return (
        not settings.eval_only
        and process_group.restart_count() > 0
        and run_folder.was_started_by(here, process_group.launch_id())
    )


def saved_run_settings(settings: Settings) -> tuple[dict[str, Any], str] | None:
    """Where a run is resumed, its own settings come under those of this call."""
    folder = Path(settings.out_dir)
    again = is_torchrun_restart(settings) and checkpoint.step_folders(folder)
    if settings.init_from != "resume" and not again:
        return None
    saved = run_folder.saved_settings(folder)
    of_that_call = ("init_from", "overwrite", "eval_only", "debug")
    return {key: saved[key] for key in saved if key not in of_that_call}, str(
        folder / run_folder.SETTINGS_FILE
    )


def read_sharded_state(
    held: checkpoint.Checkpoint, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> checkpoint.Checkpoint:
    """Fill a model in parts from a checkpoint that was only described; with it the optimizer's part, for
    `optimizer.load_state_by_name`."""
    from fradique.distributed import fsdp

    weights = {name: p.detach() for name, p in model.named_parameters()}
    checkpoint.check_tensors_match(
        weights, checkpoint.read_shapes(held.folder / "model.safetensors"), str(held.folder)
    )
    state = optimizer.empty_state(optimizers, checkpoint.read_shapes(held.folder / "optimizer.safetensors"))
    fsdp.read_safetensors(held.folder, weights | state)
    return replace(held, optimizer=state)


def check_same_shape(asked: Any, held: dict[str, Any], folder: Path) -> None:
    """Raise ValueError where a resumed run would go on as another model: many settings change no tensor."""
    free = ("dropout", "flash")
    before = {field.name: held.get(field.name, field.default) for field in fields(asked)}
    changed = {
        name: value for name, value in before.items() if name not in free and getattr(asked, name) != value
    }
    if changed:
        raise ValueError(
            f"the run in {folder} cannot go on as another model: "
            + "; ".join(
                f"{name} was {value!r} and is {getattr(asked, name)!r} now" for name, value in changed.items()
            )
            + f". Leave these as they were, or begin a new run with --init_from={folder}"
        )


def select_trainable(model: nn.Module, settings: Settings) -> None:
    """LoRA beside frozen weights, or some layers frozen, as the settings say."""
    if settings.lora_rank:
        lora.add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    if settings.freeze:
        lora.freeze(model, settings.freeze)


def padded_vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
    """The model's vocabulary: a large one is rounded up to a multiple of 64, which GPUs multiply faster."""
    return tokenizer.vocab_size if tokenizer.kind == "char" else -(-tokenizer.vocab_size // 64) * 64


def warn_if_too_large(settings: Settings, shape: memory_estimate.Shape, trained: int | None = None) -> None:
    """Warn where the run will take more memory than there is; and let the message know, should it run out."""
    rank, local_rank, world = process_group.rank_info()
    place = device.choose_device(settings.device, local_rank, world)
    warning = memory_limits.check_memory(memory_plan(settings, shape, trained, place, world), place)
    if warning and rank == 0:
        print(f"warning: {warning}", file=sys.stderr)


def memory_plan(
    settings: Settings, shape: memory_estimate.Shape, trained: int | None, place: torch.device, world: int
) -> memory_estimate.MemoryPlan:
    """What the memory of a run depends on. `trained`: how many parameters are; None: all."""
    return memory_estimate.MemoryPlan(
        shape=shape,
        batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        device=place.type,
        dtype=device.choose_dtype(settings.dtype, place, shape.n_embd, shape.vocab_size)[0],
        optimizer=settings.optimizer,
        parallel=settings.parallel,
        world=world,
        gradient_checkpointing=settings.gradient_checkpointing,
        trained=trained,
    )
