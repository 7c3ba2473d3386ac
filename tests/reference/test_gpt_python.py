"""reference/gpt_python.py against the model under autograd, finite differences, and wrong signs."""

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
IDS = [3, 1, 4, 1, 5, 9, 2]  # six tokens to read, each with the next to foretell; one occurs twice


def written(source: str) -> types.ModuleType:
    module = types.ModuleType("gpt_python")
    exec(compile(source, str(FILE), "exec"), module.__dict__)
    return module


reference = written(FILE.read_text(encoding="utf-8"))


def make(module=reference, **changes):
    """A model whose weights are all large enough to matter, the biases and norms too."""
    model, rng = module.GPT(**SHAPE | changes), random.Random(7)
    for weight in model.weights.values():
        for row in weight:
            row[:] = [value + rng.gauss(0, 0.3) for value in row]
    return model


def twin(model, **changes) -> GPT:
    """The same weights in the project's own model."""
    ours = GPT(GPTConfig(**SHAPE, bias=True, **changes))
    state = {}
    for name, weight in model.weights.items():
        tensor = torch.tensor(weight)
        state["transformer." + name] = tensor[0] if len(weight) == 1 else tensor
    state["lm_head.weight"] = state["transformer.wte.weight"]
    if "position" in changes:
        del state["transformer.wpe.weight"]
    ours.load_state_dict(state)
    return ours


def rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None] if tensor.ndim == 1 else tensor


@pytest.mark.parametrize("changes", [{}, {"activation": "relu"}, {"position": "sinusoidal"}], ids=str)
def test_logits_loss_and_every_gradient_are_those_of_the_model(changes):
    model = make(**changes)
    ours = twin(model, **changes)
    logits, loss = ours(torch.tensor([IDS[:-1]]), torch.tensor([IDS[1:]]))
    loss.backward()
    assert model.learn(IDS) == pytest.approx(loss.item(), abs=1e-5)
    assert torch.tensor(model.forward(IDS[:-1])[0]) == pytest.approx(logits[0].detach(), abs=1e-4)
    named = dict(ours.named_parameters())
    for name, gradient in model.gradients.items():
        if "transformer." + name not in named:
            assert changes["position"] == "sinusoidal" and name == "wpe.weight"
            continue
        theirs = rows(named["transformer." + name].grad)
        apart = (torch.tensor(gradient) - theirs).norm() / theirs.norm()
        assert apart < 1e-3, name


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "relu", "position": "sinusoidal"}, {"loss": "squared_error", "n_layer": 1}],
    ids=str,
)
def test_every_gradient_is_the_slope_that_finite_differences_find(changes):
    worst = farthest_from_the_slopes(reference, **changes)
    assert worst < 1e-6, worst


def farthest_from_the_slopes(module, h=1e-5, among=1, **changes) -> float:
    """The largest difference between a gradient and (loss(w + h) - loss(w - h)) / 2h, of every weight (or of
    one `among` so many)."""
    model = make(module, **changes)
    model.learn(IDS)

    def loss() -> float:
        return model.loss(model.forward(IDS[:-1])[0], IDS[1:])[0]

    worst, count = 0.0, 0
    for name, weight in model.weights.items():
        if name == "wpe.weight" and not model.learned:
            continue
        for row, gradients in zip(weight, model.gradients[name], strict=True):
            for i, value in enumerate(row):
                count += 1
                if count % among:
                    continue
                row[i] = value + h
                above = loss()
                row[i] = value - h
                slope = (above - loss()) / (2 * h)
                row[i] = value
                if not abs(gradients[i] - slope) <= worst:  # not a number counts as far
                    worst = abs(gradients[i] - slope)
    return worst


