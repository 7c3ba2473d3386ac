"""Text from users is drawn as it is written, in every picture and page: no mathematics, no tags, no gaps.

Matplotlib parses "$x_1$" as mathematics and leaves labels that begin with "_" out of its legends. Plotly
parses "<b>" and "&lt;". Here tokens, names of runs and groups, prompts and samples contain all of them.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")
pytest.importorskip("sklearn", reason="t-SNE and PCA need scikit-learn")

import matplotlib
from matplotlib.backends.backend_agg import RendererAgg
from support import TrainSettings, run_lab, run_training, write_corpus

from fradique.training import loss_plot, outputs
from lab import animation, common, embeddings, html_page, journey, report, tokens

pytestmark = pytest.mark.xdist_group("hostile_text")  # one run for all tests

RUN_NAME = "_run $x_1$ <b>"
TEXT = "$x_1$ <b>ab</b> &lt; \\frac{a}{b}^2 % \"cd\" 'ef' %{x} e\u0301 日\x07\n"
# Labels of tokens of several characters, which a BPE may have; here they stand for single letters.
WORDS = {"a": "$x_1$", "b": "<b>", "c": "&lt;", "d": "_d", "e": "<br>", "f": "\\frac{1}{"}
SYMBOLS = {" ": "␣", "\n": "⏎", "\x07": "‹7›", "\u0301": "◌\u0301"}
LABELS = {WORDS.get(c, SYMBOLS.get(c, c)) for c in TEXT}
GROUPS = ["_g $x$", "<i>"]
PROMPT = "$x_1$ <b>&\\^{"
SCRIPTS = ["attention", "tokens", "sampling", "tokenizers", "embeddings", "movie", "curves", "journey"]
PAGE_TAGS = "html head meta title style script body h1 h2 p span br mark div nav a img table tr td th details"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with a hostile name, of a model of characters that was trained for two steps."""
    folder = tmp_path_factory.mktemp("hostile")
    write_corpus(folder / "data $_1$", TEXT * 40)
    settings = replace(
        TrainSettings(),
        **{"out_dir": str(folder / RUN_NAME), "data_dir": str(folder), "dataset": "data $_1$"},
        **{"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 24, "batch_size": 2, "device": "cpu"},
        **{"max_iters": 2, "eval_interval": 1, "eval_iters": 1, "gradient_accumulation_steps": 1},
        **{"warmup_iters": 1, "compile": False, "snapshot_interval": 1, "sample_tokens": 40},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "draw_loss_plot", lambda t: None)
        run_training(settings)
    return folder / RUN_NAME


@dataclass
class Drawn:
    """What a command has drawn."""

    texts: set[str]  # each line of text in its pictures, without spaces around it
    mathematics: list[str]  # those that matplotlib parsed as mathematics
    page: str  # HTML


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory) -> dict[str, Drawn]:
    """Command -> what it draws of the run."""
    folder = tmp_path_factory.mktemp("drawn")
    text = folder / "text.txt"
    text.write_text(TEXT * 3, encoding="utf-8")
    groups = f"--groups={GROUPS[0]}=abcdef;{GROUPS[1]}=$_<>"
    options = {
        "attention": [f"--start={PROMPT}"],
        "tokens": [f"--start={PROMPT}", "--top=40", "--temperatures=1"],
        "sampling": [f"--start={PROMPT}", "--tokens=40", "--temperatures=0,1", "--samples=1"],
        "tokenizers": [f"--input={text}", "--bpe=280"],
        "embeddings": [groups],
        "movie": [groups, "--seconds=0.1"],
        "curves": [],
        "report": [],
    }
    result = {}
    with pytest.MonkeyPatch.context() as patch:
        calls = record_text(patch)
        make_fast(patch)
        real_labels = common.token_labels
        patch.setattr(
            common, "token_labels", lambda *args: [WORDS.get(label, label) for label in real_labels(*args)]
        )
        for name, arguments in options.items():
            calls.clear()
            to = folder / name
            out_dir = f"{run},{run}" if name == "curves" else run  # two runs: their names are in the legend
            status = run_lab(f"lab.{name}", f"--out_dir={out_dir}", f"--to={to}", *arguments)
            assert status.returncode == 0, status.stderr
            pages = [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"{name}*.html"))]
            result[name] = drawn_in(calls, "".join(pages))
        calls.clear()
        results = [replace(journey.read_result(run), parameters=size) for size in (1000, 2000)]
        common.write_figure(journey.draw_comparison(results), folder / "journey.png")
        result["journey"] = drawn_in(calls, html_page.page("runs", journey.page_parts(results, [run, run])))
    return result


