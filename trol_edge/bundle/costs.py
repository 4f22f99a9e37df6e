"""Costs of one run of a graph: operations and bytes, exact in its dynamic dimensions. Pure data, counted by export.

A polynomial is a dict from monomial to whole coefficient: {"tokens*slots": 4096, "tokens": 12, "1": 7} is
4096*tokens*slots + 12*tokens + 7. Its variables are the dynamic dimensions of the graph's ports. Vision has images (or
tiles). Traverse has tokens, and slots (tokens in the cache after the run). A step has slots, too, because its attention
reads only the filled part of the cache; for the CPU target no port shows them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from trol_edge.errors import UsageError

Polynomial = dict[str, int]
KINDS = ("linear", "convolution", "attention", "norm", "pointwise", "move")  # kinds of operations
ARITHMETIC = ("float32", "float16", "int8", "int4", "fp8")
VARIABLES = frozenset(("images", "tokens", "slots", "capacity", "1"))
MOST_FACTORS, MOST_OPERATIONS, MOST_NUMBER = 3, 1 << 12, 1 << 50  # above what any model has


@dataclasses.dataclass(frozen=True)
class Cost:
    """Totals of one run. A multiply-add is two operations, a function of one element (Sigmoid, Tanh) is one.

    weight_bytes: weights in the type in which they are loaded, counted for each operator that reads them, so for both
    passes of a traverse. activation_bytes: tensors between operators, written once and read by each reader.
    cache_bytes: rows of the K/V cache, written and read.
    """

    flops: int
    weight_bytes: int
    activation_bytes: int
    cache_bytes: int

    @property
    def bytes(self) -> int:
        """All bytes that are read and written."""
        return self.weight_bytes + self.activation_bytes + self.cache_bytes


@dataclasses.dataclass(frozen=True)
class Operation:
    """`count` operators that cost the same. The numbers are those of one."""

    kind: str  # linear (a product with weights), convolution, attention, norm, pointwise, move (copies and reorders)
    arithmetic: str  # type of both factors: "float32", "float16", "int8" or "fp8"
    stored: str | None  # type of its weights: "float32", "float16", "int8", "int4", "fp8"; None without weights
    count: int
    flops: Polynomial
    weight_bytes: int
    activation_bytes: Polynomial
    cache_bytes: Polynomial

    def at(self, dims: Mapping[str, int]) -> Cost:
        """The cost of one of these operators."""
        return Cost(
            evaluate(self.flops, dims),
            self.weight_bytes,
            evaluate(self.activation_bytes, dims),
            evaluate(self.cache_bytes, dims),
        )


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of one graph.

    peak: bytes of tensors that are alive together (without weights, cache, inputs and outputs of the graph) at the
    places that can be the fullest. defaults: values of dimensions that need not be given.
    """

    operations: tuple[Operation, ...]
    peak: tuple[Polynomial, ...]
    defaults: dict[str, int]

    def dims(self, given: Mapping[str, int]) -> dict[str, int]:
        """The dimensions with their defaults. Raises UsageError for one that is missing."""
        polynomials = [*self.peak, *(p for o in self.operations for p in (o.flops, o.activation_bytes, o.cache_bytes))]
        needed = {name for polynomial in polynomials for term in polynomial for name in term.split("*")} - {"1"}
        found = self.defaults | dict(given)
        if missing := sorted(needed - found.keys()):
            raise UsageError(f"costs of a graph: no value for its dimension {', '.join(missing)}; give one")
        return found

    def at(self, **dims: int) -> Cost:
        """Totals of one run, such as at(tokens=1300, slots=1300), at(images=1), or at() for a step on a full cache.

        Dimensions that the graph does not have are ignored. Raises UsageError for one that is missing.
        """
        return _total(self.operations, self.dims(dims))

    def peak_bytes(self, **dims: int) -> int:
        """The peak of the bytes of tensors that are alive together."""
        sizes = self.dims(dims)
        return max((evaluate(polynomial, sizes) for polynomial in self.peak), default=0)


def evaluate(polynomial: Polynomial, dims: Mapping[str, int]) -> int:
    """The value of a polynomial. dims must have every variable."""
    total = 0
    for term, coefficient in polynomial.items():
        for name in term.split("*"):
            if name != "1":
                coefficient *= dims[name]
        total += coefficient
    return total


def wrong_counts(costs: Costs) -> Iterator[str]:
    """Describe what no counts of a graph have, because they may come from somewhere else."""
    if not len(costs.operations) <= MOST_OPERATIONS:
        yield f"{len(costs.operations)} kinds of work"
    if any(o.kind not in KINDS or o.arithmetic not in ARITHMETIC for o in costs.operations):
        yield "unknown kinds of work"
    if any(not 1 <= o.count <= MOST_OPERATIONS or not 0 <= o.weight_bytes <= MOST_NUMBER for o in costs.operations):
        yield "numbers that no model has"
    if not costs.defaults.keys() <= VARIABLES or any(not 0 <= n <= MOST_NUMBER for n in costs.defaults.values()):
        yield "dimensions that no graph has"
    polynomials = [p for o in costs.operations for p in (o.flops, o.activation_bytes, o.cache_bytes)]
    yield from wrong_polynomials([*costs.peak, *polynomials])


def wrong_polynomials(polynomials: Iterable[Polynomial]) -> Iterator[str]:
    """Describe polynomials whose evaluation would take long, or end in an error."""
    for polynomial in polynomials:
        for term, coefficient in polynomial.items():
            names = term[: 10 * MOST_FACTORS].split("*")
            if len(term) > 10 * MOST_FACTORS or len(names) > MOST_FACTORS or not VARIABLES.issuperset(names):
                yield f"a term {term[:40]!r}"
                return
            if not abs(coefficient) <= MOST_NUMBER:
                yield f"a coefficient {coefficient!r:.40}"
                return


def _total(operations: tuple[Operation, ...], dims: Mapping[str, int]) -> Cost:
    parts = [(o.count, o.at(dims)) for o in operations]
    return Cost(
        sum(n * c.flops for n, c in parts),
        sum(n * c.weight_bytes for n, c in parts),
        sum(n * c.activation_bytes for n, c in parts),
        sum(n * c.cache_bytes for n, c in parts),
    )
