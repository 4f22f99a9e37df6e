"""Makes FP16 graphs that do not overflow: values that calibration saw grow too large stay FP32, with casts between.

FP16 ends at 65504. These can exceed it: the residual stream (a few channels of large models do), its square inside a
norm, attention scores, and the product silu(gate) * up. Norms always compute in FP32. The rest does if the statistics
say so, with a margin, because they saw a few samples only. Names in `Plan.kept_fp32`:

    decoder.residual, vision.residual   the whole stream, with the gate that reads it
    decoder.layers.3.scores             attention of that layer
    decoder.layers.3.mlp.down           that Linear, what makes its input, and what its output flows into
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from trol_edge.errors import ExportError
from trol_edge.export.quantize.recipes import point_of

if TYPE_CHECKING:
    from trol_edge.export.quantize.stats import Statistics

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
FLOATS = (HALF, FLOAT, ir.DataType.BFLOAT16)
LARGEST = 65504.0
MARGIN = 4.0  # values may exceed the largest that calibration saw by this factor
NORMS = ("RMSNormalization", "LayerNormalization")
BORDERS = ("MatMul", "Conv", "QuantizeLinear", "DequantizeLinear", *NORMS)


def find_overflows(statistics: Statistics) -> tuple[str, ...]:
    """Find what has to stay in FP32, by the names above."""
    limit = LARGEST / MARGIN
    kept = set()
    for name in statistics.points:
        point = statistics.points[name]
        if max(float(point.absmax.max(initial=0)), point.output_absmax) > limit:
            kept.add(name.removesuffix(".lora_b"))
    for name, peak in statistics.peaks.items():
        if peak > limit:
            kept.add(f"{name.split('.')[0]}.residual" if name.endswith(".residual") else name)
    return tuple(sorted(kept))


def convert(model: ir.Model, kept: Collection[str], stored: Mapping[str, ir.DataType]) -> None:
    """Turn a float32 graph (quantized or not) into an FP16 one, in place.

    kept: names of what stays in FP32. stored: dtype of every parameter in the weights file. Pictures, embeddings,
    masks, features and logits stay float32 as inputs and outputs; a KV cache is float16 if its attention is.
    Raises ExportError if a node would get two types.
    """
    graph = model.graph
    wide = _wide_nodes(model, kept)
    for name, value in graph.initializers.items():
        if value.const_value is None and value.dtype in FLOATS:
            value.type = ir.TensorType(stored[name])
    for value in graph.inputs:
        users = [node for node, _ in value.uses()]
        if value.name and value.name.startswith("past_") and not any(id(node) in wide for node in users):
            value.type = ir.TensorType(HALF)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def as_type(value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in casts:
            name = f"{value.name}.{'float16' if dtype == HALF else 'float32'}"
            if value.const_value is not None:
                array = value.const_value.numpy().astype(np.float16 if dtype == HALF else np.float32)
                tensor = ir.tensor(array, name=name)
                cast = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape, const_value=tensor)
                graph.register_initializer(cast)
            else:
                node = ir.node("Cast", [value], attributes={"to": dtype}, name=f"node_{name}")
                cast = node.outputs[0]
                cast.name, cast.shape, cast.type = name, value.shape, ir.TensorType(dtype)
                graph.insert_before(before, node)
            casts[value, dtype] = cast
        return casts[value, dtype]

    for node in list(graph):
        dtype = FLOAT if id(node) in wide else HALF
        for i, read in enumerate(node.inputs):
            if read is not None and read.dtype in FLOATS:
                node.replace_input_with(i, as_type(read, dtype, node))
        for output in node.outputs:
            if output.dtype in FLOATS:
                output.type = ir.TensorType(dtype)
    for i, value in enumerate(graph.outputs):
        name = value.name or ""
        if value.dtype == HALF and not name.startswith("present_"):
            value.name = f"{name}.float16"
            node = ir.node("Cast", [value], attributes={"to": FLOAT}, name=f"node_{name}.float32")
            node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(FLOAT)
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
    for unused in [name for name, value in graph.initializers.items() if not list(value.uses())]:
        del graph.initializers[unused]
    _check(model)


def _check(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Cast":
            continue
        types = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None and value.dtype in FLOATS}
        if len(types) > 1:
            raise ExportError(f"{node.name} ({node.op_type}) mixes {', '.join(map(str, types))}; please report this")


def _wide_nodes(model: ir.Model, kept: Collection[str]) -> set[int]:
    """Ids of the nodes that compute in FP32."""
    nodes = list(model.graph)
    points = {id(node): point for node in nodes if (point := _point(node)) is not None}
    wide: set[int] = set()
    for node in nodes:
        point = points.get(id(node), "")
        if node.op_type in NORMS:
            wide.add(id(node))
            part = (node.inputs[1].name or "").split(".")[0] if len(node.inputs) > 1 and node.inputs[1] else ""
            if f"{part}.residual" in kept and node.inputs[0] is not None:
                wide |= _upstream(node.inputs[0], stop=BORDERS)
        elif point == "decoder.gate" and ("decoder.residual" in kept or point in kept):
            wide.add(id(node))
        elif point.removesuffix(".lora_b") in kept and node.inputs[0] is not None:
            wide.add(id(node))
            wide |= _downstream(node.outputs, stop=BORDERS) | _rounding(node)
            if not point.endswith(".lora_b"):
                wide |= _upstream(_unrounded(node.inputs[0]), stop=BORDERS)
        elif node.op_type == "Attention":
            reader = next((points[i] for i in _downstream(node.outputs, stop=(), until=points) if i in points), "")
            if f"{reader.removesuffix('.out')}.scores" in kept:
                wide.add(id(node))
    return wide


def _point(node: ir.Node) -> str | None:
    """The point of a Linear's MatMul, quantized or not; for a low-rank part "a.lora_b" or the point of its weight."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    weight = node.inputs[1]
    producer = weight.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        weight = producer.inputs[0]
    return point_of(weight.name) if weight.name and weight.is_initializer() else None


def _rounding(node: ir.Node) -> set[int]:
    """Ids of the Q/DQ pair on a Linear's input, which computes in the type of what it rounds."""
    found: set[int] = set()
    value = node.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            break
        found.add(id(producer))
        value = producer.inputs[0]
    return found


def _unrounded(value: ir.Value) -> ir.Value:
    """The value that a Q/DQ pair rounds, or the value itself if there is no pair."""
    producer = value.producer()
    while producer is not None and producer.op_type in ("QuantizeLinear", "DequantizeLinear"):
        assert producer.inputs[0] is not None
        value = producer.inputs[0]
        producer = value.producer()
    return value


def _upstream(value: ir.Value, stop: Collection[str]) -> set[int]:
    """Ids of the nodes that make a value, up to Linears, norms and inputs (which are not included)."""
    return _walk([value.producer()], stop, lambda node: [v.producer() for v in node.inputs if v is not None])


def _downstream(values: Iterable[ir.Value], stop: Collection[str], until: Collection[int] = ()) -> set[int]:
    """Ids of the nodes that values flow into, up to Linears and norms (not included) or `until` (included)."""

    def after(node: ir.Node) -> list[ir.Node | None]:
        return [] if id(node) in until else [user for output in node.outputs for user, _ in output.uses()]

    return _walk([user for value in values for user, _ in value.uses()], stop, after)


def _walk(
    start: Iterable[ir.Node | None], stop: Collection[str], follow: Callable[[ir.Node], Iterable[ir.Node | None]]
) -> set[int]:
    found: set[int] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node is not None and id(node) not in found and node.op_type not in stop:
            found.add(id(node))
            todo += follow(node)
    return found
