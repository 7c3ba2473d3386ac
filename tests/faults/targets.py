"""Fuzz targets: functions of bytes that pass them to a real entry point, as a file or a flag.

A target passes if the entry point works, or raises an OSError or a ValueError with a message of limited
length (but not a subclass such as UnicodeDecodeError, whose messages do not help a user). Anything else is a
finding. `fuzz.py` runs the targets with atheris, tests/hostile/test_targets.py with hypothesis.
"""

import ast
import contextlib
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import mutations  # noqa: E402  (needs the path above)
import seeds  # noqa: E402

import configurator  # noqa: E402
import sample  # noqa: E402
from fradique.checkpointing import checkpoint, embedding_snapshots, metrics_file, run_folder  # noqa: E402
from fradique.data import build, dataset, documents, text  # noqa: E402
from fradique.data import sampler as samplers  # noqa: E402
from fradique.optim import optimizer  # noqa: E402
from fradique.pretrained import weight_files  # noqa: E402
from fradique.runtime.memory_limits import OomReport  # noqa: E402
from fradique.tokenizer import tokenizer as tokenizers  # noqa: E402
from fradique.training import loss_plot, model_setup, setup, time_budget  # noqa: E402
from fradique.training.trainer import TrainState  # noqa: E402
from lab import common, report  # noqa: E402
from model import GPTConfig  # noqa: E402
from train import TrainSettings  # noqa: E402

MAX_MESSAGE = 20_000  # characters of an error message
PROSE = "Era uma vez, n'uma ilha,\r\n um gato:\t42 luas \U0001f984 日本 \0 é."
GPT2, OWN = tokenizers.GPT2Tokenizer(), tokenizers.train_bpe(["aa ab aab"], 259)


class Finding(Exception):
    """Behaviour that a target must not show."""


@contextlib.contextmanager
def only_useful_errors():
    """Allow errors with a useful message; turn all others into a Finding."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (ValueError, OSError) as error:
        if type(error) is not ValueError and not isinstance(error, OSError):
            raise Finding(f"a bare {type(error).__name__}: {error}"[:500]) from error
        if not str(error) or len(str(error)) > MAX_MESSAGE:
            raise Finding(f"a message of {len(str(error))} characters") from error


@contextlib.contextmanager
def folder():
    """A temporary folder for one input, in memory if the system has /dev/shm."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def expect(condition: bool, message: str) -> None:
    """Raise a Finding if a condition does not hold."""
    if not condition:
        raise Finding(message)


def write_json(path: Path, value: Any) -> None:
    path.write_bytes(json.dumps(value).encode())


def parts_of(data: bytes) -> dict[str, Any] | None:
    """{file name: content} of an input that stands for several files; None if it is not a JSON object."""
    try:
        parts = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return parts if isinstance(parts, dict) else None


# Settings and configs


def settings(data: bytes) -> None:
    """A command line, one argument per line; or the settings of an earlier run as JSON."""
    words = data.decode("utf-8", "surrogateescape").split("\n")[:40]
    words = [word for word in words if word.startswith("--")]  # no config files: they are code
    for cls in (TrainSettings, sample.SampleSettings):
        with only_useful_errors():
            resolved = configurator.resolve(cls, [f"{w}=1" if "=" not in w else w for w in words])
            json.dumps(asdict(resolved.settings), allow_nan=False).encode()
            time_budget.parse_duration(getattr(resolved.settings, "time_budget", ""))
    saved = parts_of(data)
    if saved is not None:
        with only_useful_errors():
            configurator.resolve(TrainSettings, [], saved, "settings.json")


def config_text(data: bytes) -> None:
    """A config file. As it is code, it is only run if it assigns literals to names."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(data)
            for node in tree.body:
                assert isinstance(node, ast.Assign)
                assert all(isinstance(target, ast.Name) for target in node.targets)
                ast.literal_eval(node.value)
    except SyntaxError:
        pass
    except Exception:
        if b"import" in data or b"(" in data:  # it might run code
            return
        tree = None
    with folder() as work, only_useful_errors():
        (work / "config.py").write_bytes(data)
        configurator.resolve(TrainSettings, [str(work / "config.py")])


# A corpus


def meta_json(data: bytes) -> None:
    with folder() as work:
        seeds.write_corpus(work)
        (work / "meta.json").write_bytes(data)
        open_and_read(work)


def token_file(data: bytes) -> None:
    """train.bin of a corpus without meta.json, like nanoGPT's; the first byte is the block size."""
    with folder() as work:
        seeds.write_corpus(work)
        (work / "meta.json").unlink()
        (work / "train.bin").write_bytes(data[1:])
        open_and_read(work, data[0] if data else 1)


