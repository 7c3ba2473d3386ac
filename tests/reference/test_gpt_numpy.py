"""reference/gpt_numpy.py against transformers' GPT-2 and model.py under autograd."""

import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from gpt2_oracle import SIZES, logits_and_loss, save_random_gpt2
from mutants import mutants
from safetensors.numpy import load_file, save_file
from support import ROOT, imported_names

from model import GPT, GPTConfig

FILE = ROOT / "reference" / "gpt_numpy.py"


def module_from(source: str) -> types.ModuleType:
    module = types.ModuleType("gpt_numpy")
    exec(compile(source, str(FILE), "exec"), module.__dict__)
    return module


reference = module_from(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    return save_random_gpt2(folder), folder


@pytest.fixture
def models(saved):
    """A GPT-2 of transformers, and the reference model loaded from its file."""
    hf_model, folder = saved
    hf_model.zero_grad()
    return hf_model, reference.load(folder / "model.safetensors")


def batch(seed=1, B=3, T=9):
    ids = np.random.default_rng(seed).integers(SIZES["vocab_size"], size=(B, T + 1))
    return ids[:, :-1], ids[:, 1:]


def relative_distances(gradients, named) -> dict[str, float]:
    """‖gradient - expected‖ / ‖expected‖ for each gradient; `named` has the parameters of the oracle."""
    distances = {}
    for name, gradient in gradients.items():
        expected = named[name].grad.numpy()
        distances[name] = float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))
    return distances


def test_logits_loss_and_gradients_equal_transformers(models):
    hf_model, reference_model = models
    ids, targets = batch()
    logits, loss = logits_and_loss(hf_model, ids, targets)
    loss.backward()
    x, _ = reference_model.forward(ids)
    assert reference_model.logits(x) == pytest.approx(logits.detach().flatten(0, 1).numpy(), abs=1e-4)
    measured, gradients = reference_model.gradients(ids, targets)
    assert measured == pytest.approx(loss.item(), abs=1e-5)
    assert reference_model.loss(ids, targets) == pytest.approx(loss.item(), abs=1e-5)
    named = dict(hf_model.transformer.named_parameters())
    assert set(gradients) == set(named) == set(reference_model.weights)
    distances = relative_distances(gradients, named)
    assert all(distance < 1e-3 for distance in distances.values()), distances  # False for NaN too


def project_model(reference_model) -> GPT:
    """The model of model.py with the weights of the reference model."""
    c = SIZES
    config = GPTConfig(
        vocab_size=c["vocab_size"], block_size=c["n_positions"], n_layer=c["n_layer"], n_head=c["n_head"],
        n_embd=c["n_embd"], activation="gelu_tanh",
    )  # fmt: skip
    model = GPT(config)
    state = {}
    for name, weight in reference_model.weights.items():
        transposed = weight.T if weight.ndim == 2 and "h." in name else weight
        state["transformer." + name] = torch.from_numpy(transposed.copy())
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return model


def test_logits_loss_and_gradients_equal_the_model(models):
    reference_model = models[1]
    model = project_model(reference_model)
    ids, targets = batch(2)
    logits, loss = model(torch.from_numpy(ids), torch.from_numpy(targets.copy()))
    loss.backward()
    measured, gradients = reference_model.gradients(ids, targets)
    assert measured == pytest.approx(loss.item(), abs=1e-5)
    x, _ = reference_model.forward(ids)
    assert reference_model.logits(x) == pytest.approx(logits.detach().flatten(0, 1).numpy(), abs=1e-4)
    for name, parameter in model.named_parameters():
        expected = parameter.grad.numpy()
        actual = gradients[name.removeprefix("transformer.")]
        actual = actual.T if actual.ndim == 2 and ".h." in name else actual
        assert np.linalg.norm(actual - expected) < 1e-3 * np.linalg.norm(expected), name


