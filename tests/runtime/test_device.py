"""The choice of device, dtype and compilation, and the Runtime class."""

import pytest
import torch

from fradique.nn import cpu_features
from fradique.runtime import device as devices


def test_an_unavailable_device_is_refused():
    with pytest.raises(ValueError, match=r"device=gpu: not a device; use auto, cpu, mps, cuda or cuda:N"):
        devices.choose_device("gpu")
    with pytest.raises(ValueError, match="device=xpu: use auto"):
        devices.choose_device("xpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no cuda device"):
            devices.choose_device("cuda")
        assert devices.choose_device("auto", world=2).type == "cpu"


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices.choose_device("auto", local_rank=2, world=4) == torch.device("cuda:2")
    assert devices.choose_device("cuda", local_rank=3, world=4) == torch.device("cuda:3")
    assert devices.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="there are 4 CUDA devices"):
        devices.choose_device("cuda:4")


@pytest.mark.parametrize(
    ("device", "bf16", "n_embd", "vocab_size", "expected"),
    [
        ("cuda", True, 64, 96, "bfloat16"),
        ("cuda", False, 64, 96, "float16"),
        ("mps", True, 768, 50304, "float32"),
        ("cpu", True, 64, 96, "float32"),
        ("cpu", True, 384, 96, "bfloat16"),
        ("cpu", True, 64, 50304, "bfloat16"),
        ("cpu", False, 384, 50304, "float32"),
    ],
)
def test_dtype_auto_depends_on_device_and_model_size(monkeypatch, device, bf16, n_embd, vocab_size, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: bf16)
    assert devices.choose_dtype("auto", torch.device(device), n_embd, vocab_size)[0] == expected


def test_float16_needs_cuda():
    with pytest.raises(ValueError, match="float16 needs a GradScaler on CUDA"):
        devices.choose_dtype("float16", torch.device("cpu"), 64)
    assert devices.choose_dtype("bfloat16", torch.device("cpu"), 64) == ("bfloat16", "as set")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bfloat16_that_is_emulated_gives_a_warning(monkeypatch, device):
    monkeypatch.setattr(devices, "emulates_bf16", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    runtime = devices.setup_runtime(device=device, dtype="bfloat16")
    assert runtime.warnings == (
        f"dtype=bfloat16: this {device} has no bfloat16 arithmetic, and emulating it is slow; "
        "use --dtype=auto",
    )
    assert devices.setup_runtime(device=device, dtype="float32").warnings == ()
    monkeypatch.setattr(devices, "emulates_bf16", lambda device: False)
    assert devices.setup_runtime(device=device, dtype="bfloat16").warnings == ()


@pytest.mark.parametrize(
    ("capability", "amx", "avx512_bf16", "expected"),
    [
        ("AVX512", False, True, True),
        ("AVX512", True, False, True),
        ("AVX512", False, False, False),
        ("AVX2", True, True, False),  # ATEN_CPU_CAPABILITY=avx2
    ],
)
def test_bfloat16_needs_the_instructions_and_their_use(monkeypatch, capability, amx, avx512_bf16, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert cpu_features.cpu_has_bf16.__wrapped__() is expected


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", None),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_peak_flops_are_looked_up_by_the_name_of_the_gpu(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    runtime = devices.Runtime(torch.device("cuda:0"), torch.bfloat16, False)
    assert runtime.peak_flops() == peak


def test_a_cpu_has_no_known_peak_flops():
    assert devices.Runtime(torch.device("cpu"), torch.float32, False).peak_flops() is None


def test_autocast_is_off_in_float32():
    x = torch.ones(4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with devices.Runtime(torch.device("cpu"), dtype, False).autocast():
            assert (x @ x).dtype == dtype


def test_reductions_of_one_process_change_nothing():
    runtime = devices.setup_runtime(device="cpu")
    assert runtime.sum(1.5, 2) == [1.5, 2] and runtime.max(3) == [3]
    assert runtime.is_main and runtime.wrap_ddp(torch.nn.Linear(1, 1)).__class__ is torch.nn.Linear


@pytest.mark.parametrize(
    ("rows", "length", "microbatch_rows"),
    [(64, 256, 16), (12, 64, 12), (2, 1024, 2), (7, 2048, 1), (3, 9999, 1), (18, 1024, 3), (1, 4, 1)],
)
def test_microbatches_are_split_as_little_as_possible(rows, length, microbatch_rows, monkeypatch):
    monkeypatch.setattr(devices, "CPU_MAX_TOKENS", 4096)
    x = torch.arange(rows * length).view(rows, length)
    runtime = devices.Runtime(torch.device("cpu"), torch.float32, False)
    microbatches = runtime.split_microbatches([(x, x + 1), (x + 2, x + 3)])
    assert {microbatch[0].shape for microbatch in microbatches} == {(microbatch_rows, length)}
    assert torch.equal(torch.cat([microbatch[0] for microbatch in microbatches]), torch.cat([x, x + 2]))
    assert torch.equal(torch.cat([microbatch[1] for microbatch in microbatches]), torch.cat([x + 1, x + 3]))


def test_seed_dropout_equals_manual_seed():
    runtime = devices.Runtime(torch.device("cpu"), torch.float32, False)
    samples = []
    for seed in (runtime.seed_dropout, torch.manual_seed):
        seed(7)
        samples.append(torch.rand(3))
    assert torch.equal(*samples)
