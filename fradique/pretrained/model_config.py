"""GPTConfig from values that anybody may have written: a checkpoint's model.json, nanoGPT's model_args."""

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from model import GPTConfig

MAX_SIZE = 1 << 40  # limit of any number in a config; a larger model fits into no memory
WIDTHS = ("vocab_size", "n_head", "n_embd", "n_kv_head", "n_inner")  # no larger than the number of parameters


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float whose absolute value is at most MAX_SIZE (so not NaN)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_SIZE


def is_size(value: Any) -> bool:
    """Whether `value` is an int from 1 to MAX_SIZE."""
    return type(value) is int and 1 <= value <= MAX_SIZE


def field_problems(values: Mapping[str, Any]) -> list[str]:
    """What keeps `values` from being arguments of GPTConfig: unknown names, wrong types, huge numbers.

    Afterwards GPTConfig(**values).problems() can be asked for the rest.
    """
    types = {field.name: type(field.default) for field in fields(GPTConfig)}
    problems = []
    for name, value in values.items():
        expected = types.get(name)
        if expected is None:
            problems.append(f"there is no setting {reprlib.repr(name)}")
        elif expected is float and not is_number(value):
            problems.append(f"{name} = {reprlib.repr(value)} is not a number up to {MAX_SIZE:,}")
        elif expected is int and not (type(value) is int and 0 <= value <= MAX_SIZE):
            problems.append(f"{name} = {reprlib.repr(value)} is not a whole number from 0 to {MAX_SIZE:,}")
        elif expected is bool and not isinstance(value, bool):
            problems.append(f"{name} = {reprlib.repr(value)} is neither True nor False")
        elif expected is str and not isinstance(value, str):
            problems.append(f"{name} = {reprlib.repr(value)} is not a string")
    return problems


def parse_model_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> GPTConfig:
    """The GPTConfig in a checkpoint's model.json. A run that is older than a field has the field's default.

    Sizes are compared with `tensors` (under our names; meta tensors will do) before a model of these sizes is
    built. Raises ValueError with all problems.
    """
    problems = field_problems(values)
    if "vocab_size" not in values:
        problems.append("vocab_size is missing")
    problems = problems or _size_problems(values, tensors) or GPTConfig(**values).problems()
    if problems:
        raise ValueError(f"{source} is damaged, or of another version:\n  - " + "\n  - ".join(problems))
    return GPTConfig(**values)


def _size_problems(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Sizes that are too large for a model with these tensors, and an embedding of another shape."""
    n_parameters = max(1024, sum(tensor.numel() for tensor in tensors.values()))
    limits = {"n_layer": len(tensors)} | dict.fromkeys(WIDTHS, n_parameters)
    problems = [
        f"{name} = {values[name]} is too large for the tensors of the checkpoint"
        for name, limit in limits.items()
        if values.get(name, 0) > limit
    ]
    embedding = tensors.get("transformer.wte.weight")
    if not problems and embedding is not None and "n_embd" in values:
        shape = (values["vocab_size"], values["n_embd"])
        if tuple(embedding.shape) != shape:
            problems.append(f"the embedding is {tuple(embedding.shape)}, but (vocab_size, n_embd) = {shape}")
    return problems
