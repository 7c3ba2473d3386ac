"""Our models and those of transformers: the same weights give the same logits, loss and gradients."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import gradients, ids, max_abs, scatter, small
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from model import GPT


def unchanged(name: str, theirs: Tensor) -> Tensor:
    return theirs


@dataclass(frozen=True)
class Oracle:
    """A model of transformers, our equivalent config, and the names of our parameters in their model."""

    build: Callable[[], nn.Module]
    ours: dict[str, object]  # arguments of small()
    names: dict[str, str | tuple[str, ...]]  # our module -> theirs, or several, concatenated
    layout: Callable[[str, Tensor], Tensor] = unchanged  # converts their parameter to our layout
    zero: str = r"(?!)"  # their parameters that our model lacks; set to 0
    unread: str = r"(?!)"  # their parameters that the forward pass does not use
    absent: str = r"(?!)"  # our parameters that their model lacks: norm weights, which are 1
    mask: Callable[[int], Tensor] | None = None  # their attention mask, if it is not causal


def to_our_names(oracle: Oracle, ours: GPT, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors (weights or gradients) under our names. Fails if a tensor is missing on either side."""
    remaining, converted = dict(theirs), {}
    for name, parameter in ours.named_parameters():
        module, kind = name.removeprefix("transformer.").rsplit(".", 1)
        if re.search(oracle.absent, module):
            continue
        layer = "".join(re.findall(r"^h\.(\d+)", module))
        sources = oracle.names[re.sub(r"^h\.\d+", "h.{}", module)]
        sources = (sources,) if isinstance(sources, str) else sources
        full = [f"{source.format(layer)}.{kind}" for source in sources]
        converted[name] = torch.cat([oracle.layout(source, remaining.pop(source)) for source in full])
        assert converted[name].shape == parameter.shape, name
    assert not [name for name in remaining if not re.search(f"{oracle.zero}|{oracle.unread}", name)]
    return converted


def block_names(prefix: str, **names: str | tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    """Names of our modules in a block -> their names, which begin with `prefix`."""
    ours = {"c_attn": "attn.c_attn", "attn_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}
    ours |= {"q_norm": "attn.q_norm", "k_norm": "attn.k_norm"}
    return {
        f"h.{{}}.{ours.get(key, key)}": prefix + theirs
        if isinstance(theirs, str)
        else tuple(prefix + name for name in theirs)
        for key, theirs in names.items()
    }


def transpose_conv1d(name: str, theirs: Tensor) -> Tensor:
    """Conv1D stores its weight as (in, out)."""
    return theirs.T if re.search(r"c_\w+\.weight", name) else theirs


def gpt2(**changes: object) -> Oracle:
    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
        config = transformers.GPT2Config(**sizes | changes, attn_implementation="eager")
        return transformers.GPT2LMHeadModel(config)

    names = {"wte": "transformer.wte", "wpe": "transformer.wpe", "ln_f": "transformer.ln_f"} | block_names(
        "transformer.h.{}.",
        ln_1="ln_1",
        c_attn="attn.c_attn",
        attn_proj="attn.c_proj",
        ln_2="ln_2",
        c_fc="mlp.c_fc",
        mlp_proj="mlp.c_proj",
    )
    return Oracle(build, {"activation": "gelu_tanh"}, names, transpose_conv1d)


def gpt1() -> Oracle:
    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
        return transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes))

    names = {name: theirs for name, theirs in gpt2().names.items() if name != "ln_f"}
    names |= {"wte": "transformer.tokens_embed", "wpe": "transformer.positions_embed"}
    return Oracle(build, {"norm_place": "post", "activation": "gelu_tanh"}, names, transpose_conv1d)


