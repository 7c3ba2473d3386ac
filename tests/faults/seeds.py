"""Valid files, which the fuzzers and tests/hostile damage."""

import gzip
import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHARS = "\n abcdefghé"
SIZES = {"block_size": 8, "vocab_size": len(CHARS), "n_layer": 1, "n_head": 2, "n_embd": 8}
HF_CONFIG = {"model_type": "gpt2", "n_positions": 8, "vocab_size": len(CHARS)}
HF_CONFIG |= {"n_layer": 1, "n_head": 2, "n_embd": 8}
HF_CONFIG |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
SHARD = "model-00001-of-00001.safetensors"


def as_bytes(*values: Any) -> list[bytes]:
    return [json.dumps(value, ensure_ascii=False).encode() for value in values]


def floats(*shape: int) -> np.ndarray:
    return (np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape) % 7 - 3) / 10


def to_safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file: header length, header (name, dtype, shape, offsets), data."""
    header, body = {}, b""
    for name, array in tensors.items():
        kind = {"float32": "F32", "float16": "F16"}[str(array.dtype)]
        offsets = [len(body), len(body) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        body += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def gpt_weights(vocab: int, conv1d: bool) -> dict[str, np.ndarray]:
    """GPT-2 with one layer of width 8, under Hugging Face's names.

    `conv1d`: linear weights have shape (in, out), as in Hugging Face's Conv1D; otherwise (out, in).
    """
    C = SIZES["n_embd"]
    layer = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (C, 3 * C),
        "attn.c_attn.bias": (3 * C,),
    }
    layer |= {"attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,)}
    layer |= {"mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,)}
    layer |= {"mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,)}
    shapes = {"wte.weight": (vocab, C), "wpe.weight": (8, C)}
    shapes |= {f"h.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    transposed = () if conv1d else ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: floats(*(s[::-1] if name.endswith(transposed) else s)) for name, s in shapes.items()}


HF_WEIGHTS = to_safetensors(gpt_weights(len(CHARS), conv1d=True))
FRADIQUE_WEIGHTS = {
    f"transformer.{name}": array for name, array in gpt_weights(len(CHARS), conv1d=False).items()
}


# Settings


def settings() -> list[bytes]:
    lines = [
        b"--n_layer=4\n--learning_rate=1e-3\n--compile=auto\n--dataset=eca\n--time_budget=1h30m",
        b"--max_iters=1e5\n--bias=True\n--dtype=float32\n--top_p=0.9\n--start=Era uma vez",
        b"--n_layr=4\n--n_head=x\n--out_dir=\xff\xfe\n--seed=99999999999999999999\n--dropout=nan",
    ]
    saved = {"n_layer": 2, "learning_rate": 0.1, "dataset": "x", "compile": "auto", "gone": 1}
    return lines + as_bytes(saved)


def config_text() -> list[bytes]:
    return [
        b"# a comment\nout_dir = 'out/x'\nn_layer = 4\nlearning_rate = 1e-3\ncompile = False\n",
        "\ufeffdataset = 'eça'\r\neval_iters = 20\r\n_mine = [1, 2]\r\n".encode(),
        b"n_layer = \nx = 'unclosed\n",
        b"# -*- coding: latin-1 -*-\nwandb_project = '\xe7'\n",
    ]


# A corpus


def write_corpus(folder: Path) -> None:
    ids = (np.arange(400) * 7 % len(CHARS)).astype("<u2")
    (folder / "train.bin").write_bytes(ids[:300].tobytes())
    (folder / "val.bin").write_bytes(ids[300:].tobytes())
    (folder / "meta.json").write_bytes(meta_json()[0])
    (folder / "tokenizer.json").write_bytes(tokenizer_json()[0])


def meta_json() -> list[bytes]:
    def split(name: str, tokens: int) -> dict[str, Any]:
        shard = {"file": f"{name}.bin", "tokens": tokens, "bytes": tokens, "sha256": "0" * 64}
        return {"tokens": tokens, "bytes": tokens, "shards": [shard]}

    meta = {"format": 1, "dtype": "uint16", "vocab_size": len(CHARS), "tokenizer": "char", "source": "x"}
    return as_bytes(meta | {"splits": {"train": split("train", 300), "val": split("val", 100)}})


def token_file() -> list[bytes]:
    ids = np.arange(100).astype("<u2") % len(CHARS)
    return [b"\x08" + ids.tobytes(), b"\x01" + ids[:2].tobytes(), b"\x08\xff\xff" + ids.tobytes(), b"\x08\0"]


def meta_pkl() -> list[bytes]:
    """The meta.pkl of nanoGPT's prepare.py, in each pickle protocol."""
    stoi = {char: i for i, char in enumerate(CHARS)}
    meta = {"vocab_size": len(CHARS), "itos": {i: char for char, i in stoi.items()}, "stoi": stoi}
    return [pickle.dumps(meta, protocol=n) for n in range(6)]


