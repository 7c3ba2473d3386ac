"""Pickles that would run code, or take unbounded time or memory, are refused at once."""

import builtins
import contextlib
import functools
import io
import json
import os
import pickle
import pickletools
import subprocess
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from faults import targets

from fradique.pretrained import loader
from fradique.tokenizer import meta_pkl
from fradique.tokenizer import tokenizer as tokenizers

seeds = targets.seeds


class CallOnLoad:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch_by_eval(canary):
    return CallOnLoad(builtins.eval, f"open({str(canary)!r}, 'w').close()")


ATTACKS = {
    "os.system": lambda canary: CallOnLoad(os.system, f"touch {canary}"),
    "exec": lambda canary: CallOnLoad(builtins.exec, f"open({str(canary)!r}, 'w').close()"),
    "eval": touch_by_eval,
    "open": lambda canary: CallOnLoad(open, str(canary), "w"),
    "mkdir": lambda canary: CallOnLoad(os.mkdir, str(canary)),
    "Popen": lambda canary: CallOnLoad(subprocess.check_output, ("touch", str(canary))),
    "partial": lambda canary: CallOnLoad(functools.partial(os.mkdir, str(canary))),
    "torch.load": lambda canary: CallOnLoad(torch.load, str(canary)),
    "a key of a dict": lambda canary: {touch_by_eval(canary): 1},
    "in OrderedDict": lambda canary: OrderedDict(a=touch_by_eval(canary)),
    "in a tensor's rebuilding": lambda canary: CallOnLoad(
        torch._utils._rebuild_tensor_v2, touch_by_eval(canary), 0, (1,), (1,), False, OrderedDict()
    ),
}


def save_archive(content, path, zipped: bool) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


@pytest.fixture
def hf(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(seeds.HF_CONFIG))
    return folder


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", ["ckpt.pt", "legacy", "pytorch_model.bin", "plain", "meta.pkl"])
def test_malicious_pickles_are_refused_and_not_run(tmp_path, hf, attack, kind):
    canary = tmp_path / "canary"
    content = {"model": ATTACKS[attack](canary), "model_args": {}, "vocab_size": 1, "stoi": {}, "itos": {}}
    path = hf / (kind if "." in kind else "ckpt.pt")
    if kind in ("plain", "meta.pkl"):
        path.write_bytes(pickle.dumps(content, protocol=2 if kind == "plain" else None))
    else:
        save_archive(content, path, zipped=kind != "legacy")
    load = meta_pkl.read_meta_pkl if kind == "meta.pkl" else loader.load_weights
    with pytest.raises(ValueError, match=path.name) as caught:
        load(str(hf if kind == "pytorch_model.bin" else path))
    assert type(caught.value) is ValueError and not canary.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "torch.load"])
def test_pickle_loads_runs_the_attacks(tmp_path, attack, protocol):
    data = pickle.dumps(ATTACKS[attack](tmp_path / "canary"), protocol=protocol)
    with contextlib.suppress(AttributeError):  # eval returns None, from which no tensor can be rebuilt
        loaded = pickle.loads(data)
        if attack == "open":
            loaded.close()
    assert (tmp_path / "canary").exists()


def nested_tuple(depth: int) -> bytes:
    """A pickled dict whose key is a tuple, nested `depth` times, whose hash takes 2**depth steps."""
    return b"\x80\x02}K\x01" + b"2\x86" * depth + b"K\x00s."


def test_a_tuple_of_exponential_hash_time_is_refused(tmp_path, hf):
    # the pickle is valid
    assert pickle.loads(nested_tuple(10)) and pickletools.dis(nested_tuple(3), io.StringIO()) is None
    (tmp_path / "meta.pkl").write_bytes(nested_tuple(200))
    with pytest.raises(ValueError, match=r"meta\.pkl .*tuple"):
        meta_pkl.read_meta_pkl(tmp_path / "meta.pkl")
    # the same without DUP, which torch does not support
    nested_by_memo = b"\x80\x02}K\x01q\x00" + b"0h\x00h\x00\x86q\x00" * 200 + b"K\x00s."
    for data in (nested_tuple(200), nested_by_memo):
        seeds.write_archive(hf / "ckpt.pt", data, deflated=False)
        with pytest.raises(ValueError, match=r"ckpt\.pt cannot be read: .*nested in itself too many times"):
            loader.load_weights(str(hf / "ckpt.pt"))


