"""Make a GPTConfig from the untrusted values in a checkpoint's model.json or nanoGPT's model_args."""

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from model import GPTConfig

MAX_SIZE = 1 << 40  # the largest number in a config: no memory is large enough for a model of such a size
MIN_WIDTH_LIMIT = 1024  # a width up to this is accepted for any number of parameters
WIDTHS = ("vocab_size", "n_head", "n_embd", "n_kv_head", "n_inner")  # at most the number of parameters


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float, but not NaN, with an absolute value of at most MAX_SIZE."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_SIZE


def is_size(value: Any) -> bool:
    """Whether `value` is an int from 1 to MAX_SIZE."""
    return type(value) is int and 1 <= value <= MAX_SIZE


def field_problems(values: Mapping[str, Any]) -> list[str]:
    """The unknown names, wrong types and huge numbers in arguments for GPTConfig, one message each.

    If there are none, GPTConfig(**values).problems() gives the other problems.
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
    """The GPTConfig in a checkpoint's model.json. A field that an older run does not have gets its default.

    tensors: those of the checkpoint by our names, possibly meta tensors. The sizes are compared with them, so
    that damaged sizes never make a model that fills the memory. source: the path, for messages. Raises
    ValueError with all problems.
    """
    problems = field_problems(values)
    if "vocab_size" not in values:
        problems.append("vocab_size is missing")
    problems = problems or _size_problems(values, tensors) or GPTConfig(**values).problems()
    if problems:
        raise ValueError(f"{source} is damaged, or of another version:\n  - " + "\n  - ".join(problems))
    return GPTConfig(**values)


def _size_problems(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """The sizes that are too large for these tensors, or that contradict the shape of the embedding."""
    n_parameters = sum(tensor.numel() for tensor in tensors.values())
    ngram_rows = sum(tensor.size(0) for name, tensor in tensors.items() if "ngrams" in name and tensor.dim())
    default_rows = GPTConfig().ngram_rows  # in the config of every model, with n-grams or without
    limits = {
        "n_layer": len(tensors),
        "ngram_max": ngram_rows + 1,
        "ngram_rows": max(default_rows, ngram_rows),
    }
    limits |= dict.fromkeys(WIDTHS, max(MIN_WIDTH_LIMIT, n_parameters))
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
