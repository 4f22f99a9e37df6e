"""Reads protobuf messages without protobuf, whose generated code ties a program to one release of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_MOST_BITS = 63  # largest shift in a varint, because no number has more than 64 bits


def protobuf_fields(data: bytes | memoryview) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a message: int for varints, a part of `data` for everything else.

    Raises ValueError or IndexError if it is not a message.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > _MOST_BITS:
                raise ValueError(f"a number of more than 64 bits before byte {at}")

    while at < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError(f"wire type {wire_type} at byte {at}")
        length = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
        value = data[at : at + length]
        if len(value) != length:
            raise ValueError(f"it ends within a field at byte {at}")
        yield number, value
        at += length
