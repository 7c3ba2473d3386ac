"""Kill workers of prepare.py (kill -9) at random times, restart them, and compare every file.

    python tests/faults/kill_prepare.py [--kills 120] [--kinds char,bpe:300,documents] [--workers 1,2,3,5]

Workers run at the same time, the first one twice. Every file of the corpus must equal that of one worker that
is not killed. Workers are forked from this process, so that they are killed during the work and not the
imports. The last line of the output is JSON; the exit status is 1 if a corpus differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fradique.data import prepare
from fradique.data.documents import read_documents

SHARDS = 12
MAX_KILLS = 6  # of one worker in one corpus


def write_source(kind: str, folder: Path, rng: random.Random) -> Path:
    """Write a text in two files, or documents in three kinds of files. Returns the input path."""
    folder.mkdir()
    words = ["".join(rng.choices("abcdefghiéã—", k=rng.randint(1, 9))) for _ in range(2000)]

    def text(n: int) -> str:
        return " ".join(rng.choices(words, k=n)) + "\n"

    if kind != "documents":
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text("".join(text(20) for _ in range(4000)), encoding="utf-8")
        return folder
    for name in ("a.jsonl", "b.jsonl"):
        lines = [json.dumps({"text": text(rng.randint(0, 200))}) + "\n" for _ in range(700)]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    for i in range(20):
        (folder / f"c{i:02}.txt").write_text(text(500), encoding="utf-8")
    assert len(list(read_documents(folder / "a.jsonl"))) == 700
    return folder


def corpus_spec(kind: str, folder: Path) -> prepare.CorpusSpec:
    """The spec of a corpus of documents or of a text."""
    if kind == "documents":
        return prepare.CorpusSpec(folder, "", "gpt2", "", documents=lambda: iter([]))
    return prepare.CorpusSpec(folder, "", kind, "")


def start(kind: str, source: Path, out: Path, worker: str) -> int:
    """Start a worker in a forked process. Returns its process id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        flags = ["--input", str(source), "--out_dir", str(out), "--val_fraction=0.1", f"--shards={SHARDS}"]
        with contextlib.redirect_stdout(io.StringIO()):
            status = prepare.main(corpus_spec(kind, out), [*flags, "--worker", worker])
    finally:
        os._exit(status)


@dataclass
class Worker:
    """A running worker, the number of times it will still be killed, and the time of the next kill."""

    name: str
    process: int
    kills: int
    deadline: float


def prepare_with_kills(
    kind: str, source: Path, out: Path, workers: int, max_seconds: float, rng: random.Random
) -> int:
    """Prepare a corpus with workers that are killed and restarted. Returns the number of kills."""
    killed = 0

    def start_worker(name: str, kills: int) -> Worker:
        process = start(kind, source, out, name)
        return Worker(name, process, kills, time.monotonic() + rng.random() * max_seconds)

    names = [f"{i}/{workers}" for i in range(workers)] + [f"0/{workers}"] * (workers > 1)
    running = [start_worker(name, rng.randint(1, MAX_KILLS)) for name in names]
    while running:
        time.sleep(0.001)
        for worker in list(running):
            if worker.kills and time.monotonic() > worker.deadline:
                os.kill(worker.process, signal.SIGKILL)
            elif os.waitid(os.P_PID, worker.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            running.remove(worker)
            _, status = os.waitpid(worker.process, 0)
            code = os.waitstatus_to_exitcode(status)
            if code == -signal.SIGKILL:
                killed += 1
                running.append(start_worker(worker.name, worker.kills - 1))
            elif code:
                raise SystemExit(f"worker {worker.name} of {kind} ended with {code}")
    return killed


def checksums(folder: Path) -> dict[str, str]:
    """{path: sha256} of all files in a folder and its subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(argv: Sequence[str] | None = None) -> int:
    """Kill workers for each kind of corpus and number of workers. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=120, help="at least this many (default: %(default)s)")
    add("--kinds", default="char,bpe:300,documents", help="default: %(default)s")
    add("--workers", default="1,2,3,5", help="default: %(default)s")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    cases = [(kind, int(n)) for kind in args.kinds.split(",") for n in args.workers.split(",")]
    kills = corpora = different = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds.split(","):
            source = write_source(kind, Path(folder) / f"source-{kind}", rng)
            reference = Path(folder) / f"undisturbed-{kind}"
            start_time = time.monotonic()
            process = start(kind, source, reference, "0/1")
            if os.waitpid(process, 0)[1]:
                return 1
            max_seconds, expected = 1.2 * (time.monotonic() - start_time), checksums(reference)
            for _, workers in (case for case in cases if case[0] == kind):
                case_kills = 0
                while case_kills < args.kills / len(cases):
                    out = Path(folder) / f"out-{corpora}"
                    case_kills += prepare_with_kills(kind, source, out, workers, max_seconds, rng)
                    corpora += 1
                    different += checksums(out) != expected
                kills += case_kills
                message = f"{kind:10} {workers} workers: {case_kills} kills, {different} corpora that differ"
                print(message, flush=True)
    result = {"fault": "kill_prepare", "kills": kills, "corpora": corpora, "different": different}
    print(json.dumps(result))
    return different > 0


if __name__ == "__main__":
    sys.exit(main())
