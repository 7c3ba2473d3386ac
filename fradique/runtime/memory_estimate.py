"""Estimate the memory that a training run needs on each device, and suggest settings that fit a limit.

Weights, gradients and optimizer state are persistent; activations and the tensors of the loss are temporary.
The peak is the maximum over these phases: the loss, the backward pass through the last block, the end of the
backward pass at the embedding, the optimizer update, and an evaluation. The estimate is for a run without
torch.compile. It is computed from the settings alone: nothing is allocated and no device is used.

Notation: N tokens in one forward pass, C embedding width, V vocabulary size, H heads, T block size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fradique.nn.attention import MAX_SAVED_T, MIN_BLOCKED_T, query_block
from fradique.nn.cross_entropy import LARGE_VOCAB, MAX_FP32_LOGITS, MAX_LOGITS
from fradique.nn.functional import GATED
from fradique.nn.linear import MIN_ROWS, MIN_WIDTH
from fradique.nn.positions import RELATIVE_BUCKETS
from fradique.optim.muon import MAX_BATCH_ELEMENTS
from fradique.runtime.device import CPU_MAX_TOKENS, rows_per_pass
from model import GPTConfig

FP32_BYTES = 4  # per element of weights, gradients and the residual stream

# Measured on Linux with PyTorch 2.13 on a CPU (python -m bench.memory --measure).
CPU_PROCESS = 105 << 20  # bytes that setup and the first step load in addition to the imports
CUDA_PROCESS = 512 << 20  # bytes of a CUDA context and its kernels; not measured
# Heap fragmentation is memory that malloc holds in gaps too small to reuse. The estimate is a fraction of the
# temporary memory, by dtype, ...
FRAGMENTATION = {"float32": 0.37, "bfloat16": 0.22}
# ... plus this number of float32 tensors (N, inner), the widest of the MLP: more with gradient checkpointing
# (True), which allocates recomputed blocks between persistent tensors.
MLP_FRAGMENTATION = {False: 3.5, True: 10}
# In sharded runs only a fraction, by dtype: malloc returns large tensors to the kernel at once.
SHARDED_FRAGMENTATION = {"float32": 0.15, "bfloat16": 0.3}


@dataclass(frozen=True)
class MemoryPlan:
    """The settings of a training run that determine its memory."""

    config: GPTConfig
    batch_size: int
    gradient_accumulation_steps: int = 1  # summed over all processes
    device: str = "cuda"  # cuda | mps | cpu
    dtype: str = "bfloat16"  # of the forward pass
    optimizer: str = "adamw"
    parallel: str = "none"  # none | ddp | fsdp
    world: int = 1  # number of processes
    gradient_checkpointing: bool = False
    trainable: int | None = None  # number of trainable parameters; None: all

    @property
    def bytes_per_element(self) -> int:
        """Bytes per element in the dtype of the forward pass."""
        return FP32_BYTES if self.dtype == "float32" else 2

    @property
    def sharded(self) -> bool:
        """Whether each process holds a shard of the model."""
        return self.parallel == "fsdp" and self.world > 1

    def forward_passes(self) -> tuple[int, int]:
        """Tokens per forward pass of a process, and its number of forward passes per step.

        The ranks divide the accumulation steps among them or, if that leaves a remainder, the rows of each
        micro-batch. On a CPU `Runtime.split_microbatches` also splits the micro-batches.
        """
        rows, steps = self.batch_size, self.gradient_accumulation_steps
        if steps % self.world == 0:
            steps //= self.world
        else:
            rows = max(1, rows // self.world)
        length = self.config.block_size
        pass_rows = rows_per_pass(rows, length) if self.device == "cpu" else rows
        return pass_rows * length, steps * rows // pass_rows

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
    transient: int  # only in this phase: logits, gradients of activations, temporary tensors of the update
    communication: int  # DDP's copies of the gradients
    fragmentation: int = 0  # heap fragmentation: memory that malloc holds and cannot reuse
    process: int = 0  # libraries, the tokens of a step, the CUDA context

    @property
    def total(self) -> int:
        """All memory of the process."""
        return self.allocated + self.fragmentation + self.process

    @property
    def allocated(self) -> int:
        """Memory of tensors."""
        return self.persistent + self.activations + self.transient

    @property
    def persistent(self) -> int:
        """Memory that does not depend on the batch size."""
        return self.weights + self.gradients + self.optimizer + self.casts + self.communication


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters by kind."""

    matrices: int  # in the linear layers of all blocks
    vectors: int  # biases and norms of all blocks
    embedding: int  # token embedding, V x C; with tied weights also the output layer
    output: int  # output layer; 0 with tied weights
    position_and_norms: int  # positional embedding or bias, and the norms outside the blocks
    ngrams: int  # table of n-grams

    @property
    def total(self) -> int:
        """All parameters."""
        return self.matrices + self.vectors + self.outside_blocks

    @property
    def outside_blocks(self) -> int:
        """All parameters outside the blocks: FSDP's root group."""
        return self.embedding + self.output + self.position_and_norms + self.ngrams


