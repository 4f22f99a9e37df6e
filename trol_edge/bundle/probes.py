"""Made-up inputs and short summaries, equal wherever they are computed, for the arithmetic part of a self-test.

Export and `verify` make both from names and sizes alone, so a bundle stores only results.

A pattern is whole numbers -128..127. Multiplied by a scale, it is an input of a Linear that no rounding moves: where
inputs are rounded to 8 bits, every number is a step of that rounding or far from the middle between two. So a rounded
product differs between two machines by the rounding of float32 only, and errors do not grow from Linear to Linear.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.weights import FLOATS, WeightsFile, to_float32

ROWS = 8  # different rows of a pattern; token t has row t % ROWS
SEEN = 4  # tokens whose values are summarised
BUCKETS = 32  # numbers in the summary of a token
SUMS = 8  # numbers in the summary of a stored tensor
PERIOD = 1 << 16  # stored values between two uses of a sign
BLOCK = 32  # inputs that contain one large number each, because some kernels round inputs in blocks of 32
SMALL, LARGE = 20, 127


def pattern(name: str, width: int) -> NDArray[np.int16]:
    """Whole numbers for the input of a Linear, int16 [ROWS, width], by the name of the input. None is zero."""
    bits = _bits(name, ROWS * width).reshape(ROWS, width)
    numbers = (bits % np.uint64(SMALL)).astype(np.int16) + np.int16(1)
    signs = np.where(bits >> np.uint64(32) & np.uint64(1), np.int16(1), np.int16(-1))
    places = np.arange(0, width - BLOCK + 1, BLOCK)
    for row in range(ROWS):
        numbers[row, places + (bits[row, places] >> np.uint64(40) & np.uint64(BLOCK - 1)).astype(np.int64)] = LARGE
    numbers *= signs
    numbers[:, 0], numbers[:, 1 % width] = -LARGE - 1, LARGE  # an asymmetric rounding then has steps of one, too
    return numbers


def seen(tokens: int) -> NDArray[np.int64]:
    """Which of `tokens` tokens are summarised; the last is one of them."""
    return np.unique(np.linspace(0, tokens - 1, SEEN).astype(np.int64))


def summary(values: NDArray[Any]) -> NDArray[np.float32]:
    """Signed sums of values [n, K] over BUCKETS groups of columns, float32 [n, BUCKETS]."""
    bits = _bits("summary", values.shape[1])
    groups = (bits % np.uint64(BUCKETS)).astype(np.int64)
    signs = np.where(bits >> np.uint64(32) & np.uint64(1), 1.0, -1.0)
    return np.stack([np.bincount(groups, row * signs, BUCKETS) for row in values.astype(np.float64)]).astype(np.float32)


def stored_sums(file: WeightsFile, names: Collection[str]) -> dict[str, NDArray[np.float64]]:
    """For each stored tensor SUMS signed sums of its numbers, and the sum of their magnitudes, float64 [SUMS + 1].

    Packed 4-bit values are taken two at a time, FP8 as bits.
    """
    bits = _bits("stored", PERIOD)
    signs = np.where(bits & np.uint64(1), 1.0, -1.0)
    groups = (bits >> np.uint64(32) & np.uint64(SUMS - 1)).astype(np.int64)
    found = {name: np.zeros(SUMS + 1) for name in names}
    for name, first, block in file.blocks(names, None):
        dtype = file.tensors[name].dtype
        values = to_float32(block, dtype) if dtype in FLOATS else block
        for start in range(0, len(values), PERIOD):
            part = values[start : start + PERIOD].astype(np.float64)
            # Another rotation of the signs in each part, so that parts cannot trade places.
            turn = (first + start) // PERIOD * 7919 % PERIOD
            indices = (np.arange(len(part)) + turn) % PERIOD
            found[name][:SUMS] += np.bincount(groups[indices], part * signs[indices], SUMS)
            found[name][SUMS] += np.abs(part).sum()
    return found


def drift(here: NDArray[Any], reference: NDArray[Any]) -> float:
    """|here - reference| / |reference|, Euclidean norms over all values."""
    error, size = (
        float(np.square(x.astype(np.float64)).sum()) for x in (here.astype(np.float64) - reference, reference)
    )
    return math.sqrt(error / max(size, float(np.finfo(np.float32).tiny)))


def centred(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Subtract the mean of logits, on which no probability depends."""
    return logits - logits.mean(-1, keepdims=True)


def _bits(name: str, count: int) -> NDArray[np.uint64]:
    """64 random bits for each of `count` places: SplitMix64, because numpy's generators may change between versions."""
    seed = np.uint64(zlib.crc32(name.encode()) << 32)
    z = (np.arange(1, count + 1, dtype=np.uint64) + seed) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
