"""Fast paths that fail or give wrong numbers are replaced by torch's plain path, with one warning."""

from dataclasses import replace

import pytest
import torch
from architectures import ids, random_model, small
from support import losses, run_training

import sample
from fradique.optim import optimizer
from fradique.runtime import device as devices
from fradique.runtime import fallback
from fradique.runtime.device import Runtime
from fradique.training import setup
from model import plain_attention

CPU = torch.device("cpu")
BF16 = Runtime(CPU, torch.bfloat16)


def check(model, runtime):
    """The runtime and the warnings of `check_first_pass`."""
    warnings = []
    chosen = fallback.check_first_pass(model, runtime, ids(2, 16), ids(2, 16, seed=4), warnings.append)
    assert all(p.grad is None for p in model.parameters())
    return chosen, warnings


def replace_attention(model, function):
    for block in model.transformer["h"]:
        block.attn.attention = function


def uses_plain_attention(model):
    return [block.attn.attention is plain_attention for block in model.transformer["h"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes", [{}, {"prefix_len": 4}, {"dropout": 0.5}, {"n_kv_head": 2}, {"ngram_max": 3, "ngram_rows": 30}]
)
def test_paths_that_work_are_kept(dtype, changes):
    model = random_model(small(**changes), std=0.05).train()
    state = torch.get_rng_state()
    runtime = replace(BF16, dtype=dtype)
    assert check(model, runtime) == (runtime, [])
    assert not any(uses_plain_attention(model)) and model.training
    assert torch.equal(torch.get_rng_state(), state)


def no_kernel(*arguments):
    raise RuntimeError("No available kernel. Aborting execution.\nmore lines")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (no_kernel, "No available kernel. Aborting execution."),
        (lambda q, k, v, mask, p: 100 * v, "loss"),
        (lambda q, k, v, mask, p: v / 0, "loss is nan"),
        (
            lambda *inputs: plain_attention(*inputs) + (inputs[0] - inputs[0].detach()) * 1e3,
            "gradient norm",
        ),
    ],
)
def test_broken_attention_is_replaced_with_one_warning(broken, reason):
    model = random_model(small(), std=0.05)
    replace_attention(model, broken)
    chosen, warnings = check(model, BF16)
    assert chosen == BF16 and all(uses_plain_attention(model))
    assert len(warnings) == 1 and reason in warnings[0] and "continuing with plain attention" in warnings[0]


def test_a_broken_autocast_is_replaced_by_float32():
    """Here all linear layers return infinity under autocast."""
    model = random_model(small(), std=0.05)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, output: output if output.dtype == torch.float32 else output / 0
            )
    chosen, warnings = check(model, replace(BF16, dtype=torch.float16))
    assert chosen.dtype == torch.float32 and not any(uses_plain_attention(model))
    assert len(warnings) == 1 and "float16" in warnings[0] and "continuing with dtype=float32" in warnings[0]


def test_attention_and_autocast_can_both_be_replaced():
    model = random_model(small(), std=0.05)
    replace_attention(model, no_kernel)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, output: output if output.dtype == torch.float32 else output * 50
            )
    chosen, warnings = check(model, BF16)
    assert chosen.dtype == torch.float32 and all(uses_plain_attention(model))
    assert len(warnings) == 1 and "plain attention (flash=False) and dtype=float32" in warnings[0]


