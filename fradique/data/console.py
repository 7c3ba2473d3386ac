"""Notes and progress bars on standard error while a corpus is prepared."""

from __future__ import annotations

import sys
from typing import Any


def print_note(message: str) -> None:
    """Print a note to the user, who need not do anything about it."""
    print(f"note: {message}", file=sys.stderr)


def progress_bar(total: int | None, description: str, unit: str) -> Any:
    """A tqdm progress bar that counts `unit`s up to `total` (None: unknown)."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,  # 12.3M instead of 12345678
        disable=None,  # None: show the bar only on a terminal
        leave=False,  # remove the bar at the end
    )
