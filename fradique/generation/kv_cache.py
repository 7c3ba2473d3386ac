"""TODO."""

from typing import Protocol

import torch
from torch import Tensor


class CacheShape(Protocol):
    """What a cache needs to know of a model: a GPTConfig has it."""

    block_size: int
    n_layer: int
    kv_heads: int
    head_dim: int


class KVCache:
    """Keys and values of the tokens seen so far, for every layer, in memory reserved once."""

    def __init__(
        self,
        config: CacheShape,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        room: int | None = None,  # tokens; a whole block where None is given
    ) -> None:
        self.room = config.block_size if room is None else room
        shape = (batch, config.kv_heads, self.room, config.head_dim)
        # zeros: a place that is not filled yet may be multiplied by 0, and must not be NaN
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)] for _ in range(2)
        )
        self.length = 0  # tokens held
        self.position: Tensor | None = None  # int64 (1,): where the next token stands, instead of length

    def positions(self, T: int) -> Tensor:
        """Where the next T tokens stand, (T,)."""
        if self.position is not None:
            return self.position
        return torch.arange(self.length, self.length + T, device=self.keys[0].device)

    def reach(self, T: int) -> int:
        """How many keys `extend` answers with when T tokens come."""
        return self.room if self.position is not None else self.length + T

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, kv_heads, T, head_dim) behind what is held; return all S of them.

        Where `position` is given T is 1 and all of the room is returned: shapes and addresses stay the same
        from token to token, and a mask has to hide what is not filled yet.
        """
        keys, values = self.keys[layer], self.values[layer]
        if self.position is not None:
            return keys.index_copy_(2, self.position, k), values.index_copy_(2, self.position, v)
        T = k.size(2)
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        end = self.length + T
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)