def test_out_of_memory_is_no_reason_to_fall_back():
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = random_model(small(), std=0.05)
    replace_attention(model, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        check(model, BF16)


def test_weights_that_are_not_finite_change_nothing():
    model = random_model(small(), std=0.05)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    assert check(model, BF16) == (BF16, [])


def test_ranks_fall_back_together(monkeypatch):
    """Another rank has failed with fused attention."""
    flags = iter([1.0, 0.0])
    monkeypatch.setattr(Runtime, "max", lambda self, value: [max(value, next(flags))])
    model = random_model(small(), std=0.05)
    _, warnings = check(model, BF16)
    assert all(uses_plain_attention(model)) and "on another rank" in warnings[0]


def test_a_run_with_broken_attention_trains_as_with_flash_off(settings, tmp_path, monkeypatch, capsys):
    """On CUDA, which the CPU stands for here."""
    settings = replace(settings, dropout=0.0, max_iters=3, eval_interval=3)
    run_training(replace(settings, flash=False))
    monkeypatch.setattr(fallback, "CHECKED_DEVICES", ("cpu",))
    monkeypatch.setattr("model.attention", no_kernel)
    broken = replace(settings, out_dir=str(tmp_path / "b"))
    run_training(broken)
    assert losses(broken.out_dir) == losses(settings.out_dir)
    assert (
        capsys.readouterr().err.count("warning: the first step in float32 fails (No available kernel.") == 1
    )


def test_sampling_with_broken_attention_uses_the_plain_one(monkeypatch, capsys):
    """On CUDA, which the CPU stands for here. The checked model has no gradients."""
    model = random_model(small(block_size=8), std=0.05)
    model.requires_grad_(True)
    loaded = sample.LoadedModel(model, tokenizer=None, runtime=BF16)
    assert sample.prepare_for_inference(loaded, "bfloat16") == loaded and not capsys.readouterr().err
    monkeypatch.setattr(fallback, "CHECKED_DEVICES", ("cpu",))
    assert sample.prepare_for_inference(loaded, "bfloat16") == loaded and not capsys.readouterr().err
    replace_attention(model, no_kernel)
    assert sample.prepare_for_inference(loaded, "bfloat16").runtime == BF16
    assert (
        capsys.readouterr().err.count("warning: the first step in bfloat16 fails (No available kernel.") == 1
    )
    assert all(uses_plain_attention(model))


# The compiled model


def test_a_compiled_model_with_another_loss_is_not_used(settings, tmp_path, monkeypatch, capsys):
    settings = replace(settings, max_iters=3, eval_interval=3)
    run_training(settings)

    def wrong_compile(model):
        def forward(*arguments, **options):
            _, loss = model(*arguments, **options)
            return None, 3 * loss

        return forward

    monkeypatch.setattr(fallback, "CHECKED_DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "compile", wrong_compile)
    compiled = replace(settings, out_dir=str(tmp_path / "b"), compile=True)
    run_training(compiled)
    assert losses(compiled.out_dir) == losses(settings.out_dir)
    assert capsys.readouterr().err.count("torch.compile failed (ValueError: its first loss is") == 1


def test_a_compiled_model_with_the_same_loss_is_used(settings, monkeypatch):
    monkeypatch.setattr(fallback, "CHECKED_DEVICES", ("cpu",))
    compiled = torch.nn.Sequential()
    compiled.forward = lambda *arguments, **options: t_model[0](*arguments, **options)
    t_model = []
    monkeypatch.setattr(torch, "compile", lambda model: t_model.append(model) or compiled)
    t = setup.setup_training(replace(settings, compile=True, eval_only=False))
    t.close()
    assert t.forward is compiled


# AdamW


def broken_step(monkeypatch, change):
    """Let a step of fused AdamW end with `change(parameter)`."""
    step = torch.optim.AdamW.step

    def changed_step(self, *arguments):
        step(self, *arguments)
        if self.defaults["fused"]:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        change(parameter)

    monkeypatch.setattr(torch.optim.AdamW, "step", changed_step)


def build(warn):
    model = random_model(small())
    return optimizer.build_optimizers(
        model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1, warn=warn
    )


def raise_error(parameter):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (raise_error, "no kernel image is available"),
        (lambda parameter: parameter.mul_(1.01), "differs"),
        (lambda parameter: parameter.fill_(float("nan")), "differs"),
    ],
)
def test_broken_fused_adamw_is_replaced_with_one_warning(monkeypatch, change, reason):
    broken_step(monkeypatch, change)
    warnings = []
    (adamw,) = build(warnings.append)
    assert not adamw.defaults["fused"]
    assert len(warnings) == 1 and reason in warnings[0] and "torch's plain AdamW" in warnings[0]


def test_fused_adamw_that_works_is_kept():
    warnings = []
    (adamw,) = build(warnings.append)
    assert adamw.defaults["fused"] and not warnings


# Pinned memory


class RecordingTensor:
    """Records how it is copied."""

    def pin_memory(self):
        return "pinned"

    def to(self, device, **options):
        return (device.type, options)


def test_memory_that_cannot_be_pinned_is_copied_plainly(monkeypatch):
    def no_pinned_memory(self):
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(torch.Tensor, "pin_memory", no_pinned_memory)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    runtime = devices.setup_runtime(device=torch.device("cuda", 0), dtype="bfloat16")
    (warning,) = (note for note in runtime.notes if "pinned" in note)
    assert warning == "warning: copying batches without pinned memory: CUDA error: out of memory"
    assert runtime.to_device(RecordingTensor()) == [("cuda", {})]


def test_a_wrong_copy_from_pinned_memory_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    assert devices.pinned_memory_problem(CPU) is None
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    assert "differs" in devices.pinned_memory_problem(CPU)
