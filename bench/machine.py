"""Speed limits of this machine (matrix products, memory bandwidth), timers, and peak memory of a process."""

import contextlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fradique.nn.cpu_features import emulates_bf16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def matmul_peaks(device: torch.device, size: int = 0) -> dict[str, float]:
    """FLOP/s of the product of two matrices (size, size), by dtype: the best of 7 measurements.

    A dtype that the device emulates is left out, because its product can take minutes; and float16 on other
    devices than CUDA, where train.py does not use it.
    size: 0 for one that is large enough for the device to reach its full speed.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    peaks = {}
    for name, dtype in DTYPES.items():
        if dtype == torch.bfloat16 and emulates_bf16(device):
            continue
        if dtype == torch.float16 and device.type != "cuda":
            continue
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        peaks[name] = 2 * size**3 / min(times(lambda a=a, b=b: a @ b, device, rounds=7))
    return peaks


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second with which a sum over 256 MiB reads memory: the best of 7 measurements."""
    numbers = torch.ones(1 << 26, device=device)  # float32
    return numbers.nbytes / min(times(numbers.sum, device, rounds=7))


def times(function: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls, after one warm-up call."""
    seconds(function, device)
    return [seconds(function, device) for _ in range(rounds)]


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes until the device has finished its work."""
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated by torch on a CUDA device, otherwise resident memory of this process.

    0 on Windows, where Python cannot tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux ru_maxrss can be the peak of the process that started this one, so VmHWM is preferred.
    with contextlib.suppress(OSError):
        if match := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(match[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS: bytes; Linux: KiB


def describe(device: torch.device) -> str:
    """The name of a GPU, or the device type and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def median_ratio(others: list[float], ours: list[float]) -> float:
    """How many times as fast ours is: the median over the rounds of other seconds / our seconds."""
    return statistics.median(other / our for other, our in zip(others, ours, strict=True))
