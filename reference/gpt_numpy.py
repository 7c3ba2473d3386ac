"""GPT-2 in NumPy, forward and backward by hand.

    python reference/gpt_numpy.py loss     --weights model.safetensors --tokens val.bin
    python reference/gpt_numpy.py generate --weights model.safetensors --ids 464,3290 --count 20
    python reference/gpt_numpy.py train    --weights model.safetensors --tokens train.bin --steps 20

It reads the `model.safetensors` that Hugging Face keeps for any size of GPT-2 (Radford et al. 2019), and
tokens as raw little-endian uint16. NumPy computes, `safetensors` reads, and nothing else is imported.
NOTES.md, beside this file, derives each backward pass.

`f(x, w)` gives y and what its backward pass needs; `f_backward(dy, …)` takes dy, the gradient of the loss
with respect to y, and returns those of what f was given. All numbers are float32.

Shapes: B batch, T time (tokens), S keys seen, C width, H heads, D = C / H, V vocabulary, N = B T. Linear
layers keep their weights as GPT-2 does, (in, out).
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

Array = np.ndarray
Tensors = dict[str, Array]
EPS = np.float32(1e-5)  # added to the variance in a layer norm
BEND = np.float32(math.sqrt(2 / math.pi))  # of the tanh in gelu
CUBIC = np.float32(0.044715)


def linear(x: Array, w: Array, b: Array) -> Array:
    """y = x W + b:  x (N, I), w (I, O), b (O,) -> (N, O)."""
    y = x @ w
    y += b
    return y


def linear_backward(dy: Array, x: Array, w: Array) -> tuple[Array, Array, Array]:
    """dx = dy Wᵀ (N, I),  dW = xᵀ dy (I, O),  db = Σ_n dy (O,)."""
    return dy @ w.T, x.T @ dy, dy.sum(axis=0)


def layer_norm(x: Array, g: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    """y = g n + b, where n = (x - μ) / σ of each row:  x (N, C), g and b (C,) -> y (N, C), (n, 1/σ)."""
    n = x - x.mean(axis=1, keepdims=True)  # (N, C)
    variance = np.einsum("nc,nc->n", n, n) / np.float32(x.shape[1])
    inverse = (1 / np.sqrt(variance + EPS))[:, None]  # (N, 1)
    n *= inverse
    y = n * g
    y += b
    return y, (n, inverse)


def layer_norm_backward(dy: Array, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    """dn = g dy;  dx = (dn - mean(dn) - n mean(n dn)) / σ (N, C),  dg = Σ_n dy n (C,),  db = Σ_n dy (C,)."""
    n, inverse = kept  # (N, C), (N, 1)
    dx = dy * g  # dn
    along = np.einsum("nc,nc->n", dx, n)[:, None] / np.float32(n.shape[1])  # (N, 1)
    dx -= dx.mean(axis=1, keepdims=True)
    dx -= n * along
    dx *= inverse
    return dx, np.einsum("nc,nc->c", dy, n), dy.sum(axis=0)


def gelu(x: Array) -> tuple[Array, Array]:
    """y = x (1 + t) / 2, where t = tanh(√(2/π) (x + 0.044715 x³)) (Hendrycks & Gimpel 2016): y, and t."""
    t = x * x
    t *= BEND * CUBIC
    t += BEND
    t *= x
    np.tanh(t, out=t)
    y = t + 1
    y *= x
    y *= np.float32(0.5)
    return y, t


def gelu_backward(dy: Array, x: Array, t: Array) -> Array:
    """dx = dy ((1 + t) + x (1 - t²) √(2/π) (1 + 3 · 0.044715 x²)) / 2."""
    slope = x * x  # of what tanh is taken of
    slope *= 3 * BEND * CUBIC
    slope += BEND
    slope *= x
    dx = t * t
    np.subtract(1, dx, out=dx)
    dx *= slope
    dx += t
    dx += 1
    dx *= dy
    dx *= np.float32(0.5)
    return dx


def softmax(z: Array) -> Array:
    """p_i = exp(z_i) / Σ_j exp(z_j) along the last axis, in place of z. The largest is taken away first."""
    z -= z.max(axis=-1, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=-1, keepdims=True)
    return z


def softmax_backward(dp: Array, p: Array) -> Array:
    """dz = p (dp - Σ_j p_j dp_j), in place of dp."""
    dp -= np.einsum("...s,...s->...", dp, p)[..., None]
    dp *= p
    return dp


def attention(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """y = P v, P = softmax(q kᵀ / √D):  q (B, H, T, D), k and v (B, H, S, D) -> y as q, P (B, H, T, S).

    Causal: the queries are the last T of the S positions; a query sees its own key and those before it.
    """
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    p = q @ k.swapaxes(2, 3)  # (B, H, T, S)
    p *= np.float32(1 / math.sqrt(D))
    p += np.triu(np.full((T, S), -np.inf, np.float32), S - T + 1)  # what comes later weighs exp(-∞) = 0
    softmax(p)
    return p @ v, p


def attention_backward(dy: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, Array, Array]:
    """dP = dy vᵀ,  dS = softmax'(dP) / √D;  dq = dS k,  dk = dSᵀ q,  dv = Pᵀ dy: (B, H, T, D) each."""
    ds = softmax_backward(dy @ v.swapaxes(2, 3), p)  # (B, H, T, T)
    ds *= np.float32(1 / math.sqrt(q.shape[3]))
    return ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dy


