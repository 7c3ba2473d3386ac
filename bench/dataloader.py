"""Speed of reading batches from token files, and memory of train.py with a large corpus.

    python -m bench.dataloader [--rounds 7] [--processes 2]
    python -m bench.dataloader --sparse 20    # train.py on 20 GB of sparse shards, and on 20 MB

A rate counts each token of a batch once, as the two bytes that it takes in its file (inputs and targets of
a batch are eight times as large together). All processes read at the same time, each its own batches, as
ranks do. Printed are the rate of all processes together (median and best round), and MB per second of CPU
time (median): what one core reads on an idle machine. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fradique.data import dataset
from fradique.data import sampler as samplers
from fradique.tokenizer import tokenizer

TOKENS = 1 << 26  # too many for the sampler to keep in memory: read from the files
MEMORY_TOKENS = 1 << 24  # kept in memory
SHAPES = ((64, 12), (64, 64), (256, 64), (1024, 12))  # block_size, batch_size
SHARDS = (1, 40, 1000)
ROUND_MEGABYTES = 8  # of tokens, per process
ROOT = Path(__file__).resolve().parents[1]


def measure(rounds: int, processes: int) -> list[dict[str, Any]]:
    """One row for each batch shape and number of shards, from disk and from memory."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for shards, tokens in ((1, MEMORY_TOKENS), *((shards, TOKENS) for shards in SHARDS)):
            folder = Path(scratch) / f"{shards}-{tokens}"
            write_shards(folder, shards, tokens)
            for block_size, batch_size in SHAPES:
                rates, core_rates = zip(
                    *_rates(folder, block_size, batch_size, rounds, processes), strict=True
                )
                results.append(
                    {
                        "from": "memory" if tokens == MEMORY_TOKENS else "disk",
                        "shards": shards,
                        "block_size": block_size,
                        "batch_size": batch_size,
                        "mb_s": statistics.median(rates),
                        "best_mb_s": max(rates),
                        "core_mb_s": statistics.median(core_rates),
                    }
                )
    return results


