"""Files of tensors: shards, pickles, memory use; damaged and malicious files."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT
from transformers import GPT2Config, GPT2LMHeadModel
from weight_folders import equal_tensors, load_error, save_gpt2, save_nanogpt

from fradique.pretrained import loader


def test_shards_with_an_index_give_the_same_weights():
    folder, hf_model = save_gpt2()
    hf_model.save_pretrained("shards", max_shard_size="20KB")
    assert len(list(Path("shards").glob("*.safetensors"))) > 2
    assert equal_tensors(loader.load_weights("shards").tensors, loader.load_weights(str(folder)).tensors)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_in_safetensors_may_have_wrapper_prefixes(prefix):
    """Of torch.compile and DDP, if somebody saved the wrapped model."""
    folder, _ = save_gpt2()
    expected = loader.load_weights(str(folder)).tensors
    tensors = load_file(folder / "model.safetensors")
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert equal_tensors(loader.load_weights(str(folder)).tensors, expected)


def test_a_missing_shard_is_reported():
    _, hf_model = save_gpt2()
    hf_model.save_pretrained("shards", max_shard_size="20KB")
    shard = sorted(Path("shards").glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard} is missing" in load_error("shards")


@pytest.mark.parametrize("weight_map", [{}, [], {"wte.weight": "../../secret"}, {"wte.weight": 3}, None])
def test_an_index_must_name_files_of_its_folder(weight_map):
    folder, _ = save_gpt2()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "does not name files of this folder" in load_error(folder)


def test_loaded_tensors_do_not_depend_on_the_file():
    folder, _ = save_gpt2()
    weights = loader.load_weights(str(folder))
    before = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    (folder / "model.safetensors").write_bytes(b"")
    assert equal_tensors(weights.tensors, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_needs_little_more_memory_than_the_weights(dtype):
    save_gpt2("small")
    config = {"n_positions": 64, "vocab_size": 8000, "n_embd": 512, "n_layer": 6, "n_head": 8}
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0)).to(dtype)
    model.save_pretrained("large")
    weight_bytes = 4 * sum(p.numel() for p in model.parameters())
    del model
    code = """
import json, re
from pathlib import Path
from fradique.pretrained import loader
def memory(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
loader.load_weights("small")  # includes the memory that torch needs at the first call
before = memory("VmRSS")
weights = loader.load_weights("large")
print(json.dumps([before, memory("VmHWM")]))
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak = json.loads(process.stdout)
    assert peak - before < 1.2 * weight_bytes


def test_files_that_are_not_safetensors_are_rejected():
    folder, hf_model = save_gpt2()
    path = folder / "model.safetensors"
    intact = path.read_bytes()
    torch.save(hf_model.state_dict(), "pickle")
    truncated = [intact[:200], intact[: len(intact) // 2]]
    for content in (b"", b"no", b"\x00" * 64, *truncated, Path("pickle").read_bytes()):
        path.write_bytes(content)
        for source in (folder, path):
            message = load_error(source)
            assert str(path) in message and "is truncated, or not safetensors" in message


# Pickles


def test_an_old_pickle_of_tensors_is_loaded():
    folder, hf_model = save_gpt2()
    expected = loader.load_weights(str(folder)).tensors
    (folder / "model.safetensors").unlink()
    torch.save(hf_model.state_dict(), folder / "pytorch_model.bin")
    assert equal_tensors(loader.load_weights(str(folder)).tensors, expected)
    assert equal_tensors(loader.load_weights(str(folder / "pytorch_model.bin")).tensors, expected)


@pytest.mark.parametrize("content", [{}, [], 3, {"model": {}, "model_args": {}}])
def test_a_pickle_without_a_model_is_rejected(content):
    torch.save(content, "ckpt.pt")
    assert load_error("ckpt.pt").startswith("ckpt.pt does not contain a model: ")


def test_a_pickle_of_other_tensors_is_rejected():
    torch.save({"model": torch.ones(1)}, "ckpt.pt")
    assert "the shapes of its tensors are not those of gpt2, gpt2-medium" in load_error("ckpt.pt")


class Malicious:
    """Unpickling it creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize("name", ["ckpt.pt", "hf/pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [True, False, None])
def test_a_pickle_that_runs_code_is_rejected_and_not_run(name, zipped):
    Path("hf").mkdir()
    if zipped is None:
        Path(name).write_bytes(pickle.dumps(Malicious(), protocol=2))
    else:
        torch.save({"model": Malicious(), "model_args": {}}, name, _use_new_zipfile_serialization=zipped)
    for source in (name, str(Path(name).parent)):
        message = load_error(source)
        assert f"{name} is a pickle" in message and ".mkdir, which could run code" in message
    assert not Path("it-ran").exists()
    pickle.loads(pickle.dumps(Malicious()))  # shows that the pickle runs code
    assert Path("it-ran").exists()


def test_a_damaged_pickle_is_rejected():
    save_nanogpt()
    intact = Path("ckpt.pt").read_bytes()
    for content in (b"", b"no", intact[:100], intact[: len(intact) // 2], b"\x80\x02}q\x00."):
        Path("ckpt.pt").write_bytes(content)
        assert "ckpt.pt cannot be read: it is truncated or damaged" in load_error("ckpt.pt")
