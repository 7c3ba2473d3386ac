"""One HTML file about a run: settings, loss curves, samples, and pictures of the model.

    python -m lab.report --out_dir=out/eca-char
    python -m lab.report --out_dir=out/eca-char --start="A figura é poética"

Writes report.html into the run folder. The file needs no network. It has the animation of `lab.movie` if
the run has snapshots (`snapshot_interval`).
"""

import io
import re
import statistics
import sys
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from configurator import Resolved, setting
from fradique.checkpointing import embedding_snapshots, metrics_file, run_folder
from fradique.tokenizer.tokenizer import encode_prompt
from fradique.training import evaluation, loss_plot, time_budget
from fradique.training.logger import format_count
from lab import (
    anatomy,
    animation,
    architecture_diagram,
    attention,
    common,
    curves,
    embeddings,
    html_page,
    movie,
    tokens,
)
from lab.token_groups import token_groups
from model import GPTConfig
from sample import LoadedModel
from train import TrainSettings

MAX_ATTENTION_TOKENS = 40
MAX_HEADS = 64  # heat maps; of more heads, the first and the last 32 are shown
MAX_EDGES = 6000  # lines in the 3D view of attention
MAX_EMBEDDED_TOKENS = 400
MAX_SAMPLE_CHARACTERS = 4000
MAX_SAMPLES = 8
MAX_SCORED_TOKENS = 512  # of the last sample: the text that is colored by loss
TOP_TOKENS = 16  # most probable next tokens
MOVIE_SECONDS, MOVIE_FPS = 6.0, 8


@dataclass(frozen=True)
class ReportSettings(common.PromptSettings):  # the docstring is the first line of --help
    """python -m lab.report --out_dir=out/<run> [--start="A figura é poética"]"""

    save_arrays: str = setting("", "also write the ids of the analyzed tokens to this .npz file", path=True)
    start: str = setting(
        "",
        "text to analyze; empty: the run's last sample, or, without samples, the beginning of its validation "
        "text",
        group="text",
        escapes=True,
    )


Section = tuple[str, list[str]]  # title, and the HTML below it


def settings_section(saved: dict[str, Any]) -> Section:
    """The settings that differ from their defaults, then the others."""
    default = TrainSettings()
    names = [field.name for field in fields(TrainSettings) if field.name in saved]
    changed = [name for name in names if saved[name] != getattr(default, name)]
    changed_rows = [(name, repr(saved[name]), repr(getattr(default, name))) for name in changed]
    default_rows = [(name, repr(saved[name])) for name in names if name not in changed]
    return (
        "Settings",
        [
            html_page.table(changed_rows, ("changed setting", "value", "default")),
            html_page.collapsible(
                f"{len(default_rows)} settings with their default value", html_page.table(default_rows)
            ),
        ],
    )


def summary(records: list[dict[str, Any]], config: GPTConfig, parameters: int) -> str:
    """The model's size and the run's result, as a paragraph."""
    shape = f"{config.n_layer} layers, {config.n_head} heads, n_embd {config.n_embd}"
    parts = [f"{format_count(parameters)} parameters ({shape}, {config.block_size} tokens of context)"]
    final = next((r for r in reversed(records) if {"final_loss", "seconds"} <= r.keys()), None)
    if final:
        loss, bits = final["final_loss"], final.get("final_bits_per_byte")
        is_whole = final.get("final_tokens") == final.get("final_split_tokens")  # older runs have neither
        part = (
            "whole validation split"
            if is_whole
            else f"{final['final_tokens']:,} tokens of the validation split"
        )
        result = f"{part}: loss {loss:.4f}, perplexity {evaluation.perplexity(loss):.2f}"
        parts.append(result + (f", {bits:.3f} bits per byte" if bits else ""))
        parts.append(f"{final['step']:,} steps in {time_budget.format_duration(final['seconds'])}")
    return html_page.note("; ".join(parts))


def curves_section(folder: Path) -> Section:
    return "Loss curves", [curves.curves_html([loss_plot.read_curves(folder)])]


