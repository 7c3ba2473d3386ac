"""What a run leaves in its folder while it goes on: checkpoints, snapshots and samples."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from fradique.checkpointing import checkpoint, embedding_snapshots, run_folder
from fradique.data import sampler
from fradique.distributed import process_group
from fradique.nn import lora
from fradique.optim import optimizer
from fradique.tokenizer import tokenizer as tokenizers
from fradique.training import logger, skip_step
from fradique.training.trainer import Trainer, tokens_per_step


def draw_loss_plot(t: Trainer) -> None:
    """Refresh loss.png in the run folder. A picture that cannot be drawn is no reason to stop a run."""
    folder = Path(t.settings.out_dir)
    try:
        from fradique.training import loss_plot

        # a figure is a ring of objects: what comes to be old while it is drawn would pile up for long
        gc.disable()
        loss_plot.save_plot([loss_plot.read_curves(folder)], folder / run_folder.LOSS_PLOT_FILE)
    except ImportError:
        t.log.warn_once("there is no matplotlib, so no loss.png: pip install matplotlib")
    except (OSError, ValueError) as error:
        t.log.warn_once(f"loss.png cannot be drawn: {error}")
    finally:
        gc.enable()
        gc.collect(1)


def save_checkpoint(t: Trainer, best: bool = False) -> None:
    """Write a step checkpoint, make it the best where it is, and drop the oldest. Rank 0 does, and all wait;
    of a model in parts each writes its own."""
    if t.runtime.is_main or t.runtime.sharded:
        pace = t.pace
        now = {"seconds": pace.elapsed(), "closing_seconds": pace.closing, "writing_seconds": pace.writing}
        state = asdict(t.state) | now | {"scaler": t.scaler.state_dict()}
        held = checkpoint.Checkpoint(
            config=asdict(t.model.config) | lora.lora_metadata(t.model),
            model={name: p.detach() for name, p in t.model.named_parameters()},
            optimizer=optimizer.state_by_name(t.optimizers),
            state=state,
            run=t.held.name if t.held else None,
        )
        way = checkpoint.LocalWriter
        if t.runtime.sharded:
            from fradique.distributed import fsdp

            t.model.reshard()  # what an evaluation has gathered
            way = fsdp.ShardedWriter
        folder = Path(t.settings.out_dir)
        checkpoint.save_and_prune(folder, held, best=best, last=t.settings.keep_checkpoints, way=way)
    t.saved_step = t.state.step
    t.runtime.wait()


def follow_moved_folder(t: Trainer) -> None:
    """Go on where the run folder is now, should somebody have moved or deleted it."""
    folder, moved = process_group.broadcast_from_rank0(lambda: t.held.place())
    if moved:
        t.log.warn(moved)
        t.settings = replace(t.settings, out_dir=str(folder))
        t.log.move(folder)


def load_best_weights(t: Trainer, folder: Path) -> None:
    """Its weights into the model."""
    if not t.runtime.sharded:
        checkpoint.copy_parameters(
            t.model, checkpoint.read_checkpoint(folder, with_optimizer=False).model, str(folder)
        )
        return
    from fradique.distributed import fsdp

    process_group.broadcast_from_rank0(lambda: checkpoint.verify_checkpoint(folder))
    t.model.reshard()
    fsdp.read_safetensors(folder, {name: p.detach() for name, p in t.model.named_parameters()})


def save_snapshot(t: Trainer, last: bool = False) -> None:
    """Keep the embeddings, where it is time to. A picture that will lack one is no reason to stop a run."""
    interval, step = t.settings.snapshot_interval, t.state.step
    if not interval or not (last or step % interval == 0):
        return
    with t.pace.aside():
        tables = embedding_snapshots.embedding_tables(t.model)  # of a model in parts, by all ranks
        try:
            if t.runtime.is_main:
                embedding_snapshots.write_snapshot(Path(t.settings.out_dir), step, tables)
        except OSError as error:
            t.log.warn_once(f"embeddings cannot be kept for lab.movie: {error.strerror or error}")


def write_sample(t: Trainer) -> str:
    """Draw a sample with the tokens of `sample_start` before it, keep it in samples.txt, and return it."""
    settings, tokenizer, start = t.settings, t.corpus.tokenizer, time.monotonic()
    if not (t.runtime.is_main or t.runtime.sharded):  # of a model in parts, all draw the same
        return ""
    prompt = tokenizers.encode_prompt(tokenizer, settings.sample_start)
    idx = torch.from_numpy(prompt.astype("int64"))[None].to(t.runtime.device)  # (1, T)
    generator = torch.Generator(t.runtime.device)
    generator.manual_seed(sampler.derive_seed(settings.seed, t.state.step))
    with t.runtime.autocast():
        out = t.model.generate(
            idx, settings.sample_tokens, temperature=0.8, n_vocab=tokenizer.vocab_size, generator=generator
        )
    text = tokenizer.decode(out[0].tolist())
    t.log.sample(t.state.step, text)
    t.pace.writing = time.monotonic() - start
    return text


def log_startup(t: Trainer) -> None:
    """Say what is about to run, and what was chosen by itself."""
    size = logger.format_count(t.model.num_params(non_embedding=False))
    part = lora.count_trainable(t.model)
    some = f", {logger.format_count(part)} of them trained," if part < t.model.num_params(False) else ""
    step = f"{tokens_per_step(t.settings):,} tokens a step"
    t.log.say(f"{size} parameters{some} on {t.runtime.describe()}; {step}")
    here, there = t.corpus.train.tokens, t.corpus.val.tokens
    t.log.say(f"{t.corpus.folder}: {here:,} tokens to train on, {there:,} to validate")
    for note in t.runtime.notes:
        t.log.say(note)
    if t.settings.init_from == "resume":
        t.log.say(f"going on at step {t.state.step}")


def log_step(t: Trainer, loss: Tensor, norm: Tensor) -> None:
    """One line of metrics: the loss (mean over ranks) of the step just done, and the speed since the last."""
    if not t.settings.skip_nonfinite:
        skip_step.check_finite(t, t.state.step, loss, norm)
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


def log_evaluation(t: Trainer, losses: dict[str, float]) -> None:
    step = t.state.step
    best = " (best)" if t.state.best_step == step else ""
    t.log.say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}{best}")
    record = {"step": step, "eval_train_loss": losses["train"], "eval_val_loss": losses["val"]}
    tokens = step * tokens_per_step(t.settings)
    t.log.write(record | {"tokens": tokens, "seconds": t.pace.elapsed()})
