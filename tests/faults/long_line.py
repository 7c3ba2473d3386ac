"""One line of any length as a corpus, and the memory that it took:

    python tests/faults/long_line.py 1073741824 char /tmp/made
    python tests/faults/long_line.py 1073741824 gpt2 /tmp/made

Writes a text of so many bytes without a line break or a space, prepares it, reads it back block by block, and
prints the seconds, the tokens and the largest resident memory in MB.
"""

import resource
import shutil
import sys
import time
from pathlib import Path

from fradique.data import build, dataset, text

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LINE = "amor\0luz\U0001f984éç日本"  # no space: no place to cut it


def resident() -> int:
    """The most memory that this process has had so far, in MB (Linux counts it in KB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main(size: int, tokenizer: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    source = folder / "line.txt"
    block = (LINE * (1 << 15)).encode()
    with source.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    began, at_first = time.monotonic(), resident()
    meta = build.prepare_text(text.files_text([source], "a line"), folder / "made", tokenizer, 0.1)
    made = dataset.open_corpus(folder / "made", 256)
    there = made.train.count_text_bytes(made.tokenizer) + made.val.count_text_bytes(made.tokenizer)
    assert there == source.stat().st_size == sum(split["bytes"] for split in meta["splits"].values())
    head = made.tokenizer.decode(made.train.token_files[0][: 1 << 16])
    assert (LINE * (len(head) // len(LINE) + 1)).startswith(head.rstrip("\ufffd"))
    seconds, tokens = time.monotonic() - began, made.train.tokens + made.val.tokens
    shutil.rmtree(folder)
    print(f"{there:,} bytes, {tokens:,} tokens, {seconds:.1f} s")
    print(f"MB resident: {at_first} before, {resident()} at most")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
