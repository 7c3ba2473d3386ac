"""AdamW and Muon against their formulas, gradient clipping, and saved state."""

import math

import numpy as np
import pytest
import torch

from fradique.nn import lora
from fradique.optim import muon as muon_module
from fradique.optim import optimizer
from model import GPT, GPTConfig


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8))


def adamw(model, weight_decay=0.1):
    return optimizer.build_optimizers(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay)


def muon(model, weight_decay=0.1):
    return optimizer.build_optimizers(
        model,
        name="muon",
        learning_rate=1e-2,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
        muon_learning_rate=0.02,
        muon_momentum=0.9,
    )


def step(model, optimizers, seed):
    torch.manual_seed(seed)
    idx = torch.randint(11, (3, 8))
    model(idx, idx)[1].backward()
    optimizer.assign_gradients(optimizers)
    for opt in optimizers:
        opt.step()
    model.zero_grad()


def test_weight_decay_applies_to_matrices_but_not_to_vectors():
    model = tiny_model()
    (opt,) = adamw(model)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
    decayed, not_decayed = (g["params"] for g in opt.param_groups)
    assert {id(p) for p in decayed} | {id(p) for p in not_decayed} == {id(p) for p in model.parameters()}
    assert all(p.dim() >= 2 for p in decayed) and all(p.dim() < 2 for p in not_decayed)
    assert len(decayed) == 2 + 4 * 2  # wte (tied), wpe, and four matrices per block


def test_frozen_parameters_are_not_optimized():
    model = tiny_model()
    model.transformer["wpe"].weight.requires_grad_(False)
    for build in (adamw, muon):
        groups = [g for opt in build(model) for g in opt.param_groups]
        assert not any(p is model.transformer["wpe"].weight for g in groups for p in g["params"])


def test_a_completely_frozen_model_raises():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        adamw(tiny_model().requires_grad_(False))