def open_and_read(work: Path, block_size: int = 8) -> None:
    with only_useful_errors():
        opened = dataset.open_corpus(work, max(1, block_size))
        sampler = samplers.Sampler(opened.train, max(1, block_size), 2, 1, seed=1)
        x, _ = next(sampler.micro_batches(3))
        expect(int(x.max()) < opened.tokenizer.vocab_size, "a token beyond the vocabulary")
        expect(
            all(p.resolve().parent == work.resolve() for p in opened.train.paths + opened.val.paths),
            "outside",
        )
        opened.val.count_text_bytes(opened.tokenizer)


def meta_pkl(data: bytes) -> None:
    with folder() as work, only_useful_errors():
        (work / "meta.pkl").write_bytes(data)
        use(tokenizers.read_meta_pkl(work / "meta.pkl"))


def tokenizer_json(data: bytes) -> None:
    with folder() as work, only_useful_errors():
        (work / "tokenizer.json").write_bytes(data)
        use(tokenizers.load_tokenizer(work / "tokenizer.json"))


def use(tokenizer: tokenizers.Tokenizer) -> None:
    expect(len(tokenizer.byte_lengths()) == tokenizer.vocab_size, "byte_lengths")
    tokenizer.decode(np.arange(min(tokenizer.vocab_size, 1000)))
    tokenizers.encode_prompt(tokenizer, "")
    with contextlib.suppress(ValueError):
        expect(tokenizer.decode(tokenizer.encode(PROSE)) == PROSE, "decode(encode(text)) is not the text")


# Weights


def safetensors_file(data: bytes) -> None:
    """Hugging Face weights with and without config.json, and embedding snapshots of a run."""
    with folder() as work:
        (work / "model.safetensors").write_bytes(data)
        (work / weight_files.FRADIQUE_TOKENIZER_FILE).write_bytes(seeds.tokenizer_json()[0])
        load_weights(work)
        write_json(work / "config.json", seeds.HF_CONFIG)
        load_weights(work)
        (work / embedding_snapshots.SNAPSHOT_FOLDER).mkdir()
        shutil.copyfile(
            work / "model.safetensors", work / embedding_snapshots.SNAPSHOT_FOLDER / "step-1.safetensors"
        )
        with only_useful_errors():
            for one in embedding_snapshots.read_snapshots(work):
                expect(one.tokens.ndim == 2 and bool(np.isfinite(one.tokens).all()), "no table of embeddings")


def hf_json(data: bytes) -> None:
    """JSON files of a Hugging Face folder: {"config.json": …, "model.safetensors.index.json": …, …}."""
    with folder() as work:
        parts = parts_of(data)
        if parts is None:
            (work / "config.json").write_bytes(data)
            parts = {}
        (work / seeds.SHARD).write_bytes(seeds.HF_WEIGHTS)
        (work / weight_files.FRADIQUE_TOKENIZER_FILE).write_bytes(seeds.tokenizer_json()[0])
        for name in {"config.json", "model.safetensors.index.json", "tokenizer.json"} & parts.keys():
            write_json(work / name, parts[name])
        if not (work / "model.safetensors.index.json").exists():
            shutil.move(work / seeds.SHARD, work / "model.safetensors")
        load_weights(work)


def ckpt_pt(data: bytes) -> None:
    """First byte: 0: a pickle in a torch archive; 1: the same, compressed; otherwise the whole file."""
    kind, data = (data[0], data[1:]) if data else (9, b"")
    with folder() as work:
        canary = work / "canary"
        os.environ["FRADIQUE_CANARY"] = str(canary)
        (work / "tokenizer.json").write_bytes(seeds.tokenizer_json()[0])
        for name in ("ckpt.pt", "pytorch_model.bin"):
            if kind > 1:
                (work / name).write_bytes(data)
            else:
                seeds.write_archive(work / name, data, deflated=bool(kind))
        load_weights(work / "ckpt.pt")
        (work / "ckpt.pt").unlink()
        write_json(work / "config.json", seeds.HF_CONFIG)
        (work / weight_files.FRADIQUE_TOKENIZER_FILE).write_bytes(seeds.tokenizer_json()[0])
        load_weights(work)
        expect(not canary.exists(), "a pickle was executed")


def load_weights(source: Path) -> None:
    with only_useful_errors():
        loaded = sample.load_model(str(source), device="cpu", dtype="float32")
        expect(
            all(bool(p.isfinite().all()) for p in loaded.model.parameters()), "weights that are not finite"
        )
        loaded.model(torch.zeros(1, 1, dtype=torch.int64))


# A run folder


