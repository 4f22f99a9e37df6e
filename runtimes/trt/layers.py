"""Runs a decoder that is two engines per layer, one of attention, one that mixes two passes, and a head.

A traverse runs each layer's engines twice and the mixture after them, one layer after the other in the order of the
stream; a step runs each once. So weights are on the device once, and all engines take turns with one scratch memory.
Attention has no weights. Its engine is between the two of every layer, in both passes, and a step has one of its
own, which reads the filled rows of the cache once. A prompt that is longer than an engine takes passes a layer in parts
before it enters the next one, so the second pass's keys and values of one layer are no longer needed when the next
layer begins. Not yet run on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.layer_graphs import (
    ATTENTION,
    ATTENTION_STEP,
    CACHES,
    ENTER,
    FIRST,
    HEAD,
    HIDDEN,
    LEAVE,
    MIXTURE,
    RESULT,
    SECOND,
    attention_ports,
    half_name,
    ports_of,
)
from trol_edge.bundle.manifest import Bundle, Port
from trol_edge.runtimes.trt.api import Context
from trol_edge.runtimes.trt.loaded import Loaded
from trol_edge.runtimes.trt.memory import Lease, Memory, copies

STATES = ("of a layer", "first pass", "second pass")  # the buffers of hidden states


class LayeredDecoder:
    """The engines of all layers, with three buffers of hidden states that they hand on to each other."""

    def __init__(self, bundle: Bundle, loaded: Loaded, memory: Memory, lease: Lease) -> None:
        self._bundle, self._loaded, self._cuda, self._memory = bundle, loaded, loaded.cuda, memory
        spec = bundle.manifest.spec
        self._layers = spec.num_layers
        what = "the scratch memory of all engines"
        loaded.share_scratch(memory.block(max(1, loaded.scratch_bytes), what, lease))
        halves = [half_name(half, layer) for layer in range(self._layers) for half in (ENTER, LEAVE)]
        loaded.open_contexts([*halves, ATTENTION, MIXTURE, HEAD])
        self._most = min(loaded.most(ATTENTION, "position_ids"), *(loaded.most(name, HIDDEN) for name in halves))
        self._most_mixed = loaded.most(MIXTURE, FIRST)
        states = [Port(name, "float32", (1, "tokens", spec.hidden_size)) for name in STATES]
        self._states = memory.allocate(states, "hidden states", lease)
        self._width = spec.hidden_size * np.dtype(np.float32).itemsize
        inputs, outputs = ports_of(bundle.manifest, HEAD)
        self._head = memory.allocate((*inputs, *outputs), "the head", lease)
        self._hidden = Port(HIDDEN, "float32", (1, "tokens", spec.hidden_size))
        self._attention_ports = attention_ports(bundle.manifest, "tokens")
        query, key, value, attended = self._attention_ports
        what = "queries, keys and values of a part of a prompt"
        self._attention = memory.allocate((query, attended, key, value), what, lease, self._most)
        self._rows = [dataclasses.replace(port, name=f"new_{port.name}") for port in (key, value)]
        self._copied = self._rows if bundle.manifest.graphs["traverse"].gives_rows else []
        one = memory.allocate(attention_ports(bundle.manifest, 1), "queries, keys and values of a step", lease)
        self._step = one | {name: self._states[STATES[at]] for at, name in enumerate((HIDDEN, RESULT))}

    @property
    def step_ports(self) -> list[Port]:
        """Which tokens are of a picture, as a pass of a layer asks: not that of a step."""
        inputs = self._bundle.manifest.graphs["traverse"].inputs
        return [Port(p.name, p.dtype, (1, 1, 1)) for p in inputs if p.name == "image_mask"]

    def traverse(self, addresses: Mapping[str, int], feeds: Mapping[str, NDArray[Any]], start: int, stop: int) -> None:
        """Enqueue a traverse of tokens start..stop-1. feeds: what its addresses hold, [1, S, ..] each.

        A layer has a second pass if the addresses have caches of it.
        """
        hidden, first, second = (self._states[name] for name in STATES)
        self._cuda.copy(hidden, addresses["inputs_embeds"], (stop - start) * self._width)
        for layer in range(self._layers):
            self._pass(layer, "", hidden, first, addresses, feeds, start, stop)
            if f"past_second_key_{layer}" in addresses:
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
            # Packed for as many tokens as there are, so that one copy takes the rows of all heads.
            offsets, _ = self._memory.packed(self._rows, tokens)
            rows = {name: self._attention[CACHES[0]] + offset for name, offset in offsets.items()}
            own |= self._attention | {name.removeprefix("new_"): place for name, place in rows.items()}
            shapes = {name: (1, tokens, *array.shape[2:]) for name, array in given.items()} | {"slots": (last,)}
            for port in (*self._attention_ports, self._hidden):
                shapes[port.name] = tuple(tokens if d == "tokens" else int(d) for d in port.shape)
            for name in (half_name(ENTER, layer), ATTENTION, half_name(LEAVE, layer)):
                self._loaded.run(name, shapes, {**addresses, **caches, **own})
            for copy in copies(self._copied, rows, caches, self._memory.context, tokens):
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
        return LayeredStep(self._bundle, self._loaded, {**addresses, **self._step})


class LayeredStep:
    """Execution contexts of all engines, whose hidden states go to and fro between two buffers.

    Attention has one for each layer, because a captured graph has the addresses of its contexts.
    """

    def __init__(self, bundle: Bundle, loaded: Loaded, addresses: Mapping[str, int]) -> None:
        self._cuda, self._loaded, self._manifest = loaded.cuda, loaded, bundle.manifest
        self.contexts: dict[str, Context] = {}
        self._attentions: list[Context] = []
        hidden, buffers = addresses["inputs_embeds"], (addresses[HIDDEN], addresses[RESULT])
        for layer in range(bundle.manifest.spec.num_layers):
            # The new rows go into the state's own buffers, from which they are copied, or into those of all states.
            new = {kind: addresses.get(f"new_{kind}_{layer}", addresses[kind]) for kind in CACHES}
            result = buffers[layer % 2]
            own = {**addresses, **_caches(layer, "", addresses), **new, HIDDEN: hidden, RESULT: result}
            self._open(half_name(ENTER, layer), half_name(ENTER, layer), own)
            self._attentions.append(self._open(f"{ATTENTION_STEP} of layer {layer}", ATTENTION_STEP, own))
            self._open(half_name(LEAVE, layer), half_name(LEAVE, layer), own)
            hidden = result
        self._open(HEAD, HEAD, {**addresses, HIDDEN: hidden})

    def _open(self, what: str, name: str, addresses: Mapping[str, int]) -> Context:
        """Make a context of an engine for one token, which is run after those before it."""
        context = self.contexts[what] = self._loaded.new_context(name)
        for tensor in self._loaded.infos[name]:
            context.address(tensor, addresses[tensor])
        for port in ports_of(self._manifest, name)[0]:
            if "tokens" in port.shape:
                context.shape(port.name, tuple(1 if d == "tokens" else int(d) for d in port.shape))
        return context

    def read(self, rows: int) -> None:
        """Let the next runs read this many rows of the cache."""
        for context in self._attentions:
            context.shape("slots", (rows,))

    def enqueue(self) -> None:
        """Enqueue a run of all layers and the head."""
        for context in self.contexts.values():
            context.run(self._cuda.stream)


def _caches(layer: int, which: str, addresses: Mapping[str, int]) -> dict[str, int]:
    """The addresses of a layer's caches by the names that its engine has for them. which: "" or "second_"."""
    past = {f"past_{kind}": addresses[f"past_{which}{kind}_{layer}"] for kind in CACHES}
    return past | {name.replace("past_", "present_"): pointer for name, pointer in past.items()}
