"""Tokens of the environment stay there: in no file of a run, no line of its output, no report."""

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
PARTS = [*SECRETS.values(), "outra-senha"]


def told(folder: Path) -> list[str]:
    """The files below `folder` that hold a secret, in any of their bytes."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        found += [str(path.relative_to(folder)) for secret in PARTS if secret.encode() in data]
    return found


def test_no_secret_of_the_environment_is_written_or_printed(settings, tmp_path):
    pytest.importorskip("wandb")
    folder, home = Path(settings.out_dir), tmp_path / "home"
    env = os.environ | SECRETS | {"WANDB_MODE": "offline", "HOME": str(home)}
    words = flags(replace(settings, max_iters=2, eval_interval=2, wandb_log=True))
    done = [
        run_script("train.py", *words, env=env),
        run_script("lab.report", f"--out_dir={folder}", env=env),
    ]
    assert [one.returncode for one in done] == [0, 0], done
    assert list(folder.glob("wandb/offline-run-*/*.wandb")) and (folder / "report.html").exists()
    assert not [secret for secret in PARTS if any(secret in one.stdout + one.stderr for one in done)]
    assert told(folder) == []
    (folder / "settings.json").write_text(f"{{{SECRETS['HF_TOKEN']}")  # the proof that it would be found
    assert told(folder) == ["settings.json"]
