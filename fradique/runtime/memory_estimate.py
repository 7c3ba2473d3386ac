"""Estimate the memory that a training run needs on each device, and suggest settings that fit a limit.

Weights, gradients and optimizer state are persistent; activations and the tensors of the loss come and go.
The peak is the maximum over the phases of a step: the loss, the backward pass through the last block, its end
at the embedding, the optimizer update, and an evaluation. The estimate is for a step without torch.compile.
It is computed from the settings alone: nothing is allocated and no device is used.

Notation: N tokens in one forward pass, C embedding width, V vocabulary size, H heads, T block size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fradique.nn.attention import MAX_SAVED_T, QUERY_BLOCK
from fradique.nn.cross_entropy import LARGE_VOCAB, MAX_FP32_LOGITS, MAX_LOGITS
from fradique.nn.functional import GATED
from fradique.nn.linear import MIN_ROWS, MIN_WIDTH
from fradique.optim.muon import MAX_BATCH_ELEMENTS
from fradique.runtime.device import CPU_MAX_TOKENS
from model import GPTConfig

FP32_BYTES = 4  # per element of weights, gradients and the residual stream

# Measured on Linux with PyTorch 2.13 on a CPU (python -m bench.memory --measure).
CPU_PROCESS = 105 << 20  # what set-up and the first step load in addition to the imports
CUDA_PROCESS = 512 << 20  # a CUDA context with its kernels; not measured
# Heap fragmentation: memory that malloc holds in gaps too small to reuse. A fraction of the memory that comes
# and goes, by dtype, plus some of the MLP's widest float32 tensors (N x inner): more of them with gradient
# checkpointing, which recomputes blocks between tensors that stay.
FRAGMENTATION, MLP_FRAGMENTATION = {"float32": 0.37, "bfloat16": 0.22}, {False: 3.5, True: 10}
SHARDED_FRAGMENTATION = {"float32": 0.15, "bfloat16": 0.3}  # malloc returns large tensors at once


@dataclass(frozen=True)
class MemoryPlan:
    """The settings of a training run on which its memory depends."""

    config: GPTConfig
    batch_size: int
    gradient_accumulation_steps: int = 1  # summed over all processes
    device: str = "cuda"  # cuda | mps | cpu
    dtype: str = "bfloat16"  # of the forward pass
    optimizer: str = "adamw"
    parallel: str = "none"  # none | ddp | fsdp
    world: int = 1  # processes
    gradient_checkpointing: bool = False
    trainable: int | None = None  # number of trainable parameters; None: all

    @property
    def bytes_per_element(self) -> int:
        """Of tensors in the dtype of the forward pass."""
        return FP32_BYTES if self.dtype == "float32" else 2

    @property
    def sharded(self) -> bool:
        """Whether each process holds a shard of the model."""
        return self.parallel == "fsdp" and self.world > 1

    def forward_passes(self) -> tuple[int, int]:
        """Tokens in a forward pass of a process, and forward passes per step: Runtime.split_microbatches."""
        rows, steps = self.batch_size, self.gradient_accumulation_steps
        if steps % self.world == 0:
            steps //= self.world
        else:
            rows = max(1, rows // self.world)
        length, rows_per_pass = self.config.block_size, rows
        if self.device == "cpu":
            divisors = (n for n in range(1, rows + 1) if rows % n == 0 and n * length <= CPU_MAX_TOKENS)
            rows_per_pass = max(divisors, default=1)
        return rows_per_pass * length, steps * rows // rows_per_pass

    def estimate(self) -> MemoryEstimate:
        """The peak in each process: see `estimate_memory`."""
        return estimate_memory(self)

    def suggest_settings(self, budget: int) -> list[dict[str, int | bool]]:
        """Settings that fit into `budget` bytes per process: see `suggest_settings`."""
        return suggest_settings(self, budget)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes in each process during one phase of a step."""

    phase: str
    weights: int
    gradients: int
    optimizer: int
    casts: int  # 16-bit copies of the weights
    activations: int  # saved for the backward pass
    transient: int  # of this phase only: logits, gradients of activations, the temporaries of an update
    communication: int  # DDP's copies of the gradients
    fragmentation: int = 0  # memory that malloc holds and cannot reuse
    process: int = 0  # the program itself, the tokens of a step, a CUDA context

    @property
    def total(self) -> int:
        """All memory of the process."""
        return self.allocated + self.fragmentation + self.process

    @property
    def allocated(self) -> int:
        """Tensors only."""
        return self.persistent + self.activations + self.transient

    @property
    def persistent(self) -> int:
        """Tensors that exist during the whole step, whatever the batch size."""
        return self.weights + self.gradients + self.optimizer + self.casts + self.communication


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters by kind."""

    matrices: int  # in the linear layers of all blocks
    vectors: int  # biases and norms of all blocks
    embedding: int  # token embedding, V C; with tied weights it is also the output layer
    output: int  # output layer, if not tied
    position_and_norms: int  # positional embedding and the norms outside the blocks

    @property
    def total(self) -> int:
        """All parameters."""
        return self.matrices + self.vectors + self.embedding + self.output + self.position_and_norms

    @property
    def outside_blocks(self) -> int:
        """All parameters outside the blocks: FSDP's root group."""
        return self.embedding + self.output + self.position_and_norms


