"""Runs a decoder that is two engines, traverse and step. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from numpy.typing import NDArray

from trol_edge.bundle.manifest import Bundle, Port
from trol_edge.runtimes.cuda import Cuda
from trol_edge.runtimes.trt.api import Context
from trol_edge.runtimes.trt.loaded import Loaded
from trol_edge.runtimes.trt.memory import Lease, Memory, copies


class WholeDecoder:
    """The traverse engine, with memory for the new rows of a part of a prompt where it does not write them itself."""

    step_ports: ClassVar[list[Port]] = []

    def __init__(self, bundle: Bundle, loaded: Loaded, memory: Memory, lease: Lease) -> None:
        self._loaded, self._cuda, self._memory = loaded, loaded.cuda, memory
        loaded.open_contexts(["traverse"])
        self._new = [p for p in bundle.manifest.graphs["traverse"].outputs if p.name.startswith("new_")]
        self._most = loaded.most("traverse", "inputs_embeds")
        self._rows = 0
        if self._new:
            self._rows = min(memory.allocate(self._new, "the new rows of a prompt", lease, self._most).values())

    def traverse(self, addresses: Mapping[str, int], feeds: Mapping[str, NDArray[Any]], start: int, stop: int) -> None:
        """Enqueue a traverse of tokens start..stop-1. feeds: what its addresses hold, [1, S, ..] each."""
        for first in range(start, stop, self._most):
            self._part(dict(addresses), feeds, start, first, min(first + self._most, stop))

    def _part(
        self, addresses: dict[str, int], feeds: Mapping[str, NDArray[Any]], start: int, first: int, last: int
    ) -> None:
        """Enqueue a traverse of the tokens first..last-1 of feeds that begin with token `start`, and its copies."""
        tokens = last - first
        shapes = {name: (1, tokens, *array.shape[2:]) for name, array in feeds.items()} | {"slots": (last,)}
        for name, array in feeds.items():
            addresses[name] += (first - start) * array[0, 0].nbytes
        if self._new:
            offsets, _ = self._memory.packed(self._new, tokens)
            addresses |= {name: self._rows + offset for name, offset in offsets.items()}
        self._loaded.run("traverse", shapes, addresses)
        for copy in copies(self._new, addresses, addresses, self._memory.context, tokens):
            copy.enqueue(self._cuda, first, tokens)

    def new_step(self, addresses: Mapping[str, int]) -> WholeStep:
        """A step that is bound to these addresses."""
        return WholeStep(self._loaded, addresses)


class WholeStep:
    """One execution context of the step engine."""

    def __init__(self, loaded: Loaded, addresses: Mapping[str, int]) -> None:
        self.contexts: dict[str, Context] = {"step": loaded.new_context("step")}
        self._cuda: Cuda = loaded.cuda
        for name in loaded.infos["step"]:
            self.contexts["step"].address(name, addresses[name])

    def read(self, rows: int) -> None:
        """Let the next runs read this many rows of the cache."""
        self.contexts["step"].shape("slots", (rows,))

    def enqueue(self) -> None:
        """Enqueue a run."""
        self.contexts["step"].run(self._cuda.stream)
