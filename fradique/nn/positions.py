"""Positional encodings: sinusoidal embedding, RoPE, ALiBi, and T5's relative position buckets.

Shapes: T positions, C = n_embd, D = head_dim, H = n_head.
"""

import math

import torch
from torch import Tensor, nn

RELATIVE_BUCKETS, MAX_DISTANCE = 32, 128  # T5's number of buckets, and scale of the logarithmic ones


def sinusoidal_embedding(positions: Tensor, width: int) -> Tensor:
    """(T,) -> (T, width): sin and cos in alternate columns, wavelengths from 2π to 20000π.

    Vaswani et al. 2017, §3.5.
    """
    angles = _angles(positions, width, 10000.0)  # (T, width / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def rope_cos_sin(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(T,) -> cosine and sine of RoPE's angles, (T, D / 2) each, for `functional.apply_rope`."""
    angles = _angles(positions, head_dim, theta)
    return angles.cos(), angles.sin()


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    """position / base^(2i / width) in float32: (T, width / 2)."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    return positions[:, None].float() * base**-exponents


def position_bias(distance: Tensor, n_head: int, tables: nn.ModuleDict) -> Tensor:
    """What is added to the scores for the distances (T, S) from query back to key: (n_head, T, S).

    By T5, if `tables` contains `rel`, its embedding of the buckets; otherwise by ALiBi.
    """
    if "rel" in tables:
        return tables["rel"](relative_buckets(distance)).permute(2, 0, 1)
    return -alibi_slopes(n_head, distance.device)[:, None, None] * distance.abs()


def alibi_slopes(n_head: int, device: torch.device) -> Tensor:
    """(H,): 2^(-8/H), 2^(-16/H), ... (Press et al. 2022).

    If H is not a power of 2: the slopes of the next lower power, then every second slope of the next higher
    one, as in BLOOM.
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(n_head - power)]
    # torch.full fills on the device: a copy from the CPU cannot be captured in a CUDA graph
    return torch.stack([torch.full((), slope, device=device) for slope in slopes])


def relative_buckets(distance: Tensor) -> Tensor:
    """Distances from query back to key -> T5's buckets, 0 to 31, same shape (Raffel et al. 2020, §2.1).

    Each distance up to 15 has its own bucket. Larger distances share buckets whose width grows in proportion
    to the distance; the last bucket is for 113 and above. Negative distances (later keys) count as 0.
    """
    num_exact = RELATIVE_BUCKETS // 2  # buckets for a single distance
    distance = distance.clamp(min=0)
    fraction = (distance.clamp(min=1).float() / num_exact).log() / math.log(MAX_DISTANCE / num_exact)
    shared = num_exact + (fraction * (RELATIVE_BUCKETS - num_exact)).long()
    return torch.where(distance < num_exact, distance, shared.clamp(max=RELATIVE_BUCKETS - 1))
