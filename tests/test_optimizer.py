import pytest
import torch

from fradique import optimizer
from model import GPT, GPTConfig


def tiny(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8))


def adamw(model, weight_decay=0.1):
    return optimizer.build(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay)


def step(model, opt, seed):
    torch.manual_seed(seed)
    idx = torch.randint(11, (3, 8))
    model(idx, idx)[1].backward()
    opt.step()
    opt.zero_grad()


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = tiny()
    decayed, free = (g["params"] for g in optimizer.parameter_groups(model, 0.1))
    assert {id(p) for p in decayed} | {id(p) for p in free} == {id(p) for p in model.parameters()}
    assert all(p.dim() >= 2 for p in decayed) and all(p.dim() < 2 for p in free)
    assert len(decayed) == 2 + 4 * 2  # wte (tied), wpe, and four matrices a block


def test_frozen_parameters_are_left_out():
    model = tiny()
    model.transformer["wpe"].weight.requires_grad_(False)
    groups = optimizer.parameter_groups(model, 0.1)
    assert not any(p is model.transformer["wpe"].weight for g in groups for p in g["params"])


def test_a_step_equals_adamw_written_out():
    model = tiny()
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    opt = adamw(model)
    torch.manual_seed(1)
    idx = torch.randint(11, (3, 8))
    model(idx, idx)[1].backward()
    gradients = {n: p.grad.double().clone() for n, p in model.named_parameters()}
    opt.step()
    for name, p in model.named_parameters():
        g, w = gradients[name], before[name]
        m, v = 0.1 * g, 0.05 * g * g  # the moments after the first step, from zero
        decayed = w * (1 - 1e-2 * (0.1 if p.dim() >= 2 else 0.0))
        expected = decayed - 1e-2 * (m / 0.1) / ((v / 0.05).sqrt() + 1e-8)
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_state_by_name_survives_a_round_trip_and_training_goes_on_bit_for_bit():
    one = tiny()
    opt_one = adamw(one)
    for seed in range(3):
        step(one, opt_one, seed)
    two = tiny(seed=5)
    two.load_state_dict(one.state_dict())
    opt_two = adamw(two)
    state = {k: v.clone() for k, v in optimizer.state_by_name(one, opt_one).items()}
    assert "exp_avg/transformer.h.0.attn.c_attn.weight" in state
    optimizer.load_state_by_name(two, opt_two, state)
    for seed in range(3, 6):
        step(one, opt_one, seed)
        step(two, opt_two, seed)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_model_is_refused_by_name():
    model = tiny()
    opt = adamw(model)
    step(model, opt, 0)
    state = optimizer.state_by_name(model, opt)
    state["exp_avg/transformer.h.9.ln_1.weight"] = torch.zeros(8)
    for field in ("exp_avg", "exp_avg_sq", "step"):
        del state[f"{field}/transformer.wpe.weight"]
    with pytest.raises(
        ValueError, match=r"missing: transformer.wpe.weight; not in the model: transformer.h.9"
    ):
        optimizer.load_state_by_name(model, opt, state)


def test_the_learning_rate_is_set_in_every_group():
    opt = adamw(tiny())
    optimizer.set_learning_rate(opt, 0.25)
    assert [g["lr"] for g in opt.param_groups] == [0.25, 0.25]