@dataclass(frozen=True)
class _Phase:
    """Bytes in a phase of a step."""

    name: str
    activations: float  # saved for the backward pass
    transient: float
    gradient_fraction: float  # of the gradients that exist in this phase


def count_parameters(config: GPTConfig) -> ParameterCounts:
    """The parameters of a model, computed from its config."""
    C, qkv, hidden = config.n_embd, _qkv_width(config), _mlp_input_width(config)
    norm = 1 if config.norm == "rmsnorm" else 1 + config.bias  # vectors per norm
    vectors = (1 if config.parallel_block else 2) * norm * C
    vectors += 2 * norm * config.head_dim if config.qk_norm else 0
    vectors += qkv + C + hidden + C if config.bias else 0
    embedding = config.vocab_size * C
    position_and_norms = (config.norm_place == "pre") * norm * C + config.embd_norm * norm * C
    position_and_norms += {"learned": config.block_size * C, "relative": 32 * config.n_head}.get(
        config.position, 0
    )
    return ParameterCounts(
        matrices=config.n_layer * (C * qkv + C * C + C * hidden + config.inner * C),
        vectors=config.n_layer * vectors,
        embedding=embedding,
        output=0 if config.tie_weights else embedding,
        position_and_norms=position_and_norms,
    )


def estimate_memory(plan: MemoryPlan) -> MemoryEstimate:
    """The phase of a step, or of an evaluation, in which a process needs the most memory."""
    tokens, passes = plan.forward_passes()
    peak = max(estimate_phases(plan), key=lambda phase: phase.allocated)
    if plan.device != "cpu":
        return dataclasses.replace(peak, process=CUDA_PROCESS if plan.device == "cuda" else 0)
    reallocated = peak.allocated - peak.weights - peak.optimizer
    if plan.sharded:
        fragmentation = SHARDED_FRAGMENTATION.get(plan.dtype, 0.3) * reallocated
    else:
        mlp = MLP_FRAGMENTATION[plan.gradient_checkpointing] * FP32_BYTES * tokens * plan.config.inner
        fragmentation = FRAGMENTATION.get(plan.dtype, 0.37) * reallocated + mlp
    token_bytes = 16 * tokens * passes  # inputs and targets of a step, as int64
    return dataclasses.replace(peak, fragmentation=int(fragmentation), process=CPU_PROCESS + token_bytes)


