"""Hostile input by coverage-guided fuzzing: pip install atheris, then, for each target,

    python tests/faults/fuzz.py meta_json -max_total_time=600

The targets are listed by `python tests/faults/fuzz.py`; what follows the name goes to libFuzzer. Input begins
with valid files (seeds.py), and is damaged by its structure half of the time (mutations.py), by libFuzzer the
other half. A finding ends the run with its traceback and leaves the input in crash-<sum>: give that file as
the last argument to see it again. More than 4 GB of memory, or 30 s for one input, is a finding too.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
OURS = ["fradique", "configurator", "sample", "train", "lab.report", "lab.curves", "json", "pickle", "ast"]


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=OURS):
        import targets

    if len(sys.argv) < 2 or sys.argv[1] not in targets.TARGETS:
        sys.exit(f"which target? {', '.join(targets.TARGETS)}")
    target, flags = targets.TARGETS[sys.argv[1]], sys.argv[2:]
    limits = {"-rss_limit_mb": 4096, "-timeout": 30, "-max_len": 1 << 16, "-print_final_stats": 1}
    flags = [
        f"{flag}={value}" for flag, value in limits.items() if not any(flag in one for one in flags)
    ] + flags
    tried, began = [0], time.monotonic()

    def once(data: bytes) -> None:
        tried[0] += 1
        if tried[0] % 5000 == 0:
            print(f"{sys.argv[1]}: {tried[0]} inputs in {time.monotonic() - began:.0f} s", flush=True)
        target.run(data)

    def damage(data: bytes, longest: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, longest)
        return target.damage(bytes(data), random.Random(seed))[:longest]

    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(target.seeds()):
            (Path(folder) / str(number)).write_bytes(seed)
        given = [one for one in flags if not one.startswith("-")]
        words = [sys.argv[0], *flags, *([] if given else [folder])]
        atheris.Setup(words, once, custom_mutator=damage)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
