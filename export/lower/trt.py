"""Lowers a canonical graph to what TensorRT's parser knows, and checks that nothing else is left.

What a target's parser supports stays as it is. Where it does not support Attention, RMSNormalization, RotaryEmbedding
or Swish, they are written out in plain operators of the target's opset. Everything that does not depend on a layer
(causal mask, rows of the rope tables) is in the graph once. Heads that share keys are stacked along the query axis,
[B, G, r*S, E], so that keys and values are never repeated. The cache and a step's attention are in `cache.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from trol_edge.bundle.targets import Target
from trol_edge.bundle.trt_operators import refusal
from trol_edge.errors import ExportError
from trol_edge.export.lower import cache
from trol_edge.export.lower.making import Build, Shared

IR_VERSIONS = {20: 9, 21: 10, 23: 11, 24: 12}  # opset -> the IR version of its onnx release
INT4 = (ir.DataType.INT4, ir.DataType.UINT4)
_HEADS = (0, 2, 1, 3)  # [N, S, heads, E] -> [N, heads, S, E]
NAMES = {  # ONNX type -> its name in the parser tables
    ir.DataType.FLOAT: "FP32",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.INT8: "INT8",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.INT4: "INT4",
    ir.DataType.FLOAT8E4M3FN: "FP8",
}


def lower(model: ir.Model, target: Target) -> ir.Model:
    """Return a lowered and checked copy of the model for one target. Raises ExportError for what cannot be lowered."""
    model = model.clone()
    takes = target.takes()
    shared = Shared()
    _split_along_heads(model, shared)
    _read_rows(model, shared)
    for node in list(model.graph):
        lowering = _LOWERINGS.get(node.op_type) if node.op_type not in takes else None
        if cache.is_step(node):
            lowering = cache.attend
        elif cache.is_write(node) and "TensorScatter" in takes:
            lowering = cache.scatter
        if lowering is not None:
            build = Build(model.graph, node, shared)
            result = lowering(build, node)
            old = node.outputs[0]
            result.shape, result.type = old.shape, old.type
            name = old.name
            old.replace_all_uses_with(result, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            result.name = name
    common.RemoveUnusedNodesPass()(model)
    blocked = any(node.op_type == "DequantizeLinear" and "block_size" in node.attributes for node in model.graph)
    int4 = any(value.dtype in INT4 for value in model.graph.initializers.values())
    opset = target.int4_opset if blocked or int4 else target.opset
    model.opset_imports[""] = opset
    model.ir_version = IR_VERSIONS[opset]
    if problems := refusals(model, target):
        raise ExportError(
            f"target {target.name} ({target.library}) cannot take this graph: {'; '.join(problems[:5])}; "
            "choose another target or precision"
        )
    return model


def add_token(model: ir.Model) -> None:
    """Give a step the output `token` [1] int64: the id of its largest logit, the lowest among equal ones as in numpy.

    It is -1 if a logit is NaN or infinite; the logits have to be read then. It is not an ArgMax, because TensorRT does
    not document which of equal ones it takes.
    """
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.dtype is not None and logits.shape is not None
    vocabulary = logits.shape[1]
    assert isinstance(vocabulary, int)
    last = ir.node("Identity", [logits])  # marks the end of the graph and is removed again
    graph.append(last)
    build = Build(graph, last, Shared(prefix="token"))
    ids, axis = build.constant(np.arange(vocabulary)[None], ir.DataType.INT64), build.ints(1)
    most = build.op("ReduceMax", [logits, axis], keepdims=1)
    largest = build.constant(np.finfo(logits.dtype.numpy()).max, logits.dtype)
    usable = build.op("LessOrEqual", [build.op("Abs", [logits]), largest], ir.DataType.BOOL)
    smaller = build.op("Less", [logits, most], ir.DataType.BOOL)
    beyond = build.constant(vocabulary, ir.DataType.INT64)
    candidates = build.op("Where", [smaller, beyond, ids], ir.DataType.INT64)
    candidates = build.op("Where", [usable, candidates, build.constant(-1, ir.DataType.INT64)], ir.DataType.INT64)
    token = build.op("ReduceMin", [candidates, axis], keepdims=0)
    graph.remove(last)
    token.name, token.shape = "token", ir.Shape([1])
    graph.outputs.append(token)


def refusals(model: ir.Model, target: Target) -> list[str]:
    """Reasons why a target's parser would refuse, or silently misread, a graph: operators, types, restrictions."""
    assert target.operators is not None
    takes = target.takes()
    found: list[str] = []
    for node in model.graph:
        if why := refusal(node.op_type, target.operators, target.rtx):
            found.append(why)
            continue
        types = {NAMES.get(v.dtype, str(v.dtype)) for v in (*node.inputs, *node.outputs) if v is not None and v.dtype}
        known = takes[node.op_type].types
        if known and types and not types & set(known):
            found.append(f"{node.op_type} takes {', '.join(known)}, but {node.name} has {', '.join(sorted(types))}")
        found += _restrictions(node)
    return list(dict.fromkeys(found))


