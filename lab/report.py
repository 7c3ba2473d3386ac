"""All of a run in one file: settings, curves, samples, and a look inside, to open in a browser or to send.

    python -m lab.report --out_dir=out/eca-char
    python -m lab.report --out_dir=out/eca-char --start="A figura é poética"

Writes report.html into the run folder. It needs no network, and holds, from the run's snapshots, the film of
its embeddings where `snapshot_interval` kept some.
"""

import io
import itertools
import re
import statistics
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from configurator import Resolved, command, setting
from fradique.checkpointing import embedding_snapshots, metrics_file, run_folder
from fradique.tokenizer import tokenizer as tokenizers
from fradique.training import evaluation, loss_plot, time_budget
from fradique.training.logger import format_count
from lab import anatomy, animation, attention, common, curves, embeddings, html_page, movie, tokens
from lab.html_page import escape
from lab.token_groups import groups
from model import GPTConfig
from sample import LoadedModel
from train import TrainSettings

READ = 40  # tokens whose attention is shown, at most
MOST_MAPS = 64  # heads; of a larger model the first and the last layers are shown
MOST_POINTS = 400  # tokens of a large vocabulary in the clouds
LONGEST_TEXT = 4000  # characters of a sample
LONGEST_READ = 512  # tokens of the text that is coloured by loss
FILM = {"seconds": 6.0, "fps": 8}


@dataclass(frozen=True)
class ReportSettings(common.LookSettings):
    """python -m lab.report --out_dir=out/<run> [--start="A figura é poética"]"""

    start: str = setting("", "the text that is looked at; empty: the run's last sample", group="text")


Section = tuple[str, list[str]]  # a title, and what stands below it


def settings_section(saved: dict[str, Any]) -> Section:
    """What was set otherwise than by default, then the rest."""
    default = TrainSettings()
    known = [f.name for f in fields(TrainSettings) if f.name in saved]
    changed = [name for name in known if saved[name] != getattr(default, name)]
    rows = [(name, repr(saved[name]), repr(getattr(default, name))) for name in changed]
    rest = [(name, repr(saved[name])) for name in known if name not in changed]
    return (
        "Settings",
        [
            html_page.table(rows, ("changed", "here", "default")),
            html_page.folded(f"the other {len(rest)}, as they are by default", html_page.table(rest)),
        ],
    )


def summary(records: list[dict], config: GPTConfig, parameters: int) -> str:
    """What the run came to, in a line or two."""
    heads = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide"
    said = [f"{format_count(parameters)} parameters ({heads}, {config.block_size} tokens of context)"]
    final = next((one for one in reversed(records) if {"final_loss", "seconds"} <= one.keys()), None)
    if final:
        said.append(
            f"whole validation split: loss {final['final_loss']:.4f}, perplexity "
            f"{evaluation.perplexity(final['final_loss']):.2f}"
        )
        if final.get("final_bits_per_byte"):
            said[-1] += f", {final['final_bits_per_byte']:.3f} bits per byte"
        said.append(f"{final['step']:,} steps in {time_budget.format_duration(final['seconds'])}")
    return html_page.note("; ".join(said))


def samples_section(samples: list[tuple[int, str]]) -> Section:
    """The samples through training, the last one opened."""
    some = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, 8).astype(int))] if samples else []
    shown = []
    for step, text in some:
        opened = step == samples[-1][0]
        shown.append(html_page.folded(f"step {step:,}", html_page.sample(text[:LONGEST_TEXT]), opened))
    return "What it wrote on the way", shown or [html_page.note("No sample was kept.")]


def text_ids(writer: LoadedModel, start: str, samples: list[tuple[int, str]]) -> np.ndarray:
    """The text that is looked at, (T,): what was asked for, else the last sample, as long as the block."""
    if start:
        return common.prompt_ids(writer, start)
    text = samples[-1][1].strip() if samples else ""
    ids = tokenizers.encode_prompt(writer.tokenizer, text).astype(np.int64)
    return ids[: min(writer.model.config.block_size, LONGEST_READ)]


def text_sections(writer: LoadedModel, ids: np.ndarray) -> list[Section]:
    """The text coloured by loss, and what may follow it."""
    tokenizer = writer.tokenizer
    logits = tokens.logits_of(writer.model, common.as_batch(writer, ids), tokenizer.vocab_size)
    order = tokens.distribution(logits[-1]).argsort()[::-1][:16].copy()
    found: list[Section] = []
    if len(ids) > 1:
        parts = tokens.text_by_loss(tokenizer, ids, tokens.foresee(logits, ids))
        found.append(("How well a text was foreseen", parts))
    bars = tokens.next_tokens(logits[-1], order, common.labels(tokenizer, order))
    found.append(("What may follow it", [bars]))
    return found


def attention_section(writer: LoadedModel, ids: np.ndarray) -> Section:
    ids = ids[:READ]
    names = common.labels(writer.tokenizer, ids)
    weights = attention.attention_weights(writer.model, common.as_batch(writer, ids))
    pairs = attention.chosen(weights, -1, -1)
    if len(pairs) > MOST_MAPS:
        half = MOST_MAPS // 2
        pairs = pairs[:half] + pairs[-half:]
    space = html_page.space(attention.fibres(weights, faint=fitting(weights)), names, weights.shape)
    return (
        "What each token reads",
        [html_page.maps(weights, names, pairs), html_page.note(attention.HOW_TO_READ), space],
    )