def heads_apart(x: Array, B: int, heads: int) -> Array:
    """(N, C) -> (B, H, T, D). Backward: heads_together."""
    return x.reshape(B, -1, heads, x.shape[1] // heads).swapaxes(1, 2)


def heads_together(x: Array) -> Array:
    """(B, H, T, D) -> (N, C). Backward: heads_apart."""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B * T, H * D)


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Array]:
    """The mean of -log p of the targets, in nats:  logits (N, V), which become p; targets (N,) -> loss, p."""
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)  # (N,)
    largest = logits.max(axis=1)
    p = softmax(logits)
    # log p = z - log Σ exp(z), and the largest p is 1 / Σ exp(z - largest): a p may become 0
    return float((largest - np.log(p.max(axis=1), dtype=np.float64) - chosen).mean()), p


def cross_entropy_backward(p: Array, targets: Array) -> Array:
    """dlogits = (p - onehot(target)) / N, in place of p (N, V)."""
    p[np.arange(len(targets)), targets] -= 1
    p /= np.float32(len(targets))
    return p


class Cache:
    """The keys and values of all tokens so far, of every layer: (B, H, T so far, D)."""

    def __init__(self, room: int) -> None:
        self.room, self.length, self.layers = room, 0, {}

    def extend(self, at: str, k: Array, v: Array) -> tuple[Array, Array]:
        """Add T keys and values, (B, H, T, D) -> all S of them, (B, H, S, D)."""
        B, H, T, D = k.shape
        if at not in self.layers:
            self.layers[at] = np.empty((2, B, H, self.room, D), np.float32)
        both = self.layers[at]
        both[0, :, :, self.length : self.length + T] = k
        both[1, :, :, self.length : self.length + T] = v
        return both[0, :, :, : self.length + T], both[1, :, :, : self.length + T]


