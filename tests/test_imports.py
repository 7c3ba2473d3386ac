"""The rooms: who may import whom, and that importing does nothing."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

MODULES = {
    str(path.relative_to(ROOT)): path
    for path in sorted(ROOT.glob("*.py"))
    + sorted(ROOT.glob("fradique/*.py"))
    + sorted(ROOT.glob("lab/*.py"))
    + sorted(ROOT.glob("bench/*.py"))
}
# The table of the rooms: what each may import of ours.
MAY_IMPORT = {
    "configurator.py": set(),
    "model.py": {"fradique"},
    "sample.py": {"configurator", "fradique", "model"},
    "train.py": {"configurator", "fradique", "model", "lab"},
    "fradique": {"fradique"},
    "lab": {"configurator", "fradique", "model", "sample", "train", "lab"},
    "bench": {"configurator", "fradique", "model", "sample", "train", "bench"},
}
OURS = {"configurator", "model", "sample", "train", "fradique", "lab", "bench", "reference"}


def imported(path):
    """The top-level names of everything that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_its_room_may(name):
    room = name.split("/")[0]
    assert imported(MODULES[name]) & OURS <= MAY_IMPORT[room]


def test_the_model_knows_torch_alone():
    third_party = imported(ROOT / "model.py") - set(sys.stdlib_module_names)
    assert third_party == {"torch", "fradique"}
    assert re.findall(r"^ *from fradique.*", (ROOT / "model.py").read_text(), re.M) == [
        "from fradique import generation, kernels, pointwise",
        "from fradique.generation import KVCache",
        "from fradique.linear import Linear",
    ]
    for name in ("kernels.py", "pointwise.py", "generation.py", "linear.py"):
        assert imported(ROOT / "fradique" / name) - set(sys.stdlib_module_names) - {"fradique"} == {"torch"}
        ours = re.findall(r"^ *from fradique.*", (ROOT / "fradique" / name).read_text(), re.M)
        beside = ["from fradique import pointwise", "from fradique.linear import weight_gradient"]
        assert ours == (beside if name == "kernels.py" else [])


def test_the_configurator_knows_the_standard_library_alone():
    assert imported(ROOT / "configurator.py") <= set(sys.stdlib_module_names)


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


THIRD_PARTY = {
    "": "numpy, torch, torch.distributed, safetensors.torch, tqdm, torch.nn.parallel",
    "fradique.sharding": "torch.distributed.checkpoint, torch.distributed.tensor, torch.distributed.fsdp",
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
    kind = next((k for k in THIRD_PARTY if k and module.startswith(k)), "")
    if kind not in importers:
        third_party = ", ".join(filter(None, (THIRD_PARTY[""], kind and THIRD_PARTY[kind])))
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


@pytest.mark.parametrize("name", [n for n in MODULES if not n.endswith("__init__.py")])
def test_importing_a_module_touches_nothing_and_says_nothing(importers, name):
    """No file, no environment variable, no process, no device, no word: audited from inside."""
    module = name.removesuffix(".py").replace("/", ".")
    assert what_importing_says(importers, module) == (0, "")
