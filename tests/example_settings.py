"""A settings class for the tests of configurator.py, and helpers that resolve it."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import configurator
from configurator import resolve, setting

ROOT = Path(configurator.__file__).parent


@dataclass(frozen=True)
class Settings:
    """python toy.py [config/file.py ...] [--key=value ...]"""

    out_dir: str = setting("out", "folder of the run", group="run")
    wandb_log: bool = setting(False, "log to wandb")
    wandb_run_name: str = setting("toy", "name of the run")
    overwrite: bool = setting(False, "replace an existing run")
    seed: int = setting(1337, "random seed")
    start: str = setting("\n", "prompt")
    dataset: str = setting("toy", "corpus")
    n_layer: int = setting(12, "blocks", lo=1, group="model")
    n_head: int = setting(12, "heads", lo=1)
    n_embd: int = setting(768, "width", lo=1)
    dropout: float = setting(0.0, "share of activations dropped", lo=0.0, hi=1.0)
    bias: bool = setting(False, "biases")
    gradient_accumulation_steps: int = setting(40, "micro-batches", lo=1, group="optimization")
    max_iters: int = setting(600000, "steps", lo=0)
    lr_decay_iters: int = setting(600000, "steps of decay", lo=0)
    learning_rate: float = setting(6e-4, "peak learning rate", above=0)
    top_k: int | None = setting(None, "sample from the k most probable tokens", lo=-1)
    min_p: float | None = setting(0.1, "sample from tokens that are this probable", lo=0, hi=1)
    compile: bool | str = setting("auto", "torch.compile", choices=("auto", True, False))
    device: str = setting("auto", "device", choices=("auto", "cpu", "cuda", "mps"))

    def problems(self) -> list[str]:
        if self.n_embd % self.n_head:
            return [f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}"]
        return []


def write(name, text):
    """Write a file and return its name."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


def get(*argv):
    """The settings of a command line."""
    return resolve(Settings, argv).settings


def problem(*argv, **options):
    """The message of the ValueError that a command line raises."""
    with pytest.raises(ValueError) as raised:
        resolve(Settings, argv, **options)
    return str(raised.value)
