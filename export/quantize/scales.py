"""Searches for scales by their effect on the output, with rows that calibration kept and sampled output channels.

For each group of channels (see folding.py) the exponent a, which SmoothQuant and AWQ leave open, is searched. If inputs
are rounded, s = absmax(x)^a / absmax(w)^(1-a); if only weights are, s = mean(|x|)^a. Then the threshold of each rounded
input is searched. A search reads sampled weights of one group and R rows of its input, never a whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trol_edge.bundle.precision import QUANTIZED, LinearPlan, PrecisionPlan
from trol_edge.errors import CalibrationError
from trol_edge.export.quantize.folding import Folding, Group, groups
from trol_edge.export.quantize.recipes import point_of
from trol_edge.export.quantize.rounding import LEVELS, quantize, restore, round_to, safe_scale
from trol_edge.export.storage import Progress

if TYPE_CHECKING:
    from trol_edge.export.quantize.stats import PointStatistics, Statistics
    from trol_edge.export.reference.checkpoint import Checkpoint

SAMPLED = 384  # output channels of a Linear that the searches read
EXPONENTS = (0.2, 0.35, 0.5, 0.65, 0.8)
LARGEST_SCALE = 2.0**10  # bounds scales, and its inverse too; beyond them only noise would be left of a channel
MARGIN = 3.0  # largest |value| of a normalized channel, in standard deviations, where no calibration saw one
THRESHOLDS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclasses.dataclass(frozen=True)
class Scales:
    """The result of the search.

    folding: scales that cancel. inputs: Linear -> scale of its rounded input. errors: Linear -> mean square error of
    its output over the mean square of its output, on calibration's rows. plan: the plan with sensitive Linears raised.
    """

    plan: PrecisionPlan
    folding: Folding
    inputs: Mapping[str, float]
    errors: Mapping[str, float]
    importance: Mapping[str, Tensor]  # Linear -> mean square of its (folded) input, [K]


def find_scales(
    source: Checkpoint, plan: PrecisionPlan, statistics: Statistics, sensitive: float | None, progress: Progress
) -> Scales:
    """Search every group and every Linear that the plan quantizes. Raises CalibrationError if a point is missing."""
    shapes = {name: source.shape(name) for name in source.names()}
    folding = Folding(shapes)
    linears = dict(plan.linears)
    quantized = [name for name, linear in linears.items() if linear.precision in QUANTIZED]
    grouped = [g for g in groups(source.spec, shapes) if plan.scaling and any(r in quantized for r in g.readers)]
    total, done = len(grouped) + len(quantized), 0
    if plan.scaling:
        for group in grouped:
            progress("scales", done, total)
            done += 1
            readers = [r for r in group.readers if r in quantized and r.endswith(".weight")]
            if readers and (point := _point(statistics, readers[0], required=False)):
                scale = _search_group(source, group, readers, linears, point, plan)
                if scale is not None:
                    folding.add(group, scale)
    inputs: dict[str, float] = {}
    errors: dict[str, float] = {}
    importance: dict[str, Tensor] = {}
    for name in quantized:
        progress("scales", done, total)
        done += 1
        point = _point(statistics, name, required=linears[name].activations)
        if point is None:
            continue
        seen = _Seen(point, folding.columns.get(name))
        importance[name] = seen.mean_square
        weight, _ = sample(source, name, folding)
        if linears[name].activations:
            levels = LEVELS[linears[name].precision]
            inputs[name] = float(safe_scale(torch.tensor(seen.threshold(plan.observer or "mse", weight)), levels, True))
        errors[name] = seen.error(weight, linears[name], inputs.get(name), plan)
        if linears[name].precision == "int4" and sensitive is not None and errors[name] > sensitive:
            linears[name] = LinearPlan("int8")
            errors[name] = seen.error(weight, linears[name], None, plan)
    # Linears that share their input (gate and up, a weight and its low-rank part) share its rounding.
    shared: dict[tuple[str, str], list[str]] = {}
    for name in inputs:
        shared.setdefault((_input_of(name), linears[name].precision), []).append(name)
    for names in shared.values():
        largest = max(inputs[name] for name in names)
        inputs |= dict.fromkeys(names, largest)
    progress("scales", total, total)
    return Scales(dataclasses.replace(plan, linears=linears), folding, inputs, errors, importance)


def scales_of_norms(source: Checkpoint, plan: PrecisionPlan, progress: Progress) -> Scales:
    """Rescale what norms make, without calibration: a norm's weight tells how large its channels are.

    s = size^0.5 / absmax(w)^0.5 with size = 3 |weight| + |bias|, because a norm's input has a mean square of 1 there.
    """
    shapes = {name: source.shape(name) for name in source.names()}
    folding = Folding(shapes)
    quantized = {name for name, linear in plan.linears.items() if linear.precision in QUANTIZED}
    found = [g for g in groups(source.spec, shapes) if plan.scaling and g.made_by_norm and quantized & set(g.readers)]
    for done, group in enumerate(found):
        progress("scales", done, len(found))
        size = torch.zeros(group.width)
        for (name, _), factor in zip(group.makers, (MARGIN, 1.0), strict=False):
            size += factor * source.tensor(name).float().abs()
        largest = torch.stack([sample(source, name)[1] for name in group.readers if name in quantized]).amax(0)
        folding.add(group, _normalized(size.sqrt() / largest.sqrt(), (size > 0) & (largest > 0)))
    return Scales(plan, folding, {}, {}, {})


def _normalized(scale: Tensor, usable: Tensor) -> Tensor:
    """Bound scales, with a geometric mean of 1; 1 where they are not usable."""
    scale = torch.where(usable & scale.isfinite() & (scale > 0), scale, torch.zeros(()))
    middle = scale[scale > 0].log().mean().exp()
    return torch.where(scale > 0, scale / middle, torch.ones(())).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)


def _input_of(name: str) -> str:
    """A key for the tensor that a Linear reads; Linears with equal keys read the same tensor."""
    point = point_of(name)
    for part, one in ((".mlp.up", ".mlp.gate"), (".k", ".q"), (".v", ".q")):
        if point.endswith(part):
            return point.removesuffix(part) + one
    return point


def _point(statistics: Statistics, name: str, required: bool) -> PointStatistics | None:
    point = statistics.points.get(point_of(name))
    if point is None or point.count == 0:
        if required:
            raise CalibrationError(
                f"the calibration statistics say nothing about the input of {point_of(name)}; "
                "calibrate with samples that reach it (at least one with a picture)"
            )
        return None
    return point


class _Seen:
    """What calibration saw at a point, after its columns were folded."""

    def __init__(self, point: PointStatistics, columns: Tensor | None) -> None:
        self._point, self._folded = point, columns is not None
        scale = torch.ones(len(point.absmax)) if columns is None else columns
        self.rows = torch.from_numpy(point.rows.astype("float32")) / scale  # [R, K]
        self.absmax = torch.from_numpy(point.absmax.astype("float32")) / scale
        self.mean_square = torch.from_numpy(point.mean_square.astype("float32")) / scale.square()
        if not all(bool(t.isfinite().all()) for t in (self.rows, self.absmax, self.mean_square)):
            raise CalibrationError("the calibration statistics hold NaN or infinite values; calibrate again")

    def threshold(self, observer: str, weight: Tensor) -> float:
        """The largest |x| that is represented."""
        if not self._folded:
            return self._point.amax(observer)
        # The histogram was made before folding, but the rows can be folded. So the rows give the observer's share of
        # the range, and the range itself is exact.
        largest = float(self.absmax.max())
        if observer == "minmax" or not len(self.rows):
            return largest
        if observer == "percentile":
            seen = float(torch.quantile(self.rows.abs().flatten()[: 1 << 24], 0.9999))
            return max(seen, 0.25 * largest)
        target = self.rows @ weight.T
        best, best_error = largest, float("inf")
        for share in THRESHOLDS:
            step = largest * share / LEVELS["int8"]
            error = (
                float(((round_to(self.rows, step, "int8") * step) @ weight.T - target).square().mean()) if step else 0
            )
            if error < best_error:
                best, best_error = largest * share, error
        return best

    def error(self, weight: Tensor, linear: LinearPlan, input_scale: float | None, plan: PrecisionPlan) -> float:
        """Mean square error of the output over its mean square, with weights and inputs rounded by the plan."""
        target = self.rows @ weight.T
        rows = self.rows
        if input_scale is not None:
            rows = round_to(rows, input_scale, linear.precision) * input_scale
        rounded = restore(*quantize(weight, linear, self.mean_square, plan.clipping))
        energy = float(target.square().mean())
        return float((rows @ rounded.T - target).square().mean()) / energy if energy > 0 else 0.0


def sample(source: Checkpoint, name: str, folding: Folding | None = None) -> tuple[Tensor, Tensor]:
    """Evenly spread output channels of a Linear and the largest |weight| of every input: float32 [n, K], [K]."""
    n, k = source.shape(name)
    step = max(1, n // SAMPLED)
    largest, rows = torch.zeros(k), []
    for first, block in source.blocks(name):
        changed = folding.apply(name, block, first) if folding else block.float()
        largest = torch.maximum(largest, changed.abs().amax(0))
        rows.append(changed[-first % step :: step].clone())
    return torch.cat(rows), largest


def _search_group(
    source: Checkpoint,
    group: Group,
    readers: list[str],
    linears: Mapping[str, LinearPlan],
    point: PointStatistics,
    plan: PrecisionPlan,
) -> Tensor | None:
    """The scales [width] of least output error, or None if not scaling is best."""
    seen = _Seen(point, None)
    samples = {name: sample(source, name) for name in readers}
    largest_weight = group.channels(torch.stack([largest for _, largest in samples.values()]).amax(0))
    rounded = any(linears[name].activations for name in readers)
    mean = torch.from_numpy(point.mean_abs.astype("float32"))
    size = group.channels(seen.absmax if rounded else mean)
    usable = (size > 0) & (largest_weight > 0)
    if not bool(usable.any()) or not len(seen.rows):
        return None
    best: Tensor | None = None
    best_error = _group_error(seen, samples, linears, torch.ones(group.columns(size).shape), plan)
    for exponent in EXPONENTS:
        scale = size**exponent / (largest_weight ** (1 - exponent) if rounded else 1.0)
        scale = _normalized(scale, usable)
        error = _group_error(seen, samples, linears, group.columns(scale), plan)
        if error < best_error:
            best, best_error = scale, error
    return best


def _group_error(
    seen: _Seen,
    samples: Mapping[str, tuple[Tensor, Tensor]],
    linears: Mapping[str, LinearPlan],
    columns: Tensor,
    plan: PrecisionPlan,
) -> float:
    """Sum over the readers of the output error relative to the output, with these column scales."""
    rows = seen.rows / columns
    importance = seen.mean_square / columns.square()
    largest = float((seen.absmax / columns).max())
    total = 0.0
    for name, (weight, _) in samples.items():
        linear = linears[name]
        target = seen.rows @ weight.T
        x = rows
        if linear.activations:
            step = float(safe_scale(torch.tensor(largest), LEVELS[linear.precision]))
            x = round_to(rows, step, linear.precision) * step
        rounded = restore(*quantize(weight * columns, linear, importance, plan.clipping))
        energy = float(target.square().mean())
        total += float((x @ rounded.T - target).square().mean()) / energy if energy > 0 else 0.0
    return total
