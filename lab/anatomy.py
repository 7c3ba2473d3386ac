"""The modules of a model with their shapes, parameters and FLOPs, as a table and as a diagram.

    python -m lab.anatomy --out_dir=out/eca-char
    python -m lab.anatomy --init_from=gpt2 --batch=1 --tokens=1024

FLOPs are those of a forward pass: 2 for each weight of a matrix and token, and those of attention, as if
every token attended to all tokens of the context (the convention of PaLM, appendix B). The model is on the
"meta" device, which computes only shapes.

Shapes: B batch, T tokens.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from configurator import Resolved, setting
from fradique.training.logger import format_count
from lab import architecture_diagram, common
from lab.architecture_diagram import ModuleStats
from model import GPT, GPTConfig


@dataclass(frozen=True)
class AnatomySettings(common.ModelSettings):
    """python -m lab.anatomy --out_dir=out/<run> [--batch=12] [--tokens=256]"""

    batch: int = setting(1, "batch size", lo=1, group="input")
    tokens: int = setting(0, "tokens per row; 0: the model's block_size", lo=0)


# Compute


def module_stats(config: GPTConfig, batch: int, tokens: int) -> list[ModuleStats]:
    """The costs of every module for ids (batch, tokens), in the order of the forward pass.

    The first is the whole model. Raises ValueError if `tokens` is more than the block_size.
    """
    if tokens > config.block_size:
        raise ValueError(f"--tokens={tokens} is more than the block_size of this model, {config.block_size}")
    with torch.device("meta"):
        model = GPT(config).eval()
        ids = torch.zeros(batch, tokens, dtype=torch.long)
    shapes = output_shapes(model, ids)
    costs_by_path = own_costs(model, list(shapes), batch, tokens)
    stats = []
    for path, shape in shapes.items():
        prefix = f"{path}." if path else ""  # of the paths of its submodules
        costs = [cost for name, cost in costs_by_path.items() if name == path or name.startswith(prefix)]
        parameters = sum(cost.parameters for cost in costs)
        flops = sum(cost.flops for cost in costs)
        stats.append(ModuleStats(path, type(model.get_submodule(path)).__name__, shape, parameters, flops))
    return stats


def output_shapes(model: GPT, ids: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Module path -> shape of its output for ids (B, T), in the order of the forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}
    paths = {module: path for path, module in model.named_modules()}

    def before_forward(module: nn.Module, inputs: tuple) -> None:
        shapes[paths[module]] = ()  # a placeholder, so that a module comes before its submodules

    def after_forward(module: nn.Module, inputs: tuple, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        shapes[paths[module]] = tuple(first.shape)

    for module in model.modules():
        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward)
    model(ids, targets=ids)
    return shapes


class Cost(NamedTuple):
    """The cost of a module without its submodules."""

    parameters: int
    flops: int


def own_costs(model: GPT, paths: Sequence[str], batch: int, tokens: int) -> dict[str, Cost]:
    """Module path -> cost of the module without its submodules.

    Shared parameters count only in the first module that has them.
    """
    counted: set[nn.Parameter] = set()
    costs = {}
    for path in paths:
        module = model.get_submodule(path)
        new = {p for p in module.parameters(recurse=False) if p not in counted}
        counted |= new
        costs[path] = Cost(sum(p.numel() for p in new), own_flops(module, model.config, batch, tokens))
    return costs


def own_flops(module: nn.Module, config: GPTConfig, batch: int, tokens: int) -> int:
    """FLOPs of a module's forward pass without its submodules."""
    if isinstance(module, nn.Linear):
        return 2 * batch * tokens * module.weight.numel()
    if type(module).__name__ == "CausalSelfAttention":
        context = min(tokens, config.sliding_window or tokens)
        return 4 * batch * tokens * context * config.n_embd  # 2 for q kᵀ, 2 for weights times v
    return 0


# Print


def format_table(stats: Sequence[ModuleStats]) -> str:
    """A line for each module, indented by depth. Only the first of the identical layers is shown."""
    total = stats[0]
    rows = [("module", "output", "parameters", "", "FLOPs", "")]
    for module, count in merge_layers(stats):
        name = module.path.rsplit(".", 1)[-1] or "GPT"
        name = f"{name} (and {count - 1} identical)" if count > 1 else name
        rows.append(
            (
                f"{'  ' * module.depth}{name}: {module.kind}",
                " x ".join(map(str, module.shape)),
                format_count(module.parameters),
                f"{module.parameters / total.parameters:.1%}",
                format_count(module.flops) if module.flops else "",
                f"{module.flops / total.flops:.1%}" if module.flops else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, shape, *numbers in rows:
        cells = [name.ljust(widths[0]), shape.ljust(widths[1])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def merge_layers(stats: Sequence[ModuleStats]) -> list[tuple[ModuleStats, int]]:
    """(module, count) for each module, without the layers after the first and their submodules.

    The count is the number of layers for the first layer, and 1 for all other modules.
    """
    layers = [module.path for module in stats if module.kind == "Block"]
    omitted = tuple(f"{path}." for path in layers[1:])  # with a dot: "h.1." is no prefix of "h.10."
    merged = []
    for module in stats:
        if not f"{module.path}.".startswith(omitted):
            merged.append((module, len(layers) if module.path == layers[0] else 1))
    return merged


def main(resolved: Resolved[AnatomySettings]) -> int:
    settings = resolved.settings
    config = common.open_model(settings).model.config
    tokens = settings.tokens or config.block_size
    stats = module_stats(config, settings.batch, tokens)
    print(format_table(stats))
    path = common.add_extension(common.output_path(settings, "anatomy"), ".svg")
    svg = architecture_diagram.draw_svg(stats, config, settings.batch, tokens)
    common.write_output(path, lambda temporary: temporary.write_text(svg, encoding="utf-8", newline="\n"))
    columns = ("path", "parameters", "flops")
    arrays = {column: np.array([getattr(module, column) for module in stats]) for column in columns}
    common.save_arrays(settings.save_arrays, arrays)
    return 0


if __name__ == "__main__":
    sys.exit(common.command(main, AnatomySettings))
