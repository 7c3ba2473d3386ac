"""One text, split by three tokenizers: characters, GPT-2's BPE, and a BPE trained on the text itself.

    python -m lab.tokenizers --input=book.txt
    python -m lab.tokenizers --input=book.txt --bpe=2048 --n_embd=384 --n_layer=6 --out_dir=out/a,out/b

Prints a table: tokens, bytes per token, and the token embedding's share of a model's parameters. Writes the
beginning of the text with its tokens in colors (PNG and HTML). With `--out_dir`, also compares trained runs
in bits per byte, a measure that does not depend on the tokenizer.

Shapes: T tokens.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from configurator import Resolved, command, setting
from fradique.checkpointing import metrics_file
from fradique.data import input_files, text
from fradique.tokenizer import bpe
from fradique.tokenizer.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, train_bpe
from fradique.training.logger import format_count
from fradique.training.loss_plot import COLORS, run_name
from lab import common, html_page

PNG_CHARACTERS, HTML_CHARACTERS = 330, 3000  # how much of the text is drawn
LINE_LENGTH = 66  # characters per line of the PNG
GLYPH_STYLE = {"fontsize": 9, "family": "monospace", "ha": "center", "va": "center"}


@dataclass(frozen=True)
class TokenizersSettings:
    """python -m lab.tokenizers --input=book.txt [--bpe=4096] [--n_embd=384] [--n_layer=6]"""

    input: str = setting("", "the text: a UTF-8 file, or a folder of them", group="text", path=True)
    bpe: int = setting(
        4096, "vocabulary size of the BPE trained on the text", lo=bpe.MIN_VOCAB, hi=bpe.MAX_VOCAB
    )
    n_embd: int = setting(
        384, "model width, for the embedding's share of the parameters", lo=1, group="model"
    )
    n_layer: int = setting(6, "number of layers of that model", lo=1)
    out_dir: str = setting("", "runs to compare in bits per byte, comma-separated", group="runs", path=True)
    to: str = setting("tokenizers", "output path without extension", group="output", path=True)
    save_arrays: str = setting("", "also write the tokens to this .npz file", path=True)
    debug: bool = setting(False, "show the traceback of an error")

    def problems(self) -> list[str]:
        return [] if self.input else ["give a text: --input=book.txt"]


# Compute


@dataclass(frozen=True)
class Tokenization:
    """A text split by a tokenizer."""

    name: str
    vocab_size: int
    ids: np.ndarray  # (T,)
    labels: list[str]  # of the first tokens, at most HTML_CHARACTERS
    text_bytes: int  # of the whole text in UTF-8

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / len(self.ids)

    def embedding_share(self, n_embd: int, n_layer: int) -> float:
        """The token embedding's share of the parameters of a GPT with L layers: V C / (V C + 12 L C²).

        V is the vocabulary size and C the width. Norms and positions are left out.
        """
        embedding_parameters = self.vocab_size * n_embd
        return embedding_parameters / (embedding_parameters + 12 * n_layer * n_embd**2)


def tokenize_all(content: str, bpe_size: int) -> list[Tokenization]:
    """Split a text with the three tokenizers. Raises ValueError if it is empty."""
    if not content:
        raise ValueError("the text is empty: --input must be a file or folder that contains text")
    tokenizers = [
        ("characters", CharTokenizer("".join(sorted(set(content))))),
        ("GPT-2's BPE", GPT2Tokenizer()),
        (f"its own BPE of {bpe_size:,}", train_bpe([content], bpe_size)),
    ]
    return [tokenize(name, tokenizer, content) for name, tokenizer in tokenizers]


def tokenize(name: str, tokenizer: Tokenizer, content: str) -> Tokenization:
    """Split a text with one tokenizer."""
    ids = tokenizer.encode(content)
    labels = common.token_labels(tokenizer, ids[:HTML_CHARACTERS])
    return Tokenization(name, tokenizer.vocab_size, ids, labels, len(content.encode()))


def compare_runs(folders: list[Path]) -> list[tuple[str, float, float]]:
    """(name, loss in nats per token, bits per byte) of each run, the best first.

    Raises ValueError if a run is not finished.
    """
    results = []
    for folder in folders:
        records = [r for r in metrics_file.read_metrics(folder) if "final_bits_per_byte" in r]
        if not records:
            raise ValueError(
                f"{folder} has no finished run: bits per byte are measured at the end of training"
            )
        results.append((run_name(folder), records[-1]["final_loss"], records[-1]["final_bits_per_byte"]))
    return sorted(results, key=lambda result: result[2])  # by bits per byte


class PlacedPiece(NamedTuple):
    """A piece of a token's label on the lines of the picture."""

    x: int  # column of its first character, from 0
    line: int  # from 0
    text: str
    index: int  # number of the token in the text, from 0


