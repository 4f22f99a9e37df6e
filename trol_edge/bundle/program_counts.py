"""Counts taken from an engine's program, small enough to be kept beside it: bytes and operations as polynomials.

The variables are those of a graph's costs (tokens, slots, images) and `capacity`, the rows of a K/V cache, because a
kernel that reads a cache as a whole reads as many.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from trol_edge.bundle.costs import MOST_NUMBER, Polynomial, evaluate, wrong_polynomials
from trol_edge.errors import BundleError
from trol_edge.program.traffic import UNFILLED, Traffic

Range = tuple[int, int]
REST = "rest"  # kind of the kernels that are neither a product nor attention
OFF = 0.02  # most that a polynomial may be off between the sizes that it was made from


@dataclasses.dataclass(frozen=True)
class Work:
    """Kernels of one kind, together: the type of a product ("float16", "int8", ...), "attention" or "rest".

    operations: of products with weights only; those of attention are in the graph's costs.
    """

    kind: str
    operations: Polynomial
    bytes: Polynomial


@dataclasses.dataclass(frozen=True)
class ProgramCounts:
    """One optimization profile. ranges: smallest and largest size of its dynamic dimensions.

    constants: bytes, each once. scratch: bytes that the engine holds. avoidable: bytes by kind, but for unfilled rows.
    """

    ranges: dict[str, Range]
    kernels: int
    constants: int
    scratch: int
    work: tuple[Work, ...]
    avoidable: dict[str, Polynomial]

    def takes(self, dims: Mapping[str, int]) -> bool:
        """Whether these sizes are within the profile."""
        return all(low <= dims[name] <= high for name, (low, high) in self.ranges.items() if name in dims)

    def wrong(self) -> Iterator[str]:
        """Describe what no counts of an engine have, because they may come from somewhere else."""
        yield from (f"a number {n!r:.40}" for n in (self.constants, self.scratch) if not 0 <= n <= MOST_NUMBER)
        of_work = [polynomial for work in self.work for polynomial in (work.operations, work.bytes)]
        yield from wrong_polynomials([*of_work, *self.avoidable.values()])

    def moved(self, dims: Mapping[str, int]) -> int:
        """Bytes that one run reads and writes. dims must have every variable."""
        return sum(evaluate(work.bytes, dims) for work in self.work)


def take(count: Callable[[Mapping[str, int]], Traffic], ranges: Mapping[str, Range], capacity: int) -> ProgramCounts:
    """Take the counts of a profile. count: the traffic at sizes of the dynamic dimensions.

    Raises BundleError if they do not follow from the sizes as polynomials do.
    """
    names = [name for name, (low, high) in sorted(ranges.items()) if low < high]
    points = _points({name: ranges[name] for name in names})
    fixed = {name: low for name, (low, high) in ranges.items() if low == high}
    samples = [count(fixed | point) for point in points]
    series: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0] * len(points))
    for i, traffic in enumerate(samples):
        for moved in traffic.kernels:
            kind = moved.product or REST
            series["operations", kind, ""][i] += moved.operations
            series["bytes", kind, ""][i] += moved.read + moved.written - moved.whole_caches
            series["bytes", kind, "capacity"][i] += moved.whole_caches
        for avoidable in traffic.avoidable:
            if avoidable.kind != UNFILLED:
                series["avoidable", avoidable.kind, ""][i] += avoidable.bytes
    found: dict[tuple[str, str], Polynomial] = defaultdict(dict)
    for (what, kind, factor), values in series.items():
        for term, value in _fit(points, names, values, f"the {what} of {kind}").items():
            value = round(value / capacity) if factor else round(value)
            term = "*".join(sorted(x for x in (*term.split("*"), factor) if x not in ("", "1"))) or "1"
            if value:
                found[what, kind][term] = value
    kinds = sorted({kind for what, kind in found if what != "avoidable"})
    return ProgramCounts(
        ranges=dict(ranges),
        kernels=len(samples[0].kernels),
        constants=samples[0].constants,
        scratch=samples[0].scratch,
        work=tuple(Work(k, dict(found["operations", k]), dict(found["bytes", k])) for k in kinds),
        avoidable={kind: dict(p) for (what, kind), p in found.items() if what == "avoidable"},
    )


def _points(ranges: Mapping[str, Range]) -> list[dict[str, int]]:
    """Sizes from which a polynomial that is linear in each is made, and one between them to check it by.

    A cache has at least as many rows in use as a prompt has tokens.
    """
    found: list[dict[str, int]] = [{}]
    if "tokens" in ranges and "slots" in ranges:
        (low, high), most = ranges["tokens"], ranges["slots"][1]
        middle = (low + min(high, most)) // 2
        found = [{"tokens": t, "slots": s} for t in (low, middle) for s in (middle, most)]
        between = {"tokens": (low + middle) // 2, "slots": (middle + most) // 2}
    elif ranges:
        ((name, (low, high)),) = ranges.items()
        found = [{name: low}, {name: high}]
        between = {name: (low + high) // 2}
    else:
        between = {}
    return [*found, between]


def _fit(
    points: Sequence[Mapping[str, int]], names: Sequence[str], values: Sequence[int], what: str
) -> dict[str, float]:
    """The polynomial through all points but the last one, which must be near it."""
    terms = ["1"]
    for name in names:
        terms += [name if term == "1" else f"{term}*{name}" for term in terms]
    rows = np.array([[evaluate({term: 1}, point) for term in terms] for point in points], np.float64)
    solved = np.linalg.lstsq(rows[:-1], np.array(values[:-1], np.float64), rcond=None)[0]
    expected = float(rows[-1] @ solved)
    if abs(expected - values[-1]) > OFF * max(abs(values[-1]), 1e6):
        raise BundleError(f"{what} at {dict(points[-1])} is {values[-1]}, not {expected:.0f} as between other sizes")
    return dict(zip(terms, map(float, solved), strict=True))


def grown(one: ProgramCounts, two: ProgramCounts, count: int) -> ProgramCounts:
    """The counts of an engine with `count` layers, from those with one layer and with two."""

    def polynomial(a: Polynomial, b: Polynomial) -> Polynomial:
        return {term: number(a.get(term, 0), b.get(term, 0)) for term in (a | b)}

    def number(a: int, b: int) -> int:
        return a + (count - 1) * (b - a)

    def work(counts: ProgramCounts, kind: str) -> Work:
        return next((w for w in counts.work if w.kind == kind), Work(kind, {}, {}))

    kinds = sorted({w.kind for w in (*one.work, *two.work)})
    return ProgramCounts(
        ranges=two.ranges,
        kernels=number(one.kernels, two.kernels),
        constants=number(one.constants, two.constants),
        scratch=max(two.scratch, number(one.scratch, two.scratch)),  # an engine with two may hold less than one
        work=tuple(
            Work(
                kind,
                polynomial(work(one, kind).operations, work(two, kind).operations),
                polynomial(work(one, kind).bytes, work(two, kind).bytes),
            )
            for kind in kinds
        ),
        avoidable={
            kind: polynomial(one.avoidable.get(kind, {}), two.avoidable.get(kind, {}))
            for kind in (one.avoidable | two.avoidable)
        },
    )
