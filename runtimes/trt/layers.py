"""Runs a decoder that is one engine per layer, one that mixes two passes, and a head. Not yet run on a GPU.

A traverse runs each layer's engine twice and the mixture after it, one layer after the other in the order of the
stream; a step runs each once. So weights are on the device once, and all engines take turns with one scratch memory. A
prompt that is longer than an engine takes passes a layer in parts before it enters the next one, so the second pass's
keys and values of one layer are no longer needed when the next layer begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.layer_graphs import FIRST, HEAD, HIDDEN, MIXTURE, RESULT, SECOND, layer_name, ports_of
from trol_edge.bundle.manifest import Bundle, Port
from trol_edge.runtimes.trt.api import Context
from trol_edge.runtimes.trt.loaded import Loaded
from trol_edge.runtimes.trt.memory import Lease, Memory, copies

STATES = ("of a layer", "first pass", "second pass")  # the buffers of hidden states
CACHES = ("key", "value")


class LayeredDecoder:
    """The engines of all layers, with three buffers of hidden states that they hand on to each other."""

    def __init__(self, bundle: Bundle, loaded: Loaded, memory: Memory, lease: Lease) -> None:
        self._bundle, self._loaded, self._cuda, self._memory = bundle, loaded, loaded.cuda, memory
        spec = bundle.manifest.spec
        self._layers, self._second = spec.num_layers, frozenset(spec.second_layers)
        what = "the scratch memory of all engines"
        loaded.share_scratch(memory.block(max(1, loaded.scratch_bytes), what, lease))
        loaded.open_contexts([*map(layer_name, range(self._layers)), MIXTURE, HEAD])
        self._most = min(loaded.most(name, HIDDEN) for name in map(layer_name, range(self._layers)))
        self._most_mixed = loaded.most(MIXTURE, FIRST)
        states = [Port(name, "float32", (1, "tokens", spec.hidden_size)) for name in STATES]
        self._states = memory.allocate(states, "hidden states", lease)
        self._width = spec.hidden_size * np.dtype(np.float32).itemsize
        inputs, outputs = ports_of(bundle.manifest, HEAD)
        self._head = memory.allocate((*inputs, *outputs), "the head", lease)
        self._new = {i: [p for p in self._outputs(i) if p.name.startswith("new_")] for i in range(self._layers)}
        most = max(self._new.values(), key=lambda ports: memory.packed(ports, self._most)[1])
        self._rows = memory.allocate(most, "the new rows of a pass", lease, self._most) if most else {}

    def _outputs(self, layer: int) -> tuple[Port, ...]:
        return ports_of(self._bundle.manifest, layer_name(layer))[1]

    @property
    def step_ports(self) -> list[Port]:
        """Which tokens are of a picture, as a pass of a layer asks: not that of a step."""
        inputs = self._bundle.manifest.graphs["traverse"].inputs
        return [Port(p.name, p.dtype, (1, 1, 1)) for p in inputs if p.name == "image_mask"]

    def traverse(self, addresses: Mapping[str, int], feeds: Mapping[str, NDArray[Any]], start: int, stop: int) -> None:
        """Enqueue a traverse of tokens start..stop-1. feeds: what its addresses hold, [1, S, ..] each."""
        hidden, first, second = (self._states[name] for name in STATES)
        self._cuda.copy(hidden, addresses["inputs_embeds"], (stop - start) * self._width)
        for layer in range(self._layers):
            self._pass(layer, "", hidden, first, addresses, feeds, start, stop)
            if layer in self._second:
                self._pass(layer, "second_", first, second, addresses, feeds, start, stop)
                self._mix(first, second, hidden, stop - start)
            else:
                hidden, first = first, hidden
        self._cuda.copy(self._head[HIDDEN], hidden + (stop - start - 1) * self._width, self._width)
        self._loaded.run(HEAD, {}, self._head | {"logits": addresses["logits"]})

    def _pass(
        self,
        layer: int,
        which: str,
        source: int,
        result: int,
        addresses: Mapping[str, int],
        feeds: Mapping[str, NDArray[Any]],
        start: int,
        stop: int,
    ) -> None:
        """Enqueue a pass of all tokens, from one buffer of hidden states into another. which: "" or "second_"."""
        caches = _caches(layer, which, addresses)
        given = {name: array for name, array in feeds.items() if name != "inputs_embeds"}
        for first in range(start, stop, self._most):
            last = min(first + self._most, stop)
            at, tokens = first - start, last - first
            own = {HIDDEN: source + at * self._width, RESULT: result + at * self._width}
            own |= {name: addresses[name] + at * array[0, 0].nbytes for name, array in given.items()}
            shapes: dict[str, tuple[int, ...]] = {n: (1, tokens, *array.shape[2:]) for n, array in given.items()}
            shapes |= {HIDDEN: (1, tokens, self._width // 4), "slots": (last,)}
            new = self._new[layer]
            if new:
                offsets, _ = self._memory.packed(new, tokens)
                own |= {name: min(self._rows.values()) + offset for name, offset in offsets.items()}
            self._loaded.run(layer_name(layer), shapes, {**addresses, **caches, **own})
            for copy in copies(new, own, caches, self._memory.context, tokens):
                copy.enqueue(self._cuda, first, tokens)

    def _mix(self, first: int, second: int, result: int, count: int) -> None:
        """Enqueue the mixture of two passes' results."""
        for at in range(0, count, self._most_mixed):
            shape = (1, min(self._most_mixed, count - at), self._width // 4)
            buffers = {FIRST: first, SECOND: second, RESULT: result}
            places = {name: base + at * self._width for name, base in buffers.items()}
            self._loaded.run(MIXTURE, {FIRST: shape, SECOND: shape}, places)

    def new_step(self, addresses: Mapping[str, int]) -> LayeredStep:
        """A step that is bound to these addresses."""
        buffers = [self._states[name] for name in STATES[:2]]
        return LayeredStep(self._bundle, self._loaded, addresses, buffers)


class LayeredStep:
    """One execution context of each engine, whose hidden states go to and fro between two buffers."""

    def __init__(self, bundle: Bundle, loaded: Loaded, addresses: Mapping[str, int], buffers: list[int]) -> None:
        self._cuda = loaded.cuda
        layers = bundle.manifest.spec.num_layers
        self.contexts: dict[str, Context] = {}
        hidden = addresses["inputs_embeds"]
        for layer in range(layers):
            name = layer_name(layer)
            context = self.contexts[name] = loaded.new_context(name)
            new = {f"new_{kind}": addresses.get(f"new_{kind}_{layer}", 0) for kind in CACHES}
            result = buffers[layer % 2]
            own = {**addresses, **_caches(layer, "", addresses), **new, HIDDEN: hidden, RESULT: result}
            for tensor in loaded.infos[name]:
                context.address(tensor, own[tensor])
            for port in ports_of(bundle.manifest, name)[0]:
                if "tokens" in port.shape:
                    context.shape(port.name, tuple(1 if d == "tokens" else int(d) for d in port.shape))
            hidden = result
        context = self.contexts[HEAD] = loaded.new_context(HEAD)
        for tensor in loaded.infos[HEAD]:
            context.address(tensor, {**addresses, HIDDEN: hidden}[tensor])
        self._layers = [self.contexts[layer_name(layer)] for layer in range(layers)]

    def read(self, rows: int) -> None:
        """Let the next runs read this many rows of the cache."""
        for context in self._layers:
            context.shape("slots", (rows,))

    def enqueue(self) -> None:
        """Enqueue a run of all layers and the head."""
        for context in self.contexts.values():
            context.run(self._cuda.stream)


def _caches(layer: int, which: str, addresses: Mapping[str, int]) -> dict[str, int]:
    """The addresses of a layer's caches by the names that its engine has for them. which: "" or "second_"."""
    past = {f"past_{kind}": addresses[f"past_{which}{kind}_{layer}"] for kind in CACHES}
    return past | {name.replace("past_", "present_"): pointer for name, pointer in past.items()}