def write_shards(folder: Path, shards: int, tokens: int) -> None:
    """Write `tokens` random tokens, split over `shards` files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(shards):
        rng.integers(50257, size=tokens // shards).astype("<u2").tofile(folder / f"train_{i:05d}.bin")


def _rates(
    folder: Path, block_size: int, batch_size: int, rounds: int, processes: int
) -> Iterator[tuple[float, float]]:
    """For each round: MB/s of all processes together, and MB per second of CPU time."""
    context = get_context("spawn")  # as torchrun starts ranks
    pipes = [context.Pipe() for _ in range(processes)]
    readers = [
        context.Process(target=_read, args=(folder, block_size, batch_size, rank, processes, child))
        for rank, (_, child) in enumerate(pipes)
    ]
    for reader in readers:
        reader.start()
    for i in range(rounds + 1):
        start = time.perf_counter()
        for parent, _ in pipes:
            parent.send(True)
        n_bytes, cpu_seconds = map(sum, zip(*(parent.recv() for parent, _ in pipes), strict=True))
        if i:  # the first round fills the page cache
            yield n_bytes / (time.perf_counter() - start) / 1e6, n_bytes / cpu_seconds / 1e6
    for parent, _ in pipes:
        parent.send(False)
    for reader in readers:
        reader.join()
        reader.close()
    for pipe in pipes:
        for end in pipe:
            end.close()


def _read(folder: Path, block_size: int, batch_size: int, rank: int, world: int, pipe: Connection) -> None:
    """Read a round of batches per True received; answer with its bytes and its seconds of CPU time."""
    split = dataset.Split(sorted(folder.iterdir()), "uint16", 50257, None)
    sampler = samplers.Sampler(split, block_size, batch_size, world, seed=0)
    steps = max(1, ROUND_MEGABYTES * 10**6 // (2 * block_size * batch_size))
    first = 0
    while pipe.recv():
        start = time.process_time()
        for step in range(first, first + steps):
            list(sampler.micro_batches(step, rank, world))
        first += steps
        pipe.send((2 * steps * block_size * batch_size, time.process_time() - start))


def sparse_corpus(folder: Path, gigabytes: float, shards: int = 40) -> None:
    """Write a corpus of sparse files, in which all tokens are 0. The validation split has 40 kB."""
    folder.mkdir(parents=True)
    tokenizer.save_tokenizer(tokenizer.CharTokenizer("ab"), folder / "tokenizer.json")
    splits = {}
    for split, count, size in (("train", shards, round(gigabytes * 5e8) // shards), ("val", 1, 20_000)):
        names = [f"{split}_{i:05d}.bin" for i in range(count)]
        for name in names:
            with (folder / name).open("wb") as file:
                file.truncate(2 * size)
        entries = [{"file": name, "tokens": size, "bytes": size, "sha256": ""} for name in names]
        splits[split] = {"tokens": size * count, "bytes": size * count, "shards": entries}
    meta = {"format": 1, "dtype": "uint16", "vocab_size": 2, "tokenizer": "char", "source": "sparse files"}
    (folder / "meta.json").write_text(json.dumps(meta | {"splits": splits}))


def memory_of_training(folder: Path, steps: int) -> dict[str, float]:
    """Peak memory of train.py on a corpus, in MB: anonymous, mapped from files, and total."""
    command = [sys.executable, str(ROOT / "train.py"), f"--data_dir={folder.parent}"]
    command += [f"--dataset={folder.name}", f"--out_dir={folder.parent / ('out-' + folder.name)}"]
    command += [f"--{setting}" for setting in TRAINING.split()]
    command += [f"--max_iters={steps}", f"--eval_interval={steps}", "--eval_iters=5"]
    peaks = {"RssAnon": 0.0, "RssFile": 0.0, "VmHWM": 0.0}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
        Path(f"/proc/{process.pid}/status").open() as status,
    ):
        while process.poll() is None:
            status.seek(0)
            for line in status.read().splitlines():
                name, value = line.split(":", 1)
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024 / 1e6)
            time.sleep(0.01)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(output)
    return peaks


TRAINING = (
    "n_layer=1 n_head=1 n_embd=16 block_size=256 batch_size=32 gradient_accumulation_steps=1 compile=False"
)
STEPS = 400  # each reads other parts of the corpus


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--rounds",
        type=int,
        default=7,
        help="number of rounds; printed are their median and the best (default: %(default)s)",
    )
    add(
        "--processes", type=int, default=2, help="processes that read at the same time (default: %(default)s)"
    )
    add(
        "--sparse",
        type=float,
        metavar="GB",
        help="measure the memory of train.py on a corpus of this size instead (Linux only)",
    )
    add("--steps", type=int, default=STEPS, help="training steps for --sparse (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.sparse is not None:
        result: Any = {}
        with tempfile.TemporaryDirectory() as scratch:
            for name, gigabytes in (("small", 0.02), ("large", args.sparse)):
                sparse_corpus(Path(scratch) / name, gigabytes)
                result[name] = memory_of_training(Path(scratch) / name, args.steps)
                peaks = ", ".join(f"{key} {value:.0f} MB" for key, value in result[name].items())
                print(f"train.py with a corpus of {gigabytes} GB: {peaks}", flush=True)
        print(json.dumps({"bench": "dataloader", "sparse_gb": args.sparse, **result}))
        return
    rows = measure(args.rounds, args.processes)
    print(f"{'from':7} {'shards':>6} {'block':>6} {'batch':>6} {'MB/s':>8} {'best':>8} {'a core':>8}")
    for row in rows:
        print(
            f"{row['from']:7} {row['shards']:6} {row['block_size']:6} {row['batch_size']:6} "
            f"{row['mb_s']:8.0f} {row['best_mb_s']:8.0f} {row['core_mb_s']:8.0f}"
        )
    print(json.dumps({"bench": "dataloader", "processes": args.processes, "rates": rows}))


if __name__ == "__main__":
    main()
