"""Parameter groups, AdamW, and optimizer state under the names of the parameters."""

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and norm gains do not (nanoGPT's groups)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def build(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused where torch has it for the model's device."""
    device = next(model.parameters()).device.type
    groups = [g for g in parameter_groups(model, weight_decay) if g["params"]]
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=betas, eps=1e-8, fused=device in ("cpu", "cuda", "mps")
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in the order in which torch numbers them."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `<field>/<parameter>`: a flat dict that safetensors can hold."""
    names, state = _names(model, optimizer), optimizer.state_dict()["state"]
    return {f"{field}/{names[i]}": value for i, entry in state.items() for field, value in entry.items()}


def load_state_by_name(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `state_by_name`. Raises ValueError naming the parameters whose state is not there."""
    names = _names(model, optimizer)
    state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(names))}
    number = {name: i for i, name in enumerate(names)}
    strangers = []
    for key, value in tensors.items():
        field, _, name = key.partition("/")
        if name in number:
            state[number[name]][field] = value.clone()  # not the mapped file of the checkpoint
        else:
            strangers.append(name)
    missing = [names[i] for i, entry in state.items() if not entry] if tensors else []
    if missing or strangers:
        raise ValueError(
            "the optimizer state does not fit the model: "
            + "; ".join(
                f"{what}: {', '.join(sorted(set(which)))}"
                for what, which in (("missing", missing), ("not in the model", strangers))
                if which
            )
        )
    saved = optimizer.state_dict()
    saved["state"] = {i: entry for i, entry in state.items() if entry}
    optimizer.load_state_dict(saved)
