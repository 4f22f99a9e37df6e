"""Takes the graph of one layer out of a file that has one for each, without ONNX, and puts its weights into it.

In the file (export/graphs/layers.py) layer i reads past_key_<i> and past_value_<i>, and writes hidden_<i>,
present_key_<i> and present_value_<i>. In the part that is taken these names have no numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from trol_edge.bundle.protobuf import protobuf_field, protobuf_fields
from trol_edge.errors import BundleError

# Numbers of fields in ONNX's messages.
_GRAPH = 7  # of a model
_NODE, _NAME, _INITIALIZER, _INPUT, _OUTPUT = 1, 2, 5, 11, 12  # of a graph
_READS, _MAKES = 1, 2  # of a node
_TENSOR_NAME, _RAW, _ELSEWHERE = 8, 9, (13, 14)  # of a tensor
_PORT_NAME = 1
INPUTS = ("past_key", "past_value")
OUTPUTS = ("hidden", "present_key", "present_value")


def constants_of(model: bytes, layer: int) -> set[str]:
    """The names of the initializers that a layer reads."""
    for number, content in protobuf_fields(memoryview(model)):
        if number == _GRAPH:
            parts = _parts(content)
            read = {name for node in _needed(parts[_NODE], layer) for name in _names(node, _READS)}
            return read & {_name(tensor, _TENSOR_NAME) for tensor in parts.get(_INITIALIZER, ())}
    return set()


def part_of_layer(model: bytes, layer: int, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A serialized model of one layer. arrays: the numbers of its initializers that are in the weights file.

    Raises BundleError if nothing computes the layer.
    """
    return b"".join(
        protobuf_field(number, _graph(content, layer, arrays) if number == _GRAPH else content)
        for number, content in protobuf_fields(memoryview(model))
    )


def _graph(content: Any, layer: int, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    parts = _parts(content)
    nodes = _needed(parts[_NODE], layer)
    read = {name for node in nodes for name in _names(node, _READS)}
    to = {f"{name}_{layer}": name for name in (*INPUTS, *OUTPUTS)}
    found = [protobuf_field(_NODE, _renamed(_renamed(node, _READS, to), _MAKES, to)) for node in nodes]
    found.append(protobuf_field(_NAME, f"layer_{layer}".encode()))
    for tensor in parts.get(_INITIALIZER, ()):
        name = _name(tensor, _TENSOR_NAME)
        if name in read:
            found.append(protobuf_field(_INITIALIZER, _held(tensor, arrays[name]) if name in arrays else tensor))
    found += [
        protobuf_field(_INPUT, _renamed(p, _PORT_NAME, to)) for p in parts[_INPUT] if _name(p, _PORT_NAME) in read
    ]
    found += [
        protobuf_field(_OUTPUT, _renamed(p, _PORT_NAME, to)) for p in parts[_OUTPUT] if _name(p, _PORT_NAME) in to
    ]
    return b"".join(found)


def _held(tensor: Any, array: NDArray[Any]) -> bytes:
    """A tensor with its numbers in it."""
    fields = [protobuf_field(key, value) for key, value in protobuf_fields(tensor) if key not in _ELSEWHERE]
    return b"".join((*fields, protobuf_field(_RAW, array.tobytes())))


def _parts(content: Any) -> dict[int, list[Any]]:
    parts: dict[int, list[Any]] = {}
    for number, value in protobuf_fields(content):
        parts.setdefault(number, []).append(value)
    return parts


def _needed(nodes: Sequence[Any], layer: int) -> list[Any]:
    """The nodes that compute a layer, in order."""
    made = {name: i for i, node in enumerate(nodes) for name in _names(node, _MAKES)}
    found: set[int] = set()
    values = [f"{name}_{layer}" for name in OUTPUTS]
    if lacking := set(values) - made.keys():
        raise BundleError(f"no graph computes {min(lacking)}; export the bundle again")
    left = [made[name] for name in values]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [made[name] for name in _names(nodes[node], _READS) if name in made]
    return [nodes[i] for i in sorted(found)]


def _names(message: Any, number: int) -> Collection[str]:
    return {bytes(value).decode() for key, value in protobuf_fields(message) if key == number}


def _name(message: Any, number: int) -> str:
    return min(_names(message, number), default="")


def _renamed(message: Any, number: int, names: Mapping[str, str]) -> bytes:
    """A message in whose fields of this number names are replaced."""
    fields = []
    for key, value in protobuf_fields(message):
        if key == number and bytes(value).decode() in names:
            value = names[bytes(value).decode()].encode()
        fields.append(protobuf_field(key, value))
    return b"".join(fields)