def estimate_phases(plan: MemoryPlan) -> list[MemoryEstimate]:
    """The tensors of a process in each phase that may be the peak; without fragmentation and process."""
    tokens, passes = plan.forward_passes()
    counts = count_parameters(plan.config)
    trainable = counts.total if plan.trainable is None else plan.trainable
    shards = plan.world if plan.sharded else 1
    weights, gradients = FP32_BYTES * counts.total // shards, FP32_BYTES * trainable // shards
    optimizer = _optimizer_state(plan, counts, trainable) // shards
    communication = FP32_BYTES * trainable if plan.parallel == "ddp" and plan.world > 1 else 0
    casts = _weight_casts(plan, counts, tokens)
    return [
        MemoryEstimate(
            phase=phase.name,
            weights=weights,
            gradients=int(phase.gradient_fraction * gradients),
            optimizer=optimizer,
            casts=casts if phase.activations else 0,
            activations=int(phase.activations),
            transient=int(phase.transient),
            communication=communication,
        )
        for phase in _phases(plan, counts, tokens, passes, trainable)
    ]


def _phases(
    plan: MemoryPlan, counts: ParameterCounts, tokens: int, passes: int, trainable: int
) -> list[_Phase]:
    """The phases of a step, in order, and an evaluation."""
    config, width = plan.config, plan.bytes_per_element
    residual = FP32_BYTES * tokens * config.n_embd  # the residual stream at one layer
    block = tokens * _block_activations(plan)
    per_layer = residual if plan.gradient_checkpointing else block
    saved = config.n_layer * per_layer + residual + _mask(plan)
    if config.dropout:
        saved += tokens * config.n_embd * (FP32_BYTES if plan.device == "cpu" else 1)
    recomputed = block - residual if plan.gradient_checkpointing else 0  # one block
    head = FP32_BYTES * (counts.output or counts.embedding)  # gradient of the output layer
    head = head if trainable > head // FP32_BYTES else 0  # LoRA: the output layer has none
    accumulated = 1.0 if passes > 1 else 0.0  # in the first pass gradients grow while activations are freed
    head_input = width * tokens * config.n_embd  # what the output layer reads
    backward = recomputed + residual - head_input + tokens * _mlp_backward(plan) + head
    if plan.sharded:  # the root group and up to two blocks are gathered; one block's gradients are reduced
        layer = FP32_BYTES * (counts.matrices + counts.vectors) // config.n_layer
        root = FP32_BYTES * counts.outside_blocks
        in_loss, in_backward, in_last = root + 2 * layer, root + 5 * layer, 3 * root + 2 * layer
    else:
        in_loss = in_backward = in_last = 0
    # with tied weights the gradients of embedding and output layer exist together until they are summed
    tied = head * (config.tie_weights + accumulated)
    return [
        _Phase("loss", saved + head_input, _loss(plan, tokens, head) + in_loss, accumulated),
        _Phase("backward pass", saved, backward + in_backward, accumulated),
        _Phase("end of the backward pass", residual + block, tied + residual + in_last, 1.0),
        _Phase("update", 0, _update(plan), 1.0),
        _Phase("evaluation", 0, _evaluation(plan) + in_loss, 0.0),
    ]


def _qkv_width(config: GPTConfig) -> int:
    """Width of the concatenated queries, keys and values."""
    return config.n_embd + 2 * config.kv_heads * config.head_dim


def _mlp_input_width(config: GPTConfig) -> int:
    """Output width of the MLP's first linear layer, c_fc."""
    return config.inner * (2 if config.activation in GATED else 1)


def _block_activations(plan: MemoryPlan) -> float:
    """Bytes per token that a block saves for the backward pass, including its input."""
    config, width = plan.config, plan.bytes_per_element
    C, inner = config.n_embd, config.inner
    norms = 1 if config.parallel_block else 2
    saved = norms * FP32_BYTES * C  # inputs of the norms
    linear_inputs = 1 if config.parallel_block and width == FP32_BYTES else 2
    saved += linear_inputs * width * C
    saved += _attention_activations(plan)
    # MLP: the output of c_fc and the activation's output; of a gated one also the gate and the product
    mlp_tensors = 4 if config.activation in GATED else 1 if config.activation == "relu" else 2
    saved += mlp_tensors * width * inner
    if config.dropout:
        saved += 2 * C * (width if plan.device == "cpu" else 1)  # masks: in the dtype on a CPU, else bytes
    return saved


