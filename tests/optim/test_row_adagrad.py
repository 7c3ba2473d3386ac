"""Adagrad for rows of a table: against its formula, with sparse and dense gradients, and in training."""

import numpy as np
import pytest
import torch
from architectures import ids, small

from fradique.optim import optimizer
from fradique.optim.row_adagrad import RowAdagrad
from model import GPT

MODEL = {"ngram_max": 3, "ngram_rows": 40, "bias": False}


def build(model, name="adamw"):
    return optimizer.build_optimizers(
        model, name=name, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1
    )


@pytest.mark.parametrize("sparse", [True, False])
def test_steps_equal_the_formula(sparse):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(6, 4))
    table = torch.nn.Parameter(torch.tensor(start))
    opt = RowAdagrad([("table", table)], lr=0.1)
    expected, sums = start.copy(), np.zeros(6)
    for rows in ([1, 3, 3], [3, 5], [1, 1, 1]):
        gradients = rng.normal(size=(len(rows), 4))
        grad = torch.sparse_coo_tensor([rows], torch.tensor(gradients), (6, 4), check_invariants=True)
        table.grad = grad if sparse else grad.to_dense()
        opt.step()
        for row in set(rows):
            g = gradients[[r == row for r in rows]].sum(0)
            sums[row] += np.mean(g * g)
            expected[row] -= 0.1 * g / np.sqrt(sums[row])
    np.testing.assert_allclose(table.detach(), expected, atol=1e-12)
    assert np.array_equal(expected[[0, 2, 4]], start[[0, 2, 4]])


def test_a_gradient_of_zero_changes_nothing():
    table = torch.nn.Parameter(torch.ones(3, 2))
    opt = RowAdagrad([("table", table)], lr=0.1)
    for grad in (
        torch.zeros(3, 2),
        torch.sparse_coo_tensor([[1]], torch.zeros(1, 2), (3, 2), check_invariants=True),
    ):
        table.grad = grad
        opt.step()
        assert torch.equal(table, torch.ones(3, 2))


def train_steps(model, optimizers, steps, name):
    """Returns the losses."""
    losses = []
    for step in range(steps):
        idx = ids(4, 16, seed=step % 3)
        loss = model(idx, idx.roll(-1, 1))[1]
        loss.backward()
        optimizer.assign_gradients(optimizers)
        optimizer.clip_gradients(model, 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sparse_and_dense_gradients_train_equally(name):
    losses = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = GPT(small(**MODEL))
        model.transformer["ngrams"].sparse_grad = sparse
        optimizers = build(model, name)
        assert isinstance(optimizers[-1], RowAdagrad)
        losses.append(train_steps(model, optimizers, 12, name))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.2


def test_the_table_is_the_only_parameter_of_its_optimizer():
    model = GPT(small(**MODEL))
    *others, table = build(model)
    assert table.param_groups[0]["param_names"] == ["transformer.ngrams.weight"]
    names = [name for opt in others for group in opt.param_groups for name in group["param_names"]]
    assert sorted([*names, "transformer.ngrams.weight"]) == sorted(n for n, _ in model.named_parameters())
    assert table.param_groups[0]["lr"] == pytest.approx(4e-2)


def test_the_norm_of_the_gradients_is_without_the_table():
    model = GPT(small(**MODEL))
    idx = ids(2, 16)
    model(idx, idx)[1].backward()
    others = [p.grad for n, p in model.named_parameters() if "ngrams" not in n]
    before = model.transformer["ngrams"].weight.grad.to_dense().clone()
    norm = optimizer.clip_gradients(model, 1e-3)
    assert norm.item() == pytest.approx(
        torch.nn.utils.get_total_norm(others).item() / 1e-3 * norm.item(), rel=1e-3
    )
    assert torch.equal(model.transformer["ngrams"].weight.grad.to_dense(), before)


def test_training_continues_identically_with_loaded_state():
    runs = []
    for restart in (False, True):
        torch.manual_seed(0)
        model = GPT(small(**MODEL))
        optimizers = build(model)
        train_steps(model, optimizers, 5, "adamw")
        if restart:
            state = {key: value.clone() for key, value in optimizer.state_by_name(optimizers).items()}
            assert state["sum/transformer.ngrams.weight"].shape == (80,)
            optimizers = build(model)
            empty = optimizer.empty_state(optimizers, state)
            assert {key: value.shape for key, value in empty.items()} == {
                k: v.shape for k, v in state.items()
            }
            optimizer.load_state_by_name(optimizers, state)
        runs.append(train_steps(model, optimizers, 5, "adamw"))
    assert runs[0] == runs[1]


def test_a_damaged_state_is_reported():
    model = GPT(small(**MODEL))
    optimizers = build(model)
    train_steps(model, optimizers, 1, "adamw")
    state = optimizer.state_by_name(optimizers)
    state["sum/transformer.ngrams.weight"] = torch.zeros(80, 32)
    with pytest.raises(
        ValueError, match=r"sum/transformer.ngrams.weight has shape \(80, 32\), expected \(80,\)"
    ):
        optimizer.load_state_by_name(optimizers, state)
