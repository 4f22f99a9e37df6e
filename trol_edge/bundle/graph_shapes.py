"""ONNX's rules of shapes in whole numbers: what an operator makes of intervals of dimensions.

Every dimension, and every whole number that decides one (of Shape, of a constant, of a position), is an interval from
the smallest to the largest that it can be, whatever values are computed. An operator whose output nothing bounds, such
as an Expand to a computed length, has none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trol_edge.bundle.graph_file import MOST_NUMBERS, WHOLE, Node, Tensor

Interval = tuple[int, int]  # smallest and largest
Found = tuple[list["Value"], int]  # the outputs of a node, and numbers in the scratch memory of its kernel
_ANY = 1 << 63
_MOST_WHOLE = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a tensor. size: most elements. numbers: of its elements, in turn; span: of all of them."""

    dims: tuple[Interval, ...]
    size: int
    numbers: tuple[Interval, ...] | None = None
    span: Interval | None = None


def outputs_of(node: Node, known: Mapping[str, Value]) -> Found:
    """What a node makes of what is known of its inputs. Raises an exception of any kind if nothing bounds it."""
    found, scratch = _RULES[node.kind](_Node(node, known))
    if len(node.outputs) > len(found):
        raise ValueError(f"{len(node.outputs)} outputs instead of {len(found)}")
    return found, scratch


def value_of(shape: Iterable[Interval], most: int | None = None, **more: Any) -> Value:
    """A value of these dimensions, of at most `most` elements."""
    dims = tuple((max(0, low), max(0, high)) for low, high in shape)
    size = math.prod(high for _, high in dims)
    return Value(dims, size if most is None else min(size, most), **more)


def constant(tensor: Tensor) -> Value:
    """What is known of a constant."""
    numbers = None if tensor.numbers is None else tuple((n, n) for n in tensor.numbers)
    return value_of(((d, d) for d in tensor.shape), numbers=numbers)


class _Node:
    """A node with what is known of its inputs."""

    def __init__(self, node: Node, known: Mapping[str, Value]) -> None:
        self.attributes = node.attributes
        self.kind = node.kind
        self.outputs = max(1, len(node.outputs))
        self.inputs = [known[name] if name else None for name in node.inputs]

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def __getitem__(self, index: int) -> Value:
        value = self.inputs[index]
        if value is None:
            raise ValueError(f"no input {index}")
        return value

    def numbers(self, index: int) -> tuple[Interval, ...]:
        """The whole numbers of an input."""
        found = self[index].numbers
        if found is None:
            raise ValueError(f"its input {index} is computed from values")
        return found

    def fixed(self, index: int, attribute: str = "") -> list[int] | None:
        """Whole numbers that are constant, of an input or else an attribute; None if there are none."""
        if self.has(index):
            if any(low != high for low, high in self.numbers(index)):
                raise ValueError(f"its input {index} is not constant")
            return [low for low, _ in self.numbers(index)]
        found = self.attributes.get(attribute)
        return None if found is None else list(found)

    def whole(self, attribute: str, default: int) -> int:
        found = self.attributes.get(attribute, default)
        if not isinstance(found, int):
            raise ValueError(f"{attribute} is no whole number")
        return found


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < max(rank, 1):
        raise ValueError(f"axis {axis} of {rank}")
    return axis % max(rank, 1)


def _spread(*shapes: Sequence[Interval]) -> list[Interval]:
    """The dimensions of tensors that are broadcast to each other, each of which may be 1 in any of them."""
    rank = max(map(len, shapes))
    rows = [[(1, 1)] * (rank - len(shape)) + list(shape) for shape in shapes]
    return [(min(d[0] for d in column), max(d[1] for d in column)) for column in zip(*rows, strict=True)]


def _like_first(node: _Node) -> Found:
    return [node[0]] * node.outputs, 0


def _copied(node: _Node) -> Found:
    """The outputs have as many elements as the first input, and their values are not followed."""
    return [Value(node[0].dims, node[0].size)] * node.outputs, 0


def _broadcast(node: _Node) -> Found:
    values = [node[i] for i in range(len(node.inputs))]
    return [value_of(_spread(*(v.dims for v in values)), **_computed(node, values))], 0


