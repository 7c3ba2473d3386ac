"""Files that lie, one by one: corpora, tokenizers, weights and run folders made to mislead or to exhaust."""

import json
import math
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from faults import targets
from safetensors.numpy import load as load_safetensors

from fradique.checkpointing import checkpoint, embedding_snapshots, metrics_file, run_folder
from fradique.data import dataset, documents
from fradique.pretrained import loader
from fradique.tokenizer import tokenizer as tokenizers
from fradique.training import loss_plot
from fradique.training.trainer import TrainState
from lab import report
from model import GPTConfig
from sample import load_model, read_prompt

seeds = targets.seeds
DEEP = b"[" * 100_000
MANY_DIGITS = b"9" * 100_000


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    seeds.write_corpus(folder)
    return folder


@pytest.fixture
def a_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    seeds.write_run(folder)
    return folder


@pytest.fixture
def gpt2(tmp_path):
    """Weights in Hugging Face's layout, tiny, with a tokenizer of ours."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(seeds.HF_WEIGHTS)
    (folder / "config.json").write_text(json.dumps(seeds.HF_CONFIG))
    (folder / "fradique_tokenizer.json").write_bytes(seeds.tokenizer_json()[0])
    return folder


def changed(path: Path, *keys, to) -> None:
    """Set one value within a JSON file."""
    value = json.loads(path.read_bytes())
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(value))


def refused(call, *arguments, where) -> str:
    """The message, one that names `where`, with which a call is refused."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert type(caught.value) is ValueError and str(where) in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


# A corpus


@pytest.mark.parametrize(
    "name", ["../val.bin", "..", ".", "", "a/../val.bin", "a\0b", "..\\val.bin", "C:x", 7, None]
)
def test_a_corpus_names_no_file_outside_its_folder(corpus, name):
    (corpus.parent / "val.bin").write_bytes((corpus / "val.bin").read_bytes())
    changed(corpus / "meta.json", "splits", "val", "shards", 0, "file", to=name)
    assert "damaged" in refused(dataset.open_corpus, corpus, 8, where=corpus / "meta.json")


def test_a_corpus_names_no_file_by_an_absolute_path(corpus):
    changed(corpus / "meta.json", "splits", "val", "shards", 0, "file", to=str(corpus / "val.bin"))
    refused(dataset.open_corpus, corpus, 8, where="meta.json is damaged")


def test_a_link_in_a_corpus_is_followed_as_whoever_made_the_folder_meant_it(corpus):
    (corpus / "train.bin").rename(corpus.parent / "elsewhere.bin")
    (corpus / "train.bin").symlink_to(corpus.parent / "elsewhere.bin")
    assert dataset.open_corpus(corpus, 8).train.tokens == 300


@pytest.mark.parametrize("tokens", [-1, True, 10**30, 1.5, "300", None, [], math.nan])
def test_a_number_of_tokens_that_is_none_is_refused(corpus, tokens):
    changed(corpus / "meta.json", "splits", "train", "shards", 0, "tokens", to=tokens)
    refused(dataset.open_corpus, corpus, 8, where="meta.json")


@pytest.mark.parametrize(
    "keys", [("format",), ("dtype",), ("splits",), ("splits", "val"), ("splits", "val", "shards")]
)
@pytest.mark.parametrize("value", [[], {}, None, "x", 3, -1, math.inf])
def test_a_part_of_meta_json_of_another_type_is_refused(corpus, keys, value):
    changed(corpus / "meta.json", *keys, to=value)
    refused(dataset.open_corpus, corpus, 8, where=corpus / "meta.json")


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xef\xbb\xbf{}", b"[]", b"NaN", b"1e999999999", DEEP, MANY_DIGITS]
)
@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json"])
def test_a_file_of_a_corpus_that_is_no_json_object_is_refused(corpus, name, data):
    (corpus / name).write_bytes(data)
    refused(dataset.open_corpus, corpus, 8, where=corpus / name)


def test_of_a_key_that_stands_twice_the_last_counts(corpus):
    text = (corpus / "meta.json").read_text()
    (corpus / "meta.json").write_text(text.replace('"format"', '"format": 7, "format"'))
    assert dataset.open_corpus(corpus, 8).train.tokens == 300


