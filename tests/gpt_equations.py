"""The equations of the model in float64 numpy, for one sequence; shares no code with model.py."""

import math

import numpy as np


def erf(x):
    return np.vectorize(math.erf)(x)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


REFERENCE_ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "geglu": gelu,
}


def reference_alibi_slopes(n):
    """Press et al. 2022, §3, and the footnote for a number of heads that is not a power of 2."""
    if math.log2(n).is_integer():
        return [2 ** (-8 * h / n) for h in range(1, n + 1)]
    lower = 2 ** int(math.log2(n))
    return reference_alibi_slopes(lower) + reference_alibi_slopes(2 * lower)[::2][: n - lower]


def reference_ngram_row(idx, t, n, rows):
    """The row of the n-gram that ends at token t, by Horner's rule; ids from 1, 0 before the text."""
    polynomial = 0
    for k in range(n):
        polynomial = (polynomial * 1_000_003 + (int(idx[t - k]) + 1 if t >= k else 0)) % (2**31 - 1)
    mixed = (polynomial ^ (polynomial >> 16)) * 48_271 % (2**31 - 1)
    return (n - 2) * rows + (mixed ^ (mixed >> 15)) % rows


def reference_logits(model, idx, prefix=0):
    """Logits (T, V) of the tokens idx (T,), the first `prefix` of which attend to each other."""
    c, T = model.config, len(idx)
    C, H, d = c.n_embd, c.n_head, c.n_embd // c.n_head
    group = H // (c.n_kv_head or H)  # query heads for each key head
    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    i, j = np.mgrid[:T, :T]  # query, key
    visible = (j <= i) | ((i < prefix) & (j < prefix))
    if c.sliding_window:
        visible &= i - j < c.sliding_window

    def linear(name, x):
        return x @ weights[f"transformer.{name}.weight"].T + weights.get(f"transformer.{name}.bias", 0)

    def norm(name, x):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"transformer.{name}.weight"] + weights.get(f"transformer.{name}.bias", 0)

    def rotate(x):  # RoPE: pairs of elements as complex numbers, times e^(i angle)
        angle = np.outer(np.arange(T), c.rope_theta ** (-2 * np.arange(d // 2) / d))
        z = (x[:, : d // 2] + 1j * x[:, d // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=1)

    def attention(name, x):
        qkv = linear(f"{name}.c_attn", x).reshape(T, -1, d)  # heads of q, then of k, then of v
        heads = []
        for h in range(H):
            q, k, v = qkv[:, h], qkv[:, H + h // group], qkv[:, H + H // group + h // group]
            if c.qk_norm:
                q, k = norm(f"{name}.q_norm", q), norm(f"{name}.k_norm", k)
            if c.position == "rope":
                q, k = rotate(q), rotate(k)
            scores = q @ k.T / math.sqrt(d)
            if c.position == "alibi":
                scores = scores - reference_alibi_slopes(H)[h] * abs(i - j)
            if c.position == "relative":  # distances up to 15 have a bucket each; later keys have distance 0
                assert T <= 16
                scores = scores + weights["transformer.rel.weight"][np.maximum(i - j, 0), h]
            exp_scores = np.exp(scores - scores.max()) * visible
            heads.append(exp_scores / exp_scores.sum(1, keepdims=True) @ v)
        return linear(f"{name}.c_proj", np.concatenate(heads, axis=1))

    def mlp(name, x):
        x = linear(f"{name}.c_fc", x)
        if c.activation in ("swiglu", "geglu"):
            gate, x = np.split(x, 2, axis=1)
            return linear(f"{name}.c_proj", REFERENCE_ACTIVATIONS[c.activation](gate) * x)
        return linear(f"{name}.c_proj", REFERENCE_ACTIVATIONS[c.activation](x))

    def residual(x, norm_name, sublayers):
        if c.norm_place == "pre":
            return x + sum(layer(name, norm(norm_name, x)) for layer, name in sublayers)
        alpha = math.sqrt(2 * c.n_layer) if c.norm_place == "deepnorm" else 1
        return norm(norm_name, alpha * x + sum(layer(name, x) for layer, name in sublayers))

    x = weights["transformer.wte.weight"][idx]
    for t in range(T):
        for n in range(2, c.ngram_max + 1):
            x[t] += weights["transformer.ngrams.weight"][reference_ngram_row(idx, t, n, c.ngram_rows)]
    if c.position == "learned":
        x = x + weights["transformer.wpe.weight"][:T]
    if c.position == "sinusoidal":
        angle = np.outer(np.arange(T), 10000.0 ** (-2 * np.arange(C // 2) / C))
        sinusoids = np.empty((T, C))
        sinusoids[:, 0::2], sinusoids[:, 1::2] = np.sin(angle), np.cos(angle)
        x = math.sqrt(C) * x + sinusoids
    if c.embd_norm:
        x = norm("ln_e", x)
    for layer in range(c.n_layer):
        h = f"h.{layer}"
        sublayers = [(attention, f"{h}.attn"), (mlp, f"{h}.mlp")]
        if c.parallel_block:
            x = residual(x, f"{h}.ln_1", sublayers)
        else:
            x = residual(x, f"{h}.ln_1", sublayers[:1])
            x = residual(x, f"{h}.ln_2", sublayers[1:])
    if c.norm_place == "pre":
        x = norm("ln_f", x)
    logits = x @ weights["lm_head.weight"].T
    return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


def cross_entropy(logits, targets):
    """Mean loss of logits (N, V) for targets (N,)."""
    shifted = logits - logits.max(-1, keepdims=True)
    target_logits = np.take_along_axis(shifted, targets[:, None], axis=1)[:, 0]
    return (np.log(np.exp(shifted).sum(-1)) - target_logits).mean()
