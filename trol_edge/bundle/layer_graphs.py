"""Cuts a bundle's traverse and step into two graphs per decoder layer and a few that all share, without ONNX.

    enter_0 ..      hidden [1,S,D] -> query [1,H,S,E], key and value [1,G,S,E] of a layer, rotated
    attention       these and one pair of caches -> attended [1,S,H*E], the caches written
    attention_step  the same for one token, in the form that reads the filled rows once
    leave_0 ..      hidden [1,S,D] and attended -> result [1,S,D] of a pass of the layer
    mixture         first [1,S,D] and second [1,S,D], the results of a layer's two passes -> result [1,S,D]
    head            hidden [1,1,D] of the last token -> logits [1,V], and the best token

Hidden states are float32 between the parts, whatever the graphs compute in, because to widen them changes nothing. What
goes in and out of attention is of the caches' type. The graphs of a layer are cut from its first pass in the traverse.
Its second pass, which is the same computation of other inputs, needs no graphs of its own, nor does a step, which is a
pass of one token but for its attention. Attention has no weights, so one graph serves all layers. Where to cut is found
by what flows: between layers one value alone is still needed that depends on the embeddings, and attention is what
depends on the caches before a weight is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from trol_edge.bundle.costs import Costs, Operation
from trol_edge.bundle.graph_file import TYPES
from trol_edge.bundle.manifest import Bundle, GraphInfo, Manifest, Port
from trol_edge.bundle.protobuf import protobuf_field, protobuf_fields, renamed
from trol_edge.errors import BundleError
from trol_edge.reading import guard, read_plain
from trol_edge.rope import TABLES

ENTER, LEAVE = "enter", "leave"
ATTENTION, ATTENTION_STEP, MIXTURE, HEAD = "attention", "attention_step", "mixture", "head"
HIDDEN, FIRST, SECOND, RESULT = "hidden", "first", "second", "result"
QUERY, KEY, VALUE, ATTENDED = "query", "key", "value", "attended"
CACHES = (KEY, VALUE)
_CODES = {name: code for code, name in TYPES.items()}
# Numbers of fields in ONNX's messages.
_GRAPH = 7  # of a model
_NODE, _NAME, _INITIALIZER, _INPUT, _OUTPUT, _VALUE = 1, 2, 5, 11, 12, 13  # of a graph
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _KIND = 1, 2, 3, 4  # of a node
_TENSOR_NAME, _PLACE = 8, 14  # of a tensor
_WRITES = {"TensorScatter": 1, "ScatterND": 2}  # operator -> which of its inputs are the rows that it writes
_SCALING = ("Mul", "Cast", "Reshape")


def half_name(half: str, layer: int) -> str:
    """The name of a graph and engine of a layer. half: ENTER or LEAVE."""
    return f"{half}_{layer}"


def layer_of(name: str) -> int | None:
    """The layer of a part of this name; None if it is of no layer, or of all."""
    half, _, layer = name.rpartition("_")
    return int(layer) if half in (ENTER, LEAVE) and layer.isdigit() else None


def part_names(layers: int) -> tuple[str, ...]:
    """The names of all parts of a decoder."""
    halves = (half_name(half, layer) for layer in range(layers) for half in (ENTER, LEAVE))
    return (ATTENTION, ATTENTION_STEP, *halves, MIXTURE, HEAD)


def source_of(name: str) -> str:
    """The graph of a bundle that an engine is built from, by the engine's name."""
    if name in (ATTENTION_STEP, HEAD):
        return "step"
    return "traverse" if name in (ATTENTION, MIXTURE) or layer_of(name) is not None else name


