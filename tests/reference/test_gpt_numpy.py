"""reference/gpt_numpy.py against transformers' GPT-2 and the project's own model under autograd."""

import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from gpt2_oracle import SIZES, gpt2, loss_of
from mutants import mutants
from safetensors.numpy import load_file, save_file
from support import ROOT, imported_names

from model import GPT, GPTConfig

FILE = ROOT / "reference" / "gpt_numpy.py"


def written(source: str) -> types.ModuleType:
    module = types.ModuleType("gpt_numpy")
    exec(compile(source, str(FILE), "exec"), module.__dict__)
    return module


reference = written(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    return gpt2(folder), folder


@pytest.fixture
def both(saved):
    """The GPT-2 of transformers, and the reference's, which read it from the file."""
    theirs, folder = saved
    theirs.zero_grad()
    return theirs, reference.load(folder / "model.safetensors")


def batch(seed=1, B=3, T=9):
    ids = np.random.default_rng(seed).integers(SIZES["vocab_size"], size=(B, T + 1))
    return ids[:, :-1], ids[:, 1:]


def far(gradients, named) -> dict[str, float]:
    """How far each gradient is from that of the parameter of the same name, relative to its size."""
    apart = {}
    for name, gradient in gradients.items():
        theirs = named[name].grad.numpy()
        apart[name] = float(np.linalg.norm(gradient - theirs) / np.linalg.norm(theirs))
    return apart


def test_logits_loss_and_every_gradient_are_those_of_transformers(both):
    theirs, ours = both
    ids, targets = batch()
    logits, loss = loss_of(theirs, ids, targets)
    loss.backward()
    x, _ = ours.forward(ids)
    assert ours.logits(x) == pytest.approx(logits.detach().flatten(0, 1).numpy(), abs=1e-4)
    measured, gradients = ours.gradients(ids, targets)
    assert measured == pytest.approx(loss.item(), abs=1e-5)
    assert ours.loss(ids, targets) == pytest.approx(loss.item(), abs=1e-5)
    named = dict(theirs.transformer.named_parameters())
    assert set(gradients) == set(named) == set(ours.weights)
    apart = far(gradients, named)
    assert all(distance < 1e-3 for distance in apart.values()), apart  # and none is no number


def own_model(ours) -> GPT:
    """The project's model with the reference's weights."""
    c = SIZES
    config = GPTConfig(
        vocab_size=c["vocab_size"], block_size=c["n_positions"], n_layer=c["n_layer"], n_head=c["n_head"],
        n_embd=c["n_embd"], activation="gelu_tanh",
    )  # fmt: skip
    model = GPT(config)
    state = {}
    for name, weight in ours.weights.items():
        turned = weight.T if weight.ndim == 2 and "h." in name else weight
        state["transformer." + name] = torch.from_numpy(turned.copy())
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return model


def test_logits_loss_and_every_gradient_are_those_of_the_model(both):
    ours = both[1]
    model = own_model(ours)
    ids, targets = batch(2)
    logits, loss = model(torch.from_numpy(ids), torch.from_numpy(targets.copy()))
    loss.backward()
    measured, gradients = ours.gradients(ids, targets)
    assert measured == pytest.approx(loss.item(), abs=1e-5)
    x, _ = ours.forward(ids)
    assert ours.logits(x) == pytest.approx(logits.detach().flatten(0, 1).numpy(), abs=1e-4)
    for name, parameter in model.named_parameters():
        theirs = parameter.grad.numpy()
        mine = gradients[name.removeprefix("transformer.")]
        mine = mine.T if mine.ndim == 2 and ".h." in name else mine
        assert np.linalg.norm(mine - theirs) < 1e-3 * np.linalg.norm(theirs), name


def test_ten_steps_of_adamw_follow_torch(both):
    ours = both[1]
    model = own_model(ours)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer = reference.AdamW(ours.weights)
    losses = []
    for step in range(10):
        ids, targets = batch(step)
        _, loss = model(torch.from_numpy(ids), torch.from_numpy(targets.copy()))
        torchs.zero_grad()
        loss.backward()
        torchs.step()
        measured, gradients = ours.gradients(ids, targets)
        optimizer.step(gradients, 1e-2)
        losses.append((measured, loss.item()))
    assert all(abs(mine - torchs_) < 1e-4 for mine, torchs_ in losses), losses


@pytest.mark.parametrize("count", [8, 13])
def test_it_writes_what_transformers_writes(both, count):
    theirs, ours = both
    prompt = [5, 31, 7]
    expected = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 3),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    assert ours.generate(prompt, count) == expected[0, 3:].tolist()


