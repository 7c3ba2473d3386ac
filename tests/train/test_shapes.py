"""Whole runs of other architectures and optimizers, and of parts of a model: trained, resumed, exported."""

import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ROOT, flags, losses, run_script, run_training, same_folder, stop_at, torchrun
from transformers import AutoModelForCausalLM

import sample
import train
from configurator import resolve
from fradique.checkpointing import checkpoint
from fradique.pretrained import __main__, loader
from fradique.training import evaluation, model_setup, setup

MODERN = {"norm": "rmsnorm", "position": "rope", "qk_norm": True, "activation": "relu2", "optimizer": "muon"}
ODD = {"norm_place": "deepnorm", "position": "relative", "activation": "geglu", "n_kv_head": 1, "bias": True}


def interrupted_and_whole(settings, tmp_path, monkeypatch, step=13):
    """The same run stopped in the middle of a step and resumed, and never stopped."""
    whole = replace(settings, out_dir=str(tmp_path / "whole"))
    _, undisturbed = run_training(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run_training(settings)[0] == 128 + signal.SIGTERM
    _, resumed = run_training(replace(settings, init_from="resume"))
    assert losses(settings.out_dir) == losses(whole.out_dir)
    return resumed, undisturbed


def same(a: train.Trainer, b: train.Trainer) -> bool:
    return same_folder(*(Path(t.settings.out_dir) / "step-00000020" for t in (a, b)))


@pytest.mark.parametrize("changes", [MODERN, ODD], ids=["modern, muon", "deepnorm, relative, geglu"])
def test_runs_of_other_architectures_resume_to_the_last_bit(settings, tmp_path, monkeypatch, changes):
    resumed, undisturbed = interrupted_and_whole(
        replace(settings, **changes | {"n_head": 4}), tmp_path, monkeypatch
    )
    assert same(resumed, undisturbed)
    assert resumed.model.config.activation == changes["activation"]
    if "optimizer" in changes:
        held = checkpoint.read_checkpoint(Path(settings.out_dir) / "step-00000020")
        assert any(name.startswith("momentum_buffer/transformer.h.0") for name in held.optimizer)


def test_muon_s_learning_rate_follows_the_schedule_in_proportion(settings):
    _, t = run_training(replace(settings, optimizer="muon", muon_learning_rate=0.05, max_iters=3))
    muon, adamw = t.optimizers
    assert muon.param_groups[0]["lr"] == pytest.approx(5 * adamw.param_groups[0]["lr"])


@pytest.fixture
def base(settings, tmp_path) -> str:
    """A run folder of a trained model to go on from."""
    folder = str(tmp_path / "base")
    run_training(replace(settings, out_dir=folder))
    return folder


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"freeze": "wte,h.0"}], ids=["lora", "frozen"])
def test_runs_of_parts_of_a_model_resume_to_the_last_bit(settings, base, tmp_path, monkeypatch, changes):
    settings = replace(settings, init_from=base, **changes)
    resumed, undisturbed = interrupted_and_whole(settings, tmp_path, monkeypatch)
    assert same(resumed, undisturbed)


def test_frozen_parts_are_the_given_ones_in_the_checkpoint(settings, base):
    run_training(replace(settings, init_from=base, freeze="wte,h.0"))
    given, found = loader.load_weights(base).tensors, loader.load_weights(settings.out_dir, "newest").tensors
    kept = {name for name in given if torch.equal(given[name], found[name])}
    assert kept == {name for name in given if name.startswith(("transformer.wte", "transformer.h.0."))}


