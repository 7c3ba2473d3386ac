"""The model against arithmetic written out, transformers' samplers, and its own plain paths."""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import generation

from fradique.generation.generate import window_start
from fradique.generation.kv_cache import KVCache
from fradique.generation.sampling import filter_logits, penalize_repetition, sample_token
from fradique.nn import attention, functional
from model import GPT, GPTConfig, plain_attention

TINY = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
steady = settings(derandomize=True, deadline=None, max_examples=100, database=None)


def tiny(seed=0, spread=0.3, **changes):
    """A model whose every parameter is random, so that no bias is 0 and no norm is 1."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**vars(TINY) | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def ids(*shape, vocab_size=31, seed=3):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


# The configuration


def test_a_config_tells_all_its_problems_at_once():
    sizes = {"block_size": 0, "vocab_size": -1, "n_layer": 0, "n_head": 0, "n_embd": 0}
    config = GPTConfig(**sizes, dropout=1.0, activation="sin")
    problems = config.problems()
    for name in [*sizes, "dropout", "activation"]:
        assert sum(problem.startswith(f"{name} = ") for problem in problems) == 1
    with pytest.raises(ValueError) as told:
        GPT(config)
    assert all(problem in str(told.value) for problem in problems)
    assert GPTConfig().problems() == [] and TINY.problems() == []


@pytest.mark.parametrize(
    ("n_embd", "n_head", "near"), [(10, 4, "8 or 12"), (3, 4, "4"), (770, 12, "768 or 780")]
)
def test_a_width_that_the_heads_do_not_divide_is_told_with_one_that_they_do(n_embd, n_head, near):
    (problem,) = GPTConfig(n_embd=n_embd, n_head=n_head).problems()
    assert f"not divisible by n_head = {n_head}" in problem and f"(use n_embd = {near})" in problem


def test_the_names_of_the_config_are_its_fields():
    assert GPTConfig.names() == list(vars(GPTConfig()))


# Parameters


def test_gpt2_has_as_many_parameters_as_the_paper_s_model():
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig(vocab_size=50257))
    assert gpt2.num_params(non_embedding=False) == 124_439_808
    assert gpt2.num_params() == 124_439_808 - 1024 * 768


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_as_many_as_the_closed_formula_says(bias):
    V, T, C, L = 31, 16, 16, 2
    weights = V * C + T * C + L * (12 * C * C + 2 * C) + C
    biases = L * (2 * C + 9 * C) + C
    assert tiny(bias=bias).num_params(non_embedding=False) == weights + bias * biases


def test_the_flops_are_those_of_palm_s_appendix():
    model = tiny()
    assert model.flops_per_token() == 6 * model.num_params() + 12 * 2 * 16 * 16


def test_the_embedding_and_the_output_layer_are_one_tensor_listed_once():
    model = tiny()
    names = [name for name, _ in model.named_parameters()]
    assert model.lm_head.weight is model.transformer["wte"].weight
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    idx = ids(2, 16)
    model(idx, idx)[1].backward()
    unseen = sorted(set(range(31)) - set(idx.flatten().tolist()))  # only the output layer reaches these rows
    assert unseen and (model.transformer["wte"].weight.grad[unseen] != 0).all(dim=1).all()


def test_initial_weights_have_the_spread_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif ".ln_" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < std / 20


def test_the_initial_loss_is_that_of_a_guess():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=2, n_embd=64))
    loss = model(ids(8, 32, vocab_size=100), ids(8, 32, vocab_size=100, seed=4))[1]
    assert loss.item() == pytest.approx(math.log(100), abs=0.05)


def test_the_same_seed_gives_the_same_weights():
    for left, right in zip(tiny(1).parameters(), tiny(1).parameters(), strict=True):
        assert torch.equal(left, right)


# The forward pass


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_change_the_logits_before_it(flash, dtype):
    model = tiny(flash=flash).to(dtype)
    idx = ids(3, 16)
    before = model(idx, idx)[0]
    for t in range(16):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1 + ids(3, 16 - t, vocab_size=29)) % 31
        after = model(changed, changed)[0]
        assert torch.equal(after[:, :t], before[:, :t])  # to the last bit
        assert not torch.equal(after[:, t], before[:, t])


def test_fused_attention_equals_plain_attention_forward_and_backward():
    fused, plain = tiny(flash=True), tiny(flash=False)
    idx, targets = ids(3, 16), ids(3, 16, seed=4)
    results = [model(idx, targets) for model in (fused, plain)]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    for _, loss in results:
        loss.backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (1, 7), (3, 7), (6, 7)])
def test_new_tokens_attend_to_cached_ones_alike_on_both_paths(T, S):
    q, k, v = (torch.randn(2, 3, length, 8, generator=seeded(length)) for length in (T, S, S))
    whole = plain_attention(torch.cat([torch.zeros(2, 3, S - T, 8), q], dim=2), k, v)[:, :, S - T :]
    for attend in (plain_attention, attention.attention):
        torch.testing.assert_close(attend(q, k, v), whole, rtol=0, atol=1e-6)


def test_plain_attention_equals_the_equation_in_numpy():
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=seeded(i)) for i in range(3))
    found = plain_attention(q, k, v).numpy()
    for head in range(2):
        for t in range(5):
            scores = k[0, head, : t + 1].numpy() @ q[0, head, t].numpy() / 2.0
            weights = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(found[0, head, t], weights @ v[0, head, : t + 1].numpy(), rtol=1e-12)


def test_the_gradient_of_plain_attention_is_that_of_finite_differences():
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    assert torch.autograd.gradcheck(plain_attention, (q, k, v))


def test_the_mask_lets_a_query_see_what_stands_up_to_it():
    mask = attention.causal_mask(2, 5, torch.device("cpu"))
    assert mask.tolist() == [[True, True, True, True, False], [True] * 5]


def test_the_loss_equals_a_log_softmax_written_out():
    model = tiny().double()
    idx, targets = ids(3, 16), ids(3, 16, seed=4)
    targets[0, :5] = targets[2, 15] = -1  # these do not count
    logits, loss = model(idx, targets)
    logits = logits.detach().numpy()
    terms = []
    for b, t in np.ndindex(3, 16):
        if targets[b, t] >= 0:
            z = logits[b, t] - logits[b, t].max()
            terms.append(np.log(np.exp(z).sum()) - z[targets[b, t]])
    assert len(terms) == 42
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_the_activations_are_the_two_forms_of_gelu(activation, approximate):
    x = np.linspace(-6, 6, 401)
    if approximate == "none":
        expected = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    else:
        expected = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    found = functional.ACTIVATIONS[activation](torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_without_targets_only_the_last_position_is_given():
    model, idx = tiny(), ids(3, 16)
    last, loss = model(idx)
    assert last.shape == (3, 1, 31) and loss is None
    torch.testing.assert_close(last, model(idx, idx)[0][:, -1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("flash", [True, False])
def test_dropout_acts_in_training_and_only_there(flash):
    model, idx = tiny(dropout=0.5, flash=flash), ids(3, 16)
    assert torch.equal(model(idx)[0], model(idx)[0])
    torch.testing.assert_close(model(idx)[0], tiny(dropout=0.0, flash=flash)(idx)[0], rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    for silent in (tiny(dropout=0.0).train(), model.eval()):
        assert torch.equal(silent(idx)[0], silent(idx)[0])


def test_dropout_within_attention_keeps_the_expected_value():
    q, k = torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4)
    v = torch.randn(1, 1, 8, 4, generator=seeded())
    for attend in (plain_attention, attention.attention):
        torch.manual_seed(0)
        drawn = torch.stack([attend(q, k, v, None, 0.3) for _ in range(4000)])
        assert drawn.std(0).max() > 0.1
        torch.testing.assert_close(drawn.mean(0), attend(q, k, v), rtol=0, atol=0.05)


def test_more_tokens_than_the_block_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="17 tokens do not fit block_size = 16"):
        model(ids(1, 17))
    cache = KVCache(TINY, 1, torch.device("cpu"), torch.float32)
    model(ids(1, 10), cache=cache)
    with pytest.raises(ValueError, match="17 tokens do not fit block_size = 16"):
        model(ids(1, 7), cache=cache)
    assert cache.length == 10


@pytest.mark.parametrize("flash", [True, False])
def test_a_cache_filled_in_pieces_gives_the_logits_of_the_whole(flash):
    model, idx = tiny(flash=flash), ids(3, 16)
    whole = model(idx, idx)[0]
    cache = KVCache(model.config, 3, idx.device, torch.float32)
    for start, end in [(0, 5), (5, 6), (6, 13), (13, 16)]:
        logits, _ = model(idx[:, start:end], idx[:, start:end], cache)
        torch.testing.assert_close(logits, whole[:, start:end], rtol=0, atol=1e-5)
    assert cache.length == 16


def test_without_biases_there_are_none():
    assert not [name for name, _ in tiny(bias=False).named_parameters() if name.endswith("bias")]
    assert tiny(bias=False)(ids(1, 4))[0].isfinite().all()


def test_a_cropped_block_gives_the_same_logits_and_refuses_longer_ones():
    model, idx = tiny(), ids(3, 8)
    expected = model(idx, idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx, idx)[0], expected)
    assert model.config.block_size == 8 and model.transformer["wpe"].weight.shape == (8, 16)
    assert dict(model.named_parameters())["transformer.wpe.weight"].requires_grad
    assert model.generate(idx, 12, temperature=0).shape == (3, 20)
    with pytest.raises(ValueError, match="9 tokens do not fit block_size = 8"):
        model(ids(1, 9))
    with pytest.raises(ValueError, match="block_size = 8 cannot be cropped to 9"):
        model.crop_block_size(9)


# Generation


@pytest.mark.parametrize("prompt", [1, 7, 16, 17, 40])  # shorter than the block, as long, longer
@pytest.mark.parametrize("hop", [None, 1, 5, 16])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_k": 12, "top_p": 0.95}])
def test_cached_generation_equals_uncached(prompt, hop, options):
    model, idx = tiny(), ids(3, prompt)
    cached, uncached = (
        model.generate(idx, 40, use_cache=use_cache, hop=hop, generator=seeded(), **options)
        for use_cache in (True, False)
    )
    assert cached.shape == (3, prompt + 40) and torch.equal(cached[:, :prompt], idx)
    assert torch.equal(cached, uncached)


def test_cached_logits_equal_uncached_in_every_row_of_a_batch_and_alone():
    model, idx = tiny(), ids(3, 5)
    together = model.generate(idx, 30, temperature=0)
    for row in range(3):
        assert torch.equal(model.generate(idx[row : row + 1], 30, temperature=0)[0], together[row])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_hop_of_one_is_nanogpt_s_sliding_window(use_cache, temperature):
    model, idx = tiny(), ids(3, 9)
    found = model.generate(idx, 40, temperature, top_k=10, hop=1, use_cache=use_cache, generator=seeded())
    generator = seeded()
    for _ in range(40):
        window = idx[:, -16:]
        logits = model(window, window)[0][:, -1].detach()
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            logits[logits < logits.topk(10).values[:, [-1]]] = -float("inf")
            u = torch.rand(3, 1, generator=generator)
            token = (logits.softmax(-1).cumsum(-1) > u).int().argmax(-1, keepdim=True)
        idx = torch.cat([idx, token], dim=1)
    assert torch.equal(found, idx)


def test_the_window_slides_by_hops_and_always_fits():
    for length in range(1, 100):
        for hop in (1, 2, 5, 16):
            start = window_start(length, 16, hop)
            assert start % hop == 0 and length - start <= 16
            assert start == 0 or length - start > 16 - hop  # no earlier start would fit


def test_a_cache_is_refilled_once_in_a_hop():
    model, seen = tiny(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].size(1)))
    model.generate(ids(1, 16), 17, temperature=0, hop=4)
    assert seen == [16, 13, 1, 1, 1, 13, 1, 1, 1, 13, 1, 1, 1, 13, 1, 1, 1]


def test_temperature_zero_takes_the_likeliest_and_no_generator():
    logits = torch.randn(5, 31, generator=seeded())
    assert torch.equal(sample_token(logits, temperature=0), logits.argmax(-1))
    model, idx = tiny(), ids(2, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    out = model.generate(idx, 5, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    for t in range(3, 8):
        assert torch.equal(out[:, t], model(out[:, :t])[0][:, -1].argmax(-1))


def test_drawn_tokens_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(40_000, 1)
    drawn = sample_token(logits, temperature=0.7, generator=seeded()).bincount(minlength=4) / 40_000
    expected = np.exp(np.array([0, 1, 2, -1]) / 0.7)
    np.testing.assert_allclose(drawn.numpy(), expected / expected.sum(), atol=0.01)


def test_what_cannot_be_is_not_drawn_even_where_the_number_drawn_is_0_or_rounds_to_1(monkeypatch):
    never = -float("inf")
    logits = torch.tensor([[never, 0.0, never, 0.0, never]])
    for u, token in ((0.0, 1), (0.49, 1), (0.51, 3), (1.0, 3)):
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **kw: torch.full(shape, u))
        assert sample_token(logits).tolist() == [token]


def test_the_same_seed_draws_the_same_text_and_another_seed_another():
    model, idx = tiny(), ids(2, 3)
    texts = [model.generate(idx, 20, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_padding_of_the_vocabulary_is_never_drawn():
    model, idx = tiny(spread=0.01), ids(2, 3, vocab_size=5)
    assert model.generate(idx, 200, temperature=5.0, generator=seeded()).max() > 4
    for options in ({}, {"top_k": 30}, {"repetition_penalty": 3.0}, {"top_p": 0.99, "min_p": 0.0001}):
        drawn = model.generate(idx, 200, temperature=5.0, n_vocab=5, generator=seeded(), **options)
        assert drawn.max() == 4 and drawn.min() == 0


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_penalty_is_on_the_whole_text_also_where_the_window_has_left_it(use_cache):
    model, idx = tiny(), ids(2, 14)
    found = model.generate(idx, 20, temperature=0, repetition_penalty=1.7, use_cache=use_cache, hop=1)
    assert not torch.equal(found, model.generate(idx, 20, temperature=0, use_cache=use_cache, hop=1))
    penalise = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    for _ in range(20):
        logits = penalise(idx, model(idx[:, -16:])[0][:, -1].detach())
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, idx)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored_after_generating(training):
    model = tiny(dropout=0.5).train(training)
    model.generate(ids(1, 3), 2)
    assert model.training is training and model.transformer["h"][0].training is training
    stream = model.stream(ids(1, 3), 5)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training is training
    for _ in model.stream(ids(1, 3), 5):
        break  # abandoned: the generator goes with its last name
    assert model.training is training
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[99]]), 1)
    assert model.training is training


def test_generating_keeps_no_graph_and_leaves_gradients_on():
    model = tiny()
    stream = model.stream(ids(1, 3), 3)
    assert not next(stream).requires_grad
    assert torch.is_grad_enabled()
    stream.close()
    assert model(ids(1, 3), ids(1, 3))[1].requires_grad


def test_generating_no_tokens_gives_the_prompt():
    idx = ids(2, 3)
    assert torch.equal(tiny().generate(idx, 0), idx)


def test_generation_runs_under_autocast_with_a_cache_of_its_precision():
    model, idx = tiny(), ids(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        cached, uncached = (model.generate(idx, 30, temperature=0, use_cache=use) for use in (True, False))
    assert cached.shape == (2, 35) and (cached == uncached).float().mean() > 0.5


# Filters, against their definitions and against transformers


finite = st.floats(-8, 8, width=32)
rows = st.lists(st.lists(finite, min_size=6, max_size=6), min_size=1, max_size=4)


def kept(logits, **options):
    """Which tokens (B, V) may still be drawn; their logits must be untouched."""
    filtered = filter_logits(logits, **options)
    left = filtered > -math.inf
    assert torch.equal(filtered[left], logits[left]) and left.any(dim=1).all()
    return left.numpy()


def probabilities(row):
    shifted = np.exp(np.float64(row) - np.max(np.float64(row)))
    return shifted / shifted.sum()


@steady
@given(rows, st.integers(1, 9))
def test_top_k_keeps_the_k_likeliest_and_what_is_as_likely(values, k):
    for row, left in zip(values, kept(torch.tensor(values), top_k=k), strict=True):
        kth = sorted(row, reverse=True)[min(k, 6) - 1]
        assert left.tolist() == [value >= kth for value in row]


@steady
@given(rows, st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(values, p):
    for row, left in zip(values, kept(torch.tensor(values), top_p=p), strict=True):
        ordered = np.sort(probabilities(row))[::-1]
        totals = np.cumsum(ordered)
        if np.abs(totals - p).min() < 1e-5:
            continue  # rounding decides
        n = int(np.searchsorted(totals, p)) + 1 if p < 1 else 6
        assert left.sum() == n
        assert min(np.float32(row)[left]) >= max(np.float32(row)[~left], default=-math.inf)


@steady
@given(rows, st.floats(0.001, 1.0))
def test_min_p_keeps_those_at_least_p_times_as_likely_as_the_likeliest(values, p):
    for row, left in zip(values, kept(torch.tensor(values), min_p=p), strict=True):
        ratio = probabilities(row) / probabilities(row).max()
        clear = np.abs(ratio - p) > 1e-5 * p  # elsewhere rounding decides
        assert (left == (ratio >= p))[clear].all()


@steady
@given(rows, st.integers(1, 7), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_filters_together_keep_what_each_after_the_other_keeps(values, k, top_p, min_p):
    logits = torch.tensor(values)
    together = filter_logits(logits, k, top_p, min_p)
    one_by_one = filter_logits(filter_logits(filter_logits(logits, top_k=k), top_p=top_p), min_p=min_p)
    assert torch.equal(together, one_by_one)


def test_filters_together_equal_those_of_transformers_in_its_order():
    logits = torch.randn(50, 31, generator=seeded())
    expected = logits
    for warper in (
        transformers.TopKLogitsWarper(9),
        transformers.TopPLogitsWarper(0.8),
        generation.MinPLogitsWarper(0.2),
    ):
        expected = warper(None, expected)
    assert torch.equal(filter_logits(logits, 9, 0.8, 0.2), expected)


def test_no_filter_changes_nothing():
    logits = torch.randn(3, 31)
    assert torch.equal(filter_logits(logits), logits)
    assert torch.equal(filter_logits(logits, top_k=31, top_p=1.0), logits)
    assert torch.equal(filter_logits(logits, top_k=500), logits)


@pytest.mark.parametrize("value", [1, 2, 7, 30, 31, 40])
def test_top_k_equals_that_of_transformers(value):
    logits = torch.randn(5, 31, generator=seeded())
    expected = transformers.TopKLogitsWarper(value)(None, logits)
    assert torch.equal(filter_logits(logits, top_k=value), expected)


@pytest.mark.parametrize("value", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_top_p_and_min_p_equal_those_of_transformers(value):
    logits = torch.randn(50, 31, generator=seeded()) * 2
    assert torch.equal(filter_logits(logits, top_p=value), transformers.TopPLogitsWarper(value)(None, logits))
    expected = generation.logits_process.MinPLogitsWarper(value)(None, logits)
    assert torch.equal(filter_logits(logits, min_p=value), expected)


@steady
@given(rows, st.lists(st.integers(0, 5), min_size=1, max_size=9), st.floats(0.5, 3.0))
def test_the_repetition_penalty_is_ctrl_s(values, seen, penalty):
    logits = torch.tensor(values)
    idx = torch.tensor([seen]).repeat(len(values), 1)
    found = penalize_repetition(logits, idx, penalty)
    for row, after in zip(values, found.tolist(), strict=True):
        for token, (old, new) in enumerate(zip(row, after, strict=True)):
            expected = old if token not in seen else old / penalty if old > 0 else old * penalty
            assert new == pytest.approx(expected, rel=1e-6)
    assert torch.equal(logits, torch.tensor(values))  # not changed in place
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(idx, logits.clone())
    torch.testing.assert_close(found, theirs, rtol=0, atol=0)


def test_ids_beyond_the_vocabulary_are_not_penalised_for_another():
    logits = torch.tensor([[1.0, -1.0, 2.0]])
    assert penalize_repetition(logits, torch.tensor([[7, 3]]), 2.0).tolist() == logits.tolist()
    assert penalize_repetition(logits, torch.tensor([[7, 1]]), 2.0).tolist() == [[1.0, -2.0, 2.0]]


def test_cropping_keeps_a_frozen_table_frozen_and_draws_no_numbers():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    model.transformer["wpe"].weight.requires_grad_(False)
    state = torch.get_rng_state()
    model.crop_block_size(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.transformer["wpe"].weight.requires_grad
    assert model.transformer["wpe"].weight.shape == (5, 4)
    for wrong in (0, -3, 6):
        with pytest.raises(ValueError, match="cannot be cropped"):
            model.crop_block_size(wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"hop": 0},
        {"hop": 9},
        {"top_k": 0},
        {"top_p": 0.0},
        {"min_p": 0.0},
        {"min_p": 1.5},
        {"temperature": -1.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_options_out_of_range_get_a_message(options):
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(ValueError, match="must be"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 2, **options)


def test_an_empty_prompt_gets_a_message():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 2)


def test_the_smallest_temperature_is_greedy_and_overflows_nothing():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample_token(logits, temperature=1e-40).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_was_written_can_be_trained_on(temperature):
    """Its ids are plain tensors, which a backward pass may keep."""
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    ids = model.generate(torch.zeros(2, 1, dtype=torch.long), 6, temperature=temperature)
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    assert model.transformer["wte"].weight.grad is not None
