"""Speed of the tokenizers and of the batch sampler.

    python -m bench.data [--input FILE_OR_FOLDER ...] [--threads 2] [--rounds 5]

Rates are in MB of UTF-8 text per second. Our tokenizers and the batch encoders of the libraries take turns
on the same text, so that other load on the machine slows both; the ratio is the median over the rounds.
Batches are read from a file of 64 million tokens, by the sampler of train.py and by a plain loop over
windows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fradique.data import dataset
from fradique.data import sampler as samplers
from fradique.data.sources import python_library
from fradique.data.text import Text, cut_pieces, files_text, find_files
from fradique.tokenizer import bpe, tokenizer

Rates = dict[str, float]


def measure(pieces: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """Rates of the three tokenizers on `pieces`, and of the libraries that they use."""
    import tokenizers as huggingface

    megabytes = sum(len(piece.encode()) for piece in pieces) / 1e6
    char = tokenizer.CharTokenizer("".join(sorted(set().union(*map(set, pieces)))))
    gpt2 = tokenizer.GPT2Tokenizer()
    tokenizer_of_corpus = tokenizer.train_bpe(pieces, 4096)
    _, tiktoken_gpt2 = bpe.gpt2_encoding()
    huggingface_bpe = huggingface.Tokenizer.from_str(json.dumps(tokenizer_of_corpus.to_json()["model"]))
    short = list(cut_pieces(pieces, 4096))  # the fastest size for Hugging Face's encoder
    tokens = sum(map(len, gpt2.encode_batch(pieces, threads)))

    def rates(ours: Callable[[], object], library: Callable[[], object] | None = None) -> Rates:
        return compare(megabytes, rounds, ours, library)

    result: dict[str, Any] = {
        "text_mb": megabytes,
        "threads": threads,
        "rounds": rounds,
        "char": rates(lambda: char.encode_batch(pieces)),
        "gpt2": rates(
            lambda: gpt2.encode_batch(pieces, threads),
            lambda: tiktoken_gpt2.encode_ordinary_batch(list(pieces), num_threads=threads),
        ),
        "bpe": rates(
            lambda: tokenizer_of_corpus.encode_batch(pieces, threads),
            lambda: huggingface_bpe.encode_batch(short),  # it chooses the number of threads
        ),
    }
    result["gpt2"]["mtokens_s"] = result["gpt2"]["mb_s"] * tokens / megabytes / 1e6
    return result


LOADED_TOKENS, BLOCK_SIZE, BATCH_SIZE, BATCHES = 1 << 26, 1024, 12, 200


def measure_batches(rounds: int) -> Rates:
    """Million tokens per second in batches of 12 x 1024: from the sampler, and from a loop over windows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(50257, size=LOADED_TOKENS).astype("<u2").tofile(path)
        split = dataset.Split([path], "uint16", 50257, None)
        sampler = samplers.Sampler(split, BLOCK_SIZE, BATCH_SIZE, 1, seed=0)
        tokens = split.token_files[0]

        def ours() -> None:
            for step in range(BATCHES):
                list(sampler.micro_batches(step))

        def loop() -> None:
            for _ in range(BATCHES):
                starts = torch.randint(len(tokens) - BLOCK_SIZE, (BATCH_SIZE,)).tolist()
                for shift in (0, 1):
                    torch.stack(
                        [
                            torch.from_numpy(tokens[i + shift : i + shift + BLOCK_SIZE].astype(np.int64))
                            for i in starts
                        ]
                    )

        rates = compare(BATCHES * BATCH_SIZE * BLOCK_SIZE / 1e6, rounds, ours, loop)
    names = {"mb_s": "mtokens_s", "library_mb_s": "loop_mtokens_s"}
    return {names.get(name, name): value for name, value in rates.items()}


def compare(
    megabytes: float, rounds: int, ours: Callable[[], object], library: Callable[[], object] | None
) -> Rates:
    """MB/s of `ours` and `library`, which take turns, and their ratio: medians over the rounds."""
    our_rates, library_rates = [], []
    for _ in range(rounds):
        our_rates.append(megabytes / _seconds(ours))
        if library is not None:
            library_rates.append(megabytes / _seconds(library))
    if not library_rates:
        return {"mb_s": statistics.median(our_rates)}
    ratio = statistics.median(a / b for a, b in zip(our_rates, library_rates, strict=True))
    return {
        "mb_s": statistics.median(our_rates),
        "library_mb_s": statistics.median(library_rates),
        "ratio": ratio,
    }


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    threads = result["threads"]
    rows = [
        ("char", 1, result["char"], "-"),
        ("gpt2", threads, result["gpt2"], "tiktoken encode_ordinary_batch"),
        ("bpe:4096", threads, result["bpe"], "tokenizers encode_batch"),
    ]
    lines = [f"{'tokenizer':10} {'threads':>7} {'MB/s':>8} {'library':>8} {'ratio':>6}"]
    for name, n_threads, rates, library in rows:
        other = f"{rates['library_mb_s']:8.1f} {rates['ratio']:6.2f}  {library}" if "ratio" in rates else ""
        lines.append(f"{name:10} {n_threads:7} {rates['mb_s']:8.1f} {other}".rstrip())
    lines.append(
        f"gpt2: {result['gpt2']['mtokens_s']:.2f} million tokens/s; {result['text_mb']:.1f} MB of text"
    )
    if "load" in result:
        load = result["load"]
        lines.append(
            f"batches of {BATCH_SIZE} x {BLOCK_SIZE}: {load['mtokens_s']:.0f} million tokens/s, "
            f"{load['ratio']:.2f} times as fast as a loop"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and one line of JSON."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--input", nargs="+", type=Path, help="text files or folders (default: Python's standard library)")
    add("--threads", type=int, default=2, help="threads of the BPE tokenizers (default: %(default)s)")
    add(
        "--rounds",
        type=int,
        default=5,
        help="number of rounds; the result is their median (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    text = _text(args.input)
    result = measure(list(cut_pieces(text.chunks())), args.threads, args.rounds)
    result["load"] = measure_batches(args.rounds)
    print(table(result))
    print(json.dumps({"bench": "data", **result}))


def _text(inputs: Sequence[Path] | None) -> Text:
    if inputs:
        files = find_files(inputs)
        return files_text(files, "")
    return python_library(Path(sysconfig.get_path("stdlib")))


if __name__ == "__main__":
    main()