def _restrictions(node: ir.Node) -> Iterator[str]:
    """Uses of a supported operator that the parsers' own documentation excludes."""
    op = node.op_type
    inputs = list(node.inputs)
    if op == "Attention" and any(v is not None for v in inputs[4:]):
        yield f"{node.name}: Attention with past keys or lengths is ignored by the parser; give an explicit mask"
    if op == "Attention" and _float(node, "softcap"):
        yield f"{node.name}: Attention with softcap is not supported"
    if op.startswith("Reduce") and len(inputs) > 1 and inputs[1] is not None and inputs[1].const_value is None:
        yield f"{node.name}: the axes of {op} must be an initializer"
    if op in ("QuantizeLinear", "DequantizeLinear") and len(inputs) > 2 and inputs[2] is not None:
        zero = inputs[2].const_value
        if zero is None or zero.numpy().any():
            yield f"{node.name}: the zero point of {op} must be zero"
    if op == "ScatterND" and "reduction" in node.attributes and node.attributes["reduction"].as_string() != "none":
        yield f"{node.name}: ScatterND with a reduction is not supported"
    if op == "TensorScatter" and (node.attributes["axis"].as_int() if "axis" in node.attributes else -2) != -2:
        yield f"{node.name}: TensorScatter along another axis than -2 is not supported"
    positions = inputs[3] if op == "RotaryEmbedding" and len(inputs) > 3 else None
    if positions is not None and positions.dtype not in (None, ir.DataType.INT64):
        yield f"{node.name}: position_ids of RotaryEmbedding must be INT64"
    if op == "Resize" and "antialias" in node.attributes and node.attributes["antialias"].as_int():
        yield f"{node.name}: Resize with antialias is not supported"


def _split_along_heads(model: ir.Model, shared: Shared) -> None:
    """Split the output of a qkv product [N, S, (H+2G)*E] into q, k and v along its heads, not along its last axis.

    With a Split of the last axis TensorRT for RTX 1.7 dequantizes the weight at every run and multiplies in FP16.
    With Reshape, Transpose and a Split of the heads the same product is one of 8 bits.
    """
    for node in [node for node in model.graph if node.op_type == "Split"]:
        (x, *_), reshapes = node.inputs, [_reader(value, "Reshape") for value in node.outputs]
        turned = [_reader(reshape.outputs[0], "Transpose") if reshape else None for reshape in reshapes]
        shapes = [t.outputs[0].shape for t in turned if t is not None and t.attributes["perm"].as_ints() == _HEADS]
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if x is None or x.shape is None or axis not in (-1, len(x.shape) - 1) or len(shapes) != len(node.outputs):
            continue
        heads, sizes = ([s[i] for s in shapes if s is not None and len(s) == 4] for i in (1, 3))
        if len(heads) != len(shapes) or len(set(sizes)) != 1 or not all(isinstance(n, int) for n in (*heads, *sizes)):
            continue
        build = Build(model.graph, node, shared)
        counts, (size, *_) = [int(str(n)) for n in heads], [int(str(n)) for n in sizes]
        whole = build.op("Reshape", [x, build.ints(0, 0, sum(counts), size)])  # 0: as it is
        whole = build.op("Transpose", [whole], perm=list(_HEADS))  # [N, H+2G, S, E]
        parts = build.parts("Split", [whole, build.ints(*counts)], len(counts), axis=1)
        for part, transpose in zip(parts, turned, strict=True):
            assert transpose is not None
            old = transpose.outputs[0]
            part.shape, part.type, name = old.shape, old.type, old.name
            old.replace_all_uses_with(part, replace_graph_outputs=True)
            model.graph.remove(transpose, safe=True)
            part.name = name
    common.RemoveUnusedNodesPass()(model)


