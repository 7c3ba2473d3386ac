"""The table of computed memory, and the measurement of a small run."""

import json

import pytest

from bench import memory as bench_memory


def test_the_table_has_a_row_per_size_and_kind_of_parallelism(capsys):
    bench_memory.main([])
    *table, summary = capsys.readouterr().out.splitlines()
    rows = json.loads(summary)["rows"]
    assert len(table) == 2 + 4 * 4 and len(rows) == 4 * 4 * 2 * 3
    sizes = {row["model"]: row["parameters"] for row in rows}
    assert {name: round(count / 1e6) for name, count in sizes.items()} == {
        "gpt2": 124,  # with the padded vocabulary and no biases
        "gpt2-medium": 355,
        "gpt2-large": 774,
        "gpt2-xl": 1557,
    }
    (single,) = (
        row
        for row in rows
        if (row["model"], row["cards"], row["batch_size"], row["gradient_checkpointing"])
        == ("gpt2", 1, 12, False)
    )
    # weights, gradients and both moments of AdamW in float32, and 16-bit copies of the linear layers
    assert single["staying_bytes"] == pytest.approx(16 * 124.4e6 + 2 * 85e6, rel=0.01)


def test_the_estimate_is_compared_with_the_peak_of_a_process(capsys):
    arguments = [
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=128",
        "--block_size=64",
        "--batch_size=32",
        "--dtype=float32",
    ]
    arguments += ["--gradient_accumulation_steps=2", "--dataset=none_char", "--device=cpu"]
    bench_memory.main(["--measure", *arguments])
    report, summary = capsys.readouterr().out.splitlines()
    (result,) = json.loads(summary)["results"]
    assert result["ratio"] == result["estimated_bytes"] / result["measured_bytes"]
    # the memory of such a small run is mostly that of the process itself
    assert result["ratio"] == pytest.approx(1, abs=0.35)
    assert f"ratio {result['ratio']:.2f}" in report
