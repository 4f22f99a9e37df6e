"""Graphs that make tensors of any size out of operators that export writes. Each is sound where its size is small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"


class Builder:
    """Adds nodes behind a step or a traverse, whose inputs are here."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        ports = {value.name: value for value in graph.inputs}
        self.x, self.past, self.positions = ports["inputs_embeds"], ports["past_key_0"], ports["position_ids"]

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """A node; returns its first output."""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs)
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, array: Any) -> ir.Value:
        """A constant."""
        return self.op("Constant", value=ir.tensor(np.asarray(array)))

    def ints(self, *numbers: int) -> ir.Value:
        """A constant [n] int64."""
        return self.constant(np.array(numbers, np.int64))

    def column(self) -> ir.Value:
        """The embeddings [D, 1] of the last token."""
        last = self.op("Slice", self.x, self.ints(-1), self.ints(np.iinfo(np.int64).max), self.ints(1))
        return self.op("Reshape", last, self.ints(-1, 1))

    def finish(self, value: ir.Value) -> None:
        """Add nothing of a value to the logits, so that it is computed."""
        total = self.op("ReduceSum", self.op("Cast", value, to=ir.DataType.FLOAT), keepdims=0)
        nothing = self.op("Mul", total, self.constant(np.float32(0)))
        (at,) = [i for i, output in enumerate(self.graph.outputs) if output.name == "logits"]
        old = self.graph.outputs[at]
        new = self.op("Add", old, nothing)
        new.shape, new.type = old.shape, old.type
        old.name, new.name = "logits.before", "logits"
        self.graph.outputs[at] = new


def expand(b: Builder, size: int) -> ir.Value:
    return b.op("Expand", b.column(), b.ints(1, size))


def expand_by_a_shape(b: Builder, size: int) -> ir.Value:
    """The capacity of the cache, times the size."""
    rows = b.op("Shape", b.past, start=2, end=3)
    return b.op("Expand", b.constant(np.float32(1)), b.op("Mul", rows, b.ints(size)))


def expand_by_numbers_that_overflow(b: Builder, size: int) -> ir.Value:
    """64 bits hold the size, 2**63 below it and above it; as whole numbers without an end it is negative."""
    below = b.op("Sub", b.ints(-(2**62)), b.ints(2**62))
    again = b.op("Sub", b.op("Sub", below, b.ints(2**62)), b.ints(2**62 - size))
    return b.op("Expand", b.constant(np.float32(1)), again)


def expand_by_a_table(b: Builder, size: int) -> ir.Value:
    """Rows and columns that are broadcast: the size is the fourth of the products."""
    products = b.op("Mul", b.constant(np.array([[1], [size]], np.int64)), b.constant(np.array([[1, 1]], np.int64)))
    last = b.op("Gather", b.op("Reshape", products, b.ints(-1)), b.ints(3))
    return b.op("Expand", b.constant(np.float32(1)), last)


def expand_by_a_value(b: Builder, size: int) -> ir.Value:
    """The length is computed from embeddings."""
    seen = b.op("ReduceMax", b.op("Abs", b.column()), keepdims=1)
    length = b.op("Add", b.op("Mul", seen, b.constant(np.float32(0))), b.constant(np.float32(size)))
    whole = b.op("Reshape", b.op("Cast", length, to=ir.DataType.INT64), b.ints(1))
    return b.op("Expand", b.constant(np.float32(1)), whole)


def constant_of_shape(b: Builder, size: int) -> ir.Value:
    return b.op("ConstantOfShape", b.ints(size), value=ir.tensor(np.zeros(1, np.float32)))


def numbers_up_to(b: Builder, size: int) -> ir.Value:
    return b.op("Range", *(b.constant(np.array(n, np.int64)) for n in (0, size, 1)))


def doubling(b: Builder, size: int) -> ir.Value:
    """Concat of a value with itself, again and again."""
    value = b.column()
    for _ in range(size.bit_length()):
        value = b.op("Concat", value, value, axis=0)
    return value


def outer(kind: str, b: Builder, size: int) -> ir.Value:
    """A column and a row, which make a matrix, which is made a column again."""
    value = b.op("Slice", b.column(), b.ints(0), b.ints(2), b.ints(0))
    for _ in range(max(1, size.bit_length().bit_length())):
        value = b.op(kind, value, b.op("Transpose", value, perm=[1, 0]))
        value = b.op("Reshape", value, b.ints(-1, 1))
    return value


