"""Code that the lab commands share: loading the model, encoding the prompt, writing the output files.

Shapes: T tokens.
"""

import math
import re
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import configurator
from configurator import Resolved, setting
from fradique.checkpointing import run_folder
from fradique.data import dataset
from fradique.io import files
from fradique.runtime.memory_limits import OomReport
from fradique.tokenizer.bpe import END_OF_TEXT
from fradique.tokenizer.tokenizer import CharTokenizer, Tokenizer, encode_prompt
from fradique.training import loss_plot
from sample import LoadedModel, load_model, note_ignored_settings, read_prompt

WHITESPACE_SYMBOLS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u200b": "·"}
DOTTED_CIRCLE = "◌"
NEWLINE_SYMBOL = WHITESPACE_SYMBOLS["\n"]
SEARCHED_TOKENS = 4096  # of the validation text: the default prompt is among these
OUTPUT_SUFFIXES = (".png", ".html", ".svg", ".gif", ".mp4", ".txt")


@dataclass(frozen=True)
class ModelSettings:
    """The settings of every command that loads a model."""

    out_dir: str = setting("out", "run folder to load the model from", group="model", path=True)
    init_from: str = setting(
        "",
        "load this instead of out_dir: gpt2, ..., another run folder, ckpt.pt, or a Hugging Face folder",
        path=True,
    )
    checkpoint: str = setting("best", "checkpoint of the run: best, newest, or a step number")
    device: str = setting("auto", "auto, cpu, mps, cuda or cuda:N")
    to: str = setting(
        "", "output path without extension; empty: in the run folder", group="output", path=True
    )
    save_arrays: str = setting("", "also write the plotted arrays to this .npz file", path=True)
    debug: bool = setting(False, "show the traceback of an error")


@dataclass(frozen=True)
class PromptSettings(ModelSettings):
    """The settings of every command that needs a prompt."""

    start: str = setting(
        "",
        "prompt: text (in a flag \\n is a newline, \\t a tab, \\\\ a backslash), FILE:path, or - for "
        "standard input; empty: the beginning of the run's validation text",
        group="text",
        escapes=True,
    )


def command(main: Callable[[Resolved[Any]], int], cls: type, argv: Sequence[str] | None = None) -> int:
    """`configurator.command` for a command that runs a model: it reports a lack of memory in one message."""

    def run(resolved: Resolved[Any]) -> int:
        note_ignored_settings(resolved)
        with OomReport():
            return main(resolved)

    return configurator.command(run, cls, argv)


def open_model(settings: ModelSettings) -> LoadedModel:
    """Load the model in float32, with its tokenizer. Raises ValueError if there is none."""
    source = settings.init_from
    if not source:
        source = settings.out_dir
        run_folder.saved_settings(Path(source))  # raises if there is no run: it is not a name on the hub
    return load_model(source, checkpoint_name=settings.checkpoint, device=settings.device, dtype="float32")


def encode_start(loaded: LoadedModel, start: str) -> np.ndarray:
    """The tokens (T,) of a prompt, int64. Raises ValueError if it is longer than the model's context."""
    ids = encode_prompt(loaded.tokenizer, read_prompt(start))
    block_size = loaded.model.config.block_size
    if len(ids) > block_size:
        raise ValueError(f"prompt too long: {len(ids)} tokens, maximum {block_size}. Shorten --start")
    return ids.astype(np.int64)


def prompt_tokens(
    loaded: LoadedModel, settings: PromptSettings, max_tokens: int, fallback: str
) -> np.ndarray:
    """The tokens (T,) of --start, int64; without --start, those of the default prompt, which is printed.

    The default prompt is the beginning of the run's validation text, at most `max_tokens` tokens. If that
    cannot be read, it is `fallback` without the characters that the model lacks, and a note says why.
    Raises ValueError if --start is longer than the model's context.
    """
    if settings.start:
        return encode_start(loaded, settings.start)
    max_tokens, reason = min(max_tokens, loaded.model.config.block_size), ""
    try:
        prompt = beginning_of_text(loaded.tokenizer, validation_tokens(loaded, settings), max_tokens)
    except (ValueError, OSError) as error:
        prompt, reason = remove_unknown_characters(loaded.tokenizer, fallback), str(error)
    ids = encode_prompt(loaded.tokenizer, prompt)[:max_tokens].astype(np.int64)
    shown = repr(loaded.tokenizer.decode(ids))
    if reason:
        print(f"note: the prompt is {shown}, because no validation text was found: {reason}", file=sys.stderr)
    else:
        print(f"prompt, the beginning of the run's validation text: {shown}")
    return ids


def validation_tokens(loaded: LoadedModel, settings: ModelSettings) -> np.ndarray:
    """The first tokens (T,) of the validation split with which the model was trained, T <= SEARCHED_TOKENS.

    Raises ValueError or OSError if the model does not come from a run, or the corpus of the run is missing or
    was prepared again with another tokenizer.
    """
    source = Path(settings.init_from or settings.out_dir)
    run = source.parent if (source / "manifest.json").exists() else source  # a checkpoint of a run
    if not (run / run_folder.SETTINGS_FILE).exists():
        raise ValueError(f"{source} is not a run folder")
    saved = run_folder.saved_settings(run)
    folder = files.find_beside_project(Path(str(saved.get("data_dir")), str(saved.get("dataset"))))
    corpus = dataset.open_corpus(folder, block_size=1)
    if corpus.tokenizer != loaded.tokenizer:
        raise ValueError(f"the corpus in {folder} has another tokenizer than the run")
    shard = int(corpus.val.token_files.lengths.argmax())  # a shard may be empty
    return corpus.val.token_files[shard][:SEARCHED_TOKENS]