def test_ten_steps_of_adam_follow_torch():
    model = make()
    ours, adam = twin(model), reference.Adam(model)
    torchs = torch.optim.Adam(ours.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    for _ in range(10):
        _, loss = ours(torch.tensor([IDS[:-1]]), torch.tensor([IDS[1:]]))
        assert model.learn(IDS) == pytest.approx(loss.item(), abs=1e-4)
        loss.backward()
        adam.step(1e-2)
        torchs.step()
        torchs.zero_grad()
    assert loss.item() < 1.5  # it did learn


def test_it_writes_what_the_model_writes():
    model = make()
    ours = twin(model)
    expected = IDS[:2]
    for _ in range(10):  # past the block of 6 too: it reads the last 6
        with torch.no_grad():
            expected = [*expected, int(ours(torch.tensor([expected[-6:]]))[0][0, -1].argmax())]
    assert model.write(IDS[:2], 10, random.Random(1), temperature=1e-9) == expected


def test_a_loss_is_right_where_a_probability_is_too_small_for_a_float():
    loss, p = reference.cross_entropy([[0.0, 2000.0], [3.0, 3.0]], [0, 1])
    assert loss == pytest.approx((2000 + math.log(2)) / 2) and p[0] == [0, 1]


def test_probabilities_are_learnt_with_the_squared_error_too():
    """After 0 comes 1 three times of four, and else 2: outputs that are no softmax find 3/4 and 1/4."""
    model = reference.GPT(3, 1, 1, 1, 4, loss="squared_error", seed=1)
    adam = reference.Adam(model)
    for step in range(300):
        model.learn([0, 2 if step % 4 == 3 else 1])
        if step % 4 == 3:
            adam.step(0.01)
    outputs = model.forward([0])[0][0]
    assert outputs == pytest.approx([0, 0.75, 0.25], abs=0.02)


def test_it_imports_the_standard_library_alone_and_is_read_in_one_sitting():
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


def test_the_command_learns_a_text_before_ones_eyes(tmp_path):
    (tmp_path / "book.txt").write_text("a figura é poética. " * 30, encoding="utf-8")
    result = run("--input=book.txt", "--steps=60", "--block=8", "--batch=4", "--write=40", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    by_frequency = float(re.search(r"by frequency ([\d.]+)", result.stdout).group(1))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)  ", result.stdout)]
    assert len(losses) == 3 and losses[-1] < by_frequency / 2
    assert "po" in result.stdout.splitlines()[-1]


def test_what_a_terminal_cannot_show_does_not_end_it_with_an_error(tmp_path):
    (tmp_path / "book.txt").write_text("é poética. " * 30, encoding="utf-8")
    command = [sys.executable, str(FILE), "--input=book.txt", "--steps=2", "--write=40"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, cwd=tmp_path, env=ascii_only, check=False)
    assert result.returncode == 0 and b"?" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--input=none.txt"], "none.txt cannot be read"),
        (["--input=short.txt"], "short.txt has 3 characters; --block 16 needs 17"),
        (["--input=latin.txt"], "cannot be read as UTF-8"),
        (["--input=short.txt", "--steps=0", "--batch=-1"], "--steps, --batch must be at least 1"),
        (["--input=long.txt", "--learning_rate=nan"], "--learning_rate nan must be above 0 and less than 10"),
        (["--input=short.txt", "--width=9"], "--width 9 must be even, and a multiple of --heads 2"),
    ],
)
def test_bad_input_gets_a_message(options, words, tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "long.txt").write_text("abc" * 10)
    (tmp_path / "latin.txt").write_bytes("coração".encode("latin-1"))
    result = run(*options, cwd=tmp_path)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


def test_a_wrong_sign_in_any_backward_pass_is_noticed():
    """Each mutant by itself, in three kinds of model: one of them must see it."""
    cases = [{}, {"activation": "relu"}, {"loss": "squared_error"}]
    unseen, count = [], 0
    for what, source in mutants(FILE.read_text(encoding="utf-8")):
        module, count = written(source), count + 1
        if all(farthest_from_the_slopes(module, among=11, n_layer=1, **case) < 1e-6 for case in cases):
            unseen.append(what)
    assert not unseen
    assert count >= 37