def _attention_activations(plan: MemoryPlan) -> float:
    """Bytes per token that attention saves: queries, keys, values, output, and what its kernel adds."""
    config, width = plan.config, plan.bytes_per_element
    C, T, p = config.n_embd, config.block_size, config.dropout
    rotated = width * (C + config.kv_heads * config.head_dim)  # new queries and keys, after RoPE or qk_norm
    upcast = config.qk_norm and config.norm == "rmsnorm" and width < FP32_BYTES  # RMSNorm reads float32
    normed = rotated * FP32_BYTES // width if upcast else 0
    scores = config.n_head * T
    if not config.flash:
        return (
            width * (_qkv_width(config) + 2 * C)
            + scores * (FP32_BYTES + width + (width if p else 0))
            + normed
        )
    if plan.device == "cpu" and (p or width < FP32_BYTES) and (p or T <= MAX_SAVED_T):
        fraction = 1.0 if T <= MAX_SAVED_T else min(1.0, 0.5 + QUERY_BLOCK / (2 * T))
        if T > MAX_SAVED_T and (config.prefix_len or config.position in ("alibi", "relative")):
            fraction = 1.0
        # copies of q, k, v and two of the output (c_proj saves its own); probabilities, and their dropout
        return 5 * width * C + fraction * width * scores * (2 if p else 1) + normed
    saved = width * (_qkv_width(config) + C) + FP32_BYTES * config.n_head  # and the log-sum-exp of each row
    return saved + normed + (rotated if config.position == "rope" or config.qk_norm else 0)


def _mask(plan: MemoryPlan) -> int:
    """Bytes of the attention mask or bias that all layers share."""
    config, T = plan.config, plan.config.block_size
    if config.position in ("alibi", "relative"):
        return config.n_head * T * T * (FP32_BYTES + plan.bytes_per_element * config.n_layer)
    return T * T if config.sliding_window or config.prefix_len else 0


def _mlp_backward(plan: MemoryPlan) -> float:
    """Bytes per token that the backward pass of the last block's MLP adds to the saved activations: gradients
    of the residual stream and of c_fc's output, minus what has been freed by then."""
    config, width = plan.config, plan.bytes_per_element
    C, hidden = config.n_embd, _mlp_input_width(config)
    activation = 2 * hidden if config.activation == "relu2" else hidden  # the square's gradient has two steps
    return (FP32_BYTES - width) * C + max(width * (C + config.inner), width * activation)


def _weight_casts(plan: MemoryPlan, counts: ParameterCounts, tokens: int) -> int:
    """Bytes of the 16-bit copies of weights that autocast caches for a step, or linear layers for a pass."""
    config, width = plan.config, plan.bytes_per_element
    if width == FP32_BYTES:
        return 0
    own_cast = (
        plan.device == "cpu" and tokens >= MIN_ROWS and max(config.inner, _qkv_width(config)) >= MIN_WIDTH
    )
    if (own_cast and plan.gradient_checkpointing) or plan.sharded:
        return width * counts.matrices // config.n_layer  # one block at a time
    return width * counts.matrices