def test_a_large_tuple_that_is_a_key_many_times_is_refused(tmp_path, hf):
    """Each use hashes all its values again: 2 ms for 5 bytes of the file."""
    large_tuple = b"(" + b"K\x00" * 2**18 + b"t"
    pickled = b"\x80\x02}" + large_tuple + b"q\x00K\x01s" + b"h\x00K\x01s" * 100 + b"."
    assert len(pickle.loads(pickled)) == 1
    seeds.write_archive(hf / "ckpt.pt", pickled, deflated=False)
    with pytest.raises(ValueError, match=r"ckpt\.pt cannot be read: .*large tuples again too many times"):
        loader.load_weights(str(hf / "ckpt.pt"))


def test_integers_with_equal_hashes_are_refused(tmp_path, hf):
    numbers = {k * (2**61 - 1): "x" for k in range(1, 2000)}
    assert len({hash(number) for number in numbers}) == 1
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 1, "stoi": {}, "itos": numbers}))
    with pytest.raises(ValueError, match=r"meta\.pkl .*too large for a token id"):
        meta_pkl.read_meta_pkl(tmp_path / "meta.pkl")
    content = {"model": {k * (2**61 - 1) << 9: 1 for k in range(9)}, "model_args": {}}
    save_archive(content, hf / "ckpt.pt", zipped=True)
    with pytest.raises(ValueError, match=r"ckpt\.pt cannot be read: .*more than 64 bits"):
        loader.load_weights(str(hf / "ckpt.pt"))


@pytest.mark.parametrize(
    "content", [CallOnLoad(bytearray, 1 << 40), CallOnLoad(Counter, [1]), CallOnLoad(torch.Tensor, 1 << 40)]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_globals_that_no_tensor_needs_are_refused(hf, content, zipped):
    save_archive({"model": content, "model_args": {}}, hf / "ckpt.pt", zipped)
    with pytest.raises(ValueError, match=r"ckpt\.pt is a pickle of more than tensors"):
        loader.load_weights(str(hf / "ckpt.pt"))


def test_a_huge_expanded_tensor_is_refused(hf):
    expanded = torch.zeros(1).expand(1 << 30, 1 << 20)
    for name in ("ckpt.pt", "pytorch_model.bin"):
        weights = {"wte.weight": expanded}
        content = {"model": weights, "model_args": seeds.SIZES} if name == "ckpt.pt" else weights
        save_archive(content, hf / name, zipped=True)
        with pytest.raises(ValueError, match="has more elements than the file stores"):
            loader.load_weights(str(hf / name))


def test_a_compressed_archive_is_refused(hf):
    with zipfile.ZipFile(hf / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * (1 << 22) + b"N.")
    assert (hf / "ckpt.pt").stat().st_size < 1 << 16
    with pytest.raises(ValueError, match=r"ckpt\.pt cannot be read: .*compressed"):
        loader.load_weights(str(hf / "ckpt.pt"))


def test_a_checkpoint_cannot_name_a_corpus_outside_data(tmp_path, hf, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tokenizer.json").write_bytes(seeds.tokenizer_json()[0])
    weights = {f"transformer.{name}": torch.from_numpy(x) for name, x in seeds.gpt_weights(11, False).items()}
    for name in ("../outside", str(outside), "..", "a/../../outside"):
        content = {"model": weights, "model_args": seeds.SIZES, "config": {"dataset": name}}
        save_archive(content, hf / "ckpt.pt", zipped=True)
        assert loader.load_weights(str(hf / "ckpt.pt")).tokenizer is None
    (tmp_path / "data").mkdir()
    outside.rename(tmp_path / "data" / "book")
    save_archive(content | {"config": {"dataset": "book"}}, hf / "ckpt.pt", zipped=True)
    assert loader.load_weights(str(hf / "ckpt.pt")).tokenizer == tokenizers.CharTokenizer(seeds.CHARS)


def test_all_pickles_of_a_legacy_file_are_checked(hf):
    """The last one, the keys of the storages, takes 2**22 steps to hash."""
    save_archive({"model": {}, "model_args": {}}, hf / "ckpt.pt", zipped=False)
    with (hf / "ckpt.pt").open("r+b") as file:
        for _ in range(4):  # magic number, protocol version, system, content
            list(pickletools.genops(file))
        file.truncate()
        # x = 1; x = (x, x) 22 times; {x: 0}; without POP and DUP, which torch does not support
        file.write(b"\x80\x02K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 22 + b"}h\x00K\x00s.")
    with pytest.raises(ValueError, match=r"ckpt\.pt cannot be read: .*nested in itself too many times"):
        loader.load_weights(str(hf / "ckpt.pt"))
