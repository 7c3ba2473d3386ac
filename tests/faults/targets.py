"""Fuzz targets: functions of bytes that pass them to a real entry point, as a file or a flag.

A target passes if the entry point works, or raises an OSError or a ValueError with a message of limited
length, but not a subclass of ValueError such as UnicodeDecodeError, whose messages do not help a user.
Anything else is a finding. `fuzz.py` runs the targets with atheris, and tests/hostile/test_targets.py with
hypothesis.
"""

import ast
import contextlib
import gzip
import io
import json
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
from fradique.data import build, dataset, documents, input_files, text  # noqa: E402
from fradique.data import sampler as samplers  # noqa: E402
from fradique.optim import optimizer  # noqa: E402
from fradique.pretrained import weight_files  # noqa: E402
from fradique.runtime.memory_limits import OomReport  # noqa: E402
from fradique.tokenizer import meta_pkl as meta_pkls  # noqa: E402
from fradique.tokenizer import tokenizer as tokenizers  # noqa: E402
from fradique.training import loss_plot, model_setup, setup, time_budget  # noqa: E402
from fradique.training.trainer import TrainState  # noqa: E402
from lab import common, report  # noqa: E402
from model import GPTConfig  # noqa: E402
from train import TrainSettings  # noqa: E402

MAX_MESSAGE = 20_000  # characters of an error message
PROSE = "Era uma vez, n'uma ilha,\r\n um gato:\t42 luas \U0001f984 日本 \0 é."
GPT2, TRAINED_BPE = tokenizers.GPT2Tokenizer(), tokenizers.train_bpe(["aa ab aab"], 259)


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
            raise Finding(f"a {type(error).__name__}: {error}"[:500]) from error
        if not str(error) or len(str(error)) > MAX_MESSAGE:
            raise Finding(f"a message of {len(str(error))} characters") from error


@contextlib.contextmanager
def temporary_folder():
    """A temporary folder for one input, in memory if the system has /dev/shm."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def expect(condition: bool, message: str) -> None:
    """Raise a Finding if a condition does not hold."""
    if not condition:
        raise Finding(message)


def write_json(path: Path, value: Any) -> None:
    path.write_bytes(json.dumps(value).encode())


def json_object(data: bytes) -> dict[str, Any] | None:
    """An input that is a JSON object, such as {file name: content} of several files; None if it is not."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def first_byte(data: bytes, default: int) -> tuple[int, bytes]:
    """The first byte of an input, which selects a case, and the other bytes."""
    return (data[0], data[1:]) if data else (default, b"")


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer file of a folder with Hugging Face weights."""
    (folder / weight_files.FRADIQUE_TOKENIZER_FILE).write_bytes(seeds.tokenizer_json()[0])


# Settings and configs


def settings(data: bytes) -> None:
    """A command line, one argument per line; or the settings of an earlier run as JSON."""
    lines = data.decode("utf-8", "surrogateescape").split("\n")[:40]
    flags = [line for line in lines if line.startswith("--")]  # no config files: they are code
    for cls in (TrainSettings, sample.SampleSettings):
        with only_useful_errors():
            resolved = configurator.resolve(cls, [flag if "=" in flag else f"{flag}=1" for flag in flags])
            json.dumps(asdict(resolved.settings), allow_nan=False).encode()
            time_budget.parse_duration(getattr(resolved.settings, "time_budget", ""))
    saved = json_object(data)
    if saved is not None:
        with only_useful_errors():
            configurator.resolve(TrainSettings, [], saved, "settings.json")


def config_text(data: bytes) -> None:
    """A config file, which is code: it is only run if it assigns literals, or has no import and no call."""
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
        if b"import" in data or b"(" in data:
            return
    with temporary_folder() as folder, only_useful_errors():
        (folder / "config.py").write_bytes(data)
        configurator.resolve(TrainSettings, [str(folder / "config.py")])


# A corpus


def meta_json(data: bytes) -> None:
    with temporary_folder() as folder:
        seeds.write_corpus(folder)
        (folder / "meta.json").write_bytes(data)
        open_and_read(folder)


def token_file(data: bytes) -> None:
    """train.bin of a corpus without meta.json, like nanoGPT's; the first byte is the block size."""
    with temporary_folder() as folder:
        seeds.write_corpus(folder)
        (folder / "meta.json").unlink()
        (folder / "train.bin").write_bytes(data[1:])
        open_and_read(folder, data[0] if data else 1)


