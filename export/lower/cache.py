"""Rewrites of the K/V cache for TensorRT: new rows are written in place, and a step reads the filled rows only.

What TensorRT for RTX 1.7 does with each form was read in the programs of its engines (docs/decisions.md):
ScatterND makes a new tensor, so a cache that is bound as past and as present is copied onto itself at every run.
TensorScatter becomes TensorRT's KVCacheUpdate, which writes the new rows only. A product with the first T rows of a
cache, written as MatMul or Attention, copies these rows first. Written as Mul and ReduceSum it reads them in place.
Before 10.15 there is no such layer. There a step and a traverse give their new rows as outputs, their attention takes
them in place of the cache's own rows, and the caller copies them into the cache.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import onnx_ir as ir

from trol_edge.errors import ExportError
from trol_edge.export.lower.making import Build, Shared

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
LOWEST = float(np.finfo(np.float32).min)  # added to the scores of tokens that may not be seen


def read_filled(model: ir.Model, give_rows: bool) -> None:
    """Give a step the input `slots` [T] int64, 0..T-1: its attention reads the first T rows of the cache.

    T is above the position of the token, and at most the capacity. A graph for any T replaces one for the capacity.
    give_rows: read past caches and not present ones, and give the new rows as outputs new_*, [1, G, 1, E] per cache.
    Nothing but the outputs present_* depends on the written caches then, so an engine can go without them.
    """
    graph = model.graph
    slots = ir.Value(name="slots", shape=ir.Shape(["slots"]), type=ir.TensorType(INT64))
    graph.inputs.insert(2, slots)  # where a traverse has it
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    shared = Shared(prefix="filled")
    for node in [node for node in graph if node.op_type == "Attention"]:
        build = Build(graph, node, shared)
        end = build.once("end", partial(build.op, "Shape", [slots], INT64))
        visible = build.once("visible", partial(_mask, build, "LessOrEqual", slots, positions, 3))
        for index in (1, 2):
            present = node.inputs[index]
            assert present is not None and present.shape is not None
            write = present.producer() if give_rows else None
            if write is not None and not is_write(write):
                raise ExportError(f"{node.name}: its input {index} is no cache with a new row; please report this")
            read = write.inputs[0] if write is not None else present
            rows = build.op("Slice", [read, build.ints(0), end, build.ints(2)])
            batch, heads, _, size = present.shape.dims
            rows.shape = ir.Shape([batch, heads, "slots", size])
            if write is not None and (new := write.inputs[2]) is not None:
                # The cache's own row may hold this token already, where both are written at one address.
                own = build.once("own", partial(_mask, build, "Equal", slots, positions, 2))
                rows = build.op("Where", [own, new, rows], rows.dtype)
                rows.shape = ir.Shape([batch, heads, "slots", size])
                new.name = str(present.name).replace("present_", "new_", 1)
                graph.outputs.append(new)
            node.replace_input_with(index, rows)
        node.replace_input_with(3, visible)
    _remove_unused(graph)


def give_rows(model: ir.Model) -> None:
    """Let a traverse read past caches and not present ones, and give its new rows as outputs new_*, [1, G, S, E].

    Nothing but the outputs present_* depends on the written caches then, so an engine can go without them.
    """
    graph = model.graph
    slots, positions = (next(v for v in graph.inputs if v.name == name) for name in ("slots", "position_ids"))
    shared = Shared(prefix="given")
    for node in [node for node in graph if node.op_type == "Attention"]:
        build = Build(graph, node, shared)
        first = build.once("first", partial(_first, build, positions))
        before = build.once("before", partial(_mask, build, "Less", slots, first, 2))
        which = build.once("which", partial(_which, build, slots, first))
        for index in (1, 2):
            filled = node.inputs[index]
            cut = filled.producer() if filled is not None else None
            present = cut.inputs[0] if cut is not None and cut.op_type == "Slice" else None
            write = present.producer() if present is not None else None
            if filled is None or filled.shape is None or cut is None or write is None or not is_write(write):
                raise ExportError(f"{node.name}: its input {index} is no cache with new rows; please report this")
            new = write.inputs[2]
            assert new is not None and present is not None
            rows = build.op("Slice", [write.inputs[0], *cut.inputs[1:]])
            # The cache's own rows may hold these tokens already, where both are written at one address.
            fresh = build.op("Gather", [new, which], axis=2)
            result = build.op("Where", [before, rows, fresh], rows.dtype)
            rows.shape = fresh.shape = result.shape = ir.Shape(filled.shape.dims)
            new.name = str(present.name).replace("present_", "new_", 1)
            graph.outputs.append(new)
            node.replace_input_with(index, result)
    _remove_unused(graph)


def _which(build: Build, slots: ir.Value, first: ir.Value) -> ir.Value:
    """For each slot [T] the new row that belongs there, 0 where none does."""
    after = build.op("Sub", [slots, first])
    which = build.op("Max", [after, build.ints(0)])
    after.shape = which.shape = ir.Shape(["slots"])
    return which


def _first(build: Build, positions: ir.Value) -> ir.Value:
    """The first token's position, [1]."""
    flat = build.op("Reshape", [positions, build.ints(-1)])
    flat.shape = ir.Shape([positions.shape[1]]) if positions.shape is not None else None
    first = build.op("Slice", [flat, build.ints(0), build.ints(1), build.ints(0)])
    first.shape = ir.Shape([1])
    return first


