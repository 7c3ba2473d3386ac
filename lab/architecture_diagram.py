"""The diagram of lab.anatomy: an SVG of the model, with each module's share of the parameters and FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fradique.training.logger import format_count
from fradique.training.loss_plot import COLORS
from model import GPTConfig

STYLE = """
svg { font: 14px system-ui, sans-serif; background: #ffffff; --text: #1b1b1b; --muted: #5f6368;
  --line: #9aa0a6; --background: #ffffff; }
@media (prefers-color-scheme: dark) {
  svg { background: #16181c; --text: #ececec; --muted: #a8adb4; --line: #6b7078; --background: #16181c; } }
text { fill: var(--text); } .muted { fill: var(--muted); font-size: 12px; }
.box { stroke: var(--line); fill-opacity: 0.22; }
.frame { fill: none; stroke: var(--line); stroke-dasharray: 5 4; }
.flow { fill: none; stroke: var(--line); stroke-width: 1.6; } .share { fill-opacity: 0.85; }
.addition { fill: var(--background); stroke: var(--line); stroke-width: 1.6; }
"""
# All lengths are in pixels.
LEFT, WIDTH, HEIGHT = 150, 300, 44  # of the boxes
GAP = 26  # between two boxes
CENTER = LEFT + WIDTH / 2  # x of the residual stream, a vertical line
PARAMETER_BARS, FLOP_BARS = 520, 740  # x of the bars
BAR_LENGTH = 100  # of 100%


@dataclass(frozen=True)
class ModuleStats:
    """A module of the model, and its cost for a batch."""

    path: str  # such as "transformer.h.0.attn"; "" is the whole model
    kind: str  # class name
    shape: tuple[int, ...]  # of its output
    parameters: int  # with its submodules
    flops: int  # of the forward pass, with its submodules

    @property
    def depth(self) -> int:
        """How many modules contain this one."""
        return self.path.count(".") + 1 if self.path else 0


@dataclass(frozen=True)
class Box:
    """A box of the diagram."""

    title: str
    subtitle: str
    module: ModuleStats
    color: str


@dataclass(frozen=True)
class Boxes:
    """The boxes from tokens to logits.

    The boxes of a layer are in groups. The input of a group is added to its output (residual connection),
    except in a group that is only a norm. Such a group follows the addition if norm_place is not "pre".
    """

    before_layers: list[Box]
    layer_groups: list[list[Box]]
    after_layers: list[Box]


def architecture_boxes(stats: Sequence[ModuleStats], config: GPTConfig) -> Boxes:
    """The boxes of a model, without those of modules that it does not have."""
    by_path = {module.path: module for module in stats}
    layer = "transformer.h.0"

    def box(path: str, title: str, subtitle: str, color_index: int) -> list[Box]:
        """A list of one box, or empty if the model has no such module. color_index: in COLORS."""
        return [Box(title, subtitle, by_path[path], COLORS[color_index])] if path in by_path else []

    C, H, inner = config.n_embd, config.n_head, config.inner
    grouped = f", {config.kv_heads} for keys and values" if config.kv_heads != H else ""
    tied = ", tied to the token embedding" if config.tie_weights else ""
    attention = box(f"{layer}.attn", "attention", f"{H} heads of {config.head_dim}{grouped}", 0)
    mlp = box(f"{layer}.mlp", "MLP", f"{C} → {inner} → {C}, {config.activation}", 1)
    norm_1 = box(f"{layer}.ln_1", "norm", config.norm, 2)
    norm_2 = box(f"{layer}.ln_2", "norm", config.norm, 2)
    if config.parallel_block:
        groups = [norm_1 + attention + mlp]
    elif config.norm_place == "pre":
        groups = [norm_1 + attention, norm_2 + mlp]
    else:
        groups = [attention, norm_1, mlp, norm_2]
    return Boxes(
        before_layers=[
            *box("transformer.wte", "token embedding", f"{config.vocab_size} x {C}", 4),
            *box("transformer.wpe", "position embedding", f"{config.block_size} x {C}, added", 4),
            *box("transformer.ngrams", "n-gram embeddings", _describe_ngrams(config), 4),
            *box("transformer.ln_e", "norm", config.norm, 2),
        ],
        layer_groups=groups,
        after_layers=[
            *box("transformer.ln_f", "norm", config.norm, 2),
            *box("lm_head", "output layer", f"{C} → {config.vocab_size}{tied}", 3),
        ],
    )


def _describe_ngrams(config: GPTConfig) -> str:
    """The subtitle of the box."""
    size = f"{config.ngram_max - 1} x {config.ngram_rows} x {config.n_embd}"
    return f"{size}, added: 2 to {config.ngram_max} tokens"


def draw_svg(stats: Sequence[ModuleStats], config: GPTConfig, batch: int, tokens: int) -> str:
    """The diagram of a model as SVG, from its tokens (top) to its logits (bottom)."""
    boxes = architecture_boxes(stats, config)
    diagram = _Diagram(stats[0], config.n_layer)
    diagram.add_boxes(boxes.before_layers)
    diagram.add_layers(boxes.layer_groups, config.parallel_block, f"{batch} x {tokens} x {config.n_embd}")
    diagram.add_boxes(boxes.after_layers)
    diagram.add_output(f"logits {batch} x {tokens} x {config.vocab_size}")
    return diagram.svg(f"tokens {batch} x {tokens}")


class _Diagram:
    """SVG elements that are added from top to bottom."""

    def __init__(self, total: ModuleStats, n_layer: int) -> None:
        self.total, self.n_layer = total, n_layer
        self.y = 70  # the upper edge of the next box
        self.elements: list[str] = []
        self.additions: list[str] = []  # symbols of residual connections, drawn last, over the lines

    def add_boxes(self, boxes: Sequence[Box], count: int = 1) -> None:
        """Add boxes below one another, each with an arrow into it. count: number of identical layers."""
        for box in boxes:
            self.elements.append(arrow(self.y - GAP, self.y))
            self.elements.append(box_svg(box, self.y, self.total, count))
            self.y += HEIGHT + GAP

    def add_layers(self, groups: Sequence[Sequence[Box]], parallel: bool, shape: str) -> None:
        """Add the boxes of one layer in a frame, with residual connections.

        shape: of the residual stream, as text.
        """
        top = self.y - GAP / 2
        self.y += 16
        self.elements.append(f'<text x="{CENTER + 12}" y="{self.y - 10}" class="muted">{shape}</text>')
        for group in groups:
            start = self.y - 11
            if parallel:
                self._add_parallel(group)
            else:
                self.add_boxes(group, self.n_layer)
            if group[-1].title != "norm":  # a residual connection around the group
                self.elements.append(detour(LEFT - 20, start, self.y - GAP / 2))
                self.additions.append(plus(self.y - GAP / 2))
                self.elements.append(arrow(self.y - GAP, self.y + 14))
                self.y += 14
        height = self.y - top - GAP / 2 + 4
        self.elements.append(
            f'<rect class="frame" x="{LEFT - 36}" y="{top}" width="{WIDTH + 72}" height="{height}" rx="10"/>'
            f'<text x="{LEFT - 46}" y="{(top + self.y) / 2}" text-anchor="end">{self.n_layer} layers</text>'
        )
        self.y += 16

    def _add_parallel(self, group: Sequence[Box]) -> None:
        """Add norm, attention and MLP. The MLP is below the attention, but its input comes from the norm."""
        norm, attention, mlp = group
        self.add_boxes([norm, attention], self.n_layer)
        norm_output, attention_output = self.y - 2 * GAP - HEIGHT + 4, self.y - GAP
        self.elements.append(box_svg(mlp, self.y, self.total, self.n_layer))
        around_attention = detour(LEFT + WIDTH + 20, norm_output, self.y - 8)
        self.elements.append(around_attention + arrow(self.y - 8, self.y))
        self.y += HEIGHT + GAP
        around_mlp = detour(LEFT - 10, attention_output, self.y - GAP / 2, from_box=True)
        self.elements.append(around_mlp + arrow(self.y - GAP, self.y - GAP / 2))

    def add_output(self, label: str) -> None:
        """Add the last arrow, and the label that it points to."""
        self.elements.append(arrow(self.y - GAP, self.y - 6))
        self.elements.append(
            f'<text x="{CENTER}" y="{self.y + 10}" text-anchor="middle" class="muted">{label}</text>'
        )

    def svg(self, input_label: str) -> str:
        """The complete SVG, with the label of the input and the headings of the bars."""
        parameters, flops = format_count(self.total.parameters), format_count(self.total.flops)
        header = (
            f'<text x="{CENTER}" y="30" text-anchor="middle" class="muted">{input_label}</text>'
            f'<text x="{PARAMETER_BARS}" y="30" class="muted">share of {parameters} parameters</text>'
            f'<text x="{FLOP_BARS}" y="30" class="muted">share of {flops} FLOPs</text>'
        )
        width, height = 960, self.y + 30
        elements = "".join(self.elements + self.additions)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}"><style>{STYLE}</style>{header}{elements}</svg>\n'
        )


def arrow(start: float, end: float) -> str:
    """A downward arrow on the residual stream."""
    return f'<path class="flow" d="M{CENTER} {start} V{end} m-5 -6 l5 6 l5 -6"/>'


def detour(x: float, start: float, end: float, from_box: bool = False) -> str:
    """A line that leaves the residual stream at y = start, goes down at `x`, and returns at y = end.

    from_box: the line starts at the lower edge of a box, at y = start, instead.
    """
    begin = f"M{LEFT + 20} {start} v6 H{x}" if from_box else f"M{CENTER} {start} H{x}"
    return f'<path class="flow" d="{begin} V{end} H{CENTER}"/>'


def plus(y: float) -> str:
    """The symbol of an addition to the residual stream."""
    return (
        f'<circle class="addition" cx="{CENTER}" cy="{y}" r="8"/>'
        f'<path class="flow" d="M{CENTER - 5} {y} h10 M{CENTER} {y - 5} v10"/>'
    )


def box_svg(box: Box, y: float, total: ModuleStats, count: int) -> str:
    """A box, and bars for the shares of `count` such modules in the parameters and FLOPs of the model."""
    bars = ""
    for x, cost, total_cost in (
        (PARAMETER_BARS, box.module.parameters * count, total.parameters),
        (FLOP_BARS, box.module.flops * count, total.flops),
    ):
        length = BAR_LENGTH * cost / total_cost
        bars += (
            f'<rect class="share" x="{x}" y="{y + 14}" width="{max(0.5, length):.1f}" height="16" '
            f'fill="{box.color}"/><text x="{x + length + 8:.1f}" y="{y + 27}" class="muted">'
            f"{format_count(cost) if cost else '0'} ({cost / total_cost:.1%})</text>"
        )
    return (
        f'<rect class="box" x="{LEFT}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{box.color}"/>'
        f'<text x="{CENTER}" y="{y + 18}" text-anchor="middle">{escape(box.title)}</text>'
        f'<text x="{CENTER}" y="{y + 35}" text-anchor="middle" class="muted">{escape(box.subtitle)}</text>'
        f"{bars}"
    )