def checkpoint_json(data: bytes) -> None:
    """JSON files of a checkpoint: {"state.json": …, "model.json": …, "manifest.json": …}; checksums match."""
    parts = parts_of(data)
    with folder() as work:
        step = seeds.write_run(work)
        if parts is None:
            (step / "state.json").write_bytes(data)
        for name in {"state.json", "model.json"} & (parts or {}).keys():
            write_json(step / name, parts[name])
        seeds.write_manifest(step, (parts or {}).get("manifest.json"))
        with only_useful_errors():
            saved = checkpoint.read_checkpoint(checkpoint.newest_checkpoint(work, warn=lambda _: None))
            state = TrainState.read(saved.state)
            json.dumps(asdict(state), allow_nan=False)
            expect(type(state.step) is int and 0 <= state.step < 2**63, "an invalid step")
        load_weights(work)
        with only_useful_errors():
            continue_run(work)


def continue_run(work: Path) -> None:
    """Resume up to the first step: settings, model, weights and optimizer state."""
    saved = run_folder.saved_settings(work)
    resolved = configurator.resolve(TrainSettings, ["--device=cpu"], saved, "settings.json")

    opened = dataset.Corpus(work, None, None, tokenizers.CharTokenizer(seeds.CHARS))
    settings = replace(resolved.settings, out_dir=str(work), init_from="resume")
    source = model_setup.find_model(settings, opened)
    runtime = setup.choose_runtime(settings, source, (), average_gradients=True)
    model = model_setup.build_model(settings, source, runtime, OomReport())
    built = optimizer.build_optimizers(
        model,
        name=settings.optimizer,
        learning_rate=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        muon_learning_rate=0.02,
        muon_momentum=0.95,
    )
    optimizer.load_state_by_name(built, source.checkpoint.optimizer)


def checkpoint_tensors(data: bytes) -> None:
    """A safetensors file of a checkpoint; first byte: 0: the model's, otherwise the optimizer's."""
    with folder() as work:
        step = seeds.write_run(work)
        name = "model.safetensors" if not data or data[0] == 0 else "optimizer.safetensors"
        (step / name).write_bytes(data[1:])
        seeds.write_manifest(step)
        load_weights(work)
        with only_useful_errors():
            continue_run(work)


def run_json(data: bytes) -> None:
    """Other files of a run folder: {"settings.json": …, "metrics.jsonl": […], "samples.txt": text}."""
    parts = parts_of(data)
    with folder() as work:
        if parts is None:
            for name in (run_folder.SETTINGS_FILE, metrics_file.METRICS_FILE, metrics_file.SAMPLES_FILE):
                (work / name).write_bytes(data)
            parts = {}
        if run_folder.SETTINGS_FILE in parts:
            write_json(work / run_folder.SETTINGS_FILE, parts[run_folder.SETTINGS_FILE])
        records = parts.get(metrics_file.METRICS_FILE)
        if isinstance(records, list):
            (work / metrics_file.METRICS_FILE).write_text("".join(json.dumps(one) + "\n" for one in records))
        if isinstance(parts.get(metrics_file.SAMPLES_FILE), str):
            (work / metrics_file.SAMPLES_FILE).write_bytes(
                parts[metrics_file.SAMPLES_FILE].encode("utf-8", "surrogatepass")
            )
        with only_useful_errors():
            configurator.resolve(TrainSettings, [], run_folder.saved_settings(work), "settings.json")
        with only_useful_errors():
            loss_plot.plot_losses([loss_plot.read_curves(work)])
        with only_useful_errors():
            report.settings_section(run_folder.saved_settings(work))
            found = metrics_file.read_metrics(work)
            report.speed_section(found, run_folder.run_metadata(work))
            report.summary(found, GPTConfig(n_layer=1, n_head=1, n_embd=8), 1)
            report.samples_section(metrics_file.read_samples(work))
        with only_useful_errors():
            metrics_file.rewind_metrics(work, 3)
            expect(all(one["step"] <= 3 for one in metrics_file.read_metrics(work)), "records after the step")


# Text


def prompt(data: bytes) -> None:
    """A prompt as a flag and as a file; the first byte selects the tokenizer."""
    kind, data = (data[0], data[1:]) if data else (0, b"")
    tokenizer = (GPT2, OWN, tokenizers.CharTokenizer("\nabc é"))[kind % 3]
    words = data.decode("utf-8", "surrogateescape")
    stop, _, start = words.partition("\n\n")
    with only_useful_errors():
        prompt_of(tokenizer, start, stop)
    with folder() as work, only_useful_errors():
        (work / "prompt").write_bytes(data)
        prompt_of(tokenizer, sample.read_prompt(f"FILE:{work / 'prompt'}"), stop)
    with only_useful_errors():
        sample.read_prompt(f"FILE:{stop}") if not stop.startswith("/") else None
        time_budget.parse_duration(words)
        tokenizers.parse_spec(words)
        expect(len(str(common.number_problems("sizes", words, 0.0))) < 500, "a long message")