def test_a_step_of_adamw_equals_its_formula():
    model = tiny_model()
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    opt = adamw(model)
    torch.manual_seed(1)
    idx = torch.randint(11, (3, 8))
    model(idx, idx)[1].backward()
    gradients = {n: p.grad.double().clone() for n, p in model.named_parameters()}
    opt[0].step()
    for name, p in model.named_parameters():
        g, w = gradients[name], before[name]
        m, v = 0.1 * g, 0.05 * g * g  # the moments after the first step, from zero
        decayed = w * (1 - 1e-2 * (0.1 if p.dim() >= 2 else 0.0))
        expected = decayed - 1e-2 * (m / 0.1) / ((v / 0.05).sqrt() + 1e-8)
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_muon_updates_the_matrices_in_blocks_and_adamw_the_rest():
    model = tiny_model()
    muon_opt, adamw_opt = muon(model)
    assert isinstance(muon_opt, torch.optim.Muon) and isinstance(adamw_opt, torch.optim.AdamW)
    name_of = {id(p): n for n, p in model.named_parameters()}
    muon_names = {f"transformer.h.{n}.{layer}.weight" for n in (0, 1) for layer in
              ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip
    assert {name.partition("[")[0] for g in muon_opt.param_groups for name in g["param_names"]} == muon_names
    adamw_names = {name_of[id(p)] for g in adamw_opt.param_groups for p in g["params"]}
    assert adamw_names == set(name_of.values()) - muon_names
    assert {g["weight_decay"] for g in muon_opt.param_groups} == {0.1}


def orthogonal_factor(matrix):
    """The three steps of Polar Express for small matrices, applied to the singular values in float64."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(matrix) / 1.01
    for a, b, c in [(8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)]:
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


def test_steps_of_muon_equal_its_formula():
    model = tiny_model()
    before = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    start, momentum, opt = dict(before), {}, muon(model)
    for seed in range(2):
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)  # well conditioned, because the iteration runs in bfloat16
            if optimizer.is_block_parameter(name) and p.dim() == 2:
                g = p.grad.double().numpy()
                momentum[name] = 0.9 * momentum.get(name, 0.0) + 0.1 * g  # torch uses a running average
                matrices = 3 if "c_attn" in name else 1  # q, k and v are separate
                splits = np.split(0.1 * g + 0.9 * momentum[name], matrices)  # Nesterov's
                update = np.concatenate([orthogonal_factor(split) for split in splits])
                scale = 0.02 * max(1.0, p.shape[0] / matrices / p.shape[1]) ** 0.5
                before[name] = before[name] * (1 - 0.02 * 0.1) - scale * update
        optimizer.assign_gradients(opt)
        for single_optimizer in opt:
            single_optimizer.step()
    for name in momentum:
        actual = model.get_parameter(name).detach().double().numpy()
        error = np.linalg.norm(actual - before[name]) / np.linalg.norm(before[name] - start[name])
        assert error < 0.05, (name, error)


@pytest.mark.parametrize(
    ("m", "smallest", "low", "high"),
    [(256, 0.01, 0.72, 1.28), (257, 0.003, 0.80, 1.21), (4096, 0.003, 0.80, 1.21)],
)
def test_polar_express_brings_singular_values_close_to_1(m, smallest, low, high):
    """The polynomials of all steps, on a fine grid of singular values."""
    s = np.linspace(smallest, 1.0, 100_001)
    for a, b, c in next(steps for rows, steps in muon_module.POLAR_EXPRESS.items() if m <= rows):
        s = a * s + b * s**3 + c * s**5
    assert low <= s.min() and s.max() <= high


@pytest.mark.parametrize(("m", "n"), [(8, 8), (8, 15), (8, 16), (48, 192), (300, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalized_matrices_have_singular_values_near_1(m, n, dtype):
    """Also of matrices with a few strong directions, whose other singular values are 30 times as small."""
    for spread in (1.0, 30.0):
        torch.manual_seed(m + n)
        u, _, vt = torch.linalg.svd(torch.randn(3, m, n), full_matrices=False)
        s = torch.ones(m).div(spread)
        s[: m // 8] = 1.0
        update = muon_module.orthogonalize((u * s @ vt).to(dtype)).float()
        values = torch.linalg.svdvals(update)
        tolerance = 0.03 if dtype == torch.float32 else 0.15
        assert 0.7 - tolerance < values.min() and values.max() < 1.27 + tolerance
        rotated = u.mT @ update @ vt.mT  # diagonal: the singular vectors stay
        assert (rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))).abs().max() < 0.01 + tolerance


@pytest.mark.parametrize("batch_elements", [1 << 24, 300])
def test_batched_updates_equal_those_of_torchs_muon(batch_elements, monkeypatch):
    monkeypatch.setattr(muon_module, "MAX_BATCH_ELEMENTS", batch_elements)
    jordans_steps = ((3.4445, -4.7750, 2.0315),) * 5  # those of torch
    monkeypatch.setattr(muon_module, "POLAR_EXPRESS", {math.inf: jordans_steps})
    monkeypatch.setattr(muon_module, "SAFETY", 1.0)
    model = tiny_model()
    (opt, _), copies, initial = muon(model), {}, {}
    for name, matrix in zip(opt.param_groups[0]["param_names"], opt.param_groups[0]["params"], strict=True):
        copies[name] = torch.nn.Parameter(matrix.detach().clone())
        initial[name] = matrix.detach().clone()
    torch_muon = torch.optim.Muon(copies.values(), lr=0.02, momentum=0.9, weight_decay=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.assign_gradients([opt])
        for matrix, copy in zip(opt.param_groups[0]["params"], copies.values(), strict=True):
            copy.grad = matrix.grad.clone()
        opt.step()
        torch_muon.step()
    for matrix, (name, copy) in zip(opt.param_groups[0]["params"], copies.items(), strict=True):
        torch.testing.assert_close(matrix, copy, rtol=0, atol=1e-4)  # bfloat16 rounds differently
        assert (matrix - initial[name]).abs().max() > 1e-3
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    optimizer.assign_gradients([opt])
    opt.step()  # without gradients nothing changes, not even by weight decay
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_muon_splits_gate_and_value_but_not_lora_matrices():
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, n_kv_head=1, activation="swiglu"
        )
    )
    shapes = {
        name: tuple(p.shape)
        for group in muon(model)[0].param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    attention = [shapes[f"transformer.h.0.attn.c_attn.weight[{i}]"] for i in range(3)]
    assert attention == [(8, 8), (4, 8), (4, 8)]
    assert [shapes[f"transformer.h.0.mlp.c_fc.weight[{i}]"] for i in range(2)] == [(24, 8), (24, 8)]
    lora.add_lora(model, 2, 4.0, "c_attn")
    (muon_optimizer,) = muon(model)
    assert muon_optimizer.param_groups[0]["param_names"] == [
        f"transformer.h.0.attn.c_attn.lora_{matrix}" for matrix in "ab"
    ]


@pytest.mark.parametrize("build", [adamw, muon])
def test_training_continues_identically_with_loaded_state(build):
    first = tiny_model()
    first_opt = build(first)
    for seed in range(3):
        step(first, first_opt, seed)
    second = tiny_model(seed=5)
    second.load_state_dict(first.state_dict())
    second_opt = build(second)
    state = {k: v.clone() for k, v in optimizer.state_by_name(first_opt).items()}
    assert "exp_avg/transformer.wte.weight" in state
    field = "momentum_buffer" if build is muon else "exp_avg"
    assert f"{field}/transformer.h.0.attn.c_attn.weight{'[2]' if build is muon else ''}" in state
    optimizer.load_state_by_name(second_opt, state)
    for seed in range(3, 6):
        step(first, first_opt, seed)
        step(second, second_opt, seed)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_the_state_of_another_model_raises():
    model = tiny_model()
    opt = adamw(model)
    step(model, opt, 0)
    state = optimizer.state_by_name(opt)
    state["exp_avg/transformer.h.9.ln_1.weight"] = torch.zeros(8)
    for field in ("exp_avg", "exp_avg_sq", "step"):
        del state[f"{field}/transformer.wpe.weight"]
    with pytest.raises(
        ValueError, match=r"missing: transformer.wpe.weight; not in the model: transformer.h.9"
    ):
        optimizer.load_state_by_name(opt, state)


def test_setting_the_learning_rate_scales_muons_in_proportion():
    (opt,) = adamw(tiny_model())
    optimizer.set_learning_rate([opt], 0.25)
    assert [g["lr"] for g in opt.param_groups] == [0.25, 0.25]
    optimizers = muon(tiny_model())
    optimizer.set_learning_rate(optimizers, 0.005)  # half of the peak
    assert [g["lr"] for opt in optimizers for g in opt.param_groups] == [0.01, 0.005, 0.005]


@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1e3])
def test_clipping_equals_torchs(max_norm):
    """Bit for bit, also if no gradient is scaled."""
    ours, theirs = tiny_model(), tiny_model()
    for model in (ours, theirs):
        torch.manual_seed(1)
        idx = torch.randint(11, (3, 8))
        model(idx, idx)[1].backward()
    norm = optimizer.clip_gradients(ours, max_norm)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf")))
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_the_norm_of_nan_gradients_is_nan():
    model = tiny_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    assert optimizer.clip_gradients(model, 1.0).isnan()


def test_the_norm_of_large_gradients_is_over_all_elements(monkeypatch):
    monkeypatch.setattr(optimizer, "MIN_CHUNKED_NUMEL", 64)
    shapes = (16, 8), (13, 7), (3,)  # split into rows, not divisible, small
    model = torch.nn.ParameterList(torch.zeros(shape) for shape in shapes)
    for seed, p in enumerate(model):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    square = sum(p.grad.double().square().sum() for p in model)
    torch.testing.assert_close(optimizer.clip_gradients(model, 0.0).double(), square.sqrt())
