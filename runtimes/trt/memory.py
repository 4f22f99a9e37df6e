"""Device memory of a back end: one block for several tensors, freed after whatever refers to it is gone.

Finalizers only queue device memory. It is freed at the next allocation, because a garbage collection may run during a
graph capture. Not yet run on a GPU.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trol_edge.bundle.manifest import Port
from trol_edge.bundle.sizes import largest_bytes
from trol_edge.runtimes.cuda import Cuda
from trol_edge.runtimes.trt import weights as trt_weights

_Garbage = tuple[list[int], list[Any]]  # blocks of device memory and captured graphs to be freed


class Lease:
    """Device memory and captured graphs of one object, which are queued for freeing when the object is gone."""

    def __init__(self, garbage: deque[_Garbage]) -> None:
        self.blocks: list[int] = []
        self.graphs: list[Any] = []
        weakref.finalize(self, garbage.append, (self.blocks, self.graphs)).atexit = False


class Memory:
    """Allocates for tensors at their largest. Whoever calls must hold the back end's lock."""

    def __init__(self, cuda: Cuda, context: int, tiles: int) -> None:
        """context: tokens of the cache; tiles: most pictures or tiles at a time."""
        self.cuda, self.context, self._tiles = cuda, context, tiles
        self._garbage: deque[_Garbage] = deque()

    def lease(self) -> Lease:
        """A new owner of memory."""
        return Lease(self._garbage)

    def allocate(self, ports: Iterable[Port], what: str, lease: Lease, tokens: int | None = None) -> dict[str, int]:
        """Allocate device memory for tensors at their largest, in one block of the lease.

        The memory is zeroed, because 0 times a stray NaN would still be NaN. An error names `what` it is for. tokens:
        the most of them (default: as many as the context).
        """
        offsets, size = self.packed(ports, tokens or self.context)
        base = self.block(size, what, lease)
        return {name: base + offset for name, offset in offsets.items()}

    def block(self, size: int, what: str, lease: Lease) -> int:
        """Allocate bytes of zeroed device memory."""
        self._sweep()
        base = self.cuda.allocate(size, what)
        lease.blocks.append(base)
        return base

    def packed(self, ports: Iterable[Port], tokens: int) -> tuple[dict[str, int], int]:
        """Offsets of tensors in one block, and its size."""
        offsets, size = dict[str, int](), 0
        most = {"tokens": tokens, "slots": self.context, "images": self._tiles}
        for port in ports:
            offsets.setdefault(port.name, size)
            size += -(-largest_bytes(port, most) // trt_weights.ALIGNMENT) * trt_weights.ALIGNMENT
        return offsets, size

    def _sweep(self) -> None:
        """Free what nothing refers to any more."""
        if self._garbage:
            self.cuda.wait()  # enqueued work, such as zeroing, may still use the memory
        while self._garbage:
            blocks, graphs = self._garbage.popleft()
            for graph in graphs:
                self.cuda.drop(graph)
            for block in blocks:
                self.cuda.free(block)


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy of new rows, for each head, into caches from row 0. width: bytes of them; pitch: of all rows of a head."""

    target: int
    source: int
    width: int
    pitch: int
    height: int

    def joined(self, other: Copy) -> list[Copy]:
        """Both as one, if the other goes on where this one ends."""
        target, source = self.target + self.height * self.pitch, self.source + self.height * self.width
        if dataclasses.replace(self, target=target, source=source, height=other.height) == other:
            return [dataclasses.replace(self, height=self.height + other.height)]
        return [self, other]

    def enqueue(self, cuda: Cuda, first: int, tokens: int = 1) -> None:
        """Copy the rows of this many tokens to row `first` and those after it."""
        at = self.target + first * (self.width // tokens)
        cuda.copy_rows((at, self.pitch), (self.source, self.width), self.width, self.height)


def copies(
    ports: Sequence[Port], sources: Mapping[str, int], caches: Mapping[str, int], context: int, tokens: int = 1
) -> list[Copy]:
    """The copies of new rows of this many tokens, one for all tensors if they are as tightly packed as their caches."""
    found: list[Copy] = []
    for port in ports:
        _, heads, _, size = port.shape
        row = int(size) * np.dtype(port.dtype).itemsize
        target, source = caches[port.name.replace("new_", "past_", 1)], sources[port.name]
        copy = Copy(target, source, row * tokens, row * context, int(heads))
        found[-1:] = found[-1].joined(copy) if found else [copy]
    return found