def test_ten_steps_of_adamw_equal_torch(models):
    reference_model = models[1]
    model = project_model(reference_model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch_optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer = reference.AdamW(reference_model.weights)
    losses = []
    for step in range(10):
        ids, targets = batch(step)
        _, loss = model(torch.from_numpy(ids), torch.from_numpy(targets.copy()))
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        measured, gradients = reference_model.gradients(ids, targets)
        optimizer.step(gradients, 1e-2)
        losses.append((measured, loss.item()))
    assert all(abs(actual - expected) < 1e-4 for actual, expected in losses), losses


@pytest.mark.parametrize("count", [8, 13])
def test_greedy_generation_equals_transformers(models, count):
    hf_model, reference_model = models
    prompt = [5, 31, 7]
    expected = hf_model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 3),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    assert reference_model.generate(prompt, count) == expected[0, 3:].tolist()


@pytest.mark.parametrize("prompt_length", [3, 16, 17, 40])
def test_generation_beyond_the_block_rereads_half_a_block(models, prompt_length):
    """The oracle has no cache. The block is 16; when it is full, the last 8 tokens are the new context."""
    hf_model, reference_model = models
    prompt = np.random.default_rng(prompt_length).integers(50, size=prompt_length).tolist()
    expected, window = list(prompt), min(prompt_length, 16)
    for _ in range(30):
        if window > 16:
            window = 8
        with torch.no_grad():
            logits = hf_model(torch.tensor([expected[-window:]])).logits[0, -1]
        expected.append(int(logits.argmax()))
        window += 1
    assert reference_model.generate(prompt, 30) == expected[prompt_length:]
    assert len(set(expected)) > 7


def test_samples_have_the_probabilities_of_the_model(models):
    hf_model, reference_model = models
    with torch.no_grad():
        logits = hf_model(torch.tensor([[5, 31]])).logits[0, -1] / 0.7
    top_4 = logits.topk(4)
    expected = top_4.values.softmax(0)
    samples = [
        reference_model.generate([5, 31], 1, temperature=0.7, top_k=4, seed=seed)[0] for seed in range(800)
    ]
    assert set(samples) <= set(top_4.indices.tolist())
    for token, p in zip(top_4.indices.tolist(), expected.tolist(), strict=True):
        assert samples.count(token) / 800 == pytest.approx(p, abs=0.07)


def test_loss_is_exact_if_a_probability_underflows():
    logits = np.array([[0, 200, 100], [5, 5, -300]], np.float32)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits.copy()).double(), torch.tensor([0, 2])
    )
    loss, p = reference.cross_entropy(logits, np.array([0, 2]))
    assert loss == pytest.approx(expected.item(), abs=1e-4) and p[0, 0] == 0 and p[0, 1] == 1


def test_generation_with_a_block_of_one_token(tmp_path):
    hf_model = save_random_gpt2(tmp_path, n_positions=1)
    reference_model = reference.load(tmp_path / "model.safetensors")
    expected = [5]
    for _ in range(4):
        with torch.no_grad():
            expected.append(int(hf_model(torch.tensor([expected[-1:]])).logits[0, -1].argmax()))
    assert reference_model.generate([5], 4) == expected[1:]


def test_only_numpy_and_safetensors_are_imported():
    packages = {name.split(".")[0] for name in imported_names(FILE)}
    assert packages - set(sys.stdlib_module_names) == {"numpy", "safetensors"}


def test_a_wrong_sign_in_any_backward_pass_is_detected(models):
    hf_model, reference_model = models
    ids, targets = batch()
    logits_and_loss(hf_model, ids, targets)[1].backward()
    named = dict(hf_model.transformer.named_parameters())
    undetected, count = [], 0
    for description, source in mutants(FILE.read_text(encoding="utf-8")):
        mutant, count = module_from(source).GPT2(reference_model.weights, reference_model.n_head), count + 1
        with np.errstate(all="ignore"):
            distances = relative_distances(mutant.gradients(ids, targets)[1], named)
        if all(distance < 1e-3 for distance in distances.values()):
            undetected.append(description)
    assert not undetected
    assert count >= 38


