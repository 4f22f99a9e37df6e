"""Collects what passes through a layer: the inputs of every Linear and the scores of attention."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trol_edge.errors import CalibrationError
from trol_edge.export.gates import ACTIVE, GATE_BINS, KINDS, Gate
from trol_edge.export.quantize.stats import (
    BINS,
    ROWS,
    PointStatistics,
)
from trol_edge.export.reference.model import EagerAttention, LoraLinear

HISTOGRAM_ROWS = 256  # rows of one call that the histogram counts
RESIDUAL_NORMS = ("attention_norm", "mlp_norm", "norm1", "norm2")  # norms whose input is the residual stream


class Collector:
    """Gathers statistics of the Linears of one stage with forward hooks, and peaks of the tensors between them."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.points: dict[str, _Point] = {}
        self.peaks: dict[str, float] = {}
        self.sample_name = ""
        self.more: dict[str, Any] = {}  # what else the stage keeps, in JSON
        self.arrays: dict[str, NDArray[Any]] = {}  # and as arrays
        self._seen: tuple[Tensor, _Rows] | None = None  # q, k and v (gate and up) read the same tensor

    @contextlib.contextmanager
    def sample(self, name: str) -> Iterator[None]:
        """Name the current sample, for messages."""
        self.sample_name, self._seen = name, None
        yield
        self._seen = None

    @contextlib.contextmanager
    def watch(self, module: nn.Module, prefix: str, only: Iterable[str] | None = None) -> Iterator[None]:
        """Observe every Linear below a module (or those named `only`), its norms and its attention."""
        handles = []
        for name, child in module.named_modules():
            path = f"{prefix}.{name}"
            if only is not None and name not in only:
                continue
            if isinstance(child, (nn.Linear, LoraLinear)):
                handles.append(child.register_forward_hook(self._hook(path)))
            elif name in RESIDUAL_NORMS:
                handles.append(child.register_forward_pre_hook(self._residual(f"{prefix}.residual")))
        try:
            with _Scores(lambda scores: self.peak(f"{prefix}.scores", scores)):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.input(path, args[0])
            self.output(path, output)
            mask = args[1] if len(args) > 1 else None
            if isinstance(module, LoraLinear) and mask is not None and module.lora_a is not None:
                assert module.lora_b is not None
                middle = F.linear(args[0][mask[..., 0] > 0], module.lora_a)
                rows = self.input(f"{path}.lora_b", middle)
                self.output(f"{path}.lora_b", F.linear(rows.some.to(module.lora_b.dtype), module.lora_b))

        return hook

    def _residual(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self.peak(name, args[0])

    def peak(self, name: str, tensor: Tensor, sample: str | None = None) -> None:
        """Record the largest |value| of a tensor."""
        low, high = (float(v) for v in torch.aminmax(tensor))
        self.peaks[name] = max(self.peaks.get(name, 0.0), self._finite(name, max(-low, high), sample))

    def input(self, name: str, tensor: Tensor) -> _Rows:
        """Record the input of a Linear, [..., K]."""
        if self._seen is None or self._seen[0] is not tensor:
            rows = _Rows(tensor.detach().reshape(-1, tensor.shape[-1]).float(), self.rng)
            self._finite(name, float(rows.absmax.max()), None)
            self._seen = (tensor, rows)
        rows = self._seen[1]
        self.points.setdefault(name, _Point()).add(rows)
        return rows

    def output(self, name: str, tensor: Tensor) -> None:
        """Record the output of a Linear."""
        low, high = (float(v) for v in torch.aminmax(tensor))
        point = self.points[name]
        point.output_absmax = max(point.output_absmax, self._finite(f"{name} (output)", max(-low, high), None))

    def _finite(self, name: str, value: float, sample: str | None) -> float:
        if not math.isfinite(value):
            raise CalibrationError(
                f"NaN or infinite activations at {name}, sample {sample or self.sample_name!r}; the checkpoint's "
                "weights are damaged or too large for float32: `trol-edge export` names tensors that are not finite"
            )
        return value

    def finished(self) -> dict[str, PointStatistics]:
        """Return all points of the stage."""
        return {name: point.statistics() for name, point in self.points.items()}


class _Rows:
    """The input of a Linear in one call, [n, K] float32, as sums over all rows and a few whole rows."""

    def __init__(self, x: Tensor, rng: np.random.Generator) -> None:
        self.count = len(x)
        magnitude = x.abs()
        self.absmax = magnitude.amax(0)
        self.sum_abs = magnitude.sum(0, dtype=torch.float64)
        self.sum_square = magnitude.square_().sum(0, dtype=torch.float64)
        self.keys = rng.random(self.count)
        chosen = np.argsort(self.keys)[:HISTOGRAM_ROWS]
        self.keys = self.keys[chosen]
        self.some = x[torch.from_numpy(chosen)]


class _Point:
    """Running statistics of one point."""

    def __init__(self) -> None:
        self.count = 0
        self.output_absmax = 0.0
        self.top = 0.0
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.keys = np.empty(0)

    def add(self, rows: _Rows) -> None:
        if not self.count:
            self.absmax, self.sum_abs, self.sum_square = rows.absmax, rows.sum_abs, rows.sum_square
            self.rows = rows.some[:ROWS]
            self.keys = rows.keys[:ROWS]
        else:
            self.absmax = torch.maximum(self.absmax, rows.absmax)
            self.sum_abs, self.sum_square = self.sum_abs + rows.sum_abs, self.sum_square + rows.sum_square
            # Keeping the rows with the smallest random keys of all that were seen is a uniform choice.
            keys = np.concatenate((self.keys, rows.keys[:ROWS]))
            chosen = np.argsort(keys)[:ROWS]
            self.rows = torch.cat((self.rows, rows.some[:ROWS]))[torch.from_numpy(chosen)]
            self.keys = keys[chosen]
        self.count += rows.count
        self._grow(float(rows.absmax.max()))
        if self.top > 0:
            counts = torch.histc(rows.some.abs(), BINS, 0.0, self.top)
            self.histogram += counts.long()
        else:
            self.histogram[0] += rows.some.numel()

    def _grow(self, largest: float) -> None:
        """Let the histogram reach `largest` by doubling its range and merging neighbouring bins."""
        if self.top == 0:
            self.top = largest  # everything counted so far is zero, and in the first bin
        while self.top < largest:
            self.top *= 2
            merged = self.histogram.view(-1, 2).sum(1)
            self.histogram = torch.cat((merged, torch.zeros_like(merged)))

    def statistics(self) -> PointStatistics:
        return PointStatistics(
            count=self.count,
            absmax=self.absmax.numpy(),
            mean_abs=(self.sum_abs / self.count).float().numpy(),
            mean_square=(self.sum_square / self.count).float().numpy(),
            rows=self.rows.numpy(),
            histogram=self.histogram.numpy(),
            histogram_max=self.top,
            output_absmax=self.output_absmax,
        )


class CachePeaks:
    """The largest |keys| and |values| of one layer by pass, head and channel, as a cache holds them: keys rotated."""

    def __init__(self, heads: int, size: int) -> None:
        self.found = np.zeros((2, 2, heads, size), np.float32)  # keys and values, both passes

    def add(self, attend: EagerAttention) -> None:
        """Count the rows that attention over a prompt left in its caches, which are of one layer."""
        for kind, cached in enumerate((attend.keys, attend.values)):
            for traversal in (0, 1):
                rows = cached[traversal][0]
                assert rows is not None
                peaks = rows[0].float().abs().amax(1).numpy()
                np.maximum(self.found[kind, traversal], peaks, out=self.found[kind, traversal])


class GateCounts:
    """Counts the values of the gate in one layer, by kind of token."""

    def __init__(self) -> None:
        self._histogram = np.zeros((len(KINDS), GATE_BINS), np.int64)
        self._sum, self._active = np.zeros(len(KINDS)), np.zeros(len(KINDS), np.int64)

    def add(self, s: NDArray[np.float32], kinds: NDArray[np.uint8]) -> None:
        """Count the tokens of a prompt. s [S], 0..1; kinds [S], places in KINDS."""
        for kind in range(len(KINDS)):
            values = s[kinds == kind]
            self._histogram[kind] += np.histogram(values, GATE_BINS, (0.0, 1.0))[0]
            self._sum[kind] += values.sum(dtype=np.float64)
            self._active[kind] += (values > ACTIVE).sum()

    def finished(self) -> dict[str, Any]:
        """Return a `Gate` as plain data for each kind that was seen."""
        found = {}
        for kind, name in enumerate(KINDS):
            if tokens := int(self._histogram[kind].sum()):
                mean, active = float(self._sum[kind]) / tokens, int(self._active[kind]) / tokens
                gate = Gate(tokens, mean, active, tuple(map(int, self._histogram[kind])))
                found[name] = dataclasses.asdict(gate)
        return found


class _Scores(TorchFunctionMode):
    """Pass the attention scores, before mask and softmax, to a function. The result of attention does not change."""

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]  # [N, H, S, E], [N, G, T, E]
            group = q.shape[1] // k.shape[1]
            for head in range(q.shape[1]):  # one at a time, because all heads would be the run's largest tensor
                self.note(q[:, head] @ k[:, head // group].transpose(-1, -2) / math.sqrt(q.shape[-1]))
        return func(*args, **(kwargs or {}))
