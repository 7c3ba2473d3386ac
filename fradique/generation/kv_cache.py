"""KV cache: stores the keys and values of earlier tokens, so that each token is computed only once.

Shapes: B batch, T new tokens, S keys (cached and new).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model import GPTConfig


class KVCache:
    """Keys and values of all layers: for each layer two tensors (B, kv_heads, capacity, head_dim)."""

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        capacity: int | None = None,  # in tokens; None: block_size
    ) -> None:
        self.capacity = config.block_size if capacity is None else capacity
        shape = (batch, config.kv_heads, self.capacity, config.head_dim)
        # zeros, not empty: unused entries are multiplied by attention weights of 0, so they must not be NaN
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.num_earlier = config.ngram_max - 1
        # token ids plus 1, after as many zeros as an n-gram has earlier tokens; for NgramEmbedding
        self.ids = torch.zeros(batch, self.num_earlier + self.capacity, dtype=torch.long, device=device)
        self.length = 0  # number of cached tokens; the model increases it after the last layer
        # int64 (1,): the position of the next token; a captured CUDA graph uses it instead of `length`
        self.position: Tensor | None = None

    def positions(self, T: int) -> Tensor:
        """The positions of the next T tokens, (T,)."""
        if self.position is not None:
            return self.position
        return torch.arange(self.length, self.length + T, device=self.keys[0].device)

    def num_keys(self, T: int) -> int:
        """S, the number of keys that `update` returns for T new tokens."""
        return self.capacity if self.position is not None else self.length + T

    def update_ids(self, ids: Tensor) -> Tensor:
        """Append ids (B, T) of new tokens; return them after those of ngram_max - 1 earlier ones."""
        T, earlier = ids.size(1), self.num_earlier
        if self.position is not None:
            self.ids.index_copy_(1, self.position + earlier, ids)
            offsets = torch.arange(earlier + T, device=ids.device)
            return self.ids.index_select(1, self.position + offsets)
        self.ids.narrow(1, self.length + earlier, T).copy_(ids)
        return self.ids.narrow(1, self.length, earlier + T)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, kv_heads, T, head_dim) to a layer; return its S keys and values.

        If `position` is set, T must be 1 and S is the capacity. Shapes and addresses are then the same for
        every token, as a CUDA graph requires, and the caller must mask the unused entries.
        """
        keys, values = self.keys[layer], self.values[layer]
        if self.position is not None:
            return keys.index_copy_(2, self.position, k), values.index_copy_(2, self.position, v)
        T = k.size(2)
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        S = self.length + T
        return keys.narrow(2, 0, S), values.narrow(2, 0, S)