# The command


def run(*options, cwd):
    command = [sys.executable, str(FILE), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def folder(saved):
    """A folder with model.safetensors, config.json, and 100 tokens in tokens.bin."""
    np.random.default_rng(3).integers(50, size=100).astype("<u2").tofile(saved[1] / "tokens.bin")
    return saved[1]


def test_the_loss_command_prints_the_loss_of_a_file(models, folder):
    result = run(
        "loss", "--weights=model.safetensors", "--tokens=tokens.bin", "--block=8", "--batch=5", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    tokens = np.fromfile(folder / "tokens.bin", "<u2").astype(np.int64)
    _, expected = logits_and_loss(models[0], tokens[:96].reshape(12, 8), tokens[1:97].reshape(12, 8))
    assert float(re.search(r"loss ([\d.]+)", result.stdout).group(1)) == pytest.approx(
        expected.item(), abs=1e-5
    )


def test_the_train_command_writes_a_trained_gpt2(folder, tmp_path):
    out = tmp_path / "trained.safetensors"
    options = ("--steps=30", "--block=8", "--learning_rate=0.01", f"--out={out}")
    result = run("train", "--weights=model.safetensors", "--tokens=tokens.bin", *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    trained = reference.load(out)
    assert trained.n_head == 2
    tokens = np.fromfile(folder / "tokens.bin", "<u2").astype(np.int64)
    assert trained.loss(tokens[None, :8], tokens[None, 1:9]) < losses[0] - 1


def test_the_generate_command_prints_ids(models, folder):
    result = run("generate", "--weights=model.safetensors", "--ids=5,31,7", "--count=6", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert [int(token) for token in result.stdout.split(",")] == models[1].generate([5, 31, 7], 6)
    result = run("generate", "--weights=model.safetensors", "--tokens=tokens.bin", "--count=2", cwd=folder)
    assert result.returncode == 0 and result.stdout.count(",") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss", "--weights=none.safetensors", "--tokens=tokens.bin"], "none.safetensors cannot be read"),
        (["loss", "--weights=tokens.bin", "--tokens=tokens.bin"], "tokens.bin cannot be read as safetensors"),
        (["loss", "--weights=model.safetensors", "--tokens=none.bin"], "none.bin"),
        (["loss", "--weights=model.safetensors"], "loss needs --tokens FILE"),
        (
            ["loss", "--weights=model.safetensors", "--tokens=high.bin"],
            "high.bin contains the token id 50, but the vocabulary size is 50",
        ),
        (
            ["loss", "--weights=model.safetensors", "--tokens=few.bin"],
            "few.bin contains 5 tokens, but 17 are needed",
        ),
        (
            ["loss", "--weights=model.safetensors", "--tokens=few.bin", "--block=17"],
            "--block must be from 1 to 16",
        ),
        (["generate", "--weights=model.safetensors"], "generate needs a prompt"),
        (
            ["generate", "--weights=model.safetensors", "--ids=3,50"],
            "--ids contains the token id 50, but the vocabulary size is 50",
        ),
        (
            ["generate", "--weights=model.safetensors", "--ids=3,x"],
            "--ids=3,x must be integers separated by commas",
        ),
        (
            ["generate", "--weights=model.safetensors", "--ids=3", "--heads=5"],
            "the width 12 cannot be divided into 5 heads",
        ),
        (
            ["loss", "--weights=other.safetensors", "--tokens=tokens.bin"],
            "other.safetensors is not a GPT-2 model",
        ),
        (["loss", "--weights=lacks.safetensors", "--tokens=tokens.bin"], "h.1.mlp.c_fc.bias is missing"),
        (
            ["loss", "--weights=wrong.safetensors", "--tokens=tokens.bin"],
            "has shape (12,), expected shape (48,)",
        ),
        (
            ["loss", "--weights=flat.safetensors", "--tokens=tokens.bin"],
            "wte.weight has shape (600,), not 2-D",
        ),
        (
            ["loss", "--weights=model.safetensors", "--tokens=tokens.bin", "--heads=-2"],
            "the width 12 cannot be divided into -2 heads",
        ),
        (
            ["train", "--weights=model.safetensors", "--tokens=tokens.bin", "--out=none/x"],
            "none/x cannot be written",
        ),
        (
            ["loss", "--weights=more.safetensors", "--tokens=tokens.bin"],
            "unexpected tensors: h.0.extra",
        ),
    ],
)
def test_invalid_input_is_reported(folder, options, message):
    np.full(40, 50, "<u2").tofile(folder / "high.bin")
    np.zeros(5, "<u2").tofile(folder / "few.bin")
    weights = load_file(folder / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.bias"
    save_file({"x": weights[name]}, folder / "other.safetensors")
    save_file({k: v for k, v in weights.items() if k != name}, folder / "lacks.safetensors")
    save_file(weights | {name: weights[name][:12]}, folder / "wrong.safetensors")
    wte = "transformer.wte.weight"
    save_file(weights | {wte: weights[wte].reshape(-1)}, folder / "flat.safetensors")
    save_file(weights | {"transformer.h.0.extra": weights[name]}, folder / "more.safetensors")
    result = run(*options, cwd=folder)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr, (
        result.stderr
    )


def test_heads_are_read_from_config_json(saved, tmp_path):
    weights = load_file(saved[1] / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="set --heads"):  # the shapes do not show it
        reference.load(tmp_path / "model.safetensors")
    assert reference.load(tmp_path / "model.safetensors", 2).n_head == 2
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 3}))
    assert reference.load(tmp_path / "model.safetensors").n_head == 3
    assert reference.load(tmp_path / "model.safetensors", 4).n_head == 4
    for content in ("[]", '{"n_head": null}', '{"n_head": "x"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="set --heads"):
            reference.load(tmp_path / "model.safetensors")
    (tmp_path / "config.json").unlink()
    reference.PUBLISHED_SIZES = (*reference.PUBLISHED_SIZES, (2, 12))  # width 12 < 64
    assert reference.load(tmp_path / "model.safetensors").n_head == 1
    reference.PUBLISHED_SIZES = reference.PUBLISHED_SIZES[:-1]
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 3}))
    without_prefix = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    mask = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}  # as in the file of OpenAI's GPT-2
    save_file(without_prefix | mask, tmp_path / "bare.safetensors")
    assert reference.load(tmp_path / "bare.safetensors").n_layer == 2


