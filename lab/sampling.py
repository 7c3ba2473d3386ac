"""How much generated text repeats itself, with greedy decoding and at several temperatures.

    python -m lab.sampling --out_dir=out/eca-char --start="A casa" --temperatures=0,0.5,0.8,1,1.3

Prints a table with a row for each temperature: the share of distinct n-grams, the share of tokens that repeat
earlier text, and, if the text ends in a loop, the length of the loop. Writes the table as a bar chart (PNG),
and the texts with their repeated tokens marked (HTML).

Shapes: N samples, T tokens.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from matplotlib.figure import Figure

from configurator import Resolved, setting
from fradique.training.loss_plot import COLORS
from lab import common, html_page
from sample import LoadedModel

PROMPT_TOKENS = 16  # of the default prompt, at most
NGRAM_SIZES = (1, 2, 3, 4)
REPEAT_LENGTH = 8  # a token counts as repeated if the 8 tokens that end with it occurred before
SAMPLES_SHOWN = 2  # samples of each temperature on the HTML page


@dataclass(frozen=True)
class SamplingSettings(common.PromptSettings):
    """python -m lab.sampling --out_dir=out/<run> [--start="A casa"] [--temperatures=0,0.8,1.2]"""

    temperatures: str = setting(
        "0,0.5,0.8,1,1.3", "comma-separated; 0: greedy, always the most probable token"
    )
    tokens: int = setting(300, "length of each sample in tokens", lo=REPEAT_LENGTH + 1)
    samples: int = setting(4, "samples per temperature; the table shows their means", lo=1, hi=64)
    seed: int = setting(1337, "random seed; the same seed gives the same samples", lo=0, hi=2**62)

    def problems(self) -> list[str]:
        return common.number_problems("temperatures", self.temperatures, minimum=0.0)


@dataclass(frozen=True)
class Repetition:
    """How much a text repeats itself."""

    distinct: tuple[float, ...]  # the share of distinct n-grams (Li et al. 2016), for each of NGRAM_SIZES
    repeated: float  # the share of repeated tokens, see `repeated_tokens`
    loop: int  # length of the loop at the end in tokens, see `loop_length`; 0: none


# Compute


def distinct_share(ids: Sequence[int], n: int) -> float:
    """The number of different n-grams in ids (T,), divided by the number of all n-grams; 1 if T < n."""
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def repeated_tokens(ids: Sequence[int], length: int = REPEAT_LENGTH) -> np.ndarray:
    """For each token of ids (T,), whether the `length` tokens that end with it occurred before: (T,) bool."""
    previous_ngrams, repeated = set(), np.zeros(len(ids), dtype=bool)
    for end in range(length, len(ids) + 1):
        ngram = tuple(ids[end - length : end])
        repeated[end - 1] = ngram in previous_ngrams
        previous_ngrams.add(ngram)
    return repeated


def loop_length(ids: Sequence[int], times: int = 3) -> int:
    """The length of the shortest sequence that ids (T,) repeat at their end, at least `times` times.

    0 if there is none.
    """
    ids = list(ids)
    for length in range(1, len(ids) // times + 1):
        if ids[-length * times :] == ids[-length:] * times:
            return length
    return 0


def measure_repetition(ids: Sequence[int]) -> Repetition:
    """The repetition in the ids (T,) of one text."""
    distinct = tuple(distinct_share(ids, n) for n in NGRAM_SIZES)
    return Repetition(distinct, float(repeated_tokens(ids).mean()), loop_length(ids))


def mean_repetition(samples: Sequence[Repetition]) -> Repetition:
    """The mean over several samples, with the loop of the first sample that ends in one."""
    distinct = np.mean([sample.distinct for sample in samples], axis=0)
    repeated = float(np.mean([sample.repeated for sample in samples]))
    loops = [sample.loop for sample in samples if sample.loop]
    return Repetition(tuple(distinct), repeated, loop=loops[0] if loops else 0)


def generate_samples(
    loaded: LoadedModel, prompt: np.ndarray, temperature: float, settings: SamplingSettings
) -> np.ndarray:
    """Generate tokens (N, T) after the prompt. With temperature 0 all samples are equal, so N is 1."""
    n_samples = 1 if temperature == 0 else settings.samples
    generator = torch.Generator(loaded.runtime.device)
    generator.manual_seed(settings.seed)
    idx = common.to_batch(loaded, prompt).repeat(n_samples, 1)
    n_vocab = loaded.tokenizer.vocab_size
    output = loaded.model.generate(idx, settings.tokens, temperature, n_vocab=n_vocab, generator=generator)
    return output[:, idx.size(1) :].cpu().numpy()


# Draw


def temperature_name(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def summary_table(results: dict[float, Repetition]) -> str:
    """A Markdown table with a row for each temperature."""
    header = ["", *(f"distinct-{n}" for n in NGRAM_SIZES), "repeated", "ends in a loop of"]
    rows = []
    for temperature, result in results.items():
        shares = [f"{share:.2f}" for share in (*result.distinct, result.repeated)]
        loop = f"{result.loop} tokens" if result.loop else "–"
        rows.append([temperature_name(temperature), *shares, loop])
    return common.markdown_table(header, rows)


def draw_bars(results: dict[float, Repetition]) -> Figure:
    """Bars for the shares of distinct n-grams and of repeated tokens, in a group for each temperature."""
    width = max(5.0, 1.2 + 1.5 * len(results))  # inches; the legend needs 5
    figure = Figure(figsize=(width, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    series = {f"distinct-{n}": [r.distinct[i] for r in results.values()] for i, n in enumerate(NGRAM_SIZES)}
    series["repeated"] = [r.repeated for r in results.values()]
    bar_width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        xs = np.arange(len(values)) + (i - (len(series) - 1) / 2) * bar_width
        hatch = "//" if label == "repeated" else None
        axes.bar(xs, values, bar_width * 0.9, label=label, color=COLORS[i], hatch=hatch)
    axes.set_xticks(range(len(results)), [temperature_name(t) for t in results], fontsize=9)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of the text")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("distinct n-grams and repeated tokens", fontsize=11)
    axes.legend(frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=8)
    return figure


def marked_text(labels: list[str], repeated: np.ndarray) -> str:
    """A text as HTML, with its repeated tokens marked."""
    spans = []
    for label, is_repeated in zip(labels, repeated, strict=True):
        line_break = "<br>" if label.endswith(common.NEWLINE_SYMBOL) else ""
        text = escape(label.replace(common.WHITESPACE_SYMBOLS[" "], " "))
        spans.append((f"<mark>{text}</mark>" if is_repeated else text) + line_break)
    return html_page.token_text(spans)


def main(resolved: Resolved[SamplingSettings]) -> int:
    settings = resolved.settings
    loaded = common.open_model(settings)
    prompt = common.prompt_tokens(loaded, settings, PROMPT_TOKENS, fallback="A casa")
    samples = {
        temperature: generate_samples(loaded, prompt, temperature, settings)
        for temperature in common.parse_numbers(settings.temperatures)
    }
    results = {
        temperature: mean_repetition([measure_repetition(ids.tolist()) for ids in rows])
        for temperature, rows in samples.items()
    }
    print(summary_table(results))
    path = common.output_path(settings, "sampling")
    common.write_figure(draw_bars(results), common.add_extension(path, ".png"))
    note = (
        f"A token is marked if it and the {REPEAT_LENGTH - 1} tokens before it occurred earlier in the text."
    )
    parts = [html_page.note(note)]
    for temperature, rows in samples.items():
        parts.append(f"<h2>{temperature_name(temperature)}</h2>")
        for ids in rows[:SAMPLES_SHOWN]:
            labels = common.token_labels(loaded.tokenizer, ids)
            parts.append(marked_text(labels, repeated_tokens(ids.tolist())))
    html_page.write_page(common.add_extension(path, ".html"), "Greedy and sampled text", parts)
    common.save_arrays(settings.save_arrays, {temperature_name(t): rows for t, rows in samples.items()})
    return 0


if __name__ == "__main__":
    sys.exit(common.command(main, SamplingSettings))
