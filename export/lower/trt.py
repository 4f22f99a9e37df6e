"""Lowers a canonical graph to what TensorRT's parser knows, and checks that nothing else is left.

What a target's parser supports stays as it is. Where it does not support Attention, RMSNormalization, RotaryEmbedding
or Swish, they are written out in plain operators of the target's opset. Everything that does not depend on a layer
(causal mask, rows of the rope tables) is in the graph once. Heads that share keys are stacked along the query axis,
[B, G, r*S, E], so that keys and values are never repeated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from trol_edge.bundle.targets import Target
from trol_edge.bundle.trt_operators import refusal
from trol_edge.errors import ExportError

IR_VERSIONS = {20: 9, 21: 10, 23: 11, 24: 11}  # opset -> the IR version of its onnx release
INT4 = (ir.DataType.INT4, ir.DataType.UINT4)
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
    shared = _Shared()
    for node in list(model.graph):
        if node.op_type in _LOWERINGS and node.op_type not in takes:
            build = _Build(model.graph, node, shared)
            result = _LOWERINGS[node.op_type](build, node)
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
    build = _Build(graph, last, _Shared(prefix="token"))
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


@dataclasses.dataclass
class _Shared:
    """State that the lowered nodes of one graph share: values by their meaning, and how many were made."""

    values: dict[Any, ir.Value] = dataclasses.field(default_factory=dict)
    made: int = 0
    prefix: str = "lowered"  # begins the names of new values


class _Build:
    """Makes nodes before `anchor`; values that do not depend on the layer are made once, at the head of the graph."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node, shared: _Shared) -> None:
        self.graph, self.anchor, self.shared = graph, anchor, shared

    def op(
        self, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Add one node; its output has `dtype`, or that of its first input."""
        node = ir.node(op, inputs, attributes=attributes)
        self.graph.insert_before(self.anchor, node)
        return self._named(node.outputs[0], dtype or (inputs[0].dtype if inputs[0] is not None else None))

    def pair(self, op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> tuple[ir.Value, ir.Value]:
        """Add one node with two outputs of its first input's type."""
        node = ir.node(op, inputs, attributes=attributes, num_outputs=2)
        self.graph.insert_before(self.anchor, node)
        first, second = (self._named(v, inputs[0].dtype if inputs[0] is not None else None) for v in node.outputs)
        return first, second

    def _named(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        self.shared.made += 1
        value.name = f"{self.shared.prefix}.{self.shared.made}"
        value.type = None if dtype is None else ir.TensorType(dtype)
        return value

    def constant(self, numbers: Any, dtype: ir.DataType) -> ir.Value:
        """Return an initializer; equal numbers share one."""
        array = np.asarray(numbers, dtype.numpy())
        key = ("constant", dtype, array.shape, array.tobytes())
        if key not in self.shared.values:
            self.shared.made += 1
            name = f"{self.shared.prefix}.constant.{self.shared.made}"
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
            value.const_value = ir.Tensor(array, name=name)
            self.graph.register_initializer(value)
            self.shared.values[key] = value
        return self.shared.values[key]

    def ints(self, *numbers: int) -> ir.Value:
        """Return an int64 initializer."""
        return self.constant(numbers, ir.DataType.INT64)

    def once(self, key: Any, make: Callable[[], ir.Value]) -> ir.Value:
        """Make a value when it is first asked for; its operands must precede every user, as graph inputs do."""
        if key not in self.shared.values:
            self.shared.values[key] = make()
        return self.shared.values[key]


def _swish(build: _Build, node: ir.Node) -> ir.Value:
    (x,) = node.inputs
    assert x is not None and x.dtype is not None
    inner = x
    if (alpha := _float(node, "alpha", 1.0)) != 1.0:
        inner = build.op("Mul", [x, build.constant(alpha, x.dtype)])
    return build.op("Mul", [x, build.op("Sigmoid", [inner])])


def _rms_normalization(build: _Build, node: ir.Node) -> ir.Value:
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


def _rotary_embedding(build: _Build, node: ir.Node) -> ir.Value:
    """Rotate halves of x [B, H, S, E] with tables [rows, E/2] and positions [B, S]."""
    x, cos, sin, positions = node.inputs
    others = {k for k, v in node.attributes.items() if v.type == ir.AttributeType.INT and v.as_int()}
    if positions is None or x is None or cos is None or sin is None or others:
        raise ExportError(f"{node.name}: RotaryEmbedding with {sorted(others) or 'no positions'} cannot be lowered")

    def rows(table: ir.Value) -> ir.Value:
        return build.op("Unsqueeze", [build.op("Gather", [table, positions], axis=0), build.ints(1)])  # [B, 1, S, E/2]

    c, s = (build.once(("rows", t, positions), lambda t=t: rows(t)) for t in (cos, sin))  # type: ignore[misc]
    a, b = build.pair("Split", [x], axis=-1, num_outputs=2)
    first = build.op("Sub", [build.op("Mul", [a, c]), build.op("Mul", [b, s])])
    second = build.op("Add", [build.op("Mul", [b, c]), build.op("Mul", [a, s])])
    return build.op("Concat", [first, second], axis=-1)


def _attention(build: _Build, node: ir.Node) -> ir.Value:
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


def _causal(build: _Build, k: ir.Value) -> ir.Value:
    """Bool mask [S, S] in which token i sees tokens up to i. S is read from the keys, as long as the queries."""
    length = build.op("Shape", [k], ir.DataType.INT64, start=2, end=3)
    length = build.op("Squeeze", [length, build.ints(0)])
    zero, one = build.constant(0, ir.DataType.INT64), build.constant(1, ir.DataType.INT64)
    positions = build.op("Range", [zero, length, one])
    rows = build.op("Unsqueeze", [positions, build.ints(1)])
    return build.op("LessOrEqual", [positions, rows], ir.DataType.BOOL)


def _added(build: _Build, mask: ir.Value, dtype: ir.DataType, share: int) -> ir.Value:
    """The mask as added to scores: 0 where a token may attend, else the lowest number, r times along the queries."""
    if mask.dtype == ir.DataType.BOOL:
        lowest = float(np.finfo(dtype.numpy()).min) if dtype != ir.DataType.BFLOAT16 else -3.3e38
        mask = build.op("Where", [mask, build.constant(0.0, dtype), build.constant(lowest, dtype)], dtype)
    if share > 1:
        mask = build.op("Concat", [mask] * share, axis=-2)
    return mask


def _float(node: ir.Node, name: str, default: float = 0.0) -> float:
    return node.attributes[name].as_float() if name in node.attributes else default


_LOWERINGS: dict[str, Callable[[_Build, ir.Node], ir.Value]] = {
    "Attention": _attention,
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
    "Swish": _swish,
}
