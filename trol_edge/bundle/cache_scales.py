"""Scales of 8-bit keys and values: which tensors of a bundle hold them, and what is wrong with them.

A cache in 8 bits holds round(x / scale), -128..127, with one scale for each head and channel of a layer's keys, and one
for those of its values, float32 [1, G, 1, E]. The second pass has its own. Scales are fixed on export, so a row has the
same numbers whenever it is written, and a prefix that is kept equals one that is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.names import KINDS, cache_name
from trol_edge.bundle.spec import ModelSpec

EIGHT_BITS = "int8"  # the one kind of rounded cache
PAST = "past_"
SCALES = ("key_scale", "value_scale")  # how the names of these tensors end
# The first version of ONNX Runtime whose GroupQueryAttention runs on 8-bit caches on a CPU. 1.26.0 loads the graph and
# fails when it runs.
OLDEST_ONNXRUNTIME = "1.27"


def scale_name(cache: str) -> str:
    """The tensor with the scales of a cache, by the name of its input: past_second_key_3."""
    kind, layer = cache.removeprefix(PAST).rsplit("_", 1)
    return f"decoder.layers.{layer}.{kind}_scale"


def scale_of(kind: str, layer: int, second: int) -> str:
    """The tensor with the scales of a layer's keys or values. second: the pass, 0 or 1."""
    return scale_name(cache_name("past", kind, layer, second))


def scale_names(spec: ModelSpec) -> list[str]:
    """The tensors of all scales: of the first set, then of the second."""
    return [
        scale_of(kind, layer, second)
        for second, layers in enumerate(spec.cached_layers)
        for layer in layers
        for kind in KINDS
    ]


def scale_shape(spec: ModelSpec) -> tuple[int, int, int, int]:
    """The shape of each of these tensors."""
    return 1, spec.num_kv_heads, 1, spec.head_dim


def restored(rows: NDArray[Any], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The numbers that rounded rows [G, R, E] stand for. scales [1, G, 1, E]."""
    return np.asarray(rows.astype(np.float32) * scales[0], np.float32)


def unusable(scales: Mapping[str, NDArray[np.float32]]) -> Iterator[str]:
    """Yield what is wrong with the numbers of scales, by tensor."""
    for name, array in scales.items():
        if not (np.isfinite(array).all() and (array > 0).all()):
            yield f"{name} is not a number above 0 everywhere"
