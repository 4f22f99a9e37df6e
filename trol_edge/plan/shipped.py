"""Counts of engines' programs that ship with this package, for models that are not exported yet.

They come from engines with one layer and with two, built by TensorRT for RTX from random weights of the published
shapes (`python -m tests.bench.programs`). Each further layer counts as much as the second one adds. Engines of classic
TensorRT do not say what they do without their device; for its targets, RTX built engines from the same graphs.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from trol_edge.bundle.program_counts import ProgramCounts, grown
from trol_edge.bundle.strict import from_dict
from trol_edge.reading import read_json

FILE = Path(__file__).with_name("programs.json")


@dataclasses.dataclass(frozen=True)
class Counted:
    """The engines of one model in one recipe. one, two: graph -> profiles, with one layer and with two."""

    model: str
    recipe: str
    targets: tuple[str, ...]  # whose graphs are these
    one: dict[str, tuple[ProgramCounts, ...]]
    two: dict[str, tuple[ProgramCounts, ...]]


@dataclasses.dataclass(frozen=True)
class Shipped:
    """The contents of the file. made: what made it, and when."""

    library: str
    made: str
    engines: tuple[Counted, ...]


def read(path: Path) -> Shipped:
    """Read a file of counts. Raises BundleError if it is not one."""
    advice = "install trol-edge again"
    found: Shipped = from_dict(Shipped, read_json(path, advice=advice), str(path), advice=advice)
    return found


@functools.cache
def shipped() -> Shipped:
    """The counts of this package."""
    return read(FILE)


def programs(
    model: str, target: str, recipe: str, layers: int, tower_layers: int, counts: Shipped | None = None
) -> dict[str, tuple[ProgramCounts, ...]]:
    """The counts of a model's engines with this number of layers, by graph; empty if they were never taken."""
    for counted in (counts or shipped()).engines:
        if (counted.model, counted.recipe) == (model, recipe) and target in counted.targets:
            return {
                name: tuple(
                    grown(one, two, tower_layers if name == "vision" else layers)
                    for one, two in zip(counted.one[name], counted.two[name], strict=True)
                )
                for name in counted.one.keys() & counted.two.keys()
            }
    return {}
