"""Check pickles by their opcodes, without running them, and load plain data from them.

Restricted unpicklers (PlainUnpickler, torch.load with weights_only=True) refuse code. They do not refuse
plain data that takes unbounded time or memory: a tuple of itself twice, nested forty times, takes hours to
hash.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator
from typing import IO, Any, NoReturn

IMPORT_OPCODES = ("GLOBAL", "INST", "STACK_GLOBAL")
PUT_OPCODES, GET_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
MAX_TUPLE_VALUES = 1 << 20  # values in a tuple, nested ones included, each counted as often as it occurs
LEGACY_PICKLES = 4  # in a legacy torch file: magic number, protocol, system, content; raw storages follow


class PlainUnpickler(pickle.Unpickler):
    """Loads dicts, lists, strings and numbers. Raises ValueError if a pickle imports a class or function."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"it imports {module}.{name}; only plain dicts, lists, strings and numbers are read")


def load_plain(data: bytes) -> Any:
    """Check a pickle of plain data, then load it: dicts, lists, strings, and integers of up to 31 bits.

    Nothing in the pickle is run. Raises ValueError if it contains anything else. A damaged pickle may raise
    other exceptions too, as pickle.load does.
    """
    check_plain_data(data)
    return PlainUnpickler(io.BytesIO(data)).load()


def check_plain_data(data: bytes) -> None:
    """Raise ValueError if a pickle contains a tuple, a set, or an integer of more than 31 bits.

    The check ends at the first import of a class or function: PlainUnpickler refuses that one by name.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in IMPORT_OPCODES:
            return
        if "PUT" in opcode.name and int(argument) > len(data):  # pickle would allocate a memo of this size
            raise ValueError("its memo indices are larger than the file")
        if "TUPLE" in opcode.name or "FROZENSET" in opcode.name:
            raise ValueError("it contains a tuple or a set; only plain dicts, strings and numbers are read")
        if type(argument) is int and abs(argument) >> 31:  # all multiples of 2^61 - 1 have the same hash
            raise ValueError("it contains an integer that is too large for a token id")


def requested_globals(file: IO[bytes], pickles: int = 1) -> Iterator[str]:
    """Yield "module name" of each class and function that the `pickles` at the start of `file` import.

    Raises ValueError for a tuple of more than MAX_TUPLE_VALUES values, and for an integer of more than 64
    bits; only the first pickle of several, the magic number of a legacy torch file, may have one.
    """
    for pickle_index in range(pickles):
        # for each value on the unpickler's stack, how many values it takes to hash it; None is a mark
        stack: list[int | None] = []
        memo: dict[int, int] = {}
        for opcode, argument, _ in pickletools.genops(file):
            if type(argument) is int and argument.bit_length() > 64 and (pickle_index or pickles == 1):
                raise ValueError("it contains an integer of more than 64 bits")
            if opcode.name in ("GLOBAL", "INST"):
                yield argument
            _update_stack(opcode, argument, stack, memo)


def _update_stack(
    opcode: pickletools.OpcodeInfo, argument: object, stack: list[int | None], memo: dict[int, int]
) -> None:
    """Apply an opcode to the stack of sizes as the unpickler applies it to its stack of values."""
    name = opcode.name
    if name in PUT_OPCODES or name == "MEMOIZE":
        memo[len(memo) if name == "MEMOIZE" else int(str(argument))] = stack[-1]
    elif name in GET_OPCODES:
        stack.append(memo[int(str(argument))])
    elif name == "MARK":
        stack.append(None)
    elif name == "DUP":
        stack.append(stack[-1])
    else:
        size = 1
        operands = [operand.name for operand in opcode.stack_before]
        if "mark" in operands:
            while (value := stack.pop()) is not None:
                size += value
            operands = operands[: operands.index("mark")]
        for _ in operands:
            size += stack.pop() or 1
        if size > MAX_TUPLE_VALUES:
            raise ValueError("it contains a tuple nested in itself too many times")
        is_tuple = "TUPLE" in name or name == "FROZENSET"
        stack += [size if is_tuple else 1] * len(opcode.stack_after)
