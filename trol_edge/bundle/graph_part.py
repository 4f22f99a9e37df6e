"""Takes the graph of one layer out of a file that has one for each, without ONNX, and gives graphs their weights.

In the file (export/graphs/layers.py) layer i reads past_key_<i> and past_value_<i>, and writes hidden_<i>,
present_key_<i> and present_value_<i>. In the part that is taken these names have no numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.protobuf import by_number, protobuf_field, protobuf_fields, renamed
from trol_edge.bundle.weights import TensorInfo
from trol_edge.errors import BundleError

# Numbers of fields in ONNX's messages.
_GRAPH = 7  # of a model
_NODE, _NAME, _INITIALIZER, _INPUT, _OUTPUT = 1, 2, 5, 11, 12  # of a graph
_READS, _MAKES = 1, 2  # of a node
_DIMENSION, _TYPE, _TENSOR_NAME, _RAW, _ELSEWHERE = 1, 2, 8, 9, (13, 14)  # of a tensor
_INT8 = 3  # a type
_PORT_NAME = 1
INPUTS = ("past_key", "past_value")
OUTPUTS = ("hidden", "present_key", "present_value")


class SinglePasses:
    """A model with a graph for each layer, read once, to be taken apart."""

    def __init__(self, model: bytes) -> None:
        self._top = list(protobuf_fields(memoryview(model)))
        parts = by_number(dict(self._top)[_GRAPH])
        self._nodes = parts.get(_NODE, [])
        self._reads = [_names(node, _READS) for node in self._nodes]
        self._makers = {name: i for i, node in enumerate(self._nodes) for name in _names(node, _MAKES)}
        self._tensors = {_name(tensor, _TENSOR_NAME): tensor for tensor in parts.get(_INITIALIZER, ())}
        self._ports = {
            number: {_name(port, _PORT_NAME): port for port in parts.get(number, ())} for number in (_INPUT, _OUTPUT)
        }

    def constants(self, layer: int) -> set[str]:
        """The names of the initializers that a layer reads. Raises BundleError if nothing computes the layer."""
        return {name for i in self._needed(layer) for name in self._reads[i]} & self._tensors.keys()

    def part(self, layer: int, arrays: Mapping[str, NDArray[Any]]) -> bytes:
        """A serialized model of one layer. arrays: the numbers of its initializers that are in the weights file.

        Raises BundleError if nothing computes the layer.
        """
        needed = self._needed(layer)
        read = {name for i in needed for name in self._reads[i]}
        to = {f"{name}_{layer}": name for name in (*INPUTS, *OUTPUTS)}
        found = [protobuf_field(_NODE, renamed(self._nodes[i], (_READS, _MAKES), to)) for i in needed]
        found.append(protobuf_field(_NAME, f"layer_{layer}".encode()))
        for name, tensor in self._tensors.items():
            if name in read:
                found.append(protobuf_field(_INITIALIZER, _held(tensor, arrays[name]) if name in arrays else tensor))
        for number, kept in ((_INPUT, read), (_OUTPUT, to)):
            ports = [port for name, port in self._ports[number].items() if name in kept]
            found += [protobuf_field(number, renamed(port, (_PORT_NAME,), to)) for port in ports]
        graph = b"".join(found)
        return b"".join(protobuf_field(number, graph if number == _GRAPH else value) for number, value in self._top)

    def _needed(self, layer: int) -> list[int]:
        """The nodes that compute a layer, in order."""
        values = [f"{name}_{layer}" for name in OUTPUTS]
        if lacking := set(values) - self._makers.keys():
            raise BundleError(f"no graph computes {min(lacking)}; export the bundle again")
        found: set[int] = set()
        left = [self._makers[name] for name in values]
        while left:
            node = left.pop()
            if node not in found:
                found.add(node)
                left += [self._makers[name] for name in self._reads[node] if name in self._makers]
        return sorted(found)


def with_constants(model: bytes, tensors: Mapping[str, TensorInfo]) -> bytes:
    """The model with these int8 inputs as initializers, which are in the weights file."""
    out = []
    for number, content in protobuf_fields(memoryview(model)):
        if number == _GRAPH:
            fields = [
                protobuf_field(key, value)
                for key, value in protobuf_fields(content)
                if key != _INPUT or _name(value, _PORT_NAME) not in tensors
            ]
            fields += [protobuf_field(_INITIALIZER, _elsewhere(name, info)) for name, info in tensors.items()]
            content = b"".join(fields)
        out.append(protobuf_field(number, content))
    return b"".join(out)


def _elsewhere(name: str, info: TensorInfo) -> bytes:
    """An initializer in the weights file."""
    where = {"location": WEIGHTS, "offset": str(info.offset), "length": str(info.nbytes)}
    entries = [protobuf_field(1, key.encode()) + protobuf_field(2, value.encode()) for key, value in where.items()]
    place, kind = _ELSEWHERE
    return b"".join(
        (
            *(protobuf_field(_DIMENSION, size) for size in info.shape),
            protobuf_field(_TYPE, _INT8),
            protobuf_field(_TENSOR_NAME, name.encode()),
            *(protobuf_field(place, entry) for entry in entries),
            protobuf_field(kind, 1),  # EXTERNAL
        )
    )


def _held(tensor: Any, array: NDArray[Any]) -> bytes:
    """A tensor with its numbers in it."""
    fields = [protobuf_field(key, value) for key, value in protobuf_fields(tensor) if key not in _ELSEWHERE]
    return b"".join((*fields, protobuf_field(_RAW, array.tobytes())))


def _names(message: Any, number: int) -> set[str]:
    return {bytes(value).decode() for key, value in protobuf_fields(message) if key == number}


def _name(message: Any, number: int) -> str:
    return min(_names(message, number), default="")
