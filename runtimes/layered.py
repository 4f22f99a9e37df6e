"""Runs prompts and steps one pass of one layer at a time, so that each 4-bit weight is in memory once.

ONNX Runtime packs the 4-bit weights of each node that reads them, so here each layer is a session, whose nodes both
passes and all steps run (trol_edge/bundle/graph_part.py). Hidden states stay in a few buffers that the passes read and
write in turn; keys and values are written in place.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.cache_scales import scale_of
from trol_edge.bundle.graph_part import INPUTS, OUTPUTS
from trol_edge.bundle.names import HEAD, IMAGE_ROWS, KINDS, LAYERS, MIX
from trol_edge.rope import TABLES

Float32 = NDArray[np.float32]
CHANGING = {"slots", IMAGE_ROWS, "rope_offset", *TABLES}  # inputs that may have other values in the next run
ValueOf = Callable[[NDArray[Any]], Any]


@dataclasses.dataclass(frozen=True)
class LayerSessions:
    """The sessions of single passes: of every layer, of the mixture, and of the output layer."""

    layers: tuple[Any, ...]
    mix: Any
    head: Any


class _Sequence:
    """The runs of a prompt's tokens or of a step, bound to their buffers.

    parts: (first, last + 1) of the tokens that are computed at a time. runs: (graph, session, binding).
    buffers: float32 [1, S, D], the first for the embeddings. positions: int64 [1, S].
    """

    def __init__(self, count: int, width: int, most: int) -> None:
        self.buffers = [np.zeros((1, count, width), np.float32) for _ in range(3)]
        self.positions = np.zeros((1, count), np.int64)
        ends = np.linspace(0, count, -(-count // most) + 1).astype(int).tolist()  # no part of a single token
        self.parts = list(itertools.pairwise(ends))
        self.runs: list[tuple[str, Any, Any]] = []
        self.changing: list[tuple[int, Any, set[str]]] = []  # part, binding, names of what may change with every run
        self.bound: list[dict[str, Any]] = [{} for _ in self.parts]


class LayeredState:
    """Runs the passes of one state, over its caches.

    cache, second: float32 or int8 [1, G, C, E] of every layer's keys and values in turn, of the first pass, and of the
    second of those layers that have one. logits: float32 [1, V], which every run overwrites.
    """

    def __init__(
        self,
        sessions: LayerSessions,
        weights: Mapping[str, Any],
        run: Callable[[str, Any, Any], None],
        value_of: ValueOf,
        cache: Sequence[Any],
        second: Mapping[int, Sequence[Any]],
        logits: Float32,
        slots: NDArray[np.int64],
        most: int,
    ) -> None:
        """cache: OrtValues, two for each layer. second: two for each layer with a second pass. slots: 0..C-1.

        most: tokens of a run. A longer prompt passes each layer in parts, so that what a run takes has a bound. All
        parts pass a layer before the next one, so the second passes of all layers may share a pair of caches.
        """
        self._sessions, self._weights, self._run, self._value_of = sessions, weights, run, value_of
        self._cache, self._second, self._slots, self._most = cache, second, slots, most
        self._logits = value_of(logits)
        self._no_rows = value_of(np.zeros(0, np.int64))
        self._steps: dict[bool, _Sequence] = {}  # those of one token, by whether they have second passes

    def compute(
        self, embeddings: Float32, start: int, both: bool, image_rows: NDArray[np.int64], changing: Mapping[str, Any]
    ) -> None:
        """Compute tokens [S, D] at start..start+S-1 by one pass or both; the logits of the last are written.

        image_rows: places of image tokens among them. changing: values of further inputs by name.
        """
        count = len(embeddings)
        if count > 1:
            sequence = self._sequence(count, embeddings.shape[1], both)
        else:
            if both not in self._steps:
                self._steps[both] = self._sequence(1, embeddings.shape[1], both)
            sequence = self._steps[both]
        sequence.positions[0] = np.arange(start, start + count)
        values = []
        for first, end in sequence.parts:
            rows = image_rows[(image_rows >= first) & (image_rows < end)] - first
            image = self._value_of(rows) if len(rows) else self._no_rows
            values.append({"slots": self._value_of(self._slots[: start + end]), IMAGE_ROWS: image, **changing})
        for part, binding, names in sequence.changing:
            bound = sequence.bound[part]
            for name in names:
                if (value := values[part].get(name)) is not None and value is not bound.get(name):
                    binding.bind_ortvalue_input(name, value)
        sequence.bound = values
        sequence.buffers[0][0] = embeddings
        for graph, session, binding in sequence.runs:
            self._run(graph, session, binding)

    def _sequence(self, count: int, width: int, both: bool) -> _Sequence:
        made = _Sequence(count, width, self._most)
        x = [[self._value_of(buffer[:, first:end]) for first, end in made.parts] for buffer in made.buffers]
        positions = [self._value_of(made.positions[:, first:end]) for first, end in made.parts]
        order = [0, 1, 2]  # of the buffers: what a layer reads, what its first pass writes, and its second
        for layer in range(len(self._sessions.layers)):
            a, b, c = order
            self._add(made, layer, False, positions, x[a], x[b], self._cache[2 * layer : 2 * layer + 2])
            if both and layer in self._second:
                self._add(made, layer, True, positions, x[b], x[c], self._second[layer])
                for mixed, first, second in zip(x[a], x[b], x[c], strict=True):
                    inputs = {"first": first, "second": second}
                    made.runs.append(
                        (MIX, self._sessions.mix, self._bound(self._sessions.mix, inputs, {"mixed": mixed}))
                    )
            else:
                order = [b, a, c]
        inputs = {"inputs_embeds": self._value_of(made.buffers[order[0]][:, -1:])}
        made.runs.append(
            (HEAD, self._sessions.head, self._bound(self._sessions.head, inputs, {"logits": self._logits}))
        )
        return made

    def _add(
        self,
        made: _Sequence,
        layer: int,
        second: bool,
        positions: Sequence[Any],
        x: Sequence[Any],
        y: Sequence[Any],
        cache: Sequence[Any],
    ) -> None:
        """Add a pass of a layer, which reads x and writes y. positions, x and y: an OrtValue for each part."""
        session = self._sessions.layers[layer]
        # The session has one node for both passes, which names the first one's scales.
        scales = {scale_of(kind, layer, 0): self._weights.get(scale_of(kind, layer, second)) for kind in KINDS}
        for part, (at, read, written) in enumerate(zip(positions, x, y, strict=True)):
            inputs = {"inputs_embeds": read, "position_ids": at, **dict(zip(INPUTS, cache, strict=True)), **scales}
            binding = self._bound(session, inputs, dict(zip(OUTPUTS, (written, *cache), strict=True)))
            made.changing.append((part, binding, CHANGING & {port.name for port in session.get_inputs()}))
            made.runs.append((LAYERS, session, binding))

    def _bound(self, session: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
        """A binding with these values, and with the weights that are inputs."""
        binding = session.io_binding()
        for port in session.get_inputs():
            value = inputs.get(port.name, self._weights.get(port.name))
            if value is not None:
                binding.bind_ortvalue_input(port.name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        return binding
