"""Cuts a graph at some of its values, without ONNX: each is computed as before and seen, but others read a given one.

For a value V [1, n, K] the graph gets two inputs, `V.pattern` float32 [R, K] and `V.rows` int64 [1, n], which of them
each token gets, one more input `V.seen` int64 [m], and an output `V.computed` float32 [1, m, K]: the rows `V.seen` of
what the graph itself computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from trol_edge.bundle.protobuf import protobuf_field, protobuf_fields, renamed
from trol_edge.errors import BundleError

# Numbers of fields in ONNX's messages.
_GRAPH = 7  # of a model
_NODE, _INPUT, _OUTPUT = 1, 11, 12  # of a graph
_NODE_OUTPUT = 2  # of a node
FLOAT, INT64 = 1, 7  # element types


def cut(model: bytes, values: Collection[str]) -> bytes:
    """Cut a serialized model at these values. Raises BundleError if no node computes one of them."""
    names, found = set(values), set()
    out = []
    for number, content in protobuf_fields(memoryview(model)):
        if number != _GRAPH:
            out.append(protobuf_field(number, content))
            continue
        parts = []
        for part, inner in protobuf_fields(content):
            if part == _NODE:
                made = {bytes(value).decode() for key, value in protobuf_fields(inner) if key == _NODE_OUTPUT} & names
                found |= made
                inner = renamed(inner, (_NODE_OUTPUT,), {name: f"{name}.whole" for name in made}) if made else inner
            parts.append(protobuf_field(part, inner))
        parts += [piece for name in sorted(names) for piece in _forced(name)]
        out.append(protobuf_field(number, b"".join(parts)))
    if names - found:
        raise BundleError(f"no graph computes {min(names - found)}, which the self-test names; export the bundle again")
    return b"".join(out)


def eight_bit_product() -> bytes:
    """A graph "a" uint8 [m, k] times "b" int8 [k, n] -> "c" int32, to see how a processor multiplies them."""
    names = protobuf_field(1, b"a") + protobuf_field(1, b"b") + protobuf_field(_NODE_OUTPUT, b"c")
    node = names + protobuf_field(3, b"product") + protobuf_field(4, b"MatMulInteger")
    ports = ((_INPUT, "a", 2), (_INPUT, "b", 3), (_OUTPUT, "c", 6))
    graph = [protobuf_field(_NODE, node), protobuf_field(2, b"product")]
    graph += [protobuf_field(field, _port(name, element, 2)) for field, name, element in ports]
    return protobuf_field(1, 8) + protobuf_field(_GRAPH, b"".join(graph)) + protobuf_field(8, protobuf_field(2, 13))


def _forced(name: str) -> Iterator[bytes]:
    """What the graph gets for one value."""
    yield protobuf_field(_NODE, _gather([f"{name}.pattern", f"{name}.rows"], name, 0))
    yield protobuf_field(_NODE, _gather([f"{name}.whole", f"{name}.seen"], f"{name}.computed", 1))
    yield protobuf_field(_INPUT, _port(f"{name}.pattern", FLOAT, 2))
    yield protobuf_field(_INPUT, _port(f"{name}.rows", INT64, 2))
    yield protobuf_field(_INPUT, _port(f"{name}.seen", INT64, 1))
    yield protobuf_field(_OUTPUT, _port(f"{name}.computed", FLOAT, 3))


def _gather(inputs: Iterable[str], output: str, axis: int) -> bytes:
    attribute = protobuf_field(1, b"axis") + protobuf_field(3, axis) + protobuf_field(20, 2)  # name, i, type INT
    fields = [*(protobuf_field(1, name.encode()) for name in inputs), protobuf_field(2, output.encode())]
    return b"".join(
        (
            *fields,
            protobuf_field(3, f"cut_{output}".encode()),
            protobuf_field(4, b"Gather"),
            protobuf_field(5, attribute),
        )
    )


def _port(name: str, element: int, rank: int) -> bytes:
    """ValueInfoProto of a tensor with `rank` free dimensions."""
    shape = b"".join(protobuf_field(1, protobuf_field(2, f"{name}.{i}".encode())) for i in range(rank))
    tensor = protobuf_field(1, element) + protobuf_field(2, shape)
    return protobuf_field(1, name.encode()) + protobuf_field(2, protobuf_field(1, tensor))
