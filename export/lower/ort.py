"""Graph passes for the CPU target, from standard ONNX with Q/DQ to what is fast in ONNX Runtime's CPU provider.

| canonical                                          | in traverse and vision               | in step                |
|----------------------------------------------------|--------------------------------------|------------------------|
| RotaryEmbedding, ScatterND into cache, Attention   | GroupQueryAttention                  | GroupQueryAttention    |
| W8A8: MatMul of two DequantizeLinear               | MatMulIntegerToFloat, u8 x s8        | MatMulInteger, u8 x s8 |
| W8: MatMul of a DequantizeLinear, 8 bits           | the same, input rounded by token     | the same               |
| W4: MatMul of a DequantizeLinear, 4 bits in blocks | the same, weights made 8-bit on load | MatMulNBits, packed    |
| the same, held once (int4-dynamic)                 | MatMulNBits, packed                  | MatMulNBits, packed    |

Reasons (figures in docs/decisions.md):
- 8-bit weights stay as they are stored, [K, N] int8, as graph inputs. One copy serves both passes and all graphs, and
  it may be mapped from the file. For one token MatMulInteger has a kernel that reads such a matrix unpacked, but only
  without a zero point; so 128 times the sum of each column is subtracted after it.
- Inputs are rounded to uint8 with zero point 128 instead of int8 with zero point 0. The numbers are the same, and
  processors have instructions for this pair of types.
- MatMulNBits is slow unless packed, and packing needs constants. So 4-bit weights of a step are initializers, laid out
  in the weights file as the operator reads them. A traverse is compute-bound, so its 4-bit weights are turned into
  8-bit ones when the bundle is loaded (`trol_edge.bundle.derived`), which costs memory and doubles the speed.
- QuantizeLinear is com.microsoft's, because onnxruntime 1.23.2 has no kernel of the standard one at opset 23.
- GroupQueryAttention writes the cache in place if past and present are bound to one buffer, and reads only the rows
  that hold tokens. It reads new rows from an 8-bit cache, too, after it has rounded them, so whether rows were written
  in this run or before changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from trol_edge.bundle.cache_scales import PAST, scale_name
from trol_edge.bundle.derived import INT8, INT8_SCALE, NBITS, NBITS_SCALE
from trol_edge.bundle.names import IMAGE_ROWS
from trol_edge.errors import ExportError
from trol_edge.export.storage import Layout, Rows

MICROSOFT = "com.microsoft"
OUTPUT_LAYER = "decoder.lm_head.weight"
ROTARY_MULTIPLE = 16  # GroupQueryAttention rotates heads whose size is a multiple of this
# Attributes of GroupQueryAttention with a scale for each head and channel of its caches.
EIGHT_BIT_CACHES: dict[str, Any] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}
EPSILON = 1e-30  # smallest step of a rounded token, so that a token of zeros stays zeros


def lower(name: str, model: ir.Model, once: bool = False, eight_bit_caches: bool = False) -> dict[str, Layout]:
    """Lower one graph ("vision", "traverse", "step", ...) in place.

    once: read the packed 4 bits in every graph. eight_bit_caches: keep keys and values in 8 bits, whose scales become
    parameters.

    Returns the layouts of tensors to be written beside the parameters. Those that the graph reads stay initializers;
    parameters, and 8-bit weights derived from 4-bit ones on load, are to become inputs. Raises ExportError if the graph
    is not as expected, before or after.
    """
    ports = _ports(model)
    layouts: dict[str, Layout] = {}
    fused = group_query_attention(model, eight_bit_caches)
    cached = any(str(value.name).startswith(PAST) for value in model.graph.inputs)
    if eight_bit_caches and cached and not fused:
        raise ExportError(f"{name}: its caches stay in floating point; this is a fault of trol-edge, please report it")
    if once or name == "step":
        nbits_matmul(model, layouts)
    if name == "step":
        one_token_matmul(model, layouts)
    elif once:
        one_token_matmul(model, layouts, OUTPUT_LAYER)  # which reads the last token of every run
        integer_matmul(model, layouts)
    else:
        integer_matmul(model, layouts)
    common.RemoveUnusedNodesPass()(model)
    if _ports(model) != ports:
        raise ExportError(
            f"lowering changed inputs or outputs of {name}; this is a fault of trol-edge, please report it"
        )
    left = [node.name for node in model.graph if node.op_type == "DequantizeLinear"]
    if left:
        raise ExportError(f"{name}: {left[0]} was not lowered; this is a fault of trol-edge, please report it")
    return layouts


def _ports(model: ir.Model) -> list[tuple[str | None, ir.Shape | None]]:
    return [(value.name, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]


# -- attention -------------------------------------------------------------------------------------------------


def takes_eight_bit_caches(head_size: int) -> bool:
    """Whether attention over heads of this size can read 8-bit caches, which GroupQueryAttention alone does."""
    return head_size % ROTARY_MULTIPLE == 0


def group_query_attention(model: ir.Model, eight_bit_caches: bool = False) -> bool:
    """Fuse split, rotation, cache and attention of each layer and pass into one GroupQueryAttention.

    With `eight_bit_caches` it rounds new rows and restores the rows that it reads. Returns whether there was any. Heads
    whose size is not a multiple of 16 stay as they are.
    """
    attentions = [node for node in model.graph if node.op_type == "Attention" and len(_inputs(node)) == 4]
    found = [_Attention(node) for node in attentions]
    if not found or any(match.head_size % ROTARY_MULTIPLE for match in found):
        return False
    shared = _shared_inputs(model, attentions[0])
    for match in found:
        scales = [_rounded(model, cache) for cache in match.past] if eight_bit_caches else []
        types = [match.context.type, *(cache.type for cache in match.past)]
        outputs = [
            ir.Value(name=v.name, shape=v.shape, type=t)
            for v, t in zip((match.context, *match.present), types, strict=True)
        ]
        # Between the tables and the scales are positions, a bias and a sink, which are left out.
        more: list[ir.Value | None] = [None, None, None, *scales] if scales else []
        fused = ir.node(
            "GroupQueryAttention",
            [match.qkv, None, None, *match.past, *shared, *more],
            {"num_heads": match.heads, "kv_num_heads": match.kv_heads, "do_rotary": 1}
            | (EIGHT_BIT_CACHES if scales else {}),
            domain=MICROSOFT,
            outputs=outputs,
            name=f"{match.context.name}.gqa",
        )
        model.graph.insert_before(match.last, fused)
        for old, new in zip((match.context, *match.present), outputs, strict=True):
            _replace(model, old, new)
    model.opset_imports[MICROSOFT] = 1
    common.RemoveUnusedNodesPass()(model)
    _sort(model)
    left = {node.op_type for node in model.graph} & {"Attention", "RotaryEmbedding"}
    caches = [value for value in model.graph.inputs if (value.name or "").startswith("past_")]
    left |= {node.op_type for value in caches for node, _ in value.uses()} - {"GroupQueryAttention"}
    if left:
        raise ExportError(f"{', '.join(sorted(left))} left beside GroupQueryAttention; please report this")
    return True


def _rounded(model: ir.Model, cache: ir.Value) -> ir.Value:
    """Make a cache [1, G, C, E] one of 8 bits; returns its scales, a parameter [1, G, 1, E]."""
    assert cache.name and cache.shape is not None
    cache.type = ir.TensorType(ir.DataType.INT8)
    _, heads, _, size = cache.shape.numpy()
    return _initializer(model, scale_name(cache.name), ir.DataType.FLOAT, (1, int(heads), 1, int(size)))


class _Attention:
    """One attention with its cache, as `graphs._CachedAttention` traces it; ExportError if it is anything else."""

    def __init__(self, node: ir.Node) -> None:
        query, keys, values, _ = _inputs(node)
        (transpose,) = _users(node.outputs[0], "Transpose")
        (self.last,) = _users(transpose.outputs[0], "Reshape")
        self.context = self.last.outputs[0]
        self.present, self.past, new = [], [], []
        for rows in (keys, values):
            scatter = _producer(rows, "ScatterND", "Slice")
            if scatter.op_type == "Slice":
                scatter = _producer(_inputs(scatter)[0], "ScatterND")
            past, _, part = _inputs(scatter)
            self.present.append(scatter.outputs[0])
            self.past.append(past)
            new.append(part)
        rotated = [_producer(value, "RotaryEmbedding") for value in (query, new[0])]
        self.rotary = rotated[0]
        splits = []
        for value in (_inputs(rotated[0])[0], _inputs(rotated[1])[0], new[1]):
            reshape = _producer(_inputs(_producer(value, "Transpose"))[0], "Reshape")
            splits.append(_inputs(reshape)[0])
        split = _producer(splits[0], "Split")
        if [_producer(part, "Split") for part in splits] != [split] * 3 or list(split.outputs) != splits:
            raise ExportError(f"{node.name} does not attend to the parts of one Linear; please report this")
        self.qkv = _inputs(split)[0]
        cache, width = self.past[0].shape, self.qkv.shape
        assert cache is not None and width is not None
        kv_heads, head_size, columns = cache[1], cache[3], width[2]
        assert isinstance(kv_heads, int) and isinstance(head_size, int) and isinstance(columns, int)
        self.kv_heads, self.head_size = kv_heads, head_size
        self.heads = columns // head_size - 2 * kv_heads


def _shared_inputs(model: ir.Model, attention: ir.Node) -> list[ir.Value]:
    """Inputs that every GroupQueryAttention reads: tokens in the cache minus one, tokens, cos and sin by position."""
    graph, rotary = model.graph, _Attention(attention).rotary
    _, cos, sin, rows = _inputs(rotary)
    ports = {value.name: value for value in graph.inputs}
    new = _Builder(model, graph[0])
    flat = new.constant("lowered.flat", np.array([1], np.int64))
    one = new.constant("lowered.one", np.array([1], np.int32))
    if "slots" in ports:
        slots = new.op("Shape", [ports["slots"]], "lowered.slots")
        total = new.op("Cast", [slots], "lowered.tokens", to=ir.DataType.INT32)
        last = new.op("Sub", [total, one], "lowered.last")
    else:
        position = new.op("Reshape", [ports["position_ids"], flat], "lowered.position")
        last = new.op("Cast", [position], "lowered.last", to=ir.DataType.INT32)
        total = new.op("Add", [last, one], "lowered.tokens")
    if "rope_offset" in ports:  # there are two factor sets; skip the rows of the one that is not used
        end = new.constant("lowered.end", np.array([np.iinfo(np.int64).max]))
        axis = new.constant("lowered.axis", np.array([0], np.int64))
        cos, sin = (new.op("Slice", [t, ports["rope_offset"], end, axis], f"lowered.{t.name}") for t in (cos, sin))
    elif rows is not ports["position_ids"]:
        raise ExportError("rows of the rope tables are not the positions; please report this")
    return [last, total, cos, sin]


# -- 8 bits ----------------------------------------------------------------------------------------------------


def integer_matmul(model: ir.Model, layouts: dict[str, Layout]) -> bool:
    """Turn MatMul of a quantized weight into MatMulIntegerToFloat on uint8 x int8; returns whether there was any.

    4-bit weights are replaced by 8-bit ones that are derived from them on load.
    """
    found = _quantized(model)
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value | None]] = {}
    for match in found:
        new = _Builder(model, match.node)
        zero = new.constant("lowered.128", np.array(128, np.uint8))
        if match.x not in rounded:
            rounded[match.x] = new.by_tensor(match) if match.input_scale is not None else new.by_token(match.x)
        x, x_scale, row_scale = rounded[match.x]
        weight, scale = match.weight, match.scale
        if match.bits == 4:
            layouts |= nbits_layouts(str(weight.name), *_dims(weight), match.block)
            weight, scale = _derived(model, weight)
        name = match.node.outputs[0].name
        assert name
        arguments = [x, weight, x_scale, scale, zero]
        last = name if row_scale is None else f"{name}.unscaled"
        y = new.op("MatMulIntegerToFloat", arguments, last, domain=MICROSOFT, like=match.node.outputs[0])
        if row_scale is not None:
            y = new.op("Mul", [y, row_scale], name, like=match.node.outputs[0])
        _replace(model, match.node.outputs[0], y)
    return _finish(model, found)


def one_token_matmul(model: ir.Model, layouts: dict[str, Layout], weight: str | None = None) -> bool:
    """Turn MatMul of an 8-bit weight and one token into MatMulInteger without zero points; whether there was any.

    weight: the only one to look for.
    """
    found = [match for match in _quantized(model) if match.bits == 8 and weight in (None, match.weight.name)]
    rounded: dict[ir.Value, tuple[ir.Value, ...]] = {}
    for match in found:
        new = _Builder(model, match.node)
        name, parameter, like = match.node.outputs[0].name, match.weight.name, match.node.outputs[0]
        assert name and parameter
        _, n = _dims(match.weight)
        if match.x not in rounded:
            if match.input_scale is not None:
                rounded[match.x] = (new.by_tensor(match)[0],)
            else:
                rounded[match.x] = new.ops("DynamicQuantizeLinear", [match.x], f"{match.x.name}.token", 3)
        x, *dynamic = rounded[match.x]
        y = new.op("MatMulInteger", [x, match.weight], f"{name}.int32")
        if dynamic:
            sums = _initializer(model, f"{parameter}.sum", ir.DataType.INT32, (n,))
            layouts[f"{parameter}.sum"] = Layout(parameter, "I32", (n,), n, _sums(1))
            zero = new.op("Cast", [dynamic[1]], f"{name}.zero", to=ir.DataType.INT32)
            y = new.op("Sub", [y, new.op("Mul", [sums, zero], f"{name}.offset")], f"{name}.shifted")
            scale = new.op("Mul", [match.scale, dynamic[0]], f"{name}.scale")
        else:
            assert match.input_scale is not None and match.input_scale.const_value is not None
            offset = _initializer(model, f"{parameter}.sum128", ir.DataType.INT32, (n,))
            layouts[f"{parameter}.sum128"] = Layout(parameter, "I32", (n,), n, _sums(128))
            y = new.op("Sub", [y, offset], f"{name}.shifted")
            scale = _initializer(model, f"{parameter}.output_scale", ir.DataType.FLOAT, (n,))
            factor = float(match.input_scale.const_value.numpy())
            layouts[f"{parameter}.output_scale"] = Layout(parameter, "F32", (n,), n, _scales(factor))
        y = new.op("Cast", [y], f"{name}.float", to=ir.DataType.FLOAT)
        _replace(model, like, new.op("Mul", [y, scale], name, like=like))
    return _finish(model, found)


def _sums(factor: int) -> Any:
    def convert(rows: Rows) -> NDArray[np.int32]:
        return rows.values.sum(axis=1, dtype=np.int32) * np.int32(factor)

    return convert


def _scales(factor: float) -> Any:
    def convert(rows: Rows) -> NDArray[np.float32]:
        assert rows.scale is not None
        return rows.scale * np.float32(factor)

    return convert


# -- 4 bits ----------------------------------------------------------------------------------------------------


def nbits_matmul(model: ir.Model, layouts: dict[str, Layout]) -> bool:
    """Turn MatMul of a 4-bit weight in blocks into MatMulNBits; returns whether there was any.

    Its weights become initializers <parameter>.nbits and <parameter>.nbits_scale.
    """
    found = [match for match in _quantized(model) if match.bits == 4]
    for match in found:
        parameter, name = match.weight.name, match.node.outputs[0].name
        assert parameter and name
        weight, scale, more = nbits_initializers(model, parameter, *_dims(match.weight), match.block)
        layouts |= more
        y = _Builder(model, match.node).op(
            "MatMulNBits",
            [match.x, weight, scale],
            name,
            domain=MICROSOFT,
            like=match.node.outputs[0],
            K=_dims(match.weight)[0],
            N=_dims(match.weight)[1],
            bits=4,
            block_size=match.block,
            accuracy_level=4,
        )
        _replace(model, match.node.outputs[0], y)
    return _finish(model, found)


def nbits_initializers(
    model: ir.Model, parameter: str, k: int, n: int, block: int
) -> tuple[ir.Value, ir.Value, dict[str, Layout]]:
    """Make the two initializers that MatMulNBits reads for a 4-bit parameter, and their layouts in the weights file."""
    packed, scales = (n, k // block, block // 2), (n * (k // block),)
    weight = _initializer(model, parameter + NBITS, ir.DataType.UINT8, packed)
    scale = _initializer(model, parameter + NBITS_SCALE, ir.DataType.FLOAT, scales)
    return weight, scale, nbits_layouts(parameter, k, n, block)


def nbits_layouts(parameter: str, k: int, n: int, block: int) -> dict[str, Layout]:
    """Layouts for MatMulNBits: two 4-bit values per byte along K with 8 added, and scales channel by channel."""

    def pack(rows: Rows) -> NDArray[np.uint8]:
        values = (rows.values + 8).astype(np.uint8).reshape(len(rows.values), k // block, block // 2, 2)
        return values[..., 0] | (values[..., 1] << 4).astype(np.uint8)

    def scale(rows: Rows) -> NDArray[np.float32]:
        assert rows.scale is not None
        return rows.scale.reshape(-1).astype(np.float32)

    return {
        parameter + NBITS: Layout(parameter, "U8", (n, k // block, block // 2), n, pack),
        parameter + NBITS_SCALE: Layout(parameter, "F32", (n * (k // block),), n, scale),
    }


def _derived(model: ir.Model, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    assert weight.name
    k, n = _dims(weight)
    return (
        _initializer(model, weight.name + INT8, ir.DataType.INT8, (k, n)),
        _initializer(model, weight.name + INT8_SCALE, ir.DataType.FLOAT, (n,)),
    )


# -- what the passes share -------------------------------------------------------------------------------------


class _Quantized:
    """MatMul(x, DequantizeLinear(weight, scale)), x rounded with one scale or not at all."""

    def __init__(self, node: ir.Node, restored: ir.Node) -> None:
        self.node = self._reader = node
        self.weight, self.scale = _inputs(restored)[:2]
        self.bits = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}.get(self.weight.dtype or ir.DataType.UNDEFINED, 0)
        block = restored.attributes.get("block_size")
        self.block = block.as_int() if block is not None else 0
        self.input_scale: ir.Value | None = None
        producer = self.x.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            self._reader = quantize = _producer(_inputs(producer)[0], "QuantizeLinear")
            self.input_scale = _inputs(quantize)[1]
            zero = _inputs(quantize)[2]
            if zero.dtype != ir.DataType.INT8 or zero.const_value is None or zero.const_value.numpy() != 0:
                raise ExportError(f"{quantize.name}: the zero point is not an int8 0; please report this")
        if not self.bits or (self.bits == 4) != bool(self.block):
            raise ExportError(
                f"{self.weight.name}: {self.weight.dtype} with block {self.block} has no operator on this target"
            )

    @property
    def x(self) -> ir.Value:
        """The input before any rounding; another value once the Linear that made it was lowered."""
        return _inputs(self._reader)[0]


def _quantized(model: ir.Model) -> list[_Quantized]:
    found = []
    for node in model.graph:
        restored = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if restored is not None and restored.op_type == "DequantizeLinear":
            found.append(_Quantized(node, restored))
    return found


def _finish(model: ir.Model, found: Sequence[_Quantized]) -> bool:
    if found:
        model.opset_imports[MICROSOFT] = 1
        common.RemoveUnusedNodesPass()(model)
    return bool(found)


class _Builder:
    """Adds nodes before a node."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self.model, self.before = model, before

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        output: str,
        *,
        domain: str = "",
        like: Any = None,
        **attributes: Any,
    ) -> ir.Value:
        return self._add(kind, inputs, [output], domain, like, attributes)[0]

    def ops(self, kind: str, inputs: Sequence[ir.Value], output: str, count: int) -> tuple[ir.Value, ...]:
        return self._add(kind, inputs, [f"{output}.{i}" for i in range(count)], "", None, {})

    def _add(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        names: list[str],
        domain: str,
        like: Any,
        attributes: dict[str, Any],
    ) -> tuple[ir.Value, ...]:
        outputs = [ir.Value(name=name) for name in names]
        if like is not None:
            outputs[0].shape, outputs[0].type = like.shape, like.type
        node = ir.node(kind, inputs, attributes, domain=domain, outputs=outputs, name=f"node_{names[0]}")
        self.model.graph.insert_before(self.before, node)
        return tuple(outputs)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Return an initializer of the graph with this value, made at first use."""
        known = self.model.graph.initializers
        if name not in known:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)  # type: ignore[arg-type]
            self.model.graph.register_initializer(value)
        return known[name]

    def by_tensor(self, match: _Quantized) -> tuple[ir.Value, ir.Value, None]:
        """Round x to uint8 with one constant scale; returns rounded x, that scale, and None for scales per row."""
        assert match.input_scale is not None
        zero = self.constant("lowered.128", np.array(128, np.uint8))
        return (
            self.op("QuantizeLinear", [match.x, match.input_scale, zero], f"{match.x.name}.uint8", domain=MICROSOFT),
            match.input_scale,
            None,
        )

    def by_token(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Round x [1, S, K] to uint8 with a scale per token; returns rounded x, the scale 1, and scales [1, S, 1]."""
        name = f"{x.name}.token"
        axis = self.constant("lowered.last_axis", np.array([-1], np.int64))
        largest = self.op("ReduceMax", [self.op("Abs", [x], f"{name}.abs"), axis], f"{name}.max")
        if x.shape is not None and str(x.shape[1]) == IMAGE_ROWS:  # may be none, which 1.23.2 does not reduce
            ends = [self.constant(f"lowered.{n}", np.array([n], np.int64)) for n in (0, 1)]
            largest = self.op("Slice", [largest, *ends, axis], f"{name}.largest")
        step = self.op("Mul", [largest, self.constant("lowered.127th", np.array(1 / 127, np.float32))], f"{name}.step")
        scale = self.op("Max", [step, self.constant("lowered.epsilon", np.array(EPSILON, np.float32))], f"{name}.scale")
        flat = self.op("Reshape", [scale, self.constant("lowered.column", np.array([-1], np.int64))], f"{name}.rows")
        zero = self.constant("lowered.128", np.array(128, np.uint8))
        zeros = self.op("Expand", [zero, self.op("Shape", [flat], f"{name}.count")], f"{name}.zeros")
        rounded = self.op("QuantizeLinear", [x, flat, zeros], f"{name}.uint8", domain=MICROSOFT, axis=1)
        return rounded, self.constant("lowered.unit", np.array(1, np.float32)), scale


def _initializer(model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """Make an initializer without a value, for a tensor of the weights file or one derived from it."""
    if name not in model.graph.initializers:
        model.graph.initializers[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    return model.graph.initializers[name]


def _replace(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _sort(model: ir.Model) -> None:
    common.TopologicalSortPass()(model)


def _inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _producer(value: ir.Value, *kinds: str) -> ir.Node:
    node = value.producer()
    if node is None or node.op_type not in kinds:
        found = "an input of the graph" if node is None else node.op_type
        raise ExportError(f"{value.name} comes from {found}, not from {' or '.join(kinds)}; please report this")
    return node


def _users(value: ir.Value, kind: str) -> list[ir.Node]:
    users = [node for node, _ in value.uses()]
    if [node.op_type for node in users] != [kind]:
        raise ExportError(
            f"{value.name} is read by {[node.op_type for node in users]}, not by one {kind}; please report this"
        )
    return users


def _dims(value: ir.Value) -> tuple[int, int]:
    assert value.shape is not None
    k, n = value.shape.numpy()
    return int(k), int(n)
