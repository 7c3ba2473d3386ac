"""Peak speed of this machine (matrix products, memory bandwidth), timers, and peak memory of a process."""

import contextlib
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def matmul_peaks(device: torch.device, size: int = 0) -> dict[str, float]:
    """FLOP/s of a product of two square matrices of `size`, for each dtype: the best of 7 measurements."""
    size = size or (8192 if device.type == "cuda" else 2048)
    peaks = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        peaks[name] = 2 * size**3 / min(times(lambda a=a, b=b: a @ b, device, rounds=7))
    return peaks


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second read from memory by a sum over 256 MB."""
    numbers = torch.ones(1 << 26, device=device)
    return numbers.nbytes / min(times(numbers.sum, device, rounds=7))


def times(work: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls, after one warm-up call."""
    return [seconds(work, device) for _ in range(rounds + 1)][1:]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated by torch on a CUDA device, otherwise resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):  # ru_maxrss may be that of the parent process
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(device: torch.device) -> str:
    """The name of a GPU, or the device type and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def median_ratio(others: list[float], ours: list[float]) -> float:
    """The median over rounds of others / ours, in seconds: how many times faster ours is."""
    return statistics.median(a / b for a, b in zip(others, ours, strict=True))
