"""Every architecture against transformers, against its equations written out, and against itself."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import ARCH, NAMES, ids, random_model, scatter, small
from support import ROOT
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from configurator import resolve
from fradique.generation import generate, packed_weights
from fradique.generation.kv_cache import KVCache
from model import GPT, GPTConfig, alibi_slopes, relative_buckets
from train import TrainSettings


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def largest(tensors: dict[str, Tensor]) -> float:
    return max(tensor.abs().max().item() for tensor in tensors.values())


# transformers: the same weights give the same logits, loss and gradients


def as_it_is(name: str, theirs: Tensor) -> Tensor:
    return theirs


@dataclass(frozen=True)
class Oracle:
    """A model of transformers, which of ours it equals, and where each of our parameters lies in it."""

    build: Callable[[], nn.Module]
    ours: dict[str, object]  # changes of SMALL
    names: dict[str, str | tuple[str, ...]]  # our module -> theirs, or several on top of one another
    layout: Callable[[str, Tensor], Tensor] = as_it_is  # their parameter as it lies in ours
    zero: str = r"(?!)"  # their parameters that are no part of our model: 0 adds nothing
    unread: str = r"(?!)"  # their parameters that the forward pass does not read
    absent: str = r"(?!)"  # our parameters that are no part of theirs: they stay at 1 (gains)
    mask: Callable[[int], Tensor] | None = None  # the attention mask to give them, where it is not causal


def translated(oracle: Oracle, ours: GPT, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, weights or gradients, under our names. Every one of both sides is accounted for."""
    left, found = dict(theirs), {}
    for name, parameter in ours.named_parameters():
        module, kind = name.removeprefix("transformer.").rsplit(".", 1)
        if re.search(oracle.absent, module):
            continue
        layer = "".join(re.findall(r"^h\.(\d+)", module))
        sources = oracle.names[re.sub(r"^h\.\d+", "h.{}", module)]
        sources = (sources,) if isinstance(sources, str) else sources
        full = [f"{source.format(layer)}.{kind}" for source in sources]
        found[name] = torch.cat([oracle.layout(source, left.pop(source)) for source in full])
        assert found[name].shape == parameter.shape, name
    assert not [name for name in left if not re.search(f"{oracle.zero}|{oracle.unread}", name)]
    return found


def stack(prefix: str, **names: str | tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    """The table of a block: our modules there -> theirs, which lie under `prefix`."""
    ours = {"c_attn": "attn.c_attn", "attn_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}
    ours |= {"q_norm": "attn.q_norm", "k_norm": "attn.k_norm"}
    return {
        f"h.{{}}.{ours.get(key, key)}": prefix + theirs
        if isinstance(theirs, str)
        else tuple(prefix + part for part in theirs)
        for key, theirs in names.items()
    }


def transposed(name: str, theirs: Tensor) -> Tensor:
    """Conv1D keeps its weight the other way round."""
    return theirs.T if re.search(r"c_\w+\.weight", name) else theirs


def gpt2(**changes: object) -> Oracle:
    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
        config = transformers.GPT2Config(**sizes | changes, attn_implementation="eager")
        return transformers.GPT2LMHeadModel(config)

    names = {"wte": "transformer.wte", "wpe": "transformer.wpe", "ln_f": "transformer.ln_f"} | stack(
        "transformer.h.{}.",
        ln_1="ln_1",
        c_attn="attn.c_attn",
        attn_proj="attn.c_proj",
        ln_2="ln_2",
        c_fc="mlp.c_fc",
        mlp_proj="mlp.c_proj",
    )
    return Oracle(build, {"activation": "gelu_tanh"}, names, transposed)


def gpt1() -> Oracle:
    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
        return transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes))

    names = {name: theirs for name, theirs in gpt2().names.items() if name != "ln_f"}
    names |= {"wte": "transformer.tokens_embed", "wpe": "transformer.positions_embed"}
    return Oracle(build, {"norm_place": "post", "activation": "gelu_tanh"}, names, transposed)


def opt(ours: dict[str, object], zero: str = r"(?!)", **changes: object) -> Oracle:
    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 128}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16}
        others = {"pad_token_id": None, "attn_implementation": "eager"}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, **others, **changes))

    def layout(name: str, theirs: Tensor) -> Tensor:
        return theirs[2:] if "embed_positions" in name else theirs  # positions 0 and 1 are for padding

    decoder = "model.decoder."
    names = {
        "wte": decoder + "embed_tokens",
        "wpe": decoder + "embed_positions",
        "ln_f": decoder + "final_layer_norm",
    } | stack(
        decoder + "layers.{}.",
        ln_1="self_attn_layer_norm",
        c_attn=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attn_proj="self_attn.out_proj",
        ln_2="final_layer_norm",
        c_fc="fc1",
        mlp_proj="fc2",
    )
    return Oracle(build, ours, names, layout, zero=zero, unread=r"embed_positions")


def bloom(heads: int, width: int) -> Oracle:
    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": width, "n_layer": 2, "n_head": heads}
        return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, attn_implementation="eager"))

    def layout(name: str, theirs: Tensor) -> Tensor:
        if "query_key_value" not in name:
            return theirs
        by_head = theirs.unflatten(0, (heads, 3, -1))  # q, k and v of a head lie side by side
        return by_head.transpose(0, 1).flatten(0, 2)

    names = {
        "wte": "transformer.word_embeddings",
        "ln_e": "transformer.word_embeddings_layernorm",
        "ln_f": "transformer.ln_f",
    } | stack(
        "transformer.h.{}.",
        ln_1="input_layernorm",
        c_attn="self_attention.query_key_value",
        attn_proj="self_attention.dense",
        ln_2="post_attention_layernorm",
        c_fc="mlp.dense_h_to_4h",
        mlp_proj="mlp.dense_4h_to_h",
    )
    ours = {"position": "alibi", "embd_norm": True, "activation": "gelu_tanh"}
    return Oracle(build, ours | {"n_head": heads, "n_embd": width}, names, layout)