def ports_of(manifest: Manifest, name: str) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The inputs and the outputs of a part; those of all layers are alike."""
    traverse, width = manifest.graphs["traverse"], manifest.spec.hidden_size
    hidden, first, second, result = (
        Port(each, "float32", (1, "tokens", width)) for each in (HIDDEN, FIRST, SECOND, RESULT)
    )
    if name == MIXTURE:
        return (first, second), (result,)
    if name == HEAD:
        last = Port(HIDDEN, "float32", (1, 1, width))
        return (last,), tuple(p for p in manifest.graphs["step"].outputs if p.name in ("logits", "token"))
    given = {port.name: port for port in traverse.inputs}
    states = attention_ports(manifest, 1 if name == ATTENTION_STEP else "tokens")
    if name in (ATTENTION, ATTENTION_STEP):
        *new, attended = states
        past = [dataclasses.replace(given[f"past_{kind}_0"], name=f"past_{kind}") for kind in CACHES]
        present = [dataclasses.replace(port, name=port.name.replace("past_", "present_", 1)) for port in past]
        also = [given[port] for port in ("position_ids", "slots")]
        if name == ATTENTION_STEP:
            also[0] = next(port for port in manifest.graphs["step"].inputs if port.name == "position_ids")
        return (*new, *past, *also), (attended, *(present if not traverse.gives_rows else ()))
    masks = [port for port in traverse.inputs if port.name == "image_mask"]
    if name.startswith(LEAVE):
        return (hidden, states[-1], *masks), (result,)
    also = [port for port in traverse.inputs if port.name in ("position_ids", "rope_offset")]
    return (hidden, *also, *masks), states[:-1]


def attention_ports(manifest: Manifest, tokens: int | str) -> tuple[Port, ...]:
    """What goes into attention beside the caches, and what comes out, for this number of tokens."""
    cache = next(port for port in manifest.graphs["traverse"].inputs if port.name == "past_key_0")
    _, groups, _, size = cache.shape
    heads = manifest.spec.num_heads
    new = [Port(name, cache.dtype, (1, groups, tokens, size)) for name in CACHES]
    query = Port(QUERY, cache.dtype, (1, heads, tokens, size))
    return query, *new, Port(ATTENDED, cache.dtype, (1, tokens, heads * int(size)))


@dataclasses.dataclass(frozen=True)
class Part:
    """A graph that was cut out.

    info: as a manifest would have it, but for its file, which is the one that it was cut from, and its costs, which are
    those of products with weights alone.
    """

    model: bytes
    info: GraphInfo


class Parts:
    """A bundle's graphs, read once, to be cut."""

    def __init__(self, bundle: Bundle) -> None:
        """Find where to cut. Raises BundleError if the graphs are not layer after layer, in passes that are alike."""
        self._manifest, self._bundle = bundle.manifest, bundle
        self._sources = {"traverse": self._found("traverse", frozenset(bundle.manifest.spec.second_layers))}
        self._require_equal_passes()

    def _found(self, name: str, second: frozenset[int]) -> _Source:
        """Read a graph and find its borders. Raises BundleError if its layers do not attend alike."""
        graph = _read(self._bundle, name)
        with guard(self._bundle.folder, BundleError, "export it again", "its graphs cannot be cut into layers"):
            layers = graph.layers(self._manifest.spec.num_layers, second)
            attentions = [graph.attention(i, layer) for i, layer in enumerate(layers)]
        given = [each.given | _caches(i, "") for i, each in enumerate(attentions)]
        if len({graph.digest(each.attended, of) for each, of in zip(attentions, given, strict=True)}) > 1:
            raise BundleError(
                f"{self._bundle.folder}: its layers do not attend alike, so one engine cannot do it for all; "
                "build with --engines whole"
            )
        return _Source(graph, layers, attentions)

    def _source(self, name: str) -> _Source:
        """What parts of this name are cut from."""
        source = source_of(name)
        if source not in self._sources:
            self._sources[source] = self._found(source, frozenset())
        return self._sources[source]

    def _require_equal_passes(self) -> None:
        (source,), mixtures = self._sources.values(), set()
        graph = source.graph
        for i, layer in enumerate(source.layers):
            if layer.second is None or layer.mixed is None:
                continue
            passes = [
                graph.digest(layer.first, {layer.start: HIDDEN} | _caches(i, "")),
                graph.digest(layer.second, {layer.first: HIDDEN} | _caches(i, "second_")),
            ]
            if passes[0] != passes[1]:
                raise BundleError(
                    f"{self._bundle.folder}: the two passes of layer {i} do not compute alike, so one engine cannot "
                    "run both; build with --engines whole"
                )
            mixtures.add(graph.digest(layer.mixed, {layer.first: FIRST, layer.second: SECOND}))
        if len(mixtures) > 1:
            raise BundleError(
                f"{self._bundle.folder}: its layers do not mix their passes alike, so one engine cannot do it for all; "
                "build with --engines whole"
            )

    def cut(self, name: str) -> Part:
        """The graph of a part. Raises BundleError if it would have other inputs than `ports_of` says."""
        inputs, outputs = ports_of(self._manifest, name)
        source, graph = source_of(name), self._source(name).graph
        given, results = self._borders(name, outputs)
        found = graph.part(given, results)
        tables = [table for table in TABLES if table in found.inputs]
        wanted = {port.name for port in inputs} | set(tables)
        if set(found.inputs) != wanted:
            other = ", ".join(sorted(set(found.inputs) ^ wanted)[:5])
            raise BundleError(f"{self._bundle.folder}: {name}, cut from {source}.onnx, has other inputs ({other})")
        info = GraphInfo(
            file=self._manifest.graphs[source].file,
            inputs=inputs,
            outputs=outputs,
            weights=(*found.weights, *tables),
            constants=found.weights,
            operators=found.operators,
            costs=self._products(found.weights, "1" if name == HEAD else "tokens"),
        )
        new = [value for value, named in given.items() if named in CACHES] if name == ATTENTION else []
        return Part(graph.written(found, given, results, (*inputs, *outputs), new), info)

    def _borders(self, name: str, outputs: Sequence[Port]) -> tuple[dict[str, str], dict[str, str]]:
        """The values of its source that go into a part, and those that come out, with the names that they get there."""
        source = self._source(name)
        if name == HEAD:
            return {source.layers[-1].first: HIDDEN}, {port.name: port.name for port in outputs}
        if name == MIXTURE:
            mixed = next(each for each in source.layers if each.mixed is not None)
            assert mixed.second is not None and mixed.mixed is not None
            return {mixed.first: FIRST, mixed.second: SECOND}, {mixed.mixed: RESULT}
        number = layer_of(name) or 0
        layer, attention = source.layers[number], source.attentions[number]
        if name in (ATTENTION, ATTENTION_STEP):
            written = {f"{port.name}_0": port.name for port in outputs if port.name != ATTENDED}
            return attention.given | _caches(0, ""), {attention.attended: ATTENDED} | written
        if name.startswith(LEAVE):
            return {layer.start: HIDDEN, attention.attended: ATTENDED}, {layer.first: RESULT}
        return {layer.start: HIDDEN}, dict(attention.given)

    def _products(self, weights: Iterable[str], of: str) -> Costs:
        """The costs of the products with these weights alone. of: what their number is a multiple of."""
        tensors, plan = self._bundle.weights().tensors, self._manifest.plan
        wide = {"fp16": "float16", "fp32": "float32"}[plan.compute]
        operations = []
        for name in weights:
            linear = plan.linears.get(name)
            if linear is not None:
                arithmetic = linear.precision if linear.activations else wide
                numbers = math.prod(tensors[name].shape) * (2 if linear.precision == "int4" else 1)  # two in a byte
                flops = {of: 2 * numbers}
                operations.append(Operation("linear", arithmetic, None, 1, flops, tensors[name].nbytes, {}, {}))
        return Costs(tuple(operations), (), {})


