"""Runs with other architectures, with Muon, LoRA or frozen parameters: trained, resumed, exported."""

import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ROOT, flags, losses, run_ranks, run_script, run_training, same_folder, stop_at
from transformers import AutoModelForCausalLM

import sample
import train
from configurator import command, resolve
from fradique.checkpointing import checkpoint, metrics_file
from fradique.pretrained import __main__, loader
from fradique.training import evaluation, model_setup, setup

MODERN = {"norm": "rmsnorm", "position": "rope", "qk_norm": True, "activation": "relu2", "optimizer": "muon"}
NGRAMS = {"ngram_max": 4, "ngram_rows": 60, "ngram_dropout": 0.5, "optimizer": "muon"}
ODD = {"norm_place": "deepnorm", "position": "relative", "activation": "geglu", "n_kv_head": 1, "bias": True}


def train_with_and_without_a_stop(settings, tmp_path, monkeypatch, step=13):
    """Train with a stop in the middle of a step and a resume, and without: (resumed, uninterrupted)."""
    uninterrupted_settings = replace(settings, out_dir=str(tmp_path / "uninterrupted"))
    _, uninterrupted = run_training(uninterrupted_settings)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run_training(settings)[0] == 128 + signal.SIGTERM
    _, resumed = run_training(replace(settings, init_from="resume"))
    assert losses(settings.out_dir) == losses(uninterrupted_settings.out_dir)
    return resumed, uninterrupted


def same_checkpoints(a: train.Trainer, b: train.Trainer) -> bool:
    return same_folder(*(Path(t.settings.out_dir) / "step-00000020" for t in (a, b)))


@pytest.mark.parametrize(
    "changes", [MODERN, ODD, NGRAMS], ids=["modern, muon", "deepnorm, relative, geglu", "n-grams, muon"]
)
def test_resuming_is_exact_for_other_architectures(settings, tmp_path, monkeypatch, changes):
    resumed, uninterrupted = train_with_and_without_a_stop(
        replace(settings, **changes | {"n_head": 4}), tmp_path, monkeypatch
    )
    assert same_checkpoints(resumed, uninterrupted)
    assert all(
        getattr(resumed.model.config, name) == changes[name] for name in changes if name != "optimizer"
    )
    if "optimizer" in changes:
        saved = checkpoint.read_checkpoint(Path(settings.out_dir) / "step-00000020")
        assert any(name.startswith("momentum_buffer/transformer.h.0") for name in saved.optimizer)


def test_a_model_with_ngrams_is_sampled_from_its_run_folder(settings):
    _, t = run_training(replace(settings, **NGRAMS))
    loaded = sample.load_model(settings.out_dir, device="cpu")
    idx = torch.tensor([[1, 2, 3, 4, 5]])
    t.model.eval()
    assert torch.equal(loaded.model(idx)[0], t.model(idx)[0])
    record = metrics_file.read_metrics(Path(settings.out_dir))[1]
    assert record["lr"] <= settings.learning_rate  # AdamW's


def test_ngrams_need_whole_tables(settings):
    (problem,) = replace(settings, parallel="fsdp", ngram_max=3).problems()
    assert "ngram_max = 3 needs whole matrices, but parallel" in problem


def test_muon_and_adamw_follow_the_same_schedule(settings):
    _, t = run_training(replace(settings, optimizer="muon", muon_learning_rate=0.05, max_iters=3))
    muon, adamw = t.optimizers
    assert muon.param_groups[0]["lr"] == pytest.approx(5 * adamw.param_groups[0]["lr"])


@pytest.fixture
def base(settings, tmp_path) -> str:
    """The run folder of a trained model."""
    folder = str(tmp_path / "base")
    run_training(replace(settings, out_dir=folder))
    return folder


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"freeze": "wte,h.0"}], ids=["lora", "frozen"])
def test_resuming_is_exact_with_lora_or_frozen_parameters(settings, base, tmp_path, monkeypatch, changes):
    settings = replace(settings, init_from=base, **changes)
    resumed, uninterrupted = train_with_and_without_a_stop(settings, tmp_path, monkeypatch)
    assert same_checkpoints(resumed, uninterrupted)


def test_frozen_parameters_do_not_change(settings, base):
    run_training(replace(settings, init_from=base, freeze="wte,h.0"))
    initial, trained = (
        loader.load_weights(base).tensors,
        loader.load_weights(settings.out_dir, "newest").tensors,
    )
    unchanged = {name for name in initial if torch.equal(initial[name], trained[name])}
    assert unchanged == {name for name in initial if name.startswith(("transformer.wte", "transformer.h.0."))}


