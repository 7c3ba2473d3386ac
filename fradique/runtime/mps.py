"""Operations that torch lacks on Apple's GPU (MPS). To be imported before torch."""

import os
import sys


def fall_back_to_cpu() -> None:
    """On macOS, do them on the CPU, unless the user chose otherwise. Call this before importing torch."""
    if sys.platform == "darwin":
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
