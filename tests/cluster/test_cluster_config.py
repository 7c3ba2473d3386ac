"""The files for Slurm and Kubernetes are valid, and their flags exist."""

import re
import runpy
import shlex
import shutil
import subprocess

import pytest
import yaml
from support import ROOT
from torch.distributed.run import get_args_parser

import train
from configurator import resolve
from fradique.data import prepare
from fradique.data.shard_build import Worker

CLUSTER = ROOT / "config" / "cluster"
SCRIPTS = sorted(path for path in CLUSTER.iterdir() if path.suffix in (".sh", ".sbatch"))


# The arguments of train.py if run.sh gets none.
DEFAULTS = re.search(r"  set -- (config/.*)", (CLUSTER / "run.sh").read_text())[1].split()


def arguments_of(name, command):
    """The arguments of `command` in a script, with continued lines joined and variables unexpanded."""
    text = (CLUSTER / name).read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if command in line)
    return shlex.split(line.split(command, 1)[1], comments=True)


def manifests():
    return list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))


def job():
    (manifest,) = (m for m in manifests() if m["kind"] == "Job")
    return manifest["spec"]


def container():
    (spec,) = job()["template"]["spec"]["containers"]
    return spec


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(path):
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    assert path.read_text().startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        result = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


def test_run_sh_passes_valid_flags_to_torchrun():
    arguments = [
        argument.replace("$NODES", "2").replace("$PROCESSES", "8").replace("$RESTARTS", "3")
        for argument in arguments_of("run.sh", "-m torch.distributed.run")
    ]
    args = get_args_parser().parse_args(arguments)
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("2", "8", 3)
    assert args.rdzv_backend == "c10d" and args.training_script == "train.py"


def test_train_accepts_the_settings_of_the_scripts():
    for flags in (container()["args"], DEFAULTS):
        resolve(train.TrainSettings, [flag for flag in flags if flag.startswith("--")])
        assert all((ROOT / flag).exists() for flag in flags if flag.endswith(".py"))


def run_sh(tmp_path, *arguments, **environment):
    """Run run.sh with a fake Python that records its calls. Returns the arguments of each call."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> {shlex.quote(str(tmp_path / "calls"))}\n')
    python.chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHON": str(python),
        "RUN_ID": "x",
        "RENDEZVOUS": "a:1",
    } | environment
    result = subprocess.run(
        [CLUSTER / "run.sh", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [line.split() for line in (tmp_path / "calls").read_text().splitlines()]


def test_run_sh_starts_a_run_or_resumes_it(tmp_path):
    out_dir = tmp_path / "out"
    check, start = run_sh(tmp_path, "config/x.py", "--n_layer=2", OUT_DIR=str(out_dir), NODES="3")
    assert check == ["train.py", "config/x.py", "--n_layer=2", f"--out_dir={out_dir}", "--print_settings"]
    assert "--nnodes=3" in start and start[-4:] == [
        "train.py",
        "config/x.py",
        "--n_layer=2",
        f"--out_dir={out_dir}",
    ]
    out_dir.mkdir()
    (out_dir / "settings.json").touch()  # stopped before its first checkpoint
    assert run_sh(tmp_path, OUT_DIR=str(out_dir))[-1][-1] == "--overwrite=True"
    (out_dir / "step-00000010").mkdir()
    assert run_sh(tmp_path, OUT_DIR=str(out_dir))[-1][-1] == "--init_from=resume"


def test_prepare_accepts_the_flags_of_the_script():
    values = {"${SHARDS:-64}": "64", "$SLURM_ARRAY_TASK_ID": "3", "$SLURM_ARRAY_TASK_COUNT": "16"}
    arguments = arguments_of("slurm_prepare.sbatch", '/prepare.py"')
    assert arguments.pop() == "$@"
    for variable, value in values.items():
        arguments = [argument.replace(variable, value) for argument in arguments]
    corpus = runpy.run_path(str(ROOT / "data" / "openwebtext" / "prepare.py"))["CORPUS"]
    args = prepare._make_parser(corpus).parse_args(arguments)
    assert args.shards == 64 and Worker.parse(args.worker) == Worker(3, 16)


def test_sbatch_accepts_the_options_of_the_scripts():
    if not shutil.which("sbatch"):
        pytest.skip("sbatch is not installed")
    if subprocess.run(["sinfo"], capture_output=True, check=False).returncode:
        pytest.skip("no Slurm controller answers")
    for path in SCRIPTS:
        if path.suffix == ".sbatch":
            result = subprocess.run(
                ["sbatch", "--test-only", path], capture_output=True, text=True, check=False
            )
            assert "invalid" not in result.stderr.lower() and "unrecognized" not in result.stderr.lower(), (
                result.stderr
            )


def test_manifests_follow_the_kubernetes_schema():
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for manifest in manifests():
        validate.validate(manifest, validate.latest_version(), strict=True)


def test_the_schema_rejects_a_misspelled_field():
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    (manifest,) = (m for m in manifests() if m["kind"] == "Job")
    manifest["spec"]["completionMod"] = manifest["spec"].pop("completionMode")
    with pytest.raises(validate.ValidationError):
        validate.validate(manifest, validate.latest_version(), strict=True)


def test_the_manifests_are_consistent():
    service, claim, _ = manifests()
    pod, environment = job()["template"]["spec"], {e["name"]: e["value"] for e in container()["env"]}
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == pod["subdomain"]
    assert job()["completionMode"] == "Indexed" and job()["completions"] == job()["parallelism"]
    assert environment["NODES"] == str(job()["completions"])
    assert environment["PROCESSES"] == str(container()["resources"]["limits"]["nvidia.com/gpu"])
    assert (
        environment["RENDEZVOUS"]
        == f"fradique-0.{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert environment["OUT_DIR"].startswith(container()["volumeMounts"][0]["mountPath"])
    assert pod["restartPolicy"] == "Never"  # required by podFailurePolicy
    assert (CLUSTER / container()["command"][0].rpartition("/")[2]).stat().st_mode & 0o111
