"""The model of a training run: from scratch, from pretrained weights, or from the run's last checkpoint."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fradique.checkpointing import run_folder
from fradique.checkpointing.checkpoint import (
    Checkpoint,
    assign_parameters,
    check_tensors_match,
    newest_checkpoint,
    read_checkpoint,
    read_checkpoint_metadata,
    read_shapes,
)
from fradique.data.dataset import Corpus
from fradique.distributed import process_group
from fradique.nn import lora
from fradique.optim import optimizer
from fradique.pretrained import loader
from fradique.pretrained.model_config import parse_model_config
from fradique.runtime.device import Runtime
from fradique.runtime.memory_estimate import MemoryPlan
from fradique.runtime.memory_limits import OomReport
from fradique.tokenizer.tokenizer import Tokenizer
from model import GPT, GPTConfig

if TYPE_CHECKING:
    from train import TrainSettings

VOCAB_MULTIPLE = 64  # matrix products are faster on a GPU if the vocabulary size is a multiple of this
# the weights have the same meaning with any value of these
CHANGEABLE_ON_RESUME = ("dropout", "ngram_dropout", "flash")


@dataclass(frozen=True)
class ModelSource:
    """Where the model comes from: a checkpoint, pretrained weights, or neither for a run from scratch."""

    config: GPTConfig
    changed_settings: dict[str, Any] = field(default_factory=dict)  # so that they fit the pretrained weights
    checkpoint: Checkpoint | None = None  # of a resumed run
    weights: loader.PretrainedWeights | None = None


def model_config(settings: TrainSettings, vocab_size: int) -> GPTConfig:
    """The GPTConfig that the settings describe."""
    values = {name: getattr(settings, name) for name in GPTConfig.names() if hasattr(settings, name)}
    return GPTConfig(vocab_size=vocab_size, **values)


def padded_vocab_size(tokenizer: Tokenizer) -> int:
    """The vocabulary size of the model: a multiple of VOCAB_MULTIPLE unless tokens are characters."""
    size = tokenizer.vocab_size
    if tokenizer.kind == "char":
        return size
    return math.ceil(size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def find_model(settings: TrainSettings, corpus: Corpus) -> ModelSource:
    """Read the weights that init_from names, if any.

    Raises ValueError if they do not fit the settings or the corpus.
    """
    if settings.init_from == "resume":
        return _last_checkpoint(settings, corpus)
    if settings.init_from == "scratch":
        return ModelSource(model_config(settings, padded_vocab_size(corpus.tokenizer)))
    return _pretrained(settings, corpus)


def _last_checkpoint(settings: TrainSettings, corpus: Corpus) -> ModelSource:
    """The newest complete checkpoint in out_dir. In a sharded run `read_shards` reads its tensors later."""
    folder = Path(settings.out_dir)
    run_folder.check_tokenizer(folder, corpus.tokenizer, corpus.folder)
    newest = process_group.broadcast_from_rank0(
        lambda: newest_checkpoint(folder, _print_warning, run_folder.saved_run_id(folder))
    )
    if _will_be_sharded(settings):
        checkpoint = read_checkpoint_metadata(newest)
        tensors_or_shapes = read_shapes(newest / "model.safetensors")
    else:
        checkpoint = read_checkpoint(newest, verified=True)
        tensors_or_shapes = checkpoint.model
    config_values = {name: value for name, value in checkpoint.config.items() if name != lora.LORA_ALPHA}
    saved_config = parse_model_config(config_values, tensors_or_shapes, str(newest / "model.json"))
    config = model_config(settings, saved_config.vocab_size)
    return ModelSource(config, checkpoint=checkpoint)


def _pretrained(settings: TrainSettings, corpus: Corpus) -> ModelSource:
    """Weights of another run, Hugging Face or nanoGPT. Their GPTConfig replaces that of the settings."""
    weights = loader.load_weights(settings.init_from)
    config = replace(weights.config, dropout=settings.dropout, flash=settings.flash)
    loader.check_tokenizer_matches(weights, corpus.tokenizer, corpus.folder)
    if weights.tokenizer is None and process_group.rank_info().rank == 0:
        _print_warning(
            f"{weights.source} has no tokenizer that this program can read. Check that the model was trained "
            f"with the same tokenizer as the corpus {corpus.folder}"
        )
    if settings.block_size > config.block_size:
        raise ValueError(
            f"block_size = {settings.block_size} is longer than the {config.block_size} positions of "
            f"{weights.source}: choose --block_size={config.block_size} or less"
        )
    changed_settings = {name: value for name, value in asdict(config).items() if hasattr(settings, name)}
    changed_settings["block_size"] = settings.block_size  # build_model crops the model to it
    return ModelSource(config, changed_settings=changed_settings, weights=weights)


def build_model(settings: TrainSettings, source: ModelSource, runtime: Runtime, oom: OomReport) -> GPT:
    """The model in CPU memory, with LoRA or frozen layers. Warns if the run may not fit into memory.

    oom: records the memory that the run needs. In a sharded run that is resumed, the weights stay random
    until `read_shards` reads them.
    """
    torch.manual_seed(settings.seed)
    if source.checkpoint is not None:
        model = _resumed_model(settings, source, runtime, oom)
    elif source.weights is not None:
        with torch.device("meta"):  # allocates no memory: the loaded tensors become the parameters
            model = GPT(source.config)
        assign_parameters(model, source.weights.tensors, source.weights.source)
        if settings.block_size < model.config.block_size:
            model.crop_block_size(settings.block_size)
        select_trainable(model, settings)
        _check_memory(settings, model.config, runtime, oom, lora.count_trainable(model))
    else:
        _check_memory(settings, source.config, runtime, oom)
        model = GPT(source.config)
        select_trainable(model, settings)
    model.gradient_checkpointing = settings.gradient_checkpointing
    return model


def _resumed_model(settings: TrainSettings, source: ModelSource, runtime: Runtime, oom: OomReport) -> GPT:
    """The model of source.checkpoint; see `build_model`."""
    _check_same_model(source, settings)
    with torch.device("cpu" if runtime.sharded else "meta"):
        model = GPT(source.config)
        select_trainable(model, settings)
    _check_memory(settings, source.config, runtime, oom, lora.count_trainable(model))
    if not runtime.sharded:
        assign_parameters(model, source.checkpoint.model, str(source.checkpoint.folder))
    return model


def read_shards(
    checkpoint: Checkpoint, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> Checkpoint:
    """Read this rank's shards of the weights into a sharded model.

    Returns the checkpoint with this rank's shards of the optimizer state, for `optimizer.load_state_by_name`.
    """
    from fradique.distributed import fsdp

    folder = checkpoint.folder
    weights = {name: p.detach() for name, p in model.named_parameters()}
    check_tensors_match(weights, read_shapes(folder / "model.safetensors"), str(folder))
    state = optimizer.empty_state(optimizers, read_shapes(folder / "optimizer.safetensors"))
    fsdp.read_safetensors(folder, weights | state)
    return replace(checkpoint, optimizer=state)


def select_trainable(model: nn.Module, settings: TrainSettings) -> None:
    """Freeze the weights and add LoRA adapters, or freeze some layers, as the settings say."""
    if settings.lora_rank:
        lora.add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    if settings.freeze:
        lora.freeze(model, settings.freeze)


def _check_memory(
    settings: TrainSettings,
    config: GPTConfig,
    runtime: Runtime,
    oom: OomReport,
    trainable: int | None = None,
) -> None:
    """Print a warning if the run will need more memory than there is. For `trainable` see `memory_plan`."""
    warning = oom.check(memory_plan(settings, config, runtime, trainable), runtime.device)
    if warning and runtime.is_main:
        _print_warning(warning)


def memory_plan(
    settings: TrainSettings, config: GPTConfig, runtime: Runtime, trainable: int | None = None
) -> MemoryPlan:
    """What the memory of a run depends on. trainable: the number of trainable parameters; None: all."""
    return MemoryPlan(
        config=config,
        batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        device=runtime.device.type,
        dtype=str(runtime.dtype).removeprefix("torch."),
        optimizer=settings.optimizer,
        parallel=settings.parallel,
        world=runtime.world,
        gradient_checkpointing=settings.gradient_checkpointing,
        trainable=trainable,
    )


def _will_be_sharded(settings: TrainSettings) -> bool:
    """What Runtime.sharded will be, before there is a Runtime."""
    return settings.parallel == "fsdp" and process_group.rank_info().world > 1


def _check_same_model(source: ModelSource, settings: TrainSettings) -> None:
    """Raise ValueError if a setting that defines the model differs from that of the checkpoint.

    Comparing the shapes of the tensors is not enough: many of these settings do not change any shape.
    """
    names = GPTConfig.names()
    saved = {name: value for name, value in source.checkpoint.config.items() if name in names}
    before, now = _defining_values(GPTConfig(**saved)), _defining_values(source.config)
    changed = [
        f"{name} was {before[name]!r} and is {value!r} now"
        for name, value in now.items()
        if value != before.get(name, value)  # missing: another position, which is reported, makes it matter
    ]
    alpha = source.checkpoint.config.get(lora.LORA_ALPHA)
    if settings.lora_rank and alpha is not None and not math.isclose(alpha, settings.lora_alpha):
        changed.append(f"lora_alpha was {alpha:g} and is {settings.lora_alpha:g} now")
    if changed:
        folder = settings.out_dir
        raise ValueError(
            f"the run in {folder} cannot continue as another model: {'; '.join(changed)}. Leave these as "
            f"they were, or start a new run with --init_from={folder}"
        )


def _defining_values(config: GPTConfig) -> dict[str, Any]:
    """The values of a config that define the function of the model, equal if the functions are."""
    values = {name: value for name, value in asdict(config).items() if name not in CHANGEABLE_ON_RESUME}
    values |= {"n_kv_head": config.kv_heads, "n_inner": config.inner}  # 0: the default
    if config.position != "rope":
        del values["rope_theta"]
    if config.ngram_max == 1:
        del values["ngram_rows"]
    if config.position != "learned":
        del values["block_size"]  # no weight depends on it
    return values


def _print_warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
