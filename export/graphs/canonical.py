"""Traces the model into ONNX graphs of standard opset-23 operators, with the traversal loop unrolled.

No weights are needed.

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
from trol_edge.bundle.spec import ModelSpec
from trol_edge.errors import ExportError
from trol_edge.export.reference.family import Family
from trol_edge.export.reference.model import Decoder

OPSET = 23
IR_VERSION = 11
TRACED = ("vision", "traverse", "step")  # traverse_text is derived from traverse


def cache_names(spec: ModelSpec, prefix: str) -> list[str]:
    """Names of the cache tensors in graph order. prefix is "past" or "present", or "past_second" ... for pass two."""
    layers = spec.cached_layers[prefix.endswith("_second")]
    return [f"{prefix}_{kind}_{i}" for i in layers for kind in ("key", "value")]


class _CachedAttention:
    """`Attend` in ONNX operators: RotaryEmbedding, ScatterND into the cache, Attention.

    A traverse attends to the first T rows of its pass's cache, a step to the whole first cache up to its own position.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rope: tuple[Tensor, Tensor],
        positions: Tensor,
        rope_rows: Tensor,
        past: list[Tensor],
        slots: Tensor | None,
    ) -> None:
        self.spec, self.rope, self.rope_rows, self.slots = spec, rope, rope_rows, slots
        self.cache = list(past)
        passes = [(i, traversal) for traversal, layers in enumerate(spec.cached_layers) for i in layers]
        self.place = {passed: 2 * at for at, passed in enumerate(passes)}  # of a pass's keys in the cache
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
        first = self.place[layer, traversal]
        keys, values = self._write(first, k), self._write(first + 1, v)
        context = torch.onnx.ops.attention(q, keys, values, self.visible)[0]
        return context.transpose(1, 2).reshape(batch, length, h * e)

    def _write(self, index: int, new: Tensor) -> Tensor:
        """Put the new rows [1, G, S, E] into a cache; returns the rows to attend to, which are the first T or all."""
        past = self.cache[index]
        self.cache[index] = _operator("ScatterND", (past, self.rows, new), past.dtype, past.shape)
        if self.slots is None:
            return self.cache[index]
        batch, heads, _, size = past.shape
        operands = (self.cache[index], *self.slice)
        return _operator("Slice", operands, past.dtype, (batch, heads, self.slots.shape[0], size))


def _operator(
    name: str, operands: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[Any], attributes: Any = None
) -> Tensor:
    return torch.onnx.ops.symbolic(name, operands, attributes or {}, dtype=dtype, shape=shape, version=OPSET)


def _ints(*values: int) -> Tensor:
    # torch.tensor would make a real tensor among fake ones, which stops the optimizer.
    return _operator("Constant", (), torch.int64, (len(values),), {"value_ints": list(values)})


class _DecoderGraph(nn.Module):
    """The module that is traced as traverse, traverse_text or step."""

    def __init__(self, spec: ModelSpec, decoder: Decoder, capacity: int, name: str) -> None:
        super().__init__()
        self.spec, self.decoder, self.name = spec, decoder, name
        rows = capacity + (spec.long_rope.short_rows(capacity) if spec.long_rope else 0)
        self.rope = nn.ParameterDict({k: nn.Parameter(torch.empty(rows, spec.head_dim // 2)) for k in ("cos", "sin")})

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, extra: dict[str, Tensor], past: list[Tensor]
    ) -> list[Tensor]:
        rows = position_ids + extra["rope_offset"] if "rope_offset" in extra else position_ids
        rope = self.rope["cos"], self.rope["sin"]
        attend = _CachedAttention(self.spec, rope, position_ids, rows, past, extra.get("slots"))
        if self.name == "layers":
            mask = extra.get("image_mask")
            outputs = [layer(inputs_embeds, mask, i, 0, attend) for i, layer in enumerate(self.decoder.layers)]
            return [*outputs, *attend.cache]
        if self.name == "step":
            x = self.decoder.step(inputs_embeds, attend)
        else:
            x = self.decoder.traverse(inputs_embeds, extra.get("image_mask"), attend)
        return [self.decoder.logits(x[:, -1:])[:, 0], *attend.cache]


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
        return [self.decoder.logits(inputs_embeds)[:, 0]]


class _VisionGraph(nn.Module):
    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        return [self.vision(pixel_values)]


def trace(name: str, family: Family, spec: ModelSpec, capacity: int) -> ir.Model:
    """Trace a graph (but not traverse_text) with a cache of `capacity` tokens; its weights have no values.

    No parameter is allocated, because everything is traced with fake tensors.
    """
    with FakeTensorMode(), torch.no_grad():
        if name == "vision":
            pixels = torch.empty(2, 3, spec.vision.image_size, spec.vision.image_size)
            module: nn.Module = _VisionGraph(family.vision(spec))
            return _export(module, (pixels,), ({0: _dim("images")},), ["pixel_values"], ["image_features"])
        decoder = family.decoder(spec)
        assert isinstance(decoder, Decoder)
        if name == "mix":
            both = (torch.empty(1, 8, spec.hidden_size), torch.empty(1, 8, spec.hidden_size))
            return _export(_MixGraph(decoder), both, ({1: _dim("tokens")},) * 2, ["first", "second"], ["mixed"])
        if name == "head":
            last = (torch.empty(1, 1, spec.hidden_size),)
            return _export(_HeadGraph(decoder), last, ({},), ["inputs_embeds"], ["logits"])
        length = 1 if name == "step" else 8  # the trace works with any length above one
        dynamic: dict[int, Any] = {} if name == "step" else {1: _dim("tokens")}
        sets = ("", "_second") if name == "traverse" else ("",)
        past_names = [n for s in sets for n in cache_names(spec, f"past{s}")]
        past = [torch.empty(1, spec.num_kv_heads, capacity, spec.head_dim) for _ in past_names]
        embeds = torch.empty(1, length, spec.hidden_size)
        extra: dict[str, Tensor] = {}
        extra_shapes: dict[str, Any] = {}
        if name != "step":
            extra["slots"], extra_shapes["slots"] = torch.zeros(length + 3, dtype=torch.int64), {0: _dim("slots")}
        if spec.long_rope:
            extra["rope_offset"], extra_shapes["rope_offset"] = torch.zeros(1, dtype=torch.int64), {}
        if name != "step" and spec.lora_rank:
            extra["image_mask"], extra_shapes["image_mask"] = torch.empty(1, length, 1), dynamic
        args: tuple[Any, ...] = (embeds, torch.zeros(1, length, dtype=torch.int64), extra, past)
        shapes: tuple[Any, ...] = (dynamic, dynamic, extra_shapes, [{} for _ in past])
        inputs = ["inputs_embeds", "position_ids", *extra, *past_names]
        outputs = [f"hidden_{i}" for i in range(spec.num_layers)] if name == "layers" else ["logits"]
        outputs += (n for s in sets for n in cache_names(spec, f"present{s}"))
        module = _DecoderGraph(spec, decoder, capacity, name)
        return _export(module, args, shapes, inputs, outputs)


def _dim(name: str) -> Any:
    return torch.export.Dim(name, min=1)


def _export(
    module: nn.Module, args: tuple[Any, ...], shapes: tuple[Any, ...], inputs: list[str], outputs: list[str]
) -> ir.Model:
    with _quiet():
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
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "trol-edge", __version__
    return model


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
