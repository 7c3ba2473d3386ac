"""Next-token probabilities after a prompt, and the loss of each token of the prompt.

    python -m lab.tokens --out_dir=out/eca-char --start="A figura é po"
    python -m lab.tokens --init_from=gpt2 --start="The capital of Portugal is" --top=20

Writes a picture (PNG) of the most probable next tokens and the entropy, at several temperatures and with
top-k, top-p and min-p. Also writes an animation (GIF) in which the temperature changes, and a page (HTML)
with a slider for the temperature. On the page the prompt is colored by the loss of each token.

Shapes: T tokens, V vocabulary size.
"""

import math
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from configurator import Resolved, setting
from fradique.generation.sampling import filter_logits
from fradique.tokenizer.tokenizer import Tokenizer
from fradique.training.loss_plot import COLORS
from lab import animation, common, html_page
from model import GPT

FULL_COLOR_LOSS = 6.0  # nats: tokens with this loss or more have the strongest background
PROMPT_TOKENS = 48  # of the default prompt, at most
TITLE_CHARACTERS = 60  # so many of the last characters of the prompt are in titles


@dataclass(frozen=True)
class TokenSettings(common.PromptSettings):
    """python -m lab.tokens --out_dir=out/<run> [--start="A figura é po"] [--top=16]"""

    top: int = setting(16, "number of tokens shown", lo=1, hi=100, group="picture")
    temperatures: str = setting("0.5,0.8,1,1.5", "comma-separated, one panel each")
    top_k: int = setting(5, "the top-k panel samples from the k most probable tokens", lo=1, group="sampling")
    top_p: float = setting(
        0.9,
        "the top-p panel samples from the most probable tokens whose probabilities add up to p",
        above=0.0,
        hi=1.0,
    )
    min_p: float = setting(
        0.1,
        "the min-p panel samples from tokens at least p times as probable as the most probable one",
        above=0.0,
        hi=1.0,
    )

    def problems(self) -> list[str]:
        return common.number_problems("temperatures", self.temperatures, minimum=0.0, exclusive=True)


# Compute


@torch.no_grad()
def all_logits(model: GPT, ids: torch.Tensor, n_vocab: int) -> torch.Tensor:
    """The logits after each token of ids (1, T): (T, n_vocab), float64, on the CPU. Dropout is off."""
    training = model.training
    try:
        model.eval()
        logits, _ = model(ids, ids, prefix=ids.size(1))  # with targets, the model returns all T positions
    finally:
        model.train(training)
    return logits[0, :, :n_vocab].cpu().double()  # not on the device: MPS has no float64


def probabilities(logits: torch.Tensor, temperature: float = 1.0, **filters: float) -> np.ndarray:
    """The probabilities (V,) with which sample.py would sample, from logits (V,).

    filters: top_k, top_p or min_p.
    """
    filtered = filter_logits(logits[None] / temperature, **filters)
    return torch.softmax(filtered, dim=-1)[0].numpy()


def entropy_bits(distribution: np.ndarray) -> float:
    """The entropy of probabilities (V,): 0 if one token is certain, log2 V if all are equally probable."""
    nonzero = distribution[distribution > 0]
    return float(-(nonzero * np.log2(nonzero)).sum()) + 0.0  # + 0.0 turns -0.0 into 0.0


def panel_distributions(logits: torch.Tensor, settings: TokenSettings) -> dict[str, np.ndarray]:
    """The distributions to draw, from logits (V,): panel title -> probabilities (V,)."""
    temperatures = common.parse_numbers(settings.temperatures)
    return {f"temperature {t:g}": probabilities(logits, t) for t in temperatures} | {
        f"top-k {settings.top_k}": probabilities(logits, top_k=settings.top_k),
        f"top-p {settings.top_p:g}": probabilities(logits, top_p=settings.top_p),
        f"min-p {settings.min_p:g}": probabilities(logits, min_p=settings.min_p),
    }


