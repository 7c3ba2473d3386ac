"""How much memory a training run takes on each device, counted part by part; and what fits into so much.

Weights, gradients and optimizer state stay; what the backward pass needs, and the loss, come and go. The
peak is that of the fullest moment: the loss, the backward pass of the last block or of the embedding, the
update, an evaluation. It is that of a step that is not compiled. Nothing is allocated and no device is asked.

Shapes: N tokens that pass through the model together, C width, V vocabulary, H heads, T block.
"""

import dataclasses
from dataclasses import dataclass
from typing import Protocol

from fradique.nn.attention import MAX_SAVED_T, QUERY_BLOCK
from fradique.nn.cross_entropy import LARGE_VOCAB, MAX_FP32_LOGITS, MAX_LOGITS
from fradique.nn.linear import MIN_ROWS, MIN_WIDTH
from fradique.optim.muon import MAX_BATCH_ELEMENTS
from fradique.runtime.device import CPU_MAX_TOKENS

FP32_BYTES = 4  # bytes of a weight, a gradient, and a number of the stream between the blocks
GATED = ("swiglu", "geglu")

# Measured on Linux with PyTorch 2.13 on a CPU (python -m bench.memory --measure): what set-up and the first
# step load beyond the imports; and what malloc holds and cannot use, since the places that others left are
# too small: a share of what comes and goes, and some of the MLP's widest tensors, more of them where blocks
# run a second time among what is kept.
CPU_PROCESS = 105 << 20
CPU_HOLES, CPU_WIDE_HOLES = {"float32": 0.37, "bfloat16": 0.22}, (3.5, 10)
SHARDED_HOLES = {"float32": 0.15, "bfloat16": 0.3}  # where malloc gives large tensors back at once
CUDA_PROCESS = 512 << 20  # a context with its kernels; not measured


