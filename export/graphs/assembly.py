"""Puts a graph together from pieces, each of which is traced once and computed many times."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

_LAYER = ".layers.{}."  # in the names of a layer's weights; in a piece it is number 0


class _Reads(enum.IntEnum):
    """What a value of a piece is computed from; each may read what those before it do."""

    SHARED = 0  # constants, weights that belong to no layer, inputs that all pieces have in common
    LAYER = 1  # a layer's weights
    GIVEN = 2  # inputs that differ from use to use


class Piece:
    """A part of a traced graph with at most one layer, and what each of its values is computed from.

    It computes `outputs` from `given`, which differ from use to use. The other inputs that it reads are inputs of the
    whole graph, of the same name. trace and name begin the names of its values.
    """

    def __init__(
        self, trace: str, name: str, graph: ir.Graph, given: Sequence[ir.Value], outputs: Sequence[ir.Value]
    ) -> None:
        self.trace, self.name, self.given, self.outputs = trace, name, given, outputs
        needed, stack = set(given), list(outputs)
        while stack:
            value = stack.pop()
            if value not in needed:
                needed.add(value)
                producer = value.producer()
                stack += [v for v in producer.inputs if v is not None] if producer else []
        self.nodes = [node for node in graph if needed.intersection(node.outputs).difference(given)]
        self.inputs = [value for value in graph.inputs if value in needed and value not in given]
        self.weights = {name: value for name, value in graph.initializers.items() if value in needed}
        self.reads = dict.fromkeys(given, _Reads.GIVEN) | dict.fromkeys(self.inputs, _Reads.SHARED)
        for name, value in self.weights.items():
            self.reads[value] = _Reads.LAYER if _LAYER.format(0) in name else _Reads.SHARED
        for node in self.nodes:
            level = max((self.reads[v] for v in node.inputs if v is not None), default=_Reads.SHARED)
            self.reads |= dict.fromkeys(node.outputs, level)


class Assembly:
    """A graph that grows by pieces. `inputs` has its inputs by name; weights come with the pieces that read them."""

    def __init__(self) -> None:
        self.inputs: dict[str, ir.Value] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._made: dict[str, ir.Value] = {}

    def input(self, like: ir.Value, name: str) -> ir.Value:
        """Add an input with the type and shape of a value."""
        return self.inputs.setdefault(name, _like(like, name))

    def inputs_for(self, piece: Piece, *names: str) -> list[ir.Value]:
        """Add an input for each value that a piece is given."""
        return [self.input(value, name) for value, name in zip(piece.given, names, strict=True)]

    def add(self, piece: Piece, given: Iterable[ir.Value], layer: int | None = None, use: str = "") -> list[ir.Value]:
        """Compute a piece; returns its outputs.

        given: values for the inputs `piece.given`. layer: whose weights it reads. use: tells this use in a layer
        from others, in names. What does not depend on `given` is computed once, or once per layer.
        """
        of_layer = "" if layer is None else f"layers.{layer}."
        start = {
            _Reads.SHARED: f"{piece.trace}.",
            _Reads.LAYER: f"{of_layer}{piece.trace}.",
            _Reads.GIVEN: f"{of_layer}{use or piece.name}.",
        }
        here = {value: self.inputs[value.name or ""] for value in piece.inputs}
        here |= zip(piece.given, given, strict=True)
        for name, value in piece.weights.items():
            whole = start[_Reads.SHARED] + name if value.const_value is not None else name
            if piece.reads[value] == _Reads.LAYER:
                whole = name.replace(_LAYER.format(0), _LAYER.format(layer))
            if whole not in self._initializers:
                self._initializers[whole] = _like(value, whole)
            here[value] = self._initializers[whole]
        for node in piece.nodes:
            prefix = start[piece.reads[node.outputs[0]]]
            names = [f"{prefix}{value.name}" for value in node.outputs]
            if names[0] not in self._made:
                outputs = [_like(value, name) for value, name in zip(node.outputs, names, strict=True)]
                inputs = [None if value is None else here[value] for value in node.inputs]
                copy = ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    node.attributes.values(),
                    outputs=outputs,
                    name=f"{prefix}{node.name}",
                )
                self._nodes.append(copy)
                self._made |= zip(names, outputs, strict=True)
            here |= {value: self._made[name] for value, name in zip(node.outputs, names, strict=True)}
        return [here[value] for value in piece.outputs]

    def graph(self, outputs: Mapping[str, ir.Value], opset: int) -> ir.Graph:
        """The graph with these outputs, which get the names that they have here."""
        for name, value in outputs.items():
            value.name = name
        return ir.Graph(
            list(self.inputs.values()),
            list(outputs.values()),
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": opset},
            name="main_graph",
        )


def _like(value: ir.Value, name: str) -> ir.Value:
    shape = None if value.shape is None else value.shape.copy()
    return ir.Value(name=name, shape=shape, type=value.type, const_value=value.const_value)
