"""What a run leaves in its folder while it goes on: checkpoints, snapshots and samples."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fradique import checkpoint, dataset, finetune, optimizer, ranks, snapshots
from fradique import tokenizer as tokenizers
from fradique.training import Training


def save(t: Training, best: bool = False) -> None:
    """Write a step checkpoint, make it the best where it is, and drop the oldest. Rank 0 does, and all wait;
    of a model in parts each writes its own."""
    if t.runtime.is_main or t.runtime.sharded:
        pace = t.pace
        now = {"seconds": pace.elapsed(), "closing_seconds": pace.closing, "writing_seconds": pace.writing}
        state = asdict(t.state) | now | {"scaler": t.scaler.state_dict()}
        held = checkpoint.Checkpoint(
            config=asdict(t.model.config) | finetune.describe(t.model),
            model={name: p.detach() for name, p in t.model.named_parameters()},
            optimizer=optimizer.state_by_name(t.optimizers),
            state=state,
            run=t.held.name if t.held else None,
        )
        way = checkpoint.Alone
        if t.runtime.sharded:
            from fradique import sharding

            t.model.reshard()  # what an evaluation has gathered
            way = sharding.Together
        folder = Path(t.settings.out_dir)
        checkpoint.keep(folder, held, best=best, last=t.settings.keep_checkpoints, way=way)
    t.saved_step = t.state.step
    t.runtime.wait()


def follow(t: Training) -> None:
    """Go on where the run folder is now, should somebody have moved or deleted it."""
    folder, moved = ranks.agree(lambda: t.held.place())
    if moved:
        t.log.warn(moved)
        t.settings = replace(t.settings, out_dir=str(folder))
        t.log.move(folder)


def load_best(t: Training, folder: Path) -> None:
    """Its weights into the model."""
    if not t.runtime.sharded:
        checkpoint.load_into(t.model, checkpoint.load(folder, with_optimizer=False).model, str(folder))
        return
    from fradique import sharding

    ranks.agree(lambda: checkpoint.verify(folder))
    t.model.reshard()
    sharding.read(folder, {name: p.detach() for name, p in t.model.named_parameters()})


def keep_snapshot(t: Training, last: bool = False) -> None:
    """Keep the embeddings, where it is time to. A picture that will lack one is no reason to stop a run."""
    interval, step = t.settings.snapshot_interval, t.state.step
    if not interval or not (last or step % interval == 0):
        return
    with t.pace.aside():
        tables = snapshots.of(t.model)  # of a model in parts, by all ranks
        try:
            if t.runtime.is_main:
                snapshots.keep(Path(t.settings.out_dir), step, tables)
        except OSError as error:
            t.log.warn_once(f"embeddings cannot be kept for lab.movie: {error.strerror or error}")


def write_sample(t: Training) -> str:
    """Draw a sample with the tokens of `sample_start` before it, keep it in samples.txt, and return it."""
    settings, tokenizer, start = t.settings, t.corpus.tokenizer, time.monotonic()
    if not (t.runtime.is_main or t.runtime.sharded):  # of a model in parts, all draw the same
        return ""
    prompt = tokenizers.encode_prompt(tokenizer, settings.sample_start)
    idx = torch.from_numpy(prompt.astype("int64"))[None].to(t.runtime.device)  # (1, T)
    generator = torch.Generator(t.runtime.device)
    generator.manual_seed(dataset.hash_numbers(settings.seed, t.state.step))
    with t.runtime.autocast():
        out = t.model.generate(
            idx, settings.sample_tokens, temperature=0.8, n_vocab=tokenizer.vocab_size, generator=generator
        )
    text = tokenizer.decode(out[0].tolist())
    t.log.sample(t.state.step, text)
    t.pace.writing = time.monotonic() - start
    return text
