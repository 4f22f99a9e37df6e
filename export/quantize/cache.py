"""Rounds keys and values to 8 bits: the scales of the caches, and what a cache makes of new rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trol_edge.bundle.cache_scales import scale_of, scale_shape
from trol_edge.bundle.names import KINDS
from trol_edge.bundle.spec import ModelSpec
from trol_edge.errors import CalibrationError
from trol_edge.export.quantize.stats import SMALLEST, Statistics

STEPS = 127  # of the largest value that calibration saw
Float32 = NDArray[np.float32]


def find_cache_scales(spec: ModelSpec, statistics: Statistics) -> dict[str, Float32]:
    """The scales of all caches of a model, [1, G, 1, E] by tensor.

    Raises CalibrationError if the statistics do not say what the caches held.
    """
    found: dict[str, Float32] = {}
    for second, layers in enumerate(spec.cached_layers):
        for layer in layers:
            peaks = statistics.caches.get(layer)
            if peaks is None or peaks.shape[2:] != (spec.num_kv_heads, spec.head_dim):
                raise CalibrationError(
                    f"the statistics do not say how large keys and values of layer {layer} are (an earlier version "
                    "gathered them); calibrate again into another folder, or with --force"
                )
            for kind, name in enumerate(KINDS):
                scales = np.maximum(peaks[kind, second], SMALLEST) / np.float32(STEPS)
                tensor = scale_of(name, layer, second)
                found[tensor] = scales.astype(np.float32).reshape(scale_shape(spec))
    return found


def rounding_of(layer: int, scales: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """What the caches of a layer make of new keys and values [B, G, S, E] of a pass. scales: by tensor."""

    def rounded(keys: Tensor, values: Tensor, traversal: int) -> tuple[Tensor, Tensor]:
        key, value = (
            _rounded(x, scales[scale_of(kind, layer, traversal)]) for kind, x in zip(KINDS, (keys, values), strict=True)
        )
        return key, value

    return rounded


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-128, 127) * scale