@pytest.mark.parametrize(
    ("data", "says"), [(b"abc", "no whole number"), (b"", "too few"), (b"\xff\xff" * 99, "beyond")]
)
def test_a_token_file_that_cannot_be_is_refused(corpus, data, says):
    (corpus / "meta.json").unlink()
    (corpus / "train.bin").write_bytes(data)
    assert says in refused(dataset.open_corpus, corpus, 8, where=corpus)


# Tokenizers


@pytest.mark.parametrize(
    "merges",
    [
        [["a", "b"], ["a", "b"]],
        [["ab", "c"]],
        [["a", "ab"], ["a", "b"]],
        [["", ""]],
        [["a", ""]],
        [["a"]],
        ["ab", "abc"],
        [["a", 1]],
        {"a": "b"},
        None,
        7,
    ],
)
def test_merges_that_loop_repeat_or_join_nothing_are_refused(tmp_path, merges):
    value = tokenizers.train_bpe(["aa ab aab aabb"], 259).to_json()
    value["model"]["model"]["merges"] = merges
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    refused(tokenizers.load_tokenizer, tmp_path / "tokenizer.json", where=tmp_path / "tokenizer.json")


@pytest.mark.parametrize("token_id", [-1, 3, 10**9, 1.5, None, "0", 10**30])
def test_ids_of_a_vocabulary_with_holes_doubles_or_no_numbers_are_refused(tmp_path, token_id):
    value = tokenizers.train_bpe(["aa ab aab aabb"], 259).to_json()
    value["model"]["model"]["vocab"]["a"] = token_id
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    refused(tokenizers.load_tokenizer, tmp_path / "tokenizer.json", where="contradict")


def test_merges_by_the_million_are_refused_before_they_are_joined():
    refused(tokenizers.bpe.tokens_of, [("a", "b")] * 10_000_000, where="out of range")


@pytest.mark.parametrize("kind", ["x" * 10_000, [["x"] * 99] * 99, None, 7, {"char": 1}])
def test_a_kind_of_tokenizer_that_there_is_not_is_not_told_at_length(tmp_path, kind):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"format": 1, "kind": kind}))
    refused(tokenizers.load_tokenizer, tmp_path / "tokenizer.json", where="its kind is")


# Weights of others


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "..", "", "a\0", 7, [], {}, None]
)
def test_an_index_names_no_file_outside_its_folder(gpt2, name):
    (gpt2 / "model.safetensors").rename(gpt2.parent / "model.safetensors")
    index = {"weight_map": {"wte.weight": name, "wpe.weight": "x.safetensors"}}
    (gpt2 / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(loader.load_weights, str(gpt2), where="model.safetensors.index.json is damaged")


HUGE = 2**63


def part(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"wte.weight": part([HUGE, HUGE], 0, 8)},
        {"wte.weight": part([2], 0, HUGE)},
        {"wte.weight": part([2], 8, 0)},
        {"wte.weight": part([-2], 0, 8)},
        {"wte.weight": part([1.5], 0, 8)},
        {"wte.weight": part([2], 0, 8, "X99")},
        {"wte.weight": part([2], 0, 8), "overlapping": part([2], 4, 12)},
        {"wte.weight": part([2], 0, 8), "outside": part([2], 8, 16)},
        {"wte.weight": part([1], 0, 8, "I64")},
        {"wte.weight": part([8], 0, 8, "F8_E4M3")},
        {"wte.weight": part([16], 0, 8, "F4")},
        {"wte.weight": part([0, 64], 0, 0), "wpe.weight": part([8, 0], 0, 0), "h.0.x": part([2], 0, 8)},
        {},
        [],
    ],
)
@pytest.mark.parametrize("described", [True, False])
def test_a_safetensors_header_that_lies_is_refused(gpt2, header, described):
    text = json.dumps(header).encode()
    (gpt2 / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    if not described:
        (gpt2 / "config.json").unlink()
    refused(loader.load_weights, str(gpt2), where=gpt2)


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_a_safetensors_header_of_a_length_that_cannot_be_is_refused(gpt2, length):
    (gpt2 / "model.safetensors").write_bytes(struct.pack("<Q", length) + seeds.HF_WEIGHTS[8:])
    refused(loader.load_weights, str(gpt2), where="model.safetensors is truncated")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layer", 10**9),
        ("n_layer", 10**30),
        ("n_embd", 10**12),
        ("vocab_size", 10**12),
        ("n_head", 0),
        ("n_head", 2.0),
        ("n_positions", "8"),
        ("model_type", []),
        ("model_type", {}),
        ("activation_function", []),
        ("n_inner", 10**15),
    ],
)
def test_a_config_json_of_no_gpt2_is_refused_before_there_is_one(gpt2, key, value):
    changed(gpt2 / "config.json", key, to=value)
    refused(load_model, str(gpt2), where=gpt2)


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 10**400), ("rope_theta", math.inf), ("rope_theta", True)]
)
def test_a_llama_of_another_kind_is_refused(gpt2, key, value):
    llama = json.loads(seeds.hf_json()[2])["config.json"]
    (gpt2 / "config.json").write_text(json.dumps(llama | {key: value}))
    refused(load_model, str(gpt2), where="rope_theta")