def test_lora_weights_are_merged_for_sampling_and_export(settings, base, tmp_path, capsys):
    _, t = run_training(replace(settings, init_from=base, lora_rank=4, lora_targets="c_attn,mlp.c_fc"))
    assert "trainable)" in capsys.readouterr().out
    t.model.eval()
    initial, best = loader.load_weights(base).tensors, loader.load_weights(settings.out_dir)
    assert best.tensors.keys() == initial.keys()  # LoRA is merged when the weights are loaded
    changed = {name for name in initial if not torch.equal(initial[name], best.tensors[name])}
    assert changed == {
        f"transformer.h.{layer}.{linear}.weight" for layer in (0, 1) for linear in ("attn.c_attn", "mlp.c_fc")
    }
    idx = torch.randint(12, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = t.model(idx, idx)[0]  # the best weights, with LoRA not yet merged
    loaded = sample.load_model(settings.out_dir)
    torch.testing.assert_close(loaded.model(idx, idx)[0], expected, rtol=0, atol=1e-5)
    assert __main__.main(["export", f"--out_dir={settings.out_dir}", f"--to={tmp_path / 'hf'}"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(exported(idx).logits, expected, rtol=0, atol=1e-5)
    continued = replace(settings, init_from=settings.out_dir, out_dir=str(tmp_path / "again"), lora_rank=2)
    assert run_training(continued)[0] == 0  # the merged weights get new LoRA matrices


def test_a_run_can_start_from_exported_weights(settings, base, tmp_path):
    assert __main__.main(["export", f"--out_dir={base}", f"--to={tmp_path / 'hf'}"]) == 0
    estimates = []
    for source in (base, str(tmp_path / "hf")):
        t = setup.setup_training(replace(settings, init_from=source, eval_only=True))
        estimates.append({name: split.loss for name, split in evaluation.estimate_loss(t).items()})
        t.close()
    assert estimates[0] == pytest.approx(estimates[1], abs=1e-6)


@pytest.mark.parametrize(
    ("given", "ignored"),
    [
        (["--n_layer=7", "--norm=rmsnorm"], "n_layer=7 (it is 2), norm=rmsnorm (it is layernorm)"),
        (["--tie_weights=False"], "tie_weights=False (it is True)"),
        (["--n_layer=2", "--dropout=0.3", "--learning_rate=1e-3"], None),
    ],
)
def test_settings_that_the_weights_replace_are_named(settings, base, given, ignored, capsys):
    run_settings = replace(settings, init_from=base, max_iters=1)
    model = ("n_layer", "n_head", "n_embd")  # not given: the weights have them
    arguments = [flag for flag in flags(run_settings) if not flag.startswith(tuple(f"--{m}=" for m in model))]
    assert command(train.main, train.TrainSettings, [*arguments, *given]) == 0
    output = capsys.readouterr().out
    if ignored:
        assert f"ignored, because the weights of {base} define the model: {ignored}\n" in output
    else:
        assert "ignored" not in output


def test_block_size_and_dropout_of_loaded_weights_can_be_set(settings, base):
    _, t = run_training(replace(settings, init_from=base, block_size=8, dropout=0.3, max_iters=2))
    assert t.model.config.block_size == 8 and t.model.config.dropout == 0.3
    assert t.model.transformer["wpe"].weight.shape == (8, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_rank=4"], "lora_rank = 4 adapts existing weights, and init_from=scratch has none"),
        (["--freeze=wtf"], "freeze: no parameter of this model matches 'wtf'; use wte, wpe, ln_f, h.0-1"),
        (["--freeze=wte,wpe,h,ln_f"], "every parameter is frozen: there is nothing to train"),
        (["--prefix_len=16"], "prefix_len = 16 must be less than block_size = 16"),
    ],
)
def test_invalid_settings_are_reported_before_writing_files(settings, data_dir, arguments, message):
    shape = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4"]
    paths = [f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={settings.out_dir}", "--device=cpu"]
    result = run_script("train.py", *shape, *paths, *arguments)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not Path(settings.out_dir).exists()


def test_all_invalid_settings_are_reported_at_once(settings):
    arguments = [
        "--n_head=6",
        "--n_embd=30",
        "--n_kv_head=4",
        "--position=rope",
        "--prefix_len=4",
        "--sliding_window=4",
    ]
    with pytest.raises(ValueError) as error:
        resolve(train.TrainSettings, arguments)
    for message in ("n_embd / n_head = 5 is odd", "n_kv_head = 4", "contradict each other"):
        assert message in str(error.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "config/arch").glob("*.py")))
def test_architecture_configs_combine_with_a_training_config(name):
    files = [str(ROOT / f"config/{path}.py") for path in ("train_eca_char", f"arch/{name}")]
    settings = resolve(train.TrainSettings, files).settings
    assert settings.dataset == "eca_char" and settings.n_embd == 128
    assert model_setup.model_config(settings, 100).problems() == []


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        ({"position": "rope"}, {"block_size": 8}),
        ({"position": "alibi"}, {"block_size": 32}),
        ({}, {"rope_theta": 5.0}),  # without effect: positions are learned
        ({}, {"ngram_rows": 99}),  # without effect: there are no n-grams
        ({"ngram_max": 3, "ngram_rows": 50}, {"ngram_dropout": 0.4}),
        ({}, {"n_inner": 64}),  # 4 n_embd, the default
        ({}, {"n_kv_head": 2}),  # n_head, the default
    ],
)
def test_settings_that_leave_the_model_as_it_is_can_change(settings, start, changes, capsys):
    settings = replace(settings, max_iters=4, **start)
    run_training(settings)
    status, t = run_training(replace(settings, init_from="resume", max_iters=6, **changes))
    assert status == 0 and t.state.step == 6
    assert ("earlier evaluations" in capsys.readouterr().out) == ("block_size" in changes)


