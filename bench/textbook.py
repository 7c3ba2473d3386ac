"""The baseline of bench.train: a training step of GPT-2 in plain PyTorch, like that of nanoGPT.

It shares no code with Fradique. It runs in its own process, so that Fradique's settings of the process
(malloc, threads, caches) do not affect it. On a CPU, as in nanoGPT: float32, not compiled, AdamW that is not
fused, batches assembled in Python. On CUDA: bfloat16, compiled, fused AdamW.

    python -m bench.textbook '{"n_layer": 4, ...}' [--nanogpt FOLDER]

Each line of standard input is a number of steps to run. The reply is a line such as "seconds 1.23".
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fradique.io.terminal import command_output, path_argument


class Attention(nn.Module):
    """Causal self-attention: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            a.view(B, T, self.n_head, -1).transpose(1, 2) for a in self.c_attn(x).split(C, dim=2)
        )  # (B, n_head, T, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout)


class Block(nn.Module):
    """A transformer block with pre-norm: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + F.dropout(self.c_proj(F.gelu(self.c_fc(self.ln_2(x)))), self.dropout)


class BaselineGPT(nn.Module):
    """GPT-2: inputs x and targets y (B, T) -> logits (B, T, V) and loss."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = F.dropout(self.wte(x) + self.wpe(torch.arange(x.size(1), device=x.device)), self.dropout)
        logits = self.lm_head(self.ln_f(self.blocks(h)))
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())


class BaselineTrainer:
    """Model, optimizer and data of the baseline."""

    def __init__(self, settings: dict, nanogpt: Path | None) -> None:
        """settings: what bench.train.baseline_settings returns. nanogpt: a folder, to use nanoGPT's model."""
        config = SimpleNamespace(**settings)
        self.batch_size, self.block_size = config.batch_size, config.block_size
        self.accumulation = config.accumulation
        self.device = torch.device(config.device)
        self.is_cuda = self.device.type == "cuda"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high" if self.is_cuda else "highest")
        if nanogpt:
            self.model, self.optimizer = self._nanogpt(config, nanogpt)
        else:
            self.model = BaselineGPT(config).to(self.device)
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=self.is_cuda
            )
        self.forward = torch.compile(self.model) if self.is_cuda else self.model
        self.data = torch.randint(config.vocab_size, (1 << 20,), dtype=torch.int32)  # random tokens

    def _nanogpt(self, config: SimpleNamespace, folder: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and the optimizer of the nanoGPT in `folder`."""
        sys.path.insert(0, str(folder))
        import model  # nanoGPT's model.py

        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
        nanogpt_config = model.GPTConfig(**{name: getattr(config, name) for name in names})
        gpt = model.GPT(nanogpt_config).to(self.device)
        weight_decay, learning_rate, betas = 0.1, 1e-4, (0.9, 0.95)
        return gpt, gpt.configure_optimizers(weight_decay, learning_rate, betas, self.device.type)

    def batch(self) -> tuple[Tensor, Tensor]:
        """A random batch: inputs and targets, (B, T) each, on the device."""
        starts = torch.randint(len(self.data) - self.block_size, (self.batch_size,)).tolist()
        x = torch.stack([self.data[i : i + self.block_size].long() for i in starts])
        y = torch.stack([self.data[i + 1 : i + 1 + self.block_size].long() for i in starts])
        if self.is_cuda:
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def run(self, count: int) -> float:
        """Run `count` training steps and return their seconds."""
        start = time.perf_counter()
        for _ in range(count):
            for _ in range(self.accumulation):
                x, y = self.batch()
                with torch.autocast("cuda", torch.bfloat16) if self.is_cuda else contextlib.nullcontext():
                    _, batch_loss = self.forward(x, y)
                    loss = batch_loss / self.accumulation
                loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        return time.perf_counter() - start


class BaselineProcess:
    """Context manager: a BaselineTrainer in its own process."""

    def __init__(self, settings: dict, nanogpt: Path | None = None) -> None:
        """Start the process. For the arguments see `BaselineTrainer`."""
        command = [sys.executable, "-m", "bench.textbook", json.dumps(settings)]
        if nanogpt:
            command += ["--nanogpt", str(nanogpt)]
        root = Path(__file__).resolve().parent.parent
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", cwd=root
        )

    def __enter__(self) -> "BaselineProcess":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # the process ends when it has no more input
        self.process.wait()
        self.process.stdout.close()

    def run(self, count: int) -> float:
        """Run `count` training steps and return the seconds. Raises RuntimeError if the process has ended."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
        for line in self.process.stdout:  # other lines are the output of torch or nanoGPT
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError("the baseline process has ended; see its error message above")


@command_output()
def main() -> None:
    """The process of `BaselineProcess`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "settings", type=json.loads, help="JSON: sizes of the model and batch, and the device"
    )
    parser.add_argument(
        "--nanogpt", type=path_argument, metavar="FOLDER", help="use the nanoGPT in this folder"
    )
    args = parser.parse_args()
    trainer = BaselineTrainer(args.settings, args.nanogpt)
    for line in sys.stdin:
        print("seconds", trainer.run(int(line)), flush=True)


if __name__ == "__main__":
    main()
