"""HTML pages that contain everything they need, so that they open without a network.

The colors follow the light or dark mode of the browser. Figures are made with plotly.
"""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from lab import common

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # no white space
STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --background: #ffffff; --muted: #767676; }
@media (prefers-color-scheme: dark) { :root { --text: #ececec; --background: #16181c; --muted: #9a9a9a; } }
body { margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem; color: var(--text);
       background: var(--background); font: 16px/1.5 system-ui, sans-serif; }
.text { line-height: 1.9; overflow-wrap: anywhere; }
.token { padding: 0.12em 0.06em; background: rgba(230, 120, 0, calc(0.75 * var(--loss, 0))); }
mark { background: rgba(213, 94, 0, 0.4); color: inherit; }
.token:hover { outline: 2px solid #0072B2; }
nav { line-height: 1.9; } a { color: inherit; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { text-align: left; padding: 0.15rem 1.2rem 0.15rem 0; }
summary { cursor: pointer; } pre { overflow-x: auto; font-size: 0.85rem; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } .note { color: var(--muted); }
"""
# Plotly ignores the style sheet of the page. So this script sets the colors of each figure, after it is drawn
# and when the mode changes.
THEME_SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function applyTheme() {
  const textColor = getComputedStyle(document.documentElement).getPropertyValue('--text').trim();
  const lineColor = dark.matches ? '#3a3d44' : '#d8d8d8';
  for (const div of document.querySelectorAll('.js-plotly-plot')) {
    const change = {'font.color': textColor};
    for (const name of Object.keys(div._fullLayout)) {
      if (/^[xy]axis[0-9]*$/.test(name)) {
        change[name + '.gridcolor'] = lineColor; change[name + '.linecolor'] = lineColor; }
      if (/^scene[0-9]*$/.test(name)) for (const axis of ['xaxis', 'yaxis', 'zaxis']) {
        change[name + '.' + axis + '.gridcolor'] = lineColor;
        change[name + '.' + axis + '.color'] = textColor; }
    }
    Plotly.relayout(div, change);
  }
}
addEventListener('load', applyTheme); dark.addEventListener('change', applyTheme);
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A complete HTML document. parts: the HTML of its body, such as that of `figure_html` and `note`."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n<script>{THEME_SCRIPT}</script></body></html>\n"
    )


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write `page(title, parts)` to a file, atomically, and report it on the terminal."""
    text = page(title, parts)
    common.write_output(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def note(text: str) -> str:
    """A paragraph of explanation."""
    return f'<p class="note">{escape(text)}</p>'


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> str:
    """An HTML table whose cells are plain text."""
    html_rows = ["".join(f"<th>{escape(cell)}</th>" for cell in header)] if header else []
    html_rows += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in html_rows)}</table>"


def collapsible(title: str, content: str, is_open: bool = False) -> str:
    """Content that a click on the title shows or hides. content: HTML."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{content}</details>"


def sample_text(text: str) -> str:
    """Generated text, with its line breaks. Control characters, which HTML forbids, are shown as ‹codes›."""
    printable = CONTROL_CHARACTERS.sub(lambda match: f"‹{ord(match[0]):x}›", text)
    return f'<pre class="sample">{escape(printable)}</pre>'


def token_text(spans: Sequence[str]) -> str:
    """A paragraph. spans: inline HTML, such as the results of `token_span`."""
    return f'<p class="text">{"".join(spans)}</p>'


def token_span(label: str, tooltip: str = "", style: str = "") -> str:
    """A token of a text as inline HTML, with a line break after it if its label ends in the newline symbol.

    style: CSS.
    """
    attributes = f' style="{style}"' if style else ""
    attributes += f' title="{escape(tooltip)}"' if tooltip else ""
    line_break = "<br>" if label.endswith(common.NEWLINE_SYMBOL) else ""
    return f'<span class="token"{attributes}>{escape(label)}</span>{line_break}'


def embedded_image(data: bytes, kind: str, description: str) -> str:
    """An image whose data are in the page. kind: gif or svg+xml.

    An SVG is embedded as an image so that its style sheet does not affect the rest of the page.
    """
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img alt="{escape(description)}" src="data:image/{kind};base64,{encoded}">'


def figure_html(figure: go.Figure, height: int = 640) -> str:
    """The HTML of a plotly figure, for `page`, with a transparent background. height: pixels.

    All text of the figure is drawn as it is written; only a hovertemplate may have tags. Text from users must
    not be in a hovertemplate, but in the values that it names, such as %{text}.
    """
    figure.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#9aa0a6", "activecolor": "#0072B2"},
        margin={"l": 60, "r": 20, "t": 50, "b": 60},
    )
    # hide the lines through 0 and the walls of 3D scenes, whose colors THEME_SCRIPT does not set
    figure.update_xaxes(zeroline=False).update_yaxes(zeroline=False)
    figure.update_scenes({f"{axis}axis_showbackground": False for axis in "xyz"})
    figure.update_layout(hoverlabel={"namelength": -1})  # a name that is cut could end inside an entity
    return plotly.io.to_html(
        literal_strings(figure.to_dict()),
        full_html=False,
        include_plotlyjs=False,
        auto_play=False,
        config={"displaylogo": False, "responsive": True, "typesetMath": False},
        validate=False,
    )


def literal_strings(value: Any, webgl: bool = False) -> Any:
    """A value of a plotly figure in which all strings, except hovertemplates, are drawn as they are written.

    Plotly reads tags such as <b> and entities such as &lt; in every text. In the axes of a 3D scene, which
    are drawn with WebGL, it reads only tags: a zero-width space after "<" prevents that.
    """
    if isinstance(value, str):
        return value.replace("<", "<\u200b") if webgl else escape(value, quote=False)
    if isinstance(value, dict):
        return {
            name: item if name == "hovertemplate" else literal_strings(item, webgl or name == "scene")
            for name, item in value.items()
        }
    if isinstance(value, np.ndarray) and value.dtype.kind in "OU":  # objects or strings
        value = value.tolist()
    return [literal_strings(item, webgl) for item in value] if isinstance(value, list | tuple) else value
