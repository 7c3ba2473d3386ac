"""reference/gpt_python.py against model.py under autograd, finite differences, and wrong signs."""

import ast
import math
import os
import random
import re
import subprocess
import sys
import types

import pytest
import torch
from mutants import mutants
from support import ROOT

from model import GPT, GPTConfig

FILE = ROOT / "reference" / "gpt_python.py"
SHAPE = {"vocab_size": 11, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}
IDS = [3, 1, 4, 1, 5, 9, 2]  # six input tokens and their six targets; token 1 occurs twice in the input


def module_from(source: str) -> types.ModuleType:
    module = types.ModuleType("gpt_python")
    exec(compile(source, str(FILE), "exec"), module.__dict__)
    return module


reference = module_from(FILE.read_text(encoding="utf-8"))


def random_model(module=reference, **changes):
    """A model with random weights that are not near 0, including biases and norms."""
    model, rng = module.GPT(**SHAPE | changes), random.Random(7)
    for weight in model.weights.values():
        for row in weight:
            row[:] = [value + rng.gauss(0, 0.3) for value in row]
    return model


def project_model(model, **changes) -> GPT:
    """The model of model.py with the same weights."""
    torch_model = GPT(GPTConfig(**SHAPE, bias=True, **changes))
    state = {}
    for name, weight in model.weights.items():
        tensor = torch.tensor(weight)
        state["transformer." + name] = tensor[0] if len(weight) == 1 else tensor
    state["lm_head.weight"] = state["transformer.wte.weight"]
    if "position" in changes:
        del state["transformer.wpe.weight"]
    torch_model.load_state_dict(state)
    return torch_model


def rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None] if tensor.ndim == 1 else tensor


@pytest.mark.parametrize("changes", [{}, {"activation": "relu"}, {"position": "sinusoidal"}], ids=str)
def test_logits_loss_and_gradients_equal_the_model(changes):
    model = random_model(**changes)
    torch_model = project_model(model, **changes)
    logits, loss = torch_model(torch.tensor([IDS[:-1]]), torch.tensor([IDS[1:]]))
    loss.backward()
    assert model.learn(IDS) == pytest.approx(loss.item(), abs=1e-5)
    assert torch.tensor(model.forward(IDS[:-1])[0]) == pytest.approx(logits[0].detach(), abs=1e-4)
    named = dict(torch_model.named_parameters())
    for name, gradient in model.gradients.items():
        if "transformer." + name not in named:
            assert changes["position"] == "sinusoidal" and name == "wpe.weight"
            continue
        expected = rows(named["transformer." + name].grad)
        distance = (torch.tensor(gradient) - expected).norm() / expected.norm()
        assert distance < 1e-3, name


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "relu", "position": "sinusoidal"}, {"loss": "squared_error", "n_layer": 1}],
    ids=str,
)
def test_gradients_equal_finite_differences(changes):
    worst = max_slope_error(reference, **changes)
    assert worst < 1e-6, worst


def max_slope_error(module, h=1e-5, every=1, **changes) -> float:
    """The largest |gradient - (loss(w + h) - loss(w - h)) / 2h| over all weights, or over one in `every`.

    Infinite if it is infinite or NaN for any of them.
    """
    model = random_model(module, **changes)
    model.learn(IDS)

    def loss() -> float:
        return model.loss(model.forward(IDS[:-1])[0], IDS[1:])[0]

    worst, count = 0.0, 0
    for name, weight in model.weights.items():
        if name == "wpe.weight" and not model.learned_positions:
            continue
        for row, gradients in zip(weight, model.gradients[name], strict=True):
            for i, value in enumerate(row):
                count += 1
                if count % every:
                    continue
                row[i] = value + h
                above = loss()
                row[i] = value - h
                slope = (above - loss()) / (2 * h)
                row[i] = value
                error = abs(gradients[i] - slope)
                if not math.isfinite(error):
                    return math.inf
                worst = max(worst, error)
    return worst


def test_one_gradient_that_is_nan_is_an_error():
    class NanGPT(reference.GPT):
        def learn(self, ids):
            loss = super().learn(ids)
            self.gradients["wte.weight"][0][0] = math.nan
            return loss

    assert max_slope_error(types.SimpleNamespace(GPT=NanGPT), n_layer=1) == math.inf