@dataclass(frozen=True)
class _Phase:
    """Bytes that differ between the phases of a step; see MemoryEstimate."""

    name: str
    activations: float
    transient: float
    gradient_fraction: float  # fraction of the gradients of all parameters that already exists


def count_parameters(config: GPTConfig) -> ParameterCounts:
    """The parameters of a model, computed from its config."""
    C, qkv_width, c_fc_width = config.n_embd, _qkv_width(config), _c_fc_width(config)
    vectors_per_norm = 2 if config.norm == "layernorm" and config.bias else 1  # weight, and bias
    block_norms = 1 if config.parallel_block else 2
    vectors = block_norms * vectors_per_norm * C
    if config.qk_norm:
        vectors += 2 * vectors_per_norm * config.head_dim
    if config.bias:
        vectors += qkv_width + C + c_fc_width + C  # biases of the four linear layers
    embedding = config.vocab_size * C
    outer_norms = int(config.norm_place == "pre") + int(config.embd_norm)  # ln_f, ln_e
    position_and_norms = outer_norms * vectors_per_norm * C
    if config.position == "learned":
        position_and_norms += config.block_size * C
    elif config.position == "relative":
        position_and_norms += RELATIVE_BUCKETS * config.n_head
    return ParameterCounts(
        matrices=config.n_layer * (C * qkv_width + C * C + C * c_fc_width + config.inner * C),
        vectors=config.n_layer * vectors,
        embedding=embedding,
        output=0 if config.tie_weights else embedding,
        position_and_norms=position_and_norms,
        ngrams=(config.ngram_max - 1) * config.ngram_rows * C,
    )


def estimate_memory(plan: MemoryPlan) -> MemoryEstimate:
    """The memory of a process in the phase in which it needs the most: the peak."""
    tokens, passes = plan.forward_passes()
    peak = max(estimate_phases(plan), key=lambda phase: phase.allocated)
    if plan.device != "cpu":
        return dataclasses.replace(peak, process=CUDA_PROCESS if plan.device == "cuda" else 0)
    temporary = peak.allocated - peak.weights - peak.optimizer  # allocated and freed in every step
    if plan.sharded:
        fragmentation = SHARDED_FRAGMENTATION.get(plan.dtype, 0.3) * temporary
    else:
        mlp = MLP_FRAGMENTATION[plan.gradient_checkpointing] * FP32_BYTES * tokens * plan.config.inner
        fragmentation = FRAGMENTATION.get(plan.dtype, 0.37) * temporary + mlp
    token_bytes = 2 * 8 * tokens * passes  # inputs and targets of a step, int64
    return dataclasses.replace(peak, fragmentation=int(fragmentation), process=CPU_PROCESS + token_bytes)


def estimate_phases(plan: MemoryPlan) -> list[MemoryEstimate]:
    """The memory of a process in each phase that may be the peak, without `fragmentation` and `process`."""
    tokens, passes = plan.forward_passes()
    counts = count_parameters(plan.config)
    trainable = counts.total if plan.trainable is None else plan.trainable
    shards = plan.world if plan.sharded else 1
    gradients = (FP32_BYTES * trainable + _sparse_gradient_bytes(plan, counts, tokens * passes)) // shards
    weights = FP32_BYTES * counts.total // shards
    optimizer = _optimizer_bytes(plan, counts, trainable) // shards
    communication = FP32_BYTES * trainable if plan.parallel == "ddp" and plan.world > 1 else 0
    casts = _cast_bytes(plan, counts, tokens)
    return [
        MemoryEstimate(
            phase=phase.name,
            weights=weights,
            gradients=int(phase.gradient_fraction * gradients),
            optimizer=optimizer,
            casts=casts if phase.activations else 0,  # none in the update and the evaluation
            activations=int(phase.activations),
            transient=int(phase.transient),
            communication=communication,
        )
        for phase in _phases(plan, counts, tokens, passes, trainable)
    ]


