"""The weights of a bundle as its graphs compute with them, read from its weights file in the layout of the modules.

The file is mapped, and a part of it is converted at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trol_edge.bundle.cache_scales import scale_names
from trol_edge.bundle.derived import NBITS, NBITS_SCALE, int8_from_nbits
from trol_edge.bundle.names import EMBEDDING, EMBEDDING_SCALE
from trol_edge.bundle.precision import QUANTIZED, PrecisionPlan
from trol_edge.bundle.weights import FLOATS, STORED, WeightsFile, to_float32
from trol_edge.export.quantize.cache import rounding_of
from trol_edge.export.quantize.qdq import scale_name
from trol_edge.export.quantize.recipes import is_linear
from trol_edge.export.reference.checkpoint import Checkpoint

CHUNK = 1 << 22  # numbers that are converted at a time


class Written:
    """What `Layerwise` reads of a checkpoint, from a weights file. Everything is float32."""

    def __init__(self, path: Path, source: Checkpoint, plan: PrecisionPlan) -> None:
        self.spec, self.family = source.spec, source.family
        self._file, self._source, self._plan = WeightsFile(path), source, plan

    def rounding(self, layer: int) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None:
        """What the caches of a layer make of new keys and values; None if they keep them as they are."""
        if self._plan.kv is None:
            return None
        names = [name for name in scale_names(self.spec) if name.startswith(f"decoder.layers.{layer}.")]
        return rounding_of(layer, {name: torch.from_numpy(np.array(self._array(name))) for name in names})

    def tensor(self, name: str) -> Tensor:
        """A parameter, [out, in] if it is a Linear, with its scales applied."""
        if not is_linear(name, self._source.shape(name)):
            return torch.from_numpy(np.array(self._floats(self._array(name), name))).view(self._source.shape(name))
        return torch.cat([rows for _, rows in self._rows(name, derived=False)], 0 if self._by_output(name) else 1)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows) of a parameter that is no Linear: of the embedding."""
        array = self._array(name)
        step = max(1, CHUNK // max(1, array[0].size))
        for first in range(0, len(array), step):
            rows = torch.from_numpy(np.array(self._floats(array[first : first + step], name)))
            if name == EMBEDDING and self._plan.embedding:
                rows *= torch.from_numpy(np.array(self._array(EMBEDDING_SCALE)[first : first + step, None]))
            yield first, rows

    def product(self, name: str, x: Tensor, derived: bool) -> Tensor:
        """x [n, K] times a Linear's weight, [n, out]. derived: the 8-bit form of a 4-bit weight."""
        if self._by_output(name):
            return torch.cat([x @ rows.T for _, rows in self._rows(name, derived)], 1)
        y = torch.zeros(len(x), self._source.shape(name)[0])
        for first, columns in self._rows(name, derived):
            y += x[:, first : first + columns.shape[1]] @ columns.T
        return y

    def _by_output(self, name: str) -> bool:
        return name + NBITS in self._file.tensors

    def _rows(self, name: str, derived: bool) -> Iterator[tuple[int, Tensor]]:
        """Yield parts of a Linear's weight: (first output, [n, K]) if it is stored by outputs, or (first input,
        [out, k])."""
        linear = self._plan.linears.get(name)
        out, width = self._source.shape(name)
        step = max(1, CHUNK // (width if self._by_output(name) else out))
        if self._by_output(name):
            packed, factors = self._array(name + NBITS), self._array(name + NBITS_SCALE).reshape(out, -1)
            for first in range(0, out, step):
                yield (
                    first,
                    from_nbits(
                        np.array(packed[first : first + step]), np.array(factors[first : first + step]), derived
                    ),
                )
            return
        stored = self._array(name)
        scale: Tensor | None = None
        block = linear.block if linear is not None and linear.block else 1
        if linear is not None and linear.precision in QUANTIZED:
            scale = torch.from_numpy(np.array(self._floats(self._array(scale_name(name)), scale_name(name))))
        step = -(-step // block) * block
        for first in range(0, width, step):
            part = np.array(stored[first : first + step])
            values = self._values(part, name, linear.precision if linear is not None else "")
            if scale is not None:
                rows = (
                    scale[first // block : (first + len(values)) // block] if linear and linear.block else scale[None]
                )
                values = (values.view(len(rows), -1, out) * rows[:, None]).view(-1, out)
            yield first, values.T

    def _values(self, part: NDArray[Any], name: str, precision: str) -> Tensor:
        if precision == "int4":
            low = ((part & 15).astype(np.int8) ^ 8) - 8
            high = ((part >> 4).astype(np.int8) ^ 8) - 8
            return torch.from_numpy(np.stack((low, high), -1).reshape(len(part), -1).astype(np.float32))
        if precision == "fp8":
            return torch.from_numpy(part).view(torch.float8_e4m3fn).float()
        return torch.from_numpy(np.array(self._floats(part, name)))

    def _array(self, name: str) -> NDArray[Any]:
        info = self._file.tensors[name]
        return np.memmap(self._file.path, STORED[info.dtype], "r", info.offset, info.shape)

    def _floats(self, array: NDArray[Any], name: str) -> NDArray[np.float32]:
        dtype = self._file.tensors[name].dtype
        return to_float32(array, dtype) if dtype in FLOATS else array.astype(np.float32)


def from_nbits(packed: NDArray[np.uint8], scales: NDArray[np.float32], derived: bool) -> Tensor:
    """4-bit weights [n, K/block, block/2] and scales [n, K/block] as float32 [n, K]; derived: by way of 8 bits."""
    if derived:
        values, step = int8_from_nbits(packed, scales)
        return torch.from_numpy(values.T.astype(np.float32) * step[:, None])
    low, high = (packed & 15).astype(np.float32) - 8, (packed >> 4).astype(np.float32) - 8
    return torch.from_numpy(
        (np.stack((low, high), -1).reshape(*scales.shape, -1) * scales[..., None]).reshape(len(packed), -1)
    )
