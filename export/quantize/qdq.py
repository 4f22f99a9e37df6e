"""The graph pass that makes quantization explicit, by QuantizeLinear and DequantizeLinear around planned Linears.

    before   MatMul(x, W)
    after    MatMul(DequantizeLinear(QuantizeLinear(x, <point>.input_scale)), DequantizeLinear(W, W.scale))

The result is standard ONNX, opset 23. TensorRT takes it as it is, and export/lower/ort.py rewrites it for a CPU.
- W [K, N] keeps its name and becomes INT8, INT4 or FLOAT8E4M3FN; `W.scale` is [N] (axis 1), or [K/block, N] (axis 0,
  block_size). Each use has its own DequantizeLinear, because fusions need a single reader; the initializer is shared.
- Each distinct input has one pair, which is shared by q, k and v, by gate and up, by a weight and its low-rank part.
- Linears of which only weights are rounded ("int4", or 8 bits without activations) have no pair on their input.
Existing nodes and values keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from trol_edge.bundle.precision import QUANTIZED, PrecisionPlan
from trol_edge.errors import ExportError
from trol_edge.export.quantize.recipes import point_of

STORED = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}


def scale_name(parameter: str) -> str:
    """Name of the initializer with the scales of a quantized Linear weight."""
    return f"{parameter}.scale"


def insert(model: ir.Model, plan: PrecisionPlan, input_scales: Mapping[str, float]) -> bool:
    """Quantize in place every Linear of the graph that the plan quantizes; returns whether there was any.

    Weights must be initializers [K, N] without values (see `graphs.fold_transposes`); input_scales has the scale of
    each Linear whose input is rounded. Raises ExportError if the graph is not as expected, before or after.
    """
    uses = _uses(model, plan)
    inputs: dict[tuple[ir.Value, str], ir.Value] = {}
    for name, nodes in uses.items():
        linear = plan.linears[name]
        weight = model.graph.initializers[name]
        assert weight.shape is not None
        weight.type = ir.TensorType(STORED[linear.precision])
        scale = ir.Value(name=scale_name(name), type=ir.TensorType(ir.DataType.FLOAT))
        k, n = weight.shape.numpy()
        scale.shape = ir.Shape((k // linear.block, n) if linear.block else (n,))
        model.graph.initializers.add(scale)
        where = {"axis": 0, "block_size": linear.block} if linear.block else {"axis": 1}
        for i, node in enumerate(nodes):
            suffix = "dequantized" if i == 0 else f"dequantized_{i}"
            restored = _node("DequantizeLinear", [weight, scale], f"{name}.{suffix}", where, weight.shape)
            model.graph.insert_before(node, restored)
            node.replace_input_with(1, restored.outputs[0])
    # In graph order, so that the pair comes before the first reader and has its name.
    readers = {id(node): name for name, nodes in uses.items() for node in nodes}
    for node in list(model.graph):
        name = readers.get(id(node), "")
        if not name or not plan.linears[name].activations:
            continue
        linear, x = plan.linears[name], node.inputs[0]
        assert x is not None
        if (x, linear.precision) not in inputs:
            inputs[x, linear.precision] = _rounded(model, node, x, point_of(name), input_scales[name], linear.precision)
        node.replace_input_with(0, inputs[x, linear.precision])
    _check(model, plan, uses)
    return bool(uses)


def separate_readers(model: ir.Model) -> bool:
    """Let Linears that are in the graph twice read a common input in different shapes; returns whether any did.

    TensorRT for RTX 1.7 merges products of one input (gate and up) into one, with a copy of their weights for each of
    the two passes of a traversal. That takes twice the memory and four times the time of a build, and with int4 it
    fails ("vector::_M_range_check"). In different shapes, [1, S, K], [S, K], [1, 1, S, K], they are not merged.
    """
    changed = False
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        weight = _stored_weight(node)
        if weight is not None and len(list(weight.uses())) > 1:
            assert node.inputs[0] is not None
            readers.setdefault(node.inputs[0], []).append(node)
    for x, nodes in readers.items():
        for index, node in enumerate(nodes[1:]):
            _reshape_around(model, node, x, index)
            changed = True
    return changed


def _reshape_around(model: ir.Model, node: ir.Node, x: ir.Value, added: int) -> None:
    """Let a MatMul read x [1, S, K] as [S, K] (added: 0), or with `added` more leading dimensions."""
    y = node.outputs[0]
    assert x.shape is not None and y.shape is not None and x.shape[0] == 1 and x.dtype is not None
    name, uses, axes = y.name, list(y.uses()), _axes(model, max(added, 1))
    there, back = ("Unsqueeze", "Squeeze") if added else ("Squeeze", "Unsqueeze")

    def reshaped(shape: ir.Shape) -> ir.Shape:
        return ir.Shape((1,) * added + tuple(shape.dims)) if added else ir.Shape(shape.dims[1:])

    restore, rounding = x.producer(), None
    if restore is not None and restore.op_type == "DequantizeLinear":
        rounding = restore.inputs[0].producer() if restore.inputs[0] is not None else None
    source = x if rounding is None else rounding.inputs[0]
    assert source is not None and source.shape is not None and source.dtype is not None
    # Reshape before the pair that rounds the input, so that the pair stays next to the product.
    new = [_node(there, [source, axes], f"{name}.input", {}, reshaped(source.shape), source.dtype)]
    if rounding is not None and restore is not None:
        for i, old in enumerate((rounding, restore)):
            out = old.outputs[0]
            assert out.dtype is not None
            inputs = [new[-1].outputs[0], *(v for v in old.inputs[1:] if v is not None)]
            new.append(_node(old.op_type, inputs, f"{name}.input.rounded_{i}", {}, new[0].outputs[0].shape, out.dtype))
    node.replace_input_with(0, new[-1].outputs[0])
    y.name = f"{name}.reshaped"
    result = _node(back, [y, axes], str(name), {}, y.shape, x.dtype)
    result.name = f"node_{name}.back"  # the product keeps its own name
    y.shape = reshaped(y.shape)
    for user, index in uses:
        user.replace_input_with(index, result.outputs[0])
    model.graph.insert_before(node, new)
    model.graph.insert_after(node, result)


def _axes(model: ir.Model, count: int) -> ir.Value:
    """An initializer that lists the first `count` axes."""
    name = f"axes.{count}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.arange(count, dtype=np.int64), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape((count,)), const_value=tensor)
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def _stored_weight(node: ir.Node) -> ir.Value | None:
    """The initializer that a MatMul multiplies by, quantized or not; None if there is none."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    producer = node.inputs[1].producer()
    if producer is None:
        return node.inputs[1] if node.inputs[1].is_initializer() else None
    return producer.inputs[0] if producer.op_type == "DequantizeLinear" else None


