"""What a run begins with: its shape, what of it is trained, its parts, and whether there is memory for it."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fradique import checkpoint, finetune, limits, memory, optimizer, ranks, runtime
from fradique import tokenizer as tokenizers
from fradique.training import Settings


def read_parts(
    held: checkpoint.Checkpoint, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> checkpoint.Checkpoint:
    """Fill a model in parts from a checkpoint that was only described; with it the optimizer's part, for
    `optimizer.load_state_by_name`."""
    from fradique import sharding

    weights = {name: p.detach() for name, p in model.named_parameters()}
    checkpoint.fit(weights, checkpoint.shapes(held.folder / "model.safetensors"), str(held.folder))
    state = optimizer.empty_state(optimizers, checkpoint.shapes(held.folder / "optimizer.safetensors"))
    sharding.read(held.folder, weights | state)
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


def choose_trained(model: nn.Module, settings: Settings) -> None:
    """LoRA beside frozen weights, or some layers frozen, as the settings say."""
    if settings.lora_rank:
        finetune.add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    if settings.freeze:
        finetune.freeze(model, settings.freeze)


def padded(tokenizer: tokenizers.Tokenizer) -> int:
    """The model's vocabulary: a large one is rounded up to a multiple of 64, which GPUs multiply faster."""
    return tokenizer.vocab_size if tokenizer.kind == "char" else -(-tokenizer.vocab_size // 64) * 64


def expect_memory(settings: Settings, shape: memory.Shape, trained: int | None = None) -> None:
    """Warn where the run will take more memory than there is; and let the message know, should it run out."""
    rank, local_rank, world = ranks.here()
    place = runtime.choose_device(settings.device, local_rank, world)
    warning = limits.expect(memory_plan(settings, shape, trained, place, world), place)
    if warning and rank == 0:
        print(f"warning: {warning}", file=sys.stderr)


def memory_plan(
    settings: Settings, shape: memory.Shape, trained: int | None, place: torch.device, world: int
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
