"""What a pickle would do, told from its opcodes: nothing here is run.

The unpicklers that read files of others refuse code by themselves. What they do not refuse is plain data that
costs time or memory without end: a tuple of itself twice, forty times over, takes hours to hash.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, NoReturn

CALLS = ("GLOBAL", "INST", "STACK_GLOBAL")
PUTS, GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
MAX_TUPLE_VALUES = 1 << 20  # values in a tuple, each counted as often as it stands there
LEGACY_PICKLES = 4  # magic number, protocol, system and content; raw storages follow


def check_plain_data(data: bytes) -> None:
    """Raise ValueError where a pickle holds more than dicts, lists, strings and numbers of 31 bits.

    One that asks for a class or a function passes, for the unpickler to name it.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in CALLS:
            return
        if "PUT" in opcode.name and int(argument) > len(data):  # pickle would make room for so many
            raise ValueError("it numbers more objects than it can hold")
        if "TUPLE" in opcode.name or "FROZENSET" in opcode.name:
            raise ValueError("it holds a tuple or a set, and only plain dicts, strings and numbers are read")
        if type(argument) is int and abs(argument) >> 31:  # multiples of 2^61 - 1 all have one hash
            raise ValueError("it holds a number that is no token's id")


def requested_globals(file: IO[bytes], pickles: int = 1) -> Iterator[str]:
    """The "module name" of each class and function that the `pickles` at the start of `file` ask for.

    Raises ValueError for a tuple of more than MOST_SHARED values, or a number of more than 64 bits but for
    the magic one of a legacy file.
    """
    for number in range(pickles):
        stack: list[
            int | None
        ] = []  # how many values each thing is made of, as hashing it would count; None: a mark
        memo: dict[int, int] = {}
        for opcode, argument, _ in pickletools.genops(file):
            if type(argument) is int and argument.bit_length() > 64 and (number or pickles == 1):
                raise ValueError("it holds a number of more than 64 bits")
            if opcode.name in ("GLOBAL", "INST"):
                yield argument
            _follow(opcode, argument, stack, memo)


def _follow(opcode: pickletools.OpcodeInfo, argument: object, stack: list, memo: dict) -> None:
    """Do to the stack of sizes what an opcode does to the unpickler's stack."""
    name = opcode.name
    if name in PUTS or name == "MEMOIZE":
        memo[len(memo) if name == "MEMOIZE" else int(str(argument))] = stack[-1]
    elif name in GETS:
        stack.append(memo[int(str(argument))])
    elif name == "MARK":
        stack.append(None)
    elif name == "DUP":
        stack.append(stack[-1])
    else:
        size = 1
        before = [one.name for one in opcode.stack_before]
        if "mark" in before:
            while (value := stack.pop()) is not None:
                size += value
            before = before[: before.index("mark")]
        for _ in before:
            size += stack.pop() or 1
        if size > MAX_TUPLE_VALUES:
            raise ValueError("it holds a tuple that stands in itself too often")
        tuples = "TUPLE" in name or name == "FROZENSET"
        stack += [size if tuples else 1] * len(opcode.stack_after)


if TYPE_CHECKING:
    pass


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; a pickle that names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(
            f"it asks for {module}.{name}, and only plain dicts, lists, strings and numbers are read"
        )
