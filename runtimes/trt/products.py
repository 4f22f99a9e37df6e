"""Checks that a built engine multiplies in 8 bits where the plan says so, by the products in the engine's program.

A network can hold every DequantizeLinear that was asked for and still multiply in FP16: whether a product and the
rounding around it become one kernel is decided while the engine is built. Only the program shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from trol_edge.bundle.costs import evaluate
from trol_edge.bundle.engines import Range
from trol_edge.bundle.manifest import Bundle, GraphInfo
from trol_edge.bundle.programs import traffic_of
from trol_edge.bundle.sizes import shared_weights
from trol_edge.errors import BackendError, BundleError, UsageError
from trol_edge.program.model import Program
from trol_edge.program.traffic import Traffic

EIGHT_BITS = ("int8", "fp8")
TOLERANCE = 0.05  # share of the operations: a compiler pads rows, of a picture's 1025 tokens for example


def operations(graph: GraphInfo, dims: Mapping[str, int]) -> dict[str, int]:
    """Operations of the graph's products with weights, by the type that the plan multiplies in."""
    found: Counter[str] = Counter()
    if graph.costs is None:
        return {}
    sizes = graph.costs.dims(dims)
    for operation in graph.costs.operations:
        if operation.kind == "linear":
            found[operation.arithmetic] += operation.count * evaluate(operation.flops, sizes)
    return dict(found)


def products(traffic: Traffic) -> dict[str, int]:
    """Operations of an engine's products with weights, by the type of their factors."""
    found: Counter[str] = Counter()
    for kernel in traffic.kernels:
        if kernel.operations:
            found[kernel.product] += kernel.operations
    return dict(found)


def table(asked: Mapping[str, int], found: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Type -> operations asked for and found, the most first."""
    kinds = sorted(asked.keys() | found.keys(), key=lambda kind: -max(asked.get(kind, 0), found.get(kind, 0)))
    return {kind: (asked.get(kind, 0), found.get(kind, 0)) for kind in kinds}


def differences(asked: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """The 8-bit types in which an engine multiplies less, or more, than the plan asks for, in words."""
    return [
        f"{kind}: {asked.get(kind, 0) / 1e9:.3f} billion operations asked for, {found.get(kind, 0) / 1e9:.3f} found"
        for kind in EIGHT_BITS
        if abs(found.get(kind, 0) - asked.get(kind, 0)) > TOLERANCE * asked.get(kind, 0)
    ]


def require_products(
    bundle: Bundle, graph: GraphInfo, profiles: Sequence[Program], ranges: Sequence[Mapping[str, Range]]
) -> dict[str, tuple[int, int]]:
    """The table of an engine's products, at the best sizes of its last profile.

    profiles: its programs. Nothing is known of an engine without any, or of one that they leave something open about;
    its table is empty. Raises BackendError if its 8-bit products are not the plan's.
    """
    dims = {dim: best for dim, (_, best, _) in (ranges[-1] if ranges else {}).items()}
    context = bundle.manifest.context
    try:
        found = products(traffic_of(graph, context, profiles, dims, None, shared_weights(bundle)))
    except (BundleError, UsageError):
        return {}
    if graph.costs is None:
        return {}
    asked = operations(graph, dims)
    if wrong := differences(asked, found):
        raise BackendError(
            f"{graph.file}: the engine does not multiply in the precision of its plan ({'; '.join(wrong)}), so it "
            "would be slower than planned; please report this, with the version of TensorRT"
        )
    return table(asked, found)