def _phases(
    plan: MemoryPlan, counts: ParameterCounts, tokens: int, passes: int, trainable: int
) -> list[_Phase]:
    """The phases of a step, in order, and an evaluation. `passes`: forward passes per step."""
    config, itemsize = plan.config, plan.bytes_per_element
    residual = FP32_BYTES * tokens * config.n_embd  # the residual stream at one layer
    block = tokens * _block_bytes_per_token(plan)
    per_layer = residual if plan.gradient_checkpointing else block
    saved = config.n_layer * per_layer + residual + _mask_bytes(plan)
    if config.dropout:  # mask of the embedding's dropout
        saved += tokens * config.n_embd * (FP32_BYTES if plan.device == "cpu" else 1)
    recomputed = block - residual if plan.gradient_checkpointing else 0  # one block
    output_params = counts.output or counts.embedding
    # with LoRA few parameters are trainable, and the output layer has no gradient
    output_grad = FP32_BYTES * output_params if trainable > output_params else 0
    # From the second pass of a step on, all gradients exist. In the first pass they are allocated while
    # activations are freed, and do not add to the peak.
    accumulated = 1.0 if passes > 1 else 0.0
    output_input = itemsize * tokens * config.n_embd  # what the output layer reads
    backward = recomputed + residual - output_input + tokens * _mlp_backward_bytes_per_token(plan)
    backward += output_grad
    fsdp_loss = fsdp_backward = fsdp_end = 0  # FSDP's temporary copies of parameters and gradients
    if plan.sharded:  # the root group and up to two blocks are gathered; one block's gradients are reduced
        layer = FP32_BYTES * (counts.matrices + counts.vectors) // config.n_layer
        root = FP32_BYTES * counts.outside_blocks
        fsdp_loss, fsdp_backward, fsdp_end = root + 2 * layer, root + 5 * layer, 3 * root + 2 * layer
    # with tied weights the gradients of embedding and output layer exist together until they are summed
    embedding_grads = output_grad * (int(config.tie_weights) + accumulated)
    loss = _loss_bytes(plan, tokens, output_grad)
    return [
        _Phase("loss", saved + output_input, loss + fsdp_loss, accumulated),
        _Phase("backward pass", saved, backward + fsdp_backward, accumulated),
        _Phase("end of the backward pass", residual + block, embedding_grads + residual + fsdp_end, 1.0),
        _Phase("update", 0, _update_bytes(plan), 1.0),
        _Phase("evaluation", 0, _evaluation_bytes(plan) + fsdp_loss, 0.0),
    ]


def _qkv_width(config: GPTConfig) -> int:
    """Width of the concatenated queries, keys and values."""
    return config.n_embd + 2 * config.kv_heads * config.head_dim


def _c_fc_width(config: GPTConfig) -> int:
    """Output width of the MLP's first linear layer, c_fc."""
    return config.inner * (2 if config.activation in GATED else 1)


def _block_bytes_per_token(plan: MemoryPlan) -> float:
    """Bytes per token that a block saves for the backward pass, including its input."""
    config, itemsize = plan.config, plan.bytes_per_element
    C, inner = config.n_embd, config.inner
    norms = 1 if config.parallel_block else 2
    saved = norms * FP32_BYTES * C  # inputs of the norms
    linear_inputs = 1 if config.parallel_block and itemsize == FP32_BYTES else 2
    saved += linear_inputs * itemsize * C + _attention_bytes_per_token(plan)
    # tensors of width `inner`: the output of c_fc, which is two if gated; activation; product with the gate
    mlp_tensors = 4 if config.activation in GATED else 1 if config.activation == "relu" else 2
    saved += mlp_tensors * itemsize * inner
    if config.dropout:
        # two dropout masks: integers as wide as the dtype on a CPU, one byte per element elsewhere
        saved += 2 * C * (itemsize if plan.device == "cpu" else 1)
    return saved


