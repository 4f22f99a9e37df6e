"""Makes each tensor of the weights file from the checkpoint, by the plan: read, fold, round, lay out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from trol_edge.bundle.names import EMBEDDING, EMBEDDING_SCALE
from trol_edge.bundle.precision import QUANTIZED, LinearPlan, Part, PrecisionPlan, part_of, tensor_bytes
from trol_edge.bundle.weights import ITEM_BYTES
from trol_edge.errors import CheckpointError, ExportError
from trol_edge.export.quantize.qdq import scale_name
from trol_edge.export.quantize.recipes import is_linear
from trol_edge.export.quantize.rounding import pack_int4, quantize
from trol_edge.export.quantize.scales import Scales
from trol_edge.export.reference.checkpoint import FLOATS, Checkpoint, is_finite
from trol_edge.export.reference.model import graph_rope_tables
from trol_edge.export.storage import Layout, Rows
from trol_edge.rope import TABLES

IR_TYPES = {
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F32": ir.DataType.FLOAT,
    "I32": ir.DataType.INT32,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}
LARGEST_HALF = 65504.0


def stored_dtype(name: str, shape: tuple[int, ...], published: str, plan: PrecisionPlan, folded: bool) -> str:
    """The stored dtype of a parameter that is no quantized Linear. folded: whether its channels were rescaled."""
    half = plan.compute == "fp16"
    if name == EMBEDDING and plan.embedding:
        return "I8"
    if len(shape) == 1 and (folded or (half and "norm" in name)):
        return "F32"  # few numbers, and norms compute in float32
    precision = plan.linears[name].precision if name in plan.linears else plan.compute
    return "F16" if precision == "fp16" or plan.recipe == "fp16" else published


class StoredWeights:
    """The tensors of one bundle's weights file: `layouts` by name, and `read` for `storage.write`.

    Raises CheckpointError after the last row if a value was NaN or infinite, and ExportError if FP16 cannot hold one.
    """

    def __init__(
        self,
        source: Checkpoint,
        context: int,
        plan: PrecisionPlan,
        scales: Scales | None,
        cache_scales: Mapping[str, NDArray[np.float32]],
    ) -> None:
        self._source, self._plan, self._scales = source, plan, scales
        self._half = plan.compute == "fp16"
        # Tensors that no checkpoint has, whole, in float32.
        self._made = {n: t.numpy() for n, t in zip(TABLES, graph_rope_tables(source.spec, context), strict=True)}
        self._made |= cache_scales
        self.bad: list[str] = []
        self.layouts: dict[str, Layout] = {}
        for name in source.names():
            self.layouts |= self._layouts(name)
        for name, array in self._made.items():
            self.layouts[name] = Layout(name, "F32", array.shape, len(array), lambda rows: rows.values)

    def dtype(self, name: str) -> str:
        """The stored dtype of a parameter that is not quantized."""
        folded = self._scales is not None and name in self._scales.folding
        return stored_dtype(name, self._source.shape(name), self._source.dtype(name), self._plan, folded)

    def parts(self) -> dict[str, Part]:
        """The stored type of each part of the model, and the fewest bytes that it takes."""
        found: dict[str, Part] = {}
        for name in self._source.names():
            linear, shape = self._plan.linears.get(name), self._source.shape(name)
            size = tensor_bytes(shape, linear, ITEM_BYTES[self.dtype(name)], 2 if self._half else 4)
            old = found.get(part_of(name), Part(0, {}, 0))
            linears = dict(old.linears)
            if linear is not None:
                linears[linear.precision] = linears.get(linear.precision, 0) + 1
            found[part_of(name)] = Part(old.numbers + math.prod(shape), linears, old.bytes + size)
        return found

    def _layouts(self, name: str) -> dict[str, Layout]:
        shape = self._source.shape(name)
        linear = self._plan.linears.get(name)
        if name == EMBEDDING and self._plan.embedding:
            return {
                name: Layout(name, self.dtype(name), shape, shape[0], lambda rows: rows.values),
                EMBEDDING_SCALE: Layout(name, "F32", shape[:1], shape[0], self._scale),
            }
        if linear is None or linear.precision not in QUANTIZED:
            dtype = self.dtype(name)
            if is_linear(name, shape):
                return {name: Layout(name, dtype, shape[::-1], shape[0], lambda rows: rows.values.T, rows_axis=1)}
            return {name: Layout(name, dtype, shape, shape[0] if shape else 1, lambda rows: rows.values)}
        n, k = shape
        scale_dtype = "F16" if self._half else "F32"
        scale = scale_name(name)
        if linear.precision == "int4":
            assert linear.block
            return {
                name: Layout(name, "U8", (k, n // 2), n, _packed, rows_axis=1),
                scale: Layout(name, scale_dtype, (k // linear.block, n), n, self._scale, rows_axis=1),
            }
        dtype = {"int8": "I8", "fp8": "F8_E4M3"}[linear.precision]
        return {
            name: Layout(name, dtype, (k, n), n, lambda rows: rows.values.T, rows_axis=1),
            scale: Layout(name, scale_dtype, (n,), n, self._scale),
        }

    def _scale(self, rows: Rows) -> NDArray[Any]:
        assert rows.scale is not None
        return rows.scale.T.astype("float16" if self._half else "float32")

    def read(self, name: str) -> Iterator[Rows]:
        """Yield rows of a parameter (or a rope table, or scales of a cache) as they are stored."""
        if name in self._made:
            yield Rows(0, self._made[name])
            return
        linear = self._plan.linears.get(name)
        if name == EMBEDDING and self._plan.embedding:
            linear = LinearPlan(self._plan.embedding)  # a row has a scale, as an output channel has
        finite = True
        for first, block in self._source.blocks(name):
            finite = finite and is_finite(block)
            if self._scales is not None and name in self._scales.folding:
                block = self._scales.folding.apply(name, block, first)
            if linear is None or linear.precision not in QUANTIZED:
                yield Rows(first, array_from_tensor(self._cast(name, block)))
                continue
            importance = self._scales.importance.get(name) if self._scales else None
            # With a scale per channel and nothing known of the inputs, the largest weight is the best guess.
            clipping = self._plan.clipping and (linear.block is not None or importance is not None)
            values, scale = quantize(block, linear, importance, clipping, self._half)
            kind = torch.float8_e4m3fn if linear.precision == "fp8" else torch.int8
            stored = values.to(kind)
            stored = stored.view(torch.uint8) if linear.precision == "fp8" else stored
            yield Rows(first, stored.numpy(), scale.numpy())
        if not finite:
            self.bad.append(self._source.parameters[name][0].name)

    def _cast(self, name: str, block: Tensor) -> Tensor:
        dtype = FLOATS[self.dtype(name)]
        if dtype == block.dtype:
            return block
        if dtype == torch.float16 and block.numel() and float(block.float().abs().max()) > LARGEST_HALF:
            raise ExportError(
                f"{name}: a weight of {float(block.float().abs().max()):.3g} is beyond FP16's {LARGEST_HALF:g}; "
                'give this layer "fp32" in a mixed plan'
            )
        return block.to(dtype)

    def require_finite(self) -> None:
        """Raise CheckpointError if `read` met NaN or infinite values."""
        if self.bad:
            raise CheckpointError(
                f"{self._source.folder}: NaN or infinite values in {len(self.bad)} tensor(s): {', '.join(self.bad)}; "
                "download them again"
            )


def _packed(rows: Rows) -> NDArray[Any]:
    return pack_int4(torch.from_numpy(rows.values).t().contiguous()).numpy()


def array_from_tensor(tensor: Tensor) -> NDArray[Any]:
    """The same numbers as an array; BF16, which numpy lacks, becomes uint16 bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a graph finds a tensor: the graph's dtype, and offset and length in bytes in the weights file."""

    dtype: ir.DataType
    offset: int
    nbytes: int


def places(
    layouts: Mapping[str, Layout], written: Mapping[str, tuple[int, int]], plan: PrecisionPlan
) -> dict[str, Place]:
    """The place of every tensor; a graph sees packed INT4 as INT4."""
    packed = {name for name, linear in plan.linears.items() if linear.precision == "int4"}
    return {
        name: Place(ir.DataType.INT4 if name in packed else IR_TYPES[layouts[name].dtype], *place)
        for name, place in written.items()
    }
