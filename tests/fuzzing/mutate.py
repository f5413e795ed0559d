"""Damage to bytes, JSON values and Parquet files, drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

_LONG = 1_000_000
"""What is as long is not repeated again."""

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_NONSENSE: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: True,
    lambda: 0,
    lambda: -1,
    lambda: 2**31,
    lambda: 2**63,
    lambda: -(2**70),
    lambda: 10**400,
    lambda: 1e308,
    lambda: float("nan"),
    lambda: float("-inf"),
    lambda: "",
    lambda: "x" * 100_000,
    lambda: "\x00\x1b[31m\x07",
    lambda: "half \ud83d",
    lambda: "../../outside",
    lambda: "/etc/passwd",
    lambda: "[/red]",
    list,
    dict,
    lambda: [[]],
    lambda: [1, "a", None],
    lambda: {"bytes": "x", "path": 3},
)


def damage(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """One to eight changes that know nothing of the format."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        changed = draw.choice(_CHANGES)(changed, draw, others) or bytearray(b"\0")
    return bytes(changed)


def _flip(data: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    for _ in range(draw.choice((1, 1, 4, 32))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def _flip_head(data: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    """Headers are where decoders decide how much to allocate."""
    for _ in range(draw.choice((1, 2, 4))):
        data[draw.randrange(min(64, len(data)))] = draw.randrange(256)
    return data


def _number(data: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    width = draw.choice((1, 2, 4, 8))
    at = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(256, len(data)))
    value = draw.choice(_NUMBERS) & (256**width - 1)
    data[at : at + width] = value.to_bytes(width, draw.choice(("little", "big")))
    return data


def _cut(data: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    return data[: draw.randrange(len(data) + 1)]


def _remove(data: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    at = draw.randrange(len(data))
    del data[at : at + draw.choice((1, 4, 64, 1024))]
    return data


def _repeat(data: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    at = draw.randrange(len(data))
    part = data[at : at + draw.choice((4, 64, 1024))]
    data[at:at] = part * draw.choice((1, 2, 50))
    return data


def _splice(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    other = draw.choice(others)
    return data[: draw.randrange(len(data) + 1)] + other[draw.randrange(len(other) + 1) :]


def _append(data: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    return data + draw.choice((draw.randbytes(100), bytes(5000), draw.choice(others)))


def _fill(data: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    at, length = draw.randrange(len(data)), draw.choice((8, 100, 1000))
    data[at : at + length] = bytes([draw.choice((0, 0x20, 0xFF))]) * length
    return data


_CHANGES = (_flip, _flip, _flip_head, _number, _number, _cut, _remove, _repeat, _splice, _append, _fill)


def distort(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one to three places changed."""
    changed = [copy.deepcopy(value)]
    for _ in range(draw.choice((1, 1, 2, 3))):
        holder, key = draw.choice(list(_places(changed)))
        what = draw.random()
        if what < 0.6:
            holder[key] = draw.choice(_NONSENSE)()
        elif what < 0.7 and isinstance(holder, dict):
            del holder[key]
        elif what < 0.8 and isinstance(holder, dict):
            holder[draw.choice(("", "extra", "a\x00b", "../x", "x" * 1000))] = holder[key]
        elif isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * draw.choice((-1, 2, 1000, 10**12)) + draw.choice((0, 1))
        elif isinstance(holder[key], (list, str)):
            times = draw.choice((0, 2, 1000))
            holder[key] = holder[key] * (times if len(holder[key]) < _LONG else 1)
        else:
            holder[key] = [holder[key]]
    return changed[0]


def _places(value: Any) -> Any:
    """Every (container, key) of a value within a list."""
    keys = range(len(value)) if isinstance(value, list) else list(value)
    for key in keys:
        yield value, key
        if isinstance(value[key], (list, dict)):
            yield from _places(value[key])


HOSTILE_TEXTS = (
    "",
    "\x00",
    "a\x00b",
    "\x1b[2J\x1b]0;title\x07",
    "\r\n\t\v\f\b",
    "[bold]unclosed [/red] [link=file:///etc/passwd]",
    "\u202eright to left\u2066",
    "\ufeff\ufffe\uffff",
    "e" + "\u0301" * 2000,
    "word " * 20_000,
    "x" * 300_000,
    "\U0001f469\u200d" * 1000,
    "<|endoftext|><|startoftext|>" * 50,
)


def hostile_text(draw: random.Random) -> str:
    """A prompt that nobody would type."""
    anything = (draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, 0x110000))) for _ in range(50))
    return draw.choice((*HOSTILE_TEXTS, "".join(map(chr, anything))))


HOSTILE_JSON: tuple[Callable[[], bytes], ...] = (
    lambda: b"[" * 100_000,
    lambda: b'{"prompt":' * 50_000 + b"1" + b"}" * 50_000,
    lambda: b'{"pair_id": ' + b"[" * 900 + b"]" * 900 + b"}",
    lambda: b'{"label": ' + b"9" * 5000 + b"}",
    lambda: b'{"label": 1e999, "prompt": "x"}',
    lambda: b'{"prompt": "' + b"x" * 20_000_000 + b'"}',
    lambda: b"\xff\xfe{\x00}",
    lambda: b"NaN",
    lambda: b'{"prompt": "a", "prompt": "b"}',
    lambda: b'{"prompt": "a", "image_0": "/dev/zero", "image_1": "/proc/self/mem"}',
    lambda: b'{"prompt": "a", "image_0": "..", "image_1": "picture.png/"}',
    lambda: b'{"prompt": "a", "image_0": "/dev/stdin", "image_1": "/dev/stdin"}',
    lambda: b"",
)


def distort_json(path: Path, draw: random.Random) -> None:
    value = json.loads(path.read_text())
    what = draw.random()
    if what < 0.7:
        data = json.dumps(distort(value, draw)).encode()
    elif what < 0.9:
        data = damage(path.read_bytes(), draw, [path.read_bytes()])
    else:
        data = draw.choice(HOSTILE_JSON)()
    path.write_bytes(data)


def damaged_parquet(data: bytes, draw: random.Random) -> bytes:
    """Damage anywhere, or in the footer with its length and magic kept, so that its reader believes it."""
    if draw.random() < 0.5:
        return damage(data, draw, [data])
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = damage(data[-8 - length : -8], draw, [data])
    return data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def odd_column(draw: random.Random, rows: int) -> pa.Array:
    return draw.choice(
        (
            lambda: pa.nulls(rows),
            lambda: pa.array([10**30] * rows, pa.decimal128(38)),
            lambda: pa.array([2**60] * rows, pa.timestamp("ms")),
            lambda: pa.array([2**62] * rows, pa.duration("s")),
            lambda: pa.array([-(2**31)] * rows, pa.date32()),
            lambda: pa.array([float("nan")] * rows, pa.float16()),
            lambda: pa.array([[["deep"]]] * rows),
            lambda: pa.array([{"bytes": {"bytes": "x"}, "path": 3}] * rows),
            lambda: pa.array([{"bytes": None, "path": "/dev/zero"}] * rows),
            lambda: pa.array([[("k", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
            lambda: pa.array([b"\xff" * 4] * rows, pa.binary(4)),
            lambda: pa.array([True] * rows),
        )
    )()