def tokenizer_json() -> list[bytes]:
    from fradique.tokenizer import tokenizer

    bpe = tokenizer.train_bpe(["aa ab aab aabb"], 261).to_json()
    return as_bytes({"format": 1, "kind": "char", "chars": CHARS}, {"format": 1, "kind": "gpt2"}, bpe)


# Weights


def safetensors_file() -> list[bytes]:
    tables = {"tokens": floats(4, 8).astype(np.float16), "positions": floats(3, 8).astype(np.float16)}
    without_config = {
        "wte.weight": floats(11, 64),
        "wpe.weight": floats(2, 64),
        "h.0.ln_1.weight": floats(64),
    }
    return [HF_WEIGHTS, to_safetensors(tables), to_safetensors(without_config)]


def hf_json() -> list[bytes]:
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(gpt_weights(1, True), SHARD)}
    llama = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    llama |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 12, "rms_norm_eps": 1e-5}
    llama |= {"max_position_embeddings": 8, "rope_theta": 10000.0}
    llama |= {"hidden_act": "silu", "attention_bias": False}
    vocab = {"model": {"vocab": {"a": 0, "b": 1}}}
    return as_bytes(
        {"config.json": HF_CONFIG, "model.safetensors.index.json": index},
        {"config.json": HF_CONFIG, "tokenizer.json": vocab},
        {"config.json": llama},
        {"model.safetensors.index.json": index},
    )


