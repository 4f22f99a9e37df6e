"""Clipping thresholds from histograms of |x|: min-max, percentile, entropy (KL) and mean squared error.

All are for symmetric 8-bit quantization (levels -127..127). onnxruntime.quantization has the same algorithms, but in
classes that own whole ORT sessions. Its entropy search is a Python loop over every bin (seconds per tensor at our
resolution), and importing it imports onnx. So they are written again here, and the tests compare them with it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Histogram = NDArray[np.int64]  # [B], of |x|, equal bins over [0, top]

LEVELS = 127  # positive levels of a symmetric int8
PERCENTILE = 99.99  # percentage of the values that are not clipped
CANDIDATES = 200  # number of thresholds that the two searches try


def minmax(histogram: Histogram, top: float) -> float:
    """The upper edge of the last bin in use, so that nothing is clipped."""
    used = np.flatnonzero(histogram)
    return top * float(used[-1] + 1) / len(histogram) if len(used) else 0.0


def percentile(histogram: Histogram, top: float, percent: float = PERCENTILE) -> float:
    """The upper edge of the bin up to which `percent` of the values are."""
    total = int(histogram.sum())
    if not total:
        return 0.0
    share = np.cumsum(histogram) / total
    return top * float(np.searchsorted(share, percent / 100 * (1 - 1e-12)) + 1) / len(histogram)


def mse(histogram: Histogram, top: float) -> float:
    """The threshold with the least mean squared error of rounding and clipping."""
    last = _last(histogram)
    if not last:
        return 0.0
    # Four points per bin, because at the smallest candidate a bin is as wide as a quantization step.
    points = (np.arange(4 * last, dtype=np.float32) + 0.5) / 4  # in bins
    weights = np.repeat(histogram[:last] / 4, 4).astype(np.float64)
    bins = _candidates(last, LEVELS)
    errors = []
    for threshold in bins:
        step = np.float32(threshold / LEVELS)
        rounded = np.minimum(np.rint(points / step), np.float32(LEVELS)) * step
        errors.append(float(weights @ np.square(points - rounded)))
    return top * float(bins[int(np.argmin(errors))]) / len(histogram)


def entropy(histogram: Histogram, top: float) -> float:
    """The threshold at which the quantized distribution diverges least from the original (Migacz, GTC 2017).

    The original is clipped, so values above the threshold count into its last bin. The quantized one has 128
    levels, each spread evenly over the bins in use that it covers.
    """
    last = _last(histogram)
    if not last:
        return 0.0
    counts = histogram[:last].astype(np.float64)
    bins = _candidates(last, LEVELS + 1)
    divergences = []
    for stop in bins:
        reference = counts[:stop].copy()
        reference[-1] += counts[stop:].sum()
        level = np.minimum(np.arange(stop) * (LEVELS + 1) // stop, LEVELS)
        used = reference > 0
        held = np.bincount(level, counts[:stop], LEVELS + 1)
        spread = np.bincount(level, used, LEVELS + 1)
        quantized = np.where(used, (held / np.maximum(spread, 1))[level], 0.0)
        divergences.append(_divergence(reference, quantized))
    return top * float(bins[int(np.argmin(divergences))]) / len(histogram)


OBSERVERS: dict[str, Callable[[Histogram, float], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def _last(histogram: Histogram) -> int:
    """The number of bins up to the last one in use."""
    used = np.flatnonzero(histogram)
    return int(used[-1]) + 1 if len(used) else 0


def _candidates(last: int, least: int) -> NDArray[np.int64]:
    """Thresholds in bins, from one bin per level up to all that are in use."""
    return np.unique(np.linspace(min(least, last), last, CANDIDATES).round().astype(np.int64))


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """The Kullback-Leibler divergence of two histograms; an empty bin of q where p has values counts as 1e-4."""
    used = p > 0
    total = q.sum()
    if not total:
        return np.inf
    p, q = p[used] / p.sum(), np.maximum(q[used], 1e-4) / total
    return float(p @ np.log(p / q))
