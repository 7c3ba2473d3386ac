"""AdamW and Muon for a model, gradient clipping, and optimizer state by parameter name."""

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from fradique.distributed import process_group
from fradique.nn.linear import Linear
from fradique.optim.muon import Muon, split_matrix
from fradique.optim.row_adagrad import RowAdagrad

OPTIMIZERS = ("adamw", "muon")
STATE_FIELDS = {
    torch.optim.AdamW: {"exp_avg", "exp_avg_sq", "step"},
    Muon: {"momentum_buffer"},
    RowAdagrad: {"sum"},
}
SCALAR_FIELDS, ROW_FIELDS = {"step"}, {"sum"}  # all other fields have the shape of the parameter
# RowAdagrad's learning rate to AdamW's. Bits per byte of machado_char after 1,000 steps with a ratio of 2,
# 4 and 8: 2.080, 2.067 and 2.070.
NGRAM_LR_RATIO = 4.0
CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm
MIN_CHUNKED_NUMEL, NORM_CHUNKS = 1 << 18, 8  # see _norm


def build_optimizers(
    model: nn.Module,
    *,
    name: str = "adamw",
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    muon_learning_rate: float = 0.02,
    muon_momentum: float = 0.95,
    warn: Callable[[str], None] = warnings.warn,
) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: [AdamW], or [Muon, AdamW] with Muon for the matrices in the blocks.

    A table of n-grams has its own, RowAdagrad, which comes last. AdamW (Loshchilov & Hutter 2019) is fused on
    cpu, cuda and mps, unless `fused_adamw_problem` finds that this does not work; `warn` is then called once.
    Frozen parameters are left out. Raises ValueError if all are frozen.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("every parameter is frozen: there is nothing to train")
    tables = {n: p for n, p in trainable.items() if is_ngram_table(n)}
    muon_parameters = {}
    if name == "muon":
        muon_parameters = {n: p for n, p in trainable.items() if is_block_parameter(n) and p.dim() == 2}
    adamw_parameters = {n: p for n, p in trainable.items() if n not in tables and n not in muon_parameters}
    optimizers: list[torch.optim.Optimizer] = []
    if muon_parameters:
        # c_attn stacks the matrices of q, k and v in one weight; Muon must update each matrix on its own
        linears = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Linear)}
        splits = {
            n: linears[n].row_splits if n in linears else (p.size(0),) for n, p in muon_parameters.items()
        }
        views = [view for n, p in muon_parameters.items() for view in split_matrix(n, p, splits[n])]
        optimizers.append(
            Muon(views, lr=muon_learning_rate, momentum=muon_momentum, weight_decay=weight_decay)
        )
    if adamw_parameters:
        device = next(iter(adamw_parameters.values())).device
        fused = device.type in ("cpu", "cuda", "mps")
        if fused and (problem := fused_adamw_problem(device)):
            warn(f"fused AdamW does not work on {device} ({problem}); continuing with torch's plain AdamW")
            fused = False
        groups = parameter_groups(adamw_parameters, weight_decay)
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused))
    if tables:
        optimizers.append(RowAdagrad(list(tables.items()), lr=NGRAM_LR_RATIO * learning_rate))
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr_ratio"] = group["lr"] / learning_rate  # for set_learning_rate
    return optimizers


def fused_adamw_problem(device: torch.device) -> str | None:
    """Why fused AdamW cannot be used on a device; None if it works.

    Two steps of the fused kernel on a small tensor are compared with torch's loop over the tensors. An error
    that makes the whole CUDA context unusable is not found here: the next CUDA call raises it again.
    """

    def two_steps(fused: bool) -> Tensor:
        weight = nn.Parameter(torch.linspace(-1.0, 1.0, 48, device=device))
        foreach = None if fused else False
        opt = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.95), fused=fused, foreach=foreach)
        for scale in (1.0, -0.5):
            weight.grad = torch.linspace(-2.0, 3.0, 48, device=device) * scale
            opt.step()
        return weight.detach()

    try:
        actual = two_steps(fused=True)
    except RuntimeError as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if not torch.allclose(actual, two_steps(fused=False), rtol=1e-4, atol=1e-6):  # NaN is not close
        return "its result differs from that of plain AdamW"
    return None


