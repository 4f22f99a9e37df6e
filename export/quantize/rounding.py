"""Rounds weights to few bits, a block of rows at a time: int8 and fp8 per output channel, int4 in blocks of the inputs.

All of it is symmetric (no zero point): value = stored * scale. A scale is never zero, infinite or NaN; channels of
zeros get the scale one. ONNX Runtime's and Model Optimizer's quantizers need the whole graph with its weights in
memory, and neither weighs errors by what calibration saw, so these few lines are our own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trol_edge.bundle.precision import LinearPlan

FP8_MAX = 448.0  # largest number of E4M3
LEVELS = {"int8": 127.0, "int4": 7.0, "fp8": FP8_MAX}
PART = 1 << 18  # numbers that are rounded at a time, so that they stay in a processor's cache
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
    block = plan.block or k
    clips = CLIPS[plan.precision] if clipping else (1.0,)
    weight = None if importance is None else importance.float().view(1, -1, block)
    stored, best = torch.empty(n, k), torch.empty(n, k // block)
    step = max(1, PART // k)
    for first in range(0, n, step):
        blocks = rows[first : first + step].float().view(-1, k // block, block)  # [rows, B, block]
        scale = _best_scale(blocks, plan.precision, clips, weight, half)
        best[first : first + step] = scale
        stored[first : first + step] = round_to(blocks, scale[..., None], plan.precision).view(-1, k)
    return stored, best if plan.block else best[:, 0]


def _best_scale(blocks: Tensor, precision: str, clips: Sequence[float], weight: Tensor | None, half: bool) -> Tensor:
    """The scales [n, B] of least square error, among those that clip blocks [n, B, block] at these shares."""
    largest, levels = blocks.abs().amax(-1), LEVELS[precision]
    best, best_error = safe_scale(largest, levels, half), torch.full_like(largest, torch.inf)
    # Written into the same two buffers again and again, which is four times as fast as new ones.
    y, difference = torch.empty_like(blocks), torch.empty_like(blocks)
    for share in clips if len(clips) > 1 else ():
        scale = safe_scale(largest * share, levels, half)
        torch.mul(blocks, (1 / scale)[..., None], out=y)
        torch.round(y, out=difference)
        difference.clamp_(-levels if precision == "int8" else -levels - 1, levels).sub_(y).square_()
        error = (difference if weight is None else difference.mul_(weight)).sum(-1).mul_(scale.square())
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def restore(stored: Tensor, scale: Tensor) -> Tensor:
    """The numbers that a graph computes with: stored [n, K] times scale [n] or [n, K/block]."""
    n, k = stored.shape
    return (stored.view(n, -1, k // (1 if scale.dim() == 1 else scale.shape[1])) * scale.view(n, -1, 1)).view(n, k)


def pack_int4(values: Tensor) -> Tensor:
    """Pack int8 [K, N] of -8..7 into uint8 [K, N/2], two in a byte with the first in the low half, as ONNX does."""
    low, high = values[:, 0::2].to(torch.uint8) & 0xF, values[:, 1::2].to(torch.uint8) & 0xF
    return low | (high << 4)