def record_text(patch) -> list[tuple[str, object]]:
    """The text that matplotlib draws from now on, and whether it is parsed: False, True or "TeX"."""
    calls = []
    draw_text = RendererAgg.draw_text

    def record(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        calls.append((s, ismath))
        draw_text(self, gc, x, y, s, prop, angle, ismath=ismath, mtext=mtext)

    patch.setattr(RendererAgg, "draw_text", record)
    patch.setattr(RendererAgg, "draw_tex", lambda *args, **kwargs: calls.append((args[4], "TeX")))
    return calls


def drawn_in(calls, page: str) -> Drawn:
    mathematics = [text for text, is_parsed in calls if is_parsed]
    return Drawn({text.strip() for text, _ in calls}, mathematics, page)


def make_fast(patch) -> None:
    """No t-SNE, no garbage collection, few frames, few pixels, and no plotly.js in the pages."""
    patch.setattr(loss_plot, "gc", SimpleNamespace(collect=lambda: None))
    patch.setitem(matplotlib.rcParams, "savefig.dpi", 30)
    patch.setattr(embeddings, "project", lambda points, *args, **kwargs: points[:, :2])
    patch.setattr(animation, "write_mp4", lambda frames, path, seconds: path.write_bytes(b""))
    patch.setattr(tokens, "write_temperature_gif", lambda logits, order, labels, path: path.write_bytes(b""))
    patch.setattr(report, "MOVIE_SECONDS", 0.1)
    patch.setattr(html_page, "get_plotlyjs", lambda: "")


def prompt_labels() -> set[str]:
    return {WORDS.get(c, SYMBOLS.get(c, c)) for c in PROMPT}


# Pictures


@pytest.mark.parametrize("name", SCRIPTS)
def test_matplotlib_parses_no_text_as_mathematics(drawn, name):
    assert drawn[name].texts and drawn[name].mathematics == []


def test_all_labels_of_tokens_are_in_the_pictures(drawn):
    assert drawn["attention"].texts >= prompt_labels()
    for name in ("tokens", "embeddings", "movie"):
        assert drawn[name].texts >= LABELS, name
    assert drawn["tokenizers"].texts >= set("".join(SYMBOLS.get(c, c) for c in TEXT)) - {"\u0301"}


def test_prompts_groups_and_runs_are_in_the_pictures(drawn):
    assert f"next token after “{PROMPT.replace(' ', '␣')}”" in drawn["tokens"].texts
    assert drawn["embeddings"].texts >= set(GROUPS) and drawn["movie"].texts >= set(GROUPS)
    assert f"{RUN_NAME}: step 2" in drawn["movie"].texts
    assert f"loss of {RUN_NAME}, {RUN_NAME}" in drawn["curves"].texts
    assert f"{RUN_NAME}: train" in drawn["curves"].texts  # in the legend
    assert RUN_NAME in drawn["journey"].texts


def test_loss_png_shows_the_name_of_its_run(run, tmp_path, monkeypatch):
    calls = record_text(monkeypatch)
    loss_plot.save_plot([loss_plot.read_curves(run)], tmp_path / "loss.png")
    assert (f"loss of {RUN_NAME}", False) in calls and not any(is_parsed for _, is_parsed in calls)
    loss_plot.save_plot([loss_plot.read_curves(run)], tmp_path / "loss.svg")
    assert ElementTree.parse(tmp_path / "loss.svg").getroot().tag.endswith("svg")


def test_the_diagram_of_the_model_is_valid_xml(run, tmp_path):
    result = run_lab("lab.anatomy", f"--out_dir={run}", f"--to={tmp_path / 'a'}")
    assert result.returncode == 0, result.stderr
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_unprintable_characters_of_a_name_are_shown_as_codes(tmp_path, monkeypatch):
    assert loss_plot.run_name(tmp_path / "a\n\x1b[1m\udcff é") == "a‹a›‹1b›[1m‹dcff› é"
    monkeypatch.chdir(tmp_path)
    assert loss_plot.run_name(Path()) == tmp_path.name


def test_a_users_matplotlibrc_does_not_turn_mathematics_on(run, tmp_path, monkeypatch):
    """With use_mathtext or usetex, matplotlib also writes the numbers at ticks between two "$"."""
    calls = record_text(monkeypatch)
    settings = {"text.usetex": True, "axes.formatter.use_mathtext": True}
    with matplotlib.rc_context(settings):
        figure = loss_plot.plot_losses([loss_plot.read_curves(run)])
        loss_plot.save_figure(figure, tmp_path / "loss.png")
        assert matplotlib.rcParams["text.usetex"]
    assert calls and not any(is_parsed for _, is_parsed in calls)
    assert not any("mathdefault" in text for text, _ in calls)


# Pages


class PageParser(HTMLParser):
    """Collects the tags, the visible text, the tooltips and the scripts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.tag, self.text, self.tooltips, self.scripts = set(), "", "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.tag = tag
        self.tooltips += [value for name, value in attrs if name == "title"]

    def handle_endtag(self, tag):
        self.tag = ""

    def handle_data(self, data):
        if self.tag == "script":
            self.scripts.append(data)
        elif self.tag != "style":
            self.text += data

    def figures(self) -> list[tuple]:
        """(data, layout, config) of each plotly figure."""
        decoder, result = json.JSONDecoder(), []
        for script in self.scripts:
            for match in re.finditer(r"Plotly\.newPlot\(", script):
                values, position = [], match.end()
                for _ in range(4):  # the id of the element, data, layout, config
                    position = re.compile(r"[\s,]*").match(script, position).end()
                    value, position = decoder.raw_decode(script, position)
                    values.append(value)
                result.append(tuple(values[1:]))
        return result


def strings(value, key="") -> list[tuple[str, str]]:
    """(key of the innermost object, string) of all strings in a JSON value."""
    if isinstance(value, str):
        return [(key, value)]
    if isinstance(value, dict):
        return [pair for name, item in value.items() for pair in strings(item, name)]
    return [pair for item in value for pair in strings(item, key)] if isinstance(value, list) else []


def shown_by_svg(text: str) -> str:
    """What plotly.js shows of a text: it reads some tags, and then entities (svg_text_utils.js)."""
    text = re.sub(r"</?(?:b|i|u|s|em|a|span|sub|sup)(?:\s[^<>]*)?>", "", re.sub(r"<br[^<>]*>", "\n", text))
    return re.sub(
        r"&(?:#\d+|#x[\da-fA-F]+|mu|amp|lt|gt|nbsp|times|plusmn|deg);", lambda m: unescape(m[0]), text
    )


def shown_by_webgl(text: str) -> str:
    """What plotly.js shows of a text in a 3D scene: it reads tags, and no entities (vectorize-text)."""
    return re.sub(r"</?(?:b|i|sub|sup|br)>", "", text).replace("\u200b", "")


PAGES = ["attention", "tokens", "sampling", "tokenizers", "embeddings", "curves", "journey", "report"]


@pytest.mark.parametrize("name", PAGES)
def test_text_adds_no_tags_to_a_page(drawn, name):
    parser = PageParser(drawn[name].page)
    assert parser.tags <= {*PAGE_TAGS.split(), "summary", "pre"}
    for data, _, config in parser.figures():
        assert config["typesetMath"] is False
        templates = [text for key, text in strings(data) if key == "hovertemplate"]
        assert not any("$" in template or "_run" in template for template in templates)


def shown_in_figures(page: str) -> set[str]:
    shown = set()
    for data, layout, _ in PageParser(page).figures():
        scene = layout.pop("scene", {})
        shown |= {shown_by_svg(text) for key, text in strings([data, layout]) if key != "hovertemplate"}
        shown |= {shown_by_webgl(text) for _, text in strings(scene)}
    return shown


def test_the_figures_of_pages_show_all_labels(drawn):
    assert shown_in_figures(drawn["attention"].page) >= prompt_labels()
    for name in ("tokens", "embeddings", "report"):
        assert shown_in_figures(drawn[name].page) >= LABELS, name
    assert shown_in_figures(drawn["embeddings"].page) >= set(GROUPS)
    for name in ("curves", "journey"):
        assert f"{RUN_NAME}: train" in shown_in_figures(drawn[name].page)


def test_the_3d_scene_shows_all_labels(drawn):
    scenes = [
        layout["scene"] for _, layout, _ in PageParser(drawn["attention"].page).figures() if "scene" in layout
    ]
    assert {shown_by_webgl(text) for text in scenes[0]["xaxis"]["ticktext"]} == prompt_labels()


def test_the_text_of_pages_shows_labels_prompts_and_names(drawn):
    parsers = {name: PageParser(drawn[name].page) for name in PAGES}
    assert any(tooltip.startswith("<b>: probability") for tooltip in parsers["tokens"].tooltips)
    assert f"after “{PROMPT.replace(' ', '␣')}”" in parsers["tokens"].text
    for label in LABELS:
        assert label in parsers["tokenizers"].text
    assert f"{RUN_NAME}: " in parsers["tokenizers"].text
    assert f"loss of {RUN_NAME}" in parsers["curves"].text
    assert f"Sample of {RUN_NAME}" in parsers["journey"].text
    assert RUN_NAME in parsers["report"].text and "data $_1$" in parsers["report"].text


def test_the_pages_have_no_control_characters(drawn):
    for name in PAGES:
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", drawn[name].page), name
    assert html_page.sample_text("a\x07\n<b>\t") == '<pre class="sample">a‹7›\n&lt;b&gt;\t</pre>'