def _remove_unused(graph: ir.Graph) -> None:
    for unused in [n for n in reversed(graph) if not any(o.uses() or o.is_graph_output() for o in n.outputs)]:
        graph.remove(unused, safe=True)


def _mask(build: Build, comparison: str, slots: ir.Value, positions: ir.Value, axis: int) -> ir.Value:
    """Bool mask of four dimensions, T rows on `axis`: how each compares with the one position that is given."""
    rows = build.op("Unsqueeze", [slots, build.ints(*(i for i in range(4) if i != axis))])
    own = build.op("Reshape", [positions, build.ints(1, 1, 1, 1)])
    rows.shape, own.shape = ir.Shape(["slots" if i == axis else 1 for i in range(4)]), ir.Shape([1, 1, 1, 1])
    mask = build.op(comparison, [rows, own], BOOL)
    mask.shape = rows.shape
    return mask


def is_write(node: ir.Node) -> bool:
    """Whether a ScatterND writes new rows into a cache."""
    past = node.inputs[0] if node.op_type == "ScatterND" else None
    return past is not None and past.is_graph_input() and str(past.name).startswith("past_")


def scatter(build: Build, node: ir.Node) -> ir.Value:
    """Write new rows [1, G, S, E] with TensorScatter, from the first token's position on; positions are consecutive."""
    past, _, new = node.inputs
    positions = next(value for value in build.graph.inputs if value.name == "position_ids")
    first = build.once("first position", partial(_first, build, positions))
    return build.op("TensorScatter", [past, new, first], axis=-2)


def is_step(node: ir.Node) -> bool:
    """Whether an Attention has a single query, so that it is a matter of reading the cache."""
    query = node.inputs[0] if node.op_type == "Attention" else None
    causal = "is_causal" in node.attributes and node.attributes["is_causal"].as_int()
    return query is not None and query.shape is not None and query.shape.dims[::2] == (1, 1) and not causal


def attend(build: Build, node: ir.Node) -> ir.Value:
    """Attention of one query, q [1, H, 1, E], k and v [1, G, T, E], bool mask [1, 1, 1, T], as sums in float32.

    Products and sums are fused with the Slice that makes k and v, so the rows are read once and nothing is written
    but the scores.
    """
    q, k, v, mask = [*node.inputs, None][:4]
    assert q is not None and k is not None and v is not None and q.shape is not None and k.shape is not None
    dtype = q.dtype
    assert dtype is not None
    (_, heads, _, size), groups = q.shape.dims, k.shape[1]
    more = [value for value in node.inputs[4:] if value is not None]
    refusal = f"{node.name}: Attention with {heads} heads and {groups} key heads cannot be lowered"
    if not (isinstance(heads, int) and isinstance(size, int) and isinstance(groups, int)):
        raise ExportError(refusal)
    if more or heads % groups:
        raise ExportError(refusal)
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else 1 / math.sqrt(size)
    query = _wide(build, build.op("Reshape", [q, build.ints(1, groups, heads // groups, 1, size)]))
    query = build.op("Mul", [query, build.constant(scale, FLOAT)])
    keys, values = (_wide(build, build.op("Unsqueeze", [x, build.ints(2)])) for x in (k, v))  # [1, G, 1, T, E]
    scores = build.op("ReduceSum", [build.op("Mul", [query, keys]), build.ints(-1)], keepdims=1)  # [1, G, r, T, 1]
    if mask is not None:
        scores = build.op("Add", [scores, build.once(("filled", mask), lambda: _column(build, mask))])
    weights = build.op("Softmax", [scores], axis=3)
    out = build.op("ReduceSum", [build.op("Mul", [weights, values]), build.ints(3)], keepdims=1)  # [1, G, r, 1, E]
    if dtype != FLOAT:
        out = build.op("Cast", [out], dtype, to=dtype)
    return build.op("Reshape", [out, build.ints(1, heads, 1, size)])


def _wide(build: Build, value: ir.Value) -> ir.Value:
    return value if value.dtype == FLOAT else build.op("Cast", [value], FLOAT, to=FLOAT)


def _column(build: Build, mask: ir.Value) -> ir.Value:
    """What is added to scores [1, G, r, T, 1]: 0 where a token may attend, else the lowest number."""
    added = build.op("Where", [mask, build.constant(0.0, FLOAT), build.constant(LOWEST, FLOAT)], FLOAT)
    return build.op("Unsqueeze", [added, build.ints(4)])