def test_ten_steps_of_adam_equal_torch():
    model = random_model()
    torch_model, adam = project_model(model), reference.Adam(model)
    torch_optimizer = torch.optim.Adam(torch_model.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    for _ in range(10):
        _, loss = torch_model(torch.tensor([IDS[:-1]]), torch.tensor([IDS[1:]]))
        assert model.learn(IDS) == pytest.approx(loss.item(), abs=1e-4)
        loss.backward()
        adam.step(1e-2)
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    assert loss.item() < 1.5  # the training reduced the loss


def test_greedy_generation_equals_the_model():
    model = random_model()
    torch_model = project_model(model)
    expected = IDS[:2]
    for _ in range(10):  # also beyond the block of 6: the last 6 are the context
        with torch.no_grad():
            expected = [*expected, int(torch_model(torch.tensor([expected[-6:]]))[0][0, -1].argmax())]
    assert model.generate(IDS[:2], 10, random.Random(1), temperature=1e-9) == expected


def test_loss_is_exact_if_a_probability_underflows():
    loss, p = reference.cross_entropy([[0.0, 2000.0], [3.0, 3.0]], [0, 1])
    assert loss == pytest.approx((2000 + math.log(2)) / 2) and p[0] == [0, 1]


def test_squared_error_training_learns_probabilities():
    """Token 1 follows token 0 three times of four, else token 2: the outputs become 3/4 and 1/4."""
    model = reference.GPT(3, 1, 1, 1, 4, loss="squared_error", seed=1)
    adam = reference.Adam(model)
    for step in range(300):
        model.learn([0, 2 if step % 4 == 3 else 1])
        if step % 4 == 3:
            adam.step(0.01)
    outputs = model.forward([0])[0][0]
    assert outputs == pytest.approx([0, 0.75, 0.25], abs=0.02)


def test_only_stdlib_imports_and_at_most_400_lines():
    source = FILE.read_text(encoding="utf-8")
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names <= set(sys.stdlib_module_names)
    assert len(source.splitlines()) <= 400


def run(*options, cwd):
    command = [sys.executable, str(FILE), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd, check=False)


def test_the_command_trains_on_a_text_and_generates(tmp_path):
    text = "a figura é poética. " * 30
    (tmp_path / "book.txt").write_text(text, encoding="utf-8-sig")  # with a byte-order mark, as on Windows
    result = run("--input=book.txt", "--steps=60", "--block=8", "--batch=4", "--write=40", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    by_frequency = float(re.search(r"by frequency ([\d.]+)", result.stdout).group(1))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)  ", result.stdout)]
    assert len(losses) == 3 and losses[-1] < by_frequency / 2
    assert "\ufeff" not in result.stdout and f"{len(set(text))} " in result.stdout
    assert "po" in result.stdout.splitlines()[-1]


def test_redirected_text_is_utf8_whatever_the_terminal_encodes(tmp_path):
    (tmp_path / "book.txt").write_text("é poética. " * 30, encoding="utf-8")
    command = [sys.executable, str(FILE), "--input=book.txt", "--steps=2", "--write=40"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, cwd=tmp_path, env=ascii_only, check=False)
    assert result.returncode == 0 and b"?" not in result.stdout
    assert set(result.stdout.decode("utf-8").splitlines()[-1]) <= set("é poética. ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input=none.txt"], "none.txt cannot be read"),
        (["--input=short.txt"], "short.txt has 3 characters, but --block 16 needs 17"),
        (["--input=latin.txt"], "cannot be read as UTF-8"),
        (["--input=short.txt", "--steps=0", "--batch=-1"], "--steps, --batch must be at least 1"),
        (["--input=long.txt", "--learning_rate=nan"], "--learning_rate nan must be above 0 and less than 10"),
        (["--input=short.txt", "--width=9"], "--width 9 must be even, and a multiple of --heads 2"),
    ],
)
def test_invalid_input_is_reported(options, message, tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "long.txt").write_text("abc" * 10)
    (tmp_path / "latin.txt").write_bytes("coração".encode("latin-1"))
    result = run(*options, cwd=tmp_path)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


def test_the_home_folder_in_input_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "short.txt").write_text("abc")
    result = run("--input=~/short.txt", cwd=tmp_path)
    assert "~/short.txt has 3 characters" in result.stderr


def test_a_wrong_sign_in_any_backward_pass_is_detected():
    """At least one of three kinds of model must detect each mutant."""
    cases = [{}, {"activation": "relu"}, {"loss": "squared_error"}]
    undetected, count = [], 0
    for description, source in mutants(FILE.read_text(encoding="utf-8")):
        module, count = module_from(source), count + 1
        if all(max_slope_error(module, every=11, n_layer=1, **case) < 1e-6 for case in cases):
            undetected.append(description)
    assert not undetected
    assert count >= 37