def test_lora_trains_is_sampled_from_goes_on_and_merges_on_export(settings, base, tmp_path, capsys):
    _, t = run_training(replace(settings, init_from=base, lora_rank=4, lora_targets="c_attn,mlp.c_fc"))
    assert "trainable)" in capsys.readouterr().out
    t.model.eval()
    given, best = loader.load_weights(base).tensors, loader.load_weights(settings.out_dir)
    assert best.tensors.keys() == given.keys()  # merged: plain weights
    changed = {name for name in given if not torch.equal(given[name], best.tensors[name])}
    assert changed == {
        f"transformer.h.{layer}.{part}.weight" for layer in (0, 1) for part in ("attn.c_attn", "mlp.c_fc")
    }
    idx = torch.randint(12, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = t.model(idx, idx)[0]  # what `finish` left: the best weights, beside their difference
    writer = sample.load_model(settings.out_dir)
    torch.testing.assert_close(writer.model(idx, idx)[0], expected, rtol=0, atol=1e-5)
    assert __main__.main(["export", f"--out_dir={settings.out_dir}", f"--to={tmp_path / 'hf'}"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(idx).logits, expected, rtol=0, atol=1e-5)
    again = replace(settings, init_from=settings.out_dir, out_dir=str(tmp_path / "again"), lora_rank=2)
    assert run_training(again)[0] == 0  # plain weights again, with another difference


def test_a_run_goes_on_from_exported_weights(settings, base, tmp_path):
    assert __main__.main(["export", f"--out_dir={base}", f"--to={tmp_path / 'hf'}"]) == 0
    both = []
    for source in (base, str(tmp_path / "hf")):
        t = setup.setup_training(replace(settings, init_from=source, eval_only=True))
        both.append({name: split.loss for name, split in evaluation.estimate_loss(t).items()})
        t.close()
    assert both[0] == pytest.approx(both[1], abs=1e-6)


def test_the_block_may_be_cropped_and_dropout_set_on_given_weights(settings, base):
    _, t = run_training(replace(settings, init_from=base, block_size=8, dropout=0.3, max_iters=2))
    assert t.model.config.block_size == 8 and t.model.config.dropout == 0.3
    assert t.model.transformer["wpe"].weight.shape == (8, 16)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora_rank=4"], "lora_rank = 4 adapts existing weights, and init_from=scratch has none"),
        (["--freeze=wtf"], "freeze: 'wtf' names nothing of this model; it has wte, wpe, ln_f, h.0-1"),
        (["--freeze=wte,wpe,h,ln_f"], "every parameter is frozen: there is nothing to train"),
        (["--prefix_len=16"], "leaves nothing of block_size = 16 to predict"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_written(settings, data_dir, words, said):
    shape = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4"]
    place = [f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={settings.out_dir}", "--device=cpu"]
    result = run_script("train.py", *shape, *place, *words)
    assert result.returncode == 2
    assert said in result.stderr and "Traceback" not in result.stderr
    assert not Path(settings.out_dir).exists()


def test_all_that_makes_no_sense_is_told_at_once(settings):
    words = [
        "--n_head=6",
        "--n_embd=30",
        "--n_kv_head=4",
        "--position=rope",
        "--prefix_len=4",
        "--sliding_window=4",
    ]
    with pytest.raises(ValueError) as told:
        resolve(train.TrainSettings, words)
    for part in ("n_embd / n_head = 5 is odd", "n_kv_head = 4", "contradict each other"):
        assert part in str(told.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "config/arch").glob("*.py")))
def test_every_architecture_file_goes_behind_a_training_config(name):
    files = [str(ROOT / f"config/{path}.py") for path in ("train_eca_char", f"arch/{name}")]
    settings = resolve(train.TrainSettings, files).settings
    assert settings.dataset == "eca_char" and settings.n_embd == 128
    assert model_setup.model_config(settings, 100).problems() == []


@pytest.mark.parametrize("changes", [{"position": "none"}, {"n_head": 4}, {"activation": "relu"}])
def test_a_resumed_run_does_not_go_on_as_another_model(settings, changes):
    settings = replace(settings, position="rope", max_iters=4)
    run_training(settings)
    ((name, value),) = changes.items()
    before = getattr(settings, name)
    with pytest.raises(ValueError, match=rf"another model: {name} was {before!r} and is {value!r} now"):
        setup.setup_training(replace(settings, init_from="resume", **changes))
    assert run_training(replace(settings, init_from="resume", max_iters=6, dropout=0.3))[0] == 0


@pytest.mark.parametrize("before", ["adamw", "muon"])
def test_a_resumed_run_keeps_its_optimizer(settings, base, before):
    """With LoRA the names of what is trained do not tell which optimizer it was."""
    settings = replace(settings, init_from=base, lora_rank=2, max_iters=4, optimizer=before)
    run_training(settings)
    other = replace(settings, init_from="resume", optimizer={"adamw": "muon", "muon": "adamw"}[before])
    with pytest.raises(ValueError, match="A resumed run cannot change optimizer, freeze and lora_\\*"):
        setup.setup_training(other)


def test_weights_without_a_known_tokenizer_come_with_a_warning(settings, base, tmp_path, capsys):
    assert __main__.main(["export", f"--out_dir={base}", f"--to={tmp_path / 'hf'}"]) == 0
    (tmp_path / "hf" / "fradique_tokenizer.json").unlink()
    setup.setup_training(replace(settings, init_from=str(tmp_path / "hf"))).close()
    assert "has no tokenizer that this program knows" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"])
def test_a_gradient_that_overflows_in_float16_is_skipped_by_both_optimizers(settings, monkeypatch, bad, name):
    t = setup.setup_training(replace(settings, optimizer="muon"))
    t.scaler = torch.amp.GradScaler("cpu", enabled=True)
    t.runtime = replace(t.runtime, dtype=torch.float16, device=torch.device("cpu"))
    monkeypatch.setattr(type(t.runtime), "autocast", lambda self, enabled=True: nullcontext())
    t.model.get_parameter(name).register_hook(lambda grad: torch.full_like(grad, bad))
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    scale = t.scaler.get_scale()
    train.train_step(t, 1e-2)
    assert all(torch.equal(p, before[n]) for n, p in t.model.named_parameters())
    assert t.scaler.get_scale() < scale
    t.close()


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"optimizer": "muon"}], ids=["lora", "muon"])
def test_two_processes_give_the_losses_of_one(settings, base, tmp_path, changes):
    """Frozen parameters take no part in the sharing of gradients; Muon sees those that were shared."""
    settings = replace(settings, init_from=base, dropout=0.0, max_iters=4, eval_interval=100, **changes)
    settings = replace(settings, gradient_accumulation_steps=2)
    run_training(settings)
    two = replace(settings, out_dir=str(tmp_path / "two"))
    assert torchrun(2, *flags(two)).returncode == 0
    assert losses(two.out_dir) == pytest.approx(losses(settings.out_dir), abs=1e-5)
