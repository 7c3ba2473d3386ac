"""The benchmarks run, and what they report fits together. No test asserts a time."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import flags

from bench import data as bench_data
from bench import machine, textbook
from bench import sample as bench_sample
from bench import train as bench_train
from model import GPT, GPTConfig

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--device=cpu"]
STEPS = ["--gradient_accumulation_steps=2", "--compile=False", "--max_iters=1000"]


def run(capsys, *argv):
    """The last line of what a benchmark prints, read as JSON, and all lines."""
    bench_train.main([*argv, *SMALL, *STEPS])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1])["results"], lines


@pytest.fixture(autouse=True)
def no_long_measurements(monkeypatch):
    monkeypatch.setattr(bench_train, "ROUND_SECONDS", 0.01)
    monkeypatch.setattr(machine, "matmul_peaks", lambda device: {"float32": 1e12, "bfloat16": 2e12})


def test_a_step_is_measured_beside_the_textbook_step(capsys):
    (result,), lines = run(capsys, "--baseline", "--rounds", "2", "--dataset=nothing_char")
    assert result["ratio"] > 0 and result["tokens_per_second"] > 0 and result["peak_memory_bytes"] > 1 << 20
    assert result["dtype"] == "float32" and result["compile"] is False
    assert result["share_of_peak"] == pytest.approx(result["flops"] / 1e12)
    assert result["tokens_per_second"] * result["step_seconds"] == pytest.approx(64)
    assert any("times as fast as the textbook step" in line for line in lines)


def test_each_config_is_measured_with_the_flags_that_all_share(capsys, tmp_path):
    for name, n_layer in (("one", 1), ("two", 2)):
        (tmp_path / f"{name}.py").write_text(f"n_layer = {n_layer}\ndataset = 'nothing_char'\n")
    configs = [str(tmp_path / "one.py"), str(tmp_path / "two.py")]
    results, _ = run(capsys, *configs, "--rounds", "1")
    assert [r["config"] for r in results] == ["one", "two"]
    assert bench_train.each_config(["--n_layer=1", *configs])[1] == [configs[1], "--n_layer=1"]


def test_a_prepared_corpus_is_used_and_one_that_is_not_there_is_made_up(settings, tmp_path):
    there = bench_train.settings_for(flags(settings), tmp_path)
    assert (there.data_dir, there.dataset) == (settings.data_dir, "tiny")
    made_up = bench_train.settings_for(["--dataset=openwebtext", "--data_dir=nowhere"], tmp_path)
    assert made_up.dataset == "random" and (tmp_path / "data" / "random" / "train.bin").exists()


def test_a_trace_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "TRACES", tmp_path)
    run(capsys, "--profile", "--rounds", "1", "--dataset=nothing_char")
    assert "traceEvents" in json.loads((tmp_path / "trace-defaults.json").read_text())


def test_the_textbook_model_is_gpt_2():
    """The same parameters and, with our model's weights, the same loss."""
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
    torch.manual_seed(0)
    ours, theirs = GPT(config), textbook.Textbook(SimpleNamespace(**vars(config)))
    renamed = {
        "transformer.wte": "wte",
        "transformer.wpe": "wpe",
        "transformer.ln_f": "ln_f",
        "transformer.h.": "blocks.",
        ".mlp.": ".",
    }
    held = {}
    for name, value in ours.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        held[name] = value
    theirs.load_state_dict(held)
    idx = torch.arange(16).view(2, 8) % 11
    torch.testing.assert_close(theirs(idx, idx)[1], ours(idx, idx)[1], rtol=1e-5, atol=0)


def test_a_process_that_dies_is_told_of():
    with pytest.raises(RuntimeError, match="has ended"), textbook.Beside({"device": "cpu"}) as beside:
        beside.run(1)


def test_writing_is_measured_beside_transformers(capsys, monkeypatch):
    tiny = GPTConfig(block_size=32, vocab_size=11, n_layer=1, n_head=2, n_embd=16)
    monkeypatch.setitem(bench_sample.SHAPES, "char", tiny)
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)
    arguments = ["--shape=char", "--device=cpu", "--tokens=5", "--rounds=1", "--huggingface"]
    bench_sample.main(arguments)
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    weights = 4 * GPT(tiny).num_params(non_embedding=False)
    assert result["limit_tokens_per_second"] == pytest.approx(1e9 / weights)
    for batch in (1, 16):
        assert result[f"decode_{batch}"]["huggingface_ratio"] > 0
    assert any("writing 16 rows" in line and "Hugging Face's" in line for line in lines)


def test_loading_is_measured_beside_a_loop(monkeypatch):
    monkeypatch.setattr(bench_data, "LOADED_TOKENS", 1 << 16)
    monkeypatch.setattr(bench_data, "BATCHES", 2)
    rates = bench_data.measure_loading(rounds=1)
    assert rates["ratio"] == pytest.approx(rates["mtokens_s"] / rates["loop_mtokens_s"])