@dataclass(frozen=True)
class TokenScores:
    """How well the model predicted each token of a text after the first."""

    loss: np.ndarray  # (T - 1,) nats
    probability: np.ndarray  # (T - 1,)
    rank: np.ndarray  # (T - 1,) 0: the token was the most probable one
    top_ids: np.ndarray  # (T - 1, k) the k most probable tokens in its place, in descending order
    top_probabilities: np.ndarray  # (T - 1, k)


def score_tokens(logits: torch.Tensor, ids: np.ndarray, top: int = 5) -> TokenScores:
    """Score ids (T,) with the logits (T, V) after each of them. top: the k of TokenScores."""
    log_probs = torch.log_softmax(logits[:-1], dim=-1)  # (T - 1, V)
    actual = log_probs.gather(1, torch.from_numpy(ids[1:])[:, None])  # (T - 1, 1)
    best = log_probs.topk(min(top, log_probs.size(1)), dim=-1)
    return TokenScores(
        loss=-actual[:, 0].numpy(),
        probability=actual[:, 0].exp().numpy(),
        rank=(log_probs > actual).sum(1).numpy(),
        top_ids=best.indices.numpy(),
        top_probabilities=best.values.exp().numpy(),
    )


# Draw


def draw_bars(
    axes: Axes,
    distribution: np.ndarray,
    order: np.ndarray,
    labels: list[str],
    title: str,
    max_x: float = 1.0,
) -> None:
    """A bar for the probability of each of the token ids in `order`, from top to bottom.

    distribution: the probabilities (V,). labels: of the tokens in `order`. The x axis ends a little after
    `max_x`.
    """
    values = distribution[order]
    axes.barh(range(len(order)), values, color=COLORS[0], height=0.75)
    for i, p in enumerate(values):
        axes.text(p + 0.02 * max_x, i, f"{p:.3f}" if p else "excluded", va="center", fontsize=7)
    axes.set_yticks(range(len(order)), labels, fontsize=8)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max_x)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}\n{entropy_bits(distribution):.2f} bits", fontsize=9)


def draw_panels(
    distributions: dict[str, np.ndarray], order: np.ndarray, labels: list[str], prompt: str
) -> Figure:
    """A panel for each distribution, in two rows and with one common scale. For `order` see `draw_bars`."""
    columns = math.ceil(len(distributions) / 2)
    height = 0.19 * len(order) + 0.8
    figure = Figure(figsize=(2.6 * columns, 2 * height + 0.5), dpi=110, layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False).ravel()
    max_x = max(float(distribution.max()) for distribution in distributions.values())
    for axes, (title, distribution) in zip(grid, distributions.items(), strict=False):
        draw_bars(axes, distribution, order, labels, title, max_x)
    for axes in grid[len(distributions) :]:
        axes.axis("off")
    figure.suptitle(f"next token after “{prompt[-TITLE_CHARACTERS:]}”", fontsize=11)
    return figure


def write_temperature_gif(logits: torch.Tensor, order: np.ndarray, labels: list[str], path: Path) -> None:
    """Animate the distribution while the temperature rises from 0.1 to 2 and falls again."""
    rising = np.geomspace(0.1, 2.0, 24)
    frames = []
    falling = rising[-2:0:-1]  # without the first and the last, which would be shown twice
    for temperature in [*rising, *falling]:
        figure = Figure(figsize=(4.5, 0.22 * len(order) + 0.9), dpi=100, layout="constrained")
        distribution = probabilities(logits, temperature)
        draw_bars(figure.add_subplot(), distribution, order, labels, f"temperature {temperature:.2f}")
        frames.append(common.figure_pixels(figure))
    animation.write_gif(frames, path, frame_seconds=0.12)