def _computed(node: _Node, values: list[Value]) -> dict[str, Any]:
    """The numbers that come out of Add, Sub and Mul."""
    rule: Callable[[Interval, Interval], Interval] | None = {
        "Add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
        "Sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
        "Mul": lambda a, b: (min(x * y for x in a for y in b), max(x * y for x in a for y in b)),
    }.get(node.kind)
    if rule is None or len(values) != 2:
        return {}
    one, two = values
    if one.numbers and two.numbers and len(one.dims) <= 1 and len(two.dims) <= 1:
        count = max(len(one.numbers), len(two.numbers))
        if {len(one.numbers), len(two.numbers)} <= {1, count}:
            pairs = zip(*(v.numbers * (count // len(v.numbers)) for v in values if v.numbers), strict=True)
            numbers = tuple(rule(a, b) for a, b in pairs)
            return {"numbers": numbers} if all(map(_fits, numbers)) else {}
    spans = [_span(value) for value in values]
    if spans[0] is None or spans[1] is None:
        return {}
    span = rule(spans[0], spans[1])
    return {"span": span} if _fits(span) else {}


def _fits(number: Interval) -> bool:
    """Whether no type of whole numbers that is followed overflows: 32 or 64 bits."""
    return number[0] >= -_MOST_WHOLE and number[1] <= _MOST_WHOLE


def _cast(node: _Node) -> Found:
    """Whole numbers stay what they are in 32 and 64 bits; those of other types are not followed."""
    span = _span(node[0])
    if node.whole("to", 0) in WHOLE and span is not None and _fits(span):
        return [node[0]], 0
    return _copied(node)


def _span(value: Value) -> Interval | None:
    if value.numbers:
        return min(low for low, _ in value.numbers), max(high for _, high in value.numbers)
    return value.span


def _matmul(node: _Node) -> Found:
    one, two = list(node[0].dims), list(node[1].dims)
    if not one or not two:
        raise ValueError("a product of scalars")
    rows = one[-2:-1] if len(one) > 1 else []
    columns = two[-1:] if len(two) > 1 else []
    return [value_of([*_spread(one[:-2], two[:-2]), *rows, *columns])], 0


def _nbits(node: _Node) -> Found:
    k, n = node.whole("K", 0), node.whole("N", 0)
    return [value_of([*node[0].dims[:-1], (n, n)])], k * n


def _gather(node: _Node) -> Found:
    data, index = node[0], node[1]
    axis = _axis(node.whole("axis", 0), len(data.dims))
    numbers = None
    taken = index.numbers
    if data.numbers is not None and len(data.dims) == 1 and taken is not None and all(a == b for a, b in taken):
        numbers = tuple(data.numbers[low] for low, _ in taken)
    return [value_of([*data.dims[:axis], *index.dims, *data.dims[axis + 1 :]], numbers=numbers, span=_span(data))], 0


def _concat(node: _Node) -> Found:
    values = [node[i] for i in range(len(node.inputs))]
    axis = _axis(node.whole("axis", 0), len(values[0].dims))
    dims = [
        (min(d[0] for d in column), max(d[1] for d in column)) for column in zip(*(v.dims for v in values), strict=True)
    ]
    dims[axis] = sum(v.dims[axis][0] for v in values), sum(v.dims[axis][1] for v in values)
    most = sum(v.size for v in values)
    numbers = None
    if len(dims) == 1 and all(v.numbers is not None for v in values):
        numbers = tuple(n for v in values for n in v.numbers or ())
    return [value_of(dims, most, numbers=numbers if numbers is None or len(numbers) <= MOST_NUMBERS else None)], 0


def _split(node: _Node) -> Found:
    data = node[0]
    axis = _axis(node.whole("axis", 0), len(data.dims))
    low, high = data.dims[axis]
    parts = node.fixed(1, "split")
    if parts is None:
        each = -(-high // node.outputs)
        intervals = [(low // node.outputs if low == high and low % node.outputs == 0 else 0, each)] * node.outputs
    else:
        intervals = [(min(n, high), min(n, high)) for n in parts]
    return [value_of([*data.dims[:axis], part, *data.dims[axis + 1 :]], data.size) for part in intervals], 0


def _slice(node: _Node) -> Found:
    data, rank = node[0], len(node[0].dims)
    axes = node.fixed(3)
    starts, ends = (_span_of_each(node[i], len(axes or ())) for i in (1, 2))
    axes = axes or list(range(len(starts)))
    steps = node.fixed(4) or [1] * len(starts)
    dims, numbers = list(data.dims), data.numbers
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = _axis(axis, rank)
        dims[axis] = _taken(dims[axis], start, end, step)
        if numbers is not None and rank == 1 and start[0] == start[1] and end[0] == end[1] and step:
            numbers = numbers[start[0] : end[0] : step]
        else:
            numbers = None
    return [value_of(dims, data.size, numbers=numbers, span=_span(data))], 0


def _span_of_each(value: Value, count: int) -> tuple[Interval, ...]:
    """The numbers of an input of Slice. If they are computed from values, each may be any."""
    if value.numbers is not None:
        return value.numbers
    if not count:
        raise ValueError("it has no axes")
    return (value.span or (-_ANY, _ANY),) * count


def _taken(dim: Interval, start: Interval, end: Interval, step: int) -> Interval:
    """How many of `dim` a slice takes."""
    low, high = dim
    if step < 1:
        return 0, high
    first = start[0] if start[0] >= 0 else max(0, low + start[0]) if start[1] < 0 else 0
    last = high if end[0] < 0 <= end[1] else min(high, end[1]) if end[1] >= 0 else max(0, high + end[1])
    most = -(-(last - first) // step)
    if start[1] < 0:
        most = min(most, -(-max(-start[0], 0) // step))
    if low == high and start[0] == start[1] and end[0] == end[1]:  # nothing varies
        exact = len(range(high)[start[0] : end[0] : step])
        return exact, exact
    return 0, max(0, min(most, high))


def _expand(node: _Node) -> Found:
    return [value_of(_spread(node[0].dims, node.numbers(1)))], 0


def _reshape(node: _Node) -> Found:
    data, shape = node[0], node.numbers(1)
    zero = node.whole("allowzero", 0)
    dims: list[Interval] = []
    for i, (low, high) in enumerate(shape):
        if low == high == 0 and not zero:
            dims.append(data.dims[i])
        elif low < 0 or (low == 0 and not zero):  # the rest of the elements, or what the input has
            others = math.prod(max(1, s[0]) for j, s in enumerate(shape) if j != i)
            copied = data.dims[i][1] if low <= 0 <= high and i < len(data.dims) else 0
            dims.append((0, max(high, copied, data.size // others if low == high else data.size)))
        else:
            dims.append((low, high))
    return [value_of(dims, data.size, numbers=data.numbers, span=data.span)], 0


def _transpose(node: _Node) -> Found:
    rank = len(node[0].dims)
    order = node.attributes.get("perm", list(range(rank))[::-1])
    if sorted(order) != list(range(rank)):
        raise ValueError(f"perm {order!r:.80}")
    return [value_of([node[0].dims[i] for i in order], node[0].size)], 0


def _squeeze(node: _Node) -> Found:
    data, rank = node[0], len(node[0].dims)
    axes = node.fixed(1, "axes")
    if axes is None:
        raise ValueError("no axes")
    gone = {_axis(axis, rank) for axis in axes}
    return [value_of([d for i, d in enumerate(data.dims) if i not in gone], data.size, numbers=data.numbers)], 0


def _unsqueeze(node: _Node) -> Found:
    data, axes = node[0], node.fixed(1, "axes") or []
    rank = len(data.dims) + len(axes)
    new, old = {_axis(axis, rank) for axis in axes}, iter(data.dims)
    dims = [(1, 1) if i in new else next(old) for i in range(rank)]
    return [value_of(dims, data.size, numbers=data.numbers, span=data.span)], 0


def _flatten(node: _Node) -> Found:
    data, axis = node[0], node.whole("axis", 1)
    axis = axis + len(data.dims) if axis < 0 else axis
    parts = (data.dims[:axis], data.dims[axis:])
    dims = [(math.prod(low for low, _ in part), math.prod(high for _, high in part)) for part in parts]
    return [value_of(dims, data.size)], 0


def _shape(node: _Node) -> Found:
    dims = node[0].dims[node.attributes.get("start", 0) : node.attributes.get("end", None)]
    return [value_of([(len(dims),) * 2], numbers=dims)], 0


def _range(node: _Node) -> Found:
    (start,), (limit,), (delta,) = (node.numbers(i) for i in range(3))
    if delta[0] != delta[1] or not delta[0]:
        raise ValueError("a step that is not constant")
    way = limit[1] - start[0] if delta[0] > 0 else start[1] - limit[0]
    ends = (min(start[0], limit[0]), max(start[1], limit[1]))
    return [value_of([(0, -(-way // abs(delta[0])))], span=ends)], 0


def _constant_of_shape(node: _Node) -> Found:
    return [value_of(node.numbers(0))], 0


def _constant_node(node: _Node) -> Found:
    tensor = node.attributes.get("value")
    if isinstance(tensor, Tensor):
        return [constant(tensor)], 0
    ((name, given),) = node.attributes.items()
    if name in ("value_int", "value_ints") and (numbers := [given] if name == "value_int" else list(given)):
        shape = () if name == "value_int" else (len(numbers),)
        return [constant(Tensor(shape, tuple(numbers) if len(numbers) <= MOST_NUMBERS else None))], 0
    if name == "value_float":
        return [value_of([])], 0
    raise ValueError(f"{name} is none that export writes")


def _conv(node: _Node) -> Found:
    data, kernel = node[0].dims, node[1].dims
    spatial = len(kernel) - 2
    strides = node.attributes.get("strides", [1] * spatial)
    pads = node.attributes.get("pads", [0] * 2 * spatial)
    if node.attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or min(strides) < 1 or min(pads) < 0:
        raise ValueError("other padding than export writes")
    dims = [data[0], kernel[0]]
    for i in range(spatial):
        wide = data[2 + i][1] + pads[i] + pads[spatial + i]
        dims.append((0, wide // strides[i] + 1 if kernel[2 + i][0] < strides[i] else wide // strides[i]))
    made = value_of(dims)
    patches = math.prod(high for _, high in dims[2:]) * math.prod(high for _, high in kernel[1:])
    return [made], patches


def _reduced(node: _Node) -> Found:
    data, rank = node[0], len(node[0].dims)
    axes = node.fixed(1, "axes")
    none = set[int]() if node.whole("noop_with_empty_axes", 0) else set(range(rank))
    gone = {_axis(axis, rank) for axis in axes} if axes else none
    kept = bool(node.whole("keepdims", 1))
    dims = [(1, 1) if i in gone else d for i, d in enumerate(data.dims) if kept or i not in gone]
    return [value_of(dims, data.size)], 0


def _attention(node: _Node) -> Found:
    """Attention on [B, H, S, E], without caches of its own."""
    query, keys, values = node[0].dims, node[1].dims, node[2].dims
    if len(query) != 4 or len(keys) != 4 or len(values) != 4 or node.has(4) or node.has(5) or node.outputs > 1:
        raise ValueError("not as export writes it")
    batch, heads, tokens, size = (high for _, high in query)
    rows = keys[2][1]
    # Scores with their mask, and keys and values of each head where heads share them.
    return [value_of([*query[:3], values[3]])], batch * heads * rows * (2 * tokens + size + values[3][1])


def _group_query_attention(node: _Node) -> Found:
    """GroupQueryAttention on packed queries, keys and values, with a cache of a fixed capacity."""
    query, past = node[0].dims, (node[3].dims, node[4].dims)
    heads, kv_heads = node.whole("num_heads", 0), node.whole("kv_num_heads", 0)
    total = _span(node[6])
    if node.has(1) or node.has(2) or len(query) != 3 or heads < 1 or kv_heads < 1 or len(past[0]) != 4:
        raise ValueError("not as export writes it")
    if total is None:
        raise ValueError("its number of tokens is computed from values")
    tokens = max(total[1], past[0][2][1], past[1][2][1])
    present = [value_of([*p[:2], (p[2][0], tokens), p[3]]) for p in past]
    made = [value_of([query[0], query[1], (0, heads * (query[2][1] // (heads + 2 * kv_heads)))]), *present]
    return made, query[0][1] * query[1][1] * heads * tokens


def _three(node: _Node) -> Found:
    """DynamicQuantizeLinear."""
    return [Value(node[0].dims, node[0].size), value_of([]), value_of([])], 0


_COPIED = """
Abs Clip Erf Gelu Neg Sigmoid Softmax Sqrt Swish Tanh QuantizeLinear DequantizeLinear
LayerNormalization RMSNormalization RotaryEmbedding ScatterND TensorScatter
"""
_BROADCAST = "Add Div Equal Less LessOrEqual Max Min Mul Pow Sub Where"
_REDUCED = "ReduceMax ReduceMean ReduceMin ReduceSum"
_PRODUCTS = "MatMul MatMulInteger MatMulIntegerToFloat"
_RULES: dict[str, Callable[[_Node], Found]] = {
    **dict.fromkeys(_COPIED.split(), _copied),
    **dict.fromkeys(_BROADCAST.split(), _broadcast),
    **dict.fromkeys(_REDUCED.split(), _reduced),
    **dict.fromkeys(_PRODUCTS.split(), _matmul),
    "Attention": _attention,
    "Cast": _cast,
    "Concat": _concat,
    "Constant": _constant_node,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "DynamicQuantizeLinear": _three,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GroupQueryAttention": _group_query_attention,
    "Identity": _like_first,
    "MatMulNBits": _nbits,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