def graphs_of(bundle: Bundle, names: Iterable[str]) -> dict[str, GraphInfo]:
    """The graphs of engines by their names: those of the manifest, and parts of them. Raises BundleError."""
    graphs, names = bundle.manifest.graphs, list(names)
    parts = None if graphs.keys() >= set(names) else Parts(bundle)
    return {name: graphs[name] if parts is None or name in graphs else parts.cut(name).info for name in names}


def _caches(layer: int, which: str) -> dict[str, str]:
    return {f"past_{which}{kind}_{layer}": f"past_{kind}" for kind in CACHES}


def _read(bundle: Bundle, name: str) -> _Graph:
    file = bundle.manifest.graphs[name].file
    with guard(bundle.path(file), BundleError, "export the bundle again", "not readable as an ONNX graph"):
        return _Graph(read_plain(bundle.path(file), BundleError, "export the bundle again"))


@dataclasses.dataclass(frozen=True)
class _Node:
    """kind: the operator; rest: its domain and attributes."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rest: bytes
    raw: Any


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The names of hidden states: a layer's input, results of its passes, and their mixture (None: one pass only)."""

    start: str
    first: str
    second: str | None
    mixed: str | None


@dataclasses.dataclass(frozen=True)
class _Attention:
    """The borders of a layer's attention. given: the values that go into it, and their names; attended: its result."""

    given: dict[str, str]
    attended: str


