"""Every file of config/arch: its settings, causality, training, compilation and low precision."""

import re
from dataclasses import replace

import pytest
import torch
from architectures import ARCH, NAMES, gradients, ids, max_abs, random_model, small
from support import ROOT

from configurator import resolve
from model import GPT, GPTConfig
from train import TrainSettings

SAME_ACTIVATION = {"gelu_tanh": "gelu"}  # EXPECTED does not distinguish these
EXPECTED = {  # norm, norm_place, position, activation, bias, and other settings that are not the default
    "gpt2": ("layernorm", "pre", "learned", "gelu", True, {}),
    "gpt3": ("layernorm", "pre", "learned", "gelu", True, {}),
    "pangu": ("layernorm", "pre", "learned", "gelu", True, {}),
    "jurassic1": ("layernorm", "pre", "learned", "gelu", True, {}),
    "mt_nlg": ("layernorm", "pre", "learned", "gelu", True, {}),
    "opt": ("layernorm", "pre", "learned", "relu", True, {}),
    "palm": ("layernorm", "pre", "rope", "swiglu", False, {"parallel_block": True, "n_kv_head": 1}),
    "bloom": ("layernorm", "pre", "alibi", "gelu", True, {"embd_norm": True}),
    "gopher": ("rmsnorm", "pre", "relative", "gelu", True, {}),
    "chinchilla": ("rmsnorm", "pre", "relative", "gelu", True, {}),
    "galactica": ("layernorm", "pre", "learned", "gelu", False, {}),
    "lamda": ("layernorm", "pre", "relative", "geglu", True, {}),
    "llama": ("rmsnorm", "pre", "rope", "swiglu", False, {"tie_weights": False}),
    "glm130b": ("layernorm", "deepnorm", "rope", "geglu", True, {"prefix_len": 4}),
    "vaswani": ("layernorm", "post", "sinusoidal", "relu", True, {}),
    "modern": ("rmsnorm", "pre", "rope", "relu2", False, {"qk_norm": True}),
}


def test_every_architecture_has_a_config_file():
    assert sorted(EXPECTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_config_files_set_exactly_the_expected_values(name, architecture):
    norm, norm_place, position, activation, bias, changes = EXPECTED[name]
    config = architecture(name)
    assert SAME_ACTIVATION.get(config.activation, config.activation) == activation
    expected = small(norm=norm, norm_place=norm_place, position=position, bias=bias, **changes)
    assert replace(config, activation="gelu") == expected


NON_DEFAULT = {
    "n_layer": 3,
    "n_head": 2,
    "n_embd": 48,
    "bias": True,
    "activation": "swiglu",
    "n_inner": 72,
    "n_kv_head": 1,
    "position": "alibi",
    "rope_theta": 500.0,
    "norm": "rmsnorm",
    "norm_place": "post",
    "qk_norm": True,
    "embd_norm": True,
    "parallel_block": True,
    "prefix_len": 3,
    "sliding_window": 5,
    "tie_weights": False,
    "logit_softcap": 15.0,
    "ngram_max": 3,
    "ngram_rows": 100,
    "ngram_dropout": 0.3,
}


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_file_overrides_every_model_setting(name, tmp_path):
    title, *lines = (ARCH / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert re.match(r"# \w+", title)
    assert any(f"config/arch/{name}.py" in line for line in lines)
    assert 'reset("architecture")' in lines
    training = tmp_path / "train.py"
    training.write_text("\n".join(f"{key} = {value!r}" for key, value in NON_DEFAULT.items()))
    argv = [str(training), str(ARCH / f"{name}.py")]
    resolved = resolve(TrainSettings, argv)
    model_settings = set(GPTConfig.names()) - {"block_size", "vocab_size", "dropout", "flash"}
    assert {key for key, source in resolved.sources.items() if source == argv[1]} == model_settings
    without_training_config = resolve(TrainSettings, argv[1:]).settings
    assert all(
        getattr(resolved.settings, key) == getattr(without_training_config, key) for key in model_settings
    )


@pytest.mark.parametrize(
    "training", ["train_eca_char", "train_machado_char_cpu_modern", "train_shakespeare_char"]
)
@pytest.mark.parametrize("name", NAMES)
def test_config_files_combine_with_training_configs(name, training):
    argv = [str(ROOT / "config" / f"{training}.py"), str(ARCH / f"{name}.py")]
    settings = resolve(TrainSettings, argv).settings
    assert (settings.n_layer, settings.n_head, settings.n_embd) == (4, 4, 128)
    if name == "glm130b":
        assert 0 < settings.prefix_len <= settings.block_size // 2
    else:
        assert settings.prefix_len == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_token_changes_only_later_and_prefix_logits(name, architecture):
    config = architecture(name)
    model, idx = random_model(config), ids(2, 16)
    before = model(idx, idx)[0]
    for t in range(config.prefix_len, 16):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1 + ids(2, 16 - t) % 30) % 31
        after = model(changed, changed)[0]
        assert torch.equal(after[:, :t], before[:, :t])  # bit for bit
        assert not torch.equal(after[:, t], before[:, t])
    for t in range(16):  # a token changes the logits from its position on; one in the prefix changes all
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 31
        affected = (model(changed, changed)[0] != before).any(-1).all(0).tolist()
        assert affected == [s >= t or t < config.prefix_len for s in range(16)]


@pytest.mark.parametrize("name", NAMES)
def test_fused_and_plain_attention_agree_in_every_architecture(name, architecture):
    fused, plain = (random_model(architecture(name, flash=flash)) for flash in (True, False))
    idx, targets = ids(2, 16), ids(2, 16, seed=4)
    (logits, loss), (expected, expected_loss) = fused(idx, targets), plain(idx, targets)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    grads, expected_grads = gradients(fused, loss), gradients(plain, expected_loss)
    for key, grad in expected_grads.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-5 * max_abs(expected_grads), msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_training_reduces_the_loss_and_overfits_a_batch(name, architecture):
    torch.manual_seed(0)
    model, idx = GPT(architecture(name)), ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[19] < 0.9 * losses[0]
    assert losses[-1] < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_is_one_graph_and_equals_eager(name, architecture):
    model, idx, targets = random_model(architecture(name, n_layer=1)), ids(2, 16), ids(2, 16, seed=4)
    logits, loss = model(idx, targets)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, actual_loss = compiled(idx, targets)
    torch.testing.assert_close(actual, logits, rtol=0, atol=2e-5)
    assert actual_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    expected, grads = gradients(model, loss), gradients(model, actual_loss)
    for key, grad in expected.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-5 * max_abs(expected), msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_runs_in_bfloat16_and_autocast(name, architecture):
    model, idx = random_model(architecture(name), std=0.05), ids(2, 16)
    expected = model(idx, idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low_precision, tokens = model(idx, idx)[0], model.generate(idx[:, :5], 20, temperature=0)
    assert tokens.shape == (2, 25)
    torch.testing.assert_close(low_precision.float(), expected, rtol=0, atol=0.05)
    model.to(torch.bfloat16)
    torch.testing.assert_close(model(idx, idx)[0].float(), expected, rtol=0, atol=0.05)
    assert model.generate(idx[:, :5], 20, temperature=0).shape == (2, 25)
