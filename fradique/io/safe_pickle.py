"""Check the opcodes of pickles without running them, and load plain data from pickles.

Restricted unpicklers (PlainUnpickler, torch.load with weights_only=True) refuse to import code. They do not
refuse plain data that takes too much time or memory. For example, start with t = 1 and set t = (t, t) forty
times: as the key of a dict, this tuple takes 2^40 steps to hash.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator
from typing import IO, Any, NoReturn

IMPORT_OPCODES = ("GLOBAL", "INST", "STACK_GLOBAL")  # these import a class or function
# The memo is the unpickler's table of values that occur again in the pickle.
PUT_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")  # these copy the top of the stack to the memo
GET_OPCODES = ("GET", "BINGET", "LONG_BINGET")  # these push a value from the memo onto the stack
MAX_TUPLE_VALUES = 1 << 20  # the size of a tuple with all nested tuples, each counted as often as it occurs
# The sizes of all tuples that are used again: each time such a tuple is a key of a dict, it is hashed again.
MAX_REPEATED_VALUES = 1 << 24
# Before torch 1.6, a file began with five pickles: magic number, protocol version, system, content, and keys
# of the storages. The raw storages follow.
LEGACY_PICKLES = 5


class PlainUnpickler(pickle.Unpickler):
    """An unpickler that raises ValueError if the pickle imports a class or function."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"it imports {module}.{name}; only plain dicts, lists, strings and numbers are read")


def load_plain(data: bytes) -> Any:
    """Check a pickle of plain data (dicts, lists, strings and numbers) and load it, without running code.

    Raises ValueError for a pickle that `check_plain_data` or PlainUnpickler refuses. A damaged pickle may
    raise other exceptions too, as pickle.load does.
    """
    check_plain_data(data)
    return PlainUnpickler(io.BytesIO(data)).load()


def check_plain_data(data: bytes) -> None:
    """Raise ValueError if a pickle contains a tuple, a frozenset, or an integer of more than 31 bits.

    The check ends at the first import of a class or function, for which PlainUnpickler raises an error.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in IMPORT_OPCODES:
            return
        if opcode.name in PUT_OPCODES and int(argument) > len(data):  # pickle allocates a memo of this size
            raise ValueError("its memo indices are larger than the file")
        if _is_tuple_or_frozenset(opcode):
            raise ValueError(
                "it contains a tuple or a frozenset; only dicts, lists, strings and numbers are read"
            )
        # Multiples of 2^61 - 1 all have the hash 0, so a dict with many such keys takes quadratic time.
        if type(argument) is int and abs(argument) >> 31:
            raise ValueError("it contains an integer that is too large for a token id")


def requested_globals(file: IO[bytes], pickle_count: int = 1) -> Iterator[str]:
    """Yield "module name" of each class and function that the first `pickle_count` pickles in `file` import.

    Imports by the opcode STACK_GLOBAL are not found: torch's unpickler refuses that opcode. Raises ValueError
    for a tuple of more than MAX_TUPLE_VALUES values, for tuples that are used again if their sizes add up to
    more than MAX_REPEATED_VALUES, and for an integer of more than 64 bits. The first of several pickles may
    contain such an integer: it is the magic number of a legacy torch file.
    """
    repeated_values = 0
    for pickle_index in range(pickle_count):
        is_magic_number = pickle_count > 1 and pickle_index == 0
        stack: list[int | None] = []
        memo: dict[int, int] = {}
        for opcode, argument, _ in pickletools.genops(file):
            if type(argument) is int and argument.bit_length() > 64 and not is_magic_number:
                raise ValueError("it contains an integer of more than 64 bits")
            if opcode.name in ("GLOBAL", "INST"):
                yield argument
            _update_stack(opcode, argument, stack, memo)
            if opcode.name in GET_OPCODES or opcode.name == "DUP":
                size = stack[-1] or 1
                repeated_values += size if size > 1 else 0
                if repeated_values > MAX_REPEATED_VALUES:
                    raise ValueError("it uses large tuples again too many times")


def _update_stack(
    opcode: pickletools.OpcodeInfo, argument: object, stack: list[int | None], memo: dict[int, int]
) -> None:
    """Apply an opcode to `stack` and `memo` as the unpickler applies it to its stack and memo of values.

    They contain sizes instead of values. The size of a tuple includes all nested tuples. Any other value has
    the size 1, because hashing it does not hash nested values. None is a mark.
    """
    name = opcode.name
    if name in PUT_OPCODES:
        memo[int(str(argument))] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in GET_OPCODES:
        stack.append(memo[int(str(argument))])
    elif name == "MARK":
        stack.append(None)
    elif name == "DUP":
        stack.append(stack[-1])
    else:
        popped_size = 1
        operands = [operand.name for operand in opcode.stack_before]
        if "mark" in operands:  # pop all values above the last mark, and the mark
            while (size := stack.pop()) is not None:
                popped_size += size
            operands = operands[: operands.index("mark")]
        for _ in operands:
            popped_size += stack.pop() or 1
        if popped_size > MAX_TUPLE_VALUES:
            raise ValueError("it contains a tuple nested in itself too many times")
        result_size = popped_size if _is_tuple_or_frozenset(opcode) else 1
        stack += [result_size] * len(opcode.stack_after)


def _is_tuple_or_frozenset(opcode: pickletools.OpcodeInfo) -> bool:
    # EMPTY_TUPLE, TUPLE, TUPLE1, TUPLE2, TUPLE3
    return "TUPLE" in opcode.name or opcode.name == "FROZENSET"