def _pickled(content: Any) -> tuple[bytes, dict[str, bytes]]:
    """data.pkl of a torch archive, and {name: bytes} of its other files."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        names = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return names.pop("data.pkl"), names


@cache
def _nanogpt() -> tuple[bytes, dict[str, bytes]]:
    weights = gpt_weights(len(CHARS), conv1d=False)
    model = OrderedDict((f"_orig_mod.transformer.{name}", torch.from_numpy(x)) for name, x in weights.items())
    args = SIZES | {"dropout": 0.0, "bias": True}
    config = {"dataset": "shakespeare_char", "betas": (0.9, 0.95)}
    return _pickled({"model": model, "model_args": args, "iter_num": 1, "config": config})


def ckpt_pt() -> list[bytes]:
    legacy = io.BytesIO()
    tensor = {"wte.weight": torch.zeros(2, 3)}
    torch.save(tensor, legacy, _use_new_zipfile_serialization=False)
    zipped = io.BytesIO()
    torch.save(tensor, zipped)
    pickled = _nanogpt()[0]
    return [b"\0" + pickled, b"\x01" + pickled, b"\x02" + legacy.getvalue(), b"\x02" + zipped.getvalue()]


def write_archive(path: Path, pickled: bytes, deflated: bool) -> None:
    """Write a torch archive with the given pickle and the storages of a valid archive."""
    kind = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in _nanogpt()[1].items():
            archive.writestr(f"archive/{name}", content)


# A run folder

STATE = {"step": 5, "best_val_loss": 2.5, "best_step": 5, "evals_since_best": 0, "last_eval_step": 5}
STATE |= {"seconds": 1.5, "closing_seconds": 0.1, "writing_seconds": 0.1, "scaler": {}}
MODEL = SIZES | {
    "n_kv_head": 0,
    "n_inner": 0,
    "dropout": 0.0,
    "bias": True,
    "norm": "layernorm",
    "flash": True,
}
SETTINGS = {"settings": SIZES | {"bias": True, "dataset": "x", "optimizer": "adamw", "init_from": "scratch"}}
SETTINGS |= {
    "decided": {"device": "cpu", "notes": ["a note"]},
    "versions": {"torch": "2"},
    "git_commit": None,
}
del SETTINGS["settings"]["vocab_size"]


def write_run(folder: Path) -> Path:
    """Write a run with one checkpoint, step-00000005. Returns the checkpoint folder."""
    step = folder / "step-00000005"
    step.mkdir()
    (folder / "settings.json").write_bytes(json.dumps(SETTINGS).encode())
    (folder / "tokenizer.json").write_bytes(tokenizer_json()[0])
    (step / "state.json").write_bytes(json.dumps(STATE).encode())
    (step / "model.json").write_bytes(json.dumps(MODEL).encode())
    (step / "model.safetensors").write_bytes(_model_tensors())
    (step / "optimizer.safetensors").write_bytes(_optimizer_tensors())
    write_manifest(step)
    return step


@cache
def _model_tensors() -> bytes:
    return to_safetensors(FRADIQUE_WEIGHTS)


@cache
def _optimizer_tensors() -> bytes:
    fields = {
        f"{field}/{name}": array
        for field in ("exp_avg", "exp_avg_sq")
        for name, array in FRADIQUE_WEIGHTS.items()
    }
    return to_safetensors(fields | {f"step/{name}": floats(1)[0:1].reshape(()) for name in FRADIQUE_WEIGHTS})


def write_manifest(step: Path, replacement: Any = None) -> None:
    """Write manifest.json with the checksums of the files; or `replacement`."""
    sums = {path.name: sha256(path.read_bytes()).hexdigest() for path in step.iterdir()}
    sums.pop("manifest.json", None)
    manifest = {"format": 1, "sha256": sums} if replacement is None else replacement
    (step / "manifest.json").write_bytes(json.dumps(manifest).encode())


def checkpoint_json() -> list[bytes]:
    return as_bytes(
        {"state.json": STATE, "model.json": MODEL},
        {"state.json": {"step": 5}},
        {"model.json": MODEL | {"lora_alpha": 16.0, "position": "rope"}},
        {"manifest.json": {"format": 1, "sha256": {"model.json": "0" * 64}}},
    )


def checkpoint_tensors() -> list[bytes]:
    return [b"\0" + _model_tensors(), b"\1" + _optimizer_tensors()]


def run_json() -> list[bytes]:
    step = {"step": 1, "loss": 2.0, "tokens": 10, "seconds": 1.0, "lr": 0.1, "step_seconds": 0.1, "mfu": None}
    second_step = step | {"step": 2, "tokens": 20, "seconds": 2.0}
    evaluated = {"step": 2, "eval_train_loss": 2.0, "eval_val_loss": 2.5, "tokens": 20, "seconds": 2.0}
    final = {"step": 4, "best_step": 2, "seconds": 3.0, "final_loss": 2.0, "final_bits_per_byte": 1.0}
    samples = "=== step 2 ===\nera uma vez\n\n=== step 4 ===\n\nfim\n\n"
    return as_bytes(
        {
            "settings.json": SETTINGS,
            "metrics.jsonl": [step, second_step, evaluated, final],
            "samples.txt": samples,
        },
        {"settings.json": SETTINGS, "metrics.jsonl": [evaluated], "samples.txt": ""},
    )


# Text


def prompt() -> list[bytes]:
    text_bytes = "Era uma vez <|endoftext|> l'été \U0001f984\n\nfim".encode()
    invalid = [b"\0\n\n\xed\xa0\x80", b"\x02\n\n\xff", b"\x011h30m"]
    return [bytes([kind]) + text_bytes for kind in range(3)] + invalid


def corpus_text() -> list[bytes]:
    text_bytes = "\ufeffEra uma vez\r\n\r\num gato;\tdormia \U0001f984 日本語 \0 fim.\n".encode() * 3
    return [bytes([3, 9, kind]) + text_bytes for kind in range(3)] + [b"\0\0\0abc\xff", b"\1\1\1   \n\n \n"]


def document_files() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = b'{"text": "um"}\n\n{"text": "dois \\ud83e\\udd84", "x": [1]}\n'
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["um", "dois"], "n": [1, 2]}), table, compression="none")
    return [b"\0" + lines, b"\x01" + lines, b"\x02" + gzip.compress(lines), b"\x03" + table.getvalue()]
