"""Derives int8 weights from int4 at load time: prefill is compute-bound, and int8 matmuls are twice as fast on a CPU.

A bundle stores 4-bit weights once, as ONNX Runtime's MatMulNBits reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Suffixes of a parameter's name.
NBITS = ".nbits"  # uint8 [N, K/block, block/2]: two values 0..15 per byte, the first in the low half; 8 means zero
NBITS_SCALE = ".nbits_scale"  # float32 [N*K/block]
INT8 = ".int8"  # int8 [K, N], derived
INT8_SCALE = ".int8_scale"  # float32 [N], derived
ROWS = 512  # output channels that are converted at a time
WORKERS = 2  # tensors that are converted at a time; numpy lets them run in parallel


def derived_parameters(names: Iterable[str]) -> list[str]:
    """The parameters whose 8-bit weights are asked for, sorted."""
    return sorted(name.removesuffix(INT8) for name in names if name.endswith(INT8))


def derive_int8(arrays: dict[str, NDArray[Any]], parameters: Iterable[str], keep: Collection[str] = ()) -> None:
    """Add <parameter>.int8 and .int8_scale to `arrays`, and remove the 4-bit forms once they are converted."""

    def convert(parameter: str) -> None:
        packed, scales = (arrays[parameter + suffix] for suffix in (NBITS, NBITS_SCALE))
        made = int8_from_nbits(packed, scales)
        for suffix in (NBITS, NBITS_SCALE):
            if parameter + suffix not in keep:
                del arrays[parameter + suffix]
        arrays[parameter + INT8], arrays[parameter + INT8_SCALE] = made

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(convert, parameters))


def int8_from_nbits(
    packed: NDArray[np.uint8], scales: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Turn 4-bit weights [N, K/block, block/2] and scales [N*K/block] into int8 [K, N] and scales, float32 [N].

    Each output channel is rounded to 255 steps over its range, with an error of at most 1/254 of its largest value.
    """
    n, blocks, half = packed.shape
    scales = scales.reshape(n, blocks)
    out = np.empty((blocks * half * 2, n), np.int8)
    step = np.empty(n, np.float32)
    for first in range(0, n, ROWS):
        part, scale = packed[first : first + ROWS], scales[first : first + ROWS]
        values = np.empty((*part.shape, 2), np.float32)
        np.subtract(part & 15, np.float32(8), out=values[..., 0], casting="unsafe")
        np.subtract(part >> 4, np.float32(8), out=values[..., 1], casting="unsafe")
        values *= scale[..., None, None]
        flat = values.reshape(len(part), -1)  # [rows, K]
        largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))
        step[first : first + ROWS] = np.maximum(largest, np.float32(1e-30)) / 127
        flat *= 1 / step[first : first + ROWS, None]
        out[:, first : first + ROWS] = np.rint(flat, out=flat).astype(np.int8).T
    return out, step
