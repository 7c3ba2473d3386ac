"""GPT-2 in NumPy, forward and backward by hand.

    python reference/gpt_numpy.py loss     --weights model.safetensors --tokens val.bin
    python reference/gpt_numpy.py generate --weights model.safetensors --ids 464,3290 --count 20
    python reference/gpt_numpy.py train    --weights model.safetensors --tokens train.bin --steps 20

It reads a `model.safetensors` of Hugging Face for any size of GPT-2 (Radford et al. 2019), and tokens as raw
little-endian uint16. It imports NumPy, `safetensors` for reading, and the standard library. NOTES.md in this
folder derives each backward pass.

`f(x, w)` returns y and the values that its backward pass needs; `f_backward(dy, …)` takes dy, the gradient of
the loss with respect to y, and returns the gradients of the inputs of f. All numbers are float32.

Shapes: B batch, T time (tokens), S keys, C width, H heads, D = C / H, V vocabulary, N = B T. The weights of
linear layers are (in, out), as in GPT-2's files.
"""

import argparse
import codecs
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

Array = np.ndarray
Tensors = dict[str, Array]
EPS = np.float32(1e-5)  # added to the variance in a layer norm
PUBLISHED_SIZES = ((12, 768), (24, 1024), (36, 1280), (48, 1600))  # (layers, C) of gpt2 to gpt2-xl
GELU_SCALE = np.float32(math.sqrt(2 / math.pi))  # in the tanh of gelu
GELU_CUBIC = np.float32(0.044715)


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
    inverse_std = (1 / np.sqrt(variance + EPS))[:, None]  # (N, 1)
    n *= inverse_std
    y = n * g
    y += b
    return y, (n, inverse_std)


def layer_norm_backward(dy: Array, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    """dn = g dy;  dx = (dn - mean(dn) - n mean(n dn)) / σ (N, C),  dg = Σ_n dy n (C,),  db = Σ_n dy (C,)."""
    n, inverse_std = saved  # (N, C), (N, 1)
    dx = dy * g  # dn
    along = np.einsum("nc,nc->n", dx, n)[:, None] / np.float32(n.shape[1])  # (N, 1)
    dx -= dx.mean(axis=1, keepdims=True)
    dx -= n * along
    dx *= inverse_std
    return dx, np.einsum("nc,nc->c", dy, n), dy.sum(axis=0)


def gelu(x: Array) -> tuple[Array, Array]:
    """y = x (1 + t) / 2, where t = tanh(√(2/π) (x + 0.044715 x³)) (Hendrycks & Gimpel 2016): y, and t."""
    t = x * x
    t *= GELU_SCALE * GELU_CUBIC
    t += GELU_SCALE
    t *= x
    np.tanh(t, out=t)
    y = t + 1
    y *= x
    y *= np.float32(0.5)
    return y, t


def gelu_backward(dy: Array, x: Array, t: Array) -> Array:
    """dx = dy ((1 + t) + x (1 - t²) √(2/π) (1 + 3 · 0.044715 x²)) / 2."""
    slope = x * x  # derivative of the argument of tanh
    slope *= 3 * GELU_SCALE * GELU_CUBIC
    slope += GELU_SCALE
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
    """p_i = exp(z_i) / Σ_j exp(z_j) along the last axis, in place. The largest z is subtracted first."""
    z -= z.max(axis=-1, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=-1, keepdims=True)
    return z


def softmax_backward(dp: Array, p: Array) -> Array:
    """dz = p (dp - Σ_j p_j dp_j), in place: dp becomes dz."""
    dp -= np.einsum("...s,...s->...", dp, p)[..., None]
    dp *= p
    return dp


def attention(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """y = P v, P = softmax(q kᵀ / √D):  q (B, H, T, D), k and v (B, H, S, D) -> y (as q), P (B, H, T, S).

    Causal: the queries are the last T of the S positions; a query attends to its own key and earlier ones.
    """
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    p = q @ k.swapaxes(2, 3)  # (B, H, T, S)
    p *= np.float32(1 / math.sqrt(D))
    p += np.triu(np.full((T, S), -np.inf, np.float32), S - T + 1)  # later keys have the weight exp(-∞) = 0
    softmax(p)
    return p @ v, p


def attention_backward(dy: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, Array, Array]:
    """dP = dy vᵀ,  dS = softmax'(dP) / √D;  dq = dS k,  dk = dSᵀ q,  dv = Pᵀ dy: (B, H, T, D) each."""
    ds = softmax_backward(dy @ v.swapaxes(2, 3), p)  # (B, H, T, T)
    ds *= np.float32(1 / math.sqrt(q.shape[3]))
    return ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dy


def split_heads(x: Array, B: int, heads: int) -> Array:
    """(N, C) -> (B, H, T, D). Backward: merge_heads."""
    return x.reshape(B, -1, heads, x.shape[1] // heads).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
    """(B, H, T, D) -> (N, C). Backward: split_heads."""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B * T, H * D)


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Array]:
    """The mean of -log p of the targets, in nats:  logits (N, V), which become p; targets (N,) -> loss, p."""
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)  # (N,)
    largest = logits.max(axis=1)
    p = softmax(logits)
    # log p = z - log Σ exp(z), and the largest p is 1 / Σ exp(z - largest); p itself may round to 0
    return float((largest - np.log(p.max(axis=1), dtype=np.float64) - chosen).mean()), p


