"""What the commands of the lab share: the model that is looked at, its prompt, and where pictures go.

Shapes: T tokens.
"""

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configurator import setting
from fradique.checkpointing import run_folder
from fradique.tokenizer import tokenizer as tokenizers
from fradique.training.loss_plot import write_figure
from sample import LoadedModel, load_model, read_prompt

VISIBLE = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u200b": "·"}
LINE_END = VISIBLE["\n"]


@dataclass(frozen=True)
class LookSettings:
    """What every command that looks at a model takes."""

    out_dir: str = setting("out", "the run folder", group="model")
    init_from: str = setting("", "instead: gpt2, …, another run folder, ckpt.pt, or a Hugging Face folder")
    checkpoint: str = setting("best", "which of the run's: best | newest | the number of a step")
    device: str = setting("auto", "auto | cpu | mps | cuda | cuda:N")
    to: str = setting("", "where to write, a name without ending; empty: into the run folder", group="output")
    save_arrays: str = setting("", "keep the numbers of the pictures too, in this .npz")
    debug: bool = setting(False, "show the traceback of an error")


def open_model(settings: LookSettings) -> LoadedModel:
    """The model in float32 and its tokenizer. Raises ValueError, saying what to do, where there is none."""
    source = settings.init_from
    if not source:
        source = settings.out_dir
        run_folder.saved_settings(
            Path(source)
        )  # a mistyped folder gets a message, and is not looked for on the hub
    return load_model(source, checkpoint_name=settings.checkpoint, device=settings.device, dtype="float32")


def prompt_ids(writer: LoadedModel, start: str) -> np.ndarray:
    """The tokens (T,) of a prompt. Raises ValueError where the model cannot read it."""
    ids = tokenizers.encode_prompt(writer.tokenizer, read_prompt(start))
    block = writer.model.config.block_size
    if len(ids) > block:
        raise ValueError(f"the prompt has {len(ids)} tokens and the model reads {block}: shorten --start")
    return ids.astype(np.int64)


def as_batch(writer: LoadedModel, ids: np.ndarray) -> torch.Tensor:
    """(T,) -> (1, T) on the model's device."""
    return torch.from_numpy(np.asarray(ids, np.int64))[None].to(writer.runtime.device)


def visible(text: str) -> str:
    """Text with its spaces and line breaks to be seen; what has no picture becomes ‹its code›."""
    return "".join(VISIBLE.get(c) or (c if c.isprintable() else f"‹{ord(c):x}›") for c in text)


def labels(tokenizer: tokenizers.Tokenizer, ids: np.ndarray) -> list[str]:
    """Each token (T,) as a short text that can be seen; bytes that are no whole character as ‹hex›."""
    found = []
    for token in np.asarray(ids).tolist():
        if token == tokenizer.end_of_text:
            found.append("⟨end⟩")
            continue
        data = tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else b""
        try:
            found.append(visible(data.decode("utf-8")) or f"#{token}")
        except UnicodeDecodeError:
            found.append("".join(f"‹{byte:02x}›" for byte in data))
    return found


def place(settings: LookSettings, name: str) -> Path:
    """Where pictures called `name` go, without an ending; the folder is made."""
    return place_in(settings.out_dir if not settings.init_from else ".", settings.to, name)


def place_in(folder: str, to: str, name: str) -> Path:
    """`name` in `folder`, or `to` where that is given, without an ending; the folder is made."""
    path = Path(to) if to else Path(folder) / name
    path = path.with_suffix("") if path.suffix in (".png", ".html", ".svg", ".gif", ".mp4", ".txt") else path
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, make: Callable[[Path], None]) -> None:
    """Let `make` write a file, put it whole where it goes, and say so."""
    write_figure(path, make)
    print(f"wrote {path}")


def save_arrays(to: str, arrays: dict[str, np.ndarray]) -> None:
    """Keep the arrays, where `to` says a place."""
    if to:
        path = Path(to)
        path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda beside: np.savez_compressed(beside, **arrays))


def pixels(figure: Figure) -> np.ndarray:
    """A figure as it would be saved: (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def numbers(text: str) -> list[float]:
    """ "0.5, 1" -> [0.5, 1.0]. Raises ValueError for what is no number."""
    return [float(word) for word in text.split(",") if word.strip()]


def problems_of_numbers(name: str, text: str, least: float, above: bool = False) -> list[str]:
    """What is wrong with a setting that holds numbers with commas between them."""
    try:
        found = numbers(text)
    except ValueError:
        return [f"{name} = {reprlib.repr(text)}: numbers with commas between them, such as 0.5,1"]
    if not found:
        return [f"{name} names no number: such as 0.5,1"]
    low = min(found)
    sound = (low > least if above else low >= least) and all(map(math.isfinite, found))
    return (
        [] if sound else [f"{name} = {reprlib.repr(text)}: each {'above' if above else 'at least'} {least:g}"]
    )
