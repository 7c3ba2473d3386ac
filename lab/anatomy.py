"""What a model is made of: its parts with their shapes, parameters and work, as text and as a drawing.

    python -m lab.anatomy --out_dir=out/eca-char
    python -m lab.anatomy --init_from=gpt2 --batch=1 --tokens=1024

FLOPs are those of a forward pass: two for each weight that a token is multiplied by, and those of attention
as if every token saw all others (the convention of PaLM, appendix B). No weight is computed with.

Shapes: B batch, T tokens.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from torch import nn

from configurator import Resolved, command, setting
from fradique.training.logger import format_count
from fradique.training.loss_plot import COLORS
from lab import common
from model import GPT, GPTConfig


@dataclass(frozen=True)
class AnatomySettings(common.LookSettings):
    """python -m lab.anatomy --out_dir=out/<run> [--batch=12] [--tokens=256]"""

    batch: int = setting(1, "rows that go through it", lo=1, group="what goes through")
    tokens: int = setting(0, "their length; 0: a whole block", lo=0)


# Compute


@dataclass(frozen=True)
class Part:
    """A module of the model, and what it gives when a batch goes through."""

    path: str  # "" is the whole
    kind: str
    shape: tuple[int, ...]  # of what it gives
    parameters: int  # its parts' among them; shared ones count where they come first
    flops: int  # forward, its parts' among them

    @property
    def depth(self) -> int:
        return self.path.count(".") + 1 if self.path else 0


def anatomy(config: GPTConfig, batch: int, tokens: int) -> list[Part]:
    """Every part in the order in which a batch meets it, the whole first. ValueError: too long a row."""
    if tokens > config.block_size:
        raise ValueError(f"--tokens={tokens} is more than the block of this model, {config.block_size}")
    with torch.device("meta"):  # shapes alone: no memory, no arithmetic
        model = GPT(config).eval()
        ids = torch.zeros(batch, tokens, dtype=torch.long)
    order: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, inputs: tuple) -> None:
        order.append(names[module])

    def leave(module: nn.Module, inputs: tuple, output: object) -> None:
        given = output[0] if isinstance(output, tuple) else output
        shapes[names[module]] = tuple(given.shape)

    for module in model.modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    model(ids, targets=ids)
    counted: set[nn.Parameter] = set()
    own = {}
    for name in order:
        module = model.get_submodule(name)
        fresh = {p for p in module.parameters(recurse=False) if p not in counted}
        counted |= fresh
        own[name] = (sum(p.numel() for p in fresh), own_flops(module, config, batch, tokens))
    found = []
    for name in order:
        start = f"{name}." if name else ""
        inside = [own[other] for other in order if other == name or other.startswith(start)]
        parameters, flops = (sum(one[i] for one in inside) for i in (0, 1))
        kind = type(model.get_submodule(name)).__name__
        found.append(Part(name, kind, shapes[name], parameters, flops))
    return found


def own_flops(module: nn.Module, config: GPTConfig, batch: int, tokens: int) -> int:
    """Of a module without its parts."""
    if isinstance(module, nn.Linear):
        return 2 * batch * tokens * module.weight.numel()
    if type(module).__name__ == "CausalSelfAttention":
        seen = min(tokens, config.sliding_window or tokens)
        return 4 * batch * tokens * seen * config.n_embd  # scores, and the sum that they weigh
    return 0


# Draw


def tree(parts: Sequence[Part]) -> str:
    """A line for each part, indented by where it stands; layers that are alike are told once."""
    whole = parts[0]
    rows = [("part", "gives", "parameters", "", "FLOPs", "")]
    for part, times in folded(parts):
        name = part.path.rsplit(".", 1)[-1] or "GPT"
        name = f"{name} (and {times - 1} more alike)" if times > 1 else name
        rows.append(
            (
                f"{'  ' * part.depth}{name}: {part.kind}",
                " x ".join(map(str, part.shape)),
                format_count(part.parameters),
                f"{part.parameters / whole.parameters:.1%}",
                format_count(part.flops) if part.flops else "",
                f"{part.flops / whole.flops:.1%}" if part.flops else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i < 2 else word.rjust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def folded(parts: Sequence[Part]) -> list[tuple[Part, int]]:
    """The parts, those of the first layer standing for all layers; how many each stands for."""
    layers = len({part.path for part in parts if part.kind == "Block"})
    first = next((part.path for part in parts if part.kind == "Block"), None)
    found = []
    for part in parts:
        if first is not None and part.path.startswith(first.rpartition(".")[0] + "."):
            if part.path == first:
                found.append((part, layers))
            elif part.path.startswith(first + "."):
                found.append((part, 1))
            continue
        found.append((part, 1))
    return found


STYLE = """
svg { font: 14px system-ui, sans-serif; background: #ffffff; --ink: #1b1b1b; --soft: #5f6368;
  --line: #9aa0a6; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  svg { background: #16181c; --ink: #ececec; --soft: #a8adb4; --line: #6b7078; --paper: #16181c; } }
text { fill: var(--ink); } .soft { fill: var(--soft); font-size: 12px; }
.box { stroke: var(--line); fill-opacity: 0.22; }
.frame { fill: none; stroke: var(--line); stroke-dasharray: 5 4; }
.flow { fill: none; stroke: var(--line); stroke-width: 1.6; } .share { fill-opacity: 0.85; }
.sum { fill: var(--paper); stroke: var(--line); stroke-width: 1.6; }
"""
LEFT, WIDTH, HEIGHT, GAP = 150, 300, 44, 26  # of the boxes, and between them
BARS = 520  # where the shares begin; 100 pixels are all


@dataclass(frozen=True)
class Box:
    """A box of the drawing."""

    title: str
    told: str
    part: Part
    colour: str


def boxes(parts: Sequence[Part], config: GPTConfig) -> tuple[list[Box], list[list[Box]], list[Box]]:
    """Before the layers, in a layer, and behind the layers. A layer's are in groups: the stream goes by each
    group, and what the group makes is added to it; norms behind a sum are groups that it does not go by."""
    by_path = {part.path: part for part in parts}
    layer = "transformer.h.0"

    def box(path: str, title: str, told: str, colour: int) -> list[Box]:
        return [Box(title, told, by_path[path], COLORS[colour])] if path in by_path else []

    C, H, inner = config.n_embd, config.n_head, config.inner
    shared = f", {config.kv_heads} for keys and values" if config.kv_heads != H else ""
    before = box("transformer.wte", "token embedding", f"{config.vocab_size} x {C}", 4)
    before += box("transformer.wpe", "position embedding", f"{config.block_size} x {C}, added", 4)
    before += box("transformer.ln_e", "norm", config.norm, 2)
    attention = box(f"{layer}.attn", "attention", f"{H} heads of {config.head_dim}{shared}", 0)
    mlp = box(f"{layer}.mlp", "MLP", f"{C} → {inner} → {C}, {config.activation}", 1)
    norm_1 = box(f"{layer}.ln_1", "norm", config.norm, 2)
    norm_2 = box(f"{layer}.ln_2", "norm", config.norm, 2)
    if config.parallel_block:
        inside = [norm_1 + attention + mlp]
    elif config.norm_place == "pre":
        inside = [norm_1 + attention, norm_2 + mlp]
    else:
        inside = [attention, norm_1, mlp, norm_2]
    last = box("transformer.ln_f", "norm", config.norm, 2)
    tied = ", the token embedding's weights" if config.tie_weights else ""
    last += box("lm_head", "output layer", f"{C} → {config.vocab_size}{tied}", 3)
    return before, inside, last


def drawing(parts: Sequence[Part], config: GPTConfig, batch: int, tokens: int) -> str:
    """The model from the bottom of the stream to its logits, as SVG, with each part's share of the whole."""
    before, groups, behind = boxes(parts, config)
    whole, body, above, y = parts[0], [], [], 70
    shape = f"{batch} x {tokens} x {config.n_embd}"

    def place(found: Sequence[Box], times: int = 1) -> None:
        nonlocal y
        for box in found:
            body.append(arrow(y - GAP, y))
            body.append(draw_box(box, y, whole, times))
            y += HEIGHT + GAP

    def place_beside(found: Sequence[Box]) -> None:
        """Norm, attention and MLP, the last two fed by the norm alone: drawn one below the other."""
        nonlocal y
        norm, attention, mlp = found
        place([norm, attention], config.n_layer)
        fed, out = y - 2 * GAP - HEIGHT + 4, y - GAP
        body.append(draw_box(mlp, y, whole, config.n_layer))
        body.append(around(LEFT + WIDTH + 20, fed, y - 8) + arrow(y - 8, y))  # around the attention
        y += HEIGHT + GAP
        body.append(around(LEFT - 10, out, y - GAP / 2, started=True) + arrow(y - GAP, y - GAP / 2))

    place(before)
    top = y - GAP / 2
    y += 16
    body.append(f'<text x="{LEFT + WIDTH / 2 + 12}" y="{y - 10}" class="soft">{shape}</text>')
    for group in groups:
        start = y - 11
        if config.parallel_block:
            place_beside(group)
        else:
            place(group, config.n_layer)
        if group[-1].title != "norm":
            body.append(around(LEFT - 20, start, y - GAP / 2))
            above.append(plus(y - GAP / 2))
            body.append(arrow(y - GAP, y + 14))
            y += 14
    height = y - top - GAP / 2 + 4
    body.append(
        f'<rect class="frame" x="{LEFT - 36}" y="{top}" width="{WIDTH + 72}" height="{height}" rx="10"/>'
        f'<text x="{LEFT - 46}" y="{(top + y) / 2}" text-anchor="end">{config.n_layer} layers</text>'
    )
    y += 16
    place(behind)
    body.append(arrow(y - GAP, y - 6))
    body.append(
        f'<text x="{LEFT + WIDTH / 2}" y="{y + 10}" text-anchor="middle" class="soft">logits '
        f"{batch} x {tokens} x {config.vocab_size}</text>"
    )
    middle = LEFT + WIDTH / 2
    head = (
        f'<text x="{middle}" y="30" text-anchor="middle" class="soft">tokens {batch} x {tokens}</text>'
        f'<text x="{BARS}" y="30" class="soft">share of {format_count(whole.parameters)} parameters</text>'
        f'<text x="{BARS + 220}" y="30" class="soft">share of {format_count(whole.flops)} FLOPs</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {y + 30}" width="960" height="{y + 30}">'
        f"<style>{STYLE}</style>{head}{''.join(body + above)}</svg>\n"
    )


def arrow(start: float, end: float) -> str:
    x = LEFT + WIDTH / 2
    return f'<path class="flow" d="M{x} {start} V{end} m-5 -6 l5 6 l5 -6"/>'


def around(x: float, start: float, end: float, started: bool = False) -> str:
    """A line that leaves the middle at `start`, passes at `x`, and comes back at `end`. `started`: it leaves
    a box's lower edge, not the line in the middle."""
    middle = LEFT + WIDTH / 2
    begin = f"M{LEFT + 20} {start} v6 H{x}" if started else f"M{middle} {start} H{x}"
    return f'<path class="flow" d="{begin} V{end} H{middle}"/>'


def plus(y: float) -> str:
    """The sum, on the line in the middle."""
    x = LEFT + WIDTH / 2
    return (
        f'<circle class="sum" cx="{x}" cy="{y}" r="8"/>'
        f'<path class="flow" d="M{x - 5} {y} h10 M{x} {y - 5} v10"/>'
    )


def draw_box(box: Box, y: float, whole: Part, times: int) -> str:
    """A box with what it does, and bars of its share; `times` layers have one."""
    middle, bars = LEFT + WIDTH / 2, ""
    for x, part, all_of_it in (
        (BARS, box.part.parameters * times, whole.parameters),
        (BARS + 220, box.part.flops * times, whole.flops),
    ):
        share = part / all_of_it
        bars += (
            f'<rect class="share" x="{x}" y="{y + 14}" width="{max(0.5, 100 * share):.1f}" height="16" '
            f'fill="{box.colour}"/><text x="{x + 100 * share + 8:.1f}" y="{y + 27}" class="soft">'
            f"{format_count(part) if part else '0'} ({share:.1%})</text>"
        )
    return (
        f'<rect class="box" x="{LEFT}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{box.colour}"/>'
        f'<text x="{middle}" y="{y + 18}" text-anchor="middle">{escape(box.title)}</text>'
        f'<text x="{middle}" y="{y + 35}" text-anchor="middle" class="soft">{escape(box.told)}</text>{bars}'
    )


def main(resolved: Resolved[AnatomySettings]) -> int:
    settings = resolved.settings
    config = common.open_model(settings).model.config
    tokens = settings.tokens or config.block_size
    parts = anatomy(config, settings.batch, tokens)
    print(tree(parts))
    path = common.place(settings, "anatomy").with_suffix(".svg")
    text = drawing(parts, config, settings.batch, tokens)
    common.write(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    columns = {
        name: np.array([getattr(part, name) for part in parts]) for name in ("path", "parameters", "flops")
    }
    common.save_arrays(settings.save_arrays, columns)
    return 0


if __name__ == "__main__":
    sys.exit(command(main, AnatomySettings))
