"""Commands that look inside a model or a run (python -m lab.curves ...): compute arrays, then draw them."""

from fradique.runtime import openmp

openmp.limit_spinning()  # before the commands import torch
