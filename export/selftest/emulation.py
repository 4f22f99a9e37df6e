"""Emulates the arithmetic of a bundle's graphs in PyTorch.

Every Linear multiplies the weights that are stored, and its input is rounded as its graph rounds it. Where inputs are
rounded, two machines drift apart: a difference in the last bit of float32 sometimes moves a number to the next step,
and that moves others. So a second run forces the input of every Linear to a pattern that no rounding moves
(trol_edge.bundle.probes), and notes what the model itself computed there. Nothing adds up in that run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trol_edge.bundle import probes
from trol_edge.bundle.precision import QUANTIZED, LinearPlan, PrecisionPlan
from trol_edge.export.lower.ort import OUTPUT_LAYER
from trol_edge.export.quantize.recipes import GATE
from trol_edge.export.quantize.rounding import round_to

STEP = "step"


@dataclasses.dataclass(frozen=True)
class Cut:
    """The common input of some Linears: a value of the graph, its first reader, the number of that use."""

    value: str
    weight: str
    use: int


def find_cuts(model: ir.Model) -> dict[tuple[str, int], Cut]:
    """The cut at which each use of a Linear reads, of a traced graph: (weight, number of use) -> Cut."""
    uses: Counter[str] = Counter()
    cuts: dict[str, Cut] = {}
    found = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        transposed = weight.producer() if weight is not None else None
        if transposed is not None and transposed.op_type == "Transpose":
            weight = transposed.inputs[0]
        if weight is None or not weight.is_initializer() or weight.const_value is not None or weight.name == GATE:
            continue
        x = node.inputs[0]
        assert weight.name and x is not None and x.name
        cut = cuts.setdefault(x.name, Cut(x.name, weight.name, uses[weight.name]))
        found[weight.name, uses[weight.name]] = cut
        uses[weight.name] += 1
    return found


@dataclasses.dataclass
class Seen:
    """What a forced run noted: per cut in the order of computation its name, tokens, width, scale, and summary."""

    names: list[str] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    widths: list[int] = dataclasses.field(default_factory=list)
    scales: list[float] = dataclasses.field(default_factory=list)
    summaries: list[Any] = dataclasses.field(default_factory=list)


class Emulation(TorchFunctionMode):
    """Replaces F.linear on the parameters of a part of the model; everything else runs as it is.

    cuts: by graph, see `find_cuts`. inputs: scales of rounded inputs by Linear. once: all graphs of a CPU read 4-bit
    weights as they are, and the output layer sees one token in each.
    """

    def __init__(
        self,
        plan: PrecisionPlan,
        target: str,
        inputs: Mapping[str, float],
        cuts: Mapping[str, Mapping[tuple[str, int], Cut]],
        once: bool = False,
    ) -> None:
        super().__init__()
        self._plan, self._target, self._cuts, self._once = plan, target, cuts, once
        # (graph, value, precision) -> the scale of the one pair that rounds it, which is its first reader's.
        self._steps: dict[tuple[str, str, str], float] = {}
        # (graph, value) -> the first reader of 8 bits, which on a CPU decides how the value is rounded for all of them.
        self._first: dict[tuple[str, str], LinearPlan] = {}
        for graph, found in cuts.items():
            for (weight, _), cut in found.items():
                linear = plan.linears[weight]
                if linear.activations:
                    self._steps.setdefault((graph, cut.value, linear.precision), inputs[weight])
                if linear.precision == "int8" or (linear.precision == "int4" and graph != STEP and not once):
                    self._first.setdefault((graph, cut.value), linear)
        self._names: dict[int, str] = {}
        self._derived: dict[str, Tensor] = {}
        self._natural: dict[tuple[bool, str], float] = {}  # (in a step, weight) -> root mean square of its input
        self._graph = ""
        self._seen: Seen | None = None
        self._uses: Counter[str] = Counter()
        self._forced: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def part(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """Emulate the Linears of a module whose parameters' names begin with `prefix`."""
        self._names = {id(p): f"{prefix}.{name}" for name, p in module.named_parameters()}
        self._derived = {}
        with self:
            yield
        self._names = {}

    @property
    def _packed(self) -> bool:
        """Whether the graph on a CPU reads 4-bit weights in their packed form."""
        return self._once or self._graph == STEP

    @property
    def forced(self) -> bool:
        """Whether there are forced runs: a device can cut the graphs of a CPU only."""
        return self._target == "cpu"

    def begin(self, graph: str, seen: Seen | None = None) -> None:
        """Say which graph runs next. With `seen` its Linears are forced, and what was computed is noted there."""
        self._graph, self._seen = graph, seen
        self._uses, self._forced = Counter(), {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self._names:
            name = self._names[id(args[1])]
            x = self.input(name, args[0])
            weight = args[1]
            if self.is_derived(name):
                if name not in self._derived:
                    self._derived[name] = _in_eight_bits(weight)
                weight = self._derived[name]
            args = (x, weight, *args[2:])
        return func(*args, **(kwargs or {}))

    def is_derived(self, name: str) -> bool:
        """Whether the graph reads the 8-bit form of a 4-bit weight."""
        linear = self._plan.linears.get(name)
        return linear is not None and linear.precision == "int4" and self._target == "cpu" and not self._packed

    def input(self, name: str, x: Tensor) -> Tensor:
        """The input that a Linear multiplies, for x [..., K]."""
        use, self._uses[name] = self._uses[name], self._uses[name] + 1
        cut = self._cuts[self._graph].get((name, use))
        linear = self._plan.linears.get(name)
        if cut is None or linear is None:
            return x
        if self._seen is None:
            self._natural[self._graph == STEP, name] = float(x.float().square().mean().sqrt())
        else:
            if cut.value not in self._forced:
                self._forced[cut.value] = self._force(cut, x, self._seen)
            x = self._forced[cut.value]
        own = linear.precision not in QUANTIZED or (self._packed and linear.precision == "int4")
        if self._target == "cpu" and not own:
            linear = self._first.get((self._graph, cut.value), linear)
        return self._rounded(name, x, linear, self._steps.get((self._graph, cut.value, linear.precision)))

    def _force(self, cut: Cut, x: Tensor, seen: Seen) -> Tensor:
        tokens, width = x.shape[-2:]
        numbers = probes.pattern(cut.value, width)
        natural = self._natural.get((self._graph == STEP, cut.weight)) or self._natural[False, cut.weight]
        scale = max(natural, 1e-6) / float(np.sqrt(np.mean(np.square(numbers.astype(np.float64)))))
        step = self._steps.get((self._graph, cut.value, "int8"))
        if step is not None:
            scale = step * max(1, round(scale / step))
        scale = float(np.float32(scale))
        seen.names.append(f"{cut.value}\t{cut.weight}\t{cut.use}")
        seen.tokens.append(tokens)
        seen.widths.append(width)
        seen.scales.append(scale)
        rows = probes.summary(x.reshape(tokens, width)[probes.seen(tokens)].numpy())
        seen.summaries.append(np.pad(rows, ((0, probes.SEEN - len(rows)), (0, 0))))
        given = torch.from_numpy(numbers.astype(np.float32) * np.float32(scale))
        return given[torch.arange(tokens) % probes.ROWS].view(x.shape)

    def _rounded(self, name: str, x: Tensor, linear: LinearPlan, step: float | None) -> Tensor:
        """The numbers that a graph multiplies with instead of x, see export/lower/ort.py."""
        if linear.precision not in QUANTIZED:
            return x
        if linear.activations:
            assert step is not None
            if linear.precision == "fp8":
                return round_to(x, step, "fp8") * step
            return (x / step).round().clamp(-128, 127) * step
        if self._target != "cpu":
            return x
        if linear.precision == "int4" and self._packed:
            blocks = x.reshape(*x.shape[:-1], -1, linear.block or 1)
            steps = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
            return ((blocks / steps).round() * steps).view(x.shape)
        if self._graph != STEP and not (self._once and name == OUTPUT_LAYER):
            by_token = (x.abs().amax(-1, keepdim=True) * np.float32(1 / 127)).clamp_min(1e-30)
            return (x / by_token).round().clamp(-128, 127) * by_token
        low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        width = ((high - low) / 255).clamp_min(1e-30)
        zero = (-low / width).round().clamp(0, 255)
        return (((x / width).round() + zero).clamp(0, 255) - zero) * width


def _in_eight_bits(weight: Tensor) -> Tensor:
    """What trol_edge.bundle.derived makes of a 4-bit weight [n, K] when a bundle is loaded."""
    step = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (weight * (1 / step)).round() * step


def stacked(seen: Seen) -> dict[str, Any]:
    """The arrays of a record by the names of trol_edge.bundle.selftest.ForcedGraph."""
    return {
        "names": np.frombuffer("\n".join(seen.names).encode(), np.uint8),
        "tokens": np.array(seen.tokens, np.int32),
        "widths": np.array(seen.widths, np.int32),
        "scales": np.array(seen.scales, np.float32),
        "seen": np.stack(seen.summaries),
    }