def samples_section(samples: list[tuple[int, str]]) -> Section:
    """At most MAX_SAMPLES of the samples (step, text), at equal intervals; only the last is open."""
    if not samples:
        return "Samples during training", [html_page.note("The run has no samples.")]
    last = len(samples) - 1
    parts = []
    for i in np.unique(np.linspace(0, last, MAX_SAMPLES).astype(int)):
        step, text = samples[i]
        content = html_page.sample_text(text[:MAX_SAMPLE_CHARACTERS])
        parts.append(html_page.collapsible(f"step {step:,}", content, is_open=i == last))
    return "Samples during training", parts


def text_to_analyze(
    loaded: LoadedModel, settings: ReportSettings, samples: list[tuple[int, str]]
) -> np.ndarray:
    """The token ids (T,) of --start, or of the beginning of the last sample.

    If there is neither, those of the beginning of the run's validation text. Raises ValueError if --start is
    longer than the model's context.
    """
    text = samples[-1][1].strip() if samples else ""
    if settings.start or not text:
        return common.prompt_tokens(loaded, settings, MAX_SCORED_TOKENS, fallback="")
    ids = encode_prompt(loaded.tokenizer, text).astype(np.int64)
    return ids[: min(loaded.model.config.block_size, MAX_SCORED_TOKENS)]


def text_sections(loaded: LoadedModel, ids: np.ndarray) -> list[Section]:
    """The text colored by loss, and the most probable tokens after it."""
    tokenizer = loaded.tokenizer
    logits = tokens.all_logits(loaded.model, common.to_batch(loaded, ids), tokenizer.vocab_size)
    sections: list[Section] = []
    if len(ids) > 1:
        scores = tokens.score_tokens(logits, ids)
        sections.append(("Loss of each token of a text", tokens.loss_colored_text(tokenizer, ids, scores)))
    order = (
        tokens.probabilities(logits[-1]).argsort()[::-1][:TOP_TOKENS].copy()
    )  # torch has no negative strides
    slider = tokens.temperature_slider(logits[-1], order, common.token_labels(tokenizer, order))
    sections.append(("Most probable tokens after the text", [slider]))
    return sections


