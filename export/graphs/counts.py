"""Counts what a graph does, operator by operator: operations, bytes, and the peak of tensors that are alive together.

The graph is counted as a target gets it, quantized and lowered. For TensorRT it is counted before Attention,
RMSNormalization and the like are written out, because its builder fuses them again. Counts are exact in the dynamic
dimensions (see `trol_edge.bundle.costs`).

- Weights cost the bytes of the type in which they are loaded. DequantizeLinear of a weight, or of a rounded input, is
  part of the product that reads it. Embedding-like reads (Gather, Slice, rotary tables) cost the rows read.
- The cache is written in place. Attention costs all its scores, with the masked half, because kernels compute it, too.
- Reshape and its like cost nothing but are counted as operators, because a runtime has to go through them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection
from typing import Any

import onnx_ir as ir

from trol_edge.bundle.costs import Costs, Operation, Polynomial
from trol_edge.errors import ExportError

SOFTMAX = 4  # operations per score: scaling, exponential, sum, division
ROTARY = 3  # per element: four products and two sums for a pair of elements
NORMS = {"RMSNormalization": 4, "LayerNormalization": 7}  # per element
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
FREE = ("Shape", "Constant", "ConstantOfShape")
MOVES = ("Transpose", "Concat", "Split", "Slice", "Gather", "Expand", "ScatterND", "Where")
CAST = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast")
NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}


def count(model: ir.Model, weights: Collection[str], scores: bool = False) -> Costs:
    """Count a graph; `weights` are the names of its parameters, initializers or inputs.

    scores: whether attention writes its scores to memory, as ONNX Runtime's kernels on a CPU do.
    Raises ExportError for an operator whose output has no known shape.
    """
    return _Walker(model, set(weights), scores).walk()


def bytes_of(weight: ir.Value) -> int:
    """Bytes of a parameter in the type in which the graph reads it."""
    assert weight.shape is not None and weight.dtype is not None
    return int(math.prod(int(d) for d in weight.shape.numpy()) * weight.dtype.itemsize)


def repeat(one: Costs, two: Costs, layers: int) -> Costs:
    """Compute the counts of a model with `layers` layers from those with one and with two; exact, as layers are alike.

    Raises ExportError if the second layer has less than the first.
    """
    first, second = ({_key(o): o for o in costs.operations} for costs in (one, two))
    operations = []
    for key, operation in (first | second).items():
        start, end = (found[key].count if key in found else 0 for found in (first, second))
        if end < start:
            raise ExportError(f"two layers have fewer {operation.kind} operators than one; please report this")
        operations.append(dataclasses.replace(operation, count=start + (layers - 1) * (end - start)))
    return Costs(tuple(operations), two.peak if layers > 1 else one.peak, two.defaults)


def without(whole: Costs, two: Costs, less: Costs, count: int) -> Costs:
    """Take `count` second passes out of a model's counts.

    two, less: the counts of two layers that both have a second pass, and of two of which one has it.
    """
    found, with_it, without_it = ({_key(o): o for o in costs.operations} for costs in (whole, two, less))
    operations = []
    for key, operation in (found | without_it).items():
        start, more, fewer = (side[key].count if key in side else 0 for side in (found, with_it, without_it))
        if left := start - count * (more - fewer):
            operations.append(dataclasses.replace(operation, count=left))
    return Costs(tuple(operations), whole.peak, whole.defaults)


def _key(o: Operation) -> Any:
    polynomials = (tuple(sorted(p.items())) for p in (o.flops, o.activation_bytes, o.cache_bytes))
    return o.kind, o.arithmetic, o.stored, o.weight_bytes, *polynomials


class _Walker:
    """One walk over one graph."""

    def __init__(self, model: ir.Model, weights: set[str], scores: bool) -> None:
        self.graph, self.scores = model.graph, scores
        self.shapes: dict[ir.Value, list[Polynomial]] = {}
        self.types: dict[ir.Value, ir.DataType] = {}
        self.weights = {v for v in (*model.graph.initializers.values(), *model.graph.inputs) if v.name in weights}
        # Values that depend on weights only -> those weights, which give the bytes and the stored type.
        self.constant: dict[ir.Value, tuple[ir.Value, ...]] = {w: (w,) for w in self.weights}
        self.constant |= {v: () for v in model.graph.initializers.values() if v not in self.weights}
        self.root: dict[ir.Value, ir.Value] = {}  # view or restored input -> the value that is really read
        self.cached = {v for v in model.graph.inputs if v.name and v.name.startswith("past_")}
        self.defaults: dict[str, int] = {}
        step = [v for v in model.graph.inputs if v.name == "position_ids" and v.shape is not None and v.shape[1] == 1]
        rows = {v.shape[2] for v in self.cached if v.shape is not None}
        if step and len(rows) == 1:  # a step reads a full cache where nobody says how many rows
            self.defaults["slots"] = int(str(rows.pop()))
        self.found: Counter[Any] = Counter()
        self.operations: dict[Any, Operation] = {}
        self.workspace: dict[ir.Node, Polynomial] = {}

    def walk(self) -> Costs:
        for node in self.graph:
            inputs = [v for v in node.inputs if v is not None]
            if all(v in self.constant for v in inputs) and node.op_type in (*CAST, *VIEWS, "Transpose", "Slice", "Mul"):
                self.constant[node.outputs[0]] = tuple(w for v in inputs for w in self.constant[v])
                self._infer(node)
                continue
            self._infer(node)
            operation = self._cost(node)
            key = _key(operation)
            self.found[key] += 1
            self.operations[key] = operation
        counted = tuple(dataclasses.replace(o, count=self.found[k]) for k, o in self.operations.items())
        return Costs(counted, self._peak(), self.defaults)

    # -- what one operator costs -------------------------------------------------------------------------------

    def _cost(self, node: ir.Node) -> Operation:
        op, inputs, out = node.op_type, [v for v in node.inputs if v is not None], node.outputs[0]
        if op in VIEWS:
            self._view(out, inputs[0])
        if op in (*VIEWS, *FREE) or (op == "DequantizeLinear" and self._producer(inputs[0]) == "QuantizeLinear"):
            if op == "DequantizeLinear":  # counted with the product that reads it
                self._view(out, inputs[0])
            return self._operation("move", node, {}, [], [])
        if op in ("MatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"):
            x, depth = inputs[0], self._shape(inputs[0])[-1]
            flops = _times(_product(self._shape(out)), _times(depth, {"1": 2}))
            return self._operation("linear", node, flops, [x, *inputs[1:]], [out], self._arithmetic(op, x))
        if op == "Conv":
            per_output = _times(_product(self._shape(inputs[1])[1:]), {"1": 2})
            return self._operation("convolution", node, _times(_product(self._shape(out)), per_output), inputs, [out])
        if op == "Attention":
            return self._attention(node, inputs)
        if op == "GroupQueryAttention":
            return self._grouped_attention(node)
        if op == "RotaryEmbedding":
            x, cos = inputs[:2]
            read = _times(self._rows(x, cos), {"1": 2 * self._bytes_of(cos)})
            flops = _times(_product(self._shape(x)), {"1": ROTARY})
            return self._operation("pointwise", node, flops, [x], [out], more=read)
        if op in NORMS:
            flops = _times(_product(self._shape(inputs[0])), {"1": NORMS[op]})
            return self._operation("norm", node, flops, inputs, [out])
        if op == "ScatterND" and self._cached(inputs[0]):
            self.cached.add(out)
            written = self._size(inputs[2])
            return self._operation("move", node, {}, inputs[1:], [], cache=written)
        if op == "Slice" and self._cached(inputs[0]):  # a view of the rows that attention reads
            self.cached.add(out)
            return self._operation("move", node, {}, [], [])
        if op == "Where" and any(map(self._cached, inputs)):  # a view, too, with the new rows in their place
            self.cached.add(out)
            return self._operation("move", node, {}, [], [])
        if op in ("Slice", "Gather", "Split", "Expand"):  # reads as much as it writes
            made = _sum(self._size(o) for o in node.outputs)
            return self._operation("move", node, {}, [], node.outputs, more=made if op != "Expand" else {})
        if op in MOVES:
            return self._operation("move", node, {}, inputs, node.outputs)
        read = _product(self._shape(inputs[0])) if op.startswith("Reduce") else _product(self._shape(out))
        return self._operation("pointwise", node, read, inputs, node.outputs)

    def _attention(self, node: ir.Node, inputs: list[ir.Value]) -> Operation:
        """q [B, H, S, E], k and v [B, G, T, E], mask."""
        query, keys, values, *mask = inputs
        batch, heads, length, size = self._shape(query)
        pairs = _product([batch, heads, length, self._shape(keys)[2]])
        flops = _times(pairs, _plus(_times(size, {"1": 4}), {"1": SOFTMAX}))
        read = [keys, values]
        cache = _sum(self._size(v) for v in read if self._cached(v))
        tensors = [query, *(v for v in read if not self._cached(v)), *mask]
        more = self._score_bytes(node, pairs, pairs, node.outputs[0])
        return self._operation("attention", node, flops, tensors, [node.outputs[0]], cache=cache, more=more)

    def _grouped_attention(self, node: ir.Node) -> Operation:
        """qkv [1, S, (H+2G)*E], caches [1, G, C, E]; rotary embedding and writing the cache are included."""
        qkv, past, cos = node.inputs[0], node.inputs[3], node.inputs[7]
        assert qkv is not None and past is not None and cos is not None
        heads = {"1": node.attributes["num_heads"].as_int()}
        length = self._shape(qkv)[1]
        _, groups, capacity, size = self._shape(past)
        if not any(v.name == "slots" for v in self.graph.inputs):
            self.defaults["slots"] = capacity["1"]
        pairs = _product([heads, length, {"slots": 1}])
        rotated = _product([_plus(heads, groups), length, size])
        flops = _plus(_times(pairs, _plus(_times(size, {"1": 4}), {"1": SOFTMAX})), _times(rotated, {"1": ROTARY}))
        row = _product([groups, size, {"1": 2 * self._bytes_of(past)}])  # a row of keys and one of values
        cache = _times(row, _plus(length, {"slots": 1}))
        self.cached |= set(node.outputs[1:])
        more = _plus(
            _product([length, size, {"1": self._bytes_of(cos)}]),  # E/2 of cos, E/2 of sin
            self._score_bytes(node, pairs, _product([heads, length, capacity]), node.outputs[0]),
        )
        return self._operation("attention", node, flops, [qkv], node.outputs[:1], cache=cache, more=more)

    def _score_bytes(self, node: ir.Node, pairs: Polynomial, kept: Polynomial, like: ir.Value) -> Polynomial:
        """Bytes of scores, which are written, read and written again by the softmax, and read; `kept` are in memory."""
        if not self.scores:
            return {}
        self.workspace[node] = _times(kept, {"1": self._bytes_of(like)})
        return _times(pairs, {"1": 4 * self._bytes_of(like)})

    def _arithmetic(self, op: str, x: ir.Value) -> str:
        if op != "MatMul":
            return "int8"
        return NAMES.get(self._type(self._root(x)), "float32")

    def _operation(
        self,
        kind: str,
        node: ir.Node,
        flops: Polynomial,
        read: list[ir.Value],
        written: Any,
        arithmetic: str | None = None,
        cache: Polynomial | None = None,
        more: Polynomial | None = None,
    ) -> Operation:
        weights = list(dict.fromkeys(w for v in read if v in self.constant for w in self.constant[v]))
        weight_bytes = sum(_whole(self._size(w)) for w in weights)
        stored = [NAMES.get(self._type(w)) for w in weights if len(self._shape(w)) > 1]
        if node.op_type == "MatMulNBits":
            stored = ["int4"]
        activations = [self._size(self._root(v)) for v in read if v not in self.constant]
        activations += [self._size(v) for v in written]
        outputs = [v for v in node.outputs if v is not None]
        return Operation(
            kind=kind,
            arithmetic=arithmetic or NAMES.get(self._type(outputs[0]), "float32"),
            stored=stored[0] if stored and kind in ("linear", "convolution") else None,
            count=1,
            flops=flops,
            weight_bytes=weight_bytes,
            activation_bytes=_plus(_sum(activations), more or {}),
            cache_bytes=cache or {},
        )

    # -- values ------------------------------------------------------------------------------------------------

    def _view(self, out: ir.Value, of: ir.Value) -> None:
        self.root[out] = self._root(of)
        if self._cached(of):
            self.cached.add(out)

    def _root(self, value: ir.Value) -> ir.Value:
        return self.root.get(value, value)

    def _cached(self, value: ir.Value) -> bool:
        return value in self.cached

    def _producer(self, value: ir.Value) -> str:
        producer = value.producer()
        return "" if producer is None else producer.op_type

    def _rows(self, x: ir.Value, table: ir.Value) -> Polynomial:
        """Numbers of a rotary table that x [B, heads, S, E] looks up."""
        return _times(self._shape(x)[2], self._shape(table)[1])

    def _size(self, value: ir.Value) -> Polynomial:
        """Bytes of a tensor."""
        numbers, bits = _product(self._shape(value)), round(8 * self._type(value).itemsize)
        return {term: n * bits // 8 for term, n in numbers.items()}

    def _bytes_of(self, value: ir.Value) -> int:
        return round(self._type(value).itemsize)

    def _shape(self, value: ir.Value) -> list[Polynomial]:
        if value in self.shapes:
            return self.shapes[value]
        shape = value.const_value.shape if value.const_value is not None else value.shape
        if shape is None:
            raise ExportError(f"{value.name}: its shape is not known; this is a fault of trol-edge, please report it")
        return [{"1": d} if isinstance(d, int) else {str(d.value): 1} for d in shape.dims]

    def _type(self, value: ir.Value) -> ir.DataType:
        found = self.types.get(value, value.dtype)
        if found is None:
            raise ExportError(f"{value.name}: its type is not known; this is a fault of trol-edge, please report it")
        return found

    def _infer(self, node: ir.Node) -> None:
        """Fill in shapes and types that a lowering left out."""
        inputs = [v for v in node.inputs if v is not None]
        for i, out in enumerate(node.outputs):
            if out.dtype is None:
                self.types[out] = self._inferred_type(node, inputs, i)
            if out.shape is None:
                self.shapes[out] = self._inferred_shape(node, inputs, i)

    def _inferred_type(self, node: ir.Node, inputs: list[ir.Value], index: int) -> ir.DataType:
        op = node.op_type
        if op == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        if op == "Shape":
            return ir.DataType.INT64
        if op == "MatMulInteger":
            return ir.DataType.INT32
        if op == "DynamicQuantizeLinear":
            return ir.DataType.FLOAT if index == 1 else ir.DataType.UINT8
        if op == "QuantizeLinear":
            return self._type(inputs[2])
        return self._type(inputs[0])

    def _inferred_shape(self, node: ir.Node, inputs: list[ir.Value], index: int) -> list[Polynomial]:
        op = node.op_type
        if op == "Shape":
            return [{"1": len(self._shape(inputs[0]))}]
        if op.startswith("MatMul"):
            return [*self._shape(inputs[0])[:-1], self._shape(inputs[1])[-1]]
        if op.startswith("Reduce"):  # of the last axis
            return [*self._shape(inputs[0])[:-1], {"1": 1}]
        if op == "DynamicQuantizeLinear" and index:
            return []
        if op == "Reshape":  # to one axis
            return [_product(self._shape(inputs[0]))]
        if op == "Expand":  # to the shape that Shape read
            counted = inputs[1].producer()
            assert counted is not None and counted.inputs[0] is not None
            return self._shape(counted.inputs[0])
        if op == "Slice":  # by a number that no shape shows, so the whole is the upper bound
            return self._shape(inputs[0])
        if op in CAST:
            return self._shape(inputs[0])
        widest = max((self._shape(v) for v in inputs), key=len)
        shapes = [[{"1": 1}] * (len(widest) - len(s)) + s for s in map(self._shape, inputs)]
        return [next((d for d in dims if d != {"1": 1}), {"1": 1}) for dims in zip(*shapes, strict=True)]

    # -- memory ------------------------------------------------------------------------------------------------

    def _peak(self) -> tuple[Polynomial, ...]:
        """Bytes alive at each operator, without those that can never be the peak."""
        nodes = list(self.graph)
        outside = {self._root(v) for v in (*self.graph.inputs, *self.graph.outputs)}
        last = {self._root(v): i for i, node in enumerate(nodes) for v in node.inputs if v is not None}
        alive: Polynomial = {}
        peaks: list[Polynomial] = []
        for i, node in enumerate(nodes):
            for out in node.outputs:
                root = self._root(out)
                if root is out and out not in outside and out not in self.constant and not self._cached(out):
                    alive = _plus(alive, self._size(out))
            now = _plus(alive, self.workspace.get(node, {}))
            if not any(_covers(peak, now) for peak in peaks):
                peaks = [peak for peak in peaks if not _covers(now, peak)] + [now]
            for root in {self._root(v) for v in (*node.inputs, *node.outputs) if v is not None}:
                made = root.producer() is not None and root not in outside
                if made and last.get(root, i) == i and root not in self.constant and not self._cached(root):
                    alive = _plus(alive, {term: -n for term, n in self._size(root).items()})
        if any(alive.values()):
            raise ExportError("tensors are left alive after the graph; this is a fault of trol-edge, please report it")
        return tuple(peaks)


# -- polynomials ---------------------------------------------------------------------------------------------------


def _plus(a: Polynomial, b: Polynomial) -> Polynomial:
    return {term: n for term in a | b if (n := a.get(term, 0) + b.get(term, 0))}


def _sum(polynomials: Any) -> Polynomial:
    total: Polynomial = {}
    for polynomial in polynomials:
        total = _plus(total, polynomial)
    return total


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for x, m in a.items():
        for y, n in b.items():
            names = sorted(name for term in (x, y) for name in term.split("*") if name != "1")
            product = _plus(product, {"*".join(names) or "1": m * n})
    return product


def _product(factors: Any) -> Polynomial:
    product: Polynomial = {"1": 1}
    for factor in factors:
        product = _times(product, factor)
    return product


def _whole(polynomial: Polynomial) -> int:
    """The number that a polynomial without variables is."""
    return polynomial.get("1", 0)


def _covers(a: Polynomial, b: Polynomial) -> bool:
    """Whether a is at least b wherever every variable is at least one (sufficient, not necessary)."""
    more = _plus(a, {term: -n for term, n in b.items()})
    return sum(more.values()) >= 0 and all(n >= 0 for term, n in more.items() if term != "1")