def open_and_read(folder: Path, block_size: int = 8) -> None:
    with only_useful_errors():
        opened = dataset.open_corpus(folder, max(1, block_size))
        sampler = samplers.Sampler(opened.train, max(1, block_size), 2, 1, seed=1)
        x, _ = next(sampler.micro_batches(3))
        expect(int(x.max()) < opened.tokenizer.vocab_size, "a token beyond the vocabulary")
        parents = {path.resolve().parent for path in opened.train.paths + opened.val.paths}
        expect(parents <= {folder.resolve()}, "a token file outside the folder")
        opened.val.count_text_bytes(opened.tokenizer)


def meta_pkl(data: bytes) -> None:
    with temporary_folder() as folder, only_useful_errors():
        (folder / "meta.pkl").write_bytes(data)
        check_tokenizer(meta_pkls.read_meta_pkl(folder / "meta.pkl"))


def tokenizer_json(data: bytes) -> None:
    with temporary_folder() as folder, only_useful_errors():
        (folder / "tokenizer.json").write_bytes(data)
        check_tokenizer(tokenizers.load_tokenizer(folder / "tokenizer.json"))


def check_tokenizer(tokenizer: tokenizers.Tokenizer) -> None:
    expect(len(tokenizer.byte_lengths()) == tokenizer.vocab_size, "byte_lengths")
    tokenizer.decode(np.arange(min(tokenizer.vocab_size, 1000)))
    tokenizers.encode_prompt(tokenizer, "")
    with contextlib.suppress(ValueError):
        expect(tokenizer.decode(tokenizer.encode(PROSE)) == PROSE, "decode(encode(text)) is not the text")


# Weights


def safetensors_file(data: bytes) -> None:
    """Hugging Face weights with and without config.json, and embedding snapshots of a run."""
    with temporary_folder() as folder:
        (folder / "model.safetensors").write_bytes(data)
        write_tokenizer(folder)
        load_weights(folder)
        write_json(folder / "config.json", seeds.HF_CONFIG)
        load_weights(folder)
        snapshots = folder / embedding_snapshots.SNAPSHOT_FOLDER
        snapshots.mkdir()
        (snapshots / "step-1.safetensors").write_bytes(data)
        with only_useful_errors():
            for snapshot in embedding_snapshots.read_snapshots(folder):
                table = snapshot.tokens
                expect(table.ndim == 2 and bool(np.isfinite(table).all()), "no table of embeddings")


def hf_json(data: bytes) -> None:
    """JSON files of a Hugging Face folder: {"config.json": …, "model.safetensors.index.json": …, …}."""
    with temporary_folder() as folder:
        contents = json_object(data)
        if contents is None:
            (folder / "config.json").write_bytes(data)
            contents = {}
        (folder / seeds.SHARD).write_bytes(seeds.HF_WEIGHTS)
        write_tokenizer(folder)
        for name in {"config.json", "model.safetensors.index.json", "tokenizer.json"} & contents.keys():
            write_json(folder / name, contents[name])
        if not (folder / "model.safetensors.index.json").exists():
            shutil.move(folder / seeds.SHARD, folder / "model.safetensors")
        load_weights(folder)


def ckpt_pt(data: bytes) -> None:
    """The first byte: 0: a pickle in a torch archive; 1: the same, compressed; otherwise the file itself."""
    kind, data = first_byte(data, default=9)
    with temporary_folder() as folder:
        (folder / "tokenizer.json").write_bytes(seeds.tokenizer_json()[0])
        for name in ("ckpt.pt", "pytorch_model.bin"):
            if kind > 1:
                (folder / name).write_bytes(data)
            else:
                seeds.write_archive(folder / name, data, deflated=bool(kind))
        load_weights(folder / "ckpt.pt")
        (folder / "ckpt.pt").unlink()
        write_json(folder / "config.json", seeds.HF_CONFIG)
        write_tokenizer(folder)
        load_weights(folder)


def load_weights(source: Path) -> None:
    with only_useful_errors():
        loaded = sample.load_model(str(source), device="cpu", dtype="float32")
        finite = all(bool(p.isfinite().all()) for p in loaded.model.parameters())
        expect(finite, "weights that are not finite")
        loaded.model(torch.zeros(1, 1, dtype=torch.int64))


# A run folder


