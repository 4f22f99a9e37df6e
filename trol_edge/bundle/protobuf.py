"""Reads and writes protobuf messages without protobuf, whose generated code ties a program to one release of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

_MOST_BITS = 63  # largest shift in a varint, because no number has more than 64 bits


def protobuf_fields(data: bytes | memoryview) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a message: int for varints, a part of `data` for everything else.

    Raises ValueError or IndexError if it is not a message.
    """
    at, end = 0, len(data)
    while at < end:
        key, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if wire_type == 2:
            length, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
        else:
            length = 8 if wire_type == 1 else 4
        part = data[at : at + length]
        if len(part) != length:
            raise ValueError(f"it ends within a field at byte {at}")
        yield number, part
        at += length


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The number at a place, and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > _MOST_BITS:
            raise ValueError(f"a number of more than 64 bits before byte {at}")


def varints(data: bytes | memoryview) -> Iterator[int]:
    """Yield the numbers of a packed field. Raises IndexError or ValueError if it is none."""
    at = 0
    while at < len(data):
        number, at = _varint(data, at)
        yield number


def by_number(data: bytes | memoryview) -> dict[int, list[Any]]:
    """Every field of a message, by number. Raises as `protobuf_fields` does."""
    found: dict[int, list[Any]] = {}
    for number, value in protobuf_fields(data):
        found.setdefault(number, []).append(value)
    return found


def renamed(message: bytes | memoryview, fields: Collection[int], names: Mapping[str, str]) -> bytes:
    """The message with the texts in these fields replaced, where `names` has them."""
    found = []
    for number, value in protobuf_fields(message):
        if number in fields:
            text = bytes(value).decode()
            value = names.get(text, text).encode()
        found.append(protobuf_field(number, value))
    return b"".join(found)


def protobuf_field(number: int, content: Any) -> bytes:
    """A field of a message: a varint for an int, else bytes with their length."""
    if isinstance(content, int):
        return _written(number * 8) + _written(content)
    return _written(number * 8 + 2) + _written(len(content)) + bytes(content)


def _written(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
