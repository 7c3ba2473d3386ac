"""Weights out: what transformers opens, with no code of ours, is the model that was trained."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM

import sample
from fradique.checkpointing import checkpoint
from fradique.pretrained import __main__, export, hf_config, hf_weights, loader
from fradique.tokenizer import tokenizer
from model import GPT, GPTConfig

CHARS = tokenizer.CharTokenizer("\n abcdeé—😀")
SIZES = {"block_size": 24, "vocab_size": CHARS.vocab_size, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu"}
TEXT = "é bade\n— 😀 aced"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def random_model(**changes):
    """Every parameter random, so that no bias is 0 and no norm is 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def write(model, tokens=CHARS, folder="out", **options):
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    return export.export_model(dataclasses.asdict(model.config), tensors, tokens, Path(folder), **options)


def opened(folder="out"):
    """As transformers reads it, with every warning an error."""
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
def test_transformers_computes_what_the_model_does(name):
    kind, changes = ARCHITECTURES[name]
    model = random_model(**changes)
    layout = write(model)
    theirs, tokens = opened()
    assert type(theirs) is kind and layout.name == kind.__name__
    idx = torch.tensor([tokens(TEXT).input_ids])
    assert idx[0].tolist() == CHARS.encode(TEXT).tolist()
    expected = theirs(idx, labels=idx)
    logits, loss = model(idx, idx)[0], model(idx[:, :-1], idx[:, 1:])[1]
    assert (logits - expected.logits).abs().max() < 1e-4
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    loss.backward()
    expected.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    config = dataclasses.asdict(model.config) | {"n_inner": model.config.inner}
    theirs_by_name = dict(theirs.named_parameters())
    for n, gradient in hf_weights.to_hf(gradients, layout, config).items():
        expected_gradient = theirs_by_name[n].grad
        assert (gradient - expected_gradient).abs().max() < 1e-4 * expected_gradient.abs().max(), n