class Shape(Protocol):
    """What is asked of a model: GPTConfig has it."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool
    norm: str
    norm_place: str
    qk_norm: bool
    embd_norm: bool
    position: str
    activation: str
    parallel_block: bool
    sliding_window: int
    prefix_len: int
    tie_weights: bool
    flash: bool

    @property
    def head_dim(self) -> int: ...

    @property
    def kv_heads(self) -> int: ...

    @property
    def inner(self) -> int: ...


@dataclass(frozen=True)
class MemoryPlan:
    """A training run, as far as its memory depends on it."""

    shape: Shape
    batch_size: int
    gradient_accumulation_steps: int = 1  # over all processes together
    device: str = "cuda"  # cuda | mps | cpu
    dtype: str = "bfloat16"  # of the forward pass
    optimizer: str = "adamw"
    parallel: str = "none"  # none | ddp | fsdp
    world: int = 1  # processes
    gradient_checkpointing: bool = False
    trained: int | None = None  # parameters that are trained, where not all are

    @property
    def low(self) -> int:
        """Bytes of a number in the forward pass."""
        return FP32_BYTES if self.dtype == "float32" else 2

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of the model."""
        return self.parallel == "fsdp" and self.world > 1

    def slices(self) -> tuple[int, int]:
        """Tokens that pass through the model together in each process, and how often they do in a step."""
        rows, count = self.batch_size, self.gradient_accumulation_steps
        if count % self.world == 0:
            count //= self.world
        else:
            rows = max(1, rows // self.world)
        length, together = self.shape.block_size, rows
        if self.device == "cpu":
            fits = (n for n in range(1, rows + 1) if rows % n == 0 and n * length <= CPU_MAX_TOKENS)
            together = max(fits, default=1)
        return together * length, count * rows // together


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes in each process at the fullest moment of a step."""

    moment: str
    weights: int
    gradients: int
    optimizer: int
    casts: int  # 16-bit copies of the weights
    activations: int  # kept for the backward pass
    passing: int  # what the moment itself takes: the logits, gradients on their way, an update
    exchange: int  # DDP's copies of the gradients; what FSDP gathers and sends
    holes: int = 0  # memory that malloc holds and cannot use
    process: int = 0  # the program itself, its tokens, a card's context

    @property
    def total(self) -> int:
        return self.allocated + self.holes + self.process

    @property
    def allocated(self) -> int:
        """Of tensors alone."""
        return self.staying + self.activations + self.passing

    @property
    def staying(self) -> int:
        """What is there throughout, however small the batch."""
        return self.weights + self.gradients + self.optimizer + self.casts + self.exchange


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers there are in which parts of a model."""

    matrices: int  # in the linear layers of all blocks
    vectors: int  # biases and norms of all blocks
    embedding: int  # of the tokens, V C; the output layer too, where the two are tied
    output: int  # of the output layer, where it is a matrix of its own
    rest: int  # positions and the last norms

    @property
    def total(self) -> int:
        return self.matrices + self.vectors + self.embedding + self.output + self.rest

    @property
    def root(self) -> int:
        """All but the blocks."""
        return self.embedding + self.output + self.rest


def count_parameters(shape: Shape) -> ParameterCounts:
    """Counted from the shape."""
    C, qkv = shape.n_embd, _qkv(shape)
    into = shape.inner * (2 if shape.activation in GATED else 1)
    norm = 1 if shape.norm == "rmsnorm" else 1 + shape.bias  # vectors a norm
    vectors = (1 if shape.parallel_block else 2) * norm * C
    vectors += 2 * norm * shape.head_dim if shape.qk_norm else 0
    vectors += qkv + C + into + C if shape.bias else 0
    table = shape.vocab_size * C
    rest = (shape.norm_place == "pre") * norm * C + shape.embd_norm * norm * C
    rest += {"learned": shape.block_size * C, "relative": 32 * shape.n_head}.get(shape.position, 0)
    return ParameterCounts(
        matrices=shape.n_layer * (C * qkv + C * C + C * into + shape.inner * C),
        vectors=shape.n_layer * vectors,
        embedding=table,
        output=0 if shape.tie_weights else table,
        rest=rest,
    )


def estimate_memory(plan: MemoryPlan) -> MemoryEstimate:
    """The peak in each process of a run."""
    tokens, slices = plan.slices()
    fullest = max(estimate_moments(plan), key=lambda one: one.allocated)
    if plan.device != "cpu":
        return dataclasses.replace(fullest, process=CUDA_PROCESS if plan.device == "cuda" else 0)
    passing = fullest.allocated - fullest.weights - fullest.optimizer
    if plan.sharded:
        holes = SHARDED_HOLES.get(plan.dtype, 0.3) * passing
    else:
        wide = CPU_WIDE_HOLES[plan.gradient_checkpointing] * FP32_BYTES * tokens * plan.shape.inner
        holes = CPU_HOLES.get(plan.dtype, 0.37) * passing + wide
    held_tokens = 16 * tokens * slices  # inputs and targets of a step, as int64
    return dataclasses.replace(fullest, holes=int(holes), process=CPU_PROCESS + held_tokens)


def estimate_moments(plan: MemoryPlan) -> list[MemoryEstimate]:
    """The tensors of each process at the moments of a run that may be the fullest."""
    tokens, slices = plan.slices()
    counted = count_parameters(plan.shape)
    trained = counted.total if plan.trained is None else plan.trained
    share = plan.world if plan.sharded else 1
    weights, gradients = FP32_BYTES * counted.total // share, FP32_BYTES * trained // share
    state = _optimizer_state(plan, counted, trained) // share
    exchange = _exchanged(plan, trained)
    casts = _casts(plan, counted, tokens)
    return [
        MemoryEstimate(
            moment=name,
            weights=weights,
            gradients=int(there * gradients),
            optimizer=state,
            casts=casts if kept else 0,
            activations=int(kept),
            passing=int(passing),
            exchange=exchange,
        )
        for name, kept, passing, there in _moments(plan, counted, tokens, slices, trained)
    ]


def _moments(
    plan: MemoryPlan, counted: ParameterCounts, tokens: int, slices: int, trained: int
) -> list[tuple[str, float, float, float]]:
    """The moments of a step that may be the fullest: name, bytes kept for the backward pass, bytes that the
    moment itself takes, and the share of the gradients that is there."""
    shape, low = plan.shape, plan.low
    stream = FP32_BYTES * tokens * shape.n_embd
    block = tokens * _block(plan)
    kept = plan.shape.n_layer * (stream if plan.gradient_checkpointing else block) + stream + _mask(plan)
    if shape.dropout:
        kept += tokens * shape.n_embd * (FP32_BYTES if plan.device == "cpu" else 1)
    again = block - stream if plan.gradient_checkpointing else 0  # a block that runs a second time
    table = FP32_BYTES * (counted.output or counted.embedding)
    table = table if trained > table // FP32_BYTES else 0  # LoRA: no gradient of the output layer
    grown = 1.0 if slices > 1 else 0.0  # in the first slice the gradients come as the rest goes
    end = low * tokens * shape.n_embd  # what the output layer reads
    backward = again + stream - end + tokens * _widest(plan) + table
    if plan.sharded:  # the root is whole, two blocks are on their way, one's gradients go
        one = FP32_BYTES * (counted.matrices + counted.vectors) // shape.n_layer
        root = FP32_BYTES * counted.root
        loss, within, last = root + 2 * one, root + 5 * one, 3 * root + 2 * one
    else:
        loss = within = last = 0
    # the gradients of the embedding and, where the two are tied, of the output layer wait for one another
    tied = table * (shape.tie_weights + grown)
    return [
        ("loss", kept + end, _loss(plan, tokens, table) + loss, grown),
        ("backward pass", kept, backward + within, grown),
        ("end of the backward pass", stream + block, tied + stream + last, 1.0),
        ("update", 0, _update(plan), 1.0),
        ("evaluation", 0, _evaluation(plan) + loss, 0.0),
    ]


def _qkv(shape: Shape) -> int:
    """Width of queries, keys and values side by side."""
    return shape.n_embd + 2 * shape.kv_heads * shape.head_dim


def _block(plan: MemoryPlan) -> float:
    """Bytes a token that a block keeps for the backward pass, its input among them."""
    shape, low = plan.shape, plan.low
    C, inner = shape.n_embd, shape.inner
    norms = 1 if shape.parallel_block else 2
    kept = norms * FP32_BYTES * C  # what the norms read
    kept += (
        (1 if shape.parallel_block and low == FP32_BYTES else 2) * low * C
    )  # what the linear layers read of it
    kept += _attention(plan)
    # of the MLP: c_fc's output, what the activation makes of it, and of a gated one gate and product too
    wide = 4 if shape.activation in GATED else 1 if shape.activation == "relu" else 2
    kept += wide * low * inner
    if shape.dropout:
        kept += (
            2 * C * (low if plan.device == "cpu" else 1)
        )  # the masks: numbers as wide on a CPU, else bytes
    return kept


def _attention(plan: MemoryPlan) -> float:
    """Bytes a token that attention keeps: queries, keys, values, output, and what its kernel adds."""
    shape, low = plan.shape, plan.low
    C, T, p = shape.n_embd, shape.block_size, shape.dropout
    turned = low * (C + shape.kv_heads * shape.head_dim)  # queries and keys that are made anew
    widened = shape.qk_norm and shape.norm == "rmsnorm" and low < FP32_BYTES  # RMSNorm reads float32
    normed = turned * FP32_BYTES // low if widened else 0
    scores = shape.n_head * T
    if not shape.flash:
        return low * (_qkv(shape) + 2 * C) + scores * (FP32_BYTES + low + (low if p else 0)) + normed
    if plan.device == "cpu" and (p or low < FP32_BYTES) and (p or T <= MAX_SAVED_T):
        part = 1.0 if T <= MAX_SAVED_T else min(1.0, 0.5 + QUERY_BLOCK / (2 * T))
        if T > MAX_SAVED_T and (shape.prefix_len or shape.position in ("alibi", "relative")):
            part = 1.0
        # copies of q, k, v and the output, of which c_proj has one of its own; probabilities
        return 5 * low * C + part * low * scores * (2 if p else 1) + normed
    kept = low * (_qkv(shape) + C) + FP32_BYTES * shape.n_head  # and the logarithms of the sums
    return kept + normed + (turned if shape.position == "rope" or shape.qk_norm else 0)


def _mask(plan: MemoryPlan) -> int:
    """Bytes of the mask that all layers share, where there is one."""
    shape, T = plan.shape, plan.shape.block_size
    if shape.position in ("alibi", "relative"):
        return shape.n_head * T * T * (FP32_BYTES + plan.low * shape.n_layer)
    return T * T if shape.sliding_window or shape.prefix_len else 0


def _widest(plan: MemoryPlan) -> float:
    """Bytes a token that the backward pass of the last block's MLP takes beside what is kept: the gradients
    of the stream and of what c_fc gives, less what has gone by then."""
    shape, low = plan.shape, plan.low
    C = shape.n_embd
    into = shape.inner * (2 if shape.activation in GATED else 1)
    bent = 2 * into if shape.activation == "relu2" else into  # the square's gradient is made in two steps
    return (FP32_BYTES - low) * C + max(low * (C + shape.inner), low * bent)


def _casts(plan: MemoryPlan, counted: ParameterCounts, tokens: int) -> int:
    """Bytes of the 16-bit copies that autocast keeps for a step, or linear layers for a slice."""
    if plan.low == FP32_BYTES:
        return 0
    shape = plan.shape
    on_cpu = plan.device == "cpu" and tokens >= MIN_ROWS and max(shape.inner, _qkv(shape)) >= MIN_WIDTH
    if (on_cpu and plan.gradient_checkpointing) or plan.sharded:
        return plan.low * counted.matrices // shape.n_layer  # of one block at a time
    return plan.low * counted.matrices


def _loss(plan: MemoryPlan, tokens: int, table: int) -> int:
    """Bytes that the loss and its gradient take beside x and the output layer's weight."""
    shape, low = plan.shape, plan.low
    V, device = shape.vocab_size, plan.device
    logits = tokens * V
    if V < LARGE_VOCAB and logits <= MAX_LOGITS[device]:
        return logits * (low + 2 * FP32_BYTES if low < FP32_BYTES else 2 * FP32_BYTES) + table
    floats = min(-(-tokens // 2) * V, MAX_FP32_LOGITS[device]) * FP32_BYTES
    weight = V * shape.n_embd * low if low < FP32_BYTES else 0  # the 16-bit copy
    reads = tokens * shape.n_embd * low
    copies = 2 * weight if table else weight  # the gradient of the weight is found in 16 bits first
    return logits * low + max(floats + weight, copies + table + 2 * reads)


def _evaluation(plan: MemoryPlan) -> int:
    """Bytes that an evaluation takes: a block's widest tensors and the logits. Nothing is kept."""
    shape, low = plan.shape, plan.low
    tokens = plan.batch_size * shape.block_size
    if plan.device == "cpu":
        tokens = max(CPU_MAX_TOKENS, shape.block_size)
    logits = min(tokens * shape.vocab_size, MAX_LOGITS[plan.device])
    floats = min(logits, MAX_FP32_LOGITS[plan.device])
    widest = 2 * FP32_BYTES * shape.n_embd + 2 * low * max(shape.inner, _qkv(shape))
    return tokens * max(widest, FP32_BYTES * shape.n_embd) + logits * low + floats * FP32_BYTES


def _optimizer_state(plan: MemoryPlan, counted: ParameterCounts, trained: int) -> int:
    """Bytes of all ranks' optimizer state together."""
    part = trained / counted.total
    if plan.optimizer == "muon":  # a momentum for the matrices, AdamW's two averages for the rest
        return int(part * FP32_BYTES * (counted.matrices + 2 * (counted.total - counted.matrices)))
    return int(part * 2 * FP32_BYTES * counted.total)


def _update(plan: MemoryPlan) -> int:
    """Bytes that an update takes beside what stays. AdamW is fused: none."""
    if plan.optimizer != "muon":
        return 0
    widest = plan.shape.n_embd * plan.shape.inner  # those of one shape are taken together: the MLP's are most
    together = min(max(MAX_BATCH_ELEMENTS, widest), 2 * plan.shape.n_layer * widest)
    return (
        FP32_BYTES + 7
    ) * together  # Nesterov's gradient; and the iteration's three and a half in bfloat16


def _exchanged(plan: MemoryPlan, trained: int) -> int:
    """Bytes that sharing takes throughout."""
    return FP32_BYTES * trained if plan.parallel == "ddp" and plan.world > 1 else 0


# What would fit


def suggest_settings(plan: MemoryPlan, budget: int) -> list[dict[str, int | bool]]:
    """Settings that make `plan` fit into `budget` bytes a process: each enough by itself, the mildest first.

    Batches become smaller and more of them make a step, so a step has as many tokens as before. Where no
    batch is small enough, a shorter block or a model of fewer layers is told. Empty: nothing helps.
    """
    found = []
    if smaller := _largest_batch(plan, budget):
        found.append(smaller)
    if not plan.gradient_checkpointing:
        again = dataclasses.replace(plan, gradient_checkpointing=True)
        if smaller := _largest_batch(again, budget):
            found.append({"gradient_checkpointing": True} | smaller)
    if plan.parallel == "ddp" and plan.world > 1 and plan.optimizer != "muon":
        parted = dataclasses.replace(plan, parallel="fsdp")
        if smaller := _largest_batch(parted, budget):
            found.append({"parallel": "fsdp"} | smaller)
    return found or _smaller_shape(plan, budget)


def _largest_batch(plan: MemoryPlan, budget: int) -> dict[str, int | bool]:
    """The largest batch that fits, with as many steps of accumulation as make up for it."""
    together = plan.batch_size * plan.gradient_accumulation_steps
    for rows in range(plan.batch_size, 0, -1):
        if together % rows or (rows % plan.world and together // rows % plan.world):
            continue
        smaller = dataclasses.replace(plan, batch_size=rows, gradient_accumulation_steps=together // rows)
        if estimate_memory(smaller).total <= budget:
            return {"batch_size": rows, "gradient_accumulation_steps": together // rows}
    return {}


def _smaller_shape(plan: MemoryPlan, budget: int) -> list[dict[str, int | bool]]:
    """The longest block, and the deepest model, that fit with checkpointing; by halves."""
    plan = dataclasses.replace(plan, gradient_checkpointing=True)
    found = []
    for name in ("block_size", "n_layer"):
        value = getattr(plan.shape, name) // 2
        while value > plan.shape.prefix_len * (name == "block_size"):
            shape = dataclasses.replace(plan.shape, **{name: value})
            smaller = _largest_batch(dataclasses.replace(plan, shape=shape), budget)
            if smaller:
                found.append({name: value, "gradient_checkpointing": True} | smaller)
                break
            value //= 2
    return found
