"""Counts what the engines of a bundle move, for the ports of its graphs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from trol_edge.bundle.engines import EngineSet, Range, folder_of
from trol_edge.bundle.manifest import Bundle, GraphInfo
from trol_edge.bundle.program_counts import ProgramCounts, take
from trol_edge.errors import BundleError, UsageError
from trol_edge.program.model import Program
from trol_edge.program.traffic import Traffic, count
from trol_edge.reading import stays_inside


def engine_path(bundle: Bundle, engines: EngineSet, name: str) -> Path:
    """The file of an engine, which is only read as text. Raises BundleError if it is not as engines.json says."""
    info = engines.engines[name]
    path = folder_of(bundle, engines.key.target) / info.file
    if not path.is_file() or not stays_inside(path) or path.stat().st_size != info.bytes:
        raise BundleError(f"{path}: missing, or not the file of {info.bytes} bytes that was built; build it again")
    return path


def caches_of(graph: GraphInfo, context: int) -> dict[str, int]:
    """The K/V caches among a graph's ports -> the axis of their rows."""
    found = {}
    for port in (*graph.inputs, *graph.outputs):
        if port.name.startswith(("past_", "present_")):
            axes = [i for i, size in enumerate(port.shape) if size == context or size == "slots"]
            if axes:
                found[port.name] = axes[-1] if len(axes) == 1 else len(port.shape) - 2
    return found


def shapes_of(graph: GraphInfo, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of a graph's ports for sizes of its dynamic dimensions. Raises UsageError if one is missing."""
    names = {size for port in graph.inputs for size in port.shape if isinstance(size, str)}
    if missing := sorted(names - dims.keys()):
        raise UsageError(f"{graph.file}: no size for its dimension {', '.join(missing)}; give one")
    ports = (*graph.inputs, *graph.outputs)
    return {
        port.name: tuple(dims[size] if isinstance(size, str) else size for size in port.shape)
        for port in ports
        if all(isinstance(size, int) or size in dims for size in port.shape)
    }


def traffic_of(
    graph: GraphInfo,
    context: int,
    profiles: Sequence[Program],
    dims: Mapping[str, int],
    filled: int | None,
    weights: Collection[str] = (),
) -> Traffic:
    """Count one run of a graph's engine by the profile that takes these sizes (tokens, slots, images).

    context: rows of its caches, of which `filled` are in use (None: all). weights: inputs that hold weights.
    Raises UsageError if no profile takes the sizes, and BundleError if the program leaves something open.
    """
    problems = []
    caches = caches_of(graph, context)
    for program in profiles:
        try:
            return count(program, shapes_of(graph, dims), caches=caches, filled=filled, weights=weights)
        except UsageError as error:
            problems.append(str(error))
    raise UsageError(f"{graph.file}: no profile of its engine takes {dict(dims)}: {'; '.join(problems)}")


def counts_of(
    graph: GraphInfo,
    context: int,
    profiles: Sequence[Program],
    ranges: Sequence[Mapping[str, Range]],
    weights: Collection[str] = (),
) -> tuple[ProgramCounts, ...]:
    """The counts of a graph's engine, for each optimization profile. ranges: of each, as the engine was built.

    Raises BundleError if they cannot be taken.
    """
    if len(profiles) != max(1, len(ranges)):
        raise BundleError(
            f"{graph.file}: {len(ranges)} profiles were built, and its engine has {len(profiles)} programs"
        )
    found = []
    for program, sizes in zip(profiles, ranges or ({},), strict=True):

        def count_at(dims: Mapping[str, int], program: Program = program) -> Traffic:
            return traffic_of(graph, context, (program,), dims, None, weights)

        found.append(take(count_at, {dim: (low, high) for dim, (low, _, high) in sizes.items()}, context))
    return tuple(found)
