"""The wheel that pyproject.toml describes contains every module, and runs without the repository."""

import json
import re
import subprocess
import sys
import zipfile

import pytest
from fork_server import TIMEOUT
from support import ROOT, imported_names

MODULES = {
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "fradique/**/*.py", "lab/*.py", "bench/*.py")
    for path in ROOT.glob(pattern)
}
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder of the unpacked wheel, built from a copy so that nothing is written to the repository."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools")
    source, dist, site = (tmp_path_factory.mktemp(name) for name in ("source", "dist", "site"))
    for name in [*sorted(MODULES), "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-c", BUILD, str(dist)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=TIMEOUT)
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    return site


def test_the_wheel_contains_every_module(wheel):
    modules = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*.py")}
    assert modules == MODULES


# As `python -m`, for several modules with their arguments, in one process.
RUN_MODULES = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, f"{sys.argv}: status {ended.code}"
"""


def test_the_wheel_trains_and_samples_outside_the_repository(wheel, data_dir, tmp_path):
    settings = [
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=16",
        "--block_size=16",
        "--batch_size=4",
        "--device=cpu",
    ]
    settings += ["--gradient_accumulation_steps=1", "--max_iters=3", "--eval_iters=1"]
    settings += ["--device=cpu", "--compile=False"]
    commands = [
        ["train", *settings, f"--data_dir={data_dir}", "--dataset=tiny", "--out_dir=run"],
        ["sample", "--out_dir=run", "--max_new_tokens=5"],
        ["fradique.pretrained", "export", "--out_dir=run", "--to=exported"],
    ]
    result = subprocess.run(
        [sys.executable, "-c", RUN_MODULES, json.dumps(commands)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "exported" / "model.safetensors").exists()


PROVIDED_BY = {"PIL": "matplotlib", "mpl_toolkits": "matplotlib", "sklearn": "scikit-learn"}
PROVIDED_BY |= {"fsspec": "datasets", "pyarrow": "datasets"}  # required by these packages
LOSS_PLOT = "fradique/training/loss_plot.py"  # imported in a function; without matplotlib, a run only warns


def test_every_imported_package_is_a_dependency():
    """Imports at the start of a file must be dependencies; lab/ may use the group "lab".

    An indented import, in a function, may also be of another optional group.
    """
    tomllib = pytest.importorskip("tomllib", reason="tomllib is new in Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = package_names(project["dependencies"])
    groups = {name: package_names(group) for name, group in project["optional-dependencies"].items()}
    ours = {path.split("/")[0].removesuffix(".py") for path in MODULES}
    for path in sorted(MODULES):
        imported = {name.split(".")[0] for name in imported_names(ROOT / path)}
        at_start = re.findall(r"^(?:import|from) (\w+)", (ROOT / path).read_text(encoding="utf-8"), re.M)
        for name in imported - set(sys.stdlib_module_names) - ours:
            allowed = required.union(*groups.values())
            if name in at_start:
                uses_lab_group = path.startswith("lab/") or path == LOSS_PLOT
                allowed = required | groups["lab"] if uses_lab_group else required
            assert PROVIDED_BY.get(name, name).replace("_", "-") in allowed, f"{path}: {name}"


def package_names(requirements):
    """Of ["huggingface_hub>=0.25", ...]: {"huggingface-hub", ...}."""
    return {re.match(r"[\w-]+", requirement)[0].replace("_", "-") for requirement in requirements}