def beginning_of_text(tokenizer: Tokenizer, ids: np.ndarray, max_tokens: int) -> str:
    """The text from the first beginning of a line in ids (T,) on, at most `max_tokens` tokens.

    It ends at the end of a word, if it has several. The first tokens may be the end of a line, or of a word
    if there are no lines.
    """
    text = tokenizer.decode(ids)
    if tokenizer.end_of_text is not None:
        text = text.replace(END_OF_TEXT, "\n")
    beginnings = (text.partition("\n")[2], text.partition(" ")[2], text)
    text = next((beginning.strip() for beginning in beginnings if beginning.strip()), "")
    prompt = tokenizer.decode(tokenizer.encode(text)[:max_tokens]).rstrip("\ufffd")  # of a partial character
    next_character = text[len(prompt) : len(prompt) + 1]
    if next_character and not next_character.isspace():
        prompt = re.sub(r"(?<=\S)\s+\S*\Z", "", prompt)  # without the last word, which is not complete
    return prompt.rstrip()


def remove_unknown_characters(tokenizer: Tokenizer, text: str) -> str:
    """`text` without the characters that are not in the vocabulary of a character tokenizer."""
    return "".join(c for c in text if not isinstance(tokenizer, CharTokenizer) or c in tokenizer.chars)


def to_batch(loaded: LoadedModel, ids: np.ndarray) -> torch.Tensor:
    """(T,) -> (1, T), int64, on the model's device."""
    return torch.from_numpy(np.asarray(ids, np.int64))[None].to(loaded.runtime.device)


def show_whitespace(text: str) -> str:
    """Replace whitespace by visible symbols, and other unprintable characters by ‹their code›."""
    return loss_plot.escape_unprintable("".join(WHITESPACE_SYMBOLS.get(c, c) for c in text))


def token_labels(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """A visible label for each token (T,).

    Bytes that are not valid UTF-8 are shown as ‹hex›, and a combining character, such as an accent, on a
    dotted circle.
    """
    labels = []
    for token in np.asarray(ids).tolist():
        if token == tokenizer.end_of_text:
            labels.append("⟨end⟩")
            continue
        data = tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else b""
        try:
            label = show_whitespace(data.decode("utf-8")) or f"#{token}"
            labels.append(DOTTED_CIRCLE + label if is_combining(label[0]) else label)
        except UnicodeDecodeError:
            labels.append("".join(f"‹{byte:02x}›" for byte in data))
    return labels


def is_combining(character: str) -> bool:
    """Whether a character is drawn on the one before it."""
    return unicodedata.category(character).startswith("M")


def output_path(settings: ModelSettings, name: str) -> Path:
    """--to, or `name` in the run folder (in the current folder with --init_from): see `output_path_in`."""
    return output_path_in(settings.out_dir if not settings.init_from else ".", settings.to, name)


def output_path_in(folder: str, to: str, name: str) -> Path:
    """`to`, or `name` in `folder` if `to` is empty, without extension. Creates the parent folder."""
    path = Path(to) if to else Path(folder) / name
    path = path.with_suffix("") if path.suffix in OUTPUT_SUFFIXES else path
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def add_extension(path: Path, extension: str) -> Path:
    """`path` with an extension such as ".png". Unlike Path.with_suffix it keeps the ".5" of "run-1.5"."""
    return path.with_name(path.name + extension)


def write_output(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path, rename that file to `path`, and report it on the terminal."""
    with files.atomic_path(path, keep_suffix=True) as temporary:
        write(temporary)
    print(f"wrote {path}")


def write_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure and report it on the terminal."""
    loss_plot.save_figure(figure, path)
    print(f"wrote {path}")


def save_arrays(to: str, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays to the .npz file `to`, unless `to` is empty."""
    if to:
        path = Path(to)
        path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, lambda temporary: np.savez_compressed(temporary, **arrays))


def figure_pixels(figure: Figure) -> np.ndarray:
    """Render a figure as `savefig` would: (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    with loss_plot.literal_text(figure):
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. "|" in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def parse_numbers(text: str) -> list[float]:
    """ "0.5, 1" -> [0.5, 1.0]. Raises ValueError if an item is not a number."""
    return [float(word) for word in text.split(",") if word.strip()]


def number_problems(name: str, text: str, minimum: float, exclusive: bool = False) -> list[str]:
    """Error messages for a setting of comma-separated numbers; exclusive: `minimum` itself is not allowed."""
    try:
        values = parse_numbers(text)
    except ValueError:
        return [f"{name} = {reprlib.repr(text)}: give comma-separated numbers, such as 0.5,1"]
    if not values:
        return [f"{name} is empty: give comma-separated numbers, such as 0.5,1"]
    in_range = min(values) > minimum if exclusive else min(values) >= minimum
    if in_range and all(map(math.isfinite, values)):
        return []
    limit = f"{'above' if exclusive else 'at least'} {minimum:g}"
    return [f"{name} = {reprlib.repr(text)}: each must be {limit} and finite"]
