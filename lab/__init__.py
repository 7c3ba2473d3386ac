"""Commands that look inside a model or a run (python -m lab.curves ...): compute arrays, then draw them."""

from fradique.runtime import mps, openmp

openmp.limit_spinning()  # before the commands import torch
mps.fall_back_to_cpu()