def loss_colored_text(tokenizer: Tokenizer, ids: np.ndarray, scores: TokenScores) -> list[str]:
    """The text of ids (T,) as HTML, in parts. The background of a token is stronger for a larger loss."""
    labels = common.token_labels(tokenizer, ids)
    spans = [html_page.token_span(labels[0])]  # the first token has no score
    for i, label in enumerate(labels[1:]):
        top_labels = common.token_labels(tokenizer, scores.top_ids[i])
        top = ", ".join(
            f"{other} {p:.2f}" for other, p in zip(top_labels, scores.top_probabilities[i], strict=True)
        )
        tooltip = (
            f"{label}: probability {scores.probability[i]:.3f}, rank {scores.rank[i] + 1}, "
            f"loss {scores.loss[i]:.2f} nats; most probable: {top}"
        )
        strength = min(1.0, scores.loss[i] / FULL_COLOR_LOSS)
        spans.append(html_page.token_span(label, tooltip, style=f"--loss:{strength:.2f}"))
    explanation = (
        "The stronger the background, the larger the loss of the token. Hover over a token for details."
    )
    return [html_page.note(explanation), html_page.token_text(spans)]


def temperature_slider(logits: torch.Tensor, order: np.ndarray, labels: list[str]) -> str:
    """Bars of the probabilities from logits (V,), as HTML with a slider for the temperature.

    For `order` and `labels` see `draw_bars`.
    """
    frames, rows = [], list(range(len(order)))
    for temperature in np.geomspace(0.1, 3.0, 30):
        p = probabilities(logits, temperature)
        bar = go.Bar(x=p[order], y=rows, customdata=labels, orientation="h", marker={"color": COLORS[0]})
        title = f"temperature {temperature:.2f}: {entropy_bits(p):.2f} bits"
        frames.append(
            go.Frame(data=[bar], name=f"{temperature:.2f}", layout={"title": {"text": title}}),
        )
    start = min(range(len(frames)), key=lambda i: abs(float(frames[i].name) - 1))  # nearest to 1
    figure = go.Figure(data=frames[start].data, layout=frames[start].layout, frames=frames)
    figure.update_traces(hovertemplate="%{customdata}: %{x:.4f}<extra></extra>")
    immediate = {"frame": {"duration": 0, "redraw": True}, "mode": "immediate"}
    steps = [{"label": f.name, "method": "animate", "args": [[f.name], immediate]} for f in frames]
    figure.update_layout(
        xaxis={"range": [0, 1], "title": "probability"},
        yaxis={"autorange": "reversed", "tickvals": rows, "ticktext": labels},
        sliders=[{"active": start, "steps": steps, "currentvalue": {"prefix": "temperature "}}],
    )
    return html_page.figure_html(figure, height=26 * len(order) + 220)


def main(resolved: Resolved[TokenSettings]) -> int:
    settings = resolved.settings
    loaded = common.open_model(settings)
    tokenizer = loaded.tokenizer
    ids = common.prompt_tokens(loaded, settings, PROMPT_TOKENS, fallback="A figura é po")
    logits = all_logits(loaded.model, common.to_batch(loaded, ids), tokenizer.vocab_size)
    last = logits[-1]
    distributions = panel_distributions(last, settings)
    # the most probable tokens; .copy() makes the reversed array contiguous
    order = probabilities(last).argsort()[::-1][: settings.top].copy()
    labels = common.token_labels(tokenizer, order)
    prompt = common.show_whitespace(tokenizer.decode(ids))

    path = common.output_path(settings, "tokens")
    common.write_figure(draw_panels(distributions, order, labels, prompt), common.add_extension(path, ".png"))
    common.write_output(
        common.add_extension(path, ".gif"),
        lambda temporary: write_temperature_gif(last, order, labels, temporary),
    )
    title = f"Most probable tokens after “{escape(prompt[-TITLE_CHARACTERS:])}”"
    parts = [f"<h2>{title}</h2>", temperature_slider(last, order, labels)]
    arrays = {f"probabilities of {panel}": p for panel, p in distributions.items()} | {"ids": ids}
    if len(ids) > 1:
        scores = score_tokens(logits, ids)
        parts += ["<h2>Loss of each token of the text</h2>", *loss_colored_text(tokenizer, ids, scores)]
        arrays |= {"loss": scores.loss, "rank": scores.rank, "alternatives": scores.top_ids}
    html_page.write_page(common.add_extension(path, ".html"), "Next tokens", parts)
    common.save_arrays(settings.save_arrays, arrays)
    return 0


if __name__ == "__main__":
    sys.exit(common.command(main, TokenSettings))
