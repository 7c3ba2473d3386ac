"""Benchmarks. Each file is a command that prints a table, and JSON on the last line."""
