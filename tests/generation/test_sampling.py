"""Sampling: the distribution, and each filter against its definition and against transformers."""

import math

import numpy as np
import pytest
import torch
import transformers
from architectures import ids, seeded, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import generation

from fradique.generation.sampling import filter_logits, penalize_repetition, sample_token

reproducible = settings(derandomize=True, deadline=None, max_examples=100, database=None)


def test_temperature_0_is_argmax_without_random_numbers():
    logits = torch.randn(5, 31, generator=seeded())
    assert torch.equal(sample_token(logits, temperature=0), logits.argmax(-1))
    model, idx = tiny(), ids(2, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    out = model.generate(idx, 5, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    for t in range(3, 8):
        assert torch.equal(out[:, t], model(out[:, :t])[0][:, -1].argmax(-1))


@pytest.mark.parametrize("temperature", [9e-5, 1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy_without_overflow(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample_token(logits, temperature=temperature).tolist() == [1]


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(40_000, 1)
    frequencies = sample_token(logits, temperature=0.7, generator=seeded()).bincount(minlength=4) / 40_000
    expected = np.exp(np.array([0, 1, 2, -1]) / 0.7)
    np.testing.assert_allclose(frequencies.numpy(), expected / expected.sum(), atol=0.01)


def test_impossible_tokens_are_not_sampled_at_u_0_or_1(monkeypatch):
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, -inf, 0.0, -inf]])
    for u, token in ((0.0, 1), (0.49, 1), (0.51, 3), (1.0, 3)):
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **kw: torch.full(shape, u))
        assert sample_token(logits).tolist() == [token]


# Filters

finite = st.floats(-8, 8, width=32)
rows = st.lists(st.lists(finite, min_size=6, max_size=6), min_size=1, max_size=4)


def allowed_tokens(logits, **options):
    """Which tokens (B, V) the filters allow; also checks that their logits are unchanged."""
    filtered = filter_logits(logits, **options)
    remaining = filtered > -math.inf
    assert torch.equal(filtered[remaining], logits[remaining]) and remaining.any(dim=1).all()
    return remaining.numpy()


def probabilities(row):
    shifted = np.exp(np.float64(row) - np.max(np.float64(row)))
    return shifted / shifted.sum()


@reproducible
@given(rows, st.integers(1, 9))
def test_top_k_keeps_the_k_largest_and_ties(values, k):
    for row, remaining in zip(values, allowed_tokens(torch.tensor(values), top_k=k), strict=True):
        kth = sorted(row, reverse=True)[min(k, 6) - 1]
        assert remaining.tolist() == [value >= kth for value in row]


@reproducible
@given(rows, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_reaching_p(values, p):
    for row, remaining in zip(values, allowed_tokens(torch.tensor(values), top_p=p), strict=True):
        ordered = np.sort(probabilities(row))[::-1]
        totals = np.cumsum(ordered)
        if np.abs(totals - p).min() < 1e-5:
            continue  # depends on rounding
        n = int(np.searchsorted(totals, p)) + 1 if p < 1 else 6
        assert remaining.sum() == n
        assert min(np.float32(row)[remaining]) >= max(np.float32(row)[~remaining], default=-math.inf)


@reproducible
@given(rows, st.floats(0.001, 1.0))
def test_min_p_keeps_tokens_with_p_times_the_max_probability(values, p):
    for row, remaining in zip(values, allowed_tokens(torch.tensor(values), min_p=p), strict=True):
        ratio = probabilities(row) / probabilities(row).max()
        clear = np.abs(ratio - p) > 1e-5 * p  # closer values depend on rounding
        assert (remaining == (ratio >= p))[clear].all()


@reproducible
@given(rows, st.integers(1, 7), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_combined_filters_equal_successive_filters(values, k, top_p, min_p):
    logits = torch.tensor(values)
    combined = filter_logits(logits, k, top_p, min_p)
    successive = filter_logits(filter_logits(filter_logits(logits, top_k=k), top_p=top_p), min_p=min_p)
    assert torch.equal(combined, successive)


def test_combined_filters_equal_transformers():
    logits = torch.randn(50, 31, generator=seeded())
    expected = logits
    for warper in (
        transformers.TopKLogitsWarper(9),
        transformers.TopPLogitsWarper(0.8),
        generation.MinPLogitsWarper(0.2),
    ):
        expected = warper(None, expected)
    assert torch.equal(filter_logits(logits, 9, 0.8, 0.2), expected)


def test_without_filters_logits_are_unchanged():
    logits = torch.randn(3, 31)
    assert torch.equal(filter_logits(logits), logits)
    assert torch.equal(filter_logits(logits, top_k=31, top_p=1.0), logits)
    assert torch.equal(filter_logits(logits, top_k=500), logits)


@pytest.mark.parametrize("value", [1, 2, 7, 30, 31, 40])
def test_top_k_equals_transformers(value):
    logits = torch.randn(5, 31, generator=seeded())
    expected = transformers.TopKLogitsWarper(value)(None, logits)
    assert torch.equal(filter_logits(logits, top_k=value), expected)


@pytest.mark.parametrize("value", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_top_p_and_min_p_equal_transformers(value):
    logits = torch.randn(50, 31, generator=seeded()) * 2
    assert torch.equal(filter_logits(logits, top_p=value), transformers.TopPLogitsWarper(value)(None, logits))
    expected = generation.logits_process.MinPLogitsWarper(value)(None, logits)
    assert torch.equal(filter_logits(logits, min_p=value), expected)


# Repetition penalty


@reproducible
@given(rows, st.lists(st.integers(0, 5), min_size=1, max_size=9), st.floats(0.5, 3.0))
def test_repetition_penalty_equals_the_ctrl_formula(values, previous_ids, penalty):
    logits = torch.tensor(values)
    idx = torch.tensor([previous_ids]).repeat(len(values), 1)
    actual = penalize_repetition(logits, idx, penalty)
    for row, after in zip(values, actual.tolist(), strict=True):
        for token, (old, new) in enumerate(zip(row, after, strict=True)):
            expected = old if token not in previous_ids else old / penalty if old > 0 else old * penalty
            assert new == pytest.approx(expected, rel=1e-6)
    assert torch.equal(logits, torch.tensor(values))  # not changed in place
    by_transformers = transformers.RepetitionPenaltyLogitsProcessor(penalty)(idx, logits.clone())
    torch.testing.assert_close(actual, by_transformers, rtol=0, atol=0)


def test_ids_beyond_the_vocabulary_are_ignored():
    logits = torch.tensor([[1.0, -1.0, 2.0]])
    assert penalize_repetition(logits, torch.tensor([[7, 3]]), 2.0).tolist() == logits.tolist()
    assert penalize_repetition(logits, torch.tensor([[7, 1]]), 2.0).tolist() == [[1.0, -2.0, 2.0]]
