"""Reads `weights.safetensors` on the robot with numpy only, one block at a time.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length of a JSON header, the header
{name: {dtype, shape, data_offsets}}, then the bytes of all tensors, without holes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.errors import BundleError
from trol_edge.reading import guard, open_plain, parse_json, require_itself

Float32 = NDArray[np.float32]
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
FLOATS = ("F32", "F16", "BF16")
BLOCK_BYTES = 16 << 20
MOST_HEADER_BYTES = 16 << 20  # largest header; TroL-7B's takes 0.2 MB


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor. dtype is one of ITEM_BYTES; offset counts bytes from the start of the file.

    Two INT4 values share a byte of a "U8" tensor, the first of them in the low half.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class WeightsFile:
    """The tensors of a weights file by name. Raises BundleError if the file is not what its header says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_plain(path) as f, guard(path, found="not readable as safetensors"):
            size = os.fstat(f.fileno()).st_size
            start = f.read(8)
            require_itself(path, start + f.read(504), BundleError)
            f.seek(8)
            length = int.from_bytes(start, "little")
            if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
                raise ValueError(f"header length {length} in a file of {size} bytes")
            text = f.read(length)
            header: dict[str, Any] = parse_json(text.decode())
            self.header_bytes, self.header_sha256 = 8 + length, hashlib.sha256(text).hexdigest()
            self.tensors = {name: self._info(name, t) for name, t in header.items() if name != "__metadata__"}
            places = sorted((t.offset, t.offset + t.nbytes) for t in self.tensors.values())
            end = max((stop for _, stop in places), default=self.header_bytes)
            if any(stop > start for (_, stop), (start, _) in itertools.pairwise(places)):
                raise ValueError("two tensors share bytes")
        if end != size:
            raise BundleError(f"{path}: {size} bytes, but its header describes {end}; copy the bundle again")

    def _info(self, name: str, entry: Any) -> TensorInfo:
        start, stop = entry["data_offsets"]
        info = TensorInfo(entry["dtype"], tuple(entry["shape"]), self.header_bytes + start)
        sizes = (start, *info.shape)
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in sizes) or len(sizes) > 9 or stop - start != info.nbytes:
            raise ValueError(f"{name!r:.80} says {entry!r:.200}")
        return info

    def load(
        self, names: Collection[str], sha256: str | None = None, stored: Collection[str] = ()
    ) -> dict[str, NDArray[Any]]:
        """Load floating point tensors as float32, converted block by block; quantized ones (I8, U8, F8_E4M3) as stored.

        stored: more tensors, all as they are stored. With sha256 the whole file is read and hashed meanwhile.
        Raises BundleError if the hash differs.
        """
        arrays = {n: np.empty(self.tensors[n].shape, loaded_dtype(self.tensors[n].dtype)) for n in names}
        arrays |= {n: np.empty(self.tensors[n].shape, STORED[self.tensors[n].dtype]) for n in stored}
        for name, first, block in self.blocks(arrays, sha256):
            dtype = self.tensors[name].dtype
            values = to_float32(block, dtype) if dtype in FLOATS and name not in stored else block
            arrays[name].reshape(-1)[first : first + block.size] = values
        return arrays

    def image(self, sha256: str | None) -> NDArray[np.uint8]:
        """Read the whole file, uint8 [bytes]. Raises BundleError if it ends early, or its hash is not `sha256`."""
        with self.path.open("rb") as f:
            data = np.empty(os.fstat(f.fileno()).st_size, np.uint8)
            view = memoryview(data)  # type: ignore[arg-type]  # numpy before 2.3 does not say that it is a buffer
            got = sum(f.readinto(view[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES))
        if got != len(data) or (sha256 and hashlib.sha256(view).hexdigest() != sha256):
            raise BundleError(f"{self.path}: altered since export (sha256 differs); copy the bundle again")
        return data

    def parts(
        self, image: NDArray[np.uint8], names: Collection[str], stored: Collection[str] = ()
    ) -> dict[str, NDArray[Any]]:
        """Tensors from an image of the file (see `image`), as `load` returns them, in memory of their own."""
        arrays = {}
        for name in {*names, *stored}:
            t = self.tensors[name]
            part = image[t.offset : t.offset + t.nbytes].copy().view(STORED[t.dtype]).reshape(t.shape)
            arrays[name] = to_float32(part, t.dtype) if t.dtype in FLOATS and name not in stored else part
        return arrays

    def blocks(self, names: Collection[str], sha256: str | None) -> Iterator[tuple[str, int, NDArray[Any]]]:
        """Read tensors in the order of the file: name, index of a block's first value, and the block as stored.

        A block is overwritten by the next. Nothing is mapped: a mapped file that somebody shortens ends the process,
        and what is hashed is what is used. With sha256 everything else is read, too, and a BundleError comes last.
        """
        digest = hashlib.sha256()
        buffer = bytearray(BLOCK_BYTES)
        with self.path.open("rb") as f:
            if sha256:
                digest.update(f.read(self.header_bytes))
            for name, t in sorted(self.tensors.items(), key=lambda item: item[1].offset):
                if name not in names and not sha256:
                    continue
                f.seek(t.offset)
                done = 0
                while done < t.nbytes:
                    view = memoryview(buffer)[: min(BLOCK_BYTES, t.nbytes - done)]
                    got = f.readinto(view)
                    if got < len(view):
                        raise BundleError(f"{self.path}: {name} ends early; copy the bundle again")
                    if sha256:
                        digest.update(view)
                    if name in names:
                        yield name, done // ITEM_BYTES[t.dtype], np.frombuffer(view, STORED[t.dtype])
                    done += got
        if sha256 and digest.hexdigest() != sha256:
            raise BundleError(f"{self.path}: altered since export (sha256 differs); copy the bundle again")


STORED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),  # the bits, because numpy lacks the type
}


def loaded_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype in which `WeightsFile.load` returns a tensor."""
    return np.dtype(np.float32) if dtype in FLOATS else STORED[dtype]


def to_float32(stored: NDArray[Any], dtype: str) -> Float32:
    """Convert stored values ("F32", "F16", or "BF16" as uint16) to float32; an F32 input may share its memory."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)