def _attention_bytes_per_token(plan: MemoryPlan) -> float:
    """Bytes per token that attention saves: queries, keys, values, output, and what its kernel adds."""
    config, itemsize = plan.config, plan.bytes_per_element
    C, T, p = config.n_embd, config.block_size, config.dropout
    qk_width = C + config.kv_heads * config.head_dim
    # under autocast RMSNorm saves float32 copies of the queries and keys
    upcast = config.qk_norm and config.norm == "rmsnorm" and itemsize < FP32_BYTES
    norm_inputs = FP32_BYTES * qk_width if upcast else 0
    scores = config.n_head * T  # scores per query, over all heads
    if not config.flash:
        score_bytes = FP32_BYTES + itemsize + (itemsize if p else 0)
        return itemsize * (_qkv_width(config) + 2 * C) + scores * score_bytes + norm_inputs
    masked = config.prefix_len or config.sliding_window or config.position in ("alibi", "relative")
    blocked = itemsize < FP32_BYTES or (T >= MIN_BLOCKED_T and not masked)
    if plan.device == "cpu" and (p or (blocked and T <= MAX_SAVED_T)):
        # of the probabilities that are saved: without a mask the lower triangle, in blocks
        fraction = 1.0 if masked else min(1.0, 0.5 + query_block(T, itemsize) / (2 * T))
        # copies of q, k and v, two of the output (one for c_proj), probabilities before and after dropout
        return 5 * itemsize * C + fraction * itemsize * scores * (2 if p else 1) + norm_inputs
    saved = itemsize * (_qkv_width(config) + C) + FP32_BYTES * config.n_head  # q, k, v, output; log-sum-exps
    if config.position == "rope" or config.qk_norm:
        saved += itemsize * qk_width  # the queries and keys are new tensors
    return saved + norm_inputs


def _mask_bytes(plan: MemoryPlan) -> int:
    """Bytes of the attention mask, or of the bias in float32 and its copy in each layer's dtype."""
    config, T = plan.config, plan.config.block_size
    if config.position in ("alibi", "relative"):
        return config.n_head * T * T * (FP32_BYTES + plan.bytes_per_element * config.n_layer)
    return T * T if config.sliding_window or config.prefix_len else 0


def _mlp_backward_bytes_per_token(plan: MemoryPlan) -> float:
    """Bytes per token that the backward pass of the last block's MLP adds to the saved activations: the
    gradients of the residual stream and of c_fc's output, minus the activations that are freed before."""
    config, itemsize = plan.config, plan.bytes_per_element
    C, activation_width = config.n_embd, _c_fc_width(config)
    if config.activation == "relu2":
        activation_width *= 2  # the gradients of relu and of the square
    return (FP32_BYTES - itemsize) * C + max(itemsize * (C + config.inner), itemsize * activation_width)


def _cast_bytes(plan: MemoryPlan, counts: ParameterCounts, tokens: int) -> int:
    """Bytes of the 16-bit copies of the weights that autocast caches, or that `Linear` saves on a CPU."""
    config, itemsize = plan.config, plan.bytes_per_element
    if itemsize == FP32_BYTES:
        return 0
    widest = max(config.inner, _qkv_width(config))
    linear_casts = plan.device == "cpu" and tokens >= MIN_ROWS and widest >= MIN_WIDTH
    if (linear_casts and plan.gradient_checkpointing) or plan.sharded:
        return itemsize * counts.matrices // config.n_layer  # one block at a time
    return itemsize * counts.matrices


