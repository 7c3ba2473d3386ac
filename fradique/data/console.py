"""What the preparation of a corpus prints while it runs: notes and progress bars, on standard error."""

from __future__ import annotations

import sys
from typing import Any


def print_note(message: str) -> None:
    """Print a note that needs no action."""
    print(f"note: {message}", file=sys.stderr)


def progress_bar(total: int | None, description: str, unit: str) -> Any:
    """A tqdm progress bar, shown only on a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=None, leave=False)