# A checkpoint of ours


def plant(folder: Path, name: str, content: bytes) -> None:
    """Put a file into the checkpoint, with a sum that fits."""
    (folder / "step-00000005" / name).write_bytes(content)
    seeds.write_manifest(folder / "step-00000005")


def opened(folder: Path) -> None:
    load_model(str(folder), checkpoint_name="newest", device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layer", 10**9),
        ("n_layer", 10**30),
        ("n_layer", -1),
        ("n_embd", 10**9),
        ("vocab_size", 10**12),
        ("block_size", "8"),
        ("n_head", 2.0),
        ("n_head", True),
        ("bias", "x"),
        ("norm", []),
        ("norm", "x"),
        ("dropout", math.nan),
        ("dropout", None),
        ("rope_theta", 0),
        ("logit_softcap", math.inf),
        ("colour", "red"),
        ("lora_alpha", "x"),
        ("lora_alpha", math.nan),
    ],
)
def test_a_model_json_of_no_model_is_refused_before_there_is_one(a_run, key, value):
    plant(a_run, "model.json", json.dumps(seeds.MODEL | {key: value}).encode())
    refused(opened, a_run, where=a_run)


def test_weights_that_are_not_finite_are_refused(a_run):
    for number in (math.nan, math.inf):
        tensors = dict(seeds.OURS)
        tensors["transformer.ln_f.weight"] = np.full(8, number, np.float32)
        plant(a_run, "model.safetensors", seeds.in_safetensors(tensors))
        assert "NaN or infinity" in refused(opened, a_run, where=a_run)


def test_weights_of_another_type_are_refused(a_run):
    tensors = dict(seeds.OURS)
    tensors["transformer.ln_f.weight"] = np.ones(8, np.float16)
    plant(a_run, "model.safetensors", seeds.in_safetensors(tensors))
    assert "float16 there and torch.float32 in this model" in refused(opened, a_run, where="ln_f.weight")


def test_half_of_a_lora_is_refused(a_run):
    config = json.dumps(seeds.MODEL | {"lora_alpha": 16.0}).encode()
    layer = "transformer.h.0.attn.c_proj"
    for extra in (
        {f"{layer}.lora_a": seeds.floats(2, 8)},
        {f"{layer}.lora_a": seeds.floats(0, 8), f"{layer}.lora_b": seeds.floats(8, 0)},
        {f"{layer}.lora_a": seeds.floats(2, 8), f"{layer}.lora_b": seeds.floats(8, 3)},
        {"nowhere.lora_a": seeds.floats(2, 8), "nowhere.lora_b": seeds.floats(8, 2)},
    ):
        (a_run / "step-00000005" / "model.json").write_bytes(config)
        plant(a_run, "model.safetensors", seeds.in_safetensors(seeds.OURS | extra))
        assert "LoRA" in refused(opened, a_run, where=a_run)


