"""Computes how long one run of a graph takes: a floor and an expected time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from trol_edge.bundle.costs import Costs, Operation, evaluate
from trol_edge.bundle.program_counts import ProgramCounts
from trol_edge.errors import UsageError
from trol_edge.plan.rates import PACKED, Platform, Points, Rates


@dataclasses.dataclass(frozen=True)
class GraphTime:
    """The work and the times of one run of one graph. moved: all bytes that its engine's program moves, if known."""

    graph: str
    dims: dict[str, int]
    flops: int
    bytes: int  # of weights and cache
    floor: float  # seconds
    expected: float  # seconds
    bound: str  # takes most of the expected time: "arithmetic", "memory" or "starting operators"
    moved: int | None = None


def graph_time(
    graph: str,
    costs: Costs,
    weight_bytes: int,
    machine: Platform,
    programs: Sequence[ProgramCounts] = (),
    capacity: int = 0,
    /,
    **dims: int,
) -> GraphTime:
    """Compute the times of one run of a graph whose weights take weight_bytes.

    programs: what the kernels of its engine move, by optimization profile. Where it is known, the expected time is that
    of these bytes and products; what only the graph says is taken from there (attention, operators that start). The
    floor never depends on an engine. capacity: rows of a K/V cache.
    """
    sizes, total = costs.dims(dims), costs.at(**dims)
    moved = None
    if programs:
        program = next((p for p in programs if p.takes(sizes)), programs[-1])
        every = {"capacity": capacity} | dict.fromkeys(("tokens", "slots", "images"), 1) | sizes
        moved = program.moved(every)
        parts = [*_of_program(program, costs, every, weight_bytes, machine.reached)]
        parts += [(0.0, 0.0, _seconds(o, sizes, weight_bytes, machine.reached)[2]) for o in costs.operations]
    else:
        parts = [_seconds(o, sizes, weight_bytes, machine.reached) for o in costs.operations]
    sums = {
        "arithmetic": sum(c for c, m, _ in parts if c >= m),
        "memory": sum(m for c, m, _ in parts if c < m),
        "starting operators": sum(s for _, _, s in parts) + machine.reached.run,
    }
    products = [(o, o.at(sizes)) for o in costs.operations if o.kind in ("linear", "convolution", "attention")]
    compute = sum(o.count * c.flops / _most(machine.peak, o.arithmetic) for o, c in products)
    needed = total.weight_bytes + total.cache_bytes
    floor = max(compute, needed / max(rate for _, rate in machine.peak.reads))
    bound = max(sums, key=lambda name: sums[name])
    shown = {name: size for name, size in sizes.items() if name in ("tokens", "slots", "images")}
    return GraphTime(
        graph=graph,
        dims=shown,
        flops=total.flops,
        bytes=needed,
        floor=floor,
        expected=sum(sums.values()),
        bound=bound,
        moved=moved,
    )


def _of_program(
    program: ProgramCounts, costs: Costs, dims: Mapping[str, int], weight_bytes: int, rates: Rates
) -> Iterator[tuple[float, float, float]]:
    """Seconds of arithmetic and memory of the kernels of each kind; starting them is counted with the operators."""
    attention = [o for o in costs.operations if o.kind == "attention"]
    for work in program.work:
        if work.kind == "attention":
            arithmetic = sum(o.count * o.at(dims).flops / _reached(rates, o.arithmetic) for o in attention)
        else:
            operations = evaluate(work.operations, dims)
            arithmetic = operations / _reached(rates, work.kind) if operations else 0.0
        yield arithmetic, evaluate(work.bytes, dims) / rate_at(rates.reads, weight_bytes), 0.0


def _reached(rates: Rates, arithmetic: str) -> float:
    return _most(rates, "float16" if arithmetic == "bfloat16" else arithmetic)


def _seconds(o: Operation, dims: Mapping[str, int], weight_bytes: int, rates: Rates) -> tuple[float, float, float]:
    """Seconds of arithmetic, memory and start-up of all operators of one kind."""
    if rates.fused and o.kind in ("pointwise", "move"):
        return 0.0, 0.0, 0.0
    cost = o.at(dims)
    product = o.kind in ("linear", "convolution", "attention")
    read = rate_at(rates.reads, weight_bytes)
    if o.stored in rates.stored:
        read = min(read, rates.stored[o.stored])
    touched = 0.0 if rates.fused and product else cost.activation_bytes / rate_at(rates.touches, cost.activation_bytes)
    memory = (cost.weight_bytes + cost.cache_bytes) / read + touched
    points = rates.arithmetic.get("attention") if o.kind == "attention" else None
    if o.stored == "int4" and o.arithmetic == "float32":
        points = rates.arithmetic.get(PACKED)
    arithmetic = cost.flops / rate_at(points or _points(rates, o.arithmetic), cost.flops) if product else 0.0
    if product and o.kind != "attention":  # the measured rate of attention includes the time for its scores
        arithmetic += touched
    starts = {"attention": rates.attention, "linear": rates.product, "convolution": rates.product}
    return o.count * arithmetic, o.count * memory, o.count * starts.get(o.kind, rates.operator)


def _points(rates: Rates, arithmetic: str) -> Points:
    if arithmetic not in rates.arithmetic:
        raise UsageError(f"the speed of {arithmetic} on this machine is not known; choose another precision")
    return rates.arithmetic[arithmetic]


def _most(rates: Rates, arithmetic: str) -> float:
    return max(rate for _, rate in _points(rates, arithmetic))


def rate_at(points: Points, amount: int) -> float:
    """The rate at an amount, interpolated log-linearly; beyond the ends it is that of the nearest point."""
    for (low, slow), (high, fast) in itertools.pairwise(points):
        if low <= amount < high:
            return slow * (fast / slow) ** (math.log(amount / low) / math.log(high / low))
    return points[0][1] if amount < points[0][0] else points[-1][1]
