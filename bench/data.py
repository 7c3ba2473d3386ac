"""Speed of the tokenizers and of the batch sampler.

    python -m bench.data [--input FILE_OR_FOLDER ...] [--threads 2] [--rounds 5]

Tokenizers: MB of UTF-8 text per second, of Fradique's tokenizers and of the batch encoders of tiktoken and
tokenizers on the same text. Sampler: million tokens per second, of the sampler of train.py and of a loop over
windows, from a file of 64 million tokens.

The two that are compared take turns, so that other load on the machine slows both. Results are medians over
the rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.command import bench_command
from fradique.data import dataset
from fradique.data.input_files import find_files
from fradique.data.sampler import Sampler
from fradique.data.sources import python_library
from fradique.data.text import Text, cut_pieces, files_text
from fradique.io.terminal import path_argument
from fradique.tokenizer import bpe
from fradique.tokenizer.tokenizer import CharTokenizer, GPT2Tokenizer, train_bpe

Rates = dict[str, float]
LOADED_TOKENS = 1 << 26  # size of the token file that batches are read from
BLOCK_SIZE, BATCH_SIZE, BATCHES = 1024, 12, 200  # tokens per window, windows per batch, batches per round


def measure_tokenizers(pieces: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """Rates of Fradique's three tokenizers on `pieces` of text, and of the libraries that two of them use."""
    import tokenizers as huggingface

    megabytes = sum(len(piece.encode()) for piece in pieces) / 1e6
    characters = {char for piece in pieces for char in piece}
    char = CharTokenizer("".join(sorted(characters)))
    gpt2 = GPT2Tokenizer()
    trained_bpe = train_bpe(pieces, 4096)
    _, tiktoken_gpt2 = bpe.gpt2_encoding()
    huggingface_bpe = huggingface.Tokenizer.from_str(json.dumps(trained_bpe.to_json()["model"]))
    short_pieces = list(cut_pieces(pieces, 4096))  # the size with which Hugging Face's encoder is fastest
    gpt2_tokens = sum(len(ids) for ids in gpt2.encode_batch(pieces, threads))

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
            lambda: trained_bpe.encode_batch(pieces, threads),
            lambda: huggingface_bpe.encode_batch(short_pieces),  # with as many threads as it chooses
        ),
    }
    result["gpt2"]["mtokens_s"] = result["gpt2"]["mb_s"] * gpt2_tokens / megabytes / 1e6
    return result


def measure_batches(rounds: int) -> Rates:
    """Million tokens per second of the sampler (mtokens_s) and of a loop over windows (loop_mtokens_s)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(50257, size=LOADED_TOKENS).astype("<u2").tofile(path)
        split = dataset.Split([path], "uint16", 50257, None)
        sampler = Sampler(split, BLOCK_SIZE, BATCH_SIZE, accumulation=1, seed=0)
        tokens = split.token_files[0]

        def read_with_sampler() -> None:
            for step in range(BATCHES):
                list(sampler.micro_batches(step))

        def read_with_loop() -> None:
            for _ in range(BATCHES):
                starts = torch.randint(len(tokens) - BLOCK_SIZE, (BATCH_SIZE,)).tolist()
                for shift in (0, 1):  # inputs, targets
                    torch.stack(
                        [
                            torch.from_numpy(tokens[i + shift : i + shift + BLOCK_SIZE].astype(np.int64))
                            for i in starts
                        ]
                    )

        million_tokens = BATCHES * BATCH_SIZE * BLOCK_SIZE / 1e6
        rates = compare(million_tokens, rounds, read_with_sampler, read_with_loop)
    return {
        "mtokens_s": rates["mb_s"],
        "loop_mtokens_s": rates["library_mb_s"],
        "ratio": rates["ratio"],
    }


def compare(
    amount: float, rounds: int, ours: Callable[[], object], library: Callable[[], object] | None
) -> Rates:
    """Rates of `ours` and `library`, which take turns, and their ratio: medians over the rounds.

    amount: how much one call processes, in MB or million tokens. The keys say MB in both cases.
    """
    our_rates, library_rates = [], []
    for _ in range(rounds):
        our_rates.append(amount / _seconds(ours))
        if library is not None:
            library_rates.append(amount / _seconds(library))
    if not library_rates:
        return {"mb_s": statistics.median(our_rates)}
    ratio = statistics.median(a / b for a, b in zip(our_rates, library_rates, strict=True))
    return {
        "mb_s": statistics.median(our_rates),
        "library_mb_s": statistics.median(library_rates),
        "ratio": ratio,
    }


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
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
        comparison = ""
        if "ratio" in rates:
            comparison = f" {rates['library_mb_s']:8.1f} {rates['ratio']:6.2f}  {library}"
        lines.append(f"{name:10} {n_threads:7} {rates['mb_s']:8.1f}{comparison}")
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


@bench_command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        type=path_argument,
        help="text files or folders (default: Python's standard library)",
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of the BPE tokenizers (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="number of rounds; results are medians over them (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    text = _input_text(args.input)
    result = measure_tokenizers(list(cut_pieces(text.chunks())), args.threads, args.rounds)
    result["load"] = measure_batches(args.rounds)
    print(table(result))
    print(json.dumps({"bench": "data", **result}))


def _input_text(inputs: Sequence[Path] | None) -> Text:
    """The text of some files and folders; without any, that of Python's standard library."""
    if inputs:
        return files_text(find_files(inputs), "")
    return python_library(Path())  # it does not use the folder


if __name__ == "__main__":
    main()