@pytest.mark.parametrize(
    ("kind", "content"), [("<i4", "32 or 64 bits"), ("<i8", "32 or 64 bits"), ("text", "contains text")]
)
def test_tokens_of_another_dtype_are_refused(folder, kind, content):
    path = folder / "foreign.bin"
    if kind == "text":
        path.write_text("Era uma vez, olá. " * 50, encoding="utf-8")
    else:
        np.random.default_rng(0).integers(50, size=500).astype(kind).tofile(path)
    result = run("loss", "--weights=model.safetensors", "--tokens=foreign.bin", cwd=folder)
    assert result.returncode == 1 and content in result.stderr and "foreign.bin" in result.stderr


@pytest.mark.parametrize("content", [b"my text", b"", bytes(range(200))])
def test_train_overwrites_only_safetensors(folder, tmp_path, content):
    out = tmp_path / "prec.txt"
    out.write_bytes(content)
    options = ("--steps=1", "--block=8", f"--out={out}")
    result = run("train", "--weights=model.safetensors", "--tokens=tokens.bin", *options, cwd=folder)
    assert result.returncode == 1 and "choose another name for --out" in result.stderr
    assert out.read_bytes() == content
    save_file({"x": np.ones(1)}, out)
    result = run("train", "--weights=model.safetensors", "--tokens=tokens.bin", *options, cwd=folder)
    assert result.returncode == 0 and "wte.weight" in load_file(out)
