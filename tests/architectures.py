"""The configs of config/arch as small models, for the tests that go through all of them."""

from collections.abc import Callable

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


@pytest.fixture(scope="session")
def architecture(tmp_path_factory) -> Callable[..., GPTConfig]:
    """name, flags -> the model of config/arch/<name>.py behind a training config with a block of 16."""
    training = tmp_path_factory.mktemp("config") / "train_small.py"
    training.write_text("block_size = 16\n")

    def read(name: str, **flags: object) -> GPTConfig:
        sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32} | ({"prefix_len": 4} if name == "glm130b" else {})
        flags = sizes | flags
        argv = [
            str(training),
            str(ARCH / f"{name}.py"),
            *(f"--{key}={value}" for key, value in flags.items()),
        ]
        return model_config(resolve(TrainSettings, argv).settings, vocab_size=31)

    return read


def scatter(model: nn.Module, seed: int = 0, spread: float = 0.3) -> nn.Module:
    """Make every parameter that learns random, so that no bias is 0 and no gain is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * spread)
    return model.eval()


def random_model(config: GPTConfig, seed: int = 0, spread: float = 0.3) -> GPT:
    torch.manual_seed(seed)
    return scatter(GPT(config), seed, spread)


def small(**changes: object) -> GPTConfig:
    return GPTConfig(**SMALL | changes)


def ids(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))
