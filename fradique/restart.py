"""A run that goes on: by --init_from=resume, or because torchrun lost a process and starts all again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fradique import checkpoint, ranks, run
from fradique.training import Settings


def after_restart(settings: Settings) -> Settings:
    """The settings; where torchrun starts again what it had begun, such that the run goes on."""
    if not started_again(settings):
        return settings
    if checkpoint.step_folders(Path(settings.out_dir)):
        return replace(settings, init_from="resume", overwrite=False)
    return settings if settings.init_from == "resume" else replace(settings, overwrite=True)


def started_again(settings: Settings) -> bool:
    """Whether torchrun has lost a process of this very run, and starts all of them again."""
    here = Path(settings.out_dir)
    return not settings.eval_only and ranks.restarts() > 0 and run.began_here(here, ranks.launch())


def settings_of_the_run(settings: Settings) -> tuple[dict[str, Any], str] | None:
    """Where a run is resumed, its own settings come under those of this call."""
    folder = Path(settings.out_dir)
    again = started_again(settings) and checkpoint.step_folders(folder)
    if settings.init_from != "resume" and not again:
        return None
    saved = run.saved_settings(folder)
    of_that_call = ("init_from", "overwrite", "eval_only", "debug")
    return {key: saved[key] for key in saved if key not in of_that_call}, str(folder / run.SETTINGS)