def _read_rows(model: ir.Model, shared: Shared) -> None:
    """Let a RotaryEmbedding whose tables are cast take their rows first, and cast these: [B, S, E/2] of [rows, E/2].

    With the operator's own positions TensorRT casts whole tables at every run, in each engine that reads them.
    """
    for node in [node for node in model.graph if node.op_type == "RotaryEmbedding"]:
        x, *tables, positions = [*node.inputs, None][:4]
        casts = [table.producer() if table is not None else None for table in tables]
        if positions is None or not all(cast is not None and cast.op_type == "Cast" for cast in casts):
            continue
        build = Build(model.graph, node, shared)
        rows = [
            build.once(("taken", table, positions), partial(_taken, build, table, positions))
            for table in tables
            if table is not None
        ]
        result = build.op("RotaryEmbedding", [x, *rows], **{k: v.value for k, v in node.attributes.items()})
        old, name = node.outputs[0], node.outputs[0].name
        result.shape, result.type = old.shape, old.type
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        result.name = name
    common.RemoveUnusedNodesPass()(model)


def _taken(build: Build, table: ir.Value, positions: ir.Value) -> ir.Value:
    """The rows of a table that is cast, taken before they are cast."""
    cast = table.producer()
    assert cast is not None and table.dtype is not None
    return build.op("Cast", [build.op("Gather", [cast.inputs[0], positions], axis=0)], table.dtype, to=table.dtype)


def _reader(value: ir.Value, op: str) -> ir.Node | None:
    """The one node that reads a value, if it is such an operator."""
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op else None


def _swish(build: Build, node: ir.Node) -> ir.Value:
    (x,) = node.inputs
    assert x is not None and x.dtype is not None
    inner = x
    if (alpha := _float(node, "alpha", 1.0)) != 1.0:
        inner = build.op("Mul", [x, build.constant(alpha, x.dtype)])
    return build.op("Mul", [x, build.op("Sigmoid", [inner])])


