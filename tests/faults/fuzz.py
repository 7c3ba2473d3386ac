"""Coverage-guided fuzzing of the targets in targets.py. Install atheris, then run for each target:

    python tests/faults/fuzz.py meta_json -max_total_time=600

Without arguments it lists the targets; arguments after the target are passed to libFuzzer. It starts from
valid files (seeds.py) and damages them according to their structure (mutations.py) or with libFuzzer's
mutations. A finding ends the run with a traceback and saves the input to crash-<hash>; pass that file as the
last argument to reproduce it. More than 4 GB of memory or 30 s for one input is also a finding.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
INSTRUMENTED_MODULES = [
    "fradique",
    "configurator",
    "sample",
    "train",
    "lab.report",
    "lab.curves",
    "json",
    "pickle",
    "ast",
]


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED_MODULES):
        import targets

    if len(sys.argv) < 2 or sys.argv[1] not in targets.TARGETS:
        sys.exit(f"which target? {', '.join(targets.TARGETS)}")
    target, flags = targets.TARGETS[sys.argv[1]], sys.argv[2:]
    defaults = {"-rss_limit_mb": 4096, "-timeout": 30, "-max_len": 1 << 16, "-print_final_stats": 1}
    missing = {k: v for k, v in defaults.items() if not any(k in flag for flag in flags)}
    flags = [f"{flag}={value}" for flag, value in missing.items()] + flags
    n_inputs, start = 0, time.monotonic()

    def run_input(data: bytes) -> None:
        nonlocal n_inputs
        n_inputs += 1
        if n_inputs % 5000 == 0:
            print(f"{sys.argv[1]}: {n_inputs} inputs in {time.monotonic() - start:.0f} s", flush=True)
        target.run(data)

    def damage(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, max_size)
        return target.damage(bytes(data), random.Random(seed))[:max_size]

    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(target.seeds()):
            (Path(folder) / str(number)).write_bytes(seed)
        inputs = [flag for flag in flags if not flag.startswith("-")]
        argv = [sys.argv[0], *flags, *([] if inputs else [folder])]
        atheris.Setup(argv, run_input, custom_mutator=damage)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
