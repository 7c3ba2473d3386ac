"""Pictures to point at and to turn: HTML files that hold all they need, and open with no network.

A page follows the reader's light or dark setting. Figures are plotly's.
"""

import base64
import itertools
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lab import common

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --faint: #767676; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #16181c; --faint: #9a9a9a; } }
body { margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
       font: 16px/1.5 system-ui, sans-serif; }
.text { line-height: 1.9; overflow-wrap: anywhere; }
.token { padding: 0.12em 0.06em; background: rgba(230, 120, 0, calc(0.75 * var(--loss, 0))); }
mark { background: rgba(213, 94, 0, 0.4); color: inherit; }
.token:hover { outline: 2px solid #0072B2; }
nav { line-height: 1.9; } a { color: inherit; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { text-align: left; padding: 0.15rem 1.2rem 0.15rem 0; }
summary { cursor: pointer; } pre { overflow-x: auto; font-size: 0.85rem; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } .note { color: var(--faint); }
"""
# plotly does not take the page's colours: each figure is given them once it is there, and when they change
FOLLOW = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function dress() {
  const ink = getComputedStyle(document.documentElement).getPropertyValue('--ink').trim();
  const lines = dark.matches ? '#3a3d44' : '#d8d8d8';
  for (const div of document.querySelectorAll('.js-plotly-plot')) {
    const change = {'font.color': ink};
    for (const name of Object.keys(div._fullLayout)) {
      if (/^[xy]axis[0-9]*$/.test(name)) {
        change[name + '.gridcolor'] = lines; change[name + '.linecolor'] = lines; }
      if (/^scene[0-9]*$/.test(name)) for (const a of ['xaxis', 'yaxis', 'zaxis']) {
        change[name + '.' + a + '.gridcolor'] = lines; change[name + '.' + a + '.color'] = ink; }
    }
    Plotly.relayout(div, change);
  }
}
addEventListener('load', dress); dark.addEventListener('change', dress);
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML document; `parts` stand in its body, and may hold `figure`s."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n<script>{FOLLOW}</script></body></html>\n"
    )


def write(path: Path, title: str, parts: Sequence[str]) -> None:
    """A page of its own, written whole."""
    common.write(path, lambda beside: beside.write_text(page(title, parts), encoding="utf-8"))


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """A table of texts."""
    lines = ["".join(f"<th>{escape(word)}</th>" for word in head)] if head else []
    lines += ["".join(f"<td>{escape(word)}</td>" for word in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def folded(title: str, inside: str, opened: bool = False) -> str:
    """What is shown when its title is clicked."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{inside}</details>"


def sample(text: str) -> str:
    """A text as it was written, its line breaks kept."""
    return f'<pre class="sample">{escape(text)}</pre>'


def picture(data: bytes, kind: str, told: str) -> str:
    """A picture inside the page; kind: gif, or svg+xml, whose style thereby stays its own."""
    inside = base64.b64encode(data).decode("ascii")
    return f'<img alt="{escape(told)}" src="data:image/{kind};base64,{inside}">'


def figure(made: go.Figure, height: int = 640) -> str:
    """A plotly figure as a part of a page, in the page's colours."""
    made.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#9aa0a6", "activecolor": "#0072B2"},
        margin={"l": 60, "r": 20, "t": 50, "b": 60},
    )
    # neither follows the page's colours: lines through 0, and walls in space
    made.update_xaxes(zeroline=False).update_yaxes(zeroline=False)
    made.update_scenes({f"{axis}axis_showbackground": False for axis in "xyz"})
    return made.to_html(
        full_html=False,
        include_plotlyjs=False,
        auto_play=False,
        config={"displaylogo": False, "responsive": True},
    )


def maps(weights: np.ndarray, names: list[str], pairs: list[tuple[int, int]]) -> str:
    """A figure with a map for each (layer, head)."""
    T = len(names)
    axis = {"tickmode": "array", "tickvals": list(range(T)), "ticktext": names, "showgrid": False}
    hover = "<b>%{customdata[0]}</b> reads <b>%{customdata[1]}</b>: %{z:.3f}<extra></extra>"
    told = np.array([[(reader, read) for read in names] for reader in names], dtype=object)  # (T, T, 2)
    seen = np.tril(np.ones((T, T), dtype=bool)) | (weights.max((0, 1)) > 0)
    # one map, whose numbers the buttons change: the tokens are told once
    shown = [np.where(seen, weights[layer, head].astype(float).round(4), np.nan) for layer, head in pairs]
    made = go.Figure()
    made.add_heatmap(
        z=shown[0], customdata=told, hovertemplate=hover, zmin=0, zmax=1, colorscale="Cividis",
        xgap=1, ygap=1, colorbar={"title": "weight"},
    )  # fmt: skip
    buttons = [
        {"label": f"layer {layer}, head {head}", "method": "restyle", "args": [{"z": [as_list(z)]}]}
        for (layer, head), z in zip(pairs, shown, strict=True)
    ]
    made.update_layout(
        xaxis=axis | {"title": "token that is read", "side": "bottom", "constrain": "domain"},
        yaxis=axis | {"title": "token that reads", "autorange": "reversed", "scaleanchor": "x"},
        updatemenus=[
            {
                "buttons": buttons,
                "x": 0,
                "xanchor": "left",
                "y": 1.12,
                "bgcolor": "#9aa0a6",
                "font": {"color": "#000"},
            }
        ],
    )
    return figure(made, height=max(520, min(1000, 24 * T + 200)))


def as_list(z: np.ndarray) -> list[list[float | None]]:
    """(rows, columns) for JSON, which has no NaN."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in z]


STRENGTHS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.01)  # fibres of one interval are drawn alike


def space(fibres: np.ndarray, names: list[str], shape: tuple[int, ...]) -> str:
    """A figure of `fibres` (n, 5): layer, head, reader, read, weight."""
    L, H, T = shape[:3]
    made = go.Figure()
    for low, high in itertools.pairwise(STRENGTHS):
        part = fibres[(fibres[:, 4] >= low) & (fibres[:, 4] < high)]
        if not len(part):
            continue
        layer, head, reader, read = part.T[:4]
        gap = np.full(len(part), np.nan)
        told = [
            f"layer {int(n)}, head {int(h)}: <b>{names[int(i)]}</b> reads <b>{names[int(j)]}</b>: {w:.2f}"
            for n, h, i, j, w in part
        ]
        made.add_scatter3d(
            x=np.column_stack([read, reader, gap]).ravel(),
            y=np.column_stack([head, head, gap]).ravel(),
            z=np.column_stack([layer, layer + 1, gap]).ravel(),
            text=[text for line in told for text in (line, line, "")],
            mode="lines",
            hovertemplate="%{text}<extra></extra>",
            line={"color": "#f0a000", "width": 1 + 6 * high},
            opacity=min(1.0, 0.12 + 0.9 * low),
            name=f"{low:g} to {min(high, 1):g}",
        )
    everywhere = np.array([(t, h, layer) for layer in range(L + 1) for h in range(H) for t in range(T)])
    made.add_scatter3d(
        x=everywhere[:, 0], y=everywhere[:, 1], z=everywhere[:, 2], mode="markers",
        marker={"size": 2, "color": "#8a8f98"}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    made.update_layout(
        scene={
            "xaxis": {"title": "token", "tickvals": list(range(T)), "ticktext": names},
            "yaxis": {"title": "head", "tickvals": list(range(H))},
            "zaxis": {
                "title": "layer",
                "tickvals": list(range(L + 1)),
                "ticktext": ["in", *map(str, range(1, L + 1))],
            },
            "aspectmode": "manual",
            "aspectratio": {"x": 2.0, "y": 0.8, "z": 1.2},
            "camera": {"eye": {"x": -0.4, "y": -2.4, "z": 0.7}},
        },
        legend={"title": "weight"},
    )
    return figure(made, height=760)