def _rounded(model: ir.Model, before: ir.Node, x: ir.Value, point: str, scale: float, precision: str) -> ir.Value:
    if not (np.isfinite(scale) and scale > 0):
        raise ExportError(f"{point}: input scale {scale}; this is a fault of trol-edge, please report it")
    dtype = STORED[precision]
    constants = []
    for name, tensor in (
        (f"{point}.input_scale", ir.tensor(np.array(scale, np.float32))),
        (f"zero.{precision}", ir.tensor(np.array(0, dtype.numpy()), dtype=dtype)),
    ):
        if name not in model.graph.initializers:
            tensor.name = name
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(()), const_value=tensor)
            model.graph.register_initializer(value)
        constants.append(model.graph.initializers[name])
    quantize = _node("QuantizeLinear", [x, *constants], f"{x.name}.{precision}", {}, x.shape, dtype)
    restore = _node(
        "DequantizeLinear", [quantize.outputs[0], *constants], f"{x.name}.{precision}.restored", {}, x.shape
    )
    model.graph.insert_before(before, [quantize, restore])
    return restore.outputs[0]


def _node(
    op: str,
    inputs: list[ir.Value],
    output: str,
    attributes: Mapping[str, int],
    shape: ir.Shape | None,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Node:
    node = ir.node(op, inputs, attributes=dict(attributes), name=f"node_{output}")
    node.outputs[0].name = output
    node.outputs[0].shape, node.outputs[0].type = shape, ir.TensorType(dtype)
    return node


def _uses(model: ir.Model, plan: PrecisionPlan) -> dict[str, list[ir.Node]]:
    """The MatMuls of every quantized Linear in this graph, in graph order."""
    order = {id(node): i for i, node in enumerate(model.graph)}
    found: dict[str, list[ir.Node]] = {}
    for name, value in model.graph.initializers.items():
        linear = plan.linears.get(name)
        if linear is None or linear.precision not in QUANTIZED:
            continue
        uses = [(node, index) for node, index in value.uses()]
        if any(node.op_type != "MatMul" or index != 1 for node, index in uses) or value.const_value is not None:
            readers = ", ".join(sorted({node.op_type for node, _ in uses}))
            raise ExportError(f"{name} is read by {readers}, not by MatMul alone; please report this")
        found[name] = sorted((node for node, _ in uses), key=lambda node: order[id(node)])
    return found


def _check(model: ir.Model, plan: PrecisionPlan, uses: Mapping[str, list[ir.Node]]) -> None:
    """Check that every planned use is quantized once, and that nothing is left over."""
    problems = []
    for name, nodes in uses.items():
        linear = plan.linears[name]
        weight = model.graph.initializers[name]
        if [node.op_type for node, _ in weight.uses()] != ["DequantizeLinear"] * len(nodes):
            problems.append(f"{name} is not dequantized once per use")
        for node in nodes:
            x, w = (value.producer() if value is not None else None for value in node.inputs)
            if w is None or w.op_type != "DequantizeLinear" or w.inputs[0] is not weight:
                problems.append(f"{node.name} does not read the dequantized {name}")
            source = (
                x.inputs[0].producer() if x is not None and x.op_type == "DequantizeLinear" and x.inputs[0] else None
            )
            pairs = 1 if source is not None and source.op_type == "QuantizeLinear" else 0
            if pairs != int(linear.activations):
                problems.append(f"{node.name} has {pairs} pairs on its input")
            if source is not None and source.inputs[0] is not None:
                behind = source.inputs[0].producer()
                if behind is not None and behind.op_type == "DequantizeLinear":
                    problems.append(f"{node.name} reads a value that was rounded twice")
    problems += [f"{name} is read by nothing" for name, v in model.graph.initializers.items() if not list(v.uses())]
    if problems:
        raise ExportError(f"quantization went wrong: {'; '.join(problems)}; please report this")
