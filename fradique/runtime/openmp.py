"""How the threads of OpenMP, which compute on a CPU, wait for each other. To be imported before torch."""

import os

# How often a thread of GNU's OpenMP (torch's on Linux) looks for work before it sleeps. By default 300,000
# times: milliseconds, in which it takes the core from the thread that it waits for, if another program runs.
# Measured on two cores of an AMD EPYC (Zen 5), milliseconds per training step of 4 layers 128 wide, with the
# default, with 1,000, and on one thread: beside one busy program 1,360, 190 and 225; beside two of them more
# than 3,000, 120 to 380 and 300 to 400; alone 135 (it varied), 45 and 78.
SPIN_COUNT = 1000


def limit_spinning() -> None:
    """Let waiting threads sleep soon, unless the user chose otherwise. Call this before importing torch."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