@pytest.mark.parametrize("name", ["gpt2", "llama, grouped"])
def test_greedy_generation_is_that_of_transformers_for_200_tokens(name):
    model = random_model(**ARCHITECTURES[name][1] | {"block_size": 256})
    write(model)
    theirs, _ = opened()
    idx = torch.tensor([CHARS.encode(TEXT).tolist()])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=200, **options)
    found = model.generate(idx, 200, temperature=0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_was_exported_is_read_back_identical(name):
    model = random_model(**ARCHITECTURES[name][1])
    write(model)
    back = loader.load_weights("out")
    ours = {n: p.detach() for n, p in model.named_parameters()}
    assert back.tokenizer == CHARS
    extra = back.tensors.keys() - ours.keys()
    assert all(n.endswith(".bias") and not back.tensors[n].any() for n in extra)  # GPT-2's class has biases
    assert bool(extra) == (
        hf_weights.GPT2.name in Path("out/config.json").read_text() and not model.config.bias
    )
    assert all(torch.equal(back.tensors[n], tensor) for n, tensor in ours.items())
    rebuilt = GPT(GPTConfig(**back.config))
    checkpoint.assign_parameters(rebuilt, back.tensors, "out")
    idx = torch.tensor([CHARS.encode(TEXT).tolist()])
    torch.testing.assert_close(rebuilt.eval()(idx, idx)[0], model(idx, idx)[0], rtol=0, atol=1e-6)


def test_sample_opens_an_exported_folder():
    write(random_model())
    writer = sample.load_model("out")
    assert writer.tokenizer == CHARS
    assert len(list(sample.generate_text(writer, "abc", sample.SampleSettings(max_new_tokens=5)))) == 6


def test_generation_by_transformers_runs_with_the_files_alone():
    write(random_model())
    theirs, tokens = opened()
    torch.manual_seed(0)
    out = theirs.generate(**tokens("abc", return_tensors="pt"), max_new_tokens=8)
    text = tokens.decode(out[0])
    assert text.startswith("abc") and len(text) == 3 + 8


# tokenizers


@pytest.mark.parametrize("text", [TEXT, "\n\n a\n", "", "—", " \n" * 9])
def test_the_character_tokenizer_is_the_same_there(text):
    write(random_model())
    _, tokens = opened()
    ids = tokens(text).input_ids
    assert ids == CHARS.encode(text).tolist() and tokens.decode(ids) == text


def test_a_character_outside_the_vocabulary_is_an_error_there_too():
    write(random_model())
    with pytest.raises(Exception, match="UNK"):
        opened()[1]("xyz")


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_byte_level_bpes_are_the_same_there(kind):
    text = "Era uma vez, em 1889:  o Rio\n\tde Janeiro — não é? don't 😀!"
    ours = tokenizer.train_bpe([text * 3], 300) if kind == "bpe" else tokenizer.GPT2Tokenizer()
    write(random_model(vocab_size=-(-ours.vocab_size // 64) * 64), ours)
    theirs, tokens = opened()
    ids = tokens(text).input_ids
    assert ids == ours.encode(text).tolist() and tokens.decode(ids) == text
    assert tokens.eos_token_id == theirs.config.eos_token_id == ours.end_of_text
    assert loader.load_weights("out").tokenizer == ours


def test_gpt2_s_merges_are_found_again_from_its_tokens():
    from fradique.tokenizer import bpe

    tokens, _ = bpe.gpt2_encoding()
    assert bpe.token_bytes(bpe.recover_merges(tokens)) == tokens
    lines = bpe._gpt2_merges().decode().split("\n")[1:-1]
    assert [" ".join(pair) for pair in bpe.recover_merges(tokens)] == lines


def test_a_model_without_a_tokenizer_is_exported_without_one():
    write(random_model(), None)
    assert not list(Path("out").glob("*tokenizer*"))


# refusals


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
def test_an_architecture_that_no_class_has_is_refused_with_what_stands_in_the_way(changes):
    with pytest.raises(ValueError) as told:
        write(random_model(**changes))
    of_gpt2, of_llama = str(told.value).split("; and of ")
    for name, value in changes.items():
        said = f"{name} = {value!r}, where it has"
        assert said in of_gpt2 or said in of_llama
    assert not list(Path().iterdir())


def test_a_folder_that_holds_something_is_left_alone():
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="out is there already and holds something: choose another"):
            write(random_model(), overwrite=overwrite)
    assert [path.name for path in Path("out").iterdir()] == ["thesis.txt"]


def test_an_exported_model_is_replaced_only_when_asked():
    write(random_model())
    other = random_model(**LLAMA | {"bias": False})
    with pytest.raises(ValueError, match="--overwrite to replace"):
        write(other)
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "gpt2"
    write(other, overwrite=True)
    assert isinstance(opened()[0], LlamaForCausalLM)


def test_a_folder_with_more_than_a_model_is_never_replaced():
    write(random_model())
    Path("out/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something: choose another folder$"):
        write(random_model(), overwrite=True)
    assert Path("out/thesis.txt").exists() and Path("out/model.safetensors").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(ValueError, match="10 tokens and the embedding 9"):
        write(random_model(vocab_size=9))
    assert not Path("out").exists()


def test_a_failed_write_leaves_nothing(monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.safetensors.torch, "save_file", full)
    with pytest.raises(ValueError, match=r"out could not be written: .*No space left"):
        write(random_model())
    assert not list(Path().iterdir())


# the command


def run_folder(**changes):
    """A run folder with one checkpoint."""
    model = random_model(**changes)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    held = checkpoint.Checkpoint(dataclasses.asdict(model.config), tensors, {}, {"step": 3})
    checkpoint.save_and_prune(Path("run"), held, best=True, last=2)
    tokenizer.save_tokenizer(CHARS, "run/tokenizer.json")
    Path("run/settings.json").write_text('{"settings": {}}')
    return model


def test_the_command_exports_a_run(capsys):
    model = run_folder()
    assert __main__.main(["export", "--out_dir=run", "--to=hf"]) == 0
    assert 'AutoModelForCausalLM.from_pretrained("hf")' in capsys.readouterr().out
    assert torch.equal(load_file("hf/model.safetensors")["transformer.wte.weight"], model.lm_head.weight)
    assert __main__.main(["export", "--out_dir=run", "--to", "hf", "--overwrite", "--checkpoint=3"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out_dir=runs", "--to=hf"], "runs is no file or folder"),
        (["--out_dir=run", "--to=hf", "--checkpoint=7"], "has no checkpoint '7'"),
        (["--out_dir=run", "--to=run"], "run is there already and holds something"),
    ],
)
def test_a_mistake_gets_one_message_and_status_2(words, said, capsys):
    run_folder()
    assert __main__.main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error


# settings


def test_the_defaults_of_older_runs_are_those_of_the_config():
    config = dataclasses.asdict(GPTConfig())
    assert {name: config[name] for name in hf_config.DEFAULTS} == hf_config.DEFAULTS
    assert config.keys() - hf_config.DEFAULTS.keys() == {
        "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "flash"
    }  # fmt: skip


def test_every_setting_is_needed_or_written():
    model = random_model()
    written = set(hf_config.DEFAULTS) - {
        "bias",
        "dropout",
        "n_inner",
        "tie_weights",
        "rope_theta",
        "n_kv_head",
    }
    for layout in hf_weights.LAYOUTS:
        assert written <= layout.needs.keys() | {"activation"}
    assert hf_config.unsupported_settings(dataclasses.asdict(model.config), hf_weights.GPT2) == []
