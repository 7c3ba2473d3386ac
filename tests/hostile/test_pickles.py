"""Pickles that would run code, or take time and memory without end: none is run, each is refused at once."""

import builtins
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
from fradique.tokenizer import tokenizer as tokenizers

seeds = targets.seeds


class Planted:
    """What, when it is unpickled, calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch_by_eval(canary):
    return Planted(builtins.eval, f"open({str(canary)!r}, 'w').close()")


WAYS = {
    "os.system": lambda canary: Planted(os.system, f"touch {canary}"),
    "exec": lambda canary: Planted(builtins.exec, f"open({str(canary)!r}, 'w').close()"),
    "eval": touch_by_eval,
    "open": lambda canary: Planted(open, str(canary), "w"),
    "mkdir": lambda canary: Planted(os.mkdir, str(canary)),
    "Popen": lambda canary: Planted(subprocess.check_output, ("touch", str(canary))),
    "partial": lambda canary: Planted(functools.partial(os.mkdir, str(canary))),
    "torch.load": lambda canary: Planted(torch.load, str(canary)),
    "a key of a dict": lambda canary: {touch_by_eval(canary): 1},
    "in OrderedDict": lambda canary: OrderedDict(a=touch_by_eval(canary)),
    "in a tensor's rebuilding": lambda canary: Planted(
        torch._utils._rebuild_tensor_v2, touch_by_eval(canary), 0, (1,), (1,), False, OrderedDict()
    ),
}


def archived(content, path, zipped: bool) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


@pytest.fixture
def hf(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(seeds.HF_CONFIG))
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["ckpt.pt", "legacy", "pytorch_model.bin", "plain", "meta.pkl"])
def test_no_planted_pickle_is_run(tmp_path, hf, way, form):
    canary = tmp_path / "canary"
    content = {"model": WAYS[way](canary), "model_args": {}, "vocab_size": 1, "stoi": {}, "itos": {}}
    path = hf / (form if "." in form else "ckpt.pt")
    if form in ("plain", "meta.pkl"):
        path.write_bytes(pickle.dumps(content, protocol=2 if form == "plain" else None))
    else:
        archived(content, path, zipped=form != "legacy")
    load = tokenizers.read_meta_pkl if form == "meta.pkl" else loader.load_weights
    with pytest.raises(ValueError, match=path.name) as caught:
        load(str(hf if form == "pytorch_model.bin" else path))
    assert type(caught.value) is ValueError and not canary.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_what_the_pickles_of_these_tests_would_do_is_done_by_pickle_itself(tmp_path, protocol):
    pickle.loads(pickle.dumps(WAYS["mkdir"](tmp_path / "canary"), protocol=protocol))
    assert (tmp_path / "canary").exists()


def doubled(times: int) -> bytes:
    """A tuple of itself twice, over and over, as a key: 2 ** times values to hash."""
    return b"\x80\x02}K\x01" + b"2\x86" * times + b"K\x00s."


def test_a_tuple_that_would_take_for_ever_to_hash_is_refused(tmp_path, hf):
    assert pickle.loads(doubled(10)) and pickletools.dis(doubled(3), io.StringIO()) is None  # it is a pickle
    (tmp_path / "meta.pkl").write_bytes(doubled(200))
    with pytest.raises(ValueError, match=r"meta\.pkl .*tuple"):
        tokenizers.read_meta_pkl(tmp_path / "meta.pkl")
    by_memo = (
        b"\x80\x02}K\x01q\x00" + b"0h\x00h\x00\x86q\x00" * 200 + b"K\x00s."
    )  # torch's reader knows no DUP
    for data in (doubled(200), by_memo):
        seeds.write_archive(hf / "ckpt.pt", data, deflated=False)
        with pytest.raises(ValueError, match=r"ckpt\.pt cannot be read: .*in itself too often"):
            loader.load_weights(str(hf / "ckpt.pt"))


def test_numbers_that_all_have_one_hash_are_refused(tmp_path, hf):
    numbers = {k * (2**61 - 1): "x" for k in range(1, 2000)}
    assert len({hash(number) for number in numbers}) == 1
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 1, "stoi": {}, "itos": numbers}))
    with pytest.raises(ValueError, match=r"meta\.pkl .*no token's id"):
        tokenizers.read_meta_pkl(tmp_path / "meta.pkl")
    archived(
        {"model": {k * (2**61 - 1) << 9: 1 for k in range(9)}, "model_args": {}}, hf / "ckpt.pt", zipped=True
    )
    with pytest.raises(ValueError, match=r"ckpt\.pt cannot be read: .*more than 64 bits"):
        loader.load_weights(str(hf / "ckpt.pt"))


@pytest.mark.parametrize(
    "content", [Planted(bytearray, 1 << 40), Planted(Counter, [1]), Planted(torch.Tensor, 1 << 40)]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_allows_but_no_tensor_needs_is_refused(hf, content, zipped):
    archived({"model": content, "model_args": {}}, hf / "ckpt.pt", zipped)
    with pytest.raises(ValueError, match=r"ckpt\.pt is a pickle of more than tensors"):
        loader.load_weights(str(hf / "ckpt.pt"))


def test_a_tensor_that_repeats_one_number_without_end_is_refused(hf):
    endless = torch.zeros(1).expand(1 << 30, 1 << 20)
    for name in ("ckpt.pt", "pytorch_model.bin"):
        content = {"wte.weight": endless}
        archived(
            {"model": content, "model_args": seeds.SIZES} if name == "ckpt.pt" else content,
            hf / name,
            zipped=True,
        )
        with pytest.raises(ValueError, match="has more elements than the file stores"):
            loader.load_weights(str(hf / name))


def test_an_archive_that_is_packed_is_refused(hf):
    with zipfile.ZipFile(hf / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * (1 << 22) + b"N.")
    assert (hf / "ckpt.pt").stat().st_size < 1 << 16
    with pytest.raises(ValueError, match=r"ckpt\.pt cannot be read: .*compressed"):
        loader.load_weights(str(hf / "ckpt.pt"))


def test_a_checkpoint_names_no_corpus_outside_the_data_folder(tmp_path, hf, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tokenizer.json").write_bytes(seeds.tokenizer_json()[0])
    weights = {f"transformer.{name}": torch.from_numpy(x) for name, x in seeds.gpt_weights(11, False).items()}
    for name in ("../outside", str(outside), "..", "a/../../outside"):
        content = {"model": weights, "model_args": seeds.SIZES, "config": {"dataset": name}}
        archived(content, hf / "ckpt.pt", zipped=True)
        assert loader.load_weights(str(hf / "ckpt.pt")).tokenizer is None
    (tmp_path / "data").mkdir()
    outside.rename(tmp_path / "data" / "book")
    archived(content | {"config": {"dataset": "book"}}, hf / "ckpt.pt", zipped=True)
    assert loader.load_weights(str(hf / "ckpt.pt")).tokenizer == tokenizers.CharTokenizer(seeds.CHARS)
