"""reference/gpt2.c against transformers' GPT-2, with invalid files, and with wrong signs.

The program is built with all warnings as errors, and with sanitizers.
"""

import json
import os
import platform
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch
from gpt2_oracle import SIZES, logits_and_loss, save_random_gpt2
from safetensors.numpy import load_file, save_file
from support import ROOT

FILE = ROOT / "reference" / "gpt2.c"
COMPILER = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler: apt-get install gcc")


def build(out, *flags, source=FILE):
    result = subprocess.run(
        [COMPILER, *WARNINGS, *flags, str(source), "-o", str(out), "-lm"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 100 tokens in tokens.bin, and the program `gpt2`, built with sanitizers."""
    folder = tmp_path_factory.mktemp("gpt2_c")
    np.random.default_rng(3).integers(50, size=100).astype("<u2").tofile(folder / "tokens.bin")
    build(folder / "gpt2", *SANITIZERS)
    return folder


@pytest.fixture(scope="module")
def hf_model(folder):
    return save_random_gpt2(folder)


def run(folder, *options, program="gpt2", heads=True, refused=False):
    """The finished process of a command. Fails if a sanitizer reports an error.

    `refused`: the program is expected to exit with an error; it need not free its memory then.
    """
    command = [str(folder / program), *map(str, options), *(["--heads=2"] if heads else [])]
    environment = os.environ | {"ASAN_OPTIONS": f"detect_leaks={int(not refused)}"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert "Sanitizer" not in result.stderr and "runtime error" not in result.stderr, result.stderr
    return result


def numbers_after(label, text):
    return [float(number) for number in re.findall(label + r" ([\d.]+)", text)]


def tokens_of(folder):
    return np.fromfile(folder / "tokens.bin", "<u2").astype(np.int64)


def test_loss_and_logits_equal_transformers(folder, hf_model):
    result = run(
        folder, "loss", "model.safetensors", "tokens.bin", "--block=9", "--batch=4", "--logits=logits.bin"
    )
    assert result.returncode == 0, result.stderr
    tokens = tokens_of(folder)
    logits, loss = logits_and_loss(hf_model, tokens[:99].reshape(11, 9), tokens[1:100].reshape(11, 9))
    assert numbers_after("loss", result.stdout)[0] == pytest.approx(loss.item(), abs=1e-5)
    actual = np.fromfile(folder / "logits.bin", np.float32).reshape(11, 9, 50)
    assert actual == pytest.approx(logits.detach().numpy(), abs=1e-4)


def distances_from_transformers(folder, hf_model, path) -> dict[str, float]:
    """‖gradient - expected‖ / ‖expected‖ for each gradient in a file; expected is that of transformers."""
    hf_model.zero_grad()
    tokens = tokens_of(folder)
    _, loss = logits_and_loss(hf_model, tokens[:27].reshape(3, 9), tokens[1:28].reshape(3, 9))
    loss.backward()
    actual = load_file(path)
    named = dict(hf_model.transformer.named_parameters())
    assert set(actual) == set(named)
    distances = {}
    for name, parameter in named.items():
        gradient = parameter.grad.numpy()
        distances[name] = float(np.linalg.norm(actual[name] - gradient) / np.linalg.norm(gradient))
    return distances


ONE_STEP = (
    "train",
    "model.safetensors",
    "tokens.bin",
    "--steps=1",
    "--block=9",
    "--batch=3",
    "--gradients=g.safetensors",
)


def test_gradients_equal_transformers(folder, hf_model):
    result = run(folder, *ONE_STEP)
    assert result.returncode == 0, result.stderr
    distances = distances_from_transformers(folder, hf_model, folder / "g.safetensors")
    assert all(distance < 1e-3 for distance in distances.values()), distances  # False for NaN too


def test_gradients_are_the_same_with_openmp_and_wide_vectors(folder, hf_model):
    """The program as `make reference` builds it: tiles of another size, several threads."""
    build(folder / "fast", "-O3", NATIVE, "-ffp-contract=fast", "-fopenmp")
    run(folder, *ONE_STEP)
    slow = load_file(folder / "g.safetensors")
    result = run(folder, *ONE_STEP, program="fast")
    assert result.returncode == 0, result.stderr
    fast = load_file(folder / "g.safetensors")
    for name, gradient in slow.items():
        assert fast[name] == pytest.approx(gradient, rel=1e-3, abs=1e-5), name
    distances = distances_from_transformers(folder, hf_model, folder / "g.safetensors")
    assert all(distance < 1e-3 for distance in distances.values()), distances


@pytest.mark.parametrize("program", ["gpt2", "fast"])
def test_a_wide_model_equals_transformers(folder, tmp_path, program):
    """The width makes every loop run more than once: more than 768 inputs (KC), several tiles and threads.

    Checks the gradients, and generation with the KV cache.
    """
    if not (folder / program).exists():
        build(folder / program, "-O3", NATIVE, "-ffp-contract=fast", "-fopenmp")
    hf_model = save_random_gpt2(tmp_path, vocab_size=900, n_embd=256, n_head=4, n_layer=1)
    np.random.default_rng(4).integers(900, size=100).astype("<u2").tofile(tmp_path / "tokens.bin")
    for name in ("gpt2", "fast"):
        if (folder / name).exists():
            (tmp_path / name).symlink_to(folder / name)
    result = run(tmp_path, *ONE_STEP, program=program, heads=False)
    assert result.returncode == 0, result.stderr
    distances = distances_from_transformers(tmp_path, hf_model, tmp_path / "g.safetensors")
    assert all(distance < 1e-3 for distance in distances.values()), distances
    result = run(tmp_path, "generate", "model.safetensors", "tokens.bin", program=program, heads=False)
    assert result.returncode == 0, result.stderr
    expected, window = tokens_of(tmp_path)[:8].tolist(), 8
    for _ in range(40):
        window = 8 if window > 16 else window
        with torch.no_grad():
            expected.append(int(hf_model(torch.tensor([expected[-window:]])).logits[0, -1].argmax()))
        window += 1
    assert [int(token) for token in result.stdout.split(",")] == expected[8:]


def test_ten_steps_of_adamw_equal_torch(folder, hf_model):
    result = run(
        folder, "train", "model.safetensors", "tokens.bin", "--steps=10", "--block=8", "--batch=3",
        "--learning_rate=0.01", "--out=trained.safetensors",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    matrices = [p for p in hf_model.parameters() if p.ndim > 1]
    vectors = [p for p in hf_model.parameters() if p.ndim == 1]
    before = {name: weight.clone() for name, weight in hf_model.state_dict().items()}
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch_optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    tokens, losses = tokens_of(folder), numbers_after("loss", result.stdout)
    assert len(losses) == 10
    for step, actual_loss in enumerate(losses):
        starts = [(step * 3 + row) % 12 * 8 for row in range(3)]  # consecutive windows of 12, cyclically
        rows = np.stack([tokens[start : start + 9] for start in starts])
        _, loss = logits_and_loss(hf_model, rows[:, :-1], rows[:, 1:])
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        assert actual_loss == pytest.approx(loss.item(), abs=1e-4), step
    after = {
        name: parameter.detach().numpy().copy() for name, parameter in hf_model.transformer.named_parameters()
    }
    hf_model.load_state_dict(before)
    trained = load_file(folder / "trained.safetensors")
    for name, weight in after.items():
        if name.endswith("c_attn.bias"):  # the keys' bias cancels in softmax: its gradient is rounding noise
            weight[12:24] = trained[name][12:24] = 0
        assert trained[name] == pytest.approx(weight, abs=2e-3), name


@pytest.mark.parametrize("prompt_length", [3, 16, 17, 40])
def test_greedy_generation_equals_transformers(folder, hf_model, prompt_length):
    result = run(
        folder, "generate", "model.safetensors", "tokens.bin", f"--prompt={prompt_length}", "--count=30"
    )
    assert result.returncode == 0, result.stderr
    expected, window = tokens_of(folder)[:prompt_length].tolist(), min(prompt_length, 16)
    for _ in range(30):
        window = 8 if window > 16 else window  # the block is full: the last half is the new context
        with torch.no_grad():
            expected.append(int(hf_model(torch.tensor([expected[-window:]])).logits[0, -1].argmax()))
        window += 1
    assert [int(token) for token in result.stdout.split(",")] == expected[prompt_length:]
    assert len(set(expected)) > 7


def test_a_batch_larger_than_the_file_is_reduced(folder, hf_model):
    small_batch = run(folder, "loss", "model.safetensors", "tokens.bin", "--batch=6")
    large_batch = run(folder, "loss", "model.safetensors", "tokens.bin", "--batch=1000000")
    assert small_batch.stdout == large_batch.stdout and large_batch.returncode == 0, large_batch.stderr


def test_saved_weights_are_loaded_unchanged(folder, hf_model):
    result = run(folder, "train", "model.safetensors", "tokens.bin", "--steps=0", "--out=same.safetensors")
    assert result.returncode == 0, result.stderr
    for name, weight in load_file(folder / "same.safetensors").items():
        assert np.array_equal(weight, load_file(folder / "model.safetensors")["transformer." + name])
    lines = [run(folder, "loss", f"{name}.safetensors", "tokens.bin").stdout for name in ("same", "model")]
    assert lines[0] == lines[1] and "loss" in lines[0]


# Invalid files


def file_of(header, numbers=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def tensor(start, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


INVALID_FILES = {
    "empty": (b"", "shorter than 8 bytes"),
    "seven bytes": (b"1234567", "shorter than 8 bytes"),
    "header longer than 100 MB": (file_of(b"{}", length=100_000_001), "longer than 100 MB"),
    "header of 2^64 - 1": (file_of(b"{}", length=2**64 - 1), "longer than 100 MB"),
    "header past the end": (file_of(b"{}", length=3), "truncated"),
    "no JSON": (file_of(b"hello"), "not valid safetensors JSON"),
    "no header": (file_of(b""), "not valid safetensors JSON"),
    "an unfinished name": (file_of(b'{"abc'), "ends inside a string"),
    "a backslash at the end": (file_of(b'{"abc\\'), "ends inside a string"),
    "a control character": (file_of(b'{"a\nb":{}}'), "control character"),
    "an unfinished object": (file_of(b'{"a":{"dtype":"F32"'), "not valid safetensors JSON"),
    "something behind": (
        file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}x', b"1234"),
        "text after the JSON",
    ),
    "a comma too many": (
        file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},}', b"1234"),
        "not valid safetensors JSON",
    ),
    "nothing in it": (file_of({}), "no tensors"),
    "metadata alone": (file_of({"__metadata__": {"format": "pt"}}), "no tensors"),
    "metadata with a number": (file_of(b'{"__metadata__":{"a":1}}'), "not valid safetensors JSON"),
    "an empty tensor's entry": (file_of({"a": {}}), "not valid safetensors JSON"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"), "lacks its dtype"),
    "two dtypes": (file_of(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "repeated or unknown key"),
    "an unknown key": (file_of({"a": tensor(0, 4) | {"x": 1}}, b"1234"), "repeated or unknown key"),
    "an unknown dtype": (file_of({"a": tensor(0, 4, dtype="F31")}, b"1234"), "unknown dtype"),
    "a negative size": (file_of({"a": tensor(0, 4, [-1])}, b"1234"), "lacks a non-negative integer"),
    "a fraction": (file_of({"a": tensor(0, 4, [1.5])}, b"1234"), "not valid safetensors JSON"),
    "a size past 2^64": (file_of({"a": tensor(0, 4, [2**64])}, b"1234"), "too large"),
    "a shape past 2^64": (file_of({"a": tensor(0, 4, [2**40, 2**40])}, b"1234"), "too large"),
    "a shape that wraps round": (file_of({"a": tensor(0, 4, [2**62 + 1])}, b"1234"), "too large"),
    "a shape with 9 dimensions": (file_of({"a": tensor(0, 4, [1] * 9)}, b"1234"), "too long"),
    "three offsets": (file_of({"a": tensor(0, 4) | {"data_offsets": [0, 2, 4]}}, b"1234"), "too long"),
    "one offset": (file_of({"a": tensor(0, 4) | {"data_offsets": [0]}}, b"1234"), "not two numbers"),
    "offsets reversed": (file_of({"a": tensor(0, 4) | {"data_offsets": [4, 0]}}, b"1234"), "outside"),
    "truncated": (file_of({"a": tensor(0, 8)}, b"1234"), "truncated"),
    "oversized": (file_of({"a": tensor(0, 4)}, b"12345"), "longer than the header says"),
    "another size than its shape": (
        file_of({"a": tensor(0, 4, [2])}, b"1234"),
        "does not match its number of bytes",
    ),
    "overlapping": (file_of({"a": tensor(0, 8), "b": tensor(4, 12)}, b"123456789012"), "overlap"),
    "the same place twice": (file_of({"a": tensor(0, 4), "b": tensor(0, 4)}, b"1234"), "overlap"),
    "a gap": (file_of({"a": tensor(0, 4), "b": tensor(8, 12)}, b"123456789012"), "gap"),
    "a name twice": (
        file_of(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            b"12345678",
        ),
        "have the same name",
    ),
    "nested a million deep": (file_of(b'{"a":' + b"[" * 1_000_000), "not valid safetensors JSON"),
    # a model of this width would need 77 GB: it is refused before memory is allocated
    "a small file of a huge model": (
        file_of(
            {"wte.weight": tensor(0, 160000, [1, 40000]), "wpe.weight": tensor(160000, 320000, [1, 40000])}
            | {"h.0.ln_1.weight": tensor(320000, 320000, [0])},
            bytes(320000),
        ),
        "ln_f.weight is missing",
    ),
    "no GPT-2": (file_of({"a": tensor(0, 4)}, b"1234"), "is not a GPT-2 model"),
    "no layers": (
        file_of({"wte.weight": tensor(0, 16, [2, 2]), "wpe.weight": tensor(16, 32, [2, 2])}, bytes(32)),
        "no layer 0",
    ),
}


@pytest.mark.parametrize("name", INVALID_FILES)
def test_an_invalid_file_is_reported(folder, name):
    content, message = INVALID_FILES[name]
    (folder / "invalid.safetensors").write_bytes(content)
    result = run(folder, "loss", "invalid.safetensors", "tokens.bin", heads=False, refused=True)
    assert result.returncode == 1 and message in result.stderr and result.stdout == "", result.stderr
    assert result.stderr.startswith("gpt2: invalid.safetensors")


def test_a_truncated_file_is_reported(folder, hf_model):
    content = (folder / "model.safetensors").read_bytes()
    for length in (0, 8, 9, 100, len(content) // 2, len(content) - 1):
        (folder / "invalid.safetensors").write_bytes(content[:length])
        result = run(folder, "loss", "invalid.safetensors", "tokens.bin", refused=True)
        assert result.returncode == 1 and "invalid.safetensors" in result.stderr


def test_missing_extra_and_misshapen_tensors_are_reported(folder, hf_model):
    weights = load_file(folder / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.bias"
    without_ln_1 = {k: v for k, v in weights.items() if k != "transformer.h.1.ln_1.weight"}
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
    save_file(
        weights | mask | {"lm_head.weight": weights["transformer.wte.weight"]}, folder / "invalid.safetensors"
    )
    # masks and the tied output layer are allowed
    assert run(folder, "loss", "invalid.safetensors", "tokens.bin").returncode == 0
    cases = [
        (without_ln_1, "unexpected tensor transformer.h.1."),  # not counted as a layer
        (weights | {"x": np.zeros(1, np.float32)}, "unexpected tensor x"),
        ({k: v for k, v in weights.items() if k != name}, "h.1.mlp.c_fc.bias is missing"),
        (weights | {name: weights[name][:12]}, "the shape of h.1.mlp.c_fc.bias does not fit"),
        (weights | {name: weights[name].astype(np.float16)}, "h.1.mlp.c_fc.bias has dtype F16, expected F32"),
    ]
    for tensors, message in cases:
        save_file(tensors, folder / "invalid.safetensors")
        result = run(folder, "loss", "invalid.safetensors", "tokens.bin", refused=True)
        assert result.returncode == 1 and message in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss", "none.safetensors", "tokens.bin"], "none.safetensors cannot be read"),
        (["loss", ".", "tokens.bin"], ". cannot be read"),
        (["loss", "model.safetensors", "none.bin"], "none.bin cannot be read"),
        (["loss", "model.safetensors", "odd.bin"], "odd number of bytes"),
        (
            ["loss", "model.safetensors", "few.bin"],
            "few.bin contains 5 tokens, but 17 are needed: use a smaller --block",
        ),
        (
            ["loss", "model.safetensors", "high.bin"],
            "high.bin contains the token id 50, but the vocabulary size is 50",
        ),
        (
            ["loss", "model.safetensors", "tokens.bin", "--block=17"],
            "is larger than the block size of the model, 16",
        ),
        (
            ["train", "model.safetensors", "tokens.bin", "--block=17"],
            "is larger than the block size of the model, 16",
        ),
        (["train", "model.safetensors", "tokens.bin", "--gradients=none/g"], "none/g cannot be written"),
        (["loss", "model.safetensors", "tokens.bin", "--block=0"], "must be an integer from 1"),
        (["loss", "model.safetensors", "tokens.bin", "--batch=-3"], "must be an integer from 1"),
        (
            ["loss", "model.safetensors", "tokens.bin", "--batch=99999999999999999999"],
            "must be an integer from 1",
        ),
        (["loss", "model.safetensors", "tokens.bin", "--bloc=3"], "unknown option --bloc=3"),
        (
            ["loss", "model.safetensors", "tokens.bin", "--heads=5"],
            "the width 12 cannot be divided into 5 heads",
        ),
        (["train", "model.safetensors", "tokens.bin", "--learning_rate=fast"], "must be a number from 0"),
        (
            ["train", "model.safetensors", "tokens.bin", "--steps=1", "--out=none/out"],
            "none/out cannot be written",
        ),
        (
            ["generate", "model.safetensors", "few.bin"],
            "few.bin contains 5 tokens, but 8 are needed: use a smaller --prompt",
        ),
    ],
)
def test_invalid_input_is_reported(folder, hf_model, options, message):
    (folder / "odd.bin").write_bytes(b"123")
    np.full(40, 50, "<u2").tofile(folder / "high.bin")
    np.zeros(5, "<u2").tofile(folder / "few.bin")
    result = run(folder, *options, heads="--heads=5" not in options, refused=True)
    assert result.returncode == 1 and message in result.stderr, result.stderr


def test_without_arguments_the_usage_is_printed(folder):
    result = run(folder, heads=False)
    assert result.returncode == 2 and "usage: gpt2 loss|generate|train" in result.stderr


# Mutants: a wrong sign in each backward pass

SIGNS = [  # code that occurs once in gpt2.c, and the same with a wrong sign
    ("dw, O, true);\n", "dw, O, true);\n    for (size_t i = 0; i < I * O; i++) dw[i] = -dw[i];\n"),
    ("dx, I, false);\n", "dx, I, false);\n    for (size_t i = 0; i < N * I; i++) dx[i] = -dx[i];\n"),
    ("out[c] += a[n * C + c]", "out[c] -= a[n * C + c]"),
    ("dx[t * C + c] += (dn", "dx[t * C + c] -= (dn"),
    ("(dn - (float)mean - n[", "(dn + (float)mean - n["),
    ("(dn - (float)mean - n[", "(dn - (float)mean + n["),
    ("along += dn * n[", "along -= dn * n["),
    ("mean += dn, along", "mean -= dn, along"),
    ("dy[i] *= s + x[i]", "dy[i] *= s - x[i]"),
    ("dy[i] *= s +", "dy[i] *= -s +"),
    ("s * (1.0f - s) * slope", "s * (1.0f + s) * slope"),
    ("slope = 1.5957691216f * (1.0f + 0.134145f", "slope = 1.5957691216f * (1.0f - 0.134145f"),
    ("shared += p[i] * dp[i]", "shared -= p[i] * dp[i]"),
    ("dp[i] = p[i] * (dp[i] - (float)shared)", "dp[i] = p[i] * (dp[i] + (float)shared)"),
    ("dp[i] = p[i] * (dp[i]", "dp[i] = -p[i] * (dp[i]"),
    ("weights + t * T, t + 1, 1.0f", "weights + t * T, t + 1, -1.0f"),
    ("dqkv + offset, 3 * C, false);", "dqkv + offset + C, 3 * C, false);"),  # dq overwrites dk
    ("dqkv + offset + 2 * C, 3 * C, false);", "dqkv + offset + C, 3 * C, false);"),
    ("dwte[ids[n] * C + c] += dx", "dwte[ids[n] * C + c] -= dx"),
    ("dwpe[n % T * C + c] += dx", "dwpe[n % T * C + c] -= dx"),
    ("p[n * V + targets[n]] -= 1.0f", "p[n * V + targets[n]] += 1.0f"),
    ("p[n * V + v] /= (float)N", "p[n * V + v] /= -(float)N"),
]  # fmt: skip


@pytest.mark.parametrize("n", range(len(SIGNS)))
def test_a_wrong_sign_in_any_backward_pass_is_detected(folder, hf_model, tmp_path, n):
    before, after = SIGNS[n]
    source = FILE.read_text(encoding="utf-8")
    assert source.count(before) == 1, "SIGNS does not match gpt2.c"
    (tmp_path / "mutant.c").write_text(source.replace(before, after), encoding="utf-8")
    build(folder / f"mutant{n}", "-O0", source=tmp_path / "mutant.c")
    options = [*ONE_STEP[:-1], f"--gradients=g{n}.safetensors"]
    result = run(folder, *options, program=f"mutant{n}")
    assert result.returncode == 0, result.stderr
    distances = distances_from_transformers(folder, hf_model, folder / f"g{n}.safetensors")
    assert not all(distance < 1e-3 for distance in distances.values())
    (folder / f"mutant{n}").unlink()


def test_the_random_gpt2_has_the_expected_size(hf_model):
    assert (hf_model.config.n_positions, hf_model.config.n_head) == (SIZES["n_positions"], 2)
