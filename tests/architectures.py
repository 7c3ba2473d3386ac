"""Small models with random parameters, for every file in config/arch and for any config."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support import ROOT
from torch import Tensor, nn

from configurator import resolve
from fradique.training.model_setup import model_config
from model import GPT, GPTConfig
from train import TrainSettings

ARCH = ROOT / "config" / "arch"
NAMES = sorted(path.stem for path in ARCH.glob("*.py"))
SMALL = {"block_size": 16, "vocab_size": 31, "n_layer": 2, "n_head": 4, "n_embd": 32}
TINY = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(scope="session")
def architecture(tmp_path_factory) -> Callable[..., GPTConfig]:
    """A function (name, **flags) -> a small config of config/arch/<name>.py with block_size 16."""
    training = tmp_path_factory.mktemp("config") / "train_small.py"
    training.write_text("block_size = 16\n")

    def load_config(name: str, **flags: object) -> GPTConfig:
        sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32} | ({"prefix_len": 4} if name == "glm130b" else {})
        flags = sizes | flags
        argv = [
            str(training),
            str(ARCH / f"{name}.py"),
            *(f"--{key}={value}" for key, value in flags.items()),
        ]
        return model_config(resolve(TrainSettings, argv).settings, vocab_size=31)

    return load_config


def scatter(model: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Add noise to every trained parameter, so that no bias is 0 and no norm weight is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * std)
    return model.eval()


def random_model(config: GPTConfig, seed: int = 0, std: float = 0.3) -> GPT:
    """A model of `config` with random parameters, in evaluation mode."""
    torch.manual_seed(seed)
    return scatter(GPT(config), seed, std)


def small(**changes: object) -> GPTConfig:
    """The config SMALL with changes."""
    return GPTConfig(**SMALL | changes)


def tiny(seed: int = 0, std: float = 0.3, **changes: object) -> GPT:
    """A model of the config TINY with changes and random parameters, in evaluation mode."""
    torch.manual_seed(seed)
    model = GPT(replace(TINY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


def ids(*shape: int, vocab_size: int = 31, seed: int = 3) -> Tensor:
    """Random token ids."""
    return torch.randint(vocab_size, shape, generator=seeded(seed))


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of the trained parameters that the loss depends on, by name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def max_abs(tensors: dict[str, Tensor]) -> float:
    return max(tensor.abs().max().item() for tensor in tensors.values())
