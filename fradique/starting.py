"""With what weights a run begins: new ones, those of a checkpoint, or those of another model."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fradique import (
    checkpoint,
    dataset,
    finetune,
    layouts,
    limits,
    memory,
    optimizer,
    pretrained,
    ranks,
    run,
    runtime,
)
from fradique import tokenizer as tokenizers
from model import GPT, GPTConfig

if TYPE_CHECKING:
    from train import TrainSettings


def make_model(
    settings: TrainSettings, corpus: dataset.Corpus
) -> tuple[GPT, TrainSettings, checkpoint.Checkpoint | None]:
    """The model by init_from, the settings with its true shape, and the checkpoint where a run is resumed."""
    tokenizer = corpus.tokenizer
    if settings.init_from == "scratch":
        shape = model_config(settings, padded(tokenizer))
        expect_memory(settings, shape)
        model = GPT(shape)
        choose_trained(model, settings)
        return model, settings, None
    if settings.init_from == "resume":
        folder = Path(settings.out_dir)
        run.check_tokenizer(folder, tokenizer, corpus.folder)
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
            choose_trained(model, settings)
        expect_memory(settings, shape, finetune.trained(model))
        if not in_parts:
            checkpoint.adopt(model, held.model, str(latest))
        check_same_shape(shape, held.config, folder)
        return model, settings, held
    weights = pretrained.load(settings.init_from)
    with torch.device("meta"):
        model = GPT(GPTConfig(**weights.config | {"dropout": settings.dropout, "flash": settings.flash}))
    checkpoint.adopt(model, weights.tensors, weights.source)
    pretrained.check_tokenizer(weights, tokenizer, corpus.folder)
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
    choose_trained(model, settings)
    expect_memory(settings, model.config, finetune.trained(model))
    shape = {name: value for name, value in asdict(model.config).items() if hasattr(settings, name)}
    return model, replace(settings, **shape), None


def read_parts(
    held: checkpoint.Checkpoint, model: GPT, optimizers: list[torch.optim.Optimizer]
) -> checkpoint.Checkpoint:
    """Fill a model in parts from a checkpoint that was only described; with it the optimizer's part, for
    `optimizer.load_state_by_name`."""
    from fradique import sharding

    weights = {name: p.detach() for name, p in model.named_parameters()}
    checkpoint.fit(weights, checkpoint.shapes(held.folder / "model.safetensors"), str(held.folder))
    state = optimizer.empty_state(optimizers, checkpoint.shapes(held.folder / "optimizer.safetensors"))
    sharding.read(held.folder, weights | state)
    return replace(held, optimizer=state)


def check_same_shape(asked: GPTConfig, held: dict[str, Any], folder: Path) -> None:
    """Raise ValueError where a resumed run would go on as another model: many settings change no tensor."""
    free = ("dropout", "flash")
    before = {field.name: held.get(field.name, field.default) for field in fields(GPTConfig)}
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


def choose_trained(model: GPT, settings: TrainSettings) -> None:
    """LoRA beside frozen weights, or some layers frozen, as the settings say."""
    if settings.lora_rank:
        finetune.add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    if settings.freeze:
        finetune.freeze(model, settings.freeze)


def model_config(settings: TrainSettings, vocab_size: int) -> GPTConfig:
    shape = {name: getattr(settings, name) for name in GPTConfig.names() if hasattr(settings, name)}
    return GPTConfig(vocab_size=vocab_size, **shape)


def padded(tokenizer: tokenizers.Tokenizer) -> int:
    """The model's vocabulary: a large one is rounded up to a multiple of 64, which GPUs multiply faster."""
    return tokenizer.vocab_size if tokenizer.kind == "char" else -(-tokenizer.vocab_size // 64) * 64


def expect_memory(settings: TrainSettings, shape: GPTConfig, trained: int | None = None) -> None:
    """Warn where the run will take more memory than there is; and let the message know, should it run out."""
    rank, local_rank, world = ranks.here()
    place = runtime.choose_device(settings.device, local_rank, world)
    warning = limits.expect(memory_plan(settings, shape, trained, place, world), place)
    if warning and rank == 0:
        print(f"warning: {warning}", file=sys.stderr)


def memory_plan(
    settings: TrainSettings, shape: GPTConfig, trained: int | None, place: torch.device, world: int
) -> memory.Plan:
    """What the memory of a run depends on. `trained`: how many parameters are; None: all."""
    return memory.Plan(
        shape=shape,
        batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        device=place.type,
        dtype=runtime.choose_dtype(settings.dtype, place, shape.n_embd, shape.vocab_size)[0],
        optimizer=settings.optimizer,
        parallel=settings.parallel,
        world=world,
        gradient_checkpointing=settings.gradient_checkpointing,
        trained=trained,
    )