def opt(ours: dict[str, object], zero: str = r"(?!)", **changes: object) -> Oracle:
    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 128}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16}
        extra = {"pad_token_id": None, "attn_implementation": "eager"}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, **extra, **changes))

    def layout(name: str, theirs: Tensor) -> Tensor:
        return theirs[2:] if "embed_positions" in name else theirs  # positions 0 and 1 are for padding

    decoder = "model.decoder."
    names = {
        "wte": decoder + "embed_tokens",
        "wpe": decoder + "embed_positions",
        "ln_f": decoder + "final_layer_norm",
    } | block_names(
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
        by_head = theirs.unflatten(0, (heads, 3, -1))  # q, k and v of a head are adjacent rows
        return by_head.transpose(0, 1).flatten(0, 2)

    names = {
        "wte": "transformer.word_embeddings",
        "ln_e": "transformer.word_embeddings_layernorm",
        "ln_f": "transformer.ln_f",
    } | block_names(
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


LLAMA = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"} | block_names(
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
    """LlamaForCausalLM, and classes with the same layers."""

    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 16}
        extra = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "pad_token_id": None}
        extra |= {"attn_implementation": "eager"}
        config = getattr(transformers, f"{kind}Config")(**sizes | extra | changes)
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return Oracle(build, ROPE | (ours or {}), LLAMA, mask=mask)


def prefix_of_5(T: int) -> Tensor:
    scores = torch.full((1, 1, T, T), -1e9).triu(1)
    scores[:, :, :5, :5] = 0.0
    return scores


def nanochat() -> Oracle:
    """Norms without weights, also on embedding, queries and keys; relu², soft-capped logits."""

    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
        extra = {"rms_norm_eps": 1e-5, "pad_token_id": None, "final_logit_softcapping": 3.0}
        config = transformers.NanoChatConfig(**sizes, **extra, attn_implementation="eager")
        return transformers.NanoChatForCausalLM(config)

    def layout(name: str, theirs: Tensor) -> Tensor:
        if not re.search(r"[qk]_proj", name):
            return theirs
        return theirs.unflatten(0, (-1, 2, 4)).flip(1).flatten(0, 2)  # rotation in the opposite direction

    names = LLAMA | {"h.{}.mlp.c_fc": "model.layers.{}.mlp.fc1", "h.{}.mlp.c_proj": "model.layers.{}.mlp.fc2"}
    ours = ROPE | {"activation": "relu2", "qk_norm": True, "embd_norm": True, "logit_softcap": 3.0}
    return Oracle(build, ours | {"n_kv_head": 2}, names, layout, absent=r"ln_|_norm")


def cohere(kv_heads: int) -> Oracle:
    """PaLM's block: parallel, layer norm without bias, grouped heads, swiglu, RoPE."""

    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "max_position_embeddings": 16}
        extra = {"logit_scale": 1.0, "rope_theta": 1e4, "pad_token_id": None, "attn_implementation": "eager"}
        return transformers.CohereForCausalLM(transformers.CohereConfig(**sizes, **extra))

    def layout(name: str, theirs: Tensor) -> Tensor:
        if not re.search(r"[qk]_proj", name):
            return theirs
        # Cohere rotates adjacent elements as pairs
        return theirs.unflatten(0, (-1, 4, 2)).transpose(1, 2).flatten(0, 2)

    ours = {"position": "rope", "activation": "swiglu", "bias": False, "parallel_block": True}
    return Oracle(build, ours | {"n_kv_head": kv_heads}, LLAMA, layout)


def falcon() -> Oracle:
    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        extra = {"multi_query": True, "parallel_attn": True, "bias": True, "attn_implementation": "eager"}
        return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, **extra))

    names = {"wte": "transformer.word_embeddings", "ln_f": "transformer.ln_f"} | block_names(
        "transformer.h.{}.",
        ln_1="input_layernorm",
        c_attn="self_attention.query_key_value",
        attn_proj="self_attention.dense",
        c_fc="mlp.dense_h_to_4h",
        mlp_proj="mlp.dense_4h_to_h",
    )
    return Oracle(build, {"position": "rope", "parallel_block": True, "n_kv_head": 1}, names)