def wrap_labels(labels: Sequence[str], max_characters: int) -> list[PlacedPiece]:
    """Place labels one after another on lines of LINE_LENGTH characters, at most `max_characters` in total.

    A label that crosses the end of a line is divided into pieces.
    """
    pieces, x, line, total = [], 0, 0, 0  # total: characters placed so far
    for index, label in enumerate(labels):
        remainder = label
        while remainder and total < max_characters:
            piece = remainder[: min(LINE_LENGTH - x, max_characters - total)]
            pieces.append(PlacedPiece(x, line, piece, index))
            remainder = remainder[len(piece) :]
            x += len(piece)
            total += len(piece)
            if x == LINE_LENGTH:
                x, line = 0, line + 1
    return pieces


# Draw


def summary_table(tokenizations: list[Tokenization], n_embd: int, n_layer: int) -> str:
    """A Markdown table with a row for each tokenizer. n_embd, n_layer: of a model that uses it."""
    header = [
        "",
        "vocabulary",
        "tokens",
        "bytes per token",
        f"embedding parameters (n_embd={n_embd})",
        f"share of a model of {n_layer} layers",
    ]
    rows = [
        [
            t.name,
            f"{t.vocab_size:,}",
            f"{len(t.ids):,}",
            f"{t.bytes_per_token:.2f}",
            format_count(t.vocab_size * n_embd),
            f"{t.embedding_share(n_embd, n_layer):.1%}",
        ]
        for t in tokenizations
    ]
    return common.markdown_table(header, rows)


def draw_tokenizations(tokenizations: list[Tokenization]) -> Figure:
    """The beginning of the text in a block of lines per tokenizer, with the tokens in different colors."""
    blocks = [wrap_labels(t.labels, PNG_CHARACTERS) for t in tokenizations]
    heights = [1 + block[-1].line + 1.2 for block in blocks]  # in lines, with the title and a gap
    figure = Figure(figsize=(10, 0.3 * sum(heights) + 0.3), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-1, LINE_LENGTH + 1)
    axes.set_ylim(sum(heights) + 0.4, -0.4)
    axes.axis("off")
    top = 0.0
    for t, block, height in zip(tokenizations, blocks, heights, strict=True):
        title = f"{t.name}: vocabulary of {t.vocab_size:,}, {t.bytes_per_token:.2f} bytes per token"
        axes.text(0, top + 0.4, title, fontsize=10, va="center", weight="bold")
        for piece in block:
            draw_piece(axes, piece, top + 1 + piece.line)
        top += height
    return figure


def draw_piece(axes: Axes, piece: PlacedPiece, y: float) -> None:
    """Draw the characters of a piece on a background in the color of its token. y: upper edge, in lines."""
    color = COLORS[piece.index % len(COLORS)]
    background = Rectangle((piece.x, y), len(piece.text), 0.92, facecolor=color, alpha=0.38, linewidth=0)
    axes.add_patch(background)
    for i, char in enumerate(piece.text):
        axes.text(piece.x + i + 0.5, y + 0.46, char, **GLYPH_STYLE)


def colored_tokens(tokenization: Tokenization) -> str:
    """The beginning of the text as HTML, with the tokens in different colors."""
    spans, total = [], 0
    for i, label in enumerate(tokenization.labels):
        total += len(label)
        if total > HTML_CHARACTERS:
            break
        tooltip = f"token {tokenization.ids[i]}: {len(label)} characters"
        spans.append(html_page.token_span(label, tooltip, style=f"background:{COLORS[i % len(COLORS)]}55"))
    return html_page.token_text(spans)


def main(resolved: Resolved[TokenizersSettings]) -> int:
    settings = resolved.settings
    files = input_files.find_files([Path(settings.input)])
    content = "".join(text.files_text(files, settings.input).chunks())
    tokenizations = tokenize_all(content, settings.bpe)
    print(summary_table(tokenizations, settings.n_embd, settings.n_layer))
    parts = []
    for name, loss, bits in compare_runs([Path(name) for name in settings.out_dir.split(",") if name]):
        result = f"{name}: {bits:.3f} bits per byte (loss {loss:.3f} nats per token)"
        print(result)
        parts.append(html_page.note(result))
    path = common.output_path_in(".", settings.to, "tokenizers")
    common.write_figure(draw_tokenizations(tokenizations), common.add_extension(path, ".png"))
    for t in tokenizations:
        parts.append(f"<h2>{escape(t.name)}: {t.bytes_per_token:.2f} bytes per token</h2>{colored_tokens(t)}")
    html_page.write_page(common.add_extension(path, ".html"), "One text in three vocabularies", parts)
    common.save_arrays(settings.save_arrays, {t.name: t.ids for t in tokenizations})
    return 0


if __name__ == "__main__":
    sys.exit(command(main, TokenizersSettings))