def parameter_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """nanoGPT's groups: weight decay for matrices and embeddings, none for biases and norm weights."""
    groups = [
        {"params": [(n, p) for n, p in parameters.items() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in parameters.items() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_ngram_table(name: str) -> bool:
    """Whether the parameter is the table of NgramEmbedding, whose gradient may be sparse."""
    return name.endswith(".ngrams.weight")


def is_block_parameter(name: str) -> bool:
    """Whether the parameter is inside a transformer block."""
    return ".h." in name  # the blocks are transformer.h.<layer>


def assign_gradients(optimizers: list[torch.optim.Optimizer]) -> None:
    """Point the .grad of each of Muon's views at its rows of the parameter's .grad.

    Autograd fills only the gradients of parameters. Call this after the backward pass, before unscaling.
    """
    for opt in optimizers:
        if isinstance(opt, Muon):
            opt.assign_gradients()


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most `max_norm` (0: no clipping). Returns the norm before clipping.

    Tables of n-grams are left out: the steps of RowAdagrad do not depend on the size of gradients. Otherwise
    the same result as torch.nn.utils.clip_grad_norm_. On a CPU the multiplication by 1 is skipped if no
    clipping is needed; on a GPU, finding that out would force a synchronization.
    """
    named = model.named_parameters()
    parameters = [p for name, p in named if p.grad is not None and not is_ngram_table(name)]
    norm = _norm([p.grad for p in parameters])
    if max_norm and (norm.device.type != "cpu" or not norm + CLIP_EPS <= max_norm):  # also if norm is NaN
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm over all elements of all tensors.

    On a CPU torch computes the norm of one tensor in one thread. A large tensor is therefore viewed as
    NORM_CHUNKS equal chunks, whose norms are computed in parallel: the norm of these norms is the same.
    """
    chunked = {
        i: x.view(NORM_CHUNKS, -1)
        for i, x in enumerate(tensors)
        if x.device.type == "cpu"
        and x.numel() >= MIN_CHUNKED_NUMEL
        and x.numel() % NORM_CHUNKS == 0
        and _is_contiguous_and_local(x)
    }
    norms = [torch.linalg.vector_norm(x, dim=1) for x in chunked.values()]
    whole_tensors = [x for i, x in enumerate(tensors) if i not in chunked]
    return process_group.full_tensor(nn.utils.get_total_norm(norms + whole_tensors))


def _is_contiguous_and_local(x: Tensor) -> bool:
    """Whether a tensor is contiguous and not sharded."""
    return x.is_contiguous() and process_group.local_tensor(x) is x


def set_learning_rate(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    """Set AdamW's learning rate, and scale Muon's by the same factor."""
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]


# State by parameter name


def state_by_name(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of all optimizers as {"<field>/<parameter>": tensor}, which safetensors can store.

    Empty before the first step.
    """
    return {
        f"{field}/{name}": value
        for opt in optimizers
        for name, parameter in _named_parameters(opt)
        for field, value in opt.state.get(parameter, {}).items()
    }


def empty_state(optimizers: list[torch.optim.Optimizer], keys: Iterable[str]) -> dict[str, Tensor]:
    """Zeros with the keys of `state_by_name`, to read a checkpoint into; sharded like the parameters.

    Keys of unknown parameters get a scalar: `load_state_by_name` will report them.
    """
    parameters = dict(pair for opt in optimizers for pair in _named_parameters(opt))
    state = {}
    for key in keys:
        field, _, name = key.partition("/")
        p = parameters.get(name)
        if p is None or field in SCALAR_FIELDS:
            state[key] = torch.zeros(())
        else:
            state[key] = p.new_zeros(p.size(0)) if field in ROW_FIELDS else torch.zeros_like(p)
    return state


def load_state_by_name(optimizers: list[torch.optim.Optimizer], state: dict[str, Tensor]) -> None:
    """The inverse of `state_by_name`.

    Raises ValueError naming parameters that are missing or unknown, and tensors that are damaged; nothing is
    loaded then.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        field, _, name = key.partition("/")
        by_parameter.setdefault(name, {})[field] = value
    _check_names(optimizers, by_parameter)
    for opt in optimizers:
        for name, parameter in _named_parameters(opt):
            _check_tensors(by_parameter.get(name, {}), name, parameter)
    for opt in optimizers:
        names = [name for name, _ in _named_parameters(opt)]
        state_dict = opt.state_dict()  # torch numbers the parameters in the order of the groups
        state_dict["state"] = {i: by_parameter[name] for i, name in enumerate(names) if name in by_parameter}
        opt.load_state_dict(state_dict)


def _named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The parameters of an optimizer with their names, in torch's order."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _check_names(optimizers: list[torch.optim.Optimizer], by_parameter: dict[str, dict[str, Tensor]]) -> None:
    """Raise ValueError unless the state covers exactly the optimizers' parameters, or is empty."""
    if not by_parameter:  # a checkpoint from before the first step
        return
    expected = {name: STATE_FIELDS[type(opt)] for opt in optimizers for name, _ in _named_parameters(opt)}
    missing = sorted(name for name, keys in expected.items() if not keys <= by_parameter.get(name, {}).keys())
    unknown = sorted(by_parameter.keys() - expected.keys())
    if missing or unknown:
        problems = (("missing", missing), ("not in the model", unknown))
        raise ValueError(
            "the optimizer state does not fit the model: "
            + "; ".join(f"{problem}: {', '.join(names)}" for problem, names in problems if names)
            + ". optimizer, freeze and lora_* cannot be changed when a run is resumed. To change them, start "
            "a new run with --init_from=<folder of this run>"
        )


def _check_tensors(entry: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    """Raise ValueError if a tensor of a parameter's state has the wrong shape, or is not finite floats."""
    for field, value in entry.items():
        shape = torch.Size() if field in SCALAR_FIELDS else parameter.shape
        shape = shape[:1] if field in ROW_FIELDS else shape
        if value.shape != shape:
            problem = f"has shape {tuple(value.shape)}, expected {tuple(shape)}"
        elif not value.is_floating_point():
            problem = f"has dtype {value.dtype}, expected floating point"
        elif not process_group.local_tensor(value).isfinite().all():
            problem = "contains inf or nan"
        else:
            continue
        raise ValueError(
            f"the optimizer state is damaged: {field}/{name} {problem}; use an earlier checkpoint"
        )
