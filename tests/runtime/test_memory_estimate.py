"""Memory estimates, compared with torch's record of every allocation; and suggested settings."""

from dataclasses import replace

import pytest
import torch

from bench.memory import recorded
from fradique.optim import optimizer
from fradique.runtime import device as devices
from fradique.runtime.memory_estimate import (
    MemoryPlan,
    count_parameters,
    estimate_memory,
    estimate_phases,
    suggest_settings,
)
from model import GPT, GPTConfig

SMALL = GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=64, vocab_size=96, bias=False)
MODERN = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "n_kv_head": 1, "qk_norm": True}


def make_plan(config=SMALL, **changes):
    settings = {"batch_size": 16, "device": "cpu", "dtype": "float32", "parallel": "none"}
    return MemoryPlan(config, **settings | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True, "tie_weights": False},
        MODERN,
        {"activation": "geglu", "bias": True, "position": "relative", "embd_norm": True},
        {"parallel_block": True, "norm": "rmsnorm", "bias": True, "n_inner": 100, "position": "none"},
        {"norm_place": "post", "qk_norm": True, "bias": True, "position": "sinusoidal"},
    ],
)
def test_parameter_counts_equal_those_of_the_model(changes):
    config = replace(SMALL, **changes)
    with torch.device("meta"):
        model = GPT(config)
    counts = count_parameters(config)
    assert counts.total == model.num_params(non_embedding=False)
    block_parameters = [p for name, p in model.named_parameters() if ".h." in name]
    assert counts.matrices == sum(p.numel() for p in block_parameters if p.dim() == 2)
    assert counts.vectors == sum(p.numel() for p in block_parameters if p.dim() < 2)


def measure_peak(config, plan):
    """Peak bytes of all tensors during a step, from torch's record of allocations."""
    torch.manual_seed(0)
    model = GPT(config)
    model.gradient_checkpointing = plan.gradient_checkpointing
    optimizers = optimizer.build_optimizers(
        model, name=plan.optimizer, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1
    )
    runtime = devices.Runtime(torch.device("cpu"), devices.DTYPES[plan.dtype], False)
    rows, length = plan.batch_size, config.block_size
    tokens = torch.randint(config.vocab_size, (plan.gradient_accumulation_steps, rows, length))

    def step():
        with runtime.autocast():
            for x, y in runtime.split_microbatches((x, x) for x in tokens):
                loss = model(x, y, with_logits=False)[1]
                with runtime.autocast(enabled=False):
                    loss.backward()
        optimizer.assign_gradients(optimizers)
        for opt in optimizers:
            opt.step()
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)

    step()
    persistent = [*model.parameters(), *optimizer.state_by_name(optimizers).values()]
    persistent_bytes = {id(tensor): tensor.nbytes for tensor in persistent}
    peak, remaining = recorded(step)
    assert remaining == 0  # a step frees everything that it allocates
    return sum(persistent_bytes.values()) + peak


