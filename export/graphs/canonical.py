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
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trol_edge._version import __version__
from trol_edge.bundle.names import HEAD, LAYERS, MIX
from trol_edge.bundle.spec import ModelSpec
from trol_edge.errors import ExportError
from trol_edge.export.graphs.assembly import Assembly, Piece
from trol_edge.export.reference.family import Family
from trol_edge.export.reference.model import Decoder

OPSET = 23
IR_VERSION = 11
TRACED = ("vision", "traverse", "step")  # traverse_text is derived from traverse
EMBEDS, _PIXELS = "inputs_embeds", "pixel_values"
_KINDS = ("key", "value")
_PASSES = ("first", "second")  # in names of values


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


class _PassGraph(nn.Module):
    """One pass of one layer."""

    def __init__(self, spec: ModelSpec, decoder: Decoder, capacity: int) -> None:
        super().__init__()
        self.spec, self.decoder = spec, decoder
        rows = capacity + (spec.long_rope.short_rows(capacity) if spec.long_rope else 0)
        self.rope = nn.ParameterDict({k: nn.Parameter(torch.empty(rows, spec.head_dim // 2)) for k in ("cos", "sin")})

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, extra: dict[str, Tensor], past: tuple[Tensor, Tensor]
    ) -> list[Tensor]:
        rows = position_ids + extra["rope_offset"] if "rope_offset" in extra else position_ids
        rope = self.rope["cos"], self.rope["sin"]
        attend = _CachedAttention(self.spec, rope, position_ids, rows, past, extra.get("slots"))
        hidden = self.decoder.layers[0](inputs_embeds, extra.get("image_mask"), 0, 0, attend)
        return [hidden, *attend.present]


class _MixGraph(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        return [self.decoder.mix(first, second)[0]]


class _HeadGraph(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, inputs_embeds: Tensor) -> list[Tensor]:
        return [self.decoder.logits(inputs_embeds[:, -1:])[:, 0]]


class _VisionGraph(nn.Module):
    """A part of the vision tower: "embed", "layer" (the first) or "features"."""

    def __init__(self, vision: nn.Module, part: str) -> None:
        super().__init__()
        self.vision, self.part = vision, part

    def forward(self, x: Tensor) -> list[Tensor]:
        vision: Any = self.vision
        return [vision.layers[0](x) if self.part == "layer" else getattr(vision, self.part)(x)]


def trace(name: str, family: Family, spec: ModelSpec, capacity: int) -> ir.Model:
    """Trace a graph (but not traverse_text) with a cache of `capacity` tokens; its weights have no values.

    No parameter is allocated, because everything is traced with fake tensors. What layers have in common is traced
    once: a pass, the gate, the output layer. The loop over layers and passes puts copies of these together, so that 32
    layers take as long as one.
    """
    if name == "vision":
        return _model(_vision(family, spec))
    one = dataclasses.replace(spec, num_layers=1, traversed=None)
    if name == MIX:
        return _model(_mix(family, one).graph.clone())
    if name == HEAD:
        return _model(_head(family, one, dynamic=False).graph.clone())
    one_pass = _one_pass(family, one, capacity, dynamic=name != "step")
    *given, past_key, past_value = one_pass.graph.inputs
    assembly = Assembly()
    for value in given:
        assembly.add_input(value, value.name or "")
    sets = spec.cached_layers if name == "traverse" else spec.cached_layers[:1]
    caches = [(i, second) for second, layers in enumerate(sets) for i in layers]
    for i, second in caches:
        for kind, value in zip(_KINDS, (past_key, past_value), strict=True):
            assembly.add_input(value, _cache("past", kind, i, second))
    present: dict[str, ir.Value] = {}

    def run(x: ir.Value, i: int, second: int) -> ir.Value:
        pasts = (assembly.inputs[_cache("past", kind, i, second)] for kind in _KINDS)
        x, *new = assembly.add(one_pass, (x, *pasts), i, _PASSES[second])
        present.update(zip((_cache("present", kind, i, second) for kind in _KINDS), new, strict=True))
        return x

    x = assembly.inputs[EMBEDS]
    if name == LAYERS:
        outputs = {f"hidden_{i}": run(x, i, 0) for i in range(spec.num_layers)}
    else:
        for i in range(spec.num_layers):
            first = x = run(x, i, 0)
            if (i, 1) in caches:
                (x,) = assembly.add(_mix(family, one), (first, run(first, i, 1)), i)
        (logits,) = assembly.add(_head(family, one, dynamic=name == "traverse"), (x,))
        outputs = {"logits": logits}
    names = [_cache("present", kind, i, second) for i, second in caches for kind in _KINDS]
    return _model(assembly.graph(outputs | {n: present[n] for n in names}, OPSET))


def _vision(family: Family, spec: ModelSpec) -> ir.Graph:
    one = dataclasses.replace(spec, vision=dataclasses.replace(spec.vision, num_layers=1))
    embed = _tower(family, one, "embed")
    assembly = Assembly()
    assembly.add_input(embed.graph.inputs[0], _PIXELS)
    (x,) = assembly.add(embed, [assembly.inputs[_PIXELS]])
    for i in range(spec.vision.num_layers):
        (x,) = assembly.add(_tower(family, one, "layer"), [x], i)
    (x,) = assembly.add(_tower(family, one, "features"), [x])
    return assembly.graph({"image_features": x}, OPSET)


def _cache(prefix: str, kind: str, layer: int, second: int) -> str:
    return f"{prefix}{'_second' * second}_{kind}_{layer}"


def _model(graph: ir.Graph) -> ir.Model:
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="trol-edge", producer_version=__version__)


# Pieces, of which `Assembly` makes copies.


@functools.lru_cache(maxsize=8)
def _one_pass(family: Family, one: ModelSpec, capacity: int, dynamic: bool) -> Piece:
    """A pass of a layer over any number of tokens, or over one, which needs neither `slots` nor LoRA."""
    length = 8 if dynamic else 1  # the trace works with any length above one
    tokens: dict[int, Any] = {1: _dim("tokens")} if dynamic else {}
    extra: dict[str, Tensor] = {}
    shapes: dict[str, Any] = {}
    with FakeTensorMode():
        past = [torch.empty(1, one.num_kv_heads, capacity, one.head_dim) for _ in _KINDS]
        if dynamic:
            extra["slots"], shapes["slots"] = torch.zeros(length + 3, dtype=torch.int64), {0: _dim("slots")}
        if one.long_rope:
            extra["rope_offset"], shapes["rope_offset"] = torch.zeros(1, dtype=torch.int64), {}
        if dynamic and one.lora_rank:
            extra["image_mask"], shapes["image_mask"] = torch.empty(1, length, 1), tokens
        module = _PassGraph(one, _decoder(family, one), capacity)
        positions = torch.zeros(1, length, dtype=torch.int64)
        args = (torch.empty(1, length, one.hidden_size), positions, extra, past)
        pasts = [f"past_{kind}" for kind in _KINDS]
        inputs = [EMBEDS, "position_ids", *extra, *pasts]
        outputs = ["hidden", *(f"present_{kind}" for kind in _KINDS)]
        graph = _export(module, args, (tokens, tokens, shapes, [{}, {}]), inputs, outputs)
    hidden, places, *_ = graph.inputs
    for node, at in list(hidden.uses()):
        if (
            node.op_type == "Shape"
        ):  # S, of which the positions know, too; so the places are computed once for all passes
            assert [node.attributes[bound].as_int() for bound in ("start", "end")] == [1, 2]
            node.replace_input_with(at, places)
    return Piece("pass", graph, (EMBEDS, *pasts))


@functools.lru_cache(maxsize=8)
def _mix(family: Family, one: ModelSpec) -> Piece:
    names = ["first", "second"]
    with FakeTensorMode():
        both = tuple(torch.empty(1, 8, one.hidden_size) for _ in names)
        shapes = ({1: _dim("tokens")},) * len(names)
        return Piece("mix", _export(_MixGraph(_decoder(family, one)), both, shapes, names, ["mixed"]), names)


@functools.lru_cache(maxsize=8)
def _head(family: Family, one: ModelSpec, dynamic: bool) -> Piece:
    """The output layer, for the last of any number of tokens or for one."""
    with FakeTensorMode():
        tokens = (torch.empty(1, 8 if dynamic else 1, one.hidden_size),)
        shapes = ({1: _dim("tokens")} if dynamic else {},)
        graph = _export(_HeadGraph(_decoder(family, one)), tokens, shapes, [EMBEDS], ["logits"])
    return Piece("head", graph, [EMBEDS])


@functools.lru_cache(maxsize=8)
def _tower(family: Family, one: ModelSpec, part: str) -> Piece:
    """A part of the vision tower, with one layer, for any number of pictures."""
    tower = one.vision
    with FakeTensorMode():
        vision: Any = family.vision(one)
        x = torch.empty(2, 3, tower.image_size, tower.image_size)
        if part != "embed":
            x = torch.empty(*vision.embed(x).shape)
        graph = _export(_VisionGraph(vision, part), (x,), ({0: _dim("images")},), [_PIXELS], ["image_features"])
    return Piece(part, graph, [_PIXELS])


def _decoder(family: Family, spec: ModelSpec) -> Decoder:
    decoder = family.decoder(spec)
    assert isinstance(decoder, Decoder)
    return decoder


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
