"""Parameter groups, AdamW, Muon, and optimizer state under the names of the parameters."""

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "muon")


def parameter_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and norm gains do not (nanoGPT's groups)."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build(
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
    `name` is "muon", Muon (Jordan et al. 2024) for the matrices inside the blocks.

    Frozen parameters are left out. Raises ValueError where all of them are.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("every parameter is frozen: there is nothing to train")
    matrices = {n: p for n, p in trained.items() if name == "muon" and in_a_block(n) and p.dim() == 2}
    rest = [p for n, p in trained.items() if n not in matrices]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(
            torch.optim.Muon(
                matrices.values(),
                lr=muon_learning_rate,
                momentum=muon_momentum,
                weight_decay=weight_decay,
            )
        )
    if rest:
        fused = rest[0].device.type in ("cpu", "cuda", "mps")
        groups = parameter_groups(rest, weight_decay)
        found.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused))
    for one in found:
        for group in one.param_groups:
            group["lr_ratio"] = group["lr"] / learning_rate
    return found


def in_a_block(name: str) -> bool:
    """Whether a parameter is one of a layer's, and no embedding or output layer."""
    return ".h." in name


def set_learning_rate(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    """AdamW's; Muon's stays in proportion to it."""
    for one in optimizers:
        for group in one.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in the order in which torch numbers them."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]


def state_by_name(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' tensors as `<field>/<parameter>`: a flat dict that safetensors can hold."""
    return {
        f"{field}/{name}": value
        for one in optimizers
        for name, entry in zip(_names(model, one), _entries(one), strict=True)
        for field, value in entry.items()
    }


def _entries(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The state of each parameter, in torch's order; empty before the first step."""
    return [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]


def load_state_by_name(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """The inverse of `state_by_name`. Raises ValueError naming the parameters whose state is not there."""
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        field, _, name = key.partition("/")
        entries.setdefault(name, {})[field] = value
    known = [name for one in optimizers for name in _names(model, one)]
    missing = sorted(set(known) - set(entries)) if tensors else []
    strangers = sorted(set(entries) - set(known))
    if missing or strangers:
        raise ValueError(
            "the optimizer state does not fit the model: "
            + "; ".join(
                f"{what}: {', '.join(which)}"
                for what, which in (("missing", missing), ("not in the model", strangers))
                if which
            )
        )
    for one in optimizers:
        saved, names = one.state_dict(), _names(model, one)
        saved["state"] = {i: entries[name] for i, name in enumerate(names) if name in entries}
        one.load_state_dict(saved)
