"""Set-up of a training run: settings -> Trainer. Everything is checked before anything is written.

A run starts from scratch, from pretrained weights, or from its own last checkpoint. It starts from its last
checkpoint with --init_from=resume, and when torchrun restarts it after one of its processes was lost.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fradique.checkpointing import run_folder
from fradique.checkpointing.checkpoint import Checkpoint, step_folders
from fradique.data import dataset
from fradique.data.sampler import Sampler
from fradique.distributed import process_group
from fradique.io.config_file import SETTINGS_OF_ONE_COMMAND
from fradique.io.files import find_beside_project
from fradique.nn.ngrams import NgramEmbedding
from fradique.optim import optimizer
from fradique.runtime import fallback
from fradique.runtime.device import Runtime, setup_runtime
from fradique.runtime.memory_limits import OomReport
from fradique.tokenizer.tokenizer import encode_prompt
from fradique.training import compile_choice, logger, model_setup, outputs, thread_choice
from fradique.training.model_setup import ModelSource
from fradique.training.time_budget import TimeBudget, parse_duration
from fradique.training.trainer import Trainer, TrainState
from model import GPT

if TYPE_CHECKING:
    from train import TrainSettings

# A resumed run does not read these from its settings.json; init_from is "resume" now.
NOT_RESUMED = ("init_from", *SETTINGS_OF_ONE_COMMAND)


def setup_training(
    settings: TrainSettings,
    notes: tuple[str, ...] = (),
    average_gradients: bool = True,
    device: torch.device | None = None,
    started: float | None = None,
    oom: OomReport | None = None,
) -> Trainer:
    """Set up a run. Under torchrun all ranks call this.

    notes: logged before the automatic choices. average_gradients: False if each rank keeps its own gradients,
    as in the trials of autoconfig. device: the one that `configure_process` returned; None: chosen by
    settings.device. started: time.monotonic() at the start of the process; None: now. oom: records the memory
    that the run needs. Raises ValueError, with what to type instead, if corpus, weights, machine or out_dir
    do not fit the settings.
    """
    started = time.monotonic() if started is None else started
    check_run_folder(settings)
    folder = find_beside_project(Path(settings.data_dir) / settings.dataset)
    corpus = dataset.open_corpus(folder, settings.block_size)
    source = model_setup.find_model(settings, corpus)
    settings = replace(settings, **source.changed_settings)
    runtime = choose_runtime(settings, source, notes, average_gradients, device)
    sampler = make_sampler(settings, corpus, runtime)
    model = model_setup.build_model(settings, source, runtime, oom or OomReport())
    move_or_shard_model(model, runtime)
    runtime = check_fast_paths(model, sampler, runtime)
    optimizers, scaler, state = make_optimizers(settings, model, source.checkpoint, runtime)
    check_wandb_and_prompt(settings, corpus)
    lock = claim_folder(settings, corpus, runtime, state if source.checkpoint else None)
    budget = make_budget(settings, corpus, runtime, state, started)
    t = Trainer(
        settings=settings,
        runtime=runtime,
        corpus=corpus,
        sampler=sampler,
        model=model,
        forward=model,
        optimizers=optimizers,
        scaler=scaler,
        state=state,
        budget=budget,
        log=make_logger(settings, runtime, state, budget),
        folder=Path(settings.out_dir),
        lock=lock,
        saved_step=state.step if source.checkpoint else -1,
    )
    outputs.log_startup(t)
    t.threads = thread_choice.prepare(t, lambda: time_pass(t, t.model))
    prepare_forward(t, average_gradients)
    t.budget.mark(state.step)
    return t


def check_run_folder(settings: TrainSettings) -> None:
    """Raise ValueError if out_dir contains another run, or another process writes to it."""
    if settings.eval_only:
        return
    folder = Path(settings.out_dir)
    if settings.init_from == "resume":
        process_group.broadcast_from_rank0(lambda: run_folder.check_unlocked(folder))
    else:
        process_group.broadcast_from_rank0(lambda: run_folder.check_available(folder, settings.overwrite))


def choose_runtime(
    settings: TrainSettings,
    source: ModelSource,
    notes: tuple[str, ...],
    average_gradients: bool,
    device: torch.device | None,
) -> Runtime:
    """Choose device and dtype. `notes` come before the notes on these choices."""
    runtime = setup_runtime(
        device=device or settings.device,
        dtype=settings.dtype,
        parallel=settings.parallel if average_gradients else "ddp",  # not sharded: each rank trains alone
        n_embd=source.config.n_embd,
        vocab_size=source.config.vocab_size,
    )
    return replace(runtime, notes=(*notes, *runtime.notes))


def make_sampler(settings: TrainSettings, corpus: dataset.Corpus, runtime: Runtime) -> Sampler:
    """The batches of each step. Raises ValueError if the ranks cannot share them evenly."""
    sampler = Sampler(
        corpus.train,
        settings.block_size,
        settings.batch_size,
        settings.gradient_accumulation_steps,
        settings.seed,
    )
    sampler.rank_batches(runtime.world)  # raises the ValueError
    return sampler


def move_or_shard_model(model: GPT, runtime: Runtime) -> None:
    """Move the model to its device, or shard it over all ranks."""
    if runtime.sharded:
        from fradique.distributed import fsdp  # here, because importing it takes a second

        fsdp.shard_model(model, model.transformer["h"], runtime.device)
    else:
        model.to(runtime.device)
    for module in model.modules():
        if isinstance(module, NgramEmbedding):  # processes exchange whole gradients; MPS has no sparse ones
            module.sparse_grad = runtime.world == 1 and runtime.device.type in ("cpu", "cuda")


def check_fast_paths(model: GPT, sampler: Sampler, runtime: Runtime) -> Runtime:
    """On CUDA, replace fused attention or autocast by torch's plain path if it does not work.

    A sharded model is not checked: all of its ranks would have to fail alike.
    """
    if runtime.device.type not in fallback.CHECKED_DEVICES or runtime.sharded:
        return runtime
    first_batch = next(iter(sampler.micro_batches(0, runtime.rank, runtime.world)))
    idx, targets = runtime.to_device(*first_batch)
    return fallback.check_first_pass(model, runtime, idx, targets, lambda text: _warn(text, runtime))


def _warn(text: str, runtime: Runtime) -> None:
    """Print a warning on rank 0, before there is a logger."""
    if runtime.is_main:
        print(f"warning: {text}", file=sys.stderr)


def make_optimizers(
    settings: TrainSettings, model: GPT, checkpoint: Checkpoint | None, runtime: Runtime
) -> tuple[list[torch.optim.Optimizer], torch.amp.GradScaler, TrainState]:
    """Optimizers, GradScaler and TrainState, with the state in `checkpoint` if the run is resumed."""
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    optimizers = optimizer.build_optimizers(
        model,
        name=settings.optimizer,
        learning_rate=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        muon_learning_rate=settings.muon_learning_rate,
        muon_momentum=settings.muon_momentum,
        warn=lambda text: _warn(text, runtime),
    )
    if checkpoint is None:
        return optimizers, scaler, TrainState()
    state = TrainState.read(checkpoint.state)
    if runtime.sharded:
        checkpoint = model_setup.read_shards(checkpoint, model, optimizers)
    optimizer.load_state_by_name(optimizers, checkpoint.optimizer)
    if scaler.is_enabled() and state.scaler:  # no state if the run started in another dtype than float16
        scaler.load_state_dict(state.scaler)
    return optimizers, scaler, state


def check_wandb_and_prompt(settings: TrainSettings, corpus: dataset.Corpus) -> None:
    """Raise ValueError if wandb cannot start or sample_start cannot be encoded, before training begins."""
    if settings.wandb_log and not settings.eval_only:
        logger.check_wandb()
    encode_prompt(corpus.tokenizer, settings.sample_start)


def claim_folder(
    settings: TrainSettings, corpus: dataset.Corpus, runtime: Runtime, resumed: TrainState | None
) -> run_folder.RunLock | None:
    """Lock the run folder on rank 0, and write settings.json and tokenizer.json into it.

    resumed: the state of the checkpoint that the run continues from. Returns None on other ranks and with
    eval_only.
    """
    runtime.barrier()  # rank 0 changes the folder only after every rank has read it
    lock = None
    if runtime.is_main and not settings.eval_only:
        decided = {
            "device": runtime.describe(),
            "notes": list(runtime.notes),
            "launch": process_group.launch_id(),
        }
        lock = run_folder.claim_run_folder(
            Path(settings.out_dir),
            asdict(settings),
            decided,
            corpus.tokenizer,
            resume_step=resumed.step if resumed else None,
            overwrite=settings.overwrite,
        )
    runtime.barrier()
    return lock


def make_budget(
    settings: TrainSettings, corpus: dataset.Corpus, runtime: Runtime, state: TrainState, started: float
) -> TimeBudget:
    """The clock of the run. In a resumed run it continues from the time in `state`."""
    budget = TimeBudget(
        started,
        parse_duration(settings.time_budget),
        val_windows=corpus.val.count_windows(settings.block_size),
        world=runtime.world,
        measure_whole=settings.final_eval == "whole",
    )
    budget.resume(state.seconds, state.closing_seconds, state.writing_seconds)
    return budget


def make_logger(
    settings: TrainSettings, runtime: Runtime, state: TrainState, budget: TimeBudget
) -> logger.RunLogger:
    """The logger of the run, which writes to files and wandb unless eval_only."""
    writes = not settings.eval_only
    return logger.RunLogger(
        Path(settings.out_dir) if writes else None,
        enabled=runtime.is_main,
        total=budget.limit or settings.max_iters,
        start=state.seconds if budget.limit else state.step,
        unit="s" if budget.limit else "step",
        wandb=wandb_options(settings) if writes else None,
    )


def wandb_options(settings: TrainSettings) -> dict[str, Any] | None:
    """The arguments of logger.start_wandb; None without wandb."""
    if not settings.wandb_log:
        return None
    name = settings.wandb_run_name or Path(settings.out_dir).name
    return {"project": settings.wandb_project, "name": name, "config": asdict(settings)}


def prepare_forward(t: Trainer, average_gradients: bool) -> None:
    """Set t.forward: the model, compiled and wrapped in DDP if the run uses these."""
    t.forward = compile_choice.prepare(
        t, warmup=lambda model: warmup_compiled(t, model), time_pass=lambda model: time_pass(t, model)
    )
    if average_gradients:
        t.forward = t.runtime.wrap_ddp(t.forward)
        if t.runtime.world > 1 and not t.runtime.sharded:
            # DDP arranges its gradient buckets during the first backward pass, which changes the order of
            # additions after it. Without this pass, a resumed run would differ from an uninterrupted one.
            warmup_pass(t, t.forward)


def warmup_compiled(t: Trainer, compiled: nn.Module) -> None:
    """`warmup_pass`; on CUDA, raises ValueError if the loss is not close to that of the eager model."""
    loss = warmup_pass(t, compiled)
    if t.runtime.device.type not in fallback.CHECKED_DEVICES or t.runtime.sharded:
        return
    with torch.no_grad():
        expected = _first_loss(t, t.model).item()
    tolerance = fallback.DROPOUT_TOLERANCE if t.model.config.dropout else fallback.LOSS_TOLERANCE
    if problem := fallback.loss_problem(loss.item(), expected, tolerance):
        raise ValueError(problem)


def warmup_pass(t: Trainer, forward: nn.Module) -> Tensor:
    """A forward and backward pass on the next micro-batch: the loss. The gradients are discarded."""
    loss = _first_loss(t, forward)
    loss.backward()
    t.model.zero_grad(set_to_none=True)
    return loss.detach()


def _first_loss(t: Trainer, forward: nn.Module) -> Tensor:
    """The loss of the next micro-batch."""
    batches = t.sampler.micro_batches(t.state.step, t.runtime.rank, t.runtime.world)
    first_batch = t.runtime.split_microbatches(batches)[0]
    x, y = t.runtime.to_device(*first_batch)
    with t.runtime.autocast():
        return forward(x, y, with_logits=False)[1]


def time_pass(t: Trainer, model: nn.Module) -> float:
    """The seconds of a forward and backward pass, whose gradients are discarded."""
    start = time.monotonic()
    warmup_pass(t, model).item()  # on a GPU: waits for the result
    return time.monotonic() - start


# Restarts


def is_torchrun_restart(settings: TrainSettings) -> bool:
    """Whether torchrun is restarting the processes of this run because one of them was lost."""
    return (
        not settings.eval_only
        and process_group.restart_count() > 0
        and run_folder.was_started_by(Path(settings.out_dir), process_group.launch_id())
    )


def settings_after_restart(settings: TrainSettings) -> TrainSettings:
    """The settings, changed after a restart by torchrun so that the run continues.

    It resumes from its last checkpoint. If it had not saved one, it starts again and replaces its files.
    """
    if not is_torchrun_restart(settings):
        return settings
    if step_folders(Path(settings.out_dir)):
        return replace(settings, init_from="resume", overwrite=False)
    return settings if settings.init_from == "resume" else replace(settings, overwrite=True)


def saved_run_settings(settings: TrainSettings) -> tuple[dict[str, Any], str] | None:
    """The settings of the run that is resumed, and the path of their file; None if no run is resumed.

    They replace the defaults. Config files and flags of this command override them.
    """
    folder = Path(settings.out_dir)
    restarted = is_torchrun_restart(settings) and step_folders(folder)
    if settings.init_from != "resume" and not restarted:
        return None
    saved = run_folder.saved_settings(folder)
    run_settings = {key: value for key, value in saved.items() if key not in NOT_RESUMED}
    return run_settings, str(folder / run_folder.SETTINGS_FILE)