def _rms_normalization(build: Build, node: ir.Node) -> ir.Value:
    """Normalize x [.., D] with scale [D]; the mean of squares is float32, as the operator defines it (stash_type 1)."""
    x, scale = node.inputs
    assert x is not None and scale is not None and x.dtype is not None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    stash = node.attributes["stash_type"].as_int() if "stash_type" in node.attributes else 1
    if axis not in (-1, (len(x.shape) if x.shape else 0) - 1) or stash != 1:
        raise ExportError(f"{node.name}: RMSNormalization of axis {axis} in type {stash} cannot be lowered")
    wide = x if x.dtype == ir.DataType.FLOAT else build.op("Cast", [x], ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    mean = build.op("ReduceMean", [build.op("Mul", [wide, wide]), build.ints(-1)], keepdims=1)
    shifted = build.op("Add", [mean, build.constant(_float(node, "epsilon", 1e-5), ir.DataType.FLOAT)])
    normal = build.op("Div", [wide, build.op("Sqrt", [shifted])])
    if x.dtype != ir.DataType.FLOAT:
        normal = build.op("Cast", [normal], x.dtype, to=x.dtype)
    return build.op("Mul", [normal, scale])


def _rotary_embedding(build: Build, node: ir.Node) -> ir.Value:
    """Rotate halves of x [B, H, S, E] with tables [rows, E/2] and positions [B, S], or with their rows [B, S, E/2]."""
    x, cos, sin, positions = [*node.inputs, None][:4]
    others = {k for k, v in node.attributes.items() if v.type == ir.AttributeType.INT and v.as_int()}
    if x is None or cos is None or sin is None or others:
        raise ExportError(f"{node.name}: RotaryEmbedding with {sorted(others) or 'no tables'} cannot be lowered")

    def rows(table: ir.Value) -> ir.Value:
        taken = table if positions is None else build.op("Gather", [table, positions], axis=0)
        return build.op("Unsqueeze", [taken, build.ints(1)])  # [B, 1, S, E/2]

    c, s = (build.once(("rows", t, positions), lambda t=t: rows(t)) for t in (cos, sin))  # type: ignore[misc]
    a, b = build.parts("Split", [x], 2, axis=-1, num_outputs=2)
    first = build.op("Sub", [build.op("Mul", [a, c]), build.op("Mul", [b, s])])
    second = build.op("Add", [build.op("Mul", [b, c]), build.op("Mul", [a, s])])
    return build.op("Concat", [first, second], axis=-1)


def _attention(build: Build, node: ir.Node) -> ir.Value:
    """Compute softmax(q k) v: q [B, H, S, E], k and v [B, G, T, E], mask [.., S, T] (bool or added), or causal."""
    q, k, v, mask = [*node.inputs, None][:4]
    if any(value is not None for value in node.inputs[4:]) or len([o for o in node.outputs if o.uses()]) > 1:
        raise ExportError(f"{node.name}: Attention with its own cache or more outputs cannot be lowered")
    assert q is not None and k is not None and v is not None and q.shape is not None and k.shape is not None
    dtype = q.dtype
    assert dtype is not None
    (batch, heads, length, size), groups = q.shape.dims, k.shape[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or not isinstance(size, int) or heads % groups:
        raise ExportError(f"{node.name}: Attention with {heads} heads and {groups} key heads cannot be lowered")
    if batch != 1 and heads != groups:
        raise ExportError(f"{node.name}: Attention with shared keys in a batch cannot be lowered")
    causal = "is_causal" in node.attributes and bool(node.attributes["is_causal"].as_int())
    share = heads // groups
    scale = _float(node, "scale") or 1 / math.sqrt(size)
    q = build.op("Mul", [q, build.constant(scale, dtype)])
    if share > 1:
        q = build.op("Reshape", [q, build.ints(1, groups, -1, size)])  # [1, G, r*S, E]
    scores = build.op("MatMul", [q, build.op("Transpose", [k], perm=[0, 1, 3, 2])])  # [B, G, r*S, T]
    if causal:
        if mask is not None:
            raise ExportError(f"{node.name}: Attention with a mask that is causal too cannot be lowered")
        shown: ir.Value | None = build.once(("causal", q.dtype), lambda: _causal(build, k))
    else:
        shown = mask
    if shown is not None:
        added = build.once(
            ("mask", shown, dtype, 1 if length == 1 else share),
            lambda: _added(build, shown, dtype, 1 if length == 1 else share),
        )
        scores = build.op("Add", [scores, added])
    out = build.op("MatMul", [build.op("Softmax", [scores], axis=-1), v])
    if share > 1:
        out = build.op("Reshape", [out, build.op("Shape", [node.inputs[0]], ir.DataType.INT64)])
    return out


def _causal(build: Build, k: ir.Value) -> ir.Value:
    """Bool mask [S, S] in which token i sees tokens up to i. S is read from the keys, as long as the queries."""
    length = build.op("Shape", [k], ir.DataType.INT64, start=2, end=3)
    length = build.op("Squeeze", [length, build.ints(0)])
    zero, one = build.constant(0, ir.DataType.INT64), build.constant(1, ir.DataType.INT64)
    positions = build.op("Range", [zero, length, one])
    rows = build.op("Unsqueeze", [positions, build.ints(1)])
    return build.op("LessOrEqual", [positions, rows], ir.DataType.BOOL)


def _added(build: Build, mask: ir.Value, dtype: ir.DataType, share: int) -> ir.Value:
    """The mask as added to scores: 0 where a token may attend, else the lowest number, r times along the queries."""
    if mask.dtype == ir.DataType.BOOL:
        lowest = float(np.finfo(dtype.numpy()).min) if dtype != ir.DataType.BFLOAT16 else -3.3e38
        mask = build.op("Where", [mask, build.constant(0.0, dtype), build.constant(lowest, dtype)], dtype)
    if share > 1:
        mask = build.op("Concat", [mask] * share, axis=-2)
    return mask


def _float(node: ir.Node, name: str, default: float = 0.0) -> float:
    return node.attributes[name].as_float() if name in node.attributes else default


_LOWERINGS: dict[str, Callable[[Build, ir.Node], ir.Value]] = {
    "Attention": _attention,
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
    "Swish": _swish,
}
