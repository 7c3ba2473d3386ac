"""Benchmarks. Each file is a command that prints a table, and JSON on the last line."""

from fradique.runtime import mps, openmp

openmp.limit_spinning()  # before the commands import torch
mps.fall_back_to_cpu()
