"""The import order: which package may import which, that there are no cycles, and no import side effects."""

import ast
import subprocess
import sys

import pytest
from support import ROOT, imported_names

# From left to right as in CONTRIBUTING.md. A module imports from its own package and from earlier rows only;
# packages of the same row do not import each other.
ORDER = (
    ("configurator", "fradique.io"),
    ("fradique.distributed", "fradique.tokenizer", "fradique.nn"),
    ("fradique.generation",),
    ("model",),
    ("fradique.data", "fradique.optim"),
    ("fradique.runtime",),
    ("fradique.checkpointing",),
    ("fradique.pretrained",),
    ("fradique.training",),
    ("sample", "train"),
    ("bench", "lab"),
)
LEVEL = {package: level for level, row in enumerate(ORDER) for package in row}
FILES = [
    p for pattern in ("*.py", "fradique/**/*.py", "lab/**/*.py", "bench/**/*.py") for p in ROOT.glob(pattern)
]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(FILES)
}
THIRD_PARTY_OF = {  # what these may import beside the standard library and the project
    "configurator": set(),
    "model": {"torch"},
    "fradique.nn": {"torch"},
    "fradique.generation": {"torch"},
    "fradique.io": set(),
}


def package_of(module):
    """fradique.io.files -> fradique.io; lab.tokens -> lab; train -> train."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "fradique" else parts[0]


IMPORTS = {module: imported_names(path, MODULES) for module, path in MODULES.items()}


def test_every_package_has_a_place_in_the_order():
    assert {package_of(module) for module in MODULES} - {"fradique"} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_packages_to_its_left(module):
    own = package_of(module)
    others = {package_of(name) for name in IMPORTS[module] if name in MODULES} - {own}
    assert {name for name in others if LEVEL[name] >= LEVEL[own]} == set()


def test_no_module_imports_itself_through_others():
    result, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in result:
            path.append(module)
            for name in sorted(IMPORTS[module] & MODULES.keys()):
                visit(name)
            result.add(path.pop())

    for module in MODULES:
        visit(module)


def test_the_reference_imports_nothing_of_the_project():
    for path in ROOT.glob("reference/**/*.py"):
        assert not {package_of(name) for name in imported_names(path)} & {*LEVEL, "fradique"}, path


@pytest.mark.parametrize("package", THIRD_PARTY_OF)
def test_low_packages_need_little_beside_the_standard_library(package):
    for module in (m for m in MODULES if package_of(m) == package):
        top = {name.split(".")[0] for name in IMPORTS[module] if name not in MODULES}
        assert top - set(sys.stdlib_module_names) <= THIRD_PARTY_OF[package], module


def test_nothing_is_pickled_and_what_is_unpickled_is_restricted():
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert "pickle.load(" not in text and "pickle.dump" not in text and "torch.save(" not in text, name
        for call in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(call), name


def test_every_corpus_has_a_short_prepare():
    for path in ROOT.glob("data/*/prepare.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path


PRELOADED = {
    "": "numpy, torch, torch.distributed, safetensors.torch, tqdm, torch.nn.parallel",
    "fradique.distributed.fsdp": "torch.distributed.checkpoint, torch.distributed.tensor, "
    "torch.distributed.fsdp",
    "fradique.training.loss_plot": "matplotlib.figure, matplotlib.axes",
    "lab": "matplotlib.figure, matplotlib.axes, matplotlib.backends.backend_agg, plotly.graph_objects, "
    "plotly.offline, sklearn.manifold, sklearn.decomposition",
}
# One process imports what others have made, once. For each module that it is told, a copy of it imports that.
QUIET = """
import importlib, os, sys, traceback, warnings
import {third_party}

def look(module):
    opened = []
    def watch(event, words):
        if event == "open" and isinstance(words[0], str) and (
            not words[0].endswith((".py", ".pyc")) and "__pycache__" not in words[0]):
            opened.append(words[0])
        if event in ("subprocess.Popen", "os.putenv", "socket.connect", "os.mkdir"):
            opened.append(event)
    sys.addaudithook(watch)
    before = dict(os.environ)
    importlib.import_module(module)
    assert not opened, opened
    assert dict(os.environ) == before
    import torch
    assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()

for line in sys.stdin:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which libraries start
        pid = os.fork()
    if not pid:
        try:
            look(line.strip())
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    print("\\nstatus", os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def importers():
    """Kind of module -> the process that imports such modules, once there is one."""
    started = {}
    yield started
    for process in started.values():
        process.communicate()


def what_importing_says(importers, module):
    kind = next((k for k in PRELOADED if k and module.startswith(k)), "")
    if kind not in importers:
        third_party = ", ".join(filter(None, (PRELOADED[""], kind and PRELOADED[kind])))
        command = [sys.executable, "-c", QUIET.format(third_party=third_party)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        importers[kind] = subprocess.Popen(command, text=True, cwd=ROOT, **pipes)
    process, said = importers[kind], []
    process.stdin.write(f"{module}\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("status "):
        assert line, said
        said.append(line)
    return int(line.split()[1]), "".join(said)[:-1]  # but for the end of the line before the status


@pytest.mark.parametrize("module", [m for m in MODULES if m != "fradique.pretrained.__main__"])
def test_importing_a_module_touches_nothing_and_prints_nothing(importers, module):
    """No file, no environment variable, no process, no device, no output: audited from inside."""
    assert what_importing_says(importers, module) == (0, "")
