"""Adds operators to a graph: each new value gets a name and a type, and equal constants are in the graph once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


@dataclasses.dataclass
class Shared:
    """What the new nodes of one graph share: values by their meaning, and how many were made."""

    values: dict[Any, ir.Value] = dataclasses.field(default_factory=dict)
    made: int = 0
    prefix: str = "lowered"  # begins the names of new values


class Build:
    """Makes nodes before `anchor`. Values that do not depend on the layer are made once, at the head of the graph."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node, shared: Shared) -> None:
        self.graph, self.anchor, self.shared = graph, anchor, shared

    def op(
        self, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Add one node; its output has `dtype`, or that of its first input."""
        node = ir.node(op, inputs, attributes=attributes)
        self.graph.insert_before(self.anchor, node)
        return self._named(node.outputs[0], dtype or (inputs[0].dtype if inputs[0] is not None else None))

    def parts(self, op: str, inputs: Sequence[ir.Value | None], count: int, **attributes: Any) -> list[ir.Value]:
        """Add one node with `count` outputs of its first input's type."""
        node = ir.node(op, inputs, attributes=attributes, num_outputs=count)
        self.graph.insert_before(self.anchor, node)
        dtype = inputs[0].dtype if inputs[0] is not None else None
        return [self._named(value, dtype) for value in node.outputs]

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