@dataclasses.dataclass(frozen=True)
class _Source:
    """A graph of the bundle, and where it is cut, layer by layer."""

    graph: _Graph
    layers: list[_Layer]
    attentions: list[_Attention]


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a part consists of: nodes by number, names of its inputs, small constants, and weights."""

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    weights: tuple[str, ...]
    operators: dict[str, int]


class _Graph:
    """A serialized model, taken apart."""

    def __init__(self, model: bytes) -> None:
        self._top = [(number, value) for number, value in protobuf_fields(memoryview(model)) if number != _GRAPH]
        (graph,) = (value for number, value in protobuf_fields(memoryview(model)) if number == _GRAPH)
        self._nodes: list[_Node] = []
        self._inputs: dict[str, Any] = {}
        self._constants: dict[str, Any] = {}
        self._types: dict[str, int] = {}
        self._name = b""
        for number, value in protobuf_fields(graph):
            if number == _NODE:
                self._nodes.append(_node(value))
            elif number == _INITIALIZER:
                self._constants[_text(value, _TENSOR_NAME)] = value
            elif number == _NAME:
                self._name = bytes(value)
            elif number in (_INPUT, _OUTPUT, _VALUE):
                name, code = _typed(value)
                self._types[name] = code
                if number == _INPUT:
                    self._inputs[name] = value
        self._makers = {name: i for i, node in enumerate(self._nodes) for name in node.outputs}
        outside = {name for name, tensor in self._constants.items() if _outside(tensor)}
        self._weights = outside | set(TABLES) & self._inputs.keys()

    def layers(self, count: int, second: frozenset[int]) -> list[_Layer]:
        """The hidden states of all layers. second: those that have a second pass."""
        flowing, readers, gate = self._flow()
        alone, live = self._alive(flowing)
        found: list[_Layer] = []
        start = next(alone[i] for i in range(min(readers[0]), -1, -1) if alone[i] is not None)
        for i in range(count):
            assert start is not None
            reads = readers[i]
            half = len(reads) // (2 if i in second else 1)
            first = _from(alone, reads[half - 1])
            if i not in second:
                found.append(_Layer(start, first, None, None))
                start = first
                continue
            beside = (live[t] - {first} for t in range(reads[-1] + 1, len(live)))
            (two,) = next(values for values in beside if len(values) == 1)
            mixed = _from(alone, max(reads[-1], next(at for at in gate if at > reads[half - 1])))
            gate = [at for at in gate if at > self._makers[mixed]]
            found.append(_Layer(start, first, two, mixed))
            start = mixed
        return found

    def attention(self, number: int, layer: _Layer) -> _Attention:
        """The borders of the attention of a layer's first pass: what depends on its caches before a weight is read."""
        caches = _caches(number, "")
        new = {named.replace("past_", "", 1): self._new_rows(cache) for cache, named in caches.items()}
        hidden, weighty, inside = {layer.start}, set(self._weights), {*caches, *new.values()}
        queries, last = set[str](), ""
        for i in self.part({layer.start: HIDDEN}, [layer.first]).nodes:
            node = self._nodes[i]
            read = set(node.inputs)
            if node.kind == "Shape":  # sizes are no hidden state
                continue
            if not read & inside:
                for values in (hidden, weighty):
                    if read & values:
                        values |= set(node.outputs)
                        break
                continue
            if read & weighty:
                last = next(name for name in node.inputs if name in inside)
                break
            queries |= read & hidden - inside
            inside |= set(node.outputs)
        while self._nodes[self._makers[last]].kind != "Reshape":  # what rounds it belongs to the product
            last = self._nodes[self._makers[last]].inputs[0]
        (query,) = {self._unscaled(name) for name in queries}
        return _Attention({query: QUERY} | {rows: kind for kind, rows in new.items()}, last)

    def _new_rows(self, cache: str) -> str:
        """The rows that are written into a cache."""
        (write,) = (node for node in self._nodes if node.kind in _WRITES and node.inputs[0] == cache)
        return write.inputs[_WRITES[write.kind]]

    def _unscaled(self, name: str) -> str:
        """A query before it is scaled, cast and reshaped, which steps and prompts do each in their own way."""
        node = self._nodes[self._makers[name]]
        while node.kind in _SCALING and all(other in self._constants for other in node.inputs[1:]):
            name = node.inputs[0]
            node = self._nodes[self._makers[name]]
        return name

    def _flow(self) -> tuple[set[str], dict[int, list[int]], list[int]]:
        """What depends on the embeddings: values; nodes that read a layer's weights, by layer; and the gate's."""
        flowing, readers, gate = {"inputs_embeds"}, dict[int, list[int]](), list[int]()
        made_of: dict[str, set[str]] = {}  # what else is computed of weights, before anything flows into it
        for i, node in enumerate(self._nodes):
            weights = {name for name in node.inputs if name in self._weights}
            weights |= {weight for name in node.inputs for weight in made_of.get(name, ())}
            if node.kind == "Shape" or not flowing & set(node.inputs):  # sizes are no hidden state
                made_of |= {name: weights for name in node.outputs if weights}
                continue
            flowing |= set(node.outputs)
            for layer in {int(w.split(".")[2]) for w in weights if w.startswith("decoder.layers.")}:
                readers.setdefault(layer, []).append(i)
            if any(w.startswith("decoder.gate.") for w in weights):
                gate.append(i)
        return flowing, readers, gate

    def _alive(self, flowing: set[str]) -> tuple[list[str | None], list[set[str]]]:
        """Before each node: the flowing values that are read from then on, and the one if it is alone."""
        last: dict[str, int] = {}
        for i, node in enumerate(self._nodes):
            last |= {name: i for name in node.inputs if name in flowing}
        live, found, alone = {"inputs_embeds"}, list[set[str]](), list[str | None]()
        for i, node in enumerate(self._nodes):
            found.append(set(live))
            alone.append(next(iter(live)) if len(live) == 1 else None)
            live = {name for name in (*live, *node.outputs) if last.get(name, -1) > i}
        return alone, found

    def part(self, given: Mapping[str, str], results: Iterable[str]) -> _Found:
        """What computes the results. given: values that are inputs, and the names that they get there."""
        nodes, inputs, constants = set[int](), set[str](), set[str]()
        todo = list(results)
        while todo:
            name = todo.pop()
            if name in given or name in self._inputs:
                inputs.add(given.get(name, name))
            elif name in self._constants:
                constants.add(name)
            elif (maker := self._makers[name]) not in nodes:
                nodes.add(maker)
                todo += [read for read in self._nodes[maker].inputs if read]
        return _Found(
            nodes=tuple(sorted(nodes)),
            inputs=tuple(sorted(inputs)),
            constants=tuple(sorted(constants)),
            weights=tuple(name for name in sorted(constants) if name in self._weights),
            operators=dict(sorted(Counter(self._nodes[i].kind for i in nodes).items())),
        )

    def digest(self, result: str, given: Mapping[str, str]) -> str:
        """A hash of how a result is computed, in which only the names of inputs and weights count.

        A given value that is cast is the same value in another type.
        """
        found = self.part(given, [result])
        known = {name: f"{named} {self._types[name]}" for name, named in given.items()}
        known |= {name: name for name in self._inputs if name not in given}
        for name in found.constants:
            tensor = self._constants[name]
            rest = [protobuf_field(n, v) for n, v in protobuf_fields(tensor) if n != _TENSOR_NAME]
            known[name] = name if name in self._weights else _hash(*rest)
        for i in found.nodes:
            node = self._nodes[i]
            if node.kind == "Cast" and node.inputs[0] in given:
                known[node.outputs[0]] = f"{given[node.inputs[0]]} {self._types[node.outputs[0]]}"
                continue
            read = [known.get(name, name).encode() for name in node.inputs]
            known |= {
                name: _hash(node.kind.encode(), node.rest, *read, str(place).encode())
                for place, name in enumerate(node.outputs)
            }
        return known[result]

    def written(
        self,
        found: _Found,
        given: Mapping[str, str],
        results: Mapping[str, str],
        ports: Sequence[Port],
        new: Collection[str],
    ) -> bytes:
        """Serialize a part. Hidden states of another type than float32 are cast at the borders.

        new: values with a row for each token. A traverse picks rows of them for as many slots as there are tokens, and
        a step has more slots, so here whoever picks gets the last row for these. They are masked anyway.
        """
        names, casts = dict(given), list[bytes]()
        after = list[bytes]()
        by_name = {port.name: port for port in ports}
        for inner, outer in (*given.items(), *results.items()):
            names[inner] = outer
            if _CODES[by_name[outer].dtype] != self._types[inner]:
                names[inner] = f"{outer}.inner"
                if inner in given:
                    casts.append(_cast(outer, names[inner], self._types[inner]))
                else:
                    after.append(_cast(names[inner], outer, _CODES[by_name[outer].dtype]))
        parts = [protobuf_field(_NODE, cast) for cast in casts]
        for i in found.nodes:
            node = self._nodes[i]
            if node.kind == "Gather" and node.inputs[0] in new:
                within = f"{node.inputs[1]}.within.{i}"
                parts += [protobuf_field(_NODE, each) for each in _at_most_last(node.inputs[1], within)]
                parts.append(
                    protobuf_field(
                        _NODE, renamed(node.raw, (_NODE_INPUT, _NODE_OUTPUT), {**names, node.inputs[1]: within})
                    )
                )
            else:
                parts.append(protobuf_field(_NODE, renamed(node.raw, (_NODE_INPUT, _NODE_OUTPUT), names)))
        parts += [protobuf_field(_NODE, cast) for cast in after]
        parts.append(protobuf_field(_NAME, self._name))
        parts += [protobuf_field(_INITIALIZER, self._constants[name]) for name in found.constants]
        for name in found.inputs:
            parts.append(protobuf_field(_INPUT, _port(by_name[name]) if name in by_name else self._inputs[name]))
        parts += [protobuf_field(_OUTPUT, _port(by_name[name])) for name in results.values()]
        return b"".join([*(protobuf_field(n, v) for n, v in self._top), protobuf_field(_GRAPH, b"".join(parts))])


