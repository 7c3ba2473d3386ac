"""Sampling: prompts, the text, stop strings, invalid input, and what sample.py imports."""

import codecs
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, run_script, run_training

import sample
from configurator import command, resolve
from fradique.runtime import device
from lab import common
from sample import SampleSettings
from train import TrainSettings

WPE = "transformer.wpe.weight"


@pytest.fixture(scope="module")
def run_folder(data_dir, tmp_path_factory):
    """A run of 60 steps on the tiny corpus."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 8}
    shape |= {"gradient_accumulation_steps": 1, "max_iters": 60, "eval_interval": 20, "eval_iters": 1}
    paths = {"out_dir": str(folder), "data_dir": str(data_dir), "dataset": "tiny", "device": "cpu"}
    rates = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 5, "compile": False}
    run_training(replace(TrainSettings(), **shape, **paths, **rates))
    return folder


def sample_texts(loaded, prompt, **changes):
    """The text of each sample after the prompt, joined from the streamed pieces."""
    settings = replace(SampleSettings(), max_new_tokens=60, device="cpu", **changes)
    texts = [""] * settings.num_samples
    for new_texts in sample.generate_text(loaded, prompt, settings):
        texts = [text + new_text for text, new_text in zip(texts, new_texts, strict=True)]
    return texts


@pytest.fixture(scope="module")
def loaded(run_folder):
    return sample.load_model(str(run_folder), device="cpu")


def test_sampling_from_a_run_folder_needs_no_corpus(run_folder, tmp_path):
    result = run_script(
        "sample.py", f"--out_dir={run_folder}", "--start=amor", "--max_new_tokens=50", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("amor")
    assert len(result.stdout) == len("amor") + 50 + 1


def test_the_text_equals_that_of_model_generate(loaded):
    prompt = torch.from_numpy(loaded.tokenizer.encode("a casa ").astype("int64"))
    generator = torch.Generator().manual_seed(1337)
    ids = loaded.model.generate(prompt[None], 60, temperature=0.8, generator=generator)
    assert "a casa " + sample_texts(loaded, "a casa ")[0] == loaded.tokenizer.decode(ids[0].tolist())


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"num_samples": 3, "top_k": 5}])
def test_the_kv_cache_does_not_change_the_text(loaded, changes):
    """60 tokens from a block of 16: the window slides many times."""
    assert sample_texts(loaded, "era", **changes) == sample_texts(loaded, "era", cache=False, **changes)


def test_the_seed_decides_the_text(loaded):
    assert sample_texts(loaded, "lua") == sample_texts(loaded, "lua")
    assert sample_texts(loaded, "lua") != sample_texts(loaded, "lua", seed=2)


def test_samples_of_a_batch_differ_from_each_other(loaded):
    texts = sample_texts(loaded, "lua", num_samples=4)
    assert len(set(texts)) == 4


def test_top_k_1_is_greedy(loaded):
    assert sample_texts(loaded, "mar", top_k=1) == sample_texts(loaded, "mar", temperature=0.0)
    assert sample_texts(loaded, "mar", top_p=1e-9) == sample_texts(loaded, "mar", temperature=0.0)
    assert sample_texts(loaded, "mar", min_p=1.0) == sample_texts(loaded, "mar", temperature=0.0)


def test_stop_ends_the_text_before_it(loaded):
    full_text = sample_texts(loaded, "dia")[0]
    stop = full_text[10:13]
    assert sample_texts(loaded, "dia", stop=stop)[0] == full_text[: full_text.index(stop)]
    assert sample_texts(loaded, "dia", stop="não vem")[0] == full_text


def test_text_that_only_begins_like_stop_is_shown_later():
    stream = sample.StreamedSample(ByteTokenizer(), "abc")
    shown = [stream.feed(byte) for byte in b"xaabxabd"]
    assert shown == ["x", "", "a", "", "abx", "", "", "abd"]
    stream = sample.StreamedSample(ByteTokenizer(), "abc")
    assert "".join(stream.feed(byte) for byte in b"x ab") + stream.flush() == "x ab"
    stream = sample.StreamedSample(ByteTokenizer(), "abc")
    assert "".join(stream.feed(byte) for byte in b"aabcdef") + stream.flush() == "a" and stream.done


class ByteTokenizer:
    """A tokenizer whose tokens are bytes."""

    def decode_bytes(self, ids):
        return bytes(ids)


def test_a_character_is_shown_when_its_last_byte_arrives():
    stream = sample.StreamedSample(ByteTokenizer(), "")
    assert [stream.feed(byte) for byte in "é—x".encode()] == ["", "é", "", "", "—", "x"]
    stream.feed("é".encode()[0])
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_prompts_come_from_text_a_file_or_standard_input(run_folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("poética", encoding="utf-8")
    arguments = ["sample.py", f"--out_dir={run_folder}", "--max_new_tokens=0"]
    assert run_script(*arguments, "--start=poética").stdout == "poética\n"
    assert run_script(*arguments, f"--start=FILE:{tmp_path / 'prompt.txt'}").stdout == "poética\n"
    assert run_script(*arguments, "--start=-", input="poética").stdout == "poética\n"


def test_several_samples_are_printed_with_separators(run_folder):
    result = run_script(
        "sample.py", f"--out_dir={run_folder}", "--num_samples=3", "--max_new_tokens=20", "--start=mar"
    )
    assert result.returncode == 0, result.stderr
    samples = result.stdout.rstrip("\n").split("\n---------------\n")
    assert len(samples) == 3 and all(text.startswith("mar") and len(text) == 23 for text in samples)


def test_an_empty_prompt_gives_the_text_after_a_line_break(loaded):
    """A character vocabulary has no <|endoftext|>, after which a text would begin otherwise."""
    assert loaded.tokenizer.end_of_text is None
    assert sample_texts(loaded, "") == sample_texts(loaded, "\n") != sample_texts(loaded, " ")


def test_bfloat16_that_is_emulated_gives_a_warning(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(device, "emulates_bf16", lambda device: True)
    arguments = [f"--out_dir={run_folder}", "--device=cpu", "--max_new_tokens=2", "--num_samples=1"]
    for dtype, warnings in (("bfloat16", 1), ("float32", 0), ("auto", 0)):
        assert command(sample.main, SampleSettings, [*arguments, f"--dtype={dtype}"]) == 0
        assert capsys.readouterr().err.count("warning: dtype=bfloat16: this cpu has no") == warnings


def test_the_checkpoint_name_selects_the_weights(run_folder):
    folders = {"40": "step-00000040", "newest": "step-00000060", "best": "best"}
    saved = {name: load_file(run_folder / folder / "model.safetensors") for name, folder in folders.items()}
    assert not torch.equal(saved["40"][WPE], saved["newest"][WPE])
    for name, tensors in saved.items():
        model = sample.load_model(str(run_folder), checkpoint_name=name, device="cpu").model
        assert torch.equal(model.get_parameter(WPE), tensors[WPE]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start=wxyz"], r"'w'"),
        (["--start=amor wxyz", "--num_samples=3", "--temperature=0"], r"'w'"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        (["--checkpoint=7"], "no checkpoint '7'; it has best, 40, 60"),
        (["--checkpoint=worst"], "worst"),
        (["--temperature=-1"], "temperature"),
        (["--top_p=0", "--tempertaure=1"], "did you mean"),
        (["--device=cuda:99"], "cuda"),
    ],
)
def test_invalid_input_gets_one_message_and_status_2(run_folder, arguments, message):
    result = run_script("sample.py", f"--out_dir={run_folder}", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and result.stderr.startswith("error: ")


def print_text(run_folder, *arguments):
    """Run sample.py in this process: the exit status. It generates no tokens, so it prints the prompt."""
    flags = [f"--out_dir={run_folder}", "--max_new_tokens=0", "--device=cpu", *arguments]
    return command(sample.main, SampleSettings, flags)


@pytest.mark.parametrize("start", ["amor wxyz", "FILE:prompt.txt", "-"])
def test_a_refused_prompt_prints_nothing_before_the_message(run_folder, tmp_path, monkeypatch, capsys, start):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("amor wxyz")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"amor wxyz")))
    assert print_text(run_folder, f"--start={start}") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: character 'w' (U+0077 LATIN SMALL LETTER W) at position 5")


def test_generate_text_refuses_a_prompt_before_it_is_iterated(loaded):
    with pytest.raises(ValueError, match="character 'w'"):
        sample.generate_text(loaded, "wxyz", SampleSettings())


def test_a_newline_can_be_typed_in_a_prompt_but_not_in_a_file(run_folder, tmp_path, monkeypatch, capsys):
    assert print_text(run_folder, r"--start=amor\nmar\n") == 0
    assert capsys.readouterr().out == "amor\nmar\n\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / r"n\new.txt").write_text("mar")
    assert print_text(run_folder, r"--start=FILE:n\new.txt") == 0
    assert capsys.readouterr().out == "mar\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(rb"mar\n")))
    assert print_text(run_folder, "--start=-") == 2
    assert "character '\\\\'" in capsys.readouterr().err


def test_a_typed_newline_ends_a_sample(run_folder, loaded, capsys):
    text = sample_texts(loaded, "amor")[0]
    assert "\n" in text
    flags = [f"--out_dir={run_folder}", "--start=amor", r"--stop=\n", "--max_new_tokens=60", "--device=cpu"]
    assert command(sample.main, SampleSettings, flags) == 0
    assert capsys.readouterr().out == "amor" + text[: text.index("\n")] + "\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_redirected_text_is_utf8(run_folder, monkeypatch, encoding):
    """Standard input is UTF-8 too, whatever the encoding of the console."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("poética".encode()), encoding=encoding))
    assert print_text(run_folder, "--start=-") == 0
    assert out.buffer.getvalue() == "poética\n".encode()