def test_an_optimizer_state_of_other_shapes_or_not_finite_is_refused(a_run):
    for wrong in (seeds.floats(3), np.full((11, 8), math.nan, np.float32)):
        tensors = {
            name: array.reshape(array.shape).copy()
            for name, array in load_safetensors(
                (a_run / "step-00000005" / "optimizer.safetensors").read_bytes()
            ).items()
        }
        tensors["exp_avg/transformer.wte.weight"] = wrong
        plant(a_run, "optimizer.safetensors", seeds.in_safetensors(tensors))
        refused(targets.continue_run, a_run, where="exp_avg/transformer.wte.weight")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", 1e30),
        ("step", 10**30),
        ("step", "x"),
        ("step", True),
        ("step", None),
        ("best_val_loss", "x"),
        ("best_val_loss", math.nan),
        ("best_step", 1.5),
        ("evals_since_best", -1),
        ("last_eval_step", -2),
        ("seconds", math.inf),
        ("seconds", None),
        ("closing_seconds", []),
        ("scaler", [1]),
        ("scaler", {"scale": "x"}),
    ],
)
def test_a_state_that_cannot_be_is_refused(key, value):
    refused(TrainState.read, seeds.STATE | {key: value}, where=key)


def test_a_state_without_a_step_is_refused_and_one_that_lacks_or_has_other_things_is_read():
    refused(TrainState.read, {"seconds": 1.0}, where="no step")
    assert TrainState.read({"step": 5}).step == 5
    assert TrainState.read(seeds.STATE | {"colour": "red"}) == TrainState.read(seeds.STATE)


@pytest.mark.parametrize(
    "manifest", [[], {}, {"format": 1}, {"format": 1, "sha256": []}, {"format": 9, "sha256": {}}]
)
def test_a_checkpoint_with_another_manifest_is_named_and_passed_over(a_run, manifest):
    seeds.write_manifest(a_run / "step-00000005", manifest)
    warned = []
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.newest_checkpoint(a_run, warned.append)
    assert "manifest.json" in warned[0]


def test_a_folder_in_place_of_a_file_of_a_checkpoint_is_named_and_passed_over(a_run):
    (a_run / "step-00000005" / "model.json").unlink()
    (a_run / "step-00000005" / "model.json").mkdir()
    warned = []
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.newest_checkpoint(a_run, warned.append)
    assert "model.json is missing" in warned[0]


@pytest.mark.parametrize("name", ["step-²", "step-٣", "step-" + "9" * 200, "step-", "step--1", "step-1x"])
def test_a_folder_whose_name_only_looks_like_a_step_is_no_checkpoint(a_run, name):
    (a_run / name).mkdir()
    assert [folder.name for folder in checkpoint.step_folders(a_run)] == ["step-00000005"]


# What else a run folder says


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "7",
        "null",
        '"x"',
        "{}",
        '{"step": "x", "loss": 1}',
        '{"step": 1, "loss": "x", "tokens": 1, "seconds": 1}',
        '{"step": 1, "loss": NaN, "tokens": 1, "seconds": 1}',
        '{"step": 1, "final_loss": 1.0, "seconds": 1, "final_bits_per_byte": {}}',
        '{"step": 1e999, "loss": 1, "tokens": 1, "seconds": 1}',
        '{"step": 1, "loss": 1e999999999, "tokens": 1, "seconds": 1}',
        "[" * 100_000,
        "9" * 100_000,
        "\ud800",
        "\x00",
    ],
)
def test_a_line_of_metrics_that_is_no_record_is_passed_over(tmp_path, line):
    sound = {"step": 2, "loss": 1.5, "tokens": 10, "seconds": 1.0}
    (tmp_path / metrics_file.METRICS_FILE).write_bytes(
        f"{line}\n{json.dumps(sound)}\n".encode("utf-8", "surrogatepass")
    )
    assert metrics_file.read_metrics(tmp_path) == [sound]
    metrics_file.rewind_metrics(tmp_path, 2)
    assert metrics_file.read_metrics(tmp_path) == [sound]


def test_records_that_lack_what_a_picture_needs_are_left_out_of_it(tmp_path):
    whole = {"step": 2, "loss": 1.5, "tokens": 10, "seconds": 1.0}
    halves = [{"step": 1, "loss": 1.0}, {"step": 1, "eval_val_loss": 1.0, "tokens": 1, "seconds": 1}]
    halves += [{"step": 1, "final_loss": 1.0}, whole, whole | {"tokens": 20, "seconds": 2.0}]
    (tmp_path / metrics_file.METRICS_FILE).write_text("".join(json.dumps(one) + "\n" for one in halves))
    assert loss_plot.read_curves(tmp_path).batch["loss"].tolist() == [1.5, 1.5]
    assert not loss_plot.read_curves(tmp_path).evaluated["val"].size
    about = {"decided": {"notes": 7}, "versions": {}, "git_commit": None}
    assert (
        report.speed_section(metrics_file.read_metrics(tmp_path), about)
        and len(metrics_file.read_metrics(tmp_path)) == 5
    )


