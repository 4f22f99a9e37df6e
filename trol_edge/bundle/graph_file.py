"""Reads from an ONNX file, without ONNX, enough to decide whether it is one of our graphs.

An inference library runs any graph and opens any file that the graph names. So a bundle's graphs are read here first.
They may have only operators that export writes, no graphs within graphs, and no numbers in files but the weights file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trol_edge.bundle.protobuf import by_number, varints
from trol_edge.errors import BundleError
from trol_edge.reading import guard, printable, read_plain

MICROSOFT = "com.microsoft"
# All operators that export writes, for all families, targets and precisions.
_STANDARD = """
Abs Add Attention Cast Clip Concat Constant ConstantOfShape Conv DequantizeLinear Div DynamicQuantizeLinear Equal Erf
Expand Flatten Gather Gelu Identity LayerNormalization Less LessOrEqual MatMul MatMulInteger Max Min Mul Neg Pow
QuantizeLinear RMSNormalization Range ReduceMax ReduceMean ReduceMin ReduceSum Reshape RotaryEmbedding ScatterND Shape
Sigmoid Slice Softmax Split Sqrt Squeeze Sub Swish Tanh TensorScatter Transpose Unsqueeze Where
"""
_MICROSOFT = "GroupQueryAttention MatMulIntegerToFloat MatMulNBits QuantizeLinear DequantizeLinear"
OPERATORS = {"": frozenset(_STANDARD.split()), MICROSOFT: frozenset(_MICROSOFT.split())}
DOMAINS = {"": "", "ai.onnx": "", MICROSOFT: MICROSOFT}
MOST_BYTES = 8 << 20  # largest graph file, which has no weights; TroL-7B's largest has 0.3 MB
MOST_NUMBERS = 64  # of a constant whose numbers are read: shapes, axes and the like have fewer
# ONNX's numbers of element types, as numpy and the weights file name them.
TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    16: "bfloat16",
    17: "float8_e4m3fn",
    21: "uint4",
    22: "int4",
}
WHOLE = {6: "<i", 7: "<q"}  # types whose numbers decide shapes
_FLOAT, _INT, _FLOATS, _INTS = 1, 2, 6, 7  # ONNX's numbers of types of attributes
_DATA = (4, 5, 6, 7, 9, 10, 11)  # fields of a tensor with its numbers


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A constant. numbers: its elements if they are a few whole numbers of 32 or 64 bits, else None."""

    shape: tuple[int, ...]
    numbers: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Node:
    """One node. An input "" is left out. attributes: int, float, bytes, a Tensor, or a list of ints or floats."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GraphFile:
    """One graph. Ports: name -> (type, shape), a str in the shape names a dynamic dimension.

    nodes: in the order of the file. constants: its initializers. outside: initializer -> (offset, bytes) in the weights
    file.
    """

    inputs: dict[str, tuple[str, tuple[int | str, ...]]]
    outputs: dict[str, tuple[str, tuple[int | str, ...]]]
    nodes: tuple[Node, ...]
    constants: dict[str, Tensor]
    outside: dict[str, tuple[int, int]]

    @property
    def operators(self) -> dict[str, int]:
        """Type of operator -> count."""
        return dict(Counter(node.kind for node in self.nodes))


def read_graph(path: Path, weights: str, sha256: str | None = None) -> GraphFile:
    """Read a graph whose weights are in the file `weights`.

    Raises BundleError if it is not one of ours, or if its bytes do not have the hash that is asked for.
    """
    advice = "copy the bundle again, or export it again"
    data = read_plain(path, BundleError, advice, MOST_BYTES)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise BundleError(f"{path}: was altered (sha256 differs); copy the bundle again")
    with guard(path, BundleError, advice, "not readable as an ONNX graph"):
        top = by_number(memoryview(data))
        if 25 in top or 20 in top:  # functions, training_info
            raise ValueError("it holds functions")
        (graph,) = top.get(7, [b""])
        parts = by_number(graph)
        if 15 in parts:
            raise ValueError("it holds sparse tensors")
        initializers = [by_number(tensor) for tensor in parts.get(5, ())]
        outside = dict(found for tensor in initializers if (found := _outside(tensor, weights)))
        return GraphFile(
            dict(map(_port, parts.get(11, ()))),
            dict(map(_port, parts.get(12, ()))),
            tuple(map(_node, parts.get(1, ()))),
            {_text(tensor, 8): _tensor(tensor, outside) for tensor in initializers},
            outside,
        )


def _text(parts: Mapping[int, list[Any]], number: int) -> str:
    return bytes(parts[number][-1]).decode() if number in parts else ""


def _node(node: Any) -> Node:
    """Read a node. Raises ValueError if export does not write such nodes."""
    parts = by_number(node)
    kind, domain = _text(parts, 4), _text(parts, 7)
    if kind not in OPERATORS.get(DOMAINS.get(domain, domain), ()):
        raise ValueError(f"operator {printable(f'{domain}.{kind}' if domain else kind)!r} is none that export writes")
    inputs, outputs = (tuple(bytes(name).decode() for name in parts.get(field, ())) for field in (1, 2))
    attributes: dict[str, Any] = {}
    for attribute in map(by_number, parts.get(5, ())):
        if attribute.keys() & {6, 11, 22, 23}:  # g, graphs, sparse_tensor, sparse_tensors
            raise ValueError(f"operator {kind} holds a graph or a sparse tensor")
        tensors = [by_number(tensor) for tensor in (*attribute.get(5, ()), *attribute.get(10, ()))]
        if any(map(_location, tensors)):
            raise ValueError(f"operator {kind} reads another file")
        if tensors:
            attributes[_text(attribute, 1)] = _tensor(tensors[0], {})
        elif (value := _attribute(attribute)) is not None:
            attributes[_text(attribute, 1)] = value
    if kind == "Cast" and attributes.get("to") not in TYPES:
        raise ValueError(f"operator Cast makes another type than export writes ({attributes.get('to')!r:.80})")
    return Node(kind, inputs, outputs, attributes)


def _attribute(parts: Mapping[int, list[Any]]) -> Any:
    """The value of an attribute: a number, text, or a list of numbers; None if it has none."""
    kind = parts[20][-1] if 20 in parts else 0
    if kind == _INTS or 8 in parts:
        return [number for value in parts.get(8, ()) for number in _whole(value)]
    if kind == _FLOATS or 7 in parts:
        return [number for value in parts.get(7, ()) for (number,) in struct.iter_unpack("<f", value)]
    if kind == _INT or 3 in parts:
        return _signed(parts[3][-1] if 3 in parts else 0)
    if kind == _FLOAT or 2 in parts:
        return struct.unpack("<f", parts[2][-1])[0] if 2 in parts else 0.0
    return bytes(parts[4][-1]) if 4 in parts else None


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _whole(value: Any) -> list[int]:
    """Whole numbers of a repeated field: one, or packed into bytes."""
    return [_signed(number) for number in ([value] if isinstance(value, int) else varints(value))]


def _tensor(parts: Mapping[int, list[Any]], outside: Mapping[str, tuple[int, int]]) -> Tensor:
    """A constant. Raises ValueError if its shape has more elements than it has numbers for."""
    shape = tuple(number for value in parts.get(1, ()) for number in _whole(value))
    code = parts[2][-1] if 2 in parts else 0
    if code not in TYPES or any(d < 0 for d in shape):
        raise ValueError(f"a tensor of type {code!r:.80} and shape {shape!r:.80} is none that export writes")
    held = sum(len(value) if not isinstance(value, int) else 1 for field in _DATA for value in parts.get(field, ()))
    if (name := _text(parts, 8)) in outside:
        held = outside[name][1]
    count = math.prod(shape)
    if count > 2 * held:  # two numbers of 4 bits in a byte
        raise ValueError(f"tensor {printable(name)!r:.80} says {count} numbers, but has {held} bytes of them")
    if count > MOST_NUMBERS or name in outside or code not in WHOLE:
        return Tensor(shape)
    if 9 in parts:
        numbers = [number for (number,) in struct.iter_unpack(WHOLE[code], parts[9][-1])]
    else:
        numbers = [number for value in parts.get(7 if TYPES[code] == "int64" else 5, ()) for number in _whole(value)]
    if len(numbers) != count:
        raise ValueError(f"tensor {printable(name)!r:.80} says {count} numbers, but has {len(numbers)}")
    return Tensor(shape, tuple(numbers))


def _location(tensor: Mapping[int, list[Any]]) -> dict[str, str]:
    """The place of a tensor's numbers outside the file: {"location": ..., "offset": ..., "length": ...}."""
    if 13 not in tensor and not any(tensor.get(14, ())):
        return {}
    pairs = [by_number(entry) for entry in tensor.get(13, ())]
    return {"location": "", **{_text(pair, 1): _text(pair, 2) for pair in pairs}}


def _outside(parts: Mapping[int, list[Any]], weights: str) -> tuple[str, tuple[int, int]] | None:
    """The name and place of an initializer that is in the weights file, or None."""
    place = _location(parts)
    if not place:
        return None
    if place["location"] != weights:
        raise ValueError(f"it reads {printable(place['location'])!r}, but a graph may read only {weights}")
    return _text(parts, 8), (int(place.get("offset", "0")), int(place.get("length", "-1")))


def _port(value: Any) -> tuple[str, tuple[str, tuple[int | str, ...]]]:
    parts = by_number(value)
    (tensor,) = (by_number(t) for t in by_number(parts[2][-1])[1])
    (code,) = tensor[1]
    shape = by_number(tensor[2][-1]).get(1, ()) if 2 in tensor else ()
    return _text(parts, 1), (TYPES[code], tuple(_dimensions(shape)))


def _dimensions(shape: Any) -> Iterator[int | str]:
    for dimension in map(by_number, shape):
        yield dimension[1][-1] if 1 in dimension else _text(dimension, 2)
