"""One text in three vocabularies: characters, GPT-2's BPE, and a BPE made for it.

    python -m lab.tokenizers --input=book.txt
    python -m lab.tokenizers --input=book.txt --bpe=2048 --n_embd=384 --n_layer=6 --out_dir=out/a,out/b

Prints tokens, bytes a token, and what part of a model's parameters the token embedding is; writes the
beginning of the text in coloured pieces (PNG, and HTML to point at). With `--out_dir` the runs named there
are compared in bits per byte, whatever they were trained in.

Shapes: T tokens.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from configurator import Resolved, command, setting
from fradique.checkpointing import metrics_file
from fradique.data import text
from fradique.tokenizer import bpe
from fradique.tokenizer import tokenizer as tokenizers
from fradique.training.logger import format_count
from fradique.training.loss_plot import COLORS
from lab import common, html_page

SHOWN = {"png": 330, "html": 3000}  # characters of the text that are drawn
COLUMNS = 66  # characters of a line of the picture
LETTER = {"fontsize": 9, "family": "monospace", "ha": "center", "va": "center"}


@dataclass(frozen=True)
class TokenizersSettings:
    """python -m lab.tokenizers --input=book.txt [--bpe=4096] [--n_embd=384] [--n_layer=6]"""

    input: str = setting("", "the text: a UTF-8 file, or a folder of them", group="text")
    bpe: int = setting(
        4096, "the vocabulary of the BPE that is made for it", lo=bpe.MIN_VOCAB, hi=bpe.MAX_VOCAB
    )
    n_embd: int = setting(384, "width of a model, for the part that its embedding is", lo=1, group="model")
    n_layer: int = setting(6, "its layers", lo=1)
    out_dir: str = setting("", "runs to compare in bits per byte, with commas between them", group="runs")
    to: str = setting("tokenizers", "where to write, a name without ending", group="output")
    save_arrays: str = setting("", "keep the numbers of the pictures too, in this .npz")
    debug: bool = setting(False, "show the traceback of an error")

    def problems(self) -> list[str]:
        return [] if self.input else ["give a text: --input=book.txt"]


# Compute


@dataclass(frozen=True)
class Cut:
    """A text as one tokenizer cuts it."""

    name: str
    vocab_size: int
    ids: np.ndarray  # (T,)
    pieces: list[str]  # (T,), to be seen
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / len(self.ids)

    def embedding_share(self, n_embd: int, n_layer: int) -> float:
        """The part of a GPT's parameters that the token embedding is: V C of V C + 12 L C² (norms aside)."""
        table = self.vocab_size * n_embd
        return table / (table + 12 * n_layer * n_embd**2)


def cut_all(content: str, bpe_size: int) -> list[Cut]:
    """A text in the three vocabularies. Raises ValueError where it is empty."""
    if not content:
        raise ValueError("the text is empty: --input names a file with something in it")
    made = [
        ("characters", tokenizers.CharTokenizer("".join(sorted(set(content))))),
        ("GPT-2's BPE", tokenizers.GPT2Tokenizer()),
        (f"its own BPE of {bpe_size:,}", tokenizers.train_bpe([content], bpe_size)),
    ]
    return [cut(name, tokenizer, content) for name, tokenizer in made]


def cut(name: str, tokenizer: tokenizers.Tokenizer, content: str) -> Cut:
    ids = tokenizer.encode(content)
    first = ids[: SHOWN["html"]]  # no more can be shown: a token is a byte at least
    return Cut(name, tokenizer.vocab_size, ids, common.labels(tokenizer, first), len(content.encode()))


def compare(folders: list[Path]) -> list[tuple[str, float, float]]:
    """Name, loss in nats a token and bits per byte of each run that has ended, the best first."""
    found = []
    for folder in folders:
        last = [record for record in metrics_file.read_metrics(folder) if "final_bits_per_byte" in record]
        if not last:
            raise ValueError(f"{folder} holds no run that has ended: only those have bits per byte")
        found.append((folder.name, last[-1]["final_loss"], last[-1]["final_bits_per_byte"]))
    return sorted(found, key=lambda one: one[2])


# Draw


