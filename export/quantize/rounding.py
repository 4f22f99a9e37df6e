"""Rounds weights to few bits, a block of rows at a time: int8 and fp8 per output channel, int4 in blocks of the inputs.

All of it is symmetric (no zero point): value = stored * scale. A scale is never zero, infinite or NaN; channels of
zeros get the scale one. ONNX Runtime's and Model Optimizer's quantizers need the whole graph with its weights in
memory, and neither weighs errors by what calibration saw, so these few lines are our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trol_edge.bundle.precision import LinearPlan

FP8_MAX = 448.0  # largest number of E4M3
LEVELS = {"int8": 127.0, "int4": 7.0, "fp8": FP8_MAX}
SMALLEST = 2.0**-24  # smallest FP16 number, because scales may be stored in FP16
# Shares of the largest weight that are tried as the clipping threshold.
CLIPS = {"int8": (1.0, 0.95, 0.9, 0.85), "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6), "fp8": (1.0,)}


def safe_scale(largest: Tensor, levels: float, half: bool = False) -> Tensor:
    """The scale that maps `largest` to `levels`, or one if there is nothing to scale. half: round it to FP16."""
    scale = largest.float() / levels
    scale = torch.where((scale >= SMALLEST) & scale.isfinite(), scale, torch.ones_like(scale))
    return scale.half().float().clamp_min(SMALLEST) if half else scale


def round_to(x: Tensor, scale: Tensor | float, precision: str) -> Tensor:
    """Round x / scale to stored numbers, kept in float32: integers, or values of E4M3."""
    y = x / scale
    if precision == "fp8":
        return y.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    levels = LEVELS[precision]
    return y.round().clamp(-levels if precision == "int8" else -levels - 1, levels)


def quantize(
    rows: Tensor, plan: LinearPlan, importance: Tensor | None = None, clipping: bool = True, half: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize rows [n, K] of a Linear; returns stored numbers [n, K] in float32 and scales [n] or [n, K/block].

    importance [K]: mean square of the inputs, which weighs errors. half: round scales to FP16.
    """
    n, k = rows.shape
    blocks = rows.float().view(n, -1, plan.block or k)  # [n, B, block]
    weight = None if importance is None else importance.float().view(1, -1, plan.block or k)
    largest = blocks.abs().amax(-1)
    best = best_error = None
    for share in CLIPS[plan.precision] if clipping else (1.0,):
        scale = safe_scale(largest * share, LEVELS[plan.precision], half)
        if not clipping:
            best = scale
            break
        error = (round_to(blocks, scale[..., None], plan.precision) * scale[..., None] - blocks).square_()
        error = (error if weight is None else error * weight).sum(-1)
        if best is None or best_error is None:
            best, best_error = scale, error
        else:
            better = error < best_error
            best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    assert best is not None
    stored = round_to(blocks, best[..., None], plan.precision).view(n, k)
    return stored, best if plan.block else best[:, 0]


def restore(stored: Tensor, scale: Tensor) -> Tensor:
    """The numbers that a graph computes with: stored [n, K] times scale [n] or [n, K/block]."""
    n, k = stored.shape
    return (stored.view(n, -1, k // (1 if scale.dim() == 1 else scale.shape[1])) * scale.view(n, -1, 1)).view(n, k)


def pack_int4(values: Tensor) -> Tensor:
    """Pack int8 [K, N] of -8..7 into uint8 [K, N/2], two in a byte with the first in the low half, as ONNX does."""
    low, high = values[:, 0::2].to(torch.uint8) & 0xF, values[:, 1::2].to(torch.uint8) & 0xF
    return low | (high << 4)