CASES = [
    ({}, {}),
    ({}, {"gradient_accumulation_steps": 2}),
    ({"n_embd": 128, "block_size": 128}, {"dtype": "bfloat16", "gradient_accumulation_steps": 2}),
    ({"dropout": 0.2}, {"gradient_accumulation_steps": 2}),
    ({"dropout": 0.2, "block_size": 128}, {"dtype": "bfloat16"}),
    ({"block_size": 1024, "n_embd": 128}, {"dtype": "bfloat16", "batch_size": 2}),
    ({"block_size": 1024, "vocab_size": 2048}, {"batch_size": 2, "gradient_accumulation_steps": 2}),
    ({"vocab_size": 8192, "block_size": 128}, {"dtype": "bfloat16", "gradient_accumulation_steps": 2}),
    ({"n_layer": 8}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ({"n_layer": 8, "n_embd": 128}, {"gradient_checkpointing": True, "dtype": "bfloat16"}),
    ({"n_embd": 256}, {"optimizer": "muon", "batch_size": 2}),
    ({"n_embd": 256, "n_layer": 6, "vocab_size": 4096}, {"batch_size": 1}),
    (MODERN, {"gradient_accumulation_steps": 2}),
    (MODERN | {"n_embd": 128, "block_size": 128}, {"dtype": "bfloat16"}),
    ({"activation": "relu2", "parallel_block": True}, {"gradient_accumulation_steps": 2}),
    ({"norm_place": "post", "activation": "relu", "tie_weights": False}, {}),
    ({"ngram_max": 3, "ngram_rows": 5000}, {"gradient_accumulation_steps": 2}),
    ({"ngram_max": 2, "ngram_rows": 20_000}, {"optimizer": "muon"}),
]


@pytest.mark.parametrize(
    ("config", "changes"), CASES, ids=lambda values: ",".join(map(str, values.items())) or "plain"
)
def test_the_estimate_agrees_with_torchs_allocations(config, changes):
    """The tensors of a step, within 8%; bench.memory measures the rest of the process."""
    config = replace(SMALL, **config)
    plan = make_plan(config, **changes)
    phases = [phase.allocated for phase in estimate_phases(plan) if phase.phase != "evaluation"]
    assert max(phases) == pytest.approx(measure_peak(config, plan), rel=0.08)


def test_parallel_fsdp_in_one_process_shards_nothing():
    config = replace(SMALL, n_embd=256, vocab_size=8192)
    unsharded = estimate_memory(make_plan(config))
    assert estimate_memory(make_plan(config, parallel="fsdp")) == unsharded
    shard = estimate_memory(make_plan(config, parallel="fsdp", world=2, gradient_accumulation_steps=2))
    assert shard.weights == unsharded.weights // 2 and shard.optimizer == unsharded.optimizer // 2
    assert 0 < shard.fragmentation < unsharded.fragmentation  # malloc returns large tensors


def test_a_plan_splits_microbatches_as_the_runtime_does():
    runtime = devices.Runtime(torch.device("cpu"), torch.float32, False)
    for rows, length in ((12, 1024), (7, 1000), (1, 9000), (64, 64), (60, 128)):
        x = torch.zeros(rows, length)
        parts = runtime.split_microbatches([(x, x)] * 3)
        plan = make_plan(replace(SMALL, block_size=length), batch_size=rows, gradient_accumulation_steps=3)
        assert plan.forward_passes() == (parts[0][0].numel(), len(parts))


def test_each_process_of_a_sharded_run_stores_a_shard():
    unsharded = estimate_memory(make_plan(device="cuda"))
    for world in (2, 4):
        plan = make_plan(device="cuda", parallel="fsdp", world=world, gradient_accumulation_steps=world)
        shard = estimate_memory(plan)
        assert (shard.weights, shard.optimizer) == (unsharded.weights // world, unsharded.optimizer // world)
    ddp = estimate_memory(make_plan(device="cuda", parallel="ddp", world=2, gradient_accumulation_steps=2))
    assert ddp.communication == ddp.weights  # the buckets are a copy of the gradients


GPT2 = GPTConfig(bias=False)
GPT2_RUN = {"batch_size": 12, "gradient_accumulation_steps": 40, "dtype": "bfloat16"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("gib", [2.5, 3, 4, 6, 10, 20])
def test_suggested_settings_fit_and_keep_the_tokens_per_step(device, gib):
    plan = make_plan(GPT2, device=device, **GPT2_RUN)
    budget = int(gib * 2**30)
    suggestions = suggest_settings(plan, budget)
    assert suggestions or gib < 3
    for changes in suggestions:
        config = {name: changes[name] for name in ("block_size", "n_layer") if name in changes}
        settings = {name: value for name, value in changes.items() if name not in config}
        smaller = replace(plan, config=replace(GPT2, **config), **settings)
        assert estimate_memory(smaller).total <= budget
        assert smaller.batch_size * smaller.gradient_accumulation_steps == 12 * 40


def test_the_first_suggestion_is_the_largest_batch_that_fits():
    plan = make_plan(GPT2, device="cuda", **GPT2_RUN)
    budget = 6 * 2**30
    fitting = [
        rows
        for rows in range(1, 13)
        if 480 % rows == 0
        and estimate_memory(replace(plan, batch_size=rows, gradient_accumulation_steps=480 // rows)).total
        <= budget
    ]
    assert suggest_settings(plan, budget)[0] == {
        "batch_size": max(fitting),
        "gradient_accumulation_steps": 480 // max(fitting),
    }


def test_nothing_is_suggested_if_nothing_fits():
    assert suggest_settings(make_plan(GPT2), 1 << 20) == []