def table(cuts: list[Cut], n_embd: int, n_layer: int) -> str:
    """Markdown: a row for each tokenizer."""
    head = [
        "",
        "vocabulary",
        "tokens",
        "bytes a token",
        f"embedding at {n_embd} wide",
        f"of {n_layer} layers' all",
    ]
    lines = [head, ["---"] * len(head)]
    for one in cuts:
        lines.append(
            [
                one.name,
                f"{one.vocab_size:,}",
                f"{len(one.ids):,}",
                f"{one.bytes_per_token:.2f}",
                format_count(one.vocab_size * n_embd),
                f"{one.embedding_share(n_embd, n_layer):.1%}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(cuts: list[Cut], path: Path) -> None:
    """The beginning of the text, a block of lines for each tokenizer, pieces in changing colours."""
    rows = [lay_out(one.pieces, SHOWN["png"]) for one in cuts]
    heights = [1 + row[-1][1] + 1.2 for row in rows]
    figure = Figure(figsize=(10, 0.3 * sum(heights) + 0.3), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-1, COLUMNS + 1)
    axes.set_ylim(sum(heights) + 0.4, -0.4)
    axes.axis("off")
    top = 0.0
    for one, places, height in zip(cuts, rows, heights, strict=True):
        told = (
            f"{one.name}: {one.vocab_size:,} tokens to choose from, {one.bytes_per_token:.2f} bytes a token"
        )
        axes.text(0, top + 0.4, told, fontsize=10, va="center", weight="bold")
        for x, line, piece, number in places:
            y = top + 1 + line
            colour = COLORS[number % len(COLORS)]
            axes.add_patch(Rectangle((x, y), len(piece), 0.92, facecolor=colour, alpha=0.38, linewidth=0))
            for i, char in enumerate(piece):
                axes.text(
                    x + i + 0.5, y + 0.46, char, fontsize=9, family="monospace", ha="center", va="center"
                )
        top += height
    figure.savefig(path)


def lay_out(pieces: list[str], most: int) -> list[tuple[int, int, str, int]]:
    """Where each piece stands on lines of COLUMNS: x, line, what is there of it, its number. A piece that
    meets the end of a line goes on in the next."""
    found, x, line, total = [], 0, 0, 0
    for number, piece in enumerate(pieces):
        while piece and total < most:
            part = piece[: min(COLUMNS - x, most - total)]
            found.append((x, line, part, number))
            x, piece, total = x + len(part), piece[len(part) :], total + len(part)
            if x == COLUMNS:
                x, line = 0, line + 1
    return found


def coloured(one: Cut) -> str:
    """The pieces as HTML."""
    spans, total = [], 0
    for i, piece in enumerate(one.pieces):
        total += len(piece)
        if total > SHOWN["html"]:
            break
        told = f"token {one.ids[i]}: {len(piece)} characters"
        end = "<br>" if piece.endswith(common.LINE_END) else ""
        spans.append(
            f'<span class="token" style="background:{COLORS[i % len(COLORS)]}55" title="{told}">'
            f"{html_page.escape(piece)}</span>{end}"
        )
    return f'<p class="text">{"".join(spans)}</p>'


def main(resolved: Resolved[TokenizersSettings]) -> int:
    settings = resolved.settings
    content = "".join(text.files_text(text.find_files([Path(settings.input)]), settings.input).chunks())
    cuts = cut_all(content, settings.bpe)
    told = table(cuts, settings.n_embd, settings.n_layer)
    print(told)
    parts = []
    if settings.out_dir:
        runs = compare([Path(name) for name in settings.out_dir.split(",") if name])
        for name, loss, bits in runs:
            print(f"{name}: {bits:.3f} bits per byte (loss {loss:.3f} nats a token)")
            parts.append(html_page.note(f"{name}: {bits:.3f} bits per byte (loss {loss:.3f} nats a token)"))
    path = Path(settings.to)
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write(path.with_suffix(".png"), lambda beside: draw(cuts, beside))
    for one in cuts:
        parts.append(
            f"<h2>{html_page.escape(one.name)}: {one.bytes_per_token:.2f} bytes a token</h2>{coloured(one)}"
        )
    html_page.write(path.with_suffix(".html"), "One text in three vocabularies", parts)
    common.save_arrays(settings.save_arrays, {one.name: one.ids for one in cuts})
    return 0


if __name__ == "__main__":
    sys.exit(command(main, TokenizersSettings))