LLAMA = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"} | stack(
    "model.layers.{}.",
    ln_1="input_layernorm",
    c_attn=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    attn_proj="self_attn.o_proj",
    ln_2="post_attention_layernorm",
    c_fc=("mlp.gate_proj", "mlp.up_proj"),
    mlp_proj="mlp.down_proj",
)
ROPE = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "bias": False, "tie_weights": False}


def llama(
    ours: dict[str, object] | None = None,
    kind: str = "Llama",
    mask: Callable[[int], Tensor] | None = None,
    **changes: object,
) -> Oracle:
    """LlamaForCausalLM, and those that are built like it."""

    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 16}
        others = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "pad_token_id": None}
        others |= {"attn_implementation": "eager"}
        config = getattr(transformers, f"{kind}Config")(**sizes | others | changes)
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return Oracle(build, ROPE | (ours or {}), LLAMA, mask=mask)


def prefix_of_5(T: int) -> Tensor:
    scores = torch.full((1, 1, T, T), -1e9).triu(1)
    scores[:, :, :5, :5] = 0.0
    return scores


def nanochat() -> Oracle:
    """Gains nowhere, the embedding normalised, relu², queries and keys normalised, soft-capped logits."""

    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
        others = {"rms_norm_eps": 1e-5, "pad_token_id": None, "final_logit_softcapping": 3.0}
        config = transformers.NanoChatConfig(**sizes, **others, attn_implementation="eager")
        return transformers.NanoChatForCausalLM(config)

    def layout(name: str, theirs: Tensor) -> Tensor:
        if not re.search(r"[qk]_proj", name):
            return theirs
        return theirs.unflatten(0, (-1, 2, 4)).flip(1).flatten(0, 2)  # it turns the other way round

    names = LLAMA | {"h.{}.mlp.c_fc": "model.layers.{}.mlp.fc1", "h.{}.mlp.c_proj": "model.layers.{}.mlp.fc2"}
    ours = ROPE | {"activation": "relu2", "qk_norm": True, "embd_norm": True, "logit_softcap": 3.0}
    return Oracle(build, ours | {"n_kv_head": 2}, names, layout, absent=r"ln_|_norm")


def cohere(kv_heads: int) -> Oracle:
    """PaLM's block: parallel, layer norms and no bias, shared keys, swiglu, rope."""

    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "max_position_embeddings": 16}
        others = {"logit_scale": 1.0, "rope_theta": 1e4, "pad_token_id": None, "attn_implementation": "eager"}
        return transformers.CohereForCausalLM(transformers.CohereConfig(**sizes, **others))

    def layout(name: str, theirs: Tensor) -> Tensor:
        if not re.search(r"[qk]_proj", name):
            return theirs
        return theirs.unflatten(0, (-1, 4, 2)).transpose(1, 2).flatten(0, 2)  # it turns neighbours as pairs

    ours = {"position": "rope", "activation": "swiglu", "bias": False, "parallel_block": True}
    return Oracle(build, ours | {"n_kv_head": kv_heads}, LLAMA, layout)


def falcon() -> Oracle:
    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        others = {"multi_query": True, "parallel_attn": True, "bias": True, "attn_implementation": "eager"}
        return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, **others))

    names = {"wte": "transformer.word_embeddings", "ln_f": "transformer.ln_f"} | stack(
        "transformer.h.{}.",
        ln_1="input_layernorm",
        c_attn="self_attention.query_key_value",
        attn_proj="self_attention.dense",
        c_fc="mlp.dense_h_to_4h",
        mlp_proj="mlp.dense_4h_to_h",
    )
    return Oracle(build, {"position": "rope", "parallel_block": True, "n_kv_head": 1}, names)


def marian() -> Oracle:
    """The decoder of Vaswani et al., without an encoder to attend to."""

    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
        sizes |= {"decoder_ffn_dim": 128, "max_position_embeddings": 16}
        others = {"activation_function": "relu", "scale_embedding": True, "pad_token_id": None}
        config = transformers.MarianConfig(**sizes, **others, attn_implementation="eager")
        return transformers.MarianForCausalLM(config)

    by_turns = torch.arange(32).view(2, 16).T.flatten()  # it has all sines first, then all cosines

    def layout(name: str, theirs: Tensor) -> Tensor:
        if re.search(r"([qkv]_proj|fc1|embed_tokens)\.weight", name):
            return theirs[:, by_turns]
        return theirs if re.search(r"([qkv]_proj|fc1)\.bias", name) else theirs[by_turns]

    names = {"wte": "model.decoder.embed_tokens"} | stack(
        "model.decoder.layers.{}.",
        c_attn=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attn_proj="self_attn.out_proj",
        ln_1="self_attn_layer_norm",
        c_fc="fc1",
        mlp_proj="fc2",
        ln_2="final_layer_norm",
    )
    ours = {"norm_place": "post", "position": "sinusoidal", "activation": "relu"}
    return Oracle(build, ours, names, layout, unread=r"encoder_attn|embed_positions")