def _from(alone: Sequence[str | None], place: int) -> str:
    """The first value that is alone after a node."""
    return next(name for name in alone[place + 1 :] if name is not None)


def _node(raw: Any) -> _Node:
    fields = list(protobuf_fields(raw))
    inputs, outputs = (tuple(bytes(v).decode() for n, v in fields if n == of) for of in (_NODE_INPUT, _NODE_OUTPUT))
    rest = [protobuf_field(n, v) for n, v in fields if n not in (_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _KIND)]
    return _Node(_text(raw, _KIND), inputs, outputs, b"".join(sorted(rest)), raw)


def _cast(source: str, target: str, code: int) -> bytes:
    return _operator("Cast", [source], target, _whole("to", code))


def _at_most_last(rows: str, target: str) -> list[bytes]:
    """Numbers of rows, none above the number of tokens less one."""
    count, one, last = (f"{target}.{what}" for what in ("count", "one", "last"))
    return [
        _operator("Shape", ["position_ids"], count, _whole("start", 1), _whole("end", 2)),
        _operator(
            "Constant", [], one, protobuf_field(1, b"value_ints") + protobuf_field(8, 1) + protobuf_field(20, 7)
        ),  # type INTS
        _operator("Sub", [count, one], last),
        _operator("Min", [rows, last], target),
    ]


