"""Reads from an ONNX file, without ONNX, enough to decide whether it is one of our graphs.

An inference library runs any graph and opens any file that the graph names. So a bundle's graphs are read here first.
They may have only operators that export writes, no graphs within graphs, and no numbers in files but the weights file.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trol_edge.bundle.protobuf import protobuf_fields
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
MOST_BYTES = 256 << 20  # largest graph file, which has no weights; TroL-7B's largest has 0.3 MB
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


@dataclasses.dataclass(frozen=True)
class GraphFile:
    """One graph. Ports: name -> (type, shape), a str in the shape names a dynamic dimension.

    outside: initializer -> (offset, bytes) in the weights file.
    """

    inputs: dict[str, tuple[str, tuple[int | str, ...]]]
    outputs: dict[str, tuple[str, tuple[int | str, ...]]]
    operators: dict[str, int]
    outside: dict[str, tuple[int, int]]


def read_graph(path: Path, weights: str) -> GraphFile:
    """Read a graph whose weights are in the file `weights`. Raises BundleError if it is not one of ours."""
    advice = "copy the bundle again, or export it again"
    data = read_plain(path, BundleError, advice, MOST_BYTES)
    with guard(path, BundleError, advice, "not readable as an ONNX graph"):
        top = _all(memoryview(data))
        if 25 in top or 20 in top:  # functions, training_info
            raise ValueError("it holds functions")
        (graph,) = top.get(7, [b""])
        parts = _all(graph)
        if 15 in parts:
            raise ValueError("it holds sparse tensors")
        operators = Counter(_operator(node) for node in parts.get(1, ()))
        outside = dict(found for tensor in parts.get(5, ()) if (found := _outside(tensor, weights)))
        return GraphFile(
            dict(map(_port, parts.get(11, ()))), dict(map(_port, parts.get(12, ()))), dict(operators), outside
        )


def _all(data: Any) -> dict[int, list[Any]]:
    """Every field of a message, by number."""
    found: dict[int, list[Any]] = {}
    for number, value in protobuf_fields(data):
        found.setdefault(number, []).append(value)
    return found


def _text(parts: Mapping[int, list[Any]], number: int) -> str:
    return bytes(parts[number][-1]).decode() if number in parts else ""


def _operator(node: Any) -> str:
    """The type of a node. Raises ValueError if export does not write such nodes."""
    parts = _all(node)
    kind, domain = _text(parts, 4), _text(parts, 7)
    if kind not in OPERATORS.get(DOMAINS.get(domain, domain), ()):
        raise ValueError(f"operator {printable(f'{domain}.{kind}' if domain else kind)!r} is none that export writes")
    for attribute in parts.get(5, ()):
        fields = _all(attribute)
        if fields.keys() & {6, 11, 22, 23}:  # g, graphs, sparse_tensor, sparse_tensors
            raise ValueError(f"operator {kind} holds a graph or a sparse tensor")
        for tensor in (*fields.get(5, ()), *fields.get(10, ())):
            if _location(_all(tensor)):
                raise ValueError(f"operator {kind} reads another file")
    return kind


def _location(tensor: Mapping[int, list[Any]]) -> dict[str, str]:
    """The place of a tensor's numbers outside the file: {"location": ..., "offset": ..., "length": ...}."""
    if 13 not in tensor and not any(tensor.get(14, ())):
        return {}
    pairs = [_all(entry) for entry in tensor.get(13, ())]
    return {"location": "", **{_text(pair, 1): _text(pair, 2) for pair in pairs}}


def _outside(tensor: Any, weights: str) -> tuple[str, tuple[int, int]] | None:
    """The name and place of an initializer that is in the weights file, or None."""
    parts = _all(tensor)
    place = _location(parts)
    if not place:
        return None
    if place["location"] != weights:
        raise ValueError(f"it reads {printable(place['location'])!r}, but a graph may read only {weights}")
    return _text(parts, 8), (int(place.get("offset", "0")), int(place.get("length", "-1")))


def _port(value: Any) -> tuple[str, tuple[str, tuple[int | str, ...]]]:
    parts = _all(value)
    (tensor,) = (_all(t) for t in _all(parts[2][-1])[1])
    (code,) = tensor[1]
    shape = _all(tensor[2][-1]).get(1, ()) if 2 in tensor else ()
    return _text(parts, 1), (TYPES[code], tuple(_dimensions(shape)))


def _dimensions(shape: Any) -> Iterator[int | str]:
    for dimension in map(_all, shape):
        yield dimension[1][-1] if 1 in dimension else _text(dimension, 2)
