import numpy as np
import pytest
import torch

from fradique.nn import lora
from fradique.optim import muon as muon_module
from fradique.optim import optimizer
from model import GPT, GPTConfig


def tiny(seed=0):
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


def step(model, opt, seed):
    torch.manual_seed(seed)
    idx = torch.randint(11, (3, 8))
    model(idx, idx)[1].backward()
    optimizer.assign_gradients(opt)
    for one in opt:
        one.step()
    model.zero_grad()


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = tiny()
    (opt,) = adamw(model)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
    decayed, free = (g["params"] for g in opt.param_groups)
    assert {id(p) for p in decayed} | {id(p) for p in free} == {id(p) for p in model.parameters()}
    assert all(p.dim() >= 2 for p in decayed) and all(p.dim() < 2 for p in free)
    assert len(decayed) == 2 + 4 * 2  # wte (tied), wpe, and four matrices a block


def test_frozen_parameters_are_left_out():
    model = tiny()
    model.transformer["wpe"].weight.requires_grad_(False)
    for build in (adamw, muon):
        groups = [g for one in build(model) for g in one.param_groups]
        assert not any(p is model.transformer["wpe"].weight for g in groups for p in g["params"])


def test_a_model_that_is_frozen_altogether_is_refused():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        adamw(tiny().requires_grad_(False))


def test_a_step_equals_adamw_written_out():
    model = tiny()
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


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = tiny()
    first, second = muon(model)
    assert isinstance(first, torch.optim.Muon) and isinstance(second, torch.optim.AdamW)
    name_of = {id(p): n for n, p in model.named_parameters()}
    inside = {f"transformer.h.{n}.{part}.weight" for n in (0, 1) for part in
              ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip
    assert {name.partition("[")[0] for g in first.param_groups for name in g["param_names"]} == inside
    outside = {name_of[id(p)] for g in second.param_groups for p in g["params"]}
    assert outside == set(name_of.values()) - inside
    assert {g["weight_decay"] for g in first.param_groups} == {0.1}


def newton_schulz(matrix):
    """Muon's quintic iteration (Jordan et al. 2024) in float64: near the nearest orthogonal matrix."""
    x = matrix / np.linalg.norm(matrix)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def test_a_step_equals_muon_written_out():
    model = tiny()
    before = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    start, momentum, opt = dict(before), {}, muon(model)
    for seed in range(2):
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)  # well conditioned: torch's iteration runs in bfloat16
            if optimizer.is_block_parameter(name) and p.dim() == 2:
                g = p.grad.double().numpy()
                momentum[name] = 0.9 * momentum.get(name, 0.0) + 0.1 * g  # as torch has it: a mean
                matrices = 3 if "c_attn" in name else 1  # q, k and v, each by itself
                parts = np.split(0.1 * g + 0.9 * momentum[name], matrices)  # Nesterov's
                update = np.concatenate([newton_schulz(part) for part in parts])
                scale = 0.02 * max(1.0, p.shape[0] / matrices / p.shape[1]) ** 0.5
                before[name] = before[name] * (1 - 0.02 * 0.1) - scale * update
        optimizer.assign_gradients(opt)
        for one in opt:
            one.step()
    for name in momentum:
        found = model.get_parameter(name).detach().double().numpy()
        wrong = np.linalg.norm(found - before[name]) / np.linalg.norm(before[name] - start[name])
        assert wrong < 0.05, (name, wrong)


@pytest.mark.parametrize("together", [1 << 24, 300])
def test_matrices_of_one_shape_together_get_the_updates_that_torch_gives_each(together, monkeypatch):
    monkeypatch.setattr(muon_module, "MAX_BATCH_ELEMENTS", together)
    model = tiny()
    (opt, _), truth = muon(model), {}
    for name, part in zip(opt.param_groups[0]["param_names"], opt.param_groups[0]["params"], strict=True):
        truth[name] = torch.nn.Parameter(part.detach().clone())
    theirs = torch.optim.Muon(truth.values(), lr=0.02, momentum=0.9, weight_decay=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.assign_gradients([opt])
        for part, copy in zip(opt.param_groups[0]["params"], truth.values(), strict=True):
            copy.grad = part.grad.clone()
        opt.step()
        theirs.step()
    for part, copy in zip(opt.param_groups[0]["params"], truth.values(), strict=True):
        torch.testing.assert_close(part, copy, rtol=0, atol=1e-4)  # rounding in bfloat16 may fall otherwise
        assert not torch.equal(part.detach(), torch.zeros_like(part))
    for p in model.parameters():
        p.grad = None
    optimizer.assign_gradients([opt])
    opt.step()  # nothing to do


def test_gate_and_value_are_two_matrices_for_muon_and_lora_s_are_whole():
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
    (only,) = muon(model)
    assert only.param_groups[0]["param_names"] == [
        f"transformer.h.0.attn.c_attn.lora_{matrix}" for matrix in "ab"
    ]


@pytest.mark.parametrize("build", [adamw, muon])
def test_state_by_name_survives_a_round_trip_and_training_goes_on_bit_for_bit(build):
    one = tiny()
    opt_one = build(one)
    for seed in range(3):
        step(one, opt_one, seed)
    two = tiny(seed=5)
    two.load_state_dict(one.state_dict())
    opt_two = build(two)
    state = {k: v.clone() for k, v in optimizer.state_by_name(opt_one).items()}
    assert "exp_avg/transformer.wte.weight" in state
    kept = "momentum_buffer" if build is muon else "exp_avg"
    assert f"{kept}/transformer.h.0.attn.c_attn.weight{'[2]' if build is muon else ''}" in state
    optimizer.load_state_by_name(opt_two, state)
    for seed in range(3, 6):
        step(one, opt_one, seed)
        step(two, opt_two, seed)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_model_is_refused_by_name():
    model = tiny()
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


def test_the_learning_rate_is_set_in_every_group_and_muon_s_in_proportion():
    (opt,) = adamw(tiny())
    optimizer.set_learning_rate([opt], 0.25)
    assert [g["lr"] for g in opt.param_groups] == [0.25, 0.25]
    both = muon(tiny())
    optimizer.set_learning_rate(both, 0.005)  # half of the peak
    assert [g["lr"] for one in both for g in one.param_groups] == [0.01, 0.005, 0.005]


@pytest.mark.parametrize("largest", [0.0, 1e-3, 1e3])
def test_gradients_are_clipped_as_torch_does(largest):
    """To the last bit, also where there is nothing to scale."""
    ours, theirs = tiny(), tiny()
    for model in (ours, theirs):
        torch.manual_seed(1)
        idx = torch.randint(11, (3, 8))
        model(idx, idx)[1].backward()
    norm = optimizer.clip_gradients(ours, largest)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), largest or float("inf")))
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_gradients_that_are_not_finite_are_not_hidden():
    model = tiny()
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    assert optimizer.clip_gradients(model, 1.0).isnan()


def test_the_norm_of_large_gradients_is_that_of_all_their_numbers(monkeypatch):
    monkeypatch.setattr(optimizer, "LARGE_TENSOR", 64)
    shapes = (16, 8), (13, 7), (3,)  # in rows, no rows of one length, small
    model = torch.nn.ParameterList(torch.zeros(shape) for shape in shapes)
    for seed, p in enumerate(model):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    square = sum(p.grad.double().square().sum() for p in model)
    torch.testing.assert_close(optimizer.clip_gradients(model, 0.0).double(), square.sqrt())
