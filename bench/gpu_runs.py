"""Correctness rows of bench.gpu_check: training, checkpoints, process groups, memory, generation."""

import hashlib
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel

import sample
import train
from bench.architectures import ARCHITECTURES
from bench.gpu_cases import (
    GRADIENT_TOLERANCE,
    QUICK_ARCHITECTURES,
    architecture_config,
    random_model,
    tokens,
)
from bench.gpu_context import (
    DTYPES,
    Context,
    compare,
    full_precision,
    generated_corpus,
    random_tensor,
    run_settings,
)
from fradique.checkpointing import metrics_file
from fradique.distributed import process_group
from fradique.generation import generate
from fradique.generation.kv_cache import KVCache
from fradique.optim import optimizer
from fradique.runtime import device, fallback
from fradique.runtime.memory_estimate import MemoryPlan
from fradique.runtime.memory_limits import OomReport
from fradique.training import autoconfig, outputs, setup
from fradique.training.trainer import Trainer
from model import GPT, GPTConfig

Result = dict[str, Any]
FILES = ("model.safetensors", "optimizer.safetensors")
MEMORY_LIMIT = 1 << 30  # bytes that the row "out of memory" may use on CUDA
IMPOSSIBLE_BYTES = 1 << 50  # more than any machine has


def run(settings: train.TrainSettings) -> Trainer:
    """Train in this process, without drawing loss.png, which would take longer than the steps."""
    device.configure_process(settings.device)
    t = setup.setup_training(settings)
    try:
        with mock.patch.object(outputs, "draw_loss_plot", lambda t: 0.0):
            train.train(t)
    finally:
        t.close()
    return t


def losses(settings: train.TrainSettings) -> dict[int, float]:
    """The training loss of each step of a run."""
    records = metrics_file.read_metrics(Path(settings.out_dir))
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def checksums(settings: train.TrainSettings) -> dict[str, str]:
    """The sha256 of the weights and of the optimizer state after step 20, and of the losses."""
    folder = Path(settings.out_dir) / "step-00000020"
    result = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    return result | {"losses": hashlib.sha256(repr(sorted(losses(settings).items())).encode()).hexdigest()}


def training_row(context: Context) -> Result:
    """The losses of 10 steps in float32 are those of the CPU, with AdamW and with Muon."""
    errors = {}
    for name in ("adamw", "muon"):
        curves = []
        for where in (str(context.device), "cpu"):
            settings = run_settings(context, f"training-{name}-{where}", dropout=0.0, dtype="float32")
            if not context.quick:  # a smaller model, because the CPU trains it too
                settings = replace(settings, n_embd=64, block_size=128, batch_size=4)
            with full_precision():
                t = setup.setup_training(replace(settings, optimizer=name, device=where))
                try:
                    curves.append(torch.tensor([take_step(t) for _ in range(10)]))
                finally:
                    t.close()
        # Muon's updates are computed in bfloat16
        errors[name] = compare(f"losses with {name}", *curves, 1e-3 if name == "adamw" else 1e-2)
    return errors


def take_step(t: Trainer) -> float:
    """One training step: its loss."""
    loss, _ = train.train_step(t, train.learning_rate_at(t, t.state.step))
    t.state.step += 1
    return loss.item()


def resume_row(context: Context) -> Result:
    """20 steps, and 10 steps resumed for 10 more: the same weights, optimizer state and losses, bit for bit.

    If two runs of 20 steps differ too, a kernel adds in another order in each run. Then the same is tried
    with torch's deterministic algorithms.
    """
    once, again, resumed = three_runs(context, "default")
    if once == again:
        assert resumed == once, "the resumed run differs, although uninterrupted runs are equal"
        return {"steps": 20, "sha256": once["model.safetensors"][:16]}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        once, again, resumed = three_runs(context, "deterministic")
    finally:
        torch.use_deterministic_algorithms(False)
    result = "repeats the run" if once == again == resumed else "does not repeat the run either"
    raise AssertionError(
        f"two uninterrupted runs differ: a kernel is not deterministic; with "
        f"torch.use_deterministic_algorithms resuming {result}"
    )


