"""The benchmarks run, and their results are consistent. No test asserts a time."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from support import flags, run_forked

from bench import architectures, dataloader, kernels, machine, textbook
from bench import data as bench_data
from bench import memory as bench_memory
from bench import quality as bench_quality
from bench import reference as bench_reference
from bench import sample as bench_sample
from bench import train as bench_train
from fradique.nn import cpu_features
from model import GPT, GPTConfig

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--device=cpu"]
STEPS = ["--gradient_accumulation_steps=2", "--compile=False", "--max_iters=1000"]


def run(capsys, *argv):
    """The results in the last line that bench.train prints (JSON), and all lines."""
    bench_train.main([*argv, *SMALL, *STEPS])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1])["results"], lines


@pytest.fixture(autouse=True)
def no_long_measurements(monkeypatch):
    monkeypatch.setattr(bench_train, "ROUND_SECONDS", 0.01)
    monkeypatch.setattr(machine, "matmul_peaks", lambda device, size=0: {"float32": 1e12, "bfloat16": 2e12})


def test_a_step_is_compared_with_the_textbook_step(capsys):
    (result,), lines = run(capsys, "--baseline", "--rounds", "2", "--dataset=nothing_char")
    assert result["ratio"] > 0 and result["tokens_per_second"] > 0 and result["peak_memory_bytes"] > 1 << 20
    assert result["dtype"] == "float32" and result["compile"] is False
    assert result["share_of_peak"] == pytest.approx(result["flops"] / 1e12)
    assert result["tokens_per_second"] * result["step_seconds"] == pytest.approx(64)
    assert any("times as fast as the textbook step" in line for line in lines)


def test_each_config_is_measured_with_the_given_flags(capsys, tmp_path):
    for name, n_layer in (("one", 1), ("two", 2)):
        (tmp_path / f"{name}.py").write_text(f"n_layer = {n_layer}\ndataset = 'nothing_char'\n")
    configs = [str(tmp_path / "one.py"), str(tmp_path / "two.py")]
    results, _ = run(capsys, *configs, "--rounds", "1")
    assert [r["config"] for r in results] == ["one", "two"]
    assert bench_train.split_by_config(["--n_layer=1", *configs])[1] == [configs[1], "--n_layer=1"]


def test_random_tokens_replace_a_missing_corpus(settings, tmp_path):
    prepared = bench_train.settings_for(flags(settings), tmp_path)
    assert (prepared.data_dir, prepared.dataset) == (settings.data_dir, "tiny")
    random = bench_train.settings_for(["--dataset=openwebtext", "--data_dir=nowhere"], tmp_path)
    assert random.dataset == "random" and (tmp_path / "data" / "random" / "train.bin").exists()


def test_a_trace_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "TRACES", tmp_path)
    run(capsys, "--profile", "--rounds", "1", "--dataset=nothing_char")
    assert "traceEvents" in json.loads((tmp_path / "trace-defaults.json").read_text())


def test_kernels_are_compared_in_one_table(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "ROUND_SECONDS", 0.0)
    (result,), lines = run(capsys, "--kernels", "--rounds", "1", "--dataset=nothing_char")
    names = [row["kernel"] for row in result["kernels"]]
    assert {"RoPE, float32", "RMSNorm, float32", "cross-entropy, 96 tokens, float32"} <= set(names)
    assert any("bfloat16" in name for name in names) == (not cpu_features.emulates_bf16(torch.device("cpu")))
    for row in result["kernels"]:
        assert row["ratio"] > 0 and any(line.startswith(row["kernel"]) for line in lines)


def test_compared_kernels_have_the_same_gradients():
    sizes = kernels.Sizes(batch=2, tokens=200, width=32, heads=2, vocab=1100, dropout=0.0)
    for kernel in kernels.all_kernels(sizes):
        if not any(word in kernel.name for word in ("dropout", "Muon", "norm of", "n-grams")):
            tolerance = 0.05 if "bfloat16" in kernel.name else 1e-5
            torch.testing.assert_close(kernel.ours(), kernel.torchs(), rtol=tolerance, atol=tolerance)


def test_kernels_are_for_the_cpu():
    runtime = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(ValueError, match="add --device=cpu, not cuda:0"):
        kernels.sizes_of(SimpleNamespace(runtime=runtime))


def test_the_baseline_model_is_gpt_2():
    """It has the same parameters and, with our weights, the same loss."""
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
    torch.manual_seed(0)
    ours, baseline = GPT(config), textbook.BaselineGPT(SimpleNamespace(**vars(config)))
    renamed = {
        "transformer.wte": "wte",
        "transformer.wpe": "wpe",
        "transformer.ln_f": "ln_f",
        "transformer.h.": "blocks.",
        ".mlp.": ".",
    }
    weights = {}
    for name, value in ours.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        weights[name] = value
    baseline.load_state_dict(weights)
    idx = torch.arange(16).view(2, 8) % 11
    torch.testing.assert_close(baseline(idx, idx)[1], ours(idx, idx)[1], rtol=1e-5, atol=0)


def test_a_baseline_process_that_dies_raises():
    with (
        pytest.raises(RuntimeError, match="has ended"),
        textbook.BaselineProcess({"device": "cpu"}) as process,
    ):
        process.run(1)


def test_generation_is_compared_with_transformers(capsys, monkeypatch):
    tiny = GPTConfig(block_size=32, vocab_size=11, n_layer=1, n_head=2, n_embd=16)
    monkeypatch.setitem(bench_sample.SHAPES, "char", tiny)
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)
    arguments = ["--shape=char", "--device=cpu", "--tokens=5", "--rounds=1", "--huggingface"]
    bench_sample.main(arguments)
    *lines, summary = capsys.readouterr().out.splitlines()
    result = json.loads(summary)
    weights = 4 * GPT(tiny).num_params(non_embedding=False)
    assert result["limit_tokens_per_second"] == pytest.approx(1e9 / weights)
    for batch in (1, 16):
        assert result[f"decode_{batch}"]["huggingface_ratio"] > 0
    assert any("decode, 16 rows" in line and "Hugging Face's" in line for line in lines)


def test_batches_are_compared_with_a_loop(monkeypatch):
    """By a clock on which a batch of the sampler takes 1 s and a batch of the loop 3 s."""
    seconds = [0.0]

    def slow(function, duration):
        def call(*args, **kwargs):
            seconds[0] += duration
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(bench_data, "LOADED_TOKENS", 1 << 16)
    monkeypatch.setattr(bench_data, "BATCHES", 2)
    monkeypatch.setattr(bench_data, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    sampler = bench_data.Sampler
    monkeypatch.setattr(sampler, "micro_batches", slow(sampler.micro_batches, 1))
    monkeypatch.setattr(torch, "randint", slow(torch.randint, 3))  # the loop draws where its windows start
    rates = bench_data.measure_batches(rounds=2)
    million_tokens = 12 * 1024 / 1e6
    expected = {"mtokens_s": million_tokens, "loop_mtokens_s": million_tokens / 3, "ratio": 3}
    assert rates == pytest.approx(expected)


def test_a_comparison_is_the_median_over_the_rounds(monkeypatch):
    durations = iter([1, 2, 2, 8, 4, 8])  # seconds, in turns: ours, the library's
    monkeypatch.setattr(bench_data, "_seconds", lambda function: next(durations))
    rates = bench_data.compare(8, 3, lambda: None, lambda: None)
    assert rates == {"mb_s": 4, "library_mb_s": 1, "ratio": 2}  # the ratios are 2, 4 and 2


def test_reading_is_measured_from_memory(capsys, monkeypatch):
    for name, value in (("SHARDS", ()), ("SHAPES", ((8, 2),)), ("CACHED_TOKENS", 1000)):
        monkeypatch.setattr(dataloader, name, value)
    dataloader.main(["--rounds=1", "--processes=1"])
    *lines, summary = capsys.readouterr().out.splitlines()
    rates = json.loads(summary)["rates"]
    assert [(rate["source"], rate["shards"]) for rate in rates] == [("memory", 1)]
    assert len(lines) == 2 and all(rate["best_mb_s"] >= rate["mb_s"] > 0 for rate in rates)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_training_with_sparse_shards_is_measured(capsys):
    dataloader.main(["--sparse=0.1", "--steps=2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("small", "large"):
        assert result[name]["VmHWM"] > result[name]["RssAnon"] > 20


# bench.quality


@pytest.fixture
def train_in_forks(monkeypatch):
    """bench.quality starts train.py in forks of a process that has already imported torch."""
    monkeypatch.setattr(bench_quality, "subprocess", SimpleNamespace(run=run_forked))


def test_quality_reports_the_loss_and_time_of_each_config(capsys, train_in_forks, data_dir, tmp_path):
    config = tmp_path / "small.py"
    config.write_text(
        "max_iters = 12\nlog_interval = 3\neval_interval = 4\neval_iters = 1\nwarmup_iters = 1\n"
    )
    arguments = [str(config), *SMALL, "--compile=False", f"--data_dir={data_dir}", "--dataset=tiny"]
    bench_quality.main([*arguments, "--to", "100"])
    lines = capsys.readouterr().out.splitlines()
    (result,) = json.loads(lines[-1])["results"]
    assert result["steps"] == 12 and result["tokens"] == 12 * 2 * 16 * 40
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2), rel=0.1)  # é is two bytes
    assert 0 < result["training_seconds"] < result["seconds"]
    assert result["to"] == {"step": 0, "tokens": 0, "training_seconds": 0.0}
    assert f"| {config} |  | {result['bits_per_byte']:.3f} |" in lines
    assert (
        "target loss reached at step 0" in lines[0]
        and f"(best checkpoint, step {result['best_step']})" in lines[0]
    )


def test_a_failed_run_ends_the_benchmark_with_its_message(data_dir):
    with pytest.raises(SystemExit, match=r"status 2: .*n_embd = 15 is not divisible"):
        bench_quality.main(["config/train_machado_char_cpu.py", "--n_embd=15", f"--data_dir={data_dir}"])


def test_training_seconds_follow_the_logged_steps():
    records = [
        {"step": 0, "eval_val_loss": 5.0, "tokens": 0},
        {"step": 10, "step_seconds": 0.5},
        {"step": 20, "step_seconds": 0.25},
        {"step": 24, "eval_val_loss": 2.0, "tokens": 240},
        {"step": 30, "step_seconds": 1.0},
    ]
    assert bench_quality.training_seconds(records, 20) == pytest.approx(7.5)
    assert bench_quality.training_seconds(records, 24) == pytest.approx(9.0)
    assert bench_quality.training_seconds(records, 30) == pytest.approx(17.5)
    assert bench_quality.find_target(records, 2.5) == {"step": 24, "tokens": 240, "training_seconds": 9.0}
    assert bench_quality.find_target(records, 1.9) is None


def test_a_missed_target_and_unknown_bytes_are_reported():
    result = {
        "config": "config/auto.py", "corpus": "eca", "budget": "1m", "loss": 2.0, "bits_per_byte": None,
        "best_step": 8, "steps": 10, "training_seconds": 1.5, "seconds": 3.0, "to": None,
        "notes": ["auto: small"],
    }  # fmt: skip
    text = bench_quality.report(result)
    assert "n/a bits per byte (best checkpoint, step 8) after 10 steps" in text
    assert text.endswith("; target loss not reached\n  auto: small")
    assert "| n/a |" in bench_quality.table([result])


def test_the_quality_table_has_a_column_per_budget():
    results = [
        {"config": config, "corpus": "eca", "budget": budget, "bits_per_byte": value}
        for config, budget, value in [("a", "1m", 2.0), ("a", "5m", 1.5), ("b", "5m", 1.25)]
    ]
    assert bench_quality.table(results).splitlines() == [
        "| config | corpus | 1m | 5m |",
        "| --- | --- | --- | --- |",
        "| a | eca | 2.000 | 1.500 |",
        "| b | eca |  | 1.250 |",
    ]


def test_transformers_cannot_generate_beyond_the_block():
    with pytest.raises(SystemExit, match="has block_size = 256 positions"):
        bench_sample.main(["--shape=char", "--huggingface", "--tokens=256"])


# bench.reference


def test_the_references_are_compared_with_torch(capsys):
    arguments = ["--n_layer=1", "--n_embd=64", "--batch=2", "--block=8", "--rounds=1", "--seconds=0.05"]
    assert bench_reference.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["parameters"] == 50257 * 64 + 1024 * 64 + 12 * 64 * 64 + 13 * 64 + 2 * 64
    assert result["pytorch"]["ratio"] == 1 and result["plain_python_tokens_per_second"] > 0
    for name in {"numpy", "c"} & set(result):
        rates = result[name]
        assert rates["ratio"] == pytest.approx(
            rates["tokens_per_second"] / result["pytorch"]["tokens_per_second"], rel=1e-6
        )
    assert "c" in result or shutil.which("cc") is None


# bench.command


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (architectures.main, ["--data_dir", ""], "--data_dir: empty: name a file or folder"),
        (architectures.main, ["--data_dir=nowhere"], "error: there is no corpus in nowhere/machado_char"),
        (
            architectures.main,
            ["--n_layerz=3"],
            "error: --n_layerz=3: unknown setting 'n_layerz' (did you mean",
        ),
        (bench_train.main, ["--n_layerz=3"], "error: --n_layerz=3: unknown setting 'n_layerz'"),
        (bench_train.main, ["--nanogpt="], "--nanogpt: empty"),
        (bench_memory.main, ["--measure", "nowhere.py"], "\nerror: nowhere.py: no such config file"),
        (bench_sample.main, ["--out_dir=nowhere/else/x"], "error: nowhere/else/x is no file or folder"),
        (bench_sample.main, ["--out_dir="], "--out_dir: empty"),
        (bench_data.main, ["--input", "nowhere"], "there is no file or folder nowhere"),
    ],
)
def test_a_mistake_of_the_user_is_one_message(capsys, main, arguments, message):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    error = capsys.readouterr().err
    assert exited.value.code == 2 and message in error and "Traceback" not in error


def test_the_home_folder_is_expanded_in_paths(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(textbook, "BaselineTrainer", lambda settings, nanogpt: seen.append(nanogpt))
    monkeypatch.setattr("sys.argv", ["textbook", "{}", "--nanogpt=~/nanoGPT"])
    monkeypatch.setattr("sys.stdin", [])
    textbook.main()
    monkeypatch.setattr(architectures, "train_all", lambda names, rates, flags, folder: seen.append(flags))
    monkeypatch.setattr(architectures, "measure_speeds", lambda results, rounds, steps, tokens: [])
    architectures.main(["--data_dir=~/data"])
    assert seen[0] == tmp_path / "nanoGPT" and f"--data_dir={tmp_path / 'data'}" in seen[1]
