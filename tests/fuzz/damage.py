"""What the campaigns do to data: values that nobody expects, JSON with another node, bytes that were altered."""

from __future__ import annotations

import copy
import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from trol_edge import IMAGE

# Values for a node of JSON. Whoever writes a file may put any of them anywhere.
NODES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 2**16, 2**24, 2**31, 2**32, 2**48, 2**62, 2**63, 10**40, -(2**63)),
    *(0.5, 1e-300, 1e308, -1.5, math.nan, math.inf, -math.inf),
    *("", "a", "cpu", "float32", "../a", "/etc/hostname", "a\x00b", "\ud800", "\u202e", "x" * 5000, "bundle.json"),
    *("weights.safetensors", "<unk>", "NFKC", "linear", "F32", "I8"),
    *([], [0], [1, 2, 3], ["a"], [[]], [None], [2**40, 2**40], {}, {"a": 1}, {"": None}, {"type": "linear"}),
)


class Spiteful:
    """An object that fails at whatever is done with it."""

    def _fail(self, *given: object) -> Any:
        raise RuntimeError("spite")

    __repr__ = __str__ = __len__ = __iter__ = __eq__ = __bool__ = __getitem__ = __call__ = _fail
    __hash__ = object.__hash__


class Weird(int):
    """A number with a long text."""

    def __repr__(self) -> str:
        return "9" * 100_000


def arguments() -> list[Any]:
    """Values for an argument of a call."""
    return [
        *(None, True, False, 0, 1, -1, 2, 7, 100, 10**6, 2**31, 2**63, -(2**63), 10**400, -(10**400)),
        *(0.0, 0.5, 1.0, -0.5, 1.5, 5e-324, 1e308, math.nan, math.inf, -math.inf),
        *(Fraction(1, 3), Fraction(10**500, 3), Decimal("0.5"), Decimal("NaN"), complex(1, 2), Weird(3)),
        *(np.float32(0.5), np.float16(np.inf), np.float64(np.nan), np.int8(3), np.uint64(2**63), np.bool_(True)),
        *(np.array(1), np.array(0.5), np.array([1, 2]), np.array(["rgb", "bgr"]), np.zeros((2, 0)), np.array(None)),
        *("", "x", "yes", "rgb", "step", " ", "\ud800", "\x00", "\u202e", "a" * 100_000, "<image>", "\U0001f916" * 50),
        *(b"", b"yes", bytearray(3), memoryview(b"abc"), [], [1], ["a"], ["a", None], [[]], ("a", "b"), [IMAGE], IMAGE),
        *({}, {"a": 1}, {"type": "string"}, set(), {"a"}, frozenset(), range(3), iter("ab"), Ellipsis, NotImplemented),
        *(object(), Spiteful(), [Spiteful()], Weird, len, lambda: 0, Path("."), type, Exception("x"), float, np.uint8),
    ]


def with_another_node(data: Any, rng: Random) -> Any:
    """A copy of plain data with one node replaced, dropped, doubled, renamed, moved or nested deeply."""
    data = copy.deepcopy(data)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        if isinstance(node, (dict, list)):
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                visit(node[key])

    visit(data)
    if not places:
        return rng.choice(NODES)
    parent, key = rng.choice(places)
    how = rng.randrange(8)
    if how < 3:
        parent[key] = copy.deepcopy(rng.choice(NODES))
    elif how == 3:
        del parent[key]
    elif how == 4:
        other, at = rng.choice(places)
        parent[key] = copy.deepcopy(other[at]) if at in other or (isinstance(other, list) and at < len(other)) else None
    elif how == 5 and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
        parent[key] = rng.choice([parent[key] + 1, parent[key] - 1, -parent[key], parent[key] * 2, parent[key] * 10**9])
    elif how == 6 and isinstance(parent, list):
        parent += [copy.deepcopy(parent[key])] * rng.choice([1, 3, 1000])
    elif isinstance(parent, dict):
        parent[rng.choice(["a", f"{key}_", str(key).upper(), "\ud800", "", "x" * 1000])] = parent.pop(key)
    return data


def json_text(data: Any, rng: Random) -> bytes:
    """Data as JSON, at times with a mark before it, cut, nested a thousand times or with bytes altered."""
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    how = rng.randrange(20)
    if how == 0:
        return b"\xef\xbb\xbf" + text
    if how == 1:
        return text[: rng.randrange(len(text) + 1)]
    if how == 2:
        return b'{"a":' * 20_000 + text + b"}" * 20_000
    if how in (3, 4):
        return altered(text, rng)
    return text


def altered(data: bytes, rng: Random) -> bytes:
    """Data with a few bytes changed, a part of it cut out, doubled, zeroed or replaced, or another end."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 50])):
        if not out:
            break
        at = rng.randrange(min(len(out), rng.choice([64, 1024, 1 << 30])))
        size = min(rng.choice([1, 1, 2, 4, 8, 100, 5000]), len(out) - at)
        how = rng.randrange(7)
        if how < 2:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            out[at : at + size] = rng.randbytes(size)
        elif how == 3:
            out[at : at + size] = rng.choice([b"\x00", b"\xff", b"\x7f", b"\x80"]) * size
        elif how == 4:
            del out[at : at + size]
        elif how == 5:
            out[at:at] = out[at : at + size]
        else:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


def with_another_header(data: bytes, rng: Random) -> bytes:
    """A safetensors file with another header: 8 bytes length, JSON, then numbers."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = rng.randrange(4)
    if how == 0:
        length = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + data[8:]
    for _ in range(rng.choice([1, 1, 2])):
        header = with_another_node(header, rng)
    text = json_text(header, rng)
    return len(text).to_bytes(8, "little") + text + rest


def with_other_numbers(data: bytes, rng: Random) -> bytes:
    """A safetensors file some of whose numbers are zero, infinite, no number or large."""
    length = int.from_bytes(data[:8], "little")
    out = bytearray(data)
    for _ in range(rng.choice([1, 3, 100])):
        at = 8 + length + rng.randrange(max(1, len(data) - length - 12)) // 4 * 4
        size = rng.choice([4, 4, 64, 4096])
        pattern = rng.choice([b"\0\0\0\0", b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\0\x7c\0\xfc"])
        out[at : at + size] = (pattern * (size // 4))[: len(out[at : at + size])]
    return bytes(out)