def checkpoint_json(data: bytes) -> None:
    """JSON files of a checkpoint: {"state.json": …, "model.json": …, "manifest.json": …}; with checksums."""
    contents = json_object(data)
    with temporary_folder() as folder:
        step = seeds.write_run(folder)
        if contents is None:
            (step / "state.json").write_bytes(data)
        for name in {"state.json", "model.json"} & (contents or {}).keys():
            write_json(step / name, contents[name])
        seeds.write_manifest(step, (contents or {}).get("manifest.json"))
        with only_useful_errors():
            saved = checkpoint.read_checkpoint(checkpoint.newest_checkpoint(folder, warn=lambda _: None))
            state = TrainState.read(saved.state)
            json.dumps(asdict(state), allow_nan=False)
            expect(type(state.step) is int and 0 <= state.step < 2**63, "an invalid step")
        load_weights(folder)
        with only_useful_errors():
            continue_run(folder)


def continue_run(folder: Path) -> None:
    """Resume up to the first step: settings, model, weights and optimizer state."""
    saved = run_folder.saved_settings(folder)
    resolved = configurator.resolve(TrainSettings, ["--device=cpu"], saved, "settings.json")
    opened = dataset.Corpus(folder, None, None, tokenizers.CharTokenizer(seeds.CHARS))
    settings = replace(resolved.settings, out_dir=str(folder), init_from="resume")
    source = model_setup.find_model(settings, opened)
    runtime = setup.choose_runtime(settings, source, (), average_gradients=True, device=None)
    model = model_setup.build_model(settings, source, runtime, OomReport())
    adamw = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    muon = {"muon_learning_rate": 0.02, "muon_momentum": 0.95}
    optimizers = optimizer.build_optimizers(model, name=settings.optimizer, **adamw, **muon)
    optimizer.load_state_by_name(optimizers, source.checkpoint.optimizer)


def checkpoint_tensors(data: bytes) -> None:
    """A safetensors file of a checkpoint. The first byte: 0: the model's, otherwise the optimizer's."""
    with temporary_folder() as folder:
        step = seeds.write_run(folder)
        name = "model.safetensors" if not data or data[0] == 0 else "optimizer.safetensors"
        (step / name).write_bytes(data[1:])
        seeds.write_manifest(step)
        load_weights(folder)
        with only_useful_errors():
            continue_run(folder)


def run_json(data: bytes) -> None:
    """Other files of a run folder: {"settings.json": …, "metrics.jsonl": […], "samples.txt": text}."""
    contents = json_object(data)
    with temporary_folder() as folder:
        if contents is None:
            for name in (run_folder.SETTINGS_FILE, metrics_file.METRICS_FILE, metrics_file.SAMPLES_FILE):
                (folder / name).write_bytes(data)
            contents = {}
        if run_folder.SETTINGS_FILE in contents:
            write_json(folder / run_folder.SETTINGS_FILE, contents[run_folder.SETTINGS_FILE])
        records = contents.get(metrics_file.METRICS_FILE)
        if isinstance(records, list):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / metrics_file.METRICS_FILE).write_text(lines)
        samples = contents.get(metrics_file.SAMPLES_FILE)
        if isinstance(samples, str):
            (folder / metrics_file.SAMPLES_FILE).write_bytes(samples.encode("utf-8", "surrogatepass"))
        with only_useful_errors():
            configurator.resolve(TrainSettings, [], run_folder.saved_settings(folder), "settings.json")
        with only_useful_errors():
            loss_plot.plot_losses([loss_plot.read_curves(folder)])
        with only_useful_errors():
            report.settings_section(run_folder.saved_settings(folder))
            metrics = metrics_file.read_metrics(folder)
            report.speed_section(metrics, run_folder.run_metadata(folder))
            report.summary(metrics, GPTConfig(n_layer=1, n_head=1, n_embd=8), 1)
            report.samples_section(metrics_file.read_samples(folder))
        with only_useful_errors():
            metrics_file.rewind_metrics(folder, 3)
            steps = [record["step"] for record in metrics_file.read_metrics(folder)]
            expect(all(step <= 3 for step in steps), "records after the step")


# Text


def prompt(data: bytes) -> None:
    """A prompt as a flag and as a file; the first byte selects the tokenizer."""
    kind, data = first_byte(data, default=0)
    tokenizer = (GPT2, TRAINED_BPE, tokenizers.CharTokenizer("\nabc é"))[kind % 3]
    argument = data.decode("utf-8", "surrogateescape")
    stop, _, start = argument.partition("\n\n")
    with only_useful_errors():
        check_prompt(tokenizer, start, stop)
    with temporary_folder() as folder, only_useful_errors():
        (folder / "prompt").write_bytes(data)
        check_prompt(tokenizer, sample.read_prompt(f"FILE:{folder / 'prompt'}"), stop)
    with only_useful_errors():
        sample.read_prompt(f"FILE:{stop}") if not stop.startswith("/") else None
        time_budget.parse_duration(argument)
        tokenizers.parse_spec(argument)
        expect(len(str(common.number_problems("sizes", argument, 0.0))) < 500, "a long message")


