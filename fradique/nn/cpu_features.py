"""What a CPU can compute with. On one without bfloat16 arithmetic, torch emulates it, many times slower."""

from __future__ import annotations

import functools

import torch


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 matrix products (AMX or AVX-512 BF16)."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # also if ATEN_CPU_CAPABILITY=avx2 says so
        return False
    # torch's functions for this are private: a version of torch may lack them
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in names)


def emulates_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products on this device are emulated, and therefore slow."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not cpu_has_bf16()
