"""Secrets in environment variables are not written to run folders or reports, and not printed."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support import flags, run_script

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_QmVtLXZpbmRvLWFvLXNlZ3JlZG8",
    "HUGGING_FACE_HUB_TOKEN": "hf_T3V0cm8tc2VncmVkby1tYWlz",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY",
    "SOME_TOKEN": "uma-senha-que-nao-se-diz",
    "HTTPS_PROXY": "http://ana:outra-senha@127.0.0.1:9",
}
SECRET_STRINGS = [*SECRETS.values(), "outra-senha"]


def files_with_secrets(folder: Path) -> list[str]:
    """The files below `folder` whose bytes contain a secret."""
    names = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        names += [str(path.relative_to(folder)) for secret in SECRET_STRINGS if secret.encode() in data]
    return names


def test_no_secret_of_the_environment_is_written_or_printed(settings, tmp_path):
    pytest.importorskip("wandb")
    folder, home = Path(settings.out_dir), tmp_path / "home"
    env = os.environ | SECRETS | {"WANDB_MODE": "offline", "HOME": str(home)}
    arguments = flags(replace(settings, max_iters=2, eval_interval=2, wandb_log=True))
    results = [
        run_script("train.py", *arguments, env=env),
        run_script("lab.report", f"--out_dir={folder}", env=env),
    ]
    assert [result.returncode for result in results] == [0, 0], results
    assert list(folder.glob("wandb/offline-run-*/*.wandb")) and (folder / "report.html").exists()
    output = "".join(result.stdout + result.stderr for result in results)
    assert not [secret for secret in SECRET_STRINGS if secret in output]
    assert files_with_secrets(folder) == []
    (folder / "settings.json").write_text(f"{{{SECRETS['HF_TOKEN']}")  # files_with_secrets finds a secret
    assert files_with_secrets(folder) == ["settings.json"]
