"""Export: transformers loads the folder without our code, and its model and tokenizer equal ours."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM
from weight_folders import randomize

import sample
from fradique.checkpointing import checkpoint
from fradique.pretrained import __main__, export, hf_weights, loader
from fradique.tokenizer import bpe, tokenizer
from model import GPT, GPTConfig

CHARS = tokenizer.CharTokenizer("\n abcdeé—😀")
SIZES = {"block_size": 24, "vocab_size": CHARS.vocab_size, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu"}
TEXT = "é bade\n— 😀 aced"


def random_model(**changes):
    torch.manual_seed(0)
    return randomize(GPT(GPTConfig(**SIZES | changes)))


def write(model, tokens=CHARS, folder="out", **options):
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    return export.export_model(model.config, tensors, tokens, Path(folder), **options)


def open_with_transformers(folder="out"):
    """The model and the tokenizer; every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


ARCHITECTURES = {
    "gpt2": (GPT2LMHeadModel, {"activation": "gelu_tanh"}),
    "nanogpt": (GPT2LMHeadModel, {"bias": False}),
    "relu": (GPT2LMHeadModel, {"activation": "relu"}),
    "relu2, narrow": (GPT2LMHeadModel, {"activation": "relu2", "n_inner": 40}),
    "untied": (GPT2LMHeadModel, {"tie_weights": False}),
    "n_kv_head written out": (GPT2LMHeadModel, {"n_kv_head": 4}),
    "llama": (LlamaForCausalLM, LLAMA | {"bias": False, "tie_weights": False}),
    "llama, tied": (LlamaForCausalLM, LLAMA | {"bias": False}),
    "llama, biases": (LlamaForCausalLM, LLAMA | {"bias": True, "tie_weights": False}),
    "llama, grouped": (LlamaForCausalLM, LLAMA | {"bias": False, "n_kv_head": 2, "rope_theta": 500.0}),
    "llama, multi-query": (LlamaForCausalLM, LLAMA | {"bias": True, "n_kv_head": 1, "n_inner": 48}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_loss_and_gradients_equal_in_transformers(name):
    hf_class, changes = ARCHITECTURES[name]
    model = random_model(**changes)
    layout = write(model)
    hf_model, hf_tokenizer = open_with_transformers()
    assert type(hf_model) is hf_class and layout.name == hf_class.__name__
    idx = torch.tensor([hf_tokenizer(TEXT).input_ids])
    assert idx[0].tolist() == CHARS.encode(TEXT).tolist()
    expected = hf_model(idx, labels=idx)
    logits, loss = model(idx, idx)[0], model(idx[:, :-1], idx[:, 1:])[1]
    assert (logits - expected.logits).abs().max() < 1e-4
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    loss.backward()
    expected.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    hf_parameters = dict(hf_model.named_parameters())
    for n, gradient in hf_weights.to_hf(gradients, model.config, layout).items():
        expected_gradient = hf_parameters[n].grad
        assert (gradient - expected_gradient).abs().max() < 1e-4 * expected_gradient.abs().max(), n


@pytest.mark.parametrize("name", ["gpt2", "llama, grouped"])
def test_greedy_generation_equals_that_of_transformers(name):
    model = random_model(**ARCHITECTURES[name][1] | {"block_size": 256})
    write(model)
    hf_model, _ = open_with_transformers()
    idx = torch.tensor([CHARS.encode(TEXT).tolist()])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = hf_model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=200, **options)
    assert torch.equal(model.generate(idx, 200, temperature=0), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_exported_model_is_loaded_unchanged(name):
    model = random_model(**ARCHITECTURES[name][1])
    layout = write(model)
    loaded = loader.load_weights("out")
    original = {n: p.detach() for n, p in model.named_parameters()}
    assert loaded.tokenizer == CHARS
    added = loaded.tensors.keys() - original.keys()  # GPT2LMHeadModel always has biases
    assert all(n.endswith(".bias") and not loaded.tensors[n].any() for n in added)
    assert layout.name in Path("out/config.json").read_text()
    assert bool(added) == (layout is hf_weights.GPT2 and not model.config.bias)
    assert all(torch.equal(loaded.tensors[n], tensor) for n, tensor in original.items())
    rebuilt = GPT(loaded.config)
    checkpoint.assign_parameters(rebuilt, loaded.tensors, "out")
    idx = torch.tensor([CHARS.encode(TEXT).tolist()])
    torch.testing.assert_close(rebuilt.eval()(idx, idx)[0], model(idx, idx)[0], rtol=0, atol=1e-6)


def test_sample_opens_an_exported_folder():
    write(random_model())
    loaded = sample.load_model("out")
    assert loaded.tokenizer == CHARS
    assert len(list(sample.generate_text(loaded, "abc", sample.SampleSettings(max_new_tokens=5)))) == 6


def test_transformers_generates_text_from_the_folder():
    write(random_model())
    hf_model, hf_tokenizer = open_with_transformers()
    torch.manual_seed(0)
    out = hf_model.generate(**hf_tokenizer("abc", return_tensors="pt"), max_new_tokens=8)
    text = hf_tokenizer.decode(out[0])
    assert text.startswith("abc") and len(text) == 3 + 8


# Tokenizers


@pytest.mark.parametrize("text", [TEXT, "\n\n a\n", "", "—", " \n" * 9])
def test_the_character_tokenizer_is_the_same_in_transformers(text):
    write(random_model())
    _, hf_tokenizer = open_with_transformers()
    ids = hf_tokenizer(text).input_ids
    assert ids == CHARS.encode(text).tolist() and hf_tokenizer.decode(ids) == text


def test_a_character_outside_the_vocabulary_raises():
    write(random_model())
    with pytest.raises(Exception, match="UNK"):
        open_with_transformers()[1]("xyz")


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_byte_level_bpes_are_the_same_in_transformers(kind):
    text = "Era uma vez, em 1889:  o Rio\n\tde Janeiro — não é? don't 😀!"
    bpe_tokenizer = tokenizer.train_bpe([text * 3], 300) if kind == "bpe" else tokenizer.GPT2Tokenizer()
    write(random_model(vocab_size=-(-bpe_tokenizer.vocab_size // 64) * 64), bpe_tokenizer)
    hf_model, hf_tokenizer = open_with_transformers()
    ids = hf_tokenizer(text).input_ids
    assert ids == bpe_tokenizer.encode(text).tolist() and hf_tokenizer.decode(ids) == text
    assert hf_tokenizer.eos_token_id == hf_model.config.eos_token_id == bpe_tokenizer.end_of_text
    assert loader.load_weights("out").tokenizer == bpe_tokenizer


@pytest.mark.parametrize("separator", ["<|endoftext|>", "</s>"])
@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_the_separator_of_documents_is_the_same_in_transformers(kind, separator):
    text = f"Era uma vez.{separator}Era outra vez. {separator}"
    own = tokenizer.GPT2Tokenizer(separator)
    if kind == "bpe":
        own = tokenizer.train_bpe([text * 9], 300, separator)
    write(random_model(vocab_size=-(-own.vocab_size // 64) * 64), own)
    _, hf_tokenizer = open_with_transformers()
    ids = hf_tokenizer(text).input_ids
    assert ids == own.encode(text).tolist() and ids.count(own.end_of_text) == 2
    assert hf_tokenizer.decode(ids) == text and hf_tokenizer.eos_token == separator
    assert loader.load_weights("out").tokenizer == own


def test_gpt2s_merges_are_recovered_from_its_tokens():
    tokens, _ = bpe.gpt2_encoding()
    assert bpe.token_bytes(bpe.recover_merges(tokens)) == tokens
    lines = bpe._read_gpt2_merges().decode().split("\n")[1:-1]
    assert [" ".join(pair) for pair in bpe.recover_merges(tokens)] == lines


def test_a_model_without_a_tokenizer_is_exported_without_one():
    write(random_model(), None)
    assert not list(Path("out").glob("*tokenizer*"))


# Errors


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "alibi"},
        {"norm_place": "post"},
        {"qk_norm": True},
        {"embd_norm": True},
        {"parallel_block": True},
        {"prefix_len": 4},
        {"sliding_window": 8},
        {"logit_softcap": 30.0},
        {"n_kv_head": 2},
        {"activation": "geglu"},
        LLAMA | {"norm": "layernorm"},
        LLAMA | {"sliding_window": 4},
        {"norm": "rmsnorm", "position": "none", "activation": "relu2", "qk_norm": True},
    ],
)
def test_the_settings_that_prevent_an_export_are_listed(changes):
    with pytest.raises(ValueError) as error:
        write(random_model(**changes))
    gpt2_reasons, llama_reasons = str(error.value).split("; LlamaForCausalLM ")
    for name, value in changes.items():
        reason = f"{name} = {value!r} (only "
        assert reason in gpt2_reasons or reason in llama_reasons
    assert not list(Path().iterdir())


def test_a_folder_with_other_files_is_not_overwritten():
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="out already exists and is not empty: choose another"):
            write(random_model(), overwrite=overwrite)
    assert [path.name for path in Path("out").iterdir()] == ["thesis.txt"]


def test_an_exported_model_is_replaced_only_when_asked():
    write(random_model())
    llama_model = random_model(**LLAMA | {"bias": False})
    with pytest.raises(ValueError, match="--overwrite to replace"):
        write(llama_model)
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "gpt2"
    write(llama_model, overwrite=True)
    assert isinstance(open_with_transformers()[0], LlamaForCausalLM)


def test_a_model_folder_with_other_files_is_not_replaced():
    write(random_model())
    Path("out/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty: choose another folder$"):
        write(random_model(), overwrite=True)
    assert Path("out/thesis.txt").exists() and Path("out/model.safetensors").exists()


def test_a_model_of_somebody_else_is_not_replaced():
    """Its files have the names of an export, but not its metadata."""
    write(random_model())
    weights = safetensors.torch.load_file("out/model.safetensors")
    safetensors.torch.save_file(weights, "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not empty: choose another folder$"):
        write(random_model(), overwrite=True)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(ValueError, match="10 tokens and the embedding 9"):
        write(random_model(vocab_size=9))
    assert not Path("out").exists()


def test_a_failed_write_leaves_no_files(monkeypatch):
    def disk_full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.safetensors.torch, "save_file", disk_full)
    with pytest.raises(ValueError, match=r"out could not be written: .*No space left"):
        write(random_model())
    assert not list(Path().iterdir())


# The command line


def save_run(**changes):
    """Write a run folder with one checkpoint. Returns its model."""
    model = random_model(**changes)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    saved = checkpoint.Checkpoint(dataclasses.asdict(model.config), tensors, {}, {"step": 3})
    checkpoint.save_and_prune(Path("run"), saved, best=True, keep=2)
    tokenizer.save_tokenizer(CHARS, "run/tokenizer.json")
    Path("run/settings.json").write_text('{"settings": {}}')
    return model


def test_the_command_exports_a_run(capsys):
    model = save_run()
    assert __main__.main(["export", "--out_dir=run", "--to=hf"]) == 0
    assert 'AutoModelForCausalLM.from_pretrained("hf")' in capsys.readouterr().out
    assert torch.equal(load_file("hf/model.safetensors")["transformer.wte.weight"], model.lm_head.weight)
    assert __main__.main(["export", "--out_dir=run", "--to", "hf", "--overwrite", "--checkpoint=3"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out_dir=runs", "--to=hf"], "runs is no file or folder"),
        (["--out_dir=run", "--to=hf", "--checkpoint=7"], "has no checkpoint '7'"),
        (["--out_dir=run", "--to=run"], "run already exists and is not empty"),
    ],
)
def test_invalid_arguments_give_one_message_and_status_2(arguments, message, capsys):
    save_run()
    assert __main__.main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize("target", ["link", "nowhere"])
def test_a_link_that_leads_nowhere_is_one_message(target, capsys):
    save_run()
    Path("link").symlink_to(target)
    for to in ("link", "link/hf"):
        assert __main__.main(["export", "--out_dir=run", f"--to={to}"]) == 2
        assert capsys.readouterr().err.startswith("error: link is a symbolic link that leads nowhere")


def test_an_export_through_a_link_goes_to_its_target():
    save_run()
    Path("disk").mkdir()
    Path("link").symlink_to("disk")
    assert __main__.main(["export", "--out_dir=run", "--to=link"]) == 0
    assert Path("disk/model.safetensors").exists() and Path("link").is_symlink()