def attention_section(loaded: LoadedModel, ids: np.ndarray) -> Section:
    """The attention weights for the beginning of the text, as heat maps and in 3D."""
    ids = ids[:MAX_ATTENTION_TOKENS]
    labels = common.token_labels(loaded.tokenizer, ids)
    weights = attention.attention_weights(loaded.model, common.to_batch(loaded, ids))
    heads = attention.select_heads(weights)
    if len(heads) > MAX_HEADS:
        heads = heads[: MAX_HEADS // 2] + heads[-(MAX_HEADS // 2) :]
    edges = attention.attention_edges(weights, edge_threshold(weights))
    return (
        "Attention weights",
        [
            attention.heatmap_html(weights, labels, heads),
            html_page.note(attention.VIEW_3D_HELP),
            attention.view_3d_html(edges, labels, weights.shape),
        ],
    )


def edge_threshold(weights: np.ndarray, max_edges: int = MAX_EDGES) -> float:
    """The attention weight below which no line is drawn: at most about `max_edges` lines remain."""
    descending = np.sort(weights, axis=None)[::-1]
    return max(attention.MIN_WEIGHT, float(descending[min(max_edges, len(descending) - 1)]))


def embeddings_section(loaded: LoadedModel, folder: Path, checkpoint: str) -> Section:
    """The embeddings of the checkpoint, in two dimensions."""
    settings = embeddings.EmbeddingSettings(out_dir=str(folder), most=MAX_EMBEDDED_TOKENS)
    n_tokens = min(MAX_EMBEDDED_TOKENS, loaded.tokenizer.vocab_size)
    labels = common.token_labels(loaded.tokenizer, np.arange(n_tokens))
    groups = token_groups(loaded.tokenizer, range(n_tokens))
    tables = {f"checkpoint {checkpoint}": embeddings.read_embeddings(loaded.model, n_tokens)}
    projections = embeddings.project_all(tables, settings)
    return "Embeddings", embeddings.projections_html(projections, labels, groups)


def movie_section(folder: Path) -> Section:
    """An animated GIF of the embeddings during training, or how to get one."""
    title = "Embeddings during training"
    if len(embedding_snapshots.snapshot_paths(folder)) < 2:
        advice = "For an animation of the embeddings here, train with snapshots: --snapshot_interval=50"
        return title, [html_page.note(advice)]
    settings = movie.MovieSettings(out_dir=str(folder), seconds=MOVIE_SECONDS, fps=MOVIE_FPS)
    frames = movie.render_frames(movie.load_movie(settings))
    gif = io.BytesIO()
    animation.write_gif(frames, gif, 1 / MOVIE_FPS, movie.PAUSE_SECONDS)
    return title, [html_page.embedded_image(gif.getvalue(), "gif", "embeddings through training")]


def architecture_section(config: GPTConfig) -> Section:
    """The diagram of the model, and the table of its modules."""
    stats = anatomy.module_stats(config, batch=1, tokens=config.block_size)
    svg = architecture_diagram.draw_svg(stats, config, batch=1, tokens=config.block_size)
    diagram = html_page.embedded_image(svg.encode(), "svg+xml", "the model's modules, from tokens to logits")
    table = f"<pre>{escape(anatomy.format_table(stats))}</pre>"
    return "Architecture", [diagram, html_page.collapsible("as text", table)]


def speed_section(records: list[dict[str, Any]], metadata: dict[str, Any]) -> Section:
    """Training throughput, device, versions and git commit. metadata: from `run_folder.run_metadata`."""
    decided = metadata["decided"]  # the automatic choices
    notes = decided.get("notes", [])
    rows = speed_rows(records)
    rows += [("device", str(decided["device"]))] if "device" in decided else []
    rows += [
        ("note", str(note)) for note in (notes if isinstance(notes, list) else [])
    ]  # may be edited by hand
    rows += [(name, str(version)) for name, version in metadata["versions"].items()]
    rows.append(("git commit", str(metadata["git_commit"])))
    return "Speed and machine", [html_page.table(rows)]


def speed_rows(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Tokens per second, milliseconds per step, and training tokens; none without logged steps.

    The medians of what the run logged: the time of evaluations, samples and checkpoints is not counted.
    """
    logged = [
        record for record in records if {"tokens_per_second", "step_seconds", "tokens"} <= record.keys()
    ]
    if not logged:
        return []
    tokens_per_second, step_seconds = (
        statistics.median(record[key] for record in logged) for key in ("tokens_per_second", "step_seconds")
    )
    return [
        ("tokens per second (median over log intervals)", f"{tokens_per_second:,.0f}"),
        ("time per step (median)", f"{1000 * step_seconds:.4g} ms"),
        ("training tokens at the last log line", f"{logged[-1]['tokens']:,}"),
    ]


def section_id(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def main(resolved: Resolved[ReportSettings]) -> int:
    settings = resolved.settings
    if settings.init_from:
        raise ValueError("a report needs a run folder: use --out_dir instead of --init_from")
    folder = Path(settings.out_dir)
    saved, metadata = run_folder.saved_settings(folder), run_folder.run_metadata(folder)
    records, samples = metrics_file.read_metrics(folder), metrics_file.read_samples(folder)
    loaded = common.open_model(settings)
    config = loaded.model.config
    ids = text_to_analyze(loaded, settings, samples)
    sections = [
        settings_section(saved),
        curves_section(folder),
        samples_section(samples),
        *text_sections(loaded, ids),
        attention_section(loaded, ids),
        embeddings_section(loaded, folder, settings.checkpoint),
        movie_section(folder),
        architecture_section(config),
        speed_section(records, metadata),
    ]
    links = [f'<a href="#{section_id(title)}">{escape(title)}</a>' for title, _ in sections]
    parts = [summary(records, config, loaded.model.num_params(non_embedding=False))]
    parts.append(f"<nav>{' · '.join(links)}</nav>")
    for title, content in sections:
        parts += [f'<h2 id="{section_id(title)}">{escape(title)}</h2>', *content]
    path = common.add_extension(common.output_path(settings, "report"), ".html")
    html_page.write_page(path, loss_plot.run_name(folder), parts)
    common.save_arrays(settings.save_arrays, {"ids": ids})
    return 0


if __name__ == "__main__":
    sys.exit(common.command(main, ReportSettings))
