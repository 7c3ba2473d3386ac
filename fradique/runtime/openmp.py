"""How the threads of OpenMP, which compute on a CPU, wait for each other. To be imported before torch."""

import os

# How often a thread of GNU's OpenMP (torch's on Linux) looks for work before it sleeps. By default 300,000
# times: milliseconds, in which it takes the core from the thread that it waits for, if another program runs.
# Mean milliseconds per training step of 4 layers 128 wide (8 x 128 tokens), two cores of an AMD EPYC (Zen 5),
# with the default, with 1,000, and on one thread. Alone: 42, 44 and 71. Beside one busy program: 134, 92 and
# 71. Beside two: 158 to 260, 92 to 114, and 110. With 5,000: alone 43, beside one busy program 135.
SPIN_COUNT = 1000


def limit_spinning() -> None:
    """Let waiting threads sleep soon, unless the user chose otherwise. Call this before importing torch."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