def test_a_closed_standard_input_is_reported(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        sample.read_prompt("-")


def test_a_mistyped_run_folder_is_not_searched_on_the_hub(tmp_path):
    result = run_script("sample.py", "--out_dir=out/eca-chr", cwd=tmp_path)
    assert result.returncode == 2
    assert "no trained model in out/eca-chr/" in result.stderr and "hub" not in result.stderr


def test_a_folder_without_a_run_is_reported(tmp_path):
    result = run_script("sample.py", f"--out_dir={tmp_path}")
    assert result.returncode == 2 and "Traceback" not in result.stderr and str(tmp_path) in result.stderr


def test_a_prompt_file_that_is_not_utf8_is_rejected(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("poética".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1.txt is not UTF-8: byte 2 is 0xe9"):
        sample.read_prompt(f"FILE:{tmp_path / 'latin1.txt'}")


def test_a_tokenizer_larger_than_the_model_is_rejected(run_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run_folder, folder)
    value = json.loads((folder / "tokenizer.json").read_text())
    n = len(value["chars"])
    value["chars"] += "ÀÁÂ"
    (folder / "tokenizer.json").write_text(json.dumps(value))
    (folder / "settings.json").unlink()  # it has the checksum; older versions wrote none
    with pytest.raises(ValueError, match=rf"the tokenizer of .*copy has {n + 3} tokens and the model {n}: "):
        sample.load_model(str(folder), device="cpu")


def test_sampling_imports_no_optimizer_export_or_training():
    code = "import sys, sample; print(*[m for m in sys.modules if m.startswith('fradique.')])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = result.stdout.split()
    assert "fradique.pretrained.loader" in modules
    assert not [m for m in modules if m.startswith(("fradique.optim", "fradique.training"))]
    assert "fradique.pretrained.export" not in modules


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, monkeypatch):
    """Some Windows programs write it at the beginning of a text file."""
    (tmp_path / "prompt.txt").write_bytes(codecs.BOM_UTF8 + "poética".encode())
    assert sample.read_prompt(f"FILE:{tmp_path / 'prompt.txt'}") == "poética"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(codecs.BOM_UTF8 + b"amor")))
    assert sample.read_prompt("-") == "amor"


