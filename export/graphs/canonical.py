"""Traces the model into ONNX graphs of standard opset-23 operators, with the traversal loop unrolled.

No weights are needed. Names of values tell layer and pass: layers.3.second.linear_4.

| graph         | inputs                                                           | outputs                   |
|---------------|------------------------------------------------------------------|---------------------------|
| vision        | pixel_values [N,3,P,P]                                           | image_features [N,I,D]    |
| traverse      | inputs_embeds [1,S,D], position_ids [1,S], slots [T],            | logits [1,V], both caches |
|               | image_mask [1,S,1], both caches                                  |                           |
| traverse_text | the same without image_mask: no LoRA in the graph                | logits [1,V], both caches |
| step          | inputs_embeds [1,1,D], position_ids [1,1], first cache           | logits [1,V], first cache |
| layers        | those of traverse, but the first cache only; a layer's input     | hidden_<i> [1,S,D] of     |
|               | (of any layer) as inputs_embeds                                  | every layer, first cache  |
| mix           | first [1,S,D], second [1,S,D] (what two passes gave)             | mixed [1,S,D]             |
| head          | inputs_embeds [1,1,D]                                            | logits [1,V]              |

The last three serve a CPU that holds 4-bit weights once (export/graphs/layers.py). A family without LoRA has neither
image_mask nor traverse_text. A family whose rotary embedding has two factor sets has one more input in traverse and
step, rope_offset [1] int64. It says how many rows of the rope tables to skip (see `model.graph_rope_tables`), so that
one graph serves both sets.
The first cache holds keys and values of the first pass: for every layer i, past_key_<i> and past_value_<i> [1,G,C,E] in
and present_key_<i> and present_value_<i> out. The second cache holds those of the second pass, for the layers that have
one (`spec.second_layers`); its names are past_second_key_<i> and so on. New rows are written with ScatterND, so past
and present may be bound to the same memory, and the write is then in place. Logits are those of the last token. N, S
and T are dynamic, the capacity C is fixed.

`traverse` extends a prefix of any length: tokens at positions P..P+S-1 attend, pass by pass, to the rows that the
caches hold for 0..P-1 and to each other. `slots` is 0..T-1 with T = P+S. Its length says how much of the caches to read
(a Slice, so a prompt without a prefix costs its own length and not C), and its values make the causal mask.
Without a prefix the second cache is scratch that one layer uses at a time, so all layers may be bound to one pair of
buffers. Both passes use the same weights, which are in the graph once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trol_edge._version import __version__
from trol_edge.bundle.names import HEAD, KINDS, LAYERS, MIX, cache_name
from trol_edge.bundle.spec import ModelSpec
from trol_edge.errors import ExportError
from trol_edge.export.graphs.assembly import Assembly, Piece
from trol_edge.export.reference.family import Family
from trol_edge.export.reference.model import Decoder

OPSET = 23
IR_VERSION = 11
TRACED = ("vision", "traverse", "step")  # traverse_text is derived from traverse
EMBEDS, _PIXELS = "inputs_embeds", "pixel_values"


class _CachedAttention:
    """`Attend` in ONNX operators, for one layer and pass: RotaryEmbedding, ScatterND into the cache, Attention.

    past: its keys and values. A traverse attends to their first T rows, a step to all rows up to its own position.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rope: tuple[Tensor, Tensor],
        positions: Tensor,
        rope_rows: Tensor,
        past: tuple[Tensor, Tensor],
        slots: Tensor | None,
    ) -> None:
        self.spec, self.rope, self.rope_rows, self.slots = spec, rope, rope_rows, slots
        self.past = self.present = past
        heads = torch.arange(spec.num_kv_heads)[:, None].expand(-1, positions.shape[1])  # [G, S]
        rows = positions.expand(spec.num_kv_heads, -1)
        # Where the new rows go: (0, key/value head, position).
        self.rows = torch.stack((torch.zeros_like(heads), heads, rows), dim=-1)[None]  # [1, G, S, 3]
        seen = torch.arange(past[0].shape[2]) if slots is None else slots
        self.visible = seen[None, None, None] <= positions[:, None, :, None]  # [1, 1, S, T]; step: [1, 1, 1, C]
        if slots is not None:
            self.slice = [_ints(0), _operator("Shape", (slots,), torch.int64, (1,)), _ints(2)]  # start, end, axis

    def __call__(self, qkv: Tensor, layer: int, traversal: int) -> Tensor:
        h, g, e = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        batch, length, _ = qkv.shape
        parts = qkv.split((h * e, g * e, g * e), dim=-1)
        q, k, v = (t.view(batch, length, -1, e).transpose(1, 2) for t in parts)  # [1, heads, S, E]
        q, k = (torch.onnx.ops.rotary_embedding(t, *self.rope, self.rope_rows) for t in (q, k))
        keys, values = (self._write(past, new) for past, new in zip(self.past, (k, v), strict=True))
        self.present = keys, values
        context = torch.onnx.ops.attention(q, self._seen(keys), self._seen(values), self.visible)[0]
        return context.transpose(1, 2).reshape(batch, length, h * e)

    def _write(self, past: Tensor, new: Tensor) -> Tensor:
        """Put the new rows [1, G, S, E] into a cache [1, G, C, E]."""
        return _operator("ScatterND", (past, self.rows, new), past.dtype, past.shape)

    def _seen(self, cache: Tensor) -> Tensor:
        """The rows of a cache to attend to, which are the first T or all."""
        if self.slots is None:
            return cache
        batch, heads, _, size = cache.shape
        return _operator("Slice", (cache, *self.slice), cache.dtype, (batch, heads, self.slots.shape[0], size))


