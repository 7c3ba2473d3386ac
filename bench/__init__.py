"""Benchmarks. Each file is a command that prints a table, and JSON on the last line."""

from fradique.runtime import openmp

openmp.limit_spinning()  # before the commands import torch