def _operator(kind: str, inputs: Sequence[str], output: str, *attributes: bytes) -> bytes:
    fields = [
        *(protobuf_field(_NODE_INPUT, name.encode()) for name in inputs),
        protobuf_field(_NODE_OUTPUT, output.encode()),
    ]
    fields += [protobuf_field(_NODE_NAME, f"{kind}_{output}".encode()), protobuf_field(_KIND, kind.encode())]
    return b"".join([*fields, *(protobuf_field(5, attribute) for attribute in attributes)])


def _whole(name: str, number: int) -> bytes:
    """An attribute."""
    return protobuf_field(1, name.encode()) + protobuf_field(3, number) + protobuf_field(20, 2)  # name, i, type INT


def _port(port: Port) -> bytes:
    """ValueInfoProto of a port."""
    sizes = [protobuf_field(1, d) if isinstance(d, int) else protobuf_field(2, d.encode()) for d in port.shape]
    tensor = protobuf_field(1, _CODES[port.dtype]) + protobuf_field(
        2, b"".join(protobuf_field(1, size) for size in sizes)
    )
    return protobuf_field(1, port.name.encode()) + protobuf_field(2, protobuf_field(1, tensor))


def _typed(value: Any) -> tuple[str, int]:
    """The name of a value, and the number of its type."""
    parts = dict(protobuf_fields(value))
    tensor = dict(protobuf_fields(dict(protobuf_fields(parts[2]))[1])) if 2 in parts else {}
    return bytes(parts[1]).decode(), tensor.get(1, 0)


def _outside(tensor: Any) -> bool:
    return any(number == _PLACE and value for number, value in protobuf_fields(tensor))


def _text(raw: Any, number: int) -> str:
    return next(bytes(value).decode() for of, value in protobuf_fields(raw) if of == number)


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