class T5(nn.Module):
    """The decoder of T5 alone, with the scaled scores that T5 leaves out, and its embedding as the output."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 31, "d_model": 32, "d_kv": 8, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        others = {"layer_norm_epsilon": 1e-5, "feed_forward_proj": "gelu", "is_decoder": True}
        others |= {"initializer_factor": 0.1, "attn_implementation": "eager"}
        config = transformers.T5Config(**sizes, **others)
        self.stack = T5Stack(config)
        for module in self.modules():
            if isinstance(module, T5Attention):
                module.scaling = 8**-0.5

    def forward(self, input_ids: Tensor, **options: object) -> SimpleNamespace:
        x = self.stack(input_ids, **options).last_hidden_state
        return SimpleNamespace(logits=x @ self.stack.embed_tokens.weight.T)


def t5() -> Oracle:
    """A block of 200, so that distances beyond the exact ones count too."""
    names = {
        "wte": "stack.embed_tokens",
        "rel": "stack.block.0.layer.0.SelfAttention.relative_attention_bias",
        "ln_f": "stack.final_layer_norm",
    } | stack(
        "stack.block.{}.layer.",
        ln_1="0.layer_norm",
        c_attn=("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v"),
        attn_proj="0.SelfAttention.o",
        ln_2="2.layer_norm",
        c_fc="2.DenseReluDense.wi",
        mlp_proj="2.DenseReluDense.wo",
    )
    ours = {"norm": "rmsnorm", "position": "relative", "bias": False, "block_size": 200}
    return Oracle(T5, ours, names, unread=r"layer\.1\.")


ORACLES = {
    "GPT-2": gpt2(),
    "GPT-2 with an MLP of another width": replace(
        gpt2(n_inner=48), ours={"activation": "gelu_tanh", "n_inner": 48}
    ),
    "GPT": gpt1(),
    "OPT": opt({"activation": "relu"}),
    "Galactica": opt(
        {"activation": "gelu", "bias": False},
        zero=r"layer_norm\.bias",
        enable_bias=False,
        activation_function="gelu",
    ),
    "BLOOM of 4 heads": bloom(4, 32),
    "BLOOM of 6 heads": bloom(6, 48),
    "LLaMA": llama(),
    "LLaMA, tied": llama({"tie_weights": True}, tie_word_embeddings=True),
    "LLaMA with grouped heads": llama({"n_kv_head": 2}, num_key_value_heads=2),
    "LLaMA with one head of keys": llama({"n_kv_head": 1}, num_key_value_heads=1),
    "LLaMA of slower turns": llama({"rope_theta": 500.0}, rope_theta=500.0),
    "LLaMA with geglu": llama({"activation": "geglu"}, hidden_act="gelu"),
    "LLaMA with a prefix": llama({"prefix_len": 5}, mask=prefix_of_5),
    "Mistral": llama({"sliding_window": 5}, kind="Mistral", sliding_window=5),
    "Qwen3": llama({"qk_norm": True}, kind="Qwen3", head_dim=8),
    "NanoChat": nanochat(),
    "Falcon": falcon(),
    "Cohere, shaped as PaLM": cohere(1),
    "Cohere with grouped heads": cohere(2),
    "Marian": marian(),
    "T5": t5(),
}


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", ORACLES)
def test_logits_loss_and_gradients_equal_those_of_transformers(name, flash):
    oracle = ORACLES[name]
    torch.manual_seed(0)
    theirs = scatter(oracle.build())
    ours = GPT(small(**oracle.ours, flash=flash)).eval()
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, parameter in weights.items():
            if re.search(oracle.zero, key):
                parameter.zero_()
        missing, unexpected = ours.load_state_dict(translated(oracle, ours, weights), strict=False)
    assert not unexpected
    assert all(re.search(oracle.absent, key) or key == "lm_head.weight" for key in missing)

    idx = ids(2, ours.config.block_size)
    targets = F.pad(idx[:, 1:], (0, 1), value=-1)
    counted, options = targets.clone(), {}
    if oracle.mask:
        counted[:, :4] = -1  # what stands within the prefix is not predicted
        options["attention_mask"] = oracle.mask(idx.size(1))
    expected = theirs(idx, use_cache=False, **options).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1), counted.flatten(), ignore_index=-1)
    logits, loss = ours(idx, targets)
    assert expected.std() > 0.5  # else little would be compared
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)

    expected_grads = translated(oracle, ours, gradients(theirs, expected_loss))
    grads, size = gradients(ours, loss), largest(expected_grads)
    for key, grad in expected_grads.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-5 * size, msg=key)


@pytest.mark.parametrize("heads", range(1, 21))
def test_the_slopes_of_alibi_are_bloom_s(heads):
    bias = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # (heads, 1, 2): 0 and the slope
    torch.testing.assert_close(alibi_slopes(heads, torch.device("cpu")), bias[:, 0, 1], rtol=1e-6, atol=0)


def test_the_buckets_of_distances_are_t5_s():
    distance = torch.arange(-20, 1001)
    expected = T5Attention._relative_position_bucket(-distance, bidirectional=False)
    assert torch.equal(relative_buckets(distance), expected)
    assert relative_buckets(distance).unique().tolist() == list(range(32))


# The equations, written out in float64 with nothing of model.py


def erf(x):
    return np.vectorize(math.erf)(x)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


ACTIVATE = {
    "gelu": gelu,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "geglu": gelu,
}


def slopes_of_alibi(n):
    """Press et al. 2022, §3, and the footnote on numbers of heads that are no power of 2."""
    if math.log2(n).is_integer():
        return [2 ** (-8 * h / n) for h in range(1, n + 1)]
    lower = 2 ** int(math.log2(n))
    return slopes_of_alibi(lower) + slopes_of_alibi(2 * lower)[::2][: n - lower]


def reference(model, idx, prefix=0):
    """Logits (T, V) of the tokens idx (T,), whose first `prefix` see one another."""
    c, T = model.config, len(idx)
    C, H, d = c.n_embd, c.n_head, c.n_embd // c.n_head
    shared = H // (c.n_kv_head or H)  # queries on one key
    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    i, j = np.mgrid[:T, :T]  # query, key
    seen = (j <= i) | ((i < prefix) & (j < prefix))
    if c.sliding_window:
        seen &= i - j < c.sliding_window

    def linear(name, x):
        return x @ weights[f"transformer.{name}.weight"].T + weights.get(f"transformer.{name}.bias", 0)

    def norm(name, x):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"transformer.{name}.weight"] + weights.get(f"transformer.{name}.bias", 0)

    def turned(x):  # rope: pairs of numbers are complex ones, turned by an angle that grows with the position
        angle = np.outer(np.arange(T), c.rope_theta ** (-2 * np.arange(d // 2) / d))
        z = (x[:, : d // 2] + 1j * x[:, d // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=1)

    def attention(name, x):
        qkv = linear(f"{name}.c_attn", x).reshape(T, -1, d)  # the heads of q, then of k, then of v
        heads = []
        for h in range(H):
            q, k, v = qkv[:, h], qkv[:, H + h // shared], qkv[:, H + H // shared + h // shared]
            if c.qk_norm:
                q, k = norm(f"{name}.q_norm", q), norm(f"{name}.k_norm", k)
            if c.position == "rope":
                q, k = turned(q), turned(k)
            scores = q @ k.T / math.sqrt(d)
            if c.position == "alibi":
                scores = scores - slopes_of_alibi(H)[h] * abs(i - j)
            if c.position == "relative":  # up to 15 a bucket is a distance; what comes later counts as 0
                assert T <= 16
                scores = scores + weights["transformer.rel.weight"][np.maximum(i - j, 0), h]
            odds = np.exp(scores - scores.max()) * seen
            heads.append(odds / odds.sum(1, keepdims=True) @ v)
        return linear(f"{name}.c_proj", np.concatenate(heads, axis=1))

    def mlp(name, x):
        x = linear(f"{name}.c_fc", x)
        if c.activation in ("swiglu", "geglu"):
            gate, x = np.split(x, 2, axis=1)
            return linear(f"{name}.c_proj", ACTIVATE[c.activation](gate) * x)
        return linear(f"{name}.c_proj", ACTIVATE[c.activation](x))

    def added(x, norm_name, parts):
        if c.norm_place == "pre":
            return x + sum(part(name, norm(norm_name, x)) for part, name in parts)
        alpha = math.sqrt(2 * c.n_layer) if c.norm_place == "deepnorm" else 1
        return norm(norm_name, alpha * x + sum(part(name, x) for part, name in parts))

    x = weights["transformer.wte.weight"][idx]
    if c.position == "learned":
        x = x + weights["transformer.wpe.weight"][:T]
    if c.position == "sinusoidal":
        angle = np.outer(np.arange(T), 10000.0 ** (-2 * np.arange(C // 2) / C))
        waves = np.empty((T, C))
        waves[:, 0::2], waves[:, 1::2] = np.sin(angle), np.cos(angle)
        x = math.sqrt(C) * x + waves
    if c.embd_norm:
        x = norm("ln_e", x)
    for layer in range(c.n_layer):
        h = f"h.{layer}"
        parts = [(attention, f"{h}.attn"), (mlp, f"{h}.mlp")]
        if c.parallel_block:
            x = added(x, f"{h}.ln_1", parts)
        else:
            x = added(x, f"{h}.ln_1", parts[:1])
            x = added(x, f"{h}.ln_2", parts[1:])
    if c.norm_place == "pre":
        x = norm("ln_f", x)
    logits = x @ weights["lm_head.weight"].T
    return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


def cross_entropy(logits, targets):
    shifted = logits - logits.max(-1, keepdims=True)
    picked = np.take_along_axis(shifted, targets[:, None], axis=1)[:, 0]
    return (np.log(np.exp(shifted).sum(-1)) - picked).mean()


def check_against_the_equations(config: GPTConfig) -> None:
    model = random_model(config).double()
    idx, targets = ids(2, config.block_size), ids(2, config.block_size, seed=4)
    logits, loss = model(idx, targets)
    expected = np.stack([reference(model, row, config.prefix_len) for row in idx.numpy()])
    exact = config.position not in ("rope", "sinusoidal")  # these angles are of float32
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=0, atol=1e-10 if exact else 2e-5)
    first = max(0, config.prefix_len - 1)  # the last of the prefix predicts what follows it
    terms = [cross_entropy(expected[b, first:], targets[b, first:].numpy()) for b in range(2)]
    assert loss.item() == pytest.approx(np.mean(terms), abs=1e-10 if exact else 1e-5)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_of_a_config_file_equals_its_equations(name, flash, architecture):
    check_against_the_equations(architecture(name, flash=flash))


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "none", "norm": "rmsnorm"},
        {"position": "none", "norm_place": "deepnorm", "bias": False},
        {"norm_place": "post", "norm": "rmsnorm", "embd_norm": True},
        {"norm_place": "post", "parallel_block": True, "position": "relative"},
        {"norm_place": "deepnorm", "parallel_block": True, "n_layer": 3},
        {"prefix_len": 5, "position": "learned"},
        {"prefix_len": 1, "position": "learned"},
        {"prefix_len": 15, "position": "alibi"},
        {"prefix_len": 5, "position": "relative", "n_kv_head": 2},
        {"sliding_window": 1, "position": "learned"},
        {"sliding_window": 5, "position": "alibi", "n_head": 6, "n_embd": 48},
        {"sliding_window": 16, "position": "learned"},
        {"qk_norm": True, "position": "relative", "n_kv_head": 1},
        {"qk_norm": True, "position": "alibi", "bias": False},
        {"logit_softcap": 0.7, "tie_weights": False},
        {"activation": "relu2", "n_inner": 7},
        {"activation": "swiglu", "n_inner": 7, "parallel_block": True},
        {"position": "alibi", "n_head": 3, "n_embd": 30},
        {"position": "rope", "rope_theta": 100.0, "n_head": 1},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
def test_settings_that_no_file_has_equal_their_equations(changes):
    check_against_the_equations(small(**changes))


@pytest.mark.parametrize("prompt", [2, 4, 7, 20])
def test_a_prefix_decoder_takes_the_given_tokens_as_its_prefix_when_it_writes(prompt, architecture):
    """prefix_len = 4. Where the window slides, the tokens in it are given anew."""
    model, idx = random_model(architecture("glm130b")), ids(1, prompt)
    assert model.config.prefix_len == 4
    text, start, given = idx[0].tolist(), -1, 0
    for _ in range(24):
        earliest = next(n for n in range(0, 100, 5) if len(text) - n <= 16)
        if earliest != start:
            start, given = earliest, len(text) - earliest
        logits = reference(model, np.array(text[start:]), prefix=min(4, given))[-1]
        text.append(int(logits.argmax()))
    for use_cache in (True, False):
        assert model.generate(idx, 24, temperature=0, hop=5, use_cache=use_cache)[0].tolist() == text


# Every config file


FAMILIES = {"gelu": "gelu", "gelu_tanh": "gelu"}
TABLE = {  # norm, its place, position, activation, bias; and what else sets it apart
    "gpt2": ("layernorm", "pre", "learned", "gelu", True, {}),
    "gpt3": ("layernorm", "pre", "learned", "gelu", True, {}),
    "pangu": ("layernorm", "pre", "learned", "gelu", True, {}),
    "jurassic1": ("layernorm", "pre", "learned", "gelu", True, {}),
    "mt_nlg": ("layernorm", "pre", "learned", "gelu", True, {}),
    "opt": ("layernorm", "pre", "learned", "relu", True, {}),
    "palm": ("layernorm", "pre", "rope", "swiglu", False, {"parallel_block": True, "n_kv_head": 1}),
    "bloom": ("layernorm", "pre", "alibi", "gelu", True, {"embd_norm": True}),
    "gopher": ("rmsnorm", "pre", "relative", "gelu", True, {}),
    "chinchilla": ("rmsnorm", "pre", "relative", "gelu", True, {}),
    "galactica": ("layernorm", "pre", "learned", "gelu", False, {}),
    "lamda": ("layernorm", "pre", "relative", "geglu", True, {}),
    "llama": ("rmsnorm", "pre", "rope", "swiglu", False, {"tie_weights": False}),
    "glm130b": ("layernorm", "deepnorm", "rope", "geglu", True, {"prefix_len": 4}),
    "vaswani": ("layernorm", "post", "sinusoidal", "relu", True, {}),
    "modern": ("rmsnorm", "pre", "rope", "relu2", False, {"qk_norm": True}),
}


def test_there_is_a_config_file_for_every_architecture_of_the_table():
    assert sorted(TABLE) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_config_file_sets_what_the_table_says_and_nothing_else(name, architecture):
    norm, norm_place, position, activation, bias, others = TABLE[name]
    config = architecture(name)
    assert FAMILIES.get(config.activation, config.activation) == activation
    expected = small(norm=norm, norm_place=norm_place, position=position, bias=bias, **others)
    assert replace(config, activation="gelu") == expected


OTHER_THAN_DEFAULT = {
    "n_layer": 3,
    "n_head": 2,
    "n_embd": 48,
    "bias": True,
    "activation": "swiglu",
    "n_inner": 72,
    "n_kv_head": 1,
    "position": "alibi",
    "rope_theta": 500.0,
    "norm": "rmsnorm",
    "norm_place": "post",
    "qk_norm": True,
    "embd_norm": True,
    "parallel_block": True,
    "prefix_len": 3,
    "sliding_window": 5,
    "tie_weights": False,
    "logit_softcap": 15.0,
}


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_file_overrides_every_model_setting(name, tmp_path):
    first, *rest = (ARCH / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert re.match(r"# \w+", first)
    assert any(f"config/arch/{name}.py" in line for line in rest)
    assert 'reset("architecture")' in rest
    training = tmp_path / "train.py"
    training.write_text("\n".join(f"{key} = {value!r}" for key, value in OTHER_THAN_DEFAULT.items()))
    argv = [str(training), str(ARCH / f"{name}.py")]
    resolved = resolve(TrainSettings, argv)
    shape = set(GPTConfig.names()) - {"block_size", "vocab_size", "dropout", "flash"}
    assert {key for key, source in resolved.sources.items() if source == argv[1]} == shape
    alone = resolve(TrainSettings, argv[1:]).settings
    assert all(getattr(resolved.settings, key) == getattr(alone, key) for key in shape)


@pytest.mark.parametrize(
    "training", ["train_eca_char", "train_machado_char_cpu_modern", "train_shakespeare_char"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_config_file_goes_with_the_training_configs(name, training):
    argv = [str(ROOT / "config" / f"{training}.py"), str(ARCH / f"{name}.py")]
    settings = resolve(TrainSettings, argv).settings
    assert (settings.n_layer, settings.n_head, settings.n_embd) == (4, 4, 128)
    if name == "glm130b":
        assert 0 < settings.prefix_len <= settings.block_size // 2
    else:
        assert settings.prefix_len == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_token_changes_no_logits_before_it(name, architecture):
    config = architecture(name)
    model, idx = random_model(config), ids(2, 16)
    before = model(idx, idx)[0]
    for t in range(config.prefix_len, 16):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1 + ids(2, 16 - t) % 30) % 31
        after = model(changed, changed)[0]
        assert torch.equal(after[:, :t], before[:, :t])  # to the last bit
        assert not torch.equal(after[:, t], before[:, t])
    for t in range(16):  # what a token does change: what comes after it, and the prefix that it is part of
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 31
        moved = (model(changed, changed)[0] != before).any(-1).all(0).tolist()
        assert moved == [s >= t or t < config.prefix_len for s in range(16)]


@pytest.mark.parametrize("name", NAMES)
def test_fused_attention_equals_plain_attention(name, architecture):
    fused, plain = (random_model(architecture(name, flash=flash)) for flash in (True, False))
    idx, targets = ids(2, 16), ids(2, 16, seed=4)
    (logits, loss), (expected, expected_loss) = fused(idx, targets), plain(idx, targets)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    grads, expected_grads = gradients(fused, loss), gradients(plain, expected_loss)
    for key, grad in expected_grads.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-5 * largest(expected_grads), msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_filled_in_pieces_gives_the_logits_of_the_whole(name, architecture):
    for flash in (True, False):
        model, idx = random_model(architecture(name, flash=flash)), ids(2, 16)
        whole = model(idx, idx)[0]
        cache = KVCache(model.config, 2, idx.device, torch.float32)
        for start, end in [(0, 5), (5, 6), (6, 13), (13, 16)]:
            logits, _ = model(idx[:, start:end], idx[:, start:end], cache)
            torch.testing.assert_close(logits, whole[:, start:end], rtol=0, atol=2e-5)
        assert cache.length == 16


@pytest.mark.parametrize("name", NAMES)
def test_a_step_recorded_and_played_again_writes_the_same(name, architecture, monkeypatch):
    """What a CUDA graph does: no line of Python runs when it plays, so none may depend on the position."""

    def record(work, device):
        work()
        result = work().clone()
        graph = make_fx(work)()
        return lambda: result.copy_(graph()), result

    model = random_model(architecture(name))
    cases = [(idx := ids(2, prompt), model.generate(idx, 20, temperature=0)) for prompt in (2, 7, 20)]
    monkeypatch.setattr(generate, "capture_cuda_graph", record)
    monkeypatch.setattr(generate, "can_use_cuda_graph", lambda idx: True)
    lengths = []
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].size(1)))
    for idx, expected in cases:
        assert torch.equal(model.generate(idx, 20, temperature=0), expected)
    assert lengths.count(1) == 3 * len(cases)  # while recording; every other token came from the record


@pytest.mark.skipif(not packed_weights.can_pack(), reason="this CPU has no bfloat16 products")
@pytest.mark.parametrize("name", NAMES)
def test_a_packed_model_gives_the_logits_of_bfloat16_weights(name, architecture):
    packed, plain = (random_model(architecture(name)) for _ in range(2))
    packed_weights.pack_weights(packed)
    plain.to(torch.bfloat16)
    idx = ids(2, 16)
    with torch.no_grad():
        expected = plain(idx, idx)[0].float()
        cache = KVCache(packed.config, 2, idx.device, torch.bfloat16)
        for start, end in [(0, 5), (5, 6), (6, 13), (13, 16)]:
            logits = packed(idx[:, start:end], idx[:, start:end], cache)[0].float()
            error = (logits - expected[:, start:end]).abs().max()
            assert error <= 0.03 * expected.abs().max()


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.9, "top_k": 12}], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("name", NAMES)
def test_cached_generation_equals_uncached(name, options, architecture):
    model = random_model(architecture(name))
    for prompt, hop in [(2, None), (2, 1), (7, None), (20, 1)]:  # a prefix is 4 tokens, a block 16
        idx = ids(2, prompt)
        cached, uncached = (
            model.generate(idx, 20, use_cache=use, hop=hop, generator=torch.manual_seed(5), **options)
            for use in (True, False)
        )
        assert cached.shape == (2, prompt + 20) and torch.equal(cached[:, :prompt], idx)
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_can_learn_a_batch_by_heart(name, architecture):
    torch.manual_seed(0)
    model, idx = GPT(architecture(name)), ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[19] < 0.9 * losses[0]
    assert losses[-1] < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_is_one_graph_and_the_same(name, architecture):
    model, idx, targets = random_model(architecture(name, n_layer=1)), ids(2, 16), ids(2, 16, seed=4)
    logits, loss = model(idx, targets)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, found_loss = compiled(idx, targets)
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-5)
    assert found_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    expected, grads = gradients(model, loss), gradients(model, found_loss)
    for key, grad in expected.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-5 * largest(expected), msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_bfloat16_and_under_autocast(name, architecture):
    model, idx = random_model(architecture(name), spread=0.05), ids(2, 16)
    expected = model(idx, idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        halved, text = model(idx, idx)[0], model.generate(idx[:, :5], 20, temperature=0)
    assert text.shape == (2, 25)
    torch.testing.assert_close(halved.float(), expected, rtol=0, atol=0.05)
    model.to(torch.bfloat16)
    torch.testing.assert_close(model(idx, idx)[0].float(), expected, rtol=0, atol=0.05)
    assert model.generate(idx[:, :5], 20, temperature=0).shape == (2, 25)


# Combinations of settings


DRAWN = {
    "n_layer": [1, 2],
    "n_head": [1, 2, 4, 6],
    "n_kv_head": [0, 0, 1, 2, 3],
    "head_dim": [2, 4, 4, 8, 8, 3],
    "remainder": [0] * 15 + [1],
    "n_inner": [0, 5],
    "prefix_len": [0, 0, 0, 1, 5, 8],
    "sliding_window": [0, 0, 0, 1, 3, 20],
    "norm": ["layernorm", "rmsnorm"],
    "norm_place": ["pre", "post", "deepnorm"],
    "position": ["learned", "sinusoidal", "rope", "alibi", "relative", "none"],
    "activation": ["gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu"],
    "logit_softcap": [0.0, 2.0],
}
SWITCHES = ("bias", "qk_norm", "embd_norm", "parallel_block", "tie_weights", "flash")
DRAWN |= {name: [True, False] for name in SWITCHES}
SEEDS = range(200)


def combination(seed: int) -> GPTConfig:
    rng = random.Random(seed)
    drawn = {name: rng.choice(values) for name, values in DRAWN.items()}
    drawn["n_embd"] = drawn["n_head"] * drawn.pop("head_dim") + drawn.pop("remainder")
    return GPTConfig(block_size=8, vocab_size=31, **drawn)


def goes_together(c: GPTConfig) -> bool:
    """What `problems` should find of sizes that are each in range, in other words."""
    return not (
        c.n_embd % c.n_head
        or (c.position == "rope" and c.n_embd // c.n_head % 2)
        or (c.position == "sinusoidal" and c.n_embd % 2)
        or (c.n_kv_head and c.n_head % c.n_kv_head)
        or (c.prefix_len and c.sliding_window)
        or c.prefix_len >= c.block_size
    )


def test_every_value_of_every_setting_is_drawn_where_it_works_and_not_everything_does():
    working = [config for config in map(combination, SEEDS) if goes_together(config)]
    assert 80 < len(working) < len(SEEDS) - 60
    for name in GPTConfig.names():
        for value in set(DRAWN.get(name, [])) - ({8} if name == "prefix_len" else set()):
            assert sum(getattr(config, name) == value for config in working) >= 3, (name, value)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_combination_either_works_in_every_way_or_is_refused(seed):
    config = combination(seed)
    if not goes_together(config):
        with pytest.raises(ValueError) as told:
            GPT(config)
        assert config.problems() and str(told.value) == "; ".join(config.problems())
        return
    assert config.problems() == []
    model, idx = random_model(config), ids(2, 8)
    logits, loss = model(idx, idx)
    assert logits.isfinite().all() and loss.isfinite()
    for row, expected in zip(idx.numpy(), logits.detach().numpy(), strict=True):
        np.testing.assert_allclose(reference(model, row, config.prefix_len), expected, rtol=0, atol=2e-5)

    t = max(5, config.prefix_len)
    changed = idx.clone()
    changed[:, t:] = (changed[:, t:] + 1) % 31
    assert torch.equal(model(changed, changed)[0][:, :t], logits[:, :t])

    cache = KVCache(config, 2, idx.device, torch.float32)
    for start, end in [(0, 5), (5, 6), (6, 8)]:
        pieces, _ = model(idx[:, start:end], idx[:, start:end], cache)
        torch.testing.assert_close(pieces, logits[:, start:end], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"n_kv_head": 3},
            "n_head = 4 is not a multiple of n_kv_head = 3: .* (use one of n_kv_head = 1, 2, 4)",
        ),
        ({"n_kv_head": 8}, "n_head = 4 is not a multiple of n_kv_head = 8"),
        ({"n_embd": 12, "position": "rope"}, "n_embd / n_head = 3 is odd"),
        ({"n_embd": 33, "n_head": 3, "position": "sinusoidal"}, "needs an even n_embd, not 33"),
        (
            {"prefix_len": 4, "sliding_window": 8},
            "prefix_len = 4 and sliding_window = 8 contradict each other",
        ),
        ({"prefix_len": 16}, "prefix_len = 16 leaves nothing of block_size = 16"),
        ({"prefix_len": 17}, "prefix_len = 17 leaves nothing of block_size = 16"),
        ({"logit_softcap": -1.0}, "logit_softcap = -1.0 must be at least 0"),
        ({"rope_theta": 0.0}, "rope_theta = 0.0 must be above 0"),
        ({"rope_theta": float("nan")}, "rope_theta = nan must be above 0"),
        ({"norm": "batchnorm"}, "norm = 'batchnorm' must be one of layernorm, rmsnorm"),
        ({"norm_place": "sandwich"}, "norm_place = 'sandwich' must be one of pre, post, deepnorm"),
        (
            {"position": "xpos"},
            "position = 'xpos' must be one of learned, sinusoidal, rope, alibi, relative, none",
        ),
        (
            {"activation": "mish"},
            "activation = 'mish' must be one of gelu, gelu_tanh, relu, relu2, swiglu, geglu",
        ),
    ],
)
def test_a_contradiction_is_told(changes, words):
    (problem,) = small(**changes).problems()
    assert all(part in problem for part in words.split(".* "))
    with pytest.raises(ValueError, match=re.escape(words.split(".* ")[0])):
        GPT(small(**changes))


def test_all_contradictions_are_told_at_once():
    wrong = {"n_kv_head": 3, "n_embd": 12, "position": "rope", "prefix_len": 16, "sliding_window": 5}
    wrong |= {"norm": "batchnorm", "norm_place": "sandwich", "activation": "mish", "rope_theta": -1.0}
    problems = small(**wrong, dropout=1.0).problems()
    hints = ("n_kv_head = 3", "is odd", "contradict each other", "leaves nothing", "norm = ", "norm_place = ")
    hints += ("activation = ", "rope_theta = ", "dropout = ")
    for hint in hints:
        assert sum(hint in problem for problem in problems) == 1, hint
    assert len(problems) == len(hints)


def test_all_sizes_below_their_least_and_all_unknown_names_are_told_at_once():
    sizes = ["block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "n_inner", "prefix_len"]
    sizes += ["sliding_window", "logit_softcap"]
    names = ["norm", "norm_place", "position", "activation"]
    problems = GPTConfig(**dict.fromkeys(sizes, -1), **dict.fromkeys(names, "?")).problems()
    assert [problem.split(" = ")[0] for problem in problems] == sizes + names


# Sizes, and what they cost


@pytest.mark.parametrize("activation", sorted(ACTIVATE))
@pytest.mark.parametrize("n_embd", [4, 8, 12, 32, 100, 128, 768])
def test_the_mlp_is_four_times_as_wide_and_two_thirds_of_it_with_a_gate(n_embd, activation):
    config = small(n_embd=n_embd, n_layer=1, activation=activation)
    gated = activation in ("swiglu", "geglu")
    least = Fraction(8 * n_embd, 3) if gated else 4 * n_embd
    width = next(w for w in range(0, 10_000, 8 if gated else 1) if w >= least)
    mlp = GPT(config).transformer["h"][0].mlp
    assert mlp.c_fc.weight.shape == (width * (2 if gated else 1), n_embd)
    assert mlp.c_proj.weight.shape == (n_embd, width)
    mlp = GPT(replace(config, n_inner=20)).transformer["h"][0].mlp
    assert mlp.c_fc.weight.shape[0] == (40 if gated else 20) and mlp.c_proj.weight.shape[1] == 20


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_shared_keys_shrink_the_attention_and_the_cache(n_kv_head, bias):
    full, shared = (GPT(small(bias=bias, n_kv_head=n)) for n in (0, n_kv_head))
    saved = 2 * (4 - n_kv_head) * 8  # rows of k and v: 8 a head
    assert shared.transformer["h"][0].attn.c_attn.weight.shape == (96 - saved, 32)
    assert full.num_params() - shared.num_params() == 2 * saved * (32 + bias)
    caches = [KVCache(m.config, 3, torch.device("cpu"), torch.float32) for m in (full, shared)]
    for cache, heads in zip(caches, (4, n_kv_head), strict=True):
        assert [part.shape for part in cache.keys + cache.values] == 4 * [(3, heads, 16, 8)]


def test_an_output_layer_of_its_own_costs_a_table_more():
    tied, untied = GPT(small()), GPT(small(tie_weights=False))
    assert untied.num_params() - tied.num_params() == 31 * 32
    names = dict(untied.named_parameters())
    assert names["lm_head.weight"] is not names["transformer.wte.weight"]
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert not torch.equal(untied.lm_head.weight, untied.transformer["wte"].weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_as_many_parameters_as_its_parts(name, architecture):
    c = architecture(name)
    C, gated, norms = c.n_embd, c.activation in ("swiglu", "geglu"), c.norm == "layernorm" and c.bias
    kv = 8 * (c.n_kv_head or 4)
    width = 88 if gated else 128
    block = (C + 2 * kv + C) * C + (2 * C + 2 * kv) * c.bias
    block += (3 if gated else 2) * width * C + ((2 if gated else 1) * width + C) * c.bias
    gains = (1 if c.parallel_block else 2) * C + (2 * 8 if c.qk_norm else 0)
    others = C * ((c.norm_place == "pre") + c.embd_norm)
    tables = 31 * C * (1 if c.tie_weights else 2) + {"learned": 16 * C, "relative": 32 * 4}.get(c.position, 0)
    expected = tables + 2 * (block + gains * (1 + norms)) + others * (1 + norms)
    assert GPT(c).num_params(non_embedding=False) == expected


def test_the_flops_leave_out_what_is_only_looked_up_and_what_is_not_seen():
    tied, untied, narrow = (GPT(small(**c)) for c in ({}, {"tie_weights": False}, {"sliding_window": 5}))
    within = sum(p.numel() for p in tied.transformer["h"].parameters()) + 2 * 32  # and the last norm
    assert tied.flops_per_token() == 6 * (within + 31 * 32) + 12 * 2 * 32 * 16
    assert untied.flops_per_token() == tied.flops_per_token()
    assert narrow.flops_per_token() == 6 * (within + 31 * 32) + 12 * 2 * 32 * 5
    assert GPT(small(sliding_window=99)).flops_per_token() == tied.flops_per_token()
    alibi, relative = (GPT(small(position=position)) for position in ("alibi", "relative"))
    assert alibi.flops_per_token() == relative.flops_per_token() == tied.flops_per_token()


@pytest.mark.parametrize("position", ["sinusoidal", "rope", "alibi", "relative", "none"])
def test_a_block_without_a_table_of_positions_can_be_cropped_too(position):
    model, idx = random_model(small(position=position)), ids(2, 8)
    before, expected = dict(model.named_parameters()), model(idx, idx)[0]
    model.crop_block_size(8)
    assert model.config == small(position=position, block_size=8)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert torch.equal(model(idx, idx)[0], expected)
    assert model.generate(idx, 12, temperature=0).shape == (2, 20)
    with pytest.raises(ValueError, match="9 tokens do not fit block_size = 8"):
        model(ids(2, 9))


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_crop_that_leaves_no_room_behind_the_prefix_is_refused(position):
    model = random_model(small(prefix_len=5, position=position))
    for length in (5, 4):
        with pytest.raises(ValueError, match=f"prefix_len = 5 leaves nothing of block_size = {length}"):
            model.crop_block_size(length)
        assert model.config.block_size == 16
        assert model(ids(2, 16))[0].isfinite().all()
    model.crop_block_size(6)
    assert model.config == small(prefix_len=5, position=position, block_size=6)
    idx = ids(2, 6)
    expected = [reference(model, row, 5) for row in idx.numpy()]
    np.testing.assert_allclose(model(idx, idx)[0].detach().numpy(), np.stack(expected), rtol=0, atol=2e-5)


# Initial weights


def spreads(**changes: object) -> dict[str, float]:
    """The standard deviation of each matrix of a block of width 128; c_attn's three parts apart."""
    torch.manual_seed(0)
    model = GPT(small(n_embd=128, n_layer=3, **changes))
    found = {"wte": model.transformer["wte"].weight, "lm_head": model.lm_head.weight}
    for part in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        found[part] = torch.cat([block.get_submodule(part).weight for block in model.transformer["h"]])
    attention = [block.attn.c_attn.weight.split(block.attn.c_attn.row_splits) for block in model.transformer["h"]]
    found |= {
        part: torch.cat(layers) for part, layers in zip("qkv", zip(*attention, strict=True), strict=True)
    }
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
    assert all(abs(weight.mean()) < 4 * weight.std() / weight.numel() ** 0.5 for weight in found.values())
    return {name: weight.std().item() for name, weight in found.items()}


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1}, {"activation": "geglu"}, {"tie_weights": False}])
def test_deepnorm_begins_with_xavier_s_weights_and_smaller_values(changes):
    found = spreads(norm_place="deepnorm", **changes)
    kv = 32 * changes.get("n_kv_head", 4)
    inner = 344 if changes.get("activation") == "geglu" else 512
    rows = inner * (2 if changes.get("activation") == "geglu" else 1)
    gain = (2 * 3) ** -0.5  # DeepNorm's β for a decoder-only model, up to its constant
    expected = {"q": (128, 128, 1), "k": (kv, 128, 1), "v": (kv, 128, gain), "attn.c_proj": (128, 128, gain)}
    expected |= {"mlp.c_fc": (rows, 128, gain), "mlp.c_proj": (128, inner, gain)}
    for name, (fan_out, fan_in, scale) in expected.items():
        assert found[name] == pytest.approx(scale * math.sqrt(2 / (fan_in + fan_out)), rel=0.03), name
    for name in ("wte", "lm_head"):
        assert found[name] == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("norm_place", ["pre", "post"])
def test_only_pre_norm_begins_with_smaller_weights_into_the_stream(norm_place):
    for name, std in spreads(norm_place=norm_place, tie_weights=False).items():
        summed = norm_place == "pre" and name.endswith("c_proj")
        assert std == pytest.approx(0.02 / math.sqrt(2 * 3) if summed else 0.02, rel=0.05), name


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_fresh_model_is_about_that_of_a_guess(name, architecture):
    torch.manual_seed(0)
    model = GPT(architecture(name))
    loss = model(ids(8, 16), ids(8, 16, seed=4))[1]
    assert loss.item() == pytest.approx(math.log(31), abs=0.1)
