"""Imports: the order of the packages, no cycles, few dependencies, no pickles and no side effects."""

import ast
import subprocess
import sys

import pytest
from support import ROOT, imported_names

# The order in CONTRIBUTING.md, one step per row. A module imports from its own package and from earlier rows;
# packages of the same row do not import each other.
ORDER = (
    ("fradique.io",),
    ("configurator",),
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
ALLOWED_THIRD_PARTY = {  # besides the standard library and the project
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


def test_every_package_is_in_the_import_order():
    assert {package_of(module) for module in MODULES} - {"fradique"} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_earlier_packages(module):
    package = package_of(module)
    imported = {package_of(name) for name in IMPORTS[module] if name in MODULES} - {package}
    assert {name for name in imported if LEVEL[name] >= LEVEL[package]} == set()


def test_there_are_no_import_cycles():
    visited, stack = set(), []

    def visit(module):
        assert module not in stack, " -> ".join([*stack[stack.index(module) :], module])
        if module not in visited:
            stack.append(module)
            for name in sorted(IMPORTS[module] & MODULES.keys()):
                visit(name)
            visited.add(stack.pop())

    for module in MODULES:
        visit(module)


def test_the_reference_does_not_import_the_project():
    for path in ROOT.glob("reference/**/*.py"):
        assert not {package_of(name) for name in imported_names(path)} & {*LEVEL, "fradique"}, path


@pytest.mark.parametrize("package", ALLOWED_THIRD_PARTY)
def test_low_level_packages_have_few_dependencies(package):
    for module in (m for m in MODULES if package_of(m) == package):
        top = {name.split(".")[0] for name in IMPORTS[module] if name not in MODULES}
        assert top - set(sys.stdlib_module_names) <= ALLOWED_THIRD_PARTY[package], module


def test_nothing_is_pickled_and_torch_load_is_restricted():
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert "pickle.load(" not in text and "pickle.dump" not in text and "torch.save(" not in text, name
        for call in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(call), name


def test_prepare_scripts_have_at_most_40_lines():
    for path in ROOT.glob("data/*/prepare.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path


# What an importer process imports first, by the beginning of the names of the modules that it then imports.
PRELOADED = {
    "": "numpy, torch, torch.distributed, safetensors.torch, tqdm, torch.nn.parallel",
    "fradique.distributed.fsdp": "torch.distributed.checkpoint, torch.distributed.tensor, "
    "torch.distributed.fsdp",
    "fradique.training.loss_plot": "matplotlib.figure, matplotlib.axes",
    "lab": "matplotlib.figure, matplotlib.axes, matplotlib.backends.backend_agg, plotly.graph_objects, "
    "plotly.offline, sklearn.manifold, sklearn.decomposition",
}
# Imports third-party packages once. For each module name on stdin, a fork of the process imports the module.
IMPORTER = """
import importlib, os, sys, traceback, warnings
import {third_party}

def check_import(module):
    effects = []
    def audit(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and (
            not arguments[0].endswith((".py", ".pyc")) and "__pycache__" not in arguments[0]):
            effects.append(arguments[0])
        if event in ("subprocess.Popen", "os.putenv", "socket.connect", "os.mkdir"):
            effects.append(event)
    sys.addaudithook(audit)
    before = dict(os.environ)
    importlib.import_module(module)
    assert not effects, effects
    assert dict(os.environ) == before
    import torch
    assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()

for line in sys.stdin:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking a process that has threads
        pid = os.fork()
    if not pid:
        try:
            check_import(line.strip())
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
    """The importer processes, by their key in PRELOADED; each is started when it is first needed."""
    processes = {}
    yield processes
    for process in processes.values():
        process.communicate()


def import_in_fork(importers, module):
    """Import a module in a fork of an importer process: (status, output)."""
    kind = next((key for key in PRELOADED if key and module.startswith(key)), "")
    if kind not in importers:
        third_party = ", ".join(filter(None, (PRELOADED[""], kind and PRELOADED[kind])))
        command = [sys.executable, "-c", IMPORTER.format(third_party=third_party)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        importers[kind] = subprocess.Popen(command, text=True, cwd=ROOT, **pipes)
    process, output = importers[kind], []
    process.stdin.write(f"{module}\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("status "):
        assert line, output
        output.append(line)
    return int(line.split()[1]), "".join(output)[:-1]  # without the newline printed before the status


@pytest.mark.xdist_group("imports")  # the importer processes are started once
@pytest.mark.parametrize("module", [m for m in MODULES if m != "fradique.pretrained.__main__"])
def test_importing_a_module_has_no_side_effects(importers, module):
    """No file, environment variable, process, device or output, as Python's audit hooks show."""
    assert import_in_fork(importers, module) == (0, "")