def outer_sums(b: Builder, size: int) -> ir.Value:
    return outer("Add", b, size)


def outer_products(b: Builder, size: int) -> ir.Value:
    return outer("MatMul", b, size)


def outer_choices(b: Builder, size: int) -> ir.Value:
    """Where, with a condition that is a row."""
    value, row = b.column(), b.op("ConstantOfShape", b.ints(1, size))
    return b.op("Where", b.op("Equal", row, row), value, value)


def gathered(b: Builder, size: int) -> ir.Value:
    """Each embedding as often as a list of indices says, which costs a byte to write."""
    first = b.op("ConstantOfShape", b.ints(size), value=ir.tensor(np.zeros(1, np.int64)))
    return b.op("Gather", b.column(), first, axis=0)


def padded(b: Builder, size: int) -> ir.Value:
    """A convolution of a picture that is mostly padding, with gaps between its places."""
    picture = b.op("Reshape", b.column(), b.ints(1, 1, 1, -1))
    return b.op("Conv", picture, b.constant(np.ones((1, 1, 1, 1), np.float32)), pads=[0, 0, size, size], strides=[1, 3])


def blocks(b: Builder, size: int) -> ir.Value:
    """A 4-bit product that says how many outputs it has."""
    row = b.op("Transpose", b.column(), perm=[1, 0])
    width = int(b.x.shape[2])
    there = min(size, 8)
    packed = b.constant(np.zeros((there, width // 32, 16), np.uint8))
    scales = b.constant(np.ones(there * width // 32, np.float32))
    return b.op("MatMulNBits", row, packed, scales, domain=MICROSOFT, K=width, N=size, bits=4, block_size=32)


def cache(b: Builder, size: int) -> ir.Value:
    """An attention that says how many tokens its cache shall hold."""
    old = next(node for node in b.graph if node.op_type == "GroupQueryAttention")
    total = b.constant(np.array(min(size, 2**31 - 1), np.int32))
    last = b.constant(np.array([[0]], np.int32))
    inputs = [*old.inputs[:5], b.op("Reshape", last, b.ints(1)), b.op("Reshape", total, b.ints(1)), *old.inputs[7:]]
    attributes = {name: value.value for name, value in old.attributes.items()}
    return b.op("GroupQueryAttention", *inputs, domain=MICROSOFT, outputs=3, **attributes)


def many(b: Builder, size: int) -> ir.Value:
    """Tensors of a size that is allowed, but far too many, all of which are needed in the end."""
    each = [b.op("Expand", b.constant(np.float32(i)), b.ints(min(size, 2**20))) for i in range(min(size, 64))]
    total = b.op("Concat", *(b.op("ReduceSum", one, keepdims=1) for one in each), axis=0)
    return b.op("Concat", total, *(b.op("ReduceMax", one, keepdims=1) for one in each), axis=0)


def many_in_turn(b: Builder, size: int) -> ir.Value:
    """Tensors of a size that is allowed, each gone before the next in the order of the file, in which none must run."""
    sums, most = [], []
    for i in range(min(size, 800)):
        one = b.op("Expand", b.constant(np.float32(i)), b.ints(min(size, 2**20)))
        sums.append(b.op("ReduceSum", one, keepdims=1))
        most.append(b.op("ReduceMax", one, keepdims=1))
    return b.op("Concat", b.op("Concat", *sums, axis=0), b.op("Concat", *most, axis=0), axis=0)


GROWTHS: dict[str, Callable[[Builder, int], ir.Value]] = {
    grow.__name__: grow
    for grow in (
        *(expand, expand_by_a_shape, expand_by_numbers_that_overflow, expand_by_a_table, expand_by_a_value),
        *(constant_of_shape, numbers_up_to, doubling, outer_sums, outer_products, outer_choices, gathered, padded),
        *(blocks, cache, many, many_in_turn),
    )
}
UNBOUNDED = {"expand_by_numbers_that_overflow", "expand_by_a_table", "expand_by_a_value"}  # refused in any size


def grow(model: ir.Model, name: str, size: int) -> None:
    """Let a graph make tensors that grow with `size`."""
    builder = Builder(model.graph)
    builder.finish(GROWTHS[name](builder, size))
    model.opset_imports[MICROSOFT] = 1
