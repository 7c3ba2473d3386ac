"""The READMEs and docs/: links and commands exist, settings are valid, and both languages agree."""

import importlib
import re
import shlex

import pytest
from support import ROOT

from bench import architectures
from configurator import resolve
from lab import anatomy, attention, curves, embeddings, movie, report, sampling, tokenizers, tokens
from sample import SampleSettings
from train import TrainSettings

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("reference/*.md")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
SETTINGS = {
    "train.py": TrainSettings,
    "sample.py": SampleSettings,
    "lab.anatomy": anatomy.AnatomySettings,
    "lab.attention": attention.AttentionSettings,
    "lab.curves": curves.CurveSettings,
    "lab.embeddings": embeddings.EmbeddingSettings,
    "lab.journey": None,  # its flags are settings of train.py
    "lab.movie": movie.MovieSettings,
    "lab.report": report.ReportSettings,
    "lab.sampling": sampling.SamplingSettings,
    "lab.tokenizers": tokenizers.TokenizersSettings,
    "lab.tokens": tokens.TokenSettings,
}
# examples, and a file that `make` builds
NOT_IN_THE_REPOSITORY = {"config/arch/mine.py", "data/NAME", "reference/build/gpt2"}


def commands(text):
    """The Python commands of a page, in blocks and in backticks: the script or module and its arguments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    for line in lines:
        call = re.search(r"(?:python[\w.]*|torchrun)\s+(.*)", line.split("   #")[0])
        if call and "…" not in line and "<" not in line and "'" not in line and "bench.py" not in line:
            arguments = shlex.split(call[1].split(" | ")[0])
            starts = [i for i, arg in enumerate(arguments) if arg.endswith(".py") or arg == "-m"]
            if starts:
                start = starts[0] + (arguments[starts[0]] == "-m")
                yield arguments[start:]


COMMANDS = sorted({tuple(command) for text in TEXTS.values() for command in commands(text)})
SETTINGS_COMMANDS = [command for command in COMMANDS if SETTINGS.get(command[0])]
OTHER_COMMANDS = [command for command in COMMANDS if not SETTINGS.get(command[0])]


def test_the_readme_fits_ten_kilobytes():
    assert len(TEXTS["README.md"].encode()) <= 10_240
    assert len(TEXTS["README.pt-BR.md"].encode()) <= 11_264


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_pictures_exist(page):
    text = re.sub(r"```.*?```|\$`.*?`\$", "", TEXTS[page], flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def test_the_pages_contain_many_commands():
    assert len(SETTINGS_COMMANDS) > 40 and len(OTHER_COMMANDS) > 20


@pytest.mark.parametrize("command", SETTINGS_COMMANDS, ids=" ".join)
def test_settings_in_documented_commands_are_valid(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [argument for argument in command[1:] if not argument.startswith("out/")]  # files of a run
    resolve(SETTINGS[command[0]], arguments)


@pytest.mark.parametrize("command", OTHER_COMMANDS, ids=" ".join)
def test_documented_commands_and_their_flags_exist(command):
    name, *arguments = command
    if name in ("pip", "pytest", "venv"):
        return
    module = name.replace(".", "/")
    candidates = [ROOT / name, ROOT / f"{module}.py", ROOT / module / "__main__.py"]
    path = next(path for path in candidates if path.is_file())
    source = path.read_text(encoding="utf-8")
    if path.name == "prepare.py":
        source = (ROOT / "fradique/data/prepare.py").read_text(encoding="utf-8")
    for argument in arguments:
        if argument.startswith("config/"):
            assert (ROOT / argument).is_file(), argument
        elif re.match("--[a-z]", argument):
            flag = argument[2:].partition("=")[0]
            assert (
                re.search(rf'["\-]{flag}["=]', source) or hasattr(TrainSettings(), flag) or flag == "help"
            ), argument


def test_modules_and_tests_in_the_text_exist():
    for page, text in TEXTS.items():
        for name in re.findall(
            r"`((?:fradique|tests|lab|bench|reference|docs|config|data)/[\w./-]*\w)/?`", text
        ):
            assert (ROOT / name).exists() or name in NOT_IN_THE_REPOSITORY, (page, name)
        for name in re.findall(r"`?python -m ((?:lab|bench)\.\w+)", text):
            importlib.import_module(name)


def test_both_readmes_have_the_same_sections_and_pictures():
    english, portuguese = TEXTS["README.md"], TEXTS["README.pt-BR.md"]
    for pattern in (r"^#+ ", r"^\|", r"^```"):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, portuguese, re.M)), pattern
    assert re.findall(r"pictures/[\w.-]+", english) == re.findall(r"pictures/[\w.-]+", portuguese)
    assert len(re.findall(r"^## ", TEXTS["docs/LESSONS.md"], re.M)) == len(
        re.findall(r"^## ", TEXTS["docs/LESSONS.pt-BR.md"], re.M)
    )


def test_portuguese_pages_write_decimal_commas():
    for page in ("README.pt-BR.md", "docs/LESSONS.pt-BR.md"):
        text = re.sub(r"```.*?```|`[^`]*`|Python 3\.\d+ a 3\.\d+|\]\([^)]*\)", "", TEXTS[page], flags=re.S)
        assert re.findall(r"\d\.\d\d?\b(?!\d)", text) == []


def test_architectures_md_has_a_row_for_every_architecture():
    text = TEXTS["docs/ARCHITECTURES.md"]
    for name in architectures.ARCHITECTURES:
        assert f"| `{name}` |" in text
    assert architectures.TABLE_FILE == ROOT / "docs" / "ARCHITECTURES.md"
    assert all(text.count(mark) == 1 for mark in architectures.MARKS)


def test_the_measured_table_is_replaced_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{architectures.MARKS[0]}\nold\n{architectures.MARKS[1]}\nafter\n")
    architectures.write_table(page, "| new |")
    assert page.read_text() == f"before\n{architectures.MARKS[0]}\n| new |\n{architectures.MARKS[1]}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"page\.md"):
        architectures.write_table(page, "| new |")
