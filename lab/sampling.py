"""How a model writes when it takes the likeliest token, and when it draws: why greedy text goes in circles.

    python -m lab.sampling --out_dir=out/eca-char --start="A casa" --temperatures=0,0.5,0.8,1,1.3

Prints a table: the share of distinct n-grams, how much of the text repeats what stands before it, and the
loop that the text ends in, where it does. Writes the texts side by side, what repeats marked (HTML), and the
figures as a picture (PNG).

Shapes: N samples, T tokens.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from configurator import Resolved, command, setting
from fradique.training.loss_plot import COLORS
from lab import common, html_page
from sample import LoadedModel

NGRAMS = (1, 2, 3, 4)
LONG = 8  # tokens of a run that count as repeated where they stood before


@dataclass(frozen=True)
class SamplingSettings(common.LookSettings):
    """python -m lab.sampling --out_dir=out/<run> --start="A casa" [--temperatures=0,0.8,1.2]"""

    start: str = setting("A casa", "the prompt: text, FILE:path, or -", group="text")
    temperatures: str = setting("0,0.5,0.8,1,1.3", "with commas between them; 0: always the likeliest")
    tokens: int = setting(300, "the length of each text", lo=LONG + 1)
    samples: int = setting(4, "drawn at each temperature; figures are their means", lo=1, hi=64)
    seed: int = setting(1337, "the same seed gives the same texts", lo=0, hi=2**62)

    def problems(self) -> list[str]:
        return common.problems_of_numbers("temperatures", self.temperatures, least=0.0)


@dataclass(frozen=True)
class Repetition:
    """How a text repeats itself."""

    distinct: tuple[float, ...]  # of NGRAMS: the share of them that is distinct (Li et al. 2016)
    repeated: float  # the share of tokens that end LONG tokens which stood before
    loop: int  # tokens of the loop that the text ends in; 0: none


# Compute


def distinct(ids: Sequence[int], n: int) -> float:
    """The share of the n-grams of ids (T,) that are distinct; 1 where there is none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repeats(ids: Sequence[int], long: int = LONG) -> np.ndarray:
    """(T,) bool: whether a token ends `long` tokens that stood earlier in ids (T,)."""
    seen, found = set(), np.zeros(len(ids), dtype=bool)
    for end in range(long, len(ids) + 1):
        gram = tuple(ids[end - long : end])
        found[end - 1] = gram in seen
        seen.add(gram)
    return found


def loop(ids: Sequence[int], times: int = 3) -> int:
    """The length of the shortest piece with which ids (T,) end, `times` times in a row; 0: none."""
    ids = list(ids)
    for length in range(1, len(ids) // times + 1):
        piece = ids[-length:]
        if all(ids[-length * (k + 1) : len(ids) - length * k] == piece for k in range(1, times)):
            return length
    return 0


def measure(ids: Sequence[int]) -> Repetition:
    return Repetition(tuple(distinct(ids, n) for n in NGRAMS), float(repeats(ids).mean()), loop(ids))


def write_samples(
    writer: LoadedModel, prompt: np.ndarray, temperature: float, settings: SamplingSettings
) -> np.ndarray:
    """Texts (N, tokens) behind the prompt (T,); one where nothing is drawn."""
    rows = 1 if temperature == 0 else settings.samples
    generator = torch.Generator(writer.runtime.device)
    generator.manual_seed(settings.seed)
    idx = common.as_batch(writer, prompt).repeat(rows, 1)
    made = writer.model.generate(
        idx, settings.tokens, temperature, n_vocab=writer.tokenizer.vocab_size, generator=generator
    )
    return made[:, idx.size(1) :].cpu().numpy()


def mean(found: Sequence[Repetition]) -> Repetition:
    """Of several samples; the loop is that of the first that has one."""
    shares = np.mean([one.distinct for one in found], axis=0)
    loops = [one.loop for one in found if one.loop]
    return Repetition(
        tuple(shares), float(np.mean([one.repeated for one in found])), loops[0] if loops else 0
    )


# Draw


def name_of(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def table(found: dict[float, Repetition]) -> str:
    """Markdown: a row for each temperature."""
    head = ["", *(f"distinct-{n}" for n in NGRAMS), "repeated", "ends in a loop of"]
    lines = [head, ["---"] * len(head)]
    for temperature, one in found.items():
        shares = [f"{share:.2f}" for share in (*one.distinct, one.repeated)]
        lines.append([name_of(temperature), *shares, f"{one.loop} tokens" if one.loop else "–"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(found: dict[float, Repetition], path: Path) -> None:
    """Distinct n-grams and the repeated part, a group of bars for each temperature."""
    figure = Figure(figsize=(1.2 + 1.5 * len(found), 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    series = {f"distinct-{n}": [one.distinct[i] for one in found.values()] for i, n in enumerate(NGRAMS)}
    series["repeated"] = [one.repeated for one in found.values()]
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        places = np.arange(len(values)) + (i - (len(series) - 1) / 2) * width
        hatch = "//" if label == "repeated" else None
        axes.bar(places, values, width * 0.9, label=label, color=COLORS[i], hatch=hatch)
    axes.set_xticks(range(len(found)), [name_of(temperature) for temperature in found], fontsize=9)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of the text")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("how much of a text is new, and how much repeats it", fontsize=11)
    axes.legend(frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=8)
    figure.savefig(path)


def marked(names: list[str], again: np.ndarray) -> str:
    """A text as HTML, its repeated tokens marked."""
    spans = []
    for name, repeated in zip(names, again, strict=True):
        end = "<br>" if name == common.LINE_END else ""
        text = html_page.escape(name.replace("␣", " "))
        spans.append((f"<mark>{text}</mark>" if repeated else text) + end)
    return f'<p class="text">{"".join(spans)}</p>'


def main(resolved: Resolved[SamplingSettings]) -> int:
    settings = resolved.settings
    writer = common.open_model(settings)
    prompt = common.prompt_ids(writer, settings.start)
    texts = {
        temperature: write_samples(writer, prompt, temperature, settings)
        for temperature in common.numbers(settings.temperatures)
    }
    found = {
        temperature: mean([measure(ids.tolist()) for ids in rows]) for temperature, rows in texts.items()
    }
    print(table(found))
    path = common.place(settings, "sampling")
    common.write(path.with_suffix(".png"), lambda beside: draw(found, beside))
    parts = [html_page.note(f"Marked: what ends {LONG} tokens that stood in the text before.")]
    for temperature, rows in texts.items():
        parts.append(f"<h2>{name_of(temperature)}</h2>")
        parts += [marked(common.labels(writer.tokenizer, ids), repeats(ids.tolist())) for ids in rows[:2]]
    html_page.write(path.with_suffix(".html"), "Greedy, and drawn", parts)
    common.save_arrays(
        settings.save_arrays, {name_of(temperature): rows for temperature, rows in texts.items()}
    )
    return 0


if __name__ == "__main__":
    sys.exit(command(main, SamplingSettings))
