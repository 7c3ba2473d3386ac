"""N-gram embeddings: the hash, the gradient, and generation with a cache. The equations: tests/model."""

import pytest
import torch
from architectures import ids, random_model, seeded, small

from fradique.generation.kv_cache import KVCache
from fradique.nn.ngrams import NgramEmbedding, ngram_rows


def test_equal_ngrams_share_a_row_and_others_rarely_do():
    """All 2,500 bigrams of 50 tokens in 16,384 rows: a random hash would fill 2,320."""
    pairs = torch.cartesian_prod(torch.arange(50), torch.arange(50)) + 1
    rows = ngram_rows(pairs, 2, 16384)  # (2500, 1, 1)
    assert rows.unique().numel() > 2250 and rows.min() >= 0 and rows.max() < 16384
    assert torch.equal(rows, ngram_rows(pairs, 2, 16384))


def test_trigrams_of_a_large_vocabulary_are_spread_evenly():
    triples = torch.randint(0, 50_000, (100_000, 3), generator=seeded()) + 1
    counts = ngram_rows(triples, 3, 1000)[..., 1].flatten().bincount(minlength=2000)
    assert counts[:1000].sum() == 0  # each length has its own rows
    assert counts[1000:].min() > 40 and counts[1000:].max() < 180  # 100 each, standard deviation 10


def test_a_token_changes_only_the_ngrams_that_contain_it():
    tokens = ids(1, 12) + 1
    changed = tokens.clone()
    changed[0, 5] += 1
    differs = (ngram_rows(tokens, 3, 10**6) != ngram_rows(changed, 3, 10**6))[0]  # of tokens 2 to 11
    assert differs[:, 0].nonzero().flatten().tolist() == [3, 4]  # bigrams that end at tokens 5 and 6
    assert differs[:, 1].nonzero().flatten().tolist() == [3, 4, 5]  # trigrams that end at 5, 6 and 7


def test_the_sparse_gradient_equals_the_dense_one():
    gradients = []
    for sparse in (True, False):
        embedding = NgramEmbedding(3, 20, 8)
        embedding.sparse_grad = sparse
        torch.nn.init.normal_(embedding.weight, generator=seeded())
        (embedding(ids(4, 12) + 1) * torch.arange(8.0)).pow(2).sum().backward()
        assert embedding.weight.grad.is_sparse == sparse
        gradients.append(embedding.weight.grad.to_dense())
    torch.testing.assert_close(*gradients)
    assert (gradients[0] == 0).all(dim=1).any()  # rows of n-grams that do not occur


def test_dropout_leaves_the_shortest_ngrams_of_a_token():
    """The table holds 1 for bigrams, 10 for trigrams and 100 for 4-grams: the sum shows which are left."""
    embedding = NgramEmbedding(4, 50, 1, dropout=0.4)
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(50)[:, None])
    torch.manual_seed(0)
    sums = embedding(torch.randint(1, 30, (100, 203))).flatten()  # 20,000 tokens
    assert sums.unique().tolist() == [0, 1, 11, 111]
    shares = [(sums == value).float().mean().item() for value in (0, 1, 11, 111)]
    assert shares == pytest.approx([0.4 / 3, 0.4 / 3, 0.4 / 3, 0.6], abs=0.015)
    assert (embedding.eval()(torch.randint(1, 30, (2, 13))) == 111).all()


def test_the_gradient_with_dropout_is_of_the_ngrams_that_are_left():
    embedding = NgramEmbedding(3, 1000, 2, dropout=0.5)
    torch.manual_seed(0)
    sums = embedding(torch.randint(1, 9, (1, 42)))
    sums.sum().backward()
    torch.manual_seed(0)
    torch.randint(1, 9, (1, 42))
    cut = torch.rand(40) < 0.5
    kept = torch.where(cut, torch.randint(2, (40,)), 2)
    assert embedding.weight.grad.to_dense()[:, 0].sum() == kept.sum()  # a row for each


@pytest.mark.parametrize("prompt", [1, 2, 7, 16, 30])  # block_size is 16
@pytest.mark.parametrize("hop", [None, 1])
def test_cached_generation_equals_uncached(prompt, hop):
    model, idx = random_model(small(ngram_max=4, ngram_rows=50)), ids(2, prompt)
    cached, uncached = (
        model.generate(idx, 40, temperature=0, use_cache=use, hop=hop) for use in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_a_captured_decode_step_reads_the_tokens_at_its_position():
    """As in a CUDA graph, where the position is a tensor."""
    config = small(ngram_max=3, ngram_rows=50)
    model, idx = random_model(config).eval(), ids(2, 10)
    expected = model(idx, idx)[0]
    cache = KVCache(config, 2, idx.device, torch.float32)
    model(idx[:, :4], cache=cache)
    for t in range(4, 10):
        cache.position = torch.tensor([t])
        cache.length = 0
        logits = model(idx[:, t : t + 1], cache=cache, prefix=0)[0]
        torch.testing.assert_close(logits[:, 0], expected[:, t], rtol=0, atol=2e-5)
