"""A GPT in plain Python: lists of numbers, no library.

    python reference/gpt_python.py --input book.txt --steps 300

A decoder-only transformer (Vaswani et al. 2017; its layers are GPT-2's, Radford et al. 2019) that reads a
text, learns to predict its next character by backpropagation and Adam, and generates text. It imports only
the standard library. NOTES.md in this folder derives each backward pass.

Each operation is followed by its backward pass. `f(x, w)` returns y; `f_backward(dy, …)` takes dy, the
gradient of the loss with respect to y, *adds* the gradients of the weights to dw, and returns dx.

Shapes: T tokens, C width, H heads, D = C / H, V characters. A matrix (n, m) is a list of n rows of m numbers;
a bias is a matrix of one row, (1, C).
"""

import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from operator import add, mul
from pathlib import Path

Vector = list[float]
Matrix = list[Vector]
EPS = 1e-5  # added to the variance in a layer norm
SIZES = {"steps": 300, "batch": 4, "block": 16, "layers": 1, "heads": 2, "width": 32}  # defaults


def dot(a: Vector, b: Vector) -> float:
    return sum(map(mul, a, b))


def transpose(a: Matrix) -> Matrix:
    """(n, m) -> (m, n)."""
    return list(zip(*a, strict=True))


def matmul(a: Matrix, b: Matrix) -> Matrix:
    """a (n, m), b (m, k) -> (n, k): the dot product of each row of a with each column of b."""
    columns = transpose(b)
    return [[dot(row, column) for column in columns] for row in a]


def plus(a: Matrix, b: Matrix) -> Matrix:
    """Sum. Backward: the gradient of the sum is the gradient of each term."""
    return [list(map(add, x, y)) for x, y in zip(a, b, strict=True)]


def times(a: Matrix, factor: float) -> Matrix:
    return [[x * factor for x in row] for row in a]


def linear(x: Matrix, w: Matrix, b: Matrix) -> Matrix:
    """y = x Wᵀ + b:  x (T, I), w (O, I), b (1, O) -> (T, O)."""
    return [list(map(add, row, b[0])) for row in matmul(x, transpose(w))]


def linear_backward(dy: Matrix, x: Matrix, w: Matrix, dw: Matrix, db: Matrix) -> Matrix:
    """dW = dyᵀ x,  db = Σ_t dy,  dx = dy W."""
    by_output = transpose(dy)  # (O, T)
    dw[:] = plus(dw, matmul(by_output, x))
    db[:] = plus(db, [[sum(dy_o) for dy_o in by_output]])
    return matmul(dy, w)


def layer_norm(x: Matrix, g: Matrix, b: Matrix) -> tuple[Matrix, tuple[Matrix, Vector]]:
    """y = g n + b, where n = (x - μ) / σ of each row:  x (T, C), g and b (1, C) -> (T, C), and n and 1/σ."""
    n, inverse_std = [], []
    for row in x:
        mean = sum(row) / len(row)
        centred = [value - mean for value in row]
        inverse_std.append(1 / math.sqrt(dot(centred, centred) / len(row) + EPS))
        n.append([value * inverse_std[-1] for value in centred])
    return [list(map(add, map(mul, row, g[0]), b[0])) for row in n], (n, inverse_std)


def layer_norm_backward(dy: Matrix, saved: tuple, g: Matrix, dg: Matrix, db: Matrix) -> Matrix:
    """dg = Σ_t dy n,  db = Σ_t dy,  dn = g dy,  dx = (dn - mean(dn) - n mean(n dn)) / σ."""
    dx = []
    for dy_t, n, inverse_std in zip(dy, *saved, strict=True):
        dg[0] = list(map(add, dg[0], map(mul, dy_t, n)))
        db[0] = list(map(add, db[0], dy_t))
        dn = list(map(mul, dy_t, g[0]))
        mean, along = sum(dn) / len(dn), dot(dn, n) / len(dn)
        dx.append([(d - mean - value * along) * inverse_std for d, value in zip(dn, n, strict=True)])
    return dx


def softmax(scores: Vector) -> Vector:
    """p_i = exp(z_i) / Σ_j exp(z_j). The largest score is subtracted first: the same p, and no overflow."""
    largest = max(scores)
    powers = [math.exp(z - largest) for z in scores]
    total = sum(powers)
    return [power / total for power in powers]