def prompt_of(tokenizer: tokenizers.Tokenizer, start: str, stop: str) -> None:
    ids = tokenizers.encode_prompt(tokenizer, start)
    expect(len(ids) > 0, "no token")
    if start and tokenizers._ByteLevelBPE in type(tokenizer).__mro__:
        expect(tokenizer.decode(tokenizer.encode(start)) == start, "decode(encode(text)) is not the text")
    row, shown = sample.StreamedSample(tokenizer, stop), ""
    for token in ids[:200].tolist():
        shown += row.feed(token)
    shown += row.flush()
    expect(not stop or stop not in shown, "went on after the stop")
    common.token_labels(tokenizer, ids[:50])


def corpus_text(data: bytes) -> None:
    """A text file; the first three bytes are block size, piece size and tokenizer."""
    if len(data) < 3:
        return
    block, piece, kind, data = 1 + data[0], 1 + data[1], data[2], data[3:]
    with folder() as work:
        path = work / "input.txt"
        path.write_bytes(data)
        with only_useful_errors():
            pieces = list(text.cut_pieces(text.read_file(path, block), piece, 4 * piece))
            whole = data.decode("utf-8").removeprefix(
                "\ufeff"
            )  # valid UTF-8, or reading it would have raised
            expect("".join(pieces) == whole, "pieces that are not the text")
            expect(all(0 < len(one) <= 4 * piece for one in pieces), "a piece too long, or empty")
        with only_useful_errors():
            files = text.find_files([path])
            name = ("char", "bpe:260", "gpt2")[kind % 3]
            made = build.prepare_text(text.files_text(files, "a text"), work / "made", name, 0.1)
            opened = dataset.open_corpus(work / "made", 1)
            ids = np.concatenate([*opened.train.token_files, *opened.val.token_files])
            expect(opened.tokenizer.decode(ids) == whole, "a corpus that is not the text")
            expect(sum(split["bytes"] for split in made["splits"].values()) == len(whole.encode()), "bytes")


def document_files(data: bytes) -> None:
    """First byte: JSON Lines, gzipped JSON Lines, raw gzip data, Parquet."""
    kind, data = (data[0] % 4, data[1:]) if data else (0, b"")
    name = ("d.jsonl", "d.jsonl.gz", "d.jsonl.gz", "d.parquet")[kind]
    with folder() as work, only_useful_errors():
        (work / name).write_bytes(gzip.compress(data, 1) if kind == 1 else data)
        for document in documents.local_documents([work / name]):
            "".join(document).encode("utf-8")


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    damage: Callable[..., bytes] = mutations.damaged_bytes


def _after_first_byte(damage: Callable[..., bytes]) -> Callable[..., bytes]:
    return lambda data, rng: data[:1] + damage(data[1:], rng)


def _archive_damage(data: bytes, rng: Any) -> bytes:
    return (data[:1] if rng.random() < 0.9 else b"\x02") + mutations.damaged_bytes(data[1:], rng)


json_damage = mutations.damaged_json
TARGETS = {
    "settings": Target(
        settings,
        seeds.settings,
        lambda d, r: (json_damage if d[:1] == b"{" else mutations.damaged_bytes)(d, r),
    ),
    "config_text": Target(config_text, seeds.config_text),
    "meta_json": Target(meta_json, seeds.meta_json, json_damage),
    "token_file": Target(token_file, seeds.token_file),
    "meta_pkl": Target(meta_pkl, seeds.meta_pkl),
    "tokenizer_json": Target(tokenizer_json, seeds.tokenizer_json, json_damage),
    "safetensors_file": Target(safetensors_file, seeds.safetensors_file, mutations.damaged_safetensors),
    "hf_json": Target(hf_json, seeds.hf_json, json_damage),
    "ckpt_pt": Target(ckpt_pt, seeds.ckpt_pt, _archive_damage),
    "checkpoint_json": Target(checkpoint_json, seeds.checkpoint_json, json_damage),
    "checkpoint_tensors": Target(
        checkpoint_tensors, seeds.checkpoint_tensors, _after_first_byte(mutations.damaged_safetensors)
    ),
    "run_json": Target(run_json, seeds.run_json, json_damage),
    "prompt": Target(prompt, seeds.prompt),
    "corpus_text": Target(corpus_text, seeds.corpus_text),
    "document_files": Target(document_files, seeds.document_files),
}
