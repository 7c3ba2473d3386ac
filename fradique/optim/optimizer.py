"""Parameter groups, AdamW, Muon, and optimizer state under the names of the parameters."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fradique.distributed import process_group
from fradique.nn.linear import Linear
from fradique.optim.muon import Muon, split_matrix

OPTIMIZERS = ("adamw", "muon")
CLIP_EPS = 1e-6  # torch's: what it adds to the norm
LARGE_TENSOR, NORM_ROWS = 1 << 18, 8  # numbers of a tensor whose norm is found in rows, and how many rows


def build_optimizers(
    model: nn.Module,
    *,
    name: str = "adamw",
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    muon_learning_rate: float = 0.02,
    muon_momentum: float = 0.95,
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019), fused where torch has it for the model's device; before it, where
    `name` is "muon", Muon for the matrices inside the blocks.

    Frozen parameters are left out. Raises ValueError where all of them are.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("every parameter is frozen: there is nothing to train")
    matrices = {n: p for n, p in trained.items() if name == "muon" and is_block_parameter(n) and p.dim() == 2}
    rest = {n: p for n, p in trained.items() if n not in matrices}
    found: list[torch.optim.Optimizer] = []
    if matrices:
        rows = {
            f"{n}.weight": module.row_splits for n, module in model.named_modules() if isinstance(module, Linear)
        }
        parts = [part for n, p in matrices.items() for part in split_matrix(n, p, rows.get(n, (p.size(0),)))]
        found.append(Muon(parts, lr=muon_learning_rate, momentum=muon_momentum, weight_decay=weight_decay))
    if rest:
        fused = next(iter(rest.values())).device.type in ("cpu", "cuda", "mps")
        groups = parameter_groups(rest, weight_decay)
        found.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused))
    for one in found:
        for group in one.param_groups:
            group["lr_ratio"] = group["lr"] / learning_rate
    return found


def parameter_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and norm gains do not (nanoGPT's groups)."""
    groups = [
        {"params": [(n, p) for n, p in parameters.items() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in parameters.items() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_block_parameter(name: str) -> bool:
    """Whether a parameter is one of a layer's, and no embedding or output layer."""
    return ".h." in name


STATE_FIELDS = {torch.optim.AdamW: {"exp_avg", "exp_avg_sq", "step"}, Muon: {"momentum_buffer"}}


def assign_gradients(optimizers: list[torch.optim.Optimizer]) -> None:
    """Show every optimizer the gradients of the model: to be called after the backward pass."""
    for one in optimizers:
        if isinstance(one, Muon):
            one.find_gradients()


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale the gradients so that their norm is at most `largest` (0: whatever it is); the norm before, a
    scalar.

    As torch's clip_grad_norm_, which multiplies by 1 where there is nothing to scale; a CPU can look first.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = _norm([p.grad for p in parameters])
    if largest and (norm.device.type != "cpu" or not norm + CLIP_EPS <= largest):
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def _norm(tensors: list[Tensor]) -> Tensor:
    """That of all their numbers. A CPU takes those of a large tensor in rows: of a whole one, torch finds it
    on a single thread."""
    rows = {
        i: x.view(NORM_ROWS, -1)
        for i, x in enumerate(tensors)
        if x.device.type == "cpu" and x.numel() >= LARGE_TENSOR and x.numel() % NORM_ROWS == 0 and _plain(x)
    }
    norms = [torch.linalg.vector_norm(x, dim=1) for x in rows.values()]
    rest = [x for i, x in enumerate(tensors) if i not in rows]
    return process_group.full_tensor(nn.utils.get_total_norm(norms + rest))


def _plain(x: Tensor) -> bool:
    """Whether a tensor's numbers lie one after another in this process."""
    return x.is_contiguous() and process_group.local_tensor(x) is x


def set_learning_rate(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    """AdamW's; Muon's stays in proportion to it."""
    for one in optimizers:
        for group in one.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]


def _names(optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in the order in which torch numbers them."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def state_by_name(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' tensors as `<field>/<parameter>`: a flat dict that safetensors can hold."""
    return {
        f"{field}/{name}": value
        for one in optimizers
        for name, entry in zip(_names(one), _entries(one), strict=True)
        for field, value in entry.items()
    }


def _entries(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The state of each parameter, in torch's order; empty before the first step."""
    return [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]


def empty_state(optimizers: list[torch.optim.Optimizer], names: Iterable[str]) -> dict[str, Tensor]:
    """Zeros to be filled by the tensors that `names` stand for, as `state_by_name` has them: each rank's
    part, where the model is in parts. `load_state_by_name` refuses names that mean nothing here."""
    parameters = dict(pair for one in optimizers for pair in _parameters(one))
    found = {}
    for key in names:
        field, _, name = key.partition("/")
        p = parameters.get(name)
        found[key] = torch.zeros(()) if p is None or field == "step" else torch.zeros_like(p)
    return found


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def check_state(entry: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    """Raise ValueError where what is kept of a parameter has not its shape, or holds no finite numbers."""
    for field, value in entry.items():
        shape = () if field == "step" else parameter.shape
        if (
            value.shape != shape
            or not value.is_floating_point()
            or not process_group.local_tensor(value).isfinite().all()
        ):
            raise ValueError(f"the optimizer state is damaged: {field}/{name}; use an earlier checkpoint")


def load_state_by_name(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """The inverse of `state_by_name`. Raises ValueError naming the parameters whose state is not there."""
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        field, _, name = key.partition("/")
        entries.setdefault(name, {})[field] = value
    known = {name: STATE_FIELDS[type(one)] for one in optimizers for name in _names(one)}
    complete = {name for name, entry in entries.items() if known.get(name, set()) <= entry.keys()}
    missing = sorted(set(known) - complete) if tensors else []
    strangers = sorted(set(entries) - set(known))
    if missing or strangers:
        raise ValueError(
            "the optimizer state does not fit the model: "
            + "; ".join(
                f"{what}: {', '.join(which)}"
                for what, which in (("missing", missing), ("not in the model", strangers))
                if which
            )
            + ". optimizer, freeze and lora_* must be those of the run; to change them, begin a new one with "
            "--init_from=<its folder>"
        )
    for one in optimizers:
        for name, parameter in _parameters(one):
            check_state(entries.get(name, {}), name, parameter)
        saved, names = one.state_dict(), _names(one)
        saved["state"] = {i: entries[name] for i, name in enumerate(names) if name in entries}
        one.load_state_dict(saved)