def softmax_backward(dp: Vector, p: Vector) -> Vector:
    """dz = p (dp - Σ_j p_j dp_j)."""
    shared = dot(p, dp)
    return [p_i * (dp_i - shared) for p_i, dp_i in zip(p, dp, strict=True)]


def attend(q: Matrix, k: Matrix, v: Matrix) -> tuple[Matrix, Matrix]:
    """One head, y = P v with P = softmax(q kᵀ / √D):  q, k, v (T, D) -> (T, D), and P (T, T)."""
    T, scale = len(q), 1 / math.sqrt(len(q[0]))
    scores = times(matmul(q, transpose(k)), scale)  # (T, T)
    # the causal mask: token t attends to keys 0 … t, and the weight of later keys is 0
    p = [softmax(row[: t + 1]) + [0.0] * (T - t - 1) for t, row in enumerate(scores)]
    return matmul(p, v), p


def attend_backward(dy: Matrix, q: Matrix, k: Matrix, v: Matrix, p: Matrix) -> list[Matrix]:
    """dv = Pᵀ dy,  dP = dy vᵀ,  dS = softmax'(dP) / √D,  dq = dS k,  dk = dSᵀ q."""
    scale = 1 / math.sqrt(len(q[0]))
    dp = matmul(dy, transpose(v))  # (T, T); where p is 0, ds is 0 too
    ds = times([softmax_backward(dp_t, p_t) for dp_t, p_t in zip(dp, p, strict=True)], scale)
    return [matmul(ds, k), matmul(transpose(ds), q), matmul(transpose(p), dy)]


def attention(qkv: Matrix, heads: int) -> tuple[Matrix, list]:
    """Each head attends with D columns of q, k and v:  (T, 3C) -> (T, C), and q, k, v, p of each head."""
    thirds = split_columns(qkv, 3)  # q, k, v: (T, C) each
    results = []
    for q, k, v in zip(*(split_columns(matrix, heads) for matrix in thirds), strict=True):
        y, p = attend(q, k, v)
        results.append((y, (q, k, v, p)))
    return join_columns([y for y, _ in results]), [head_saved for _, head_saved in results]


def attention_backward(dy: Matrix, saved: list) -> Matrix:
    """Each head's columns of dy go through attend_backward: (T, C) -> (T, 3C)."""
    dheads = split_columns(dy, len(saved))
    gradients = [attend_backward(dhead, *head_saved) for dhead, head_saved in zip(dheads, saved, strict=True)]
    return join_columns([dhead for third in zip(*gradients, strict=True) for dhead in third])


def split_columns(x: Matrix, count: int) -> list[Matrix]:
    """(T, n) -> `count` matrices (T, n / count). Backward: join_columns."""
    width = len(x[0]) // count
    return [[row[i * width : (i + 1) * width] for row in x] for i in range(count)]


def join_columns(matrices: list[Matrix]) -> Matrix:
    """Matrices (T, n / count) -> (T, n). Backward: split_columns."""
    return [list(chain(*rows)) for rows in zip(*matrices, strict=True)]


def relu(x: float) -> float:
    return max(x, 0.0)


def relu_backward(dy: float, x: float) -> float:
    """dx = dy where x > 0, else 0."""
    return dy if x > 0 else 0.0


def gelu(x: float) -> float:
    """y = x Φ(x), where Φ(x) = (1 + erf(x / √2)) / 2 (Hendrycks & Gimpel 2016)."""
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def gelu_backward(dy: float, x: float) -> float:
    """dx = dy (Φ(x) + x φ(x)), where φ(x) = exp(-x² / 2) / √(2π) is Φ'."""
    return dy * ((1 + math.erf(x / math.sqrt(2))) / 2 + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi))


ACTIVATIONS = {"gelu": (gelu, gelu_backward), "relu": (relu, relu_backward)}


def embedding(ids: list[int], wte: Matrix, positions: Matrix, scale: float) -> Matrix:
    """x_t = scale wte[id_t] + positions[t]:  (T,) -> (T, C)."""
    return plus(times([wte[i] for i in ids], scale), positions[: len(ids)])


def embedding_backward(dx: Matrix, ids: list[int], dwte: Matrix, dwpe: Matrix, scale: float) -> None:
    """dwte[id_t] += scale dx_t, once for each occurrence of a character. dwpe[t] += dx_t."""
    for t, i in enumerate(ids):
        dwte[i] = [d + scale * dx_i for d, dx_i in zip(dwte[i], dx[t], strict=True)]
        dwpe[t] = list(map(add, dwpe[t], dx[t]))


