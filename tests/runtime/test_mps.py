"""Apple's GPU, simulated by fake_mps.py: no tensor of float64 is made on it, from training to pictures."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fake_mps import MPS, fake_mps
from support import ROOT, losses, run_lab, run_training

import sample
from configurator import command
from fradique.runtime import mps

LAB = ("attention", "embeddings", "sampling", "tokens")


@pytest.fixture(scope="module")
def device():
    if torch.backends.mps.is_built():
        pytest.skip("torch has the real device")
    with fake_mps():
        yield str(MPS)


def test_the_device_refuses_float64(device):
    x = torch.ones(2, 3).to(device)
    assert x.device == MPS and (x @ x.T).tolist() == [[3.0, 3.0], [3.0, 3.0]]
    for make_float64 in (
        x.double,
        lambda: x.to(torch.float64),
        lambda: x.sum(dtype=torch.float64),
        lambda: torch.ones(2, dtype=torch.float64).to(device),
        lambda: torch.zeros(2, dtype=torch.float64, device=device),
    ):
        with pytest.raises(TypeError, match="float64"):
            make_float64()
    assert x.cpu().double().dtype == torch.float64


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("modern", [False, True], ids=["gpt2", "llama"])
def test_a_run_has_the_losses_of_a_cpu(settings, tmp_path, device, optimizer, modern):
    shape = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 1} if modern else {}
    settings = replace(settings, optimizer=optimizer, max_iters=6, lr_decay_iters=8, dropout=0.0, **shape)
    on_cpu = replace(settings, out_dir=str(tmp_path / "cpu"))
    assert run_training(replace(settings, device=device))[0] == 0
    resumed = replace(settings, device=device, init_from="resume", max_iters=8)
    assert run_training(resumed)[0] == run_training(replace(on_cpu, max_iters=8))[0] == 0
    expected = losses(on_cpu.out_dir)
    assert losses(settings.out_dir) == pytest.approx(expected, abs=1e-3) and len(expected) == 8


def test_text_and_pictures_of_a_model_on_the_device(settings, device, capsys):
    run_training(replace(settings, max_iters=2, device=device))
    capsys.readouterr()
    out_dir = f"--out_dir={settings.out_dir}"
    for flags in ([], ["--top_k=3", "--top_p=0.9", "--min_p=0.01"], ["--temperature=0"], ["--cache=False"]):
        arguments = [out_dir, f"--device={device}", "--start=amor", "--max_new_tokens=5", *flags]
        assert command(sample.main, sample.SampleSettings, arguments) == 0
        assert capsys.readouterr().out.startswith("amor")
    for name in LAB:
        result = run_lab(f"lab.{name}", out_dir, f"--device={device}")
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["train", "sample", "lab.common", "bench.machine"])
def test_a_mac_computes_on_the_cpu_what_mps_lacks(module):
    """torch reads the variable when it is imported."""
    code = (
        "import os, sys; sys.platform = 'darwin'; sys.modules['torch'] = None\n"
        f"try: import {module}\nexcept ImportError: print(os.environ['PYTORCH_ENABLE_MPS_FALLBACK'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_ENABLE_MPS_FALLBACK"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert result.stdout.split() == [b"1"], result.stderr


def test_only_a_mac_without_a_choice_gets_the_fallback(monkeypatch):
    name = "PYTORCH_ENABLE_MPS_FALLBACK"
    for platform, before, after in (("linux", None, None), ("darwin", None, "1"), ("darwin", "0", "0")):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.delenv(name, raising=False)
        if before:
            monkeypatch.setenv(name, before)
        mps.fall_back_to_cpu()
        assert os.environ.get(name) == after
    monkeypatch.delenv(name)