def _operator(
    name: str, operands: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[Any], attributes: Any = None
) -> Tensor:
    return torch.onnx.ops.symbolic(name, operands, attributes or {}, dtype=dtype, shape=shape, version=OPSET)


def _ints(*values: int) -> Tensor:
    # torch.tensor would make a real tensor among fake ones, which stops the optimizer.
    return _operator("Constant", (), torch.int64, (len(values),), {"value_ints": list(values)})


class _DecoderGraph(nn.Module):
    """One pass of a layer, and the output layer; in a traverse the mixture with a second pass, too."""

    def __init__(self, spec: ModelSpec, decoder: Decoder, capacity: int) -> None:
        super().__init__()
        self.spec, self.decoder = spec, decoder
        rows = capacity + (spec.long_rope.short_rows(capacity) if spec.long_rope else 0)
        self.rope = nn.ParameterDict({k: nn.Parameter(torch.empty(rows, spec.head_dim // 2)) for k in ("cos", "sin")})

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        extra: dict[str, Tensor],
        past: list[Tensor],
        second: list[Tensor],
    ) -> list[Tensor]:
        rows = position_ids + extra["rope_offset"] if "rope_offset" in extra else position_ids
        rope = self.rope["cos"], self.rope["sin"]
        keys, values = past
        attend = _CachedAttention(self.spec, rope, position_ids, rows, (keys, values), extra.get("slots"))
        hidden = self.decoder.layers[0](inputs_embeds, extra.get("image_mask"), 0, 0, attend)
        mixed = [self.decoder.mix(hidden, each)[0] for each in second]
        last = [hidden, *mixed][-1][:, -1:]
        return [hidden, *attend.present, *mixed, self.decoder.logits(last)[:, 0]]


class _VisionGraph(nn.Module):
    """The tower with one layer, and what goes into the layer and comes out of it."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        vision: Any = self.vision
        before, after = vision.encode(pixel_values)
        return [before, after, vision.features(after)]


def trace(name: str, family: Family, spec: ModelSpec, capacity: int) -> ir.Model:
    """Trace a graph (but not traverse_text) with a cache of `capacity` tokens; its weights have no values.

    No parameter is allocated, because everything is traced with fake tensors. A model with one layer is traced, and the
    loops over layers and passes put copies of its pieces together, so that 32 layers take as long as one.
    """
    assembly = Assembly()
    vision = dataclasses.replace(spec.vision, num_layers=1)
    one = dataclasses.replace(spec, num_layers=1, traversed=None, vision=vision)
    if name == "vision":
        outputs = _vision_graph(assembly, _tower(family, one), spec.vision.num_layers)
    else:
        pieces = _decoder(family, one, capacity, name in ("step", HEAD))
        outputs = _decoder_graph(assembly, pieces, spec, name)
    graph = assembly.graph(outputs, OPSET)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="trol-edge", producer_version=__version__)


def trace_one(name: str, family: Family, one: ModelSpec, capacity: int) -> ir.Model:
    """Trace a vision, traverse or step graph of one layer, with outputs at the seams of its pieces.

    All of the time that `trace` takes goes by here.
    """
    graph = _export_tower(family, one) if name == "vision" else _export_decoder(family, one, capacity, name == "step")
    return ir.Model(graph, ir_version=IR_VERSION)


def _vision_graph(assembly: Assembly, pieces: _Tower, layers: int) -> dict[str, ir.Value]:
    (x,) = assembly.add(pieces.embed, assembly.inputs_for(pieces.embed, _PIXELS))
    for i in range(layers):
        (x,) = assembly.add(pieces.layer, (x,), i)
    return {"image_features": assembly.add(pieces.features, (x,))[0]}


def _decoder_graph(assembly: Assembly, pieces: _Decoder, spec: ModelSpec, name: str) -> dict[str, ir.Value]:
    if name == HEAD:
        return {"logits": assembly.add(pieces.head, assembly.inputs_for(pieces.head, EMBEDS))[0]}
    if name == MIX:
        return {"mixed": assembly.add(pieces.mix, assembly.inputs_for(pieces.mix, "first", "second"))[0]}
    return _unroll(assembly, pieces, spec, name)


def _unroll(assembly: Assembly, pieces: _Decoder, spec: ModelSpec, name: str) -> dict[str, ir.Value]:
    embeds, *pasts = pieces.one_pass.given
    x = assembly.input(embeds, EMBEDS)
    for value in pieces.one_pass.inputs:
        assembly.input(value, value.name or "")
    sets = spec.cached_layers if name == "traverse" else spec.cached_layers[:1]
    caches = [(i, second) for second, layers in enumerate(sets) for i in layers]
    past = {
        (i, second): [
            assembly.input(v, cache_name("past", kind, i, second)) for kind, v in zip(KINDS, pasts, strict=True)
        ]
        for i, second in caches
    }
    present: dict[str, ir.Value] = {}

    def run(x: ir.Value, i: int, second: int) -> ir.Value:
        x, *new = assembly.add(pieces.one_pass, (x, *past[i, second]), i, ("first", "second")[second])
        present.update(zip((cache_name("present", kind, i, second) for kind in KINDS), new, strict=True))
        return x

    outputs: dict[str, ir.Value] = {}
    for i in range(spec.num_layers):
        first = run(x, i, 0)
        if name == LAYERS:
            outputs[f"hidden_{i}"] = first
        elif (i, 1) in caches:
            (x,) = assembly.add(pieces.mix, (first, run(first, i, 1)), i)
        else:
            x = first
    if name != LAYERS:
        (outputs["logits"],) = assembly.add(pieces.head, (x,))
    names = [cache_name("present", kind, i, second) for i, second in caches for kind in KINDS]
    return outputs | {each: present[each] for each in names}


class _Decoder(NamedTuple):
    """What a decoder's graphs consist of. one_pass: x, key and value cache -> x and both caches; mix: x of both passes
    -> x; head: x -> logits of the last token.
    """

    one_pass: Piece
    mix: Piece
    head: Piece


class _Tower(NamedTuple):
    """embed: pictures -> x; layer: x -> x; features: x -> image features."""

    embed: Piece
    layer: Piece
    features: Piece


@functools.lru_cache(maxsize=8)
def _decoder(family: Family, one: ModelSpec, capacity: int, step: bool) -> _Decoder:
    """The pieces for any number of tokens, or for one token of a step, which needs neither `slots` nor LoRA nor mix."""
    name = "step" if step else "traverse"
    graph = trace_one(name, family, one, capacity).graph
    inputs = {value.name: value for value in graph.inputs}
    hidden, key, value, *mixed, logits = graph.outputs
    given = [inputs[EMBEDS], *(inputs[f"past_{kind}"] for kind in KINDS)]
    one_pass = Piece(name, "pass", graph, given, [hidden, key, value])
    mix = Piece(name, "mix", graph, [hidden, *(inputs["second"] for _ in mixed)], mixed)
    return _Decoder(one_pass, mix, Piece(name, "head", graph, mixed or [hidden], [logits]))


def _export_decoder(family: Family, one: ModelSpec, capacity: int, step: bool) -> ir.Graph:
    length = 1 if step else 8  # the trace works with any length above one
    tokens: dict[int, Any] = {} if step else {1: _dim("tokens")}
    extra: dict[str, Tensor] = {}
    shapes: dict[str, Any] = {}
    with FakeTensorMode():
        decoder = family.decoder(one)
        assert isinstance(decoder, Decoder)
        past = [torch.empty(1, one.num_kv_heads, capacity, one.head_dim) for _ in KINDS]
        if not step:
            extra["slots"], shapes["slots"] = torch.zeros(length + 3, dtype=torch.int64), {0: _dim("slots")}
        if one.long_rope:
            extra["rope_offset"], shapes["rope_offset"] = torch.zeros(1, dtype=torch.int64), {}
        if not step and one.lora_rank:
            extra["image_mask"], shapes["image_mask"] = torch.empty(1, length, 1), tokens
        second = [] if step else [torch.empty(1, length, one.hidden_size)]
        positions = torch.zeros(1, length, dtype=torch.int64)
        args = (torch.empty(1, length, one.hidden_size), positions, extra, past, second)
        graph = _export(
            _DecoderGraph(one, decoder, capacity),
            args,
            (tokens, tokens, shapes, [{} for _ in past], [tokens for _ in second]),
            [EMBEDS, "position_ids", *extra, *(f"past_{kind}" for kind in KINDS), *("second" for _ in second)],
            ["hidden", *(f"present_{kind}" for kind in KINDS), *("mixed" for _ in second), "logits"],
        )
    inputs = {value.name: value for value in graph.inputs}
    for value in graph.inputs:
        for node, at in list(value.uses()):
            if node.op_type == "Shape" and value.name in (EMBEDS, "second"):
                # S, which the positions have, too. Read there, the places of new rows are computed once for all passes.
                assert [node.attributes[bound].as_int() for bound in ("start", "end")] == [1, 2]
                node.replace_input_with(at, inputs["position_ids"])
    return graph


@functools.lru_cache(maxsize=8)
def _tower(family: Family, one: ModelSpec) -> _Tower:
    graph = trace_one("vision", family, one, 0).graph
    before, after, features = graph.outputs
    return _Tower(
        Piece("vision", "embed", graph, graph.inputs, [before]),
        Piece("vision", "layer", graph, [before], [after]),
        Piece("vision", "features", graph, [after], [features]),
    )


def _export_tower(family: Family, one: ModelSpec) -> ir.Graph:
    with FakeTensorMode():
        pixels = torch.empty(2, 3, one.vision.image_size, one.vision.image_size)
        module = _VisionGraph(family.vision(one))
        return _export(module, (pixels,), ({0: _dim("images")},), [_PIXELS], ["before", "after", "features"])


def _dim(name: str) -> Any:
    return torch.export.Dim(name, min=1)


def _export(
    module: nn.Module, args: tuple[Any, ...], shapes: tuple[Any, ...], inputs: list[str], outputs: list[str]
) -> ir.Graph:
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            args,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )
        if program is None:
            raise ExportError("the trace returned nothing; this is a fault of trol-edge, please report it")
        model, parameters = program.model, set(module.state_dict())
        for value in model.graph.initializers.values():
            if value.name in parameters:
                value.const_value = None  # it is fake, so nothing below may read it
        onnxscript.optimizer.optimize(model)
    # Stack traces are most of the file's bytes, and their paths would make the file differ between machines.
    common.ClearMetadataAndDocStringPass()(model)
    return model.graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, whose remarks about our own, tested trace are noise to a user."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def without_lora(traverse: ir.Model) -> ir.Model:
    """Make traverse_text, a copy of the traverse graph for prompts without image tokens.

    If the image mask is zero everywhere, the low-rank terms (the only users of the mask) add nothing.
    """
    model = traverse.clone()
    mask = next(value for value in model.graph.inputs if value.name == "image_mask")
    for masked, _ in mask.uses():
        (widened,) = (node for node, _ in masked.outputs[0].uses())
        (added,) = (node for node, _ in widened.outputs[0].uses())
        if (masked.op_type, widened.op_type, added.op_type) != ("Mul", "MatMul", "Add"):
            raise ExportError(f"unexpected use of image_mask by {masked.name}; this is a fault of trol-edge")
        base = next(value for value in added.inputs if value is not widened.outputs[0])
        assert base is not None
        added.outputs[0].replace_all_uses_with(base)
    model.graph.inputs.remove(mask)
    common.RemoveUnusedNodesPass()(model)
    return model


def weight_names(model: ir.Model) -> list[str]:
    """Names of the initializers without a value, which the graph reads from the weights file."""
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def fold_transposes(model: ir.Model) -> set[str]:
    """Let Linear weights be stored as MatMul reads them, [in, out]; returns the names of those that are.

    The trace has Transpose(weight) before each MatMul. If it stayed in the graph, loading would compute a second copy
    of every weight in every session.
    """
    folded = set()
    for name in weight_names(model):
        value = model.graph.initializers[name]
        users = [node for node, _ in value.uses()]
        if users and all(node.op_type == "Transpose" and len(node.outputs[0].shape or ()) == 2 for node in users):
            for node in users:
                node.outputs[0].replace_all_uses_with(value)
                model.graph.remove(node, safe=True)
            assert value.shape is not None
            value.shape = ir.Shape(tuple(reversed(value.shape.dims)))
            folded.add(name)
    return folded


def weights_as_inputs(model: ir.Model, which: Collection[str]) -> list[str]:
    """Turn these parameters into graph inputs, int8 as they are or float32; returns their names, in input order.

    ONNX Runtime on a CPU shares one buffer of a weight between all sessions only if the weight is an input.
    Initializers are copied, and packed, once per session.
    """
    names = [name for name in weight_names(model) if name in which]
    for name in names:
        value = model.graph.initializers.pop(name)
        if value.dtype != ir.DataType.INT8:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.inputs.append(value)
    return names


def weights_from_file(
    model: ir.Model, location: str, offsets: dict[str, tuple[ir.DataType, int, int]], as_inputs: Collection[str] = ()
) -> None:
    """Point the parameters into a weights file; those of `as_inputs` become inputs.

    offsets: name -> (dtype, offset, bytes). If the graph reads a parameter as float32 and the file has it in fewer
    bits, a Cast is inserted.
    """
    for name in weight_names(model):
        value = model.graph.initializers[name]
        dtype, offset, length = offsets[name]
        assert value.shape is not None
        stored = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        if name not in as_inputs:
            stored.const_value = ir.ExternalTensor(location, offset, length, dtype, shape=value.shape, name=name)
        del model.graph.initializers[name]
        if dtype == value.dtype:
            value.replace_all_uses_with(stored)
        else:
            cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT})
            cast.outputs[0].name = f"{name}.float32"
            cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
            model.graph.insert_before(model.graph[0], cast)
            value.replace_all_uses_with(cast.outputs[0])
        if name in as_inputs:
            model.graph.inputs.append(stored)
        else:
            model.graph.register_initializer(stored)