def fitting(weights: np.ndarray, most: int = 6000) -> float:
    """The weight below which a fibre is left out, so that there are no more than `most`."""
    strongest = np.sort(weights, axis=None)[::-1]
    return max(attention.FAINT, float(strongest[min(most, len(strongest) - 1)]))


def embeddings_section(writer: LoadedModel, folder: Path) -> Section:
    settings = embeddings.EmbeddingSettings(out_dir=str(folder), most=MOST_POINTS)
    count = min(MOST_POINTS, writer.tokenizer.vocab_size)
    names = common.labels(writer.tokenizer, np.arange(count))
    kinds = groups(writer.tokenizer, range(count))
    after = {"after training": embeddings.vectors(writer.model, count)}
    parts = embeddings.clouds(embeddings.all_projections(after, settings), names, kinds)
    return "Where the tokens are", parts


def film_section(folder: Path) -> Section:
    """The film of the embeddings, where there are snapshots; else how to have them."""
    title = "How they came there"
    if len(embedding_snapshots.snapshot_paths(folder)) < 2:
        return title, [html_page.note("With --snapshot_interval=50 in training, a film of it would be here.")]
    scene = movie.scene_of(movie.MovieSettings(out_dir=str(folder), **FILM))
    held = io.BytesIO()
    animation.gif(movie.frames(scene), held, 1 / FILM["fps"], hold=2.0)
    return title, [html_page.picture(held.getvalue(), "gif", "embeddings through training")]


def anatomy_section(config: GPTConfig) -> Section:
    parts = anatomy.anatomy(config, 1, config.block_size)
    svg = anatomy.drawing(parts, config, 1, config.block_size)
    drawing = html_page.picture(svg.encode(), "svg+xml", "the model's parts, from tokens to logits")
    return "What it is made of", [
        drawing,
        html_page.folded("as text", f"<pre>{escape(anatomy.tree(parts))}</pre>"),
    ]


def speed_section(records: list[dict], about: dict[str, Any]) -> Section:
    """How fast it trained, and on what."""
    steps = [one for one in records if {"loss", "tokens", "seconds"} <= one.keys()]
    rows = []
    paces = [
        (later["tokens"] - now["tokens"]) / (later["seconds"] - now["seconds"])
        for now, later in itertools.pairwise(steps)
        if later["seconds"] > now["seconds"] and later["tokens"] > now["tokens"]
    ]
    if paces and steps[-1]["step"] > steps[0]["step"]:
        rows.append(("tokens a second (median between log lines)", f"{statistics.median(paces):,.0f}"))
        per_step = (steps[-1]["tokens"] - steps[0]["tokens"]) / (steps[-1]["step"] - steps[0]["step"])
        rows.append(("a step", f"{1000 * per_step / statistics.median(paces):.4g} ms"))
        rows.append(("tokens trained on", f"{steps[-1]['tokens']:,}"))
    decided, notes = about["decided"], about["decided"].get("notes", [])
    rows += [(name, str(decided[name])) for name in ("device", "compile") if name in decided]
    rows += [("note", str(note)) for note in (notes if isinstance(notes, list) else [])]
    rows += [(name, str(version)) for name, version in about["versions"].items()]
    rows.append(("git commit", str(about["git_commit"])))
    return "Speed and machine", [html_page.table(rows)]


def main(resolved: Resolved[ReportSettings]) -> int:
    settings = resolved.settings
    if settings.init_from:
        raise ValueError("a report is of a run: give --out_dir, and no --init_from")
    folder = Path(settings.out_dir)
    saved = run_folder.saved_settings(folder)
    about = run_folder.run_metadata(folder)
    records, samples = metrics_file.read_metrics(folder), metrics_file.read_samples(folder)
    writer = common.open_model(settings)
    config = writer.model.config
    ids = text_ids(writer, settings.start, samples)
    sections = [
        settings_section(saved),
        ("How the loss fell", [curves.figure([loss_plot.read_curves(folder)])]),
        samples_section(samples),
        *text_sections(writer, ids),
        attention_section(writer, ids),
        embeddings_section(writer, folder),
        film_section(folder),
        anatomy_section(config),
        speed_section(records, about),
    ]
    links = [f'<a href="#{anchor(title)}">{escape(title)}</a>' for title, _ in sections]
    parts = [summary(records, config, writer.model.num_params(non_embedding=False))]
    parts.append(f"<nav>{' · '.join(links)}</nav>")
    for title, inside in sections:
        parts += [f'<h2 id="{anchor(title)}">{escape(title)}</h2>', *inside]
    path = common.place(settings, "report").with_suffix(".html")
    html_page.write(path, folder.name, parts)
    common.save_arrays(settings.save_arrays, {"ids": ids})
    return 0


def anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


if __name__ == "__main__":
    sys.exit(command(main, ReportSettings))
