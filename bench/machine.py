"""What this machine can do at most: matrix products, memory bandwidth; and how much memory a process took."""

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
    """FLOP/s of a product of two square matrices of `size`, the best of some tries, for each dtype."""
    size = size or (8192 if device.type == "cuda" else 2048)
    peaks = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        peaks[name] = 2 * size**3 / min(times(lambda a=a, b=b: a @ b, device, rounds=7))
    return peaks


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that are read from memory: a sum over 256 MB."""
    numbers = torch.ones(1 << 26, device=device)
    return numbers.nbytes / min(times(numbers.sum, device, rounds=7))


def times(work: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls, after one that does not count."""
    return [seconds(work, device) for _ in range(rounds + 1)][1:]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Bytes: of the card where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(
        OSError, AttributeError
    ):  # of this program; the other is its parent's, if higher
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def describe(device: torch.device) -> str:
    """The device and its name, as far as this machine tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """The median over rounds of how many times longer theirs took."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
