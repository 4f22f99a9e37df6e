"""Applies sentencepiece's character map as sentencepiece does."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import tokenizers

MOST_KEY_BYTES = 256  # longest key that is looked for
MOST_GROWTH = 64  # most bytes for a byte of the text; the largest of Unicode's compatibility mappings has 11


def split_normalizer(normalizer: Any) -> tuple[Charsmap | None, Any]:
    """Take the character map out of a normalizer. The library applies it per grapheme and so loses combining marks."""
    steps = json.loads(normalizer.__getstate__())["normalizers"]
    if not steps or steps[0]["type"] != "Precompiled":
        return None, normalizer
    rest = tokenizers.normalizers.Sequence([])
    rest.__setstate__(json.dumps({"type": "Sequence", "normalizers": steps[1:]}).encode())
    return Charsmap(base64.b64decode(steps[0]["precompiled_charsmap"])), rest


class Charsmap:
    """sentencepiece's character map, which replaces the longest key at each place of a text.

    The map is a double-array trie of UTF-8 keys (u32 units, darts-clone layout) and NUL-ended replacements.
    """

    def __init__(self, blob: bytes) -> None:
        size = int.from_bytes(blob[:4], "little")
        self._units: list[int] = np.frombuffer(blob, "<u4", size // 4, 4).tolist()
        self._replacements = blob[4 + size :]

    def normalise(self, text: str) -> str:
        data = text.encode()
        out = bytearray()
        at = 0
        while at < len(data):
            length, start = self._longest(data, at)
            if length:
                out += self._replacements[start : self._replacements.index(0, start)]
            else:
                length = 1 if data[at] < 0x80 else 2 if data[at] < 0xE0 else 3 if data[at] < 0xF0 else 4
                out += data[at : at + length]
            at += length
            if len(out) > MOST_GROWTH * at:
                raise ValueError("its character map makes texts too long")
        return out.decode()

    def _longest(self, data: bytes, at: int) -> tuple[int, int]:
        """Length in bytes of the longest key at `at` and where its replacement starts; (0, 0) if there is none."""
        found = (0, 0)
        node = _trie_offset(self._units[0])
        for i in range(at, min(len(data), at + MOST_KEY_BYTES)):
            node ^= data[i]
            unit = self._units[node]
            if unit & 0x800000FF != data[i]:
                break
            node ^= _trie_offset(unit)
            if unit & 0x100:
                found = (i + 1 - at, self._units[node] & 0x7FFFFFFF)
        return found


def _trie_offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)
