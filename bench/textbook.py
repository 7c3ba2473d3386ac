"""The baseline of bench.train: a GPT-2 training step as nanoGPT has it, in plain PyTorch.

It shares no code with Fradique and runs in its own process, so that our process settings (malloc, threads,
caches) do not affect it. On a CPU: float32 and eager, as nanoGPT is there, unfused AdamW, batches cut in
Python. On CUDA: bfloat16, compiled, fused AdamW.

    python -m bench.textbook '{"n_layer": 4, ...}' [--nanogpt FOLDER]

Each line of standard input is a number of steps to run; the answer is the line "seconds S".
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


class Attention(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.c = c
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            a.view(B, T, self.c.n_head, -1).transpose(1, 2) for a in self.c_attn(x).split(C, dim=2)
        )  # (B, n_head, T, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.c.dropout, is_causal=True)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.c.dropout)


class Block(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.dropout = c.dropout
        self.ln_1, self.ln_2 = (nn.LayerNorm(c.n_embd, bias=c.bias) for _ in range(2))
        self.attn = Attention(c)
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + F.dropout(self.c_proj(F.gelu(self.c_fc(self.ln_2(x)))), self.dropout)


class BaselineGPT(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.dropout = c.dropout
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.blocks = nn.Sequential(*(Block(c) for _ in range(c.n_layer)))
        self.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = F.dropout(self.wte(x) + self.wpe(torch.arange(x.size(1), device=x.device)), self.dropout)
        logits = self.lm_head(self.ln_f(self.blocks(h)))
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())


class BaselineTrainer:
    """Model, optimizer and data of the baseline."""

    def __init__(self, shape: dict, nanogpt: Path | None) -> None:
        c = SimpleNamespace(**shape)
        self.device, self.batch_size, self.block_size = torch.device(c.device), c.batch_size, c.block_size
        self.accumulation, self.is_cuda = c.accumulation, self.device.type == "cuda"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high" if self.is_cuda else "highest")
        if nanogpt:
            self.model, self.optimizer = self._nanogpt(c, nanogpt)
        else:
            self.model = BaselineGPT(c).to(self.device)
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=self.is_cuda
            )
        self.forward = torch.compile(self.model) if self.is_cuda else self.model
        self.data = torch.randint(c.vocab_size, (1 << 20,), dtype=torch.int32)

    def _nanogpt(self, c: SimpleNamespace, folder: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
        sys.path.insert(0, str(folder))
        import model  # nanoGPT's model.py

        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
        gpt = model.GPT(model.GPTConfig(**{name: getattr(c, name) for name in names})).to(self.device)
        return gpt, gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), self.device.type)

    def batch(self) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.data) - self.block_size, (self.batch_size,)).tolist()
        x = torch.stack([self.data[i : i + self.block_size].long() for i in starts])
        y = torch.stack([self.data[i + 1 : i + 1 + self.block_size].long() for i in starts])
        if self.is_cuda:
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def run(self, count: int) -> float:
        """Run `count` steps and return the seconds they took."""
        start = time.perf_counter()
        for _ in range(count):
            for _ in range(self.accumulation):
                x, y = self.batch()
                with torch.autocast("cuda", torch.bfloat16) if self.is_cuda else contextlib.nullcontext():
                    loss = self.forward(x, y)[1] / self.accumulation
                loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - start


class BaselineProcess:
    """A context manager: a baseline trainer in its own process."""

    def __init__(self, shape: dict, nanogpt: Path | None = None) -> None:
        command = [sys.executable, "-m", "bench.textbook", json.dumps(shape)]
        if nanogpt:
            command += ["--nanogpt", str(nanogpt)]
        root = Path(__file__).resolve().parent.parent
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
        )

    def __enter__(self) -> "BaselineProcess":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, count: int) -> float:
        """Run `count` steps and return the seconds. Raises RuntimeError if the process has ended."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError("the baseline process has ended; see its error message above")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", type=json.loads)
    parser.add_argument("--nanogpt", type=Path)
    args = parser.parse_args()
    trainer = BaselineTrainer(args.shape, args.nanogpt)
    for line in sys.stdin:
        print("seconds", trainer.run(int(line)), flush=True)


if __name__ == "__main__":
    main()
