import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ROOT, run_script, run_training

import sample
from sample import SampleSettings
from train import TrainSettings


@pytest.fixture(scope="module")
def run_folder(data_dir, tmp_path_factory):
    """A run of 60 steps on the tiny corpus."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 8}
    shape |= {"gradient_accumulation_steps": 1, "max_iters": 60, "eval_interval": 20, "eval_iters": 1}
    place = {"out_dir": str(folder), "data_dir": str(data_dir), "dataset": "tiny", "device": "cpu"}
    rates = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 5, "compile": False}
    run_training(replace(TrainSettings(), **shape, **place, **rates))
    return folder


def text_of(writer, prompt, **changes):
    """The continuations, put together from the pieces."""
    settings = replace(SampleSettings(), max_new_tokens=60, device="cpu", **changes)
    rows = [""] * settings.num_samples
    for pieces in sample.generate_text(writer, prompt, settings):
        rows = [row + piece for row, piece in zip(rows, pieces, strict=True)]
    return rows


@pytest.fixture(scope="module")
def writer(run_folder):
    return sample.load_model(str(run_folder), device="cpu")


def test_a_run_folder_writes_where_there_is_no_corpus(run_folder, tmp_path):
    result = run_script(
        "sample.py", f"--out_dir={run_folder}", "--start=amor", "--max_new_tokens=50", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("amor")
    assert len(result.stdout) == len("amor") + 50 + 1


def test_the_text_is_that_of_generate(writer):
    prompt = torch.from_numpy(writer.tokenizer.encode("a casa ").astype("int64"))
    generator = torch.Generator().manual_seed(1337)
    ids = writer.model.generate(prompt[None], 60, temperature=0.8, generator=generator)
    assert "a casa " + text_of(writer, "a casa ")[0] == writer.tokenizer.decode(ids[0].tolist())


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"num_samples": 3, "top_k": 5}])
def test_the_cache_changes_no_letter(writer, changes):
    """60 tokens from a block of 16: the window slides many times."""
    assert text_of(writer, "era", **changes) == text_of(writer, "era", cache=False, **changes)


def test_the_seed_decides_the_text(writer):
    assert text_of(writer, "lua") == text_of(writer, "lua")
    assert text_of(writer, "lua") != text_of(writer, "lua", seed=2)


def test_samples_of_a_batch_differ_from_each_other(writer):
    rows = text_of(writer, "lua", num_samples=4)
    assert len(set(rows)) == 4


def test_top_k_1_is_greedy(writer):
    assert text_of(writer, "mar", top_k=1) == text_of(writer, "mar", temperature=0.0)
    assert text_of(writer, "mar", top_p=1e-9) == text_of(writer, "mar", temperature=0.0)
    assert text_of(writer, "mar", min_p=1.0) == text_of(writer, "mar", temperature=0.0)


def test_stop_ends_the_text_before_it(writer):
    whole = text_of(writer, "dia")[0]
    stop = whole[10:13]
    assert text_of(writer, "dia", stop=stop)[0] == whole[: whole.index(stop)]
    assert text_of(writer, "dia", stop="não vem")[0] == whole


def test_stop_holds_back_no_text_that_it_does_not_end():
    row = sample.StreamedSample(FakeBytes(), "abc")
    shown = [row.feed(byte) for byte in b"xaabxabd"]
    assert shown == ["x", "", "a", "", "abx", "", "", "abd"]
    row = sample.StreamedSample(FakeBytes(), "abc")
    assert "".join(row.feed(byte) for byte in b"x ab") + row.flush() == "x ab"
    row = sample.StreamedSample(FakeBytes(), "abc")
    assert "".join(row.feed(byte) for byte in b"aabcdef") + row.flush() == "a" and row.done


class FakeBytes:
    """A tokenizer whose tokens are bytes."""

    def decode_bytes(self, ids):
        return bytes(ids)


def test_a_character_is_shown_once_all_its_bytes_are_there():
    row = sample.StreamedSample(FakeBytes(), "")
    assert [row.feed(byte) for byte in "é—x".encode()] == ["", "é", "", "", "—", "x"]
    row.feed("é".encode()[0])
    assert row.flush() == "\N{REPLACEMENT CHARACTER}"


def test_prompts_come_from_text_a_file_or_standard_input(run_folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("poética", encoding="utf-8")
    words = ["sample.py", f"--out_dir={run_folder}", "--max_new_tokens=0"]
    assert run_script(*words, "--start=poética").stdout == "poética\n"
    assert run_script(*words, f"--start=FILE:{tmp_path / 'prompt.txt'}").stdout == "poética\n"
    assert run_script(*words, "--start=-", input="poética").stdout == "poética\n"


def test_several_samples_are_printed_one_after_the_other(run_folder):
    result = run_script(
        "sample.py", f"--out_dir={run_folder}", "--num_samples=3", "--max_new_tokens=20", "--start=mar"
    )
    assert result.returncode == 0, result.stderr
    parts = result.stdout.rstrip("\n").split("\n---------------\n")
    assert len(parts) == 3 and all(part.startswith("mar") and len(part) == 23 for part in parts)


def test_an_empty_prompt_begins_a_line(writer):
    assert len(text_of(writer, "")[0]) == 60


def test_a_chosen_step_writes_with_its_own_weights(run_folder):
    steps = [
        sample.load_model(str(run_folder), checkpoint_name=name, device="cpu") for name in ("40", "newest")
    ]
    assert not torch.equal(steps[0].model.lm_head.weight, steps[1].model.lm_head.weight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start=wxyz"], r"'w'"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        (["--checkpoint=7"], "no checkpoint '7'; it has best, 40, 60"),
        (["--checkpoint=worst"], "worst"),
        (["--temperature=-1"], "temperature"),
        (["--top_p=0", "--tempertaure=1"], "did you mean"),
        (["--device=cuda:99"], "cuda"),
    ],
)
def test_bad_input_gets_one_message_and_status_2(run_folder, words, message):
    result = run_script("sample.py", f"--out_dir={run_folder}", *words)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_mistyped_run_is_not_looked_for_on_the_hub(tmp_path):
    result = run_script("sample.py", "--out_dir=out/eca-chr", cwd=tmp_path)
    assert result.returncode == 2
    assert "no trained model in out/eca-chr/" in result.stderr and "hub" not in result.stderr


def test_a_folder_without_a_run_gets_a_message(tmp_path):
    result = run_script("sample.py", f"--out_dir={tmp_path}")
    assert result.returncode == 2 and "Traceback" not in result.stderr and str(tmp_path) in result.stderr


def test_a_prompt_file_that_is_not_utf8_is_refused_with_the_place(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("poética".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1.txt is not UTF-8: byte 2 is 0xe9"):
        sample.read_prompt(f"FILE:{tmp_path / 'latin1.txt'}")


def test_a_tokenizer_larger_than_the_model_is_refused(run_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run_folder, folder)
    value = json.loads((folder / "tokenizer.json").read_text())
    value["chars"] += "ÀÁÂ"
    (folder / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="token"):
        sample.load_model(str(folder), device="cpu")
    assert Path(folder).exists()


def test_sampling_imports_neither_optimizer_nor_export_nor_training():
    code = "import sys, sample; print(*[m for m in sys.modules if m.startswith('fradique.')])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = result.stdout.split()
    assert "fradique.pretrained.loader" in modules
    assert not [m for m in modules if m.startswith(("fradique.optim", "fradique.training"))]
    assert "fradique.pretrained.export" not in modules
