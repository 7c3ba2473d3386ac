"""Prepare a corpus of one long line, and measure the memory.

    python tests/faults/long_line.py 1073741824 char /tmp/made
    python tests/faults/long_line.py 1073741824 gpt2 /tmp/made

Arguments: size in bytes, tokenizer, folder. Writes a text of that size without a line break or space,
prepares it, reads it back in blocks, and prints the seconds, the tokens and the peak resident memory in MB.
"""

import resource
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fradique.data import build, dataset, text

LINE = "amor\1luz\U0001f984éç日本"  # without a space, so that no cut is at a space


def peak_memory() -> int:
    """Peak resident memory of this process in MB (Linux reports KB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main(size: int, tokenizer: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    source = folder / "line.txt"
    block = (LINE * (1 << 15)).encode()
    with source.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    start, before = time.monotonic(), peak_memory()
    meta = build.prepare_text(text.files_text([source], "a line"), folder / "made", tokenizer, 0.1)
    corpus = dataset.open_corpus(folder / "made", 256)
    text_bytes = sum(split.count_text_bytes(corpus.tokenizer) for split in (corpus.train, corpus.val))
    assert text_bytes == source.stat().st_size == sum(split["bytes"] for split in meta["splits"].values())
    head = corpus.tokenizer.decode(corpus.train.token_files[0][: 1 << 16])
    assert (LINE * (len(head) // len(LINE) + 1)).startswith(head.rstrip("\ufffd"))
    seconds, tokens = time.monotonic() - start, corpus.train.tokens + corpus.val.tokens
    shutil.rmtree(folder)
    print(f"{text_bytes:,} bytes, {tokens:,} tokens, {seconds:.1f} s")
    print(f"peak MB resident: {before} before, {peak_memory()} after")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
