"""Parameters and FLOPs against torch's own counts, output shapes, and the printed table."""

import pytest
import torch
from architectures import NAMES
from support import run_lab, run_training
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")

from lab import anatomy
from model import GPT, GPTConfig


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_flops_agree_with_torch(name, architecture):
    config = architecture(name, flash=False)
    stats = anatomy.module_stats(config, batch=2, tokens=8)
    model = GPT(config).eval()
    ids = torch.zeros(2, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, targets=ids)
    total = stats[0]
    assert total.path == "" and total.parameters == sum(p.numel() for p in model.parameters())
    assert total.flops == counter.get_total_flops()
    by_module = counter.get_flop_counts()
    for module in stats[1:]:
        assert module.flops == sum(by_module.get(f"GPT.{module.path}", {}).values()), module
    for module in stats[1:]:
        if module.path != "lm_head" or not config.tie_weights:  # a tied lm_head has no separate parameters
            parameters = model.get_submodule(module.path).parameters()
            assert module.parameters == sum(p.numel() for p in parameters), module


def test_shapes_equal_those_of_the_module_outputs():
    config = GPTConfig(block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=8)
    shapes = {module.path: module.shape for module in anatomy.module_stats(config, batch=3, tokens=5)}
    assert shapes[""] == (3, 5, 30) and shapes["transformer.wte"] == (3, 5, 8)
    assert shapes["transformer.h.1.attn.c_attn"] == (3, 5, 24)
    assert shapes["transformer.h.0.mlp.c_fc"] == (3, 5, 32)


def test_gpt2_has_the_published_number_of_parameters():
    stats = anatomy.module_stats(GPTConfig(vocab_size=50257), batch=1, tokens=1024)
    assert stats[0].parameters == 124_439_808
    table = anatomy.format_table(stats)
    assert "h.0" not in table and "and 11 identical" in table  # one line for all layers
    assert "38.6M" in table and "31.0%" in table  # the token embedding


def test_the_command_prints_the_table_and_writes_the_diagram(settings, tmp_path):
    run_training(settings)
    options = [f"--out_dir={settings.out_dir}", f"--to={tmp_path / 'a'}"]
    result = run_lab("lab.anatomy", *options, "--batch=2", "--tokens=8")
    assert result.returncode == 0, result.stderr
    assert "2 x 8 x 16" in result.stdout and f"wrote {tmp_path / 'a.svg'}" in result.stdout
    result = run_lab("lab.anatomy", *options, "--tokens=17")
    assert result.returncode == 2
    assert "--tokens=17 is more than the block_size of this model, 16" in result.stderr
