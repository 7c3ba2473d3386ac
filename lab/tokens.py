"""What may come next, and how well a text was foreseen, token by token.

    python -m lab.tokens --out_dir=out/eca-char --start="A figura é po"
    python -m lab.tokens --init_from=gpt2 --start="The capital of Portugal is" --top=20

Writes the likeliest next tokens, at several temperatures and through top-k, top-p and min-p, with the entropy
of each (PNG; HTML with the temperature to move), the same as an animation (GIF), and the text coloured by the
loss of each token, to point at (HTML).

Shapes: T tokens, V vocabulary.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from configurator import Resolved, command, setting
from fradique.generation.sampling import filter_logits
from fradique.tokenizer import tokenizer as tokenizers
from fradique.training.loss_plot import COLORS
from lab import animation, common, html_page
from model import GPT


@dataclass(frozen=True)
class TokenSettings(common.LookSettings):
    """python -m lab.tokens --out_dir=out/<run> --start="A figura é po" [--top=16]"""

    start: str = setting("A figura é po", "the text: itself, FILE:path, or -", group="text")
    top: int = setting(16, "how many tokens are shown", lo=1, hi=100, group="picture")
    temperatures: str = setting("0.5,0.8,1,1.5", "with commas between them")
    top_k: int = setting(5, "of the panel that draws from the k likeliest", lo=1, group="drawing")
    top_p: float = setting(
        0.9, "of the panel that draws from those whose probabilities reach p", above=0.0, hi=1.0
    )
    min_p: float = setting(
        0.1,
        "of the panel that draws from those at least p times as likely as the likeliest",
        above=0.0,
        hi=1.0,
    )

    def problems(self) -> list[str]:
        return common.problems_of_numbers("temperatures", self.temperatures, least=0.0, above=True)


# Compute


@torch.no_grad()
def logits_of(model: GPT, ids: torch.Tensor, n_vocab: int) -> torch.Tensor:
    """What the model thinks behind each token: logits (T, n_vocab), float64, of ids (1, T)."""
    training = model.training
    try:
        model.eval()
        logits, _ = model(ids, ids, prefix=ids.size(1))  # targets, so that it answers for all places
    finally:
        model.train(training)
    return logits[0, :, :n_vocab].double().cpu()


def distribution(logits: torch.Tensor, temperature: float = 1.0, **limits: float) -> np.ndarray:
    """Probabilities (V,) that `sample.py` draws with, from logits (V,). limits: top_k, top_p or min_p."""
    scaled = filter_logits(logits[None] / temperature, **limits)
    return torch.softmax(scaled, dim=-1)[0].numpy()


def entropy(probabilities: np.ndarray) -> float:
    """In bits: 0 where one token is certain, log2 V where all are as likely."""
    some = probabilities[probabilities > 0]
    return float(-(some * np.log2(some)).sum()) + 0.0


def panels(logits: torch.Tensor, settings: TokenSettings) -> dict[str, np.ndarray]:
    """The distributions that are shown: title -> (V,)."""
    found = {f"temperature {t:g}": distribution(logits, t) for t in common.numbers(settings.temperatures)}
    return found | {
        f"top-k {settings.top_k}": distribution(logits, top_k=settings.top_k),
        f"top-p {settings.top_p:g}": distribution(logits, top_p=settings.top_p),
        f"min-p {settings.min_p:g}": distribution(logits, min_p=settings.min_p),
    }


@dataclass(frozen=True)
class Foreseen:
    """How well each token behind the first was foreseen: (T - 1,) each, `alternatives` (T - 1, k) ids."""

    loss: np.ndarray  # nats
    probability: np.ndarray
    rank: np.ndarray  # 0: it was the likeliest
    alternatives: np.ndarray  # the likeliest, in order
    chances: np.ndarray  # their probabilities


def foresee(logits: torch.Tensor, ids: np.ndarray, count: int = 5) -> Foreseen:
    """logits (T, V) behind each of ids (T,)."""
    logs = torch.log_softmax(logits[:-1], dim=-1)  # (T - 1, V)
    came = logs.gather(1, torch.from_numpy(ids[1:])[:, None])  # (T - 1, 1)
    best = logs.topk(min(count, logs.size(1)), dim=-1)
    return Foreseen(
        loss=-came[:, 0].numpy(),
        probability=came[:, 0].exp().numpy(),
        rank=(logs > came).sum(1).numpy(),
        alternatives=best.indices.numpy(),
        chances=best.values.exp().numpy(),
    )


# Draw


def draw_panel(
    axes: Axes, probabilities: np.ndarray, order: np.ndarray, names: list[str], title: str, most: float = 1.0
) -> None:
    """Bars of the tokens in `order`, with their probabilities, on a scale that ends above `most`."""
    shown = probabilities[order]
    axes.barh(range(len(order)), shown, color=COLORS[0], height=0.75)
    for i, p in enumerate(shown):
        axes.text(p + 0.02 * most, i, f"{p:.3f}" if p else "not drawn", va="center", fontsize=7)
    axes.set_yticks(range(len(order)), names, fontsize=8)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * most)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}\n{entropy(probabilities):.2f} bits", fontsize=9)


def draw_panels(
    found: dict[str, np.ndarray], order: np.ndarray, names: list[str], prompt: str, path: Path
) -> None:
    """All distributions, side by side in two rows."""
    columns = math.ceil(len(found) / 2)
    height = 0.19 * len(order) + 0.8
    figure = Figure(figsize=(2.6 * columns, 2 * height + 0.5), dpi=110, layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False).ravel()
    most = max(float(probabilities.max()) for probabilities in found.values())  # one scale for all
    for axes, (title, probabilities) in zip(grid, found.items(), strict=False):
        draw_panel(axes, probabilities, order, names, title, most)
    for axes in grid[len(found) :]:
        axes.axis("off")
    figure.suptitle(f"what may follow “{prompt[-60:]}”", fontsize=11)
    figure.savefig(path)


def draw_movie(logits: torch.Tensor, order: np.ndarray, names: list[str], path: Path) -> None:
    """The temperature rising from 0.1 to 2 and falling again, as a GIF."""
    rising = np.geomspace(0.1, 2.0, 24)
    frames = []
    for temperature in [*rising, *rising[-2:0:-1]]:
        figure = Figure(figsize=(4.5, 0.22 * len(order) + 0.9), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        draw_panel(axes, distribution(logits, temperature), order, names, f"temperature {temperature:.2f}")
        frames.append(common.pixels(figure))
    animation.gif(frames, path, seconds=0.12)


def coloured(names: list[str], found: Foreseen, alternatives: list[list[str]]) -> str:
    """The text as HTML, each token on a ground that is the stronger, the worse it was foreseen."""
    spans = [f'<span class="token">{html_page.escape(names[0])}</span>']
    for i, name in enumerate(names[1:]):
        others = ", ".join(
            f"{other} {chance:.2f}" for other, chance in zip(alternatives[i], found.chances[i], strict=True)
        )
        told = (
            f"{name}: probability {found.probability[i]:.3f}, rank {found.rank[i] + 1}, "
            f"loss {found.loss[i]:.2f} nats; likeliest: {others}"
        )
        strength = min(1.0, found.loss[i] / 6)
        end = "<br>" if name == common.LINE_END else ""
        spans.append(
            f'<span class="token" style="--loss:{strength:.2f}" title="{html_page.escape(told)}">'
            f"{html_page.escape(name)}</span>{end}"
        )
    return f'<p class="text">{"".join(spans)}</p>'


def bars(found: dict[float, np.ndarray], order: np.ndarray, names: list[str]) -> str:
    """Bars whose temperature is moved by hand: {temperature: (V,)}."""
    frames = [
        html_page.go.Frame(
            data=[html_page.go.Bar(x=p[order], y=names, orientation="h", marker={"color": COLORS[0]})],
            name=f"{temperature:.2f}",
            layout={"title": {"text": f"temperature {temperature:.2f}: {entropy(p):.2f} bits"}},
        )
        for temperature, p in found.items()
    ]
    start = min(range(len(frames)), key=lambda i: abs(float(frames[i].name) - 1))
    made = html_page.go.Figure(data=frames[start].data, layout=frames[start].layout, frames=frames)
    made.update_traces(hovertemplate="%{y}: %{x:.4f}<extra></extra>")
    at_once = {"frame": {"duration": 0, "redraw": True}, "mode": "immediate"}
    steps = [{"label": f.name, "method": "animate", "args": [[f.name], at_once]} for f in frames]
    made.update_layout(
        xaxis={"range": [0, 1], "title": "probability"},
        yaxis={"autorange": "reversed", "type": "category"},
        sliders=[{"active": start, "steps": steps, "currentvalue": {"prefix": "temperature "}}],
    )
    return html_page.figure(made, height=26 * len(order) + 220)


def next_tokens(logits: torch.Tensor, order: np.ndarray, names: list[str]) -> str:
    """The bars of what follows logits (V,), whose temperature is moved."""
    return bars({t: distribution(logits, t) for t in np.geomspace(0.1, 3.0, 30)}, order, names)


def text_by_loss(tokenizer: tokenizers.Tokenizer, ids: np.ndarray, foreseen: Foreseen) -> list[str]:
    """The text of ids (T,) coloured by the loss of its tokens, and how to read it."""
    others = [common.labels(tokenizer, row) for row in foreseen.alternatives]
    return [
        html_page.note(
            "The stronger the ground, the larger the loss of the token; point at one to see more."
        ),
        coloured(common.labels(tokenizer, ids), foreseen, others),
    ]


def main(resolved: Resolved[TokenSettings]) -> int:
    settings = resolved.settings
    writer = common.open_model(settings)
    tokenizer = writer.tokenizer
    ids = common.prompt_ids(writer, settings.start)
    logits = logits_of(writer.model, common.as_batch(writer, ids), tokenizer.vocab_size)
    found, last = panels(logits[-1], settings), logits[-1]
    order = distribution(last).argsort()[::-1][: settings.top].copy()
    names = common.labels(tokenizer, order)
    prompt = common.visible(tokenizer.decode(ids))
    path = common.place(settings, "tokens")
    common.write(path.with_suffix(".png"), lambda beside: draw_panels(found, order, names, prompt, beside))
    common.write(path.with_suffix(".gif"), lambda beside: draw_movie(last, order, names, beside))
    arrays = {f"probabilities of {title}": p for title, p in found.items()} | {"ids": ids}
    parts = [f"<h2>What may follow “{html_page.escape(prompt[-60:])}”</h2>", next_tokens(last, order, names)]
    if len(ids) > 1:
        foreseen = foresee(logits, ids)
        parts += ["<h2>How well the text was foreseen</h2>", *text_by_loss(tokenizer, ids, foreseen)]
        arrays |= {"loss": foreseen.loss, "rank": foreseen.rank, "alternatives": foreseen.alternatives}
    html_page.write(path.with_suffix(".html"), "Next tokens", parts)
    common.save_arrays(settings.save_arrays, arrays)
    return 0


if __name__ == "__main__":
    sys.exit(command(main, TokenSettings))