@pytest.mark.parametrize("begin", [3, 16, 17, 40])
def test_past_the_block_it_writes_what_half_a_block_foretells(both, begin):
    """Without the cache, by whole forward passes: the block is 16, so after 16 tokens the last 8 are read."""
    theirs, ours = both
    prompt = np.random.default_rng(begin).integers(50, size=begin).tolist()
    written_, window = list(prompt), min(begin, 16)
    for _ in range(30):
        if window > 16:
            window = 8
        with torch.no_grad():
            logits = theirs(torch.tensor([written_[-window:]])).logits[0, -1]
        written_.append(int(logits.argmax()))
        window += 1
    assert ours.generate(prompt, 30) == written_[begin:]
    assert len(set(written_)) > 7


def test_what_is_drawn_has_the_probabilities_of_the_model(both):
    theirs, ours = both
    with torch.no_grad():
        logits = theirs(torch.tensor([[5, 31]])).logits[0, -1] / 0.7
    best = logits.topk(4)
    expected = best.values.softmax(0)
    drawn = [ours.generate([5, 31], 1, temperature=0.7, top_k=4, seed=seed)[0] for seed in range(800)]
    assert set(drawn) <= set(best.indices.tolist())
    for token, p in zip(best.indices.tolist(), expected.tolist(), strict=True):
        assert drawn.count(token) / 800 == pytest.approx(p, abs=0.07)


def test_a_loss_is_right_where_a_probability_is_too_small_for_a_float():
    logits = np.array([[0, 200, 100], [5, 5, -300]], np.float32)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits.copy()).double(), torch.tensor([0, 2])
    )
    loss, p = reference.cross_entropy(logits, np.array([0, 2]))
    assert loss == pytest.approx(expected.item(), abs=1e-4) and p[0, 0] == 0 and p[0, 1] == 1


def test_a_block_of_one_token_writes_too(tmp_path):
    theirs = gpt2(tmp_path, n_positions=1)
    ours = reference.load(tmp_path / "model.safetensors")
    expected = [5]
    for _ in range(4):
        with torch.no_grad():
            expected.append(int(theirs(torch.tensor([expected[-1:]])).logits[0, -1].argmax()))
    assert ours.generate([5], 4) == expected[1:]


def test_it_imports_numpy_and_safetensors_alone():
    packages = {name.split(".")[0] for name in imported_names(FILE)}
    assert packages - set(sys.stdlib_module_names) == {"numpy", "safetensors"}


def test_a_wrong_sign_in_any_backward_pass_is_noticed(both):
    theirs, ours = both
    ids, targets = batch()
    loss_of(theirs, ids, targets)[1].backward()
    named = dict(theirs.transformer.named_parameters())
    unseen, count = [], 0
    for what, source in mutants(FILE.read_text(encoding="utf-8")):
        mutant, count = written(source).GPT2(ours.weights, ours.n_head), count + 1
        with np.errstate(all="ignore"):
            apart = far(mutant.gradients(ids, targets)[1], named)
        if all(distance < 1e-3 for distance in apart.values()):
            unseen.append(what)
    assert not unseen
    assert count >= 38


# The command


