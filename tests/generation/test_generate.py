"""The generation loop: sliding window, KV cache, captured decode steps, options."""

import numpy as np
import pytest
import torch
import transformers
from architectures import NAMES, ids, random_model, seeded, tiny
from gpt_equations import reference_logits
from torch.fx.experimental.proxy_tensor import make_fx

from fradique.generation import generate
from fradique.generation.generate import window_start
from fradique.generation.kv_cache import KVCache
from model import GPT, GPTConfig

# Window and cache


@pytest.mark.parametrize("prompt", [1, 7, 16, 17, 40])  # shorter than block_size, equal, longer
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


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.9, "top_k": 12}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("name", NAMES)
def test_cached_generation_equals_uncached_in_every_architecture(name, options, architecture):
    model = random_model(architecture(name))
    for prompt, hop in [(2, None), (2, 1), (7, None), (20, 1)]:  # prefix_len is 4, block_size 16
        idx = ids(2, prompt)
        cached, uncached = (
            model.generate(idx, 20, use_cache=use, hop=hop, generator=torch.manual_seed(5), **options)
            for use in (True, False)
        )
        assert cached.shape == (2, prompt + 20) and torch.equal(cached[:, :prompt], idx)
        assert torch.equal(cached, uncached)


def test_rows_of_a_batch_equal_separate_generation():
    model, idx = tiny(), ids(3, 5)
    batched = model.generate(idx, 30, temperature=0)
    for row in range(3):
        assert torch.equal(model.generate(idx[row : row + 1], 30, temperature=0)[0], batched[row])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_hop_1_is_nanogpts_sliding_window(use_cache, temperature):
    model, idx = tiny(), ids(3, 9)
    actual = model.generate(idx, 40, temperature, top_k=10, hop=1, use_cache=use_cache, generator=seeded())
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
    assert torch.equal(actual, idx)


def test_window_start_is_a_multiple_of_hop_and_fits():
    for length in range(1, 100):
        for hop in (1, 2, 5, 16):
            start = window_start(length, 16, hop)
            assert start % hop == 0 and length - start <= 16
            assert start == 0 or length - start > 16 - hop  # no earlier start fits


def test_the_cache_is_recomputed_once_per_hop():
    model, lengths = tiny(), []
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].size(1)))
    model.generate(ids(1, 16), 17, temperature=0, hop=4)
    assert lengths == [16, 13, 1, 1, 1, 13, 1, 1, 1, 13, 1, 1, 1, 13, 1, 1, 1]


@pytest.mark.parametrize("prompt", [2, 4, 7, 20])
def test_the_prompt_is_the_prefix_of_a_prefix_lm(prompt, architecture):
    """prefix_len = 4. When the window moves, all tokens in it become the prompt."""
    model, idx = random_model(architecture("glm130b")), ids(1, prompt)
    assert model.config.prefix_len == 4
    text, start, prompt_length = idx[0].tolist(), -1, 0
    for _ in range(24):
        earliest = next(n for n in range(0, 100, 5) if len(text) - n <= 16)
        if earliest != start:
            start, prompt_length = earliest, len(text) - earliest
        logits = reference_logits(model, np.array(text[start:]), prefix=min(4, prompt_length))[-1]
        text.append(int(logits.argmax()))
    for use_cache in (True, False):
        assert model.generate(idx, 24, temperature=0, hop=5, use_cache=use_cache)[0].tolist() == text


@pytest.mark.parametrize("name", NAMES)
def test_captured_decode_steps_generate_the_same_tokens(name, architecture, monkeypatch):
    """As in a CUDA graph, no Python runs in a replayed step, so no Python may depend on the position."""

    def capture(step, device):
        step()
        output = step().clone()
        graph = make_fx(step)()
        return lambda: output.copy_(graph()), output

    model = random_model(architecture(name))
    cases = [(idx := ids(2, prompt), model.generate(idx, 20, temperature=0)) for prompt in (2, 7, 20)]
    monkeypatch.setattr(generate, "capture_cuda_graph", capture)
    monkeypatch.setattr(generate, "can_use_cuda_graph", lambda idx: True)
    lengths = []
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].size(1)))
    for idx, expected in cases:
        assert torch.equal(model.generate(idx, 20, temperature=0), expected)
    # three during capture, and one to compare with; all other tokens came from replays
    assert lengths.count(1) == 4 * len(cases)


def failing_replay(output):
    raise RuntimeError("CUDA error: operation failed\nmore lines")


