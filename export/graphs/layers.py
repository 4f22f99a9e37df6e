"""Graphs of single passes, for a CPU that holds each 4-bit weight once.

ONNX Runtime packs the 4-bit weights of a MatMulNBits for each node that reads them, in each session. A traverse reads
each weight in two nodes, traverse_text in two more, and a step in one: five copies. In `layers` each Linear is one
node. A graph of its own for every layer, all in one file: a run computes one pass of one layer, and the back end puts
the passes of a prompt or a step together (trol_edge/bundle/graph_part.py, runtimes/layered.py).
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from trol_edge.bundle.names import IMAGE_ROWS
from trol_edge.errors import ExportError
from trol_edge.export.lower.making import Build, Shared


def only_image_rows(model: ir.Model) -> None:
    """Compute the low-rank terms for image tokens alone, in place; without any, they are not computed.

    The input image_mask becomes image_rows [I], the places of image tokens among those of the run.
    """
    mask = next((value for value in model.graph.inputs if value.name == "image_mask"), None)
    if mask is None:
        return
    rows = ir.Value(name=IMAGE_ROWS, shape=ir.Shape([IMAGE_ROWS]), type=ir.TensorType(ir.DataType.INT64))
    first = model.graph[0]
    axes = Build(model.graph, first, Shared(prefix="image_rows")).ints(0, 2)
    column = _before(model, first, "Unsqueeze", [rows, axes], "image_rows.column", [1, IMAGE_ROWS, 1], rows.dtype)
    zeros = _before(model, first, "Sub", [column, column], "image_rows.zeros", [1, IMAGE_ROWS, 1], rows.dtype)
    places = _before(
        model, first, "Concat", [zeros, column], "image_rows.places", [1, IMAGE_ROWS, 2], rows.dtype, axis=2
    )
    gathered: dict[ir.Value, ir.Value] = {}

    def picked(value: ir.Value, before: ir.Node) -> ir.Value:
        if value not in gathered:
            name = f"{value.name}.image_rows"
            gathered[value] = _before(model, before, "Gather", [value, rows], name, _rows(value), value.dtype, axis=1)
        return gathered[value]

    for masked, _ in list(mask.uses()):
        narrowed = masked.inputs[0].producer() if masked.inputs[0] is not None else None
        (widened,) = (node for node, _ in masked.outputs[0].uses())
        (added,) = (node for node, _ in widened.outputs[0].uses())
        kinds = (narrowed.op_type if narrowed else "", masked.op_type, widened.op_type, added.op_type)
        if narrowed is None or narrowed.inputs[0] is None or kinds != ("MatMul", "Mul", "MatMul", "Add"):
            raise ExportError(f"unexpected use of image_mask by {masked.name}; this is a fault of trol-edge")
        narrowed.replace_input_with(0, picked(narrowed.inputs[0], narrowed))
        widened.replace_input_with(0, narrowed.outputs[0])
        for node in (narrowed, widened):
            node.outputs[0].shape = ir.Shape(_rows(node.outputs[0]))
        (base,) = (value for value in added.inputs if value is not None and value is not widened.outputs[0])
        y, name = added.outputs[0], added.outputs[0].name
        assert name
        sum_ = _before(
            model, added, "Add", [picked(base, added), widened.outputs[0]], f"{name}.rows", _rows(base), base.dtype
        )
        assert y.shape is not None
        whole = _before(model, added, "ScatterND", [base, places, sum_], f"{name}.placed", y.shape.dims, y.dtype)
        y.replace_all_uses_with(whole, replace_graph_outputs=True)
    model.graph.inputs[model.graph.inputs.index(mask)] = rows
    common.RemoveUnusedNodesPass()(model)


def _rows(value: ir.Value) -> list[int | str]:
    assert value.shape is not None
    width = value.shape[2]
    assert isinstance(width, int)
    return [1, IMAGE_ROWS, width]


def _before(
    model: ir.Model,
    node: ir.Node,
    kind: str,
    inputs: list[ir.Value],
    output: str,
    shape: object,
    dtype: ir.DataType | None,
    **attributes: int,
) -> ir.Value:
    """Insert a node before another; returns its output."""
    assert dtype is not None
    made = ir.Value(name=output, shape=ir.Shape(shape), type=ir.TensorType(dtype))  # type: ignore[arg-type]
    model.graph.insert_before(node, ir.node(kind, inputs, attributes, outputs=[made], name=f"node_{output}"))
    return made
