"""Compares the arithmetic of graphs that are cut with what was recorded.

The input of every Linear is forced to a pattern, and what the graph itself computed there is compared
(trol_edge.bundle.probes says why nothing adds up).

A stage is named by what computed the value:

    arithmetic.vision.embedding             the patches
    arithmetic.vision.layers.<i>.attention  q, k, v, attention; then .out, .fc1, .fc2, each with the norm after it
    arithmetic.vision.features              the last layer's fc2, what is between tower and projector
    arithmetic.projector.proj1, .proj2
    arithmetic.<graph>.layers.<i>.pass<1|2>.keys, .values       qkv and the rotary embedding
    ....attention                           queries, attention; then .out, .mlp (gate, up), .down; .<Linear>.lora_a
    arithmetic.<graph>.layers.<i>.gate      the mixture of both passes, and the norm that follows
    arithmetic.<graph>.norm                 the same after the last layer
    arithmetic.<graph>.output_layer

graph: traverse, traverse_text or step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.backend import FIRST, SECOND
from trol_edge.bundle import probes
from trol_edge.bundle.selftest import ForcedGraph, SelfTest
from trol_edge.bundle.spec import ModelSpec
from trol_edge.model import Model
from trol_edge.verify.report import ALWAYS, Stage, compared

# The Linear or function whose output each Linear reads.
_FROM = {
    "out": "attention",
    "fc1": "out",
    "fc2": "fc1",
    "mlp.gate": "out",
    "mlp.up": "out",
    "mlp.gate_up": "out",
    "mlp.down": "mlp",
}
_FROM_BEFORE = ("q", "k", "v", "qkv")  # read what the layer before made
ORDER = ("vision", "traverse", "traverse_text", "step")


def forced_stages(model: Model, test: SelfTest, pixels: NDArray[np.float32]) -> Iterator[Stage]:
    """Run every graph that was recorded, cut, and compare. pixels: the first square of the picture, [1, 3, P, P]."""
    spec, backend = model.bundle.manifest.spec, model.backend
    states: dict[str, Any] = {}
    for graph in ORDER:
        record = test.forced.get(graph)
        if record is None or graph not in model.bundle.manifest.graphs:
            continue
        state = states["traverse"] if graph == "step" else backend.new_state()
        states[graph] = state
        feeds: dict[str, NDArray[Any]]
        if graph == "vision":
            tokens, feeds = 0, {"pixel_values": pixels}
        else:
            tokens = int(test.forced["traverse"].tokens[0])  # those of its first Linear's input
            feeds = _inputs(record, spec.hidden_size, tokens, graph, bool(spec.lora_rank))
        if "rope_offset" in (port.name for port in model.bundle.manifest.graphs[graph].inputs):
            feeds["rope_offset"] = np.zeros(1, np.int64)
        cuts = record.cuts()
        for (value, _, _), count, width, scale in zip(cuts, record.tokens, record.widths, record.scales, strict=True):
            feeds[f"{value}.pattern"] = probes.pattern(value, int(width)).astype(np.float32) * scale
            feeds[f"{value}.rows"] = np.arange(count, dtype=np.int64)[None] % probes.ROWS
            feeds[f"{value}.seen"] = probes.seen(int(count))
        found = backend.run_cut(graph, [value for value, _, _ in cuts], feeds, state)
        if found is None:
            return
        rounded = graph != "vision" and model.bundle.manifest.plan.kv is not None
        yield from _compare(graph, record, found, state, tokens, spec, rounded)


def _inputs(record: ForcedGraph, width: int, tokens: int, graph: str, masked: bool) -> dict[str, NDArray[Any]]:
    """The inputs of a decoder's graph, as export made them up."""
    rows = probes.pattern("inputs_embeds", width)[np.arange(tokens + 1) % probes.ROWS].astype(np.float32)
    rows *= record.scale[0]
    if graph == "step":
        return {"inputs_embeds": rows[None, -1:], "position_ids": np.full((1, 1), tokens, np.int64)}
    feeds: dict[str, NDArray[Any]] = {"inputs_embeds": rows[None, :-1]}
    feeds["position_ids"], feeds["slots"] = np.arange(tokens)[None], np.arange(tokens)
    if graph == "traverse" and masked:
        feeds["image_mask"] = (np.arange(tokens) < (tokens + 1) // 2).astype(np.float32)[None, :, None]
    return feeds


def _compare(
    graph: str,
    record: ForcedGraph,
    found: dict[str, NDArray[Any]],
    state: Any,
    tokens: int,
    spec: ModelSpec,
    rounded: bool,
) -> Iterator[Stage]:
    """Compare a graph. rounded: whether its caches have 8 bits."""
    budget = ALWAYS["arithmetic"]
    of_rows = ALWAYS["rounded"] if rounded else budget  # of keys, values, and what attention makes of them
    kept: list[Any] = [[], []]
    if record.cache.size:
        rows = np.array([tokens], np.int32) if graph == "step" else probes.seen(tokens).astype(np.int32)
        kept = [state.rows(rows, which) for which in (FIRST, SECOND)[: len(record.cache)]]

    def cached(layer: int, which: int) -> Iterator[Stage]:
        for kind, name in enumerate(("keys", "values")):
            if kept[which]:
                place = spec.cached_layers[which].index(layer)
                here = probes.summary(kept[which][2 * place + kind])
                title = f"arithmetic.{graph}.layers.{layer}{_pass(graph, which)}.{name}"
                yield compared(title, here, record.cache[which, layer, kind], of_rows)

    for i, (value, weight, use) in enumerate(record.cuts()):
        qkv = re.fullmatch(r"decoder\.layers\.(\d+)\.out\.weight", weight)
        if qkv:  # keys and values come before what is made from them
            yield from cached(int(qkv[1]), use)
        computed = found[f"{value}.computed"]
        here = probes.summary(computed.reshape(-1, computed.shape[-1]))
        allowed = of_rows if qkv else budget
        yield compared(f"arithmetic.{_maker(graph, weight, use, spec)}", here, record.seen[i, : len(here)], allowed)
    (output,) = [array for name, array in found.items() if not name.endswith(".computed")]
    if graph == "vision":
        here = probes.summary(output[0][probes.seen(len(output[0]))])
        yield compared("arithmetic.projector.proj2", here, record.output, budget)
    else:
        yield compared(f"arithmetic.{graph}.output_layer", probes.summary(output), record.output, budget)


def _pass(graph: str, which: int) -> str:
    return "" if graph == "step" else f".pass{which + 1}"


def _maker(graph: str, weight: str, use: int, spec: ModelSpec) -> str:
    """What computed the input of a Linear, in its `use`-th use."""
    layer = re.match(r"(vision|decoder)\.layers\.(\d+)\.(.*)\.(weight|lora_a|lora_b)", weight)
    if layer is None:
        return {"vision.proj1.weight": "vision.features", "vision.proj2.weight": "projector.proj1"}.get(
            weight, f"{graph}.norm"
        )
    number, linear = int(layer[2]), layer[3]
    if layer[1] == "vision":
        if linear in _FROM_BEFORE:
            return f"vision.layers.{number - 1}.fc2" if number else "vision.embedding"
        return f"vision.layers.{number}.{_FROM[linear]}"
    here = f"{graph}.layers.{number}{_pass(graph, use)}"
    if layer[4] == "lora_b":
        return f"{here}.{linear}.lora_a"
    if linear != "qkv":
        return f"{here}.{_FROM[linear]}"
    if use:
        return f"{graph}.layers.{number}.pass1.down"
    last = "gate" if graph != "step" and number - 1 in spec.second_layers else "down"
    return f"{graph}.layers.{number - 1}.{last}" if number else f"{here}.norm"