def _loss(plan: MemoryPlan, tokens: int, head: int) -> int:
    """Bytes of the loss and its gradient, in addition to its input and the output layer's weight."""
    config, width = plan.config, plan.bytes_per_element
    V, device = config.vocab_size, plan.device
    logits = tokens * V
    if V < LARGE_VOCAB and logits <= MAX_LOGITS[device]:
        return logits * (width + 2 * FP32_BYTES if width < FP32_BYTES else 2 * FP32_BYTES) + head
    fp32_logits = min(-(-tokens // 2) * V, MAX_FP32_LOGITS[device]) * FP32_BYTES
    weight = V * config.n_embd * width if width < FP32_BYTES else 0  # the 16-bit copy
    head_input = tokens * config.n_embd * width
    copies = 2 * weight if head else weight  # the weight's gradient is computed in 16 bits first
    return logits * width + max(fp32_logits + weight, copies + head + 2 * head_input)


def _evaluation(plan: MemoryPlan) -> int:
    """Bytes of an evaluation: the widest tensors of a block, and the logits. Nothing is saved."""
    config, width = plan.config, plan.bytes_per_element
    tokens = plan.batch_size * config.block_size
    if plan.device == "cpu":
        tokens = max(CPU_MAX_TOKENS, config.block_size)
    logits = min(tokens * config.vocab_size, MAX_LOGITS[plan.device])
    fp32_logits = min(logits, MAX_FP32_LOGITS[plan.device])
    widest = 2 * FP32_BYTES * config.n_embd + 2 * width * max(config.inner, _qkv_width(config))
    return tokens * max(widest, FP32_BYTES * config.n_embd) + logits * width + fp32_logits * FP32_BYTES


def _optimizer_state(plan: MemoryPlan, counts: ParameterCounts, trainable: int) -> int:
    """Bytes of the optimizer state of all ranks together."""
    fraction = trainable / counts.total
    if plan.optimizer == "muon":  # momentum for the matrices, AdamW's two moments for the rest
        return int(fraction * FP32_BYTES * (counts.matrices + 2 * (counts.total - counts.matrices)))
    return int(fraction * 2 * FP32_BYTES * counts.total)


def _update(plan: MemoryPlan) -> int:
    """Bytes of an update's temporaries. AdamW is fused and has none."""
    if plan.optimizer != "muon":
        return 0
    matrix = (
        plan.config.n_embd * plan.config.inner
    )  # Muon batches matrices of one shape: the MLP's are largest
    batch = min(max(MAX_BATCH_ELEMENTS, matrix), 2 * plan.config.n_layer * matrix)
    return (FP32_BYTES + 7) * batch  # Nesterov's gradient in float32; 3.5 bfloat16 tensors of the iteration


# Suggestions


def suggest_settings(plan: MemoryPlan, budget: int) -> list[dict[str, int | bool]]:
    """Alternative changes of settings, each of which makes `plan` fit `budget` bytes per process.

    The smallest change comes first. batch_size shrinks and gradient_accumulation_steps grows, so that the
    tokens per step stay the same. Only if no batch size fits, a shorter block or fewer layers are suggested.
    Empty if nothing fits.
    """
    suggestions = []
    if batch := _largest_batch(plan, budget):
        suggestions.append(batch)
    if not plan.gradient_checkpointing:
        checkpointed = dataclasses.replace(plan, gradient_checkpointing=True)
        if batch := _largest_batch(checkpointed, budget):
            suggestions.append({"gradient_checkpointing": True} | batch)
    if plan.parallel == "ddp" and plan.world > 1 and plan.optimizer != "muon":
        sharded = dataclasses.replace(plan, parallel="fsdp")
        if batch := _largest_batch(sharded, budget):
            suggestions.append({"parallel": "fsdp"} | batch)
    return suggestions or _smaller_model(plan, budget)


def _largest_batch(plan: MemoryPlan, budget: int) -> dict[str, int | bool]:
    """The largest batch_size that fits, with the accumulation steps that keep the tokens per step; or {}."""
    sequences = plan.batch_size * plan.gradient_accumulation_steps  # per step
    for rows in range(plan.batch_size, 0, -1):
        if sequences % rows or (rows % plan.world and sequences // rows % plan.world):
            continue
        settings = {"batch_size": rows, "gradient_accumulation_steps": sequences // rows}
        if estimate_memory(dataclasses.replace(plan, **settings)).total <= budget:
            return settings
    return {}


def _smaller_model(plan: MemoryPlan, budget: int) -> list[dict[str, int | bool]]:
    """The longest block_size and the largest n_layer that fit with checkpointing, by repeated halving."""
    plan = dataclasses.replace(plan, gradient_checkpointing=True)
    suggestions = []
    for name in ("block_size", "n_layer"):
        value = getattr(plan.config, name) // 2
        while value > plan.config.prefix_len * (name == "block_size"):
            config = dataclasses.replace(plan.config, **{name: value})
            if batch := _largest_batch(dataclasses.replace(plan, config=config), budget):
                suggestions.append({name: value, "gradient_checkpointing": True} | batch)
                break
            value //= 2
    return suggestions
