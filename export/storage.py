"""Streams tensors in any layout into the weights file, a block of rows at a time, never a whole model in memory.

A parameter is read once, in blocks of rows (output channels of a Linear). Every tensor that is derived from it is
written from the same block: its canonical form, its scales, and any other form that a target needs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.weights import ITEM_BYTES
from trol_edge.errors import ExportError

ALIGNMENT = 64  # the first tensor starts at a multiple of this many bytes
Progress = Callable[[str, int, int], None]  # (what, done, total); done and total in bytes or steps


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a parameter as they are stored: n output channels of K numbers each.

    values: float32, float16, or uint16 (the bits of BF16) [n, ...]; for a quantized Linear int8 [n, K] ("int8", and
    "int4" in -8..7) or uint8 [n, K], the bits of E4M3 ("fp8").
    scale: float32, per channel [n] or in blocks [n, K/block]; None if not quantized. value = values * scale.
    """

    first: int  # number of the first row
    values: NDArray[Any]
    scale: NDArray[np.float32] | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """One tensor of the weights file and how a block of rows of its source becomes a part of it.

    `convert(rows)` returns that part: all of `shape`, but along axis `rows_axis` (0 or 1) only what these rows give.
    `rows` is the number of rows of the source. shape[rows_axis] must be a multiple or a whole fraction of it (two INT4
    values share a byte, so blocks then have an even number of rows).
    """

    source: str  # name of the parameter
    dtype: str  # in the weights file: "F32", "F16", "BF16", "I32", "I8", "U8", "F8_E4M3"
    shape: tuple[int, ...]
    rows: int
    convert: Callable[[Rows], NDArray[Any]]
    rows_axis: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Read = Callable[[str], Iterator[Rows]]


def write(path: Path, layouts: Mapping[str, Layout], read: Read, progress: Progress) -> dict[str, tuple[int, int]]:
    """Write a safetensors file with one tensor per layout; returns name -> (offset in the file, bytes).

    `read(parameter)` yields the rows of a parameter in order; it is called once for each source.
    Raises ExportError if the disk is too small.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, layout in layouts.items():
        offsets[name] = end
        end += layout.nbytes
    header = {
        n: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [offsets[n], offsets[n] + t.nbytes]}
        for n, t in layouts.items()
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    base = 8 + len(text)
    _require_space(path, base + end)
    of_source: dict[str, list[str]] = {}
    for name, layout in layouts.items():
        of_source.setdefault(layout.source, []).append(name)
    with path.open("wb", buffering=0) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(base + end)
        done = 0
        for source, names in of_source.items():
            for rows in read(source):
                for name in names:
                    done += _write_rows(f.fileno(), base + offsets[name], layouts[name], rows)
                progress("weights", done, end)
    if done != end:
        raise ExportError(f"{path}: {done} of {end} bytes were made; this is a fault of trol-edge, please report it")
    return {name: (base + offsets[name], layout.nbytes) for name, layout in layouts.items()}


def _write_rows(fd: int, start: int, layout: Layout, rows: Rows) -> int:
    part = np.ascontiguousarray(layout.convert(rows))
    item = part.dtype.itemsize
    assert item == ITEM_BYTES[layout.dtype], (layout, part.dtype)
    if part.shape == layout.shape or layout.rows_axis == 0:
        row_bytes = item * math.prod(layout.shape[1:])
        _write_at(
            fd, part, start + rows.first * (layout.shape[0] * row_bytes) // layout.rows if layout.shape else start
        )
        return part.nbytes
    first = rows.first * layout.shape[1] // layout.rows
    for i, line in enumerate(part):
        _write_at(fd, line, start + (i * layout.shape[1] + first) * item)
    return part.nbytes


def _write_at(fd: int, array: NDArray[Any], offset: int) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _require_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ExportError(f"{path.parent.parent}: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; make room")