def marian() -> Oracle:
    """The decoder of Vaswani et al. 2017, without an encoder."""

    def build() -> nn.Module:
        sizes = {"vocab_size": 31, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
        sizes |= {"decoder_ffn_dim": 128, "max_position_embeddings": 16}
        extra = {"activation_function": "relu", "scale_embedding": True, "pad_token_id": None}
        config = transformers.MarianConfig(**sizes, **extra, attn_implementation="eager")
        return transformers.MarianForCausalLM(config)

    interleave = torch.arange(32).view(2, 16).T.flatten()  # Marian's columns are all sines, then all cosines

    def layout(name: str, theirs: Tensor) -> Tensor:
        if re.search(r"([qkv]_proj|fc1|embed_tokens)\.weight", name):
            return theirs[:, interleave]
        return theirs if re.search(r"([qkv]_proj|fc1)\.bias", name) else theirs[interleave]

    names = {"wte": "model.decoder.embed_tokens"} | block_names(
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
    """T5's decoder without encoder, with scores scaled by 1 / √head_dim and tied output embeddings."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 31, "d_model": 32, "d_kv": 8, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        extra = {"layer_norm_epsilon": 1e-5, "feed_forward_proj": "gelu", "is_decoder": True}
        extra |= {"initializer_factor": 0.1, "attn_implementation": "eager"}
        config = transformers.T5Config(**sizes, **extra)
        self.stack = T5Stack(config)
        for module in self.modules():
            if isinstance(module, T5Attention):
                module.scaling = 8**-0.5

    def forward(self, input_ids: Tensor, **options: object) -> SimpleNamespace:
        x = self.stack(input_ids, **options).last_hidden_state
        return SimpleNamespace(logits=x @ self.stack.embed_tokens.weight.T)


def t5() -> Oracle:
    """block_size 200: distances above 15 share buckets."""
    names = {
        "wte": "stack.embed_tokens",
        "rel": "stack.block.0.layer.0.SelfAttention.relative_attention_bias",
        "ln_f": "stack.final_layer_norm",
    } | block_names(
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
    "LLaMA with one key head": llama({"n_kv_head": 1}, num_key_value_heads=1),
    "LLaMA with another rope_theta": llama({"rope_theta": 500.0}, rope_theta=500.0),
    "LLaMA with geglu": llama({"activation": "geglu"}, hidden_act="gelu"),
    "LLaMA with a prefix": llama({"prefix_len": 5}, mask=prefix_of_5),
    "Mistral": llama({"sliding_window": 5}, kind="Mistral", sliding_window=5),
    "Qwen3": llama({"qk_norm": True}, kind="Qwen3", head_dim=8),
    "NanoChat": nanochat(),
    "Falcon": falcon(),
    "Cohere with one key head, as PaLM": cohere(1),
    "Cohere with grouped heads": cohere(2),
    "Marian": marian(),
    "T5": t5(),
}


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", ORACLES)
def test_logits_loss_and_gradients_equal_transformers(name, flash):
    oracle = ORACLES[name]
    torch.manual_seed(0)
    theirs = scatter(oracle.build())
    ours = GPT(small(**oracle.ours, flash=flash)).eval()
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, parameter in weights.items():
            if re.search(oracle.zero, key):
                parameter.zero_()
        missing, unexpected = ours.load_state_dict(to_our_names(oracle, ours, weights), strict=False)
    assert not unexpected
    assert all(re.search(oracle.absent, key) or key == "lm_head.weight" for key in missing)

    idx = ids(2, ours.config.block_size)
    targets = F.pad(idx[:, 1:], (0, 1), value=-1)
    counted, options = targets.clone(), {}
    if oracle.mask:
        counted[:, :4] = -1  # tokens of the prefix are not predicted
        options["attention_mask"] = oracle.mask(idx.size(1))
    expected = theirs(idx, use_cache=False, **options).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1), counted.flatten(), ignore_index=-1)
    logits, loss = ours(idx, targets)
    assert expected.std() > 0.5  # otherwise the comparison would be weak
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)

    expected_grads = to_our_names(oracle, ours, gradients(theirs, expected_loss))
    grads, size = gradients(ours, loss), max_abs(expected_grads)
    for key, grad in expected_grads.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-5 * size, msg=key)