@pytest.mark.parametrize(
    "changes", [{"position": "none"}, {"n_head": 4}, {"activation": "relu"}, {"ngram_max": 3}]
)
def test_resuming_with_another_architecture_is_rejected(settings, changes):
    settings = replace(settings, position="rope", max_iters=4)
    run_training(settings)
    ((name, value),) = changes.items()
    before = getattr(settings, name)
    with pytest.raises(ValueError, match=rf"another model: {name} was {before!r} and is {value!r} now"):
        setup.setup_training(replace(settings, init_from="resume", **changes))
    assert run_training(replace(settings, init_from="resume", max_iters=6, dropout=0.3))[0] == 0


def test_resuming_with_another_lora_alpha_is_rejected(settings, base):
    """It changes no tensor, but the function of the model."""
    settings = replace(settings, init_from=base, lora_rank=3, lora_alpha=7.0, max_iters=4)
    run_training(settings)
    with pytest.raises(ValueError, match=r"another model: lora_alpha was 7 and is 14 now"):
        setup.setup_training(replace(settings, init_from="resume", lora_alpha=14.0))
    assert run_training(replace(settings, init_from="resume", max_iters=6))[0] == 0


@pytest.mark.parametrize("before", ["adamw", "muon"])
def test_resuming_with_another_optimizer_is_rejected(settings, base, before):
    """With LoRA the names of the trained tensors do not show which optimizer was used."""
    settings = replace(settings, init_from=base, lora_rank=2, max_iters=4, optimizer=before)
    run_training(settings)
    switched = replace(settings, init_from="resume", optimizer={"adamw": "muon", "muon": "adamw"}[before])
    with pytest.raises(ValueError, match="optimizer, freeze and lora_\\* cannot be changed"):
        setup.setup_training(switched)


def test_weights_without_a_known_tokenizer_give_a_warning(settings, base, tmp_path, capsys):
    assert __main__.main(["export", f"--out_dir={base}", f"--to={tmp_path / 'hf'}"]) == 0
    (tmp_path / "hf" / "fradique_tokenizer.json").unlink()
    setup.setup_training(replace(settings, init_from=str(tmp_path / "hf"))).close()
    assert "has no tokenizer that this program can read" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"])
def test_a_float16_overflow_is_skipped_by_muon_and_adamw(settings, monkeypatch, value, name):
    t = setup.setup_training(replace(settings, optimizer="muon"))
    t.scaler = torch.amp.GradScaler("cpu", enabled=True)
    t.runtime = replace(t.runtime, dtype=torch.float16, device=torch.device("cpu"))
    monkeypatch.setattr(type(t.runtime), "autocast", lambda self, enabled=True: nullcontext())
    t.model.get_parameter(name).register_hook(lambda grad: torch.full_like(grad, value))
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    scale = t.scaler.get_scale()
    train.train_step(t, 1e-2)
    assert all(torch.equal(p, before[n]) for n, p in t.model.named_parameters())
    assert t.scaler.get_scale() < scale
    t.close()


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"optimizer": "muon"}], ids=["lora", "muon"])
def test_two_processes_with_lora_or_muon_give_the_losses_of_one(settings, base, tmp_path, changes):
    """DDP leaves frozen parameters out of the all-reduce; Muon sees the averaged gradients."""
    settings = replace(settings, init_from=base, dropout=0.0, max_iters=4, eval_interval=100, **changes)
    settings = replace(settings, gradient_accumulation_steps=2)
    run_training(settings)
    two_processes = replace(settings, out_dir=str(tmp_path / "two"))
    assert run_ranks(2, *flags(two_processes)).returncode == 0
    assert losses(two_processes.out_dir) == pytest.approx(losses(settings.out_dir), abs=1e-5)