def _loss_bytes(plan: MemoryPlan, tokens: int, output_grad: int) -> int:
    """Bytes of the loss and its gradients, without the output layer's input and float32 weight.

    `output_grad`: bytes of the output layer's gradient.
    """
    config, itemsize = plan.config, plan.bytes_per_element
    V, device = config.vocab_size, plan.device
    logits = tokens * V
    if V < LARGE_VOCAB and logits <= MAX_LOGITS[device]:  # in float32: logits and their gradient
        return logits * (2 * FP32_BYTES + (itemsize if itemsize < FP32_BYTES else 0)) + output_grad
    fp32_logits = min((tokens + 1) // 2 * V, MAX_FP32_LOGITS[device]) * FP32_BYTES
    weight_cast = V * config.n_embd * itemsize if itemsize < FP32_BYTES else 0
    output_input = tokens * config.n_embd * itemsize
    casts = 2 * weight_cast if output_grad else weight_cast  # the gradient is computed in 16 bits first
    return logits * itemsize + max(fp32_logits + weight_cast, casts + output_grad + 2 * output_input)


def _evaluation_bytes(plan: MemoryPlan) -> int:
    """Bytes of an evaluation: the largest tensors of a block, and the logits. No activations are saved."""
    config, itemsize = plan.config, plan.bytes_per_element
    tokens = plan.batch_size * config.block_size
    if plan.device == "cpu":
        tokens = max(CPU_MAX_TOKENS, config.block_size)
    logits = min(tokens * config.vocab_size, MAX_LOGITS[plan.device])
    fp32_logits = min(logits, MAX_FP32_LOGITS[plan.device])
    block = 2 * FP32_BYTES * config.n_embd + 2 * itemsize * max(config.inner, _qkv_width(config))
    return tokens * block + logits * itemsize + fp32_logits * FP32_BYTES


def _optimizer_bytes(plan: MemoryPlan, counts: ParameterCounts, trainable: int) -> int:
    """Bytes of the optimizer state of all ranks together."""
    fraction = trainable / counts.total
    rows = counts.ngrams // plan.config.n_embd  # one number for each
    others = counts.total - counts.ngrams
    if plan.optimizer == "muon":  # momentum for the matrices, AdamW's two moments for the rest
        return int(fraction * FP32_BYTES * (rows + counts.matrices + 2 * (others - counts.matrices)))
    return int(fraction * FP32_BYTES * (rows + 2 * others))


def _sparse_gradient_bytes(plan: MemoryPlan, counts: ParameterCounts, tokens: int) -> int:
    """How much larger the gradient of the n-grams, a row for each in the batch, is than a dense one."""
    if plan.trainable is not None or plan.world > 1:  # LoRA, which freezes the table; dense
        return 0
    sparse = tokens * (plan.config.ngram_max - 1) * (FP32_BYTES * plan.config.n_embd + 8)
    return sparse - FP32_BYTES * counts.ngrams


def _update_bytes(plan: MemoryPlan) -> int:
    """Bytes of an update's temporary tensors. AdamW is fused and has none."""
    if plan.optimizer != "muon":
        return 0
    # Muon updates matrices of one shape in batches; those of the MLP, two per layer, are the largest
    matrix = plan.config.n_embd * plan.config.inner
    batch = min(max(MAX_BATCH_ELEMENTS, matrix), 2 * plan.config.n_layer * matrix)
    return (FP32_BYTES + 7) * batch  # Nesterov momentum in float32, 3.5 bfloat16 tensors of the iteration


# Suggestions


def suggest_settings(plan: MemoryPlan, budget: int) -> list[dict[str, int | bool]]:
    """Alternative settings, each of which makes `plan` fit `budget` bytes per process; empty if none does.

    The smallest change comes first. A smaller batch_size comes with more gradient_accumulation_steps, so that
    the tokens per step stay the same. If no batch size fits: a smaller block_size or n_layer.
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
    """The largest batch_size that fits, and the gradient_accumulation_steps that keep the tokens per step.

    Empty if no batch_size fits.
    """
    sequences = plan.batch_size * plan.gradient_accumulation_steps  # per step
    for rows in range(plan.batch_size, 0, -1):
        steps, remainder = divmod(sequences, rows)
        if remainder or (rows % plan.world and steps % plan.world):  # the ranks share one of the two
            continue
        settings = {"batch_size": rows, "gradient_accumulation_steps": steps}
        if estimate_memory(dataclasses.replace(plan, **settings)).total <= budget:
            return settings
    return {}


def _smaller_model(plan: MemoryPlan, budget: int) -> list[dict[str, int | bool]]:
    """The largest block_size, and the largest n_layer, that fit with gradient checkpointing; by halving."""
    plan = dataclasses.replace(plan, gradient_checkpointing=True)
    suggestions = []
    for name in ("block_size", "n_layer"):
        value = getattr(plan.config, name) // 2
        lower_limit = plan.config.prefix_len if name == "block_size" else 0  # value must be larger
        while value > lower_limit:
            config = dataclasses.replace(plan.config, **{name: value})
            if batch := _largest_batch(dataclasses.replace(plan, config=config), budget):
                suggestions.append({name: value, "gradient_checkpointing": True} | batch)
                break
            value //= 2
    return suggestions
