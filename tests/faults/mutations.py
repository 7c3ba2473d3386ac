"""Damage valid input according to its structure, because random bytes fail at the first check.

The result depends only on the input and on the `random.Random`, so a seed reproduces it.
"""

import json
import random
import struct
from typing import Any

PATHS = ("../x", "..", "/etc/passwd", "a/../../b", "train.bin\0", "", ".", "C:\\x", "\ud800", "\x1b[2J")
ODD = (None, True, False, 0, -1, 1, 2**31, 2**63, 2**64 - 1, 10**9, 10**30, 10**400, 0.5, -0.0, 1e30, 1e308)
ODD += (
    float("nan"),
    float("inf"),
    float("-inf"),
    "x",
    "9" * 5000,
    "é\U0001f984",
    [],
    {},
    [[]],
    [None],
    *PATHS,
)
BYTES = (
    b"\0",
    b"\r\n",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xf0\x9f\xa6\x84",
    b"NaN",
    b"1e999999999",
)
BYTES += (b"[" * 3000, b"9" * 5000)
BYTES += (b"\x80\x02", b"(", b"c__builtin__\neval\n", b"\x86", b"2", b"q\x7f", b".")  # of pickles


def odd_value(rng: random.Random) -> Any:
    """An unusual value, or a deeply nested one."""
    if rng.random() < 0.05:
        deep: Any = 0
        for _ in range(rng.choice((50, 900))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return rng.choice(ODD)


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of at most 2,000 values inside `value`."""
    locations, queue = [], [value]
    while queue and len(locations) < 2000:
        item = queue.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            locations.append((item, key))
            queue.append(item[key])
    return locations


def damaged_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three values inside it replaced, removed, copied or inserted."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        children = nodes(value)
        if not children:
            return odd_value(rng)
        container, key = rng.choice(children)
        kind = rng.random()
        if kind < 0.55:
            container[key] = odd_value(rng)
        elif kind < 0.7:
            del container[key]
        elif kind < 0.85:
            source, source_key = rng.choice(children)
            exists = source_key in source if isinstance(source, dict) else source_key < len(source)
            container[key] = json.loads(json.dumps(source[source_key] if exists else None))
        elif isinstance(container, dict):
            container[str(odd_value(rng))[:99]] = odd_value(rng)
        else:
            container.insert(rng.randint(0, len(container)), odd_value(rng))
    return value


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with damaged values, or with damaged bytes if it is not JSON."""
    try:
        value = damaged_value(json.loads(data), rng)
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return damaged_bytes(data, rng)


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a wrong header: length, names, dtypes, shapes or offsets."""
    if len(data) < 10 or rng.random() < 0.1:
        return damaged_bytes(data, rng)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.random()
    if kind < 0.1:
        wrong_size = rng.choice((0, 1, size - 1, size + 8, 2**31, 2**63, -1)) % 2**64
        return struct.pack("<Q", wrong_size) + header + body
    if kind < 0.25 and b'"F32"' in header:
        dtypes = (b"I64", b"F8_E4M3", b"F8_E8M0", b"F64", b"F16", b"BF16", b"BOOL", b"U16", b"C64", b"F4")
        header = header.replace(b'"F32"', b'"' + rng.choice(dtypes) + b'"', rng.choice((1, -1)))
    elif kind < 0.35:
        body = damaged_bytes(body, rng)
    elif kind < 0.45:
        body = rng.choice((b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f")) * (len(body) // 4)
    else:
        header = damaged_json(header, rng)
    return struct.pack("<Q", len(header)) + header + body


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with bytes changed, removed, duplicated, or a special sequence inserted."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randint(0, len(out)), rng.random()
        if kind < 0.3 and at < len(out):
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind < 0.45:
            del out[at : at + rng.choice((1, 2, 8, 1 << 20))]
        elif kind < 0.6:
            start = rng.randint(0, len(out))
            out[at:at] = out[start : start + rng.randint(1, 64)]
        else:
            out[at:at] = rng.choice(BYTES)
    return bytes(out)


def damaged_settings(data: bytes, rng: random.Random) -> bytes:
    """Settings as a JSON object or as flags."""
    return damaged_json(data, rng) if data[:1] == b"{" else damaged_bytes(data, rng)


def damaged_archive(data: bytes, rng: random.Random) -> bytes:
    """A torch archive after a first byte; the byte is sometimes set to 2: data is the file itself."""
    return (data[:1] if rng.random() < 0.9 else b"\x02") + damaged_bytes(data[1:], rng)


def damaged_checkpoint_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file after a first byte, which is kept."""
    return data[:1] + damaged_safetensors(data[1:], rng)
