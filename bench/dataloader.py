"""Speed of reading batches from token files, and memory of train.py with a large corpus.

    python -m bench.dataloader [--rounds 7] [--processes 2]
    python -m bench.dataloader --sparse 20    # train.py on 20 GB of sparse shards, and on 20 MB

MB/s counts two bytes for each token that is read, as in the file, and not the int64 tensors that are
returned. All processes read at the same time, each its own batches, as ranks do. The table shows the
throughput of all processes together (median and best round), and the median throughput per second of CPU
time, which is that of one fully used core. The files are in the page cache: no disk is measured.
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

from bench.command import bench_command
from fradique.data import dataset
from fradique.data.sampler import Sampler
from fradique.data.token_files import MAX_CACHED_BYTES
from fradique.tokenizer import tokenizer

UNCACHED_TOKENS = MAX_CACHED_BYTES  # of two bytes, so twice the limit: TokenFiles reads them from the files
CACHED_TOKENS = MAX_CACHED_BYTES // 4  # half the limit: TokenFiles keeps them in memory
SHAPES = ((64, 12), (64, 64), (256, 64), (1024, 12))  # block_size, batch_size
SHARDS = (1, 40, 1000)
ROUND_MEGABYTES = 8  # of tokens, per process
TRAIN_FLAGS = (
    "--n_layer=1 --n_head=1 --n_embd=16 --block_size=256 --batch_size=32 --gradient_accumulation_steps=1 "
    "--compile=False"
)
STEPS = 400  # each reads a different part of the corpus: mapped files would show up in the memory
ROOT = Path(__file__).resolve().parents[1]


def measure(rounds: int, processes: int) -> list[dict[str, Any]]:
    """One row for each batch shape and number of shards, from files (in the page cache) and from memory."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for shards, tokens in ((1, CACHED_TOKENS), *((shards, UNCACHED_TOKENS) for shards in SHARDS)):
            folder = Path(scratch) / f"{shards}-{tokens}"
            write_shards(folder, shards, tokens)
            for block_size, batch_size in SHAPES:
                rates, core_rates = zip(
                    *_rates(folder, block_size, batch_size, rounds, processes), strict=True
                )
                results.append(
                    {
                        "source": "memory" if tokens == CACHED_TOKENS else "files",
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
        context.Process(target=_reader_process, args=(folder, block_size, batch_size, rank, processes, child))
        for rank, (_, child) in enumerate(pipes)
    ]
    for reader, (_, child) in zip(readers, pipes, strict=True):
        reader.start()
        child.close()  # so that recv() raises EOFError if the reader dies
    for i in range(rounds + 1):
        start = time.perf_counter()
        for parent, _ in pipes:
            parent.send(True)
        replies = [parent.recv() for parent, _ in pipes]
        n_bytes = sum(count for count, _ in replies)
        cpu_seconds = sum(seconds for _, seconds in replies)
        if i:  # the first round includes the start of the processes
            yield n_bytes / (time.perf_counter() - start) / 1e6, n_bytes / cpu_seconds / 1e6
    for parent, _ in pipes:
        parent.send(False)
    for reader in readers:
        reader.join()
        reader.close()
    for parent, _ in pipes:
        parent.close()


def _reader_process(
    folder: Path, block_size: int, batch_size: int, rank: int, world: int, pipe: Connection
) -> None:
    """For each True received, read the next ROUND_MEGABYTES of batches and send (bytes, CPU seconds)."""
    split = dataset.Split(sorted(folder.iterdir()), "uint16", 50257, None)
    # one micro-batch per rank and step
    sampler = Sampler(split, block_size, batch_size, accumulation=world, seed=0)
    steps = max(1, ROUND_MEGABYTES * 10**6 // (2 * block_size * batch_size))
    first_step = 0
    while pipe.recv():
        start = time.process_time()
        for step in range(first_step, first_step + steps):
            list(sampler.micro_batches(step, rank, world))
        first_step += steps
        pipe.send((2 * steps * block_size * batch_size, time.process_time() - start))


def sparse_corpus(folder: Path, gigabytes: float, shards: int = 40) -> None:
    """Write a corpus of sparse files, in which all tokens are 0. The validation split is 40 kB."""
    folder.mkdir(parents=True)
    tokenizer.save_tokenizer(tokenizer.CharTokenizer("ab"), folder / "tokenizer.json")
    splits = {}
    train_tokens = round(gigabytes * 1e9 / 2)  # two bytes per token
    for split, count, tokens in (("train", shards, train_tokens // shards), ("val", 1, 20_000)):
        names = [f"{split}_{i:05d}.bin" for i in range(count)]
        for name in names:
            with (folder / name).open("wb") as file:
                file.truncate(2 * tokens)
        entries = [{"file": name, "tokens": tokens, "bytes": tokens, "sha256": ""} for name in names]
        splits[split] = {"tokens": tokens * count, "bytes": tokens * count, "shards": entries}
    meta = {"format": 1, "dtype": "uint16", "vocab_size": 2, "tokenizer": "char", "source": "sparse files"}
    (folder / "meta.json").write_text(json.dumps(meta | {"splits": splits}))


def memory_of_training(folder: Path, steps: int) -> dict[str, float]:
    """Peak resident memory of train.py on a corpus, in MB, from /proc.

    RssAnon (anonymous) and RssFile (mapped from files) are sampled every 10 ms; VmHWM is the kernel's own
    peak of the total.
    """
    command = [sys.executable, str(ROOT / "train.py"), f"--data_dir={folder.parent}"]
    command += [f"--dataset={folder.name}", f"--out_dir={folder.parent / ('out-' + folder.name)}"]
    command += TRAIN_FLAGS.split()
    command += [f"--max_iters={steps}", f"--eval_interval={steps}", "--eval_iters=5"]
    peaks = {"RssAnon": 0.0, "RssFile": 0.0, "VmHWM": 0.0}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,  # a pipe that is not read would fill up
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
        Path(f"/proc/{process.pid}/status").open() as status,
    ):
        while process.poll() is None:
            status.seek(0)
            for line in status.read().splitlines():
                name, value = line.split(":", 1)
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024 / 1e6)
            time.sleep(0.01)
        if process.returncode:
            output.seek(0)
            raise SystemExit(output.read())
    return peaks


@bench_command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="number of rounds; the median and the best are printed (default: %(default)s)",
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="processes that read at the same time (default: %(default)s)"
    )
    parser.add_argument(
        "--sparse",
        type=float,
        metavar="GB",
        help="measure the memory of train.py on a corpus of this size instead (Linux only)",
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="training steps for --sparse (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.sparse is not None:
        if not sys.platform.startswith("linux"):
            raise ValueError("--sparse reads the memory of a process from /proc, which only Linux has")
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
    print(f"{'source':7} {'shards':>6} {'block':>6} {'batch':>6} {'MB/s':>8} {'best':>8} {'MB/cpu-s':>8}")
    for row in rows:
        print(
            f"{row['source']:7} {row['shards']:6} {row['block_size']:6} {row['batch_size']:6} "
            f"{row['mb_s']:8.0f} {row['best_mb_s']:8.0f} {row['core_mb_s']:8.0f}"
        )
    print(json.dumps({"bench": "dataloader", "processes": args.processes, "rates": rows}))


if __name__ == "__main__":
    main()