def three_runs(context: Context, name: str) -> list[dict[str, str]]:
    """The checksums of 20 steps, of the same 20 steps, and of 10 steps that are resumed for 10 more."""
    settings = [run_settings(context, f"{name}-{i}") for i in range(3)]
    run(settings[0])
    run(settings[1])
    run(replace(settings[2], max_iters=10))
    run(replace(settings[2], init_from="resume", overwrite=False))
    return [checksums(each) for each in settings]


def checkpoint_row(context: Context) -> Result:
    """A checkpoint written on the device gives the same loss on the CPU, and text on both."""
    t = run(run_settings(context, "checkpoint", max_iters=10, dtype="float32"))
    values = []
    for where in (context.device, torch.device("cpu")):
        loaded = sample.load_model(str(t.folder), device=where, dtype="float32")
        idx = torch.randint(loaded.tokenizer.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
        with full_precision(), torch.no_grad():
            values.append(loaded.model(idx.to(where), idx.to(where))[1])
        loaded = sample.prepare_for_inference(sample.load_model(str(t.folder), device=where), "auto")
        settings = replace(sample.SampleSettings(), num_samples=2, max_new_tokens=24)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # of a CUDA graph that does not work
            texts = list(sample.generate_text(loaded, "\n", settings))
        assert len(texts) >= 24, f"{len(texts)} pieces of text instead of 24 on {where}"
    return {"loss": compare("the loss of the checkpoint", *values, 1e-4)}


def grad_scaler_row(context: Context) -> Result:
    """In float16, an overflow skips the step of all optimizers and halves the scale."""
    dtype = "float16" if context.is_cuda else "float32"
    device.configure_process(str(context.device))
    t = setup.setup_training(run_settings(context, "scaler", dtype=dtype, optimizer="muon"))
    t.close()
    if not context.is_cuda:  # where train.py refuses float16, because it is slow
        t.runtime = replace(t.runtime, dtype=torch.float16)
    assert t.runtime.dtype == torch.float16, f"the run uses {t.runtime.dtype} instead of float16"
    t.scaler = torch.amp.GradScaler(context.device.type, init_scale=1024.0)
    before = weights(t.model)
    take_step(t)
    after = weights(t.model)
    assert not torch.equal(before, after), "a step with a finite gradient does not change the weights"
    t.scaler = torch.amp.GradScaler(context.device.type, init_scale=2.0**127)  # every gradient overflows
    take_step(t)
    assert torch.equal(weights(t.model), after), "a step whose gradient overflows changes the weights"
    scale = t.scaler.get_scale()
    assert scale == 2.0**126, f"after an overflow the scale is {scale} instead of {2.0**126}"
    return {"scale": scale}


def weights(model: nn.Module) -> Tensor:
    """All weights in one vector, on the CPU."""
    parameters = [process_group.full_tensor(p.detach()).flatten().cpu() for p in model.parameters()]
    return torch.cat(parameters)


# Process groups of one rank


@contextmanager
def process_group_of_one(context: Context) -> Iterator[None]:
    """The process group that torchrun --nproc_per_node=1 would make."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if context.is_cuda else "gloo",
        init_method=f"file://{context.scratch}/group-{uuid.uuid4().hex}",
        rank=0,
        world_size=1,
        device_id=context.device if context.is_cuda else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def train_model(context: Context, model: GPT, forward: Callable) -> Tensor:
    """The weights after three steps of AdamW in float32."""
    optimizers = optimizer.build_optimizers(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    idx, targets = (tokens(2, 32, seed=seed).to(context.device) for seed in (3, 4))
    for _ in range(3):
        forward(idx, targets, with_logits=False)[1].backward()
        optimizer.clip_gradients(model, 1.0)
        optimizers[0].step()
        model.zero_grad(set_to_none=True)
    return weights(model)


def ddp_row(context: Context) -> Result:
    """DistributedDataParallel with one rank: the weights of three steps are those of the plain model."""
    config = architecture_config("modern")
    with full_precision(), process_group_of_one(context):
        model = random_model(config).to(context.device)
        expected = train_model(context, model, model)
        model = random_model(config).to(context.device)
        ids = [context.device.index or 0] if context.is_cuda else None
        wrapped = DistributedDataParallel(model, device_ids=ids)
        error = compare("weights with DDP", train_model(context, model, wrapped), expected, 1e-3)
        del wrapped  # it must not outlive the process group
    return {"weights": error}


def fsdp_row(context: Context) -> Result:
    """FSDP2 with one rank: the weights of three steps are those of the plain model, and its file is read."""
    from fradique.distributed import fsdp  # here, because importing it reads files

    config = architecture_config("modern")
    path = context.scratch / "sharded" / "model.safetensors"
    path.parent.mkdir(exist_ok=True)
    with full_precision(), process_group_of_one(context):
        model = random_model(config).to(context.device)
        expected = train_model(context, model, model)
        model = random_model(config)
        fsdp.shard_model(model, model.transformer["h"], context.device)
        error = compare("weights with FSDP", train_model(context, model, model), expected, 1e-3)
        model.reshard()
        fsdp.write_safetensors(path, dict(model.named_parameters()))
        read = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
        fsdp.read_safetensors(path.parent, read)
        compare("weights in the file", torch.cat([p.flatten() for p in read.values()]), weights(model), 0.0)
    return {"weights": error}


# Memory, auto, fallbacks


def out_of_memory_row(context: Context) -> Result:
    """A failed allocation gives the project's message, and the device can still be used.

    On CUDA a run may use MEMORY_LIMIT bytes and needs more; elsewhere too much is allocated at once.
    """
    message = ""
    try:
        with OomReport() as oom:
            if context.is_cuda:
                run_with_little_memory(context, oom)
            else:
                oom.check(MemoryPlan(GPTConfig(), 4, device="cpu"), context.device)
                torch.empty(IMPOSSIBLE_BYTES, dtype=torch.uint8)
    except ValueError as error:
        message = str(error)
    assert message.startswith("out of memory: the limit is"), f"another message: {message or 'none'}"
    compare("a sum after it", torch.ones(8, device=context.device).sum(), torch.tensor(8.0), 0.0)
    return {"message": message.splitlines()[0]}


def run_with_little_memory(context: Context, oom: OomReport) -> None:
    """Train on CUDA with more activations than torch may allocate."""
    total = torch.cuda.get_device_properties(context.device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(MEMORY_LIMIT / total, context.device)
    try:
        settings = run_settings(context, "memory", n_layer=8, n_embd=512, batch_size=64, block_size=1024)
        t = setup.setup_training(settings, oom=oom)
        try:
            take_step(t)
        finally:
            t.close()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, context.device)


def auto_row(context: Context) -> Result:
    """`auto` chooses settings, and a run with them trains."""
    budget = "1s" if context.quick else "15s"
    fixed: dict[str, Any] = {"block_size": 32, "batch_size": 2} if context.quick else {}
    settings = replace(
        train.TrainSettings(),
        auto=True,
        time_budget=budget,
        data_dir=str(context.data_dir),
        dataset=generated_corpus(context),
        device=str(context.device),
        out_dir=str(context.scratch / "auto"),
        overwrite=True,
        **fixed,
    )
    chosen_device = device.configure_process(settings.device)
    chosen, notes = autoconfig.autotune(settings, fixed, train.time_step, chosen_device, time.monotonic())
    t = setup.setup_training(replace(chosen, compile=False, auto=False))
    try:
        first, *_, last = (take_step(t) for _ in range(3))
    finally:
        t.close()
    assert last < 2 * first, f"the loss rises from {first:.3f} to {last:.3f}"
    return {"note": notes[0]}


def fallback_row(context: Context) -> Result:
    """No fast path of the project has to fall back to torch's plain path on this device."""
    problems = (
        [f"fused AdamW: {problem}"] if (problem := optimizer.fused_adamw_problem(context.device)) else []
    )
    if context.is_cuda and (problem := device.pinned_memory_problem(context.device)):
        problems.append(f"pinned memory: {problem}")
    for dtype in device.DTYPES:
        runtime = device.Runtime(context.device, device.DTYPES[dtype])
        model = random_model(architecture_config("modern")).to(context.device)
        idx, targets = (tokens(2, 64, seed=seed).to(context.device) for seed in (3, 4))
        fallback.check_first_pass(model, runtime, idx, targets, problems.append)
    assert not problems, "; ".join(problems)
    return {"checked": ["fused AdamW", "pinned memory", *device.DTYPES]}


def dataset_row(context: Context) -> Result:
    """Batches arrive on the device unchanged."""
    runtime = device.Runtime(context.device, torch.float32)
    batches = [random_tensor(64, 64, seed=seed) for seed in range(20)]
    copies = [copy for batch in batches for copy in runtime.to_device(batch)]
    for batch, copy in zip(batches, copies, strict=True):
        assert copy.device.type == context.device.type and torch.equal(copy.cpu(), batch), "a copy differs"
    return {"batches": len(batches)}


# Generation


def generation_row(context: Context) -> Result:
    """Greedy generation: the same tokens with and without the KV cache, and on the CPU."""
    names = QUICK_ARCHITECTURES if context.quick else ARCHITECTURES
    count = 12 if context.quick else 80  # more than block_size: the window moves
    for name in names:
        model = random_model(architecture_config(name)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4.0)  # so that the largest logit is clear
        prompt = tokens(2, 9)
        expected = model.generate(prompt, count, temperature=0)
        model.to(context.device)
        with full_precision(), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # of a CUDA graph that does not work
            for use_cache in (True, False):
                actual = model.generate(prompt.to(context.device), count, temperature=0, use_cache=use_cache)
                equal = (actual.cpu() == expected).double().mean().item()
                how = "with" if use_cache else "without"
                assert equal == 1.0, f"{name} {how} a cache: only {equal:.0%} of the tokens are the CPU's"
    return {"architectures": len(names), "tokens": count}


def cuda_graph_row(context: Context) -> Result:
    """The captured decode step beside plain steps with a cache, in float32 and bfloat16.

    On other devices than CUDA the operations of the step are recorded by torch.fx instead.
    """
    errors: Result = {}
    capture = generate.capture_cuda_graph if context.is_cuda else record_operations
    for dtype in ("float32", "bfloat16"):
        model = random_model(architecture_config("modern")).to(context.device, DTYPES[dtype]).eval()
        idx = tokens(2, 30).to(context.device)
        caches = [KVCache(model.config, 2, context.device, DTYPES[dtype]) for _ in range(2)]
        with full_precision(), torch.no_grad(), mock.patch.object(generate, "capture_cuda_graph", capture):
            graph = generate.CUDAGraphDecoder(model, caches[0], batch=2)
            for cache in caches:
                model(idx[:, :10], cache=cache, prefix=0)
            for i in range(10, 30):
                actual = graph(idx[:, i : i + 1])
                expected = model(idx[:, i : i + 1], cache=caches[1], prefix=0)[0]
                error = compare(f"logits in {dtype}", actual, expected, GRADIENT_TOLERANCE[dtype])
                errors[dtype] = max(error, errors.get(dtype, 0.0))
    return errors


def record_operations(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Stands for `generate.capture_cuda_graph` on a CPU: the replay runs the recorded operations."""
    output = step().clone()
    graph = make_fx(step)()
    return lambda: output.copy_(graph()), output


RUNS: dict[str, tuple[Callable[[Context], Result], float]] = {  # name: (function, seconds at most)
    "fallbacks": (fallback_row, 20),
    "batches on the device": (dataset_row, 5),
    "training": (training_row, 30),
    "GradScaler": (grad_scaler_row, 20),
    "resume": (resume_row, 60),
    "checkpoint": (checkpoint_row, 30),
    "generation": (generation_row, 40),
    "CUDA graph": (cuda_graph_row, 20),
    "DDP with one rank": (ddp_row, 30),
    "FSDP with one rank": (fsdp_row, 30),
    "out of memory": (out_of_memory_row, 30),
    "auto": (auto_row, 40),
}