class GPT2:
    """The weights, by GPT-2's names (`h.0.attn.c_attn.weight`, …), and what is computed with them."""

    def __init__(self, weights: Tensors, n_head: int) -> None:
        self.weights, self.n_head = weights, n_head
        self.vocab_size, self.width = weights["wte.weight"].shape
        self.block_size = len(weights["wpe.weight"])
        self.n_layer = sum(name.endswith("ln_1.weight") for name in weights)

    def pair(self, name: str) -> tuple[Array, Array]:
        return self.weights[name + ".weight"], self.weights[name + ".bias"]

    def forward(self, ids: Array, cache: Cache | None = None) -> tuple[Array, list]:
        """Ids (B, T) -> x (N, C), of which `logits` are made, and what the backward pass needs.

        With a cache, the ids continue what it holds.
        """
        B, T = ids.shape
        start = cache.length if cache else 0
        if start + T > self.block_size:
            raise ValueError(f"{start + T} tokens do not fit the block of {self.block_size}")
        x = self.weights["wte.weight"][ids] + self.weights["wpe.weight"][start : start + T]  # (B, T, C)
        x = x.reshape(B * T, self.width)  # (N, C)
        kept: list = [ids]
        for layer in range(self.n_layer):
            x, saved = self.block(f"h.{layer}.", x, B, cache)
            kept.append(saved)
        if cache:
            cache.length += T
        x, norm = layer_norm(x, *self.pair("ln_f"))
        return x, [*kept, (x, norm)]

    def logits(self, x: Array) -> Array:
        """(N, C) -> (N, V): the output layer is the embedding again (Press & Wolf 2017)."""
        return x @ self.weights["wte.weight"].T

    def block(self, at: str, x: Array, B: int, cache: Cache | None) -> tuple[Array, tuple]:
        """x + attention(norm(x)), and to that + mlp(norm(that)):  (N, C) -> (N, C)."""
        a, norm_1 = layer_norm(x, *self.pair(at + "ln_1"))
        qkv = linear(a, *self.pair(at + "attn.c_attn"))  # (N, 3C)
        q, k, v = (heads_apart(part, B, self.n_head) for part in np.split(qkv, 3, axis=1))  # (B, H, T, D)
        if cache:
            k, v = cache.extend(at, k, v)  # (B, H, S, D)
        y, p = attention(q, k, v)  # (B, H, T, D), (B, H, T, S)
        y = heads_together(y)  # (N, C)
        x = x + linear(y, *self.pair(at + "attn.c_proj"))
        m, norm_2 = layer_norm(x, *self.pair(at + "ln_2"))
        wide = linear(m, *self.pair(at + "mlp.c_fc"))  # (N, 4C)
        bent, t = gelu(wide)  # (N, 4C)
        x = x + linear(bent, *self.pair(at + "mlp.c_proj"))
        return x, (a, norm_1, q, k, v, p, y, m, norm_2, wide, t, bent)

    def block_backward(self, at: str, dx: Array, kept: tuple, gradients: Tensors) -> Array:
        """Line by line what `block` did, from the last to the first: (N, C) -> (N, C)."""
        a, norm_1, q, k, v, p, y, m, norm_2, wide, t, bent = kept

        def back(f, name: str, dy: Array, saved) -> Array:  # noqa: ANN001
            dinput, dw, db = f(dy, saved, self.weights[at + name + ".weight"])
            gradients[at + name + ".weight"], gradients[at + name + ".bias"] = dw, db
            return dinput

        dbent = back(linear_backward, "mlp.c_proj", dx, bent)  # (N, 4C)
        dwide = gelu_backward(dbent, wide, t)  # (N, 4C)
        dm = back(linear_backward, "mlp.c_fc", dwide, m)  # (N, C)
        dx = dx + back(layer_norm_backward, "ln_2", dm, norm_2)
        dy = back(linear_backward, "attn.c_proj", dx, y)  # (N, C)
        each = attention_backward(heads_apart(dy, len(q), self.n_head), q, k, v, p)  # (B, H, T, D) each
        dqkv = np.concatenate([heads_together(part) for part in each], axis=1)  # (N, 3C)
        da = back(linear_backward, "attn.c_attn", dqkv, a)  # (N, C)
        return dx + back(layer_norm_backward, "ln_1", da, norm_1)

    def loss(self, ids: Array, targets: Array) -> float:
        """The mean cross-entropy of targets (B, T) after ids (B, T), in nats."""
        x, _ = self.forward(ids)
        return cross_entropy(self.logits(x), targets.reshape(-1))[0]

    def gradients(self, ids: Array, targets: Array) -> tuple[float, Tensors]:
        """The loss of targets (B, T) after ids (B, T), and its gradient for each of the weights."""
        x, kept = self.forward(ids)
        loss, p = cross_entropy(self.logits(x), targets.reshape(-1))
        return loss, self.backward(cross_entropy_backward(p, targets.reshape(-1)), kept)

    def backward(self, dlogits: Array, kept: list) -> Tensors:
        """The gradient of the logits (N, V), back through all that `forward` did: one for each weight."""
        ids, *blocks, (x, norm) = kept
        dwte = dlogits.T @ x  # (V, C), as output layer
        dx = dlogits @ self.weights["wte.weight"]  # (N, C)
        g: Tensors = {}
        dx, g["ln_f.weight"], g["ln_f.bias"] = layer_norm_backward(dx, norm, self.weights["ln_f.weight"])
        for layer in reversed(range(self.n_layer)):
            dx = self.block_backward(f"h.{layer}.", dx, blocks[layer], g)
        np.add.at(dwte, ids.reshape(-1), dx)  # as embedding: a token that occurs twice learns twice
        dwpe = np.zeros_like(self.weights["wpe.weight"])  # (block_size, C)
        dwpe[: ids.shape[1]] = dx.reshape(*ids.shape, -1).sum(axis=0)
        return g | {"wte.weight": dwte, "wpe.weight": dwpe}

    def generate(
        self, ids: list[int], count: int, temperature: float = 0.0, top_k: int = 0, seed: int = 1337
    ) -> list[int]:
        """`count` ids after these. At temperature 0 the likeliest each time, else drawn, of the `top_k` best.

        Each step reads one token and the cache. Where the block is full, the last half of it is read anew and
        the rest forgotten.
        """
        rng, written, cache = np.random.default_rng(seed), list(ids), Cache(self.block_size)
        fresh = written[-self.block_size :]
        for _ in range(count):
            if cache.length + len(fresh) > self.block_size:
                fresh, cache = written[-max(self.block_size // 2, 1) :], Cache(self.block_size)
            x, _ = self.forward(np.array([fresh]), cache)
            logits = self.logits(x[-1:])[0]  # (V,)
            if temperature == 0:
                token = int(logits.argmax())
            else:
                if 0 < top_k < len(logits):
                    logits[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
                p = softmax(logits.astype(np.float64) / temperature)
                token = int(rng.choice(len(p), p=p))
            fresh = [token]
            written.append(token)
        return written[len(ids) :]


class AdamW:
    """Adam (Kingma & Ba 2015, algorithm 1) with weight decay of its own (Loshchilov & Hutter 2019)."""

    def __init__(
        self, weights: Tensors, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8, decay: float = 0.1
    ) -> None:
        self.weights, self.beta1, self.beta2, self.eps, self.decay = weights, beta1, beta2, eps, decay
        self.m = {name: np.zeros_like(w) for name, w in weights.items()}
        self.v = {name: np.zeros_like(w) for name, w in weights.items()}
        self.steps = 0

    def step(self, gradients: Tensors, learning_rate: float) -> None:
        """w -= lr (m̂ / (√v̂ + ε) + decay w), in place. Vectors (biases, norms) do not decay."""
        self.steps += 1
        f = np.float32
        rate = f(learning_rate / (1 - self.beta1**self.steps))
        unbias = f(1 / (1 - self.beta2**self.steps))
        for name, w in self.weights.items():
            g, m, v = gradients[name], self.m[name], self.v[name]
            m += (g - m) * f(1 - self.beta1)
            v += (g * g - v) * f(1 - self.beta2)
            if w.ndim > 1:
                w *= f(1 - learning_rate * self.decay)
            w -= rate * m / (np.sqrt(v * unbias) + f(self.eps))


def load(path: Path, n_head: int = 0) -> GPT2:
    """Read `model.safetensors`. Heads: as told, else as in a `config.json` beside it, else of 64 as in GPT-2.

    Raises ValueError, with what is wrong, where the file holds no GPT-2.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    weights = {
        name.removeprefix("transformer."): np.ascontiguousarray(tensor, np.float32)
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))  # masks; the tied layer
    }
    if missing := [name for name in ("wte.weight", "wpe.weight", "ln_f.weight") if name not in weights]:
        raise ValueError(f"{path} holds no GPT-2: {', '.join(missing)} is not in it")
    for name in ("wte.weight", "wpe.weight"):
        if weights[name].ndim != 2:
            raise ValueError(f"{path} holds no GPT-2: {name} has the shape {weights[name].shape}")
    C = weights["wte.weight"].shape[1]
    beside = path.parent / "config.json"
    if not n_head and beside.exists():
        config = json.loads(beside.read_text())
        n_head = config.get("n_head") if isinstance(config, dict) else None
        n_head = n_head if isinstance(n_head, int) else 0
    model = GPT2(weights, n_head or max(C // 64, 1))
    for name, shape in shapes(model).items():
        if name not in weights or weights[name].shape != shape:
            found = f"has the shape {weights[name].shape}" if name in weights else "is missing"
            raise ValueError(f"{path} holds no GPT-2: {name} {found}, and {shape} is needed")
    if extra := sorted(set(weights) - set(shapes(model))):
        raise ValueError(f"{path} holds what GPT-2 has not: {', '.join(extra[:5])}")
    if model.n_head < 1 or C % model.n_head:
        raise ValueError(f"a width of {C} does not go into {model.n_head} heads: set --heads")
    return model


def shapes(model: GPT2) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a GPT-2 of this width and depth."""
    V, C = model.vocab_size, model.width
    expected = {"wte.weight": (V, C), "wpe.weight": (model.block_size, C)}
    parts = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
    parts |= {"ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    named = {f"h.{layer}.{part}": shape for layer in range(model.n_layer) for part, shape in parts.items()}
    for name, shape in (named | {"ln_f": (C,)}).items():
        expected |= {name + ".weight": shape, name + ".bias": shape[-1:]}
    return expected


def read_tokens(path: Path, model: GPT2, least: int) -> Array:
    """Raw little-endian uint16. Raises ValueError where they are too few, or one is not in the vocabulary."""
    tokens = np.fromfile(path, "<u2")
    if len(tokens) < least:
        raise ValueError(f"{path} holds {len(tokens)} tokens, and {least} are needed: --block says how many")
    if (largest := int(tokens.max())) >= model.vocab_size:
        raise ValueError(f"{path} holds the token {largest}, and the model knows {model.vocab_size}")
    return tokens.astype(np.int64)


def options() -> argparse.ArgumentParser:
    told = argparse.ArgumentParser(description="GPT-2 in NumPy: loss on a text, writing, training.")
    told.add_argument("command", choices=("loss", "generate", "train"))
    told.add_argument("--weights", type=Path, required=True, help="model.safetensors of a GPT-2")
    told.add_argument("--tokens", type=Path, help="raw little-endian uint16, as train.bin and val.bin are")
    told.add_argument(
        "--ids", help="generate: what to begin with, as in 464,3290; else the first of --tokens"
    )
    told.add_argument("--heads", type=int, default=0, help="attention heads; 0: as in config.json, or of 64")
    told.add_argument("--block", type=int, default=0, help="tokens in a row; 0: 64 to train, else the block")
    told.add_argument("--batch", type=int, default=4, help="rows at a time")
    told.add_argument("--steps", type=int, help="train: steps, if not 20; loss: batches at most, if not all")
    told.add_argument("--learning_rate", type=float, default=1e-4, help="train: AdamW's")
    told.add_argument("--count", type=int, default=40, help="generate: ids to write")
    told.add_argument("--temperature", type=float, default=0.0, help="generate: 0 takes the likeliest")
    told.add_argument("--top_k", type=int, default=0, help="generate: draw from the k likeliest; 0: from all")
    told.add_argument("--seed", type=int, default=1337, help="of what is drawn")
    told.add_argument("--out", type=Path, help="train: where to write the trained weights")
    return told


def loss_of_file(model: GPT2, tokens: Array, block: int, batch: int, most: int) -> float:
    """The mean loss over windows of `block` tokens, side by side, each token foretold once."""
    windows = (len(tokens) - 1) // block
    ids = tokens[: windows * block].reshape(windows, block)
    targets = tokens[1 : windows * block + 1].reshape(windows, block)
    total, count = 0.0, 0
    for i in range(0, min(windows, most * batch or windows), batch):
        rows = slice(i, i + batch)
        total += model.loss(ids[rows], targets[rows]) * len(ids[rows])
        count += len(ids[rows])
    return total / count


def train(model: GPT2, tokens: Array, given: argparse.Namespace, block: int) -> None:
    """Windows side by side, from the first again after the last."""
    optimizer, windows = AdamW(model.weights), (len(tokens) - 1) // block
    if given.out and not os.access(given.out.parent, os.W_OK):
        raise ValueError(f"{given.out} cannot be written")  # told now, not after the training
    for step in range(1, (20 if given.steps is None else given.steps) + 1):
        begun = time.perf_counter()
        starts = block * (np.arange((step - 1) * given.batch, step * given.batch) % windows)
        rows = tokens[starts[:, None] + np.arange(block + 1)]  # (B, T + 1)
        loss, gradients = model.gradients(rows[:, :-1], rows[:, 1:])
        taken, read = time.perf_counter() - begun, given.batch * block
        optimizer.step(gradients, given.learning_rate)
        whole = time.perf_counter() - begun
        print(
            f"step {step:4d}  loss {loss:.6f}  {read / taken:.0f} tokens/s, {read / whole:.0f} with AdamW",
            flush=True,
        )
    if given.out:
        save_file(model.weights, given.out, {"format": "pt"})
        print(f"weights in {given.out}")


def run(given: argparse.Namespace) -> None:
    model = load(given.weights, given.heads)
    block = given.block or (min(64, model.block_size) if given.command == "train" else model.block_size)
    if not 1 <= block <= model.block_size or given.batch < 1 or min(given.steps or 0, given.count) < 0:
        raise ValueError(
            f"--block must be 1 to {model.block_size}, --batch at least 1, --steps and --count 0"
        )
    if given.command == "generate":
        if given.ids:
            if not all(part.strip().isdecimal() for part in given.ids.split(",")):
                raise ValueError(f"--ids={given.ids}: whole numbers are needed, with commas between them")
            ids = [int(part) for part in given.ids.split(",")]
        elif given.tokens:
            ids = read_tokens(given.tokens, model, 1)[:block].tolist()
        else:
            raise ValueError("generate needs something to begin with: --ids 464,3290 or --tokens FILE")
        if wrong := [i for i in ids if not 0 <= i < model.vocab_size]:
            raise ValueError(f"the model knows {model.vocab_size} tokens, and {wrong[0]} is none of them")
        begun = time.perf_counter()
        written = model.generate(ids, given.count, given.temperature, given.top_k, given.seed)
        print(",".join(map(str, written)))
        print(f"{given.count / (time.perf_counter() - begun):.1f} tokens/s", file=sys.stderr)
        return
    if not given.tokens:
        raise ValueError(f"{given.command} needs --tokens")
    tokens = read_tokens(given.tokens, model, block + 1)
    if given.command == "train":
        train(model, tokens, given, block)
    else:
        loss = loss_of_file(model, tokens, block, given.batch, given.steps or 0)
        print(f"loss {loss:.6f}  perplexity {np.exp(min(loss, 700.0)):.3f}")


def main() -> None:
    try:
        run(options().parse_args())
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
