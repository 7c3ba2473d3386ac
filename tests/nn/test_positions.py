"""ALiBi slopes and T5's relative position buckets, against transformers."""

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from fradique.nn.positions import alibi_slopes, relative_buckets


@pytest.mark.parametrize("heads", range(1, 21))
def test_alibi_slopes_equal_bloom(heads):
    bias = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # (heads, 1, 2): 0 and the slope
    torch.testing.assert_close(alibi_slopes(heads, torch.device("cpu")), bias[:, 0, 1], rtol=1e-6, atol=0)


def test_relative_buckets_equal_t5():
    distance = torch.arange(-20, 1001)
    expected = T5Attention._relative_position_bucket(-distance, bidirectional=False)
    assert torch.equal(relative_buckets(distance), expected)
    assert relative_buckets(distance).unique().tolist() == list(range(32))
