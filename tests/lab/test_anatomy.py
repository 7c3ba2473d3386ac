"""Parts, parameters and FLOPs against torch's own count, and the drawing of them."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from architectures import NAMES
from support import run_lab, run_training
from torch.utils.flop_counter import FlopCounterMode

from lab import anatomy
from model import GPT, GPTConfig

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_flops_are_those_that_torch_counts(name, architecture):
    config = architecture(name, flash=False)
    parts = anatomy.anatomy(config, batch=2, tokens=8)
    model = GPT(config).eval()
    ids = torch.zeros(2, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, targets=ids)
    whole = parts[0]
    assert whole.path == "" and whole.parameters == sum(p.numel() for p in model.parameters())
    assert whole.flops == counter.get_total_flops()
    by_module = counter.get_flop_counts()
    for part in parts[1:]:
        counted = sum(by_module.get(f"GPT.{part.path}", {}).values())
        assert part.flops == counted, part
    for part in parts[1:]:
        if part.path != "lm_head" or not config.tie_weights:  # else it has none of its own
            of_it = model.get_submodule(part.path).parameters()
            assert part.parameters == sum(p.numel() for p in of_it), part


def test_shapes_are_those_that_the_modules_give():
    config = GPTConfig(block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=8)
    shapes = {part.path: part.shape for part in anatomy.anatomy(config, batch=3, tokens=5)}
    assert shapes[""] == (3, 5, 30) and shapes["transformer.wte"] == (3, 5, 8)
    assert shapes["transformer.h.1.attn.c_attn"] == (3, 5, 24)
    assert shapes["transformer.h.0.mlp.c_fc"] == (3, 5, 32)


def test_gpt2_is_what_its_paper_says():
    whole, *_ = parts = anatomy.anatomy(GPTConfig(vocab_size=50257), batch=1, tokens=1024)
    assert whole.parameters == 124_439_808
    text = anatomy.tree(parts)
    assert "h.0" not in text and "11 more alike" in text  # a layer is told once
    assert "38.6M" in text and "31.0%" in text  # the token embedding


@pytest.mark.parametrize("name", ["gpt2", "vaswani", "palm", "bloom", "glm130b"])
def test_the_drawing_is_sound_and_names_its_parts(name, architecture):
    config = architecture(name)
    parts = anatomy.anatomy(config, batch=2, tokens=8)
    root = ElementTree.fromstring(anatomy.drawing(parts, config, 2, 8))
    texts = [element.text for element in root.iter() if element.text]
    assert {"attention", "MLP", "output layer", "token embedding", "2 layers"} <= set(texts)
    order = [text for text in texts if text in ("attention", "MLP", "norm")]
    assert order[0] == ("attention" if config.norm_place != "pre" and not config.embd_norm else "norm")


def test_the_command_prints_the_tree_and_writes_the_drawing(settings, tmp_path):
    run_training(settings)
    words = [f"--out_dir={settings.out_dir}", f"--to={tmp_path / 'a'}"]
    done = run_lab("lab.anatomy", *words, "--batch=2", "--tokens=8")
    assert done.returncode == 0, done.stderr
    assert "2 x 8 x 16" in done.stdout and f"wrote {tmp_path / 'a.svg'}" in done.stdout
    refused = run_lab("lab.anatomy", *words, "--tokens=17")
    assert refused.returncode == 2
    assert "--tokens=17 is more than the block of this model, 16" in refused.stderr