def check_prompt(tokenizer: tokenizers.Tokenizer, start: str, stop: str) -> None:
    ids = tokenizers.encode_prompt(tokenizer, start)
    expect(len(ids) > 0, "no token")
    if start and tokenizers._ByteLevelBPE in type(tokenizer).__mro__:
        expect(tokenizer.decode(tokenizer.encode(start)) == start, "decode(encode(text)) is not the text")
    stream = sample.StreamedSample(tokenizer, stop)
    output = "".join([stream.feed(token) for token in ids[:200].tolist()]) + stream.flush()
    expect(not stop or stop not in output, "output after the stop text")
    common.token_labels(tokenizer, ids[:50])


def corpus_text(data: bytes) -> None:
    """A text file; the first three bytes are block size, piece size and tokenizer."""
    if len(data) < 3:
        return
    block_size, piece_size, kind, data = 1 + data[0], 1 + data[1], data[2], data[3:]
    with temporary_folder() as folder:
        path = folder / "input.txt"
        path.write_bytes(data)
        with only_useful_errors():
            pieces = list(text.cut_pieces(text.read_file(path, block_size), piece_size, 4 * piece_size))
            expected = data.decode("utf-8").removeprefix("\ufeff")  # valid UTF-8: read_file has decoded it
            expect("".join(pieces) == expected, "pieces that are not the text")
            lengths = [len(piece) for piece in pieces]
            expect(all(0 < length <= 4 * piece_size for length in lengths), "a piece too long, or empty")
        with only_useful_errors():
            files = input_files.find_files([path])
            name = ("char", "bpe:260", "gpt2")[kind % 3]
            meta = build.prepare_text(text.files_text(files, "a text"), folder / "made", name, 0.1)
            opened = dataset.open_corpus(folder / "made", 1)
            ids = np.concatenate([*opened.train.token_files, *opened.val.token_files])
            expect(opened.tokenizer.decode(ids) == expected, "a corpus that is not the text")
            n_bytes = sum(split["bytes"] for split in meta["splits"].values())
            expect(n_bytes == len(expected.encode()), "a wrong number of bytes")


def document_files(data: bytes) -> None:
    """Documents. The first byte selects JSON Lines, gzipped JSON Lines, raw gzip data or Parquet."""
    kind, data = first_byte(data, default=0)
    name = ("d.jsonl", "d.jsonl.gz", "d.jsonl.gz", "d.parquet")[kind % 4]
    with temporary_folder() as folder, only_useful_errors():
        (folder / name).write_bytes(gzip.compress(data, 1) if kind % 4 == 1 else data)
        for document in documents.local_documents([folder / name]):
            "".join(document).encode("utf-8")


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    damage: Callable[..., bytes] = mutations.damaged_bytes


TARGETS = {
    "settings": Target(settings, seeds.settings, mutations.damaged_settings),
    "config_text": Target(config_text, seeds.config_text),
    "meta_json": Target(meta_json, seeds.meta_json, mutations.damaged_json),
    "token_file": Target(token_file, seeds.token_file),
    "meta_pkl": Target(meta_pkl, seeds.meta_pkl),
    "tokenizer_json": Target(tokenizer_json, seeds.tokenizer_json, mutations.damaged_json),
    "safetensors_file": Target(safetensors_file, seeds.safetensors_file, mutations.damaged_safetensors),
    "hf_json": Target(hf_json, seeds.hf_json, mutations.damaged_json),
    "ckpt_pt": Target(ckpt_pt, seeds.ckpt_pt, mutations.damaged_archive),
    "checkpoint_json": Target(checkpoint_json, seeds.checkpoint_json, mutations.damaged_json),
    "checkpoint_tensors": Target(
        checkpoint_tensors, seeds.checkpoint_tensors, mutations.damaged_checkpoint_tensors
    ),
    "run_json": Target(run_json, seeds.run_json, mutations.damaged_json),
    "prompt": Target(prompt, seeds.prompt),
    "corpus_text": Target(corpus_text, seeds.corpus_text),
    "document_files": Target(document_files, seeds.document_files),
}