def run(*options, cwd):
    command = [sys.executable, str(FILE), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def folder(saved):
    """Weights and, in tokens.bin, 100 tokens."""
    np.random.default_rng(3).integers(50, size=100).astype("<u2").tofile(saved[1] / "tokens.bin")
    return saved[1]


def test_the_command_measures_the_loss_of_a_file(both, folder):
    result = run(
        "loss", "--weights=model.safetensors", "--tokens=tokens.bin", "--block=8", "--batch=5", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    tokens = np.fromfile(folder / "tokens.bin", "<u2").astype(np.int64)
    _, expected = loss_of(both[0], tokens[:96].reshape(12, 8), tokens[1:97].reshape(12, 8))
    assert float(re.search(r"loss ([\d.]+)", result.stdout).group(1)) == pytest.approx(
        expected.item(), abs=1e-5
    )


def test_the_command_trains_and_what_it_writes_is_a_gpt2(folder, tmp_path):
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


def test_the_command_writes(both, folder):
    result = run("generate", "--weights=model.safetensors", "--ids=5,31,7", "--count=6", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert [int(part) for part in result.stdout.split(",")] == both[1].generate([5, 31, 7], 6)
    result = run("generate", "--weights=model.safetensors", "--tokens=tokens.bin", "--count=2", cwd=folder)
    assert result.returncode == 0 and result.stdout.count(",") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["loss", "--weights=none.safetensors", "--tokens=tokens.bin"], "none.safetensors cannot be read"),
        (["loss", "--weights=tokens.bin", "--tokens=tokens.bin"], "tokens.bin cannot be read as safetensors"),
        (["loss", "--weights=model.safetensors", "--tokens=none.bin"], "none.bin"),
        (["loss", "--weights=model.safetensors"], "loss needs --tokens"),
        (
            ["loss", "--weights=model.safetensors", "--tokens=high.bin"],
            "holds the token 50, and the model knows 50",
        ),
        (
            ["loss", "--weights=model.safetensors", "--tokens=few.bin"],
            "few.bin holds 5 tokens, and 17 are needed",
        ),
        (
            ["loss", "--weights=model.safetensors", "--tokens=few.bin", "--block=17"],
            "--block must be 1 to 16",
        ),
        (["generate", "--weights=model.safetensors"], "generate needs something to begin with"),
        (
            ["generate", "--weights=model.safetensors", "--ids=3,50"],
            "the model knows 50 tokens, and 50 is none",
        ),
        (["generate", "--weights=model.safetensors", "--ids=3,x"], "--ids=3,x: whole numbers"),
        (["generate", "--weights=model.safetensors", "--ids=3", "--heads=5"], "does not go into 5 heads"),
        (["loss", "--weights=other.safetensors", "--tokens=tokens.bin"], "other.safetensors holds no GPT-2"),
        (["loss", "--weights=lacks.safetensors", "--tokens=tokens.bin"], "h.1.mlp.c_fc.bias is missing"),
        (
            ["loss", "--weights=wrong.safetensors", "--tokens=tokens.bin"],
            "has the shape (12,), and (48,) is needed",
        ),
        (["loss", "--weights=flat.safetensors", "--tokens=tokens.bin"], "wte.weight has the shape (600,)"),
        (
            ["loss", "--weights=model.safetensors", "--tokens=tokens.bin", "--heads=-2"],
            "does not go into -2 heads",
        ),
        (
            ["train", "--weights=model.safetensors", "--tokens=tokens.bin", "--out=none/x"],
            "none/x cannot be written",
        ),
        (
            ["loss", "--weights=more.safetensors", "--tokens=tokens.bin"],
            "holds what GPT-2 has not: h.0.extra",
        ),
    ],
)
def test_bad_input_gets_a_message(folder, options, words):
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
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr, (
        result.stderr
    )


def test_heads_are_those_of_the_config_beside_the_weights(saved, tmp_path):
    weights = load_file(saved[1] / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    assert reference.load(tmp_path / "model.safetensors").n_head == 1  # as wide as 64, or one
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 3}))
    assert reference.load(tmp_path / "model.safetensors").n_head == 3
    assert reference.load(tmp_path / "model.safetensors", 4).n_head == 4
    for odd in ("[]", '{"n_head": null}', '{"n_head": "x"}'):
        (tmp_path / "config.json").write_text(odd)
        assert reference.load(tmp_path / "model.safetensors").n_head == 1
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    mask = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}  # as in the file that OpenAI's GPT-2 comes in
    save_file(bare | mask, tmp_path / "bare.safetensors")
    assert reference.load(tmp_path / "bare.safetensors").n_layer == 2