def test_another_tokenizer_in_a_run_folder_is_refused(run_folder, tmp_path):
    """Swapped characters would give other text without any error."""
    folder = shutil.copytree(run_folder, tmp_path / "run")
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | {"chars": value["chars"][::-1]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer of this run"):
        sample.load_model(str(folder), device="cpu")


@pytest.mark.parametrize("given", [True, False])
def test_an_out_dir_beside_init_from_is_named_as_ignored(run_folder, capsys, given):
    arguments = [f"--init_from={run_folder}", "--max_new_tokens=0", "--start=a", "--device=cpu"]
    assert (
        command(sample.main, sample.SampleSettings, [*arguments, *(["--out_dir=other"] if given else [])])
        == 0
    )
    assert ("--out_dir=other is ignored" in capsys.readouterr().err) == given


def test_lab_names_an_ignored_out_dir_too(run_folder, capsys):
    arguments = [f"--init_from={run_folder}", "--out_dir=other"]
    assert common.command(lambda resolved: 0, common.ModelSettings, arguments) == 0
    assert "--out_dir=other is ignored" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["FILE:", "FILE:  "])
def test_a_prompt_file_without_a_name_is_reported(start):
    with pytest.raises(ValueError, match="names no file"):
        sample.read_prompt(start)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_utf16_prompt_file_is_reported_with_its_encoding(tmp_path, encoding):
    (tmp_path / "prompt.txt").write_bytes("Era uma vez um gato".encode(encoding))
    with pytest.raises(ValueError, match=r"prompt\.txt is not UTF-8 but UTF-(16|32).* iconv -f UTF-"):
        sample.read_prompt(f"FILE:{tmp_path / 'prompt.txt'}")


@pytest.mark.parametrize("place", ["run", "checkpoint", "hf"])
@pytest.mark.parametrize("flag", [["--checkpoint=best"], []])
def test_a_checkpoint_beside_other_weights_is_named_as_ignored(run_folder, tmp_path, capsys, place, flag):
    path = {"run": run_folder, "checkpoint": run_folder / "best", "hf": tmp_path / "hf"}[place]
    for cls in (sample.SampleSettings, common.ModelSettings):
        sample.note_ignored_settings(resolve(cls, [f"--init_from={path}", *flag]))
        note = f"note: --checkpoint=best is ignored, because --init_from={path} is no run folder\n"
        assert capsys.readouterr().err == (note if flag and place != "run" else "")
    sample.note_ignored_settings(resolve(sample.SampleSettings, [f"--out_dir={path}", *flag]))
    assert capsys.readouterr().err == ""


def test_the_settings_json_of_a_run_samples_that_run(run_folder, capsys):
    arguments = [str(run_folder / "settings.json"), "--max_new_tokens=0", "--start=a", "--device=cpu"]
    assert command(sample.main, sample.SampleSettings, arguments) == 0
    assert capsys.readouterr().err == ""
    settings = resolve(common.ModelSettings, arguments[:1]).settings
    assert (settings.out_dir, settings.init_from) == (str(run_folder), "")