def sinusoids(T: int, C: int) -> Matrix:
    """(T, C): sin(t / 10000^(2i/C)) and its cosine, alternating (Vaswani et al. 2017, §3.5). Not trained."""
    angles = [[t / 10000 ** (2 * i / C) for i in range(C // 2)] for t in range(T)]
    return [[f(angle) for angle in row for f in (math.sin, math.cos)] for row in angles]


def cross_entropy(logits: Matrix, targets: list[int]) -> tuple[float, Matrix]:
    """The mean of -log p of the targets, in nats:  (T, V), (T,) -> loss, and p (T, V)."""
    p = [softmax(row) for row in logits]  # the largest p is 1 / Σ_j exp(z_j - max z); log p follows
    logs = [z[i] - max(z) + math.log(max(p_t)) for z, p_t, i in zip(logits, p, targets, strict=True)]
    return -sum(logs) / len(targets), p


def cross_entropy_backward(p: Matrix, targets: list[int]) -> Matrix:
    """dlogits = (p - onehot(target)) / T."""
    onehot = [[float(i == target) for i in range(len(p[0]))] for target in targets]
    return times(plus(p, times(onehot, -1)), 1 / len(targets))


def squared_error(outputs: Matrix, targets: list[int]) -> tuple[float, Matrix]:
    """The mean of e², where e = output - onehot(target):  (T, V), (T,) -> loss, and e (T, V)."""
    e = [[y - (i == target) for i, y in enumerate(row)] for row, target in zip(outputs, targets, strict=True)]
    return sum(dot(row, row) for row in e) / (len(e) * len(e[0])), e


def squared_error_backward(e: Matrix, targets: list[int]) -> Matrix:
    """doutput = 2 e / (T V)."""
    return times(e, 2 / (len(e) * len(e[0])))


LOSSES = {"cross_entropy": (cross_entropy, cross_entropy_backward)}
LOSSES["squared_error"] = (squared_error, squared_error_backward)


class GPT:
    """The model: weights, forward pass and backward pass.

    `weights` and `gradients` have a matrix for each of GPT-2's names (`h.0.attn.c_attn.weight`, …); those of
    linear layers are (out, in). The output layer is tied to the embedding (`wte.weight`; Press & Wolf 2017).
    """

    def __init__(
        self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int,
        position: str = "learned", activation: str = "gelu", loss: str = "cross_entropy", seed: int = 1337,
    ) -> None:  # fmt: skip
        self.block_size, self.n_head = block_size, n_head
        self.blocks = [f"h.{layer}." for layer in range(n_layer)]
        self.activation, self.activation_backward = ACTIVATIONS[activation]
        self.loss, self.loss_backward = LOSSES[loss]
        self.learned_positions = position == "learned"
        self.scale = 1.0 if self.learned_positions else math.sqrt(n_embd)  # Vaswani et al. 2017, §3.4
        self.positions = sinusoids(block_size, n_embd)
        rng, C = random.Random(seed), n_embd
        shapes = {"wte": (vocab_size, C), "wpe": (block_size, C), "ln_f": (1, C)}
        for h in self.blocks:
            shapes |= {h + "ln_1": (1, C), h + "attn.c_attn": (3 * C, C), h + "attn.c_proj": (C, C)}
            shapes |= {h + "ln_2": (1, C), h + "mlp.c_fc": (4 * C, C), h + "mlp.c_proj": (C, 4 * C)}
        self.weights = {}
        for name, (rows, width) in shapes.items():
            # GPT-2's 0.02 is for larger widths. Residual projections start smaller (Radford et al., §2.3)
            std = 0.1 / math.sqrt(2 * n_layer if "c_proj" in name else 1)
            norm = "ln_" in name
            draw = (lambda _: 1.0) if norm else (lambda std: rng.gauss(0.0, std))
            self.weights[name + ".weight"] = [[draw(std) for _ in range(width)] for _ in range(rows)]
            if name not in ("wte", "wpe"):
                self.weights[name + ".bias"] = [[0.0] * (width if norm else rows)]
        self.gradients = {name: times(weight, 0.0) for name, weight in self.weights.items()}

    def params(self, name: str, tensors: dict[str, Matrix] | None = None) -> tuple[Matrix, Matrix]:
        tensors = tensors or self.weights
        return tensors[name + ".weight"], tensors[name + ".bias"]

    def forward(self, ids: list[int]) -> tuple[Matrix, list]:
        """(T,) -> logits (T, V), and the values that the backward pass needs."""
        positions = self.weights["wpe.weight"] if self.learned_positions else self.positions
        x, saved = embedding(ids, self.weights["wte.weight"], positions, self.scale), [ids]  # (T, C)
        for prefix in self.blocks:
            x, block_saved = self.block(prefix, x)
            saved.append(block_saved)
        x, norm = layer_norm(x, *self.params("ln_f"))
        saved.append((x, norm))
        return matmul(x, transpose(self.weights["wte.weight"])), saved

    def backward(self, dlogits: Matrix, saved: list) -> None:
        """`forward` in reverse order: from dlogits (T, V), add the gradient of each weight to `gradients`."""
        ids, *blocks, (x, norm) = saved
        dwte = self.gradients["wte.weight"]
        dwte[:] = plus(dwte, matmul(transpose(dlogits), x))
        dx = matmul(dlogits, self.weights["wte.weight"])
        dx = self.backprop(layer_norm_backward, "ln_f", dx, norm)
        for prefix, block_saved in zip(reversed(self.blocks), reversed(blocks), strict=True):
            dx = self.block_backward(prefix, dx, block_saved)
        positions = self.gradients["wpe.weight"] if self.learned_positions else times(self.positions, 0.0)
        embedding_backward(dx, ids, dwte, positions, self.scale)

    def block(self, prefix: str, x: Matrix) -> tuple[Matrix, tuple]:
        """x = x + attention(norm(x)), then x + mlp(norm(x)):  (T, C) -> (T, C)."""
        a, norm_1 = layer_norm(x, *self.params(prefix + "ln_1"))
        qkv = linear(a, *self.params(prefix + "attn.c_attn"))  # (T, 3C)
        y, heads = attention(qkv, self.n_head)
        x = plus(x, linear(y, *self.params(prefix + "attn.c_proj")))
        m, norm_2 = layer_norm(x, *self.params(prefix + "ln_2"))
        hidden = linear(m, *self.params(prefix + "mlp.c_fc"))  # (T, 4C)
        act = [list(map(self.activation, row)) for row in hidden]
        x = plus(x, linear(act, *self.params(prefix + "mlp.c_proj")))
        return x, (a, norm_1, heads, y, m, norm_2, hidden, act)

    def block_backward(self, prefix: str, dx: Matrix, block_saved: tuple) -> Matrix:
        """The lines of `block` in reverse order: (T, C) -> (T, C)."""
        a, norm_1, heads, y, m, norm_2, hidden, act = block_saved
        dact = self.backprop(linear_backward, prefix + "mlp.c_proj", dx, act)
        dhidden = [list(map(self.activation_backward, *rows)) for rows in zip(dact, hidden, strict=True)]
        dm = self.backprop(linear_backward, prefix + "mlp.c_fc", dhidden, m)
        dx = plus(dx, self.backprop(layer_norm_backward, prefix + "ln_2", dm, norm_2))
        dy = self.backprop(linear_backward, prefix + "attn.c_proj", dx, y)
        dqkv = attention_backward(dy, heads)
        da = self.backprop(linear_backward, prefix + "attn.c_attn", dqkv, a)
        return plus(dx, self.backprop(layer_norm_backward, prefix + "ln_1", da, norm_1))

    def backprop(self, backward: Callable, name: str, dy: Matrix, saved: Matrix | tuple) -> Matrix:
        """The backward pass of a layer with weight and bias."""
        return backward(dy, saved, self.weights[name + ".weight"], *self.params(name, self.gradients))

    def learn(self, ids: list[int], fraction: float = 1.0) -> float:
        """The loss of predicting ids[1:] from ids[:-1]; adds `fraction` of its gradients to `gradients`."""
        logits, saved = self.forward(ids[:-1])
        loss, loss_saved = self.loss(logits, ids[1:])
        self.backward(times(self.loss_backward(loss_saved, ids[1:]), fraction), saved)
        return loss

    def generate(self, ids: list[int], count: int, rng: random.Random, temperature: float = 0.8) -> list[int]:
        """Sample `count` more ids, each predicted from the last `block_size`. Returns old and new ids."""
        for _ in range(count):
            outputs = self.forward(ids[-self.block_size :])[0][-1]  # (V,)
            if self.loss is squared_error:  # the outputs are the probabilities
                outputs = [math.log(max(y, 1e-9)) for y in outputs]
            ids = [*ids, *rng.choices(range(len(outputs)), softmax([z / temperature for z in outputs]))]
        return ids


class Adam:
    """m and v are running means of g and g²; a step is about the learning rate (Kingma & Ba 2015)."""

    def __init__(self, model: GPT, beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-8) -> None:
        self.model, self.beta1, self.beta2, self.eps, self.steps = model, beta1, beta2, eps, 0
        self.m = {name: times(weight, 0.0) for name, weight in model.weights.items()}
        self.v = {name: times(weight, 0.0) for name, weight in model.weights.items()}

    def step(self, learning_rate: float) -> None:
        """w -= lr m̂ / (√v̂ + ε), where m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ) (algorithm 1); then g = 0."""
        self.steps += 1
        rate = learning_rate / (1 - self.beta1**self.steps)
        v_correction, alpha1, alpha2 = 1 / (1 - self.beta2**self.steps), 1 - self.beta1, 1 - self.beta2
        for name, weight in self.model.weights.items():
            gradient, m, v = self.model.gradients[name], self.m[name], self.v[name]
            for r, g in enumerate(gradient):
                m[r] = [self.beta1 * a + alpha1 * b for a, b in zip(m[r], g, strict=True)]
                v[r] = [self.beta2 * a + alpha2 * b * b for a, b in zip(v[r], g, strict=True)]
                triples = zip(weight[r], m[r], v[r], strict=True)
                weight[r] = [w - rate * a / (math.sqrt(v_correction * b) + self.eps) for w, a, b in triples]
                gradient[r] = [0.0] * len(g)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a GPT in plain Python on a text, and generate text.")
    parser.add_argument("--input", type=Path, required=True, help="a text file, UTF-8")
    for name, value in (SIZES | {"write": 200, "seed": 1337, "learning_rate": 0.01}).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    choices = {"position": ("learned", "sinusoidal"), "activation": tuple(ACTIVATIONS), "loss": tuple(LOSSES)}
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0], help=f"default: {values[0]}")
    return parser


def main() -> None:
    if sys.stdout:  # a terminal may not support every character; a file is UTF-8
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    args = options().parse_args()
    try:
        text = args.input.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: there is no such user
        sys.exit(f"{args.input} cannot be read as UTF-8 text: {error}")
    if too_small := [f"--{name}" for name in SIZES if getattr(args, name) < 1]:
        sys.exit(f"{', '.join(too_small)} must be at least 1")
    if args.width % args.heads or args.width % 2:
        sys.exit(f"--width {args.width} must be even, and a multiple of --heads {args.heads}")
    if len(text) <= args.block:
        sys.exit(f"{args.input} has {len(text)} characters, but --block {args.block} needs {args.block + 1}")
    if not 0 < args.learning_rate < 10:
        sys.exit(f"--learning_rate {args.learning_rate} must be above 0 and less than 10")
    characters, rng = sorted(set(text)), random.Random(args.seed)
    id_of = {character: i for i, character in enumerate(characters)}
    data = [id_of[character] for character in text]
    shape = (len(characters), args.block, args.layers, args.heads, args.width)
    model = GPT(*shape, args.position, args.activation, args.loss, args.seed)
    adam, start_time, losses = Adam(model), time.perf_counter(), []
    size = sum(len(row) for weight in model.weights.values() for row in weight)
    print(f"{len(text):,} characters, {len(characters)} distinct; {size:,} weights")
    if args.loss == "cross_entropy":
        by_frequency = -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values())
        print(f"loss of guesses: blind {math.log(len(characters)):.3f}, by frequency {by_frequency:.3f}")
    for step in range(1, args.steps + 1):
        starts = [rng.randrange(len(data) - args.block) for _ in range(args.batch)]
        batch = [model.learn(data[i : i + args.block + 1], 1 / args.batch) for i in starts]
        losses = [*losses[-19:], sum(batch) / args.batch]
        adam.step(args.learning_rate * min(step / 20, 1.1 - step / args.steps))  # linear warmup and decay
        if step % 20 == 0 or step == args.steps:
            speed = step * args.batch * args.block / (time.perf_counter() - start_time)
            mean = sum(losses) / len(losses)
            print(f"step {step:4d}  loss {mean:.4f}  {speed:,.0f} characters/s", flush=True)
    print("".join(characters[i] for i in model.generate(data[:1], args.write, rng)))


if __name__ == "__main__":
    main()