def test_samples_that_are_no_text_are_read_as_far_as_they_are(tmp_path):
    (tmp_path / metrics_file.SAMPLES_FILE).write_bytes(
        b"\xff=== step 1 ===\n=== step 2 ===\num\xff\n\n=== step " + b"9" * 5000 + b" ===\n"
    )
    assert [step for step, _ in metrics_file.read_samples(tmp_path)] == [2]


@pytest.mark.parametrize("key", ["settings", "decided", "versions"])
@pytest.mark.parametrize("value", [[], None, "x", 7])
def test_settings_json_with_parts_of_another_type_is_refused(a_run, key, value):
    changed(a_run / "settings.json", key, to=value)
    refused(run_folder.run_metadata, a_run, where=a_run / "settings.json")


@pytest.mark.parametrize(
    "array", [np.zeros(3, np.float16), np.zeros((2, 0), np.float16), np.full((2, 2), np.nan, np.float16)]
)
def test_a_snapshot_that_is_no_table_of_numbers_is_refused(tmp_path, array):
    (tmp_path / embedding_snapshots.SNAPSHOT_FOLDER).mkdir()
    path = tmp_path / embedding_snapshots.SNAPSHOT_FOLDER / "step-1.safetensors"
    path.write_bytes(seeds.in_safetensors({"tokens": array}))
    assert "delete it" in refused(embedding_snapshots.read_snapshots, tmp_path, where=path)


def test_snapshots_of_different_tables_are_refused(tmp_path):
    (tmp_path / embedding_snapshots.SNAPSHOT_FOLDER).mkdir()
    for step, rows in ((1, 4), (2, 5)):
        data = seeds.in_safetensors({"tokens": seeds.floats(rows, 8).astype(np.float16)})
        (tmp_path / embedding_snapshots.SNAPSHOT_FOLDER / f"step-{step}.safetensors").write_bytes(data)
    refused(embedding_snapshots.read_snapshots, tmp_path, where="step-2.safetensors")


# What is no plain file


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "loop"])
@pytest.mark.parametrize(
    "name",
    [
        "corpus/meta.json",
        "corpus/tokenizer.json",
        "corpus/train.bin",
        "gpt2/config.json",
        "gpt2/model.safetensors",
        "run/settings.json",
        "run/tokenizer.json",
        "run/step-00000005/manifest.json",
        "run/step-00000005/state.json",
    ],
)
def test_a_pipe_a_folder_a_device_or_a_loop_of_links_in_place_of_a_file_is_refused(
    corpus, gpt2, a_run, kind, name
):
    path = corpus.parent / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "endless" else path)

    def use_all():
        dataset.open_corpus(corpus, 8)
        loader.load_weights(str(gpt2))
        opened(a_run)
        run_folder.run_metadata(a_run)

    with pytest.raises((ValueError, OSError)) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        use_all()
    assert type(caught.value) is ValueError or caught.value.strerror


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_prompt_without_end_is_refused():
    refused(read_prompt, "FILE:/dev/zero", where="/dev/zero is longer than 4 MB")


def test_a_jsonl_line_that_is_packed_from_next_to_nothing_is_bounded(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1 << 16)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * (1 << 24) + b'"}'))
    refused(lambda: list(documents.local_documents([path])), where=f"{path}, line 1 is longer than")


def test_parquet_whose_text_is_no_utf8_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    places = pa.py_buffer(np.array([0, 3], np.int32).tobytes())
    broken = pa.Array.from_buffers(pa.string(), 1, [None, places, pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"text": broken}), tmp_path / "d.parquet")
    refused(
        lambda: list(documents.local_documents([tmp_path / "d.parquet"])), where="d.parquet cannot be read"
    )


@pytest.mark.parametrize("loss", [10**30, 1e308, -(10**30)])
def test_a_loss_beyond_a_float_s_exponential_is_told_all_the_same(loss):
    records = [{"step": 4, "seconds": 1.0, "final_loss": loss}]
    assert "perplexity" in report.summary(records, GPTConfig(n_layer=1, n_head=1, n_embd=8), 1)