def cross_entropy_backward(p: Array, targets: Array) -> Array:
    """dlogits = (p - onehot(target)) / N, in place: p (N, V) becomes dlogits."""
    p[np.arange(len(targets)), targets] -= 1
    p /= np.float32(len(targets))
    return p


class Cache:
    """KV cache: the keys and values of all tokens so far, for every layer, (B, H, S, D)."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length, self.layers = capacity, 0, {}

    def extend(self, prefix: str, k: Array, v: Array) -> tuple[Array, Array]:
        """Append T keys and values (B, H, T, D). Returns all S of them, (B, H, S, D)."""
        B, H, T, D = k.shape
        if prefix not in self.layers:
            self.layers[prefix] = np.empty((2, B, H, self.capacity, D), np.float32)
        keys_values = self.layers[prefix]
        keys_values[0, :, :, self.length : self.length + T] = k
        keys_values[1, :, :, self.length : self.length + T] = v
        return keys_values[0, :, :, : self.length + T], keys_values[1, :, :, : self.length + T]


class GPT2:
    """The model. `weights` has GPT-2's names (`h.0.attn.c_attn.weight`, …)."""

    def __init__(self, weights: Tensors, n_head: int) -> None:
        self.weights, self.n_head = weights, n_head
        self.vocab_size, self.width = weights["wte.weight"].shape
        self.block_size = len(weights["wpe.weight"])
        self.n_layer = sum(name.endswith("ln_1.weight") for name in weights)

    def params(self, name: str) -> tuple[Array, Array]:
        return self.weights[name + ".weight"], self.weights[name + ".bias"]

    def forward(self, ids: Array, cache: Cache | None = None) -> tuple[Array, list]:
        """Ids (B, T) -> x (N, C), the input of `logits`, and the values that the backward pass needs.

        With a cache, the ids continue the tokens in it.
        """
        B, T = ids.shape
        start = cache.length if cache else 0
        if start + T > self.block_size:
            raise ValueError(f"{start + T} tokens exceed the block size of {self.block_size}")
        x = self.weights["wte.weight"][ids] + self.weights["wpe.weight"][start : start + T]  # (B, T, C)
        x = x.reshape(B * T, self.width)  # (N, C)
        saved: list = [ids]
        for layer in range(self.n_layer):
            x, block_saved = self.block(f"h.{layer}.", x, B, cache)
            saved.append(block_saved)
        if cache:
            cache.length += T
        x, norm = layer_norm(x, *self.params("ln_f"))
        return x, [*saved, (x, norm)]

    def logits(self, x: Array) -> Array:
        """(N, C) -> (N, V): the output layer is tied to the embedding (Press & Wolf 2017)."""
        return x @ self.weights["wte.weight"].T

    def block(self, prefix: str, x: Array, B: int, cache: Cache | None) -> tuple[Array, tuple]:
        """x = x + attention(norm(x)), then x + mlp(norm(x)):  (N, C) -> (N, C)."""
        a, norm_1 = layer_norm(x, *self.params(prefix + "ln_1"))
        qkv = linear(a, *self.params(prefix + "attn.c_attn"))  # (N, 3C)
        q, k, v = (split_heads(third, B, self.n_head) for third in np.split(qkv, 3, axis=1))  # (B, H, T, D)
        if cache:
            k, v = cache.extend(prefix, k, v)  # (B, H, S, D)
        y, p = attention(q, k, v)  # (B, H, T, D), (B, H, T, S)
        y = merge_heads(y)  # (N, C)
        x = x + linear(y, *self.params(prefix + "attn.c_proj"))
        m, norm_2 = layer_norm(x, *self.params(prefix + "ln_2"))
        hidden = linear(m, *self.params(prefix + "mlp.c_fc"))  # (N, 4C)
        act, t = gelu(hidden)  # (N, 4C)
        x = x + linear(act, *self.params(prefix + "mlp.c_proj"))
        return x, (a, norm_1, q, k, v, p, y, m, norm_2, hidden, t, act)

    def block_backward(self, prefix: str, dx: Array, block_saved: tuple, gradients: Tensors) -> Array:
        """The lines of `block` in reverse order: (N, C) -> (N, C)."""
        a, norm_1, q, k, v, p, y, m, norm_2, hidden, t, act = block_saved

        def backprop(layer_backward, name: str, dy: Array, saved) -> Array:  # noqa: ANN001
            dinput, dw, db = layer_backward(dy, saved, self.weights[prefix + name + ".weight"])
            gradients[prefix + name + ".weight"], gradients[prefix + name + ".bias"] = dw, db
            return dinput

        dact = backprop(linear_backward, "mlp.c_proj", dx, act)  # (N, 4C)
        dhidden = gelu_backward(dact, hidden, t)  # (N, 4C)
        dm = backprop(linear_backward, "mlp.c_fc", dhidden, m)  # (N, C)
        dx = dx + backprop(layer_norm_backward, "ln_2", dm, norm_2)
        dy = backprop(linear_backward, "attn.c_proj", dx, y)  # (N, C)
        dq_dk_dv = attention_backward(split_heads(dy, len(q), self.n_head), q, k, v, p)  # (B, H, T, D) each
        dqkv = np.concatenate([merge_heads(gradient) for gradient in dq_dk_dv], axis=1)  # (N, 3C)
        da = backprop(linear_backward, "attn.c_attn", dqkv, a)  # (N, C)
        return dx + backprop(layer_norm_backward, "ln_1", da, norm_1)

    def loss(self, ids: Array, targets: Array) -> float:
        """The mean cross-entropy of targets (B, T) after ids (B, T), in nats."""
        x, _ = self.forward(ids)
        return cross_entropy(self.logits(x), targets.reshape(-1))[0]

    def gradients(self, ids: Array, targets: Array) -> tuple[float, Tensors]:
        """The loss of targets (B, T) after ids (B, T), and its gradient with respect to each weight."""
        x, saved = self.forward(ids)
        loss, p = cross_entropy(self.logits(x), targets.reshape(-1))
        return loss, self.backward(cross_entropy_backward(p, targets.reshape(-1)), saved)

    def backward(self, dlogits: Array, saved: list) -> Tensors:
        """The gradient of the logits (N, V) -> the gradient of each weight."""
        ids, *blocks, (x, norm) = saved
        dwte = dlogits.T @ x  # (V, C), as the output layer
        dx = dlogits @ self.weights["wte.weight"]  # (N, C)
        g: Tensors = {}
        dx, g["ln_f.weight"], g["ln_f.bias"] = layer_norm_backward(dx, norm, self.weights["ln_f.weight"])
        for layer in reversed(range(self.n_layer)):
            dx = self.block_backward(f"h.{layer}.", dx, blocks[layer], g)
        np.add.at(dwte, ids.reshape(-1), dx)  # as the embedding: repeated tokens add up
        dwpe = np.zeros_like(self.weights["wpe.weight"])  # (block_size, C)
        dwpe[: ids.shape[1]] = dx.reshape(*ids.shape, -1).sum(axis=0)
        return g | {"wte.weight": dwte, "wpe.weight": dwpe}

    def generate(
        self, ids: list[int], count: int, temperature: float = 0.0, top_k: int = 0, seed: int = 1337
    ) -> list[int]:
        """`count` ids that continue `ids`: the most probable one each time at temperature 0, else sampled.

        `top_k` > 0 samples from the `top_k` most probable ids. With the cache, each step computes one token.
        When the block is full, a new cache is computed from the last half block of tokens.
        """
        rng, all_ids, cache = np.random.default_rng(seed), list(ids), Cache(self.block_size)
        new_ids = all_ids[-self.block_size :]
        for _ in range(count):
            if cache.length + len(new_ids) > self.block_size:
                new_ids, cache = all_ids[-max(self.block_size // 2, 1) :], Cache(self.block_size)
            x, _ = self.forward(np.array([new_ids]), cache)
            logits = self.logits(x[-1:])[0]  # (V,)
            if temperature == 0:
                token = int(logits.argmax())
            else:
                if 0 < top_k < len(logits):
                    logits[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
                p = softmax(logits.astype(np.float64) / temperature)
                token = int(rng.choice(len(p), p=p))
            new_ids = [token]
            all_ids.append(token)
        return all_ids[len(ids) :]


class AdamW:
    """Adam (Kingma & Ba 2015, algorithm 1) with decoupled weight decay (Loshchilov & Hutter 2019)."""

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
        f32 = np.float32
        rate = f32(learning_rate / (1 - self.beta1**self.steps))
        v_correction = f32(1 / (1 - self.beta2**self.steps))
        for name, w in self.weights.items():
            g, m, v = gradients[name], self.m[name], self.v[name]
            m += (g - m) * f32(1 - self.beta1)
            v += (g * g - v) * f32(1 - self.beta2)
            if w.ndim > 1:
                w *= f32(1 - learning_rate * self.decay)
            w -= rate * m / (np.sqrt(v * v_correction) + f32(self.eps))


def load(path: Path, n_head: int = 0) -> GPT2:
    """Read `model.safetensors`. If `n_head` is 0, `config.json` in the same folder gives it.

    Without it, a published GPT-2 has C / 64. Raises ValueError if the file is not a GPT-2, or is damaged, or
    if the number of heads is not known, which no shape shows; the message says what is wrong.
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
        raise ValueError(f"{path} is not a GPT-2 model; missing tensors: {', '.join(missing)}")
    for name in ("wte.weight", "wpe.weight"):
        if weights[name].ndim != 2:
            raise ValueError(f"{path} is not a GPT-2 model: {name} has shape {weights[name].shape}, not 2-D")
    C = weights["wte.weight"].shape[1]
    config_path = path.parent / "config.json"
    if not n_head and config_path.exists():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        n_head = config.get("n_head") if isinstance(config, dict) else None
        n_head = n_head if isinstance(n_head, int) else 0
    model = GPT2(weights, n_head or C // 64 or 1)
    for name, shape in shapes(model).items():
        if name not in weights or weights[name].shape != shape:
            actual = f"has shape {weights[name].shape}" if name in weights else "is missing"
            raise ValueError(f"{path} is not a GPT-2 model: {name} {actual}, expected shape {shape}")
    if extra := sorted(set(weights) - set(shapes(model))):
        raise ValueError(f"{path} is not a GPT-2 model; unexpected tensors: {', '.join(extra[:5])}")
    if not n_head and (model.n_layer, C) not in PUBLISHED_SIZES:
        raise ValueError(f"{path}: no config.json beside it gives the number of heads: set --heads")
    if model.n_head < 1 or C % model.n_head:
        raise ValueError(
            f"the width {C} cannot be divided into {model.n_head} heads: set --heads to a divisor"
        )
    return model


def shapes(model: GPT2) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a GPT-2 of this width and depth."""
    V, C = model.vocab_size, model.width
    expected = {"wte.weight": (V, C), "wpe.weight": (model.block_size, C)}
    layers = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
    layers |= {"ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    in_blocks = {f"h.{i}.{name}": shape for i in range(model.n_layer) for name, shape in layers.items()}
    for name, shape in (in_blocks | {"ln_f": (C,)}).items():
        expected |= {name + ".weight": shape, name + ".bias": shape[-1:]}
    return expected


def read_tokens(path: Path, model: GPT2, needed: int) -> Array:
    """Raw little-endian uint16. Raises ValueError for too few tokens, or one outside the vocabulary."""
    tokens = np.fromfile(path, "<u2")
    if content := other_content(tokens):
        raise ValueError(f"{path} must contain tokens of uint16, but it contains {content}")
    if len(tokens) < needed:
        raise ValueError(
            f"{path} contains {len(tokens)} tokens, but {needed} are needed: "
            "use a longer file or a smaller --block"
        )
    if (largest := int(tokens.max())) >= model.vocab_size:
        raise ValueError(
            f"{path} contains the token id {largest}, but the vocabulary size is {model.vocab_size}"
        )
    return tokens.astype(np.int64)


def other_content(tokens: Array) -> str:
    """What a file is that was read as `tokens` of uint16; empty if it may be one.

    The upper halves of small int32 are 0, and tokens are seldom UTF-8 without control characters.
    """
    first = tokens[: min(len(tokens), 1 << 13) // 2 * 2]
    if len(first) < 32:
        return ""  # too few: chance could look like another dtype
    if not first[1::2].any() and len(np.unique(first[::2])) > 2:
        return "tokens of 32 or 64 bits"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(first.tobytes())  # may end within a character
    except UnicodeDecodeError:
        return ""
    return "text" if all(c.isprintable() or c.isspace() for c in text) else ""


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="GPT-2 in NumPy: loss on a text, generation, training.")
    parser.add_argument("command", choices=("loss", "generate", "train"))
    parser.add_argument("--weights", type=Path, required=True, help="model.safetensors of a GPT-2")
    parser.add_argument("--tokens", type=Path, help="token file such as val.bin: raw little-endian uint16")
    parser.add_argument(
        "--ids", help="generate: the prompt, for example 464,3290; default: the start of --tokens"
    )
    parser.add_argument("--heads", type=int, default=0, help="attention heads; 0: those in config.json")
    parser.add_argument(
        "--block", type=int, default=0, help="tokens per row; 0: 64 for train, else the block size"
    )
    parser.add_argument("--batch", type=int, default=4, help="rows per batch")
    parser.add_argument("--steps", type=int, help="train: steps (20); loss: maximum number of batches (all)")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="train: learning rate of AdamW")
    parser.add_argument("--count", type=int, default=40, help="generate: number of ids")
    parser.add_argument("--temperature", type=float, default=0.0, help="generate: 0 is greedy")
    parser.add_argument(
        "--top_k", type=int, default=0, help="generate: sample from the k most probable; 0: all"
    )
    parser.add_argument("--seed", type=int, default=1337, help="generate: random seed")
    parser.add_argument("--out", type=Path, help="train: where to write the trained weights")
    return parser


def loss_of_file(model: GPT2, tokens: Array, block: int, batch: int, max_batches: int) -> float:
    """The mean loss over consecutive windows of `block` tokens; each token is predicted once."""
    windows = (len(tokens) - 1) // block
    ids = tokens[: windows * block].reshape(windows, block)
    targets = tokens[1 : windows * block + 1].reshape(windows, block)
    total, count = 0.0, 0
    for i in range(0, min(windows, max_batches * batch or windows), batch):
        rows = slice(i, i + batch)
        total += model.loss(ids[rows], targets[rows]) * len(ids[rows])
        count += len(ids[rows])
    return total / count


def is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False


def train(model: GPT2, tokens: Array, args: argparse.Namespace, block: int) -> None:
    """Train on consecutive windows, again from the first after the last."""
    optimizer, windows = AdamW(model.weights), (len(tokens) - 1) // block
    if args.out and not os.access(args.out.parent, os.W_OK):
        raise ValueError(f"{args.out} cannot be written")  # before the training, not after it
    if args.out and args.out.exists() and not is_safetensors(args.out):
        raise ValueError(f"{args.out} exists and is no safetensors file: choose another name for --out")
    for step in range(1, (20 if args.steps is None else args.steps) + 1):
        start_time = time.perf_counter()
        starts = block * (np.arange((step - 1) * args.batch, step * args.batch) % windows)
        rows = tokens[starts[:, None] + np.arange(block + 1)]  # (B, T + 1)
        loss, gradients = model.gradients(rows[:, :-1], rows[:, 1:])
        seconds, n = time.perf_counter() - start_time, args.batch * block
        optimizer.step(gradients, args.learning_rate)
        total = time.perf_counter() - start_time
        print(
            f"step {step:4d}  loss {loss:.6f}  {n / seconds:.0f} tokens/s, {n / total:.0f} with AdamW",
            flush=True,
        )
    if args.out:
        save_file(model.weights, args.out, {"format": "pt"})
        print(f"weights written to {args.out}")


def run(args: argparse.Namespace) -> None:
    model = load(args.weights, args.heads)
    block = args.block or (min(64, model.block_size) if args.command == "train" else model.block_size)
    if not 1 <= block <= model.block_size or args.batch < 1 or min(args.steps or 0, args.count) < 0:
        raise ValueError(
            f"--block must be from 1 to {model.block_size}, --batch at least 1, "
            "and --steps and --count at least 0"
        )
    if args.command == "generate":
        if args.ids:
            if not all(number.strip().isdecimal() for number in args.ids.split(",")):
                raise ValueError(f"--ids={args.ids} must be integers separated by commas, such as 464,3290")
            ids = [int(number) for number in args.ids.split(",")]
        elif args.tokens:
            ids = read_tokens(args.tokens, model, 1)[:block].tolist()
        else:
            raise ValueError("generate needs a prompt: --ids 464,3290 or --tokens FILE")
        if unknown := [i for i in ids if not 0 <= i < model.vocab_size]:
            raise ValueError(
                f"--ids contains the token id {unknown[0]}, but the vocabulary size is {model.vocab_size}"
            )
        start_time = time.perf_counter()
        new_ids = model.generate(ids, args.count, args.temperature, args.top_k, args.seed)
        print(",".join(map(str, new_ids)))
        print(f"{args.count / (time.perf_counter() - start_time):.1f} tokens/s", file=sys.stderr)
        return
    if not args.tokens:
        raise ValueError(f"{args.command} needs --tokens FILE")
    tokens = read_tokens(args.tokens, model, block + 1)
    if args.command == "train":
        train(model, tokens, args, block)
    else:
        loss = loss_of_file(model, tokens, block, args.batch, args.steps or 0)
        print(f"loss {loss:.6f}  perplexity {np.exp(min(loss, 700.0)):.3f}")


def main() -> None:
    if sys.stdout:  # a terminal may not support every character of a path; a file is UTF-8
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    try:
        run(options().parse_args())
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