@pytest.mark.parametrize(
    ("replay", "reason"),
    [
        (failing_replay, "CUDA error: operation failed"),
        (lambda output: output.fill_(7.0), "its logits differ"),
        (lambda output: output.fill_(float("nan")), "its logits differ"),
    ],
)
def test_a_wrong_cuda_graph_warns_and_changes_no_token(monkeypatch, replay, reason):
    """Its replay also overwrites the cached keys."""
    model, idx = tiny(), ids(2, 7)
    expected = model.generate(idx, 20, temperature=0)

    def capture(step, device):
        output = step().clone()
        (cache,) = (
            cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, KVCache)
        )

        def damage_and_replay():
            cache.keys[0].fill_(3.0)
            replay(output)

        return damage_and_replay, output

    monkeypatch.setattr(generate, "capture_cuda_graph", capture)
    monkeypatch.setattr(generate, "can_use_cuda_graph", lambda idx: True)
    with pytest.warns(RuntimeWarning, match=reason) as warnings:
        assert torch.equal(model.generate(idx, 20, temperature=0), expected)
    assert len(warnings) == 1


def test_a_cuda_graph_that_cannot_be_captured_warns(monkeypatch):
    model, idx = tiny(), ids(2, 7)
    expected = model.generate(idx, 20, temperature=0)

    def capture(step, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(generate, "capture_cuda_graph", capture)
    monkeypatch.setattr(generate, "can_use_cuda_graph", lambda idx: True)
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing") as warnings:
        assert torch.equal(model.generate(idx, 20, temperature=0), expected)
    assert len(warnings) == 1


# Options


def test_generation_is_reproducible_by_seed():
    model, idx = tiny(), ids(2, 3)
    texts = [model.generate(idx, 20, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_padded_vocabulary_ids_are_never_sampled():
    model, idx = tiny(std=0.01), ids(2, 3, vocab_size=5)
    assert model.generate(idx, 200, temperature=5.0, generator=seeded()).max() > 4
    for options in ({}, {"top_k": 30}, {"repetition_penalty": 3.0}, {"top_p": 0.99, "min_p": 0.0001}):
        sampled = model.generate(idx, 200, temperature=5.0, n_vocab=5, generator=seeded(), **options)
        assert sampled.max() == 4 and sampled.min() == 0


@pytest.mark.parametrize("use_cache", [True, False])
def test_repetition_penalty_covers_text_before_the_window(use_cache):
    model, idx = tiny(), ids(2, 14)
    actual = model.generate(idx, 20, temperature=0, repetition_penalty=1.7, use_cache=use_cache, hop=1)
    assert not torch.equal(actual, model.generate(idx, 20, temperature=0, use_cache=use_cache, hop=1))
    penalize = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    for _ in range(20):
        logits = penalize(idx, model(idx[:, -16:])[0][:, -1].detach())
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(actual, idx)


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
def test_options_out_of_range_are_rejected(options):
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(ValueError, match="must be"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 2, **options)


def test_an_empty_prompt_is_rejected():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 2)


def test_generating_0_tokens_returns_the_prompt():
    idx = ids(2, 3)
    assert torch.equal(tiny().generate(idx, 0), idx)


# Modes


@pytest.mark.parametrize("training", [True, False])
def test_generation_restores_the_training_mode(training):
    model = tiny(dropout=0.5).train(training)
    model.generate(ids(1, 3), 2)
    assert model.training is training and model.transformer["h"][0].training is training
    stream = model.stream(ids(1, 3), 5)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training is training
    for _ in model.stream(ids(1, 3), 5):
        break  # the abandoned generator is closed when it is deleted
    assert model.training is training
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[99]]), 1)
    assert model.training is training


def test_generation_builds_no_autograd_graph():
    model = tiny()
    stream = model.stream(ids(1, 3), 3)
    assert not next(stream).requires_grad
    assert torch.is_grad_enabled()
    stream.close()
    assert model(ids(1, 3), ids(1, 3))[1].requires_grad


def test_generation_under_autocast_uses_a_bfloat16_cache():
    model, idx = tiny(), ids(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        cached, uncached = (model.generate(idx, 30, temperature=0, use_cache=use) for use in (True, False))
    assert cached.shape == (2, 35) and (cached == uncached).float().mean() > 0.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_ids_can_be_trained_on(temperature):
    """The ids are not inference tensors, which autograd cannot save."""
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    ids = model.generate(torch.zeros(2, 1, dtype=torch.long), 6, temperature=temperature)
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    assert model.transformer["wte"].weight.grad is not None
