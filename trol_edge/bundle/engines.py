"""Engines in a bundle. `engines/TARGET/engines.json` says what was built from which graphs, by whom and for which GPU.

A TensorRT engine is a program. It is loaded only if its sha256 is the one written here, and if library, GPU, graphs and
weights are those that it was built with; otherwise the difference is named. A bundle may have the engines of several
targets, one set each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trol_edge.bundle.costs import MOST_NUMBER
from trol_edge.bundle.folder import digest_of, sha256_of
from trol_edge.bundle.layer_graphs import ENTER, HEAD, layer_of, part_names, source_of
from trol_edge.bundle.layer_graphs import ports_of as ports_of_part
from trol_edge.bundle.manifest import Bundle, GraphInfo, Port
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.program_counts import ProgramCounts
from trol_edge.bundle.signature import engines_statement
from trol_edge.bundle.strict import from_dict
from trol_edge.errors import BundleError
from trol_edge.reading import guard, is_plain_name, open_plain, printable, read_json_value, stays_inside

FORMAT_VERSION = 2
ENGINES = ("vision", "traverse", "step")  # without traverse_text, which would be another copy of the weights
_ALTERED = (
    "altered since the build (sha256 differs); it was not used, because an engine is a program; "
    "build the engines again with `trol-edge build --force`"
)
FOLDER, MANIFEST, KERNELS = "engines", "engines.json", "kernels.cache"
Range = tuple[int, int, int]  # smallest, best and largest size of a dynamic dimension
PART = 512  # most tokens of a pass of a layer: its engine needs the less scratch memory, and reads its weights again
GIVEN = 256  # most tokens of one run of a traverse that gives its new rows, which need memory of their own


@dataclasses.dataclass(frozen=True)
class Key:
    """What an engine is bound to. gpu and capability are empty for engines that run on any GPU of the target."""

    target: str
    library: str  # "TensorRT 10.3.0"
    gpu: str
    capability: str
    driver: str


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """One engine. profiles: dynamic dimension -> range, one entry per optimization profile (none if all is fixed).

    programs: what its kernels move, for each profile; empty if its program could not be read. products: type of a
    product with weights -> operations that the plan asks for, and those of the program, at the best sizes of the last
    profile.
    """

    file: str
    bytes: int
    sha256: str
    graph_sha256: str  # of the ONNX file that it was built from
    weight_bytes: int  # bytes of the weights that the graph reads, each once, in the types it computes with
    layers: dict[str, int]  # "MATRIX_MULTIPLY float16" -> count, as the parser made them
    profiles: tuple[dict[str, Range], ...]
    seconds: float
    programs: tuple[ProgramCounts, ...] = ()
    products: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EngineSet:
    """The contents of `engines.json`."""

    format_version: int
    created_by: str
    key: Key
    precision: str
    weights_sha256: str  # of the weights file that the engines were built from
    engines: dict[str, EngineInfo]  # graph, or part of one -> engine

    @property
    def by_layer(self) -> bool:
        """Whether the decoder is one engine per layer, and not a traverse and a step."""
        return HEAD in self.engines

    def __str__(self) -> str:
        """The engines by name, with those of layers as one."""
        others = [name for name in self.engines if layer_of(name) is None]
        layers = len({layer_of(name) for name in self.engines} - {None})
        return ", ".join([*others, f"{layers} layers"] if layers else others)


def names_of(bundle: Bundle, by_layer: bool) -> tuple[str, ...]:
    """The engines of a bundle, by name, in the order in which they are built."""
    return ("vision", *part_names(bundle.manifest.spec.num_layers)) if by_layer else ENGINES


def ports_of(bundle: Bundle, name: str) -> tuple[tuple[Port, ...], tuple[Port, ...], set[str]]:
    """The inputs and outputs of an engine, and the weights that are inputs as well."""
    graph = bundle.manifest.graphs.get(name)
    if graph is not None:
        without = left_out(graph)
        outputs = tuple(port for port in graph.outputs if port.name not in without)
        return graph.inputs, outputs, set(graph.weights) - set(graph.constants)
    traverse = bundle.manifest.graphs["traverse"]
    given = set(traverse.weights) - set(traverse.constants) if name.startswith(ENTER) else set[str]()
    return *ports_of_part(bundle.manifest, name), given


def left_out(graph: GraphInfo) -> set[str]:
    """Outputs of a graph that its engine does not have: caches whose new rows are outputs, too.

    ONNX Runtime writes these caches in place. TensorRT before 10.15 cannot, and would copy each of them.
    """
    outputs = {port.name for port in graph.outputs}
    return {name for name in outputs if name.startswith("present_") and name.replace("present_", "new_", 1) in outputs}


def folder_of(bundle: Bundle, target: str) -> Path:
    """The folder of a target's engines."""
    return bundle.folder / FOLDER / target


def _read(bundle: Bundle, target: str) -> tuple[str, dict[str, Any]]:
    """Read engines.json; returns its own hash, and the rest of it."""
    path = folder_of(bundle, target) / MANIFEST
    if not path.exists():
        raise BundleError(f"{bundle.folder}: no engines for target {target}; make them with `trol-edge build`")
    data = read_json_value(path, BundleError, "run `trol-edge build --force`")
    said = data.pop("sha256", None) if isinstance(data, dict) else None
    if said is None or said != digest_of(data):
        raise BundleError(f"{path}: altered since the build (its own hash differs); run `trol-edge build --force`")
    return said, data


def digest(bundle: Bundle, target: str) -> str:
    """The hash of a target's engines.json, which covers its engines."""
    return _read(bundle, target)[0]


def read(bundle: Bundle, target: str) -> EngineSet:
    """Read the engine set of a target. Raises BundleError if it is missing, altered, or lacks a signature.

    An engine is a program. If the bundle was opened with trusted keys, one of them must have signed the engines.
    """
    path = folder_of(bundle, target) / MANIFEST
    said, data = _read(bundle, target)
    bundle.require_signed(engines_statement(bundle.identity, target, said), f"the list of engines for {target}")
    if data.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path}: engine format {data.get('format_version')!r}, but this version reads {FORMAT_VERSION}"
        )
    with guard(path, BundleError, "run `trol-edge build --force`"):
        found: EngineSet = from_dict(EngineSet, data, str(path))
    names = names_of(bundle, found.by_layer)
    if lacking := set(names) - found.engines.keys():
        raise BundleError(f"{path}: lists no engine {', '.join(sorted(lacking))}; run `trol-edge build --force`")
    for name, engine in found.engines.items():
        sizes = [n for n in (engine.bytes, engine.weight_bytes) if not 0 <= n <= MOST_NUMBER]
        wrong = [f"a number {n!r:.40}" for n in sizes] + [w for p in engine.programs for w in p.wrong()]
        if wrong:
            raise BundleError(
                f"{path}: the counts of {printable(name)[:80]} have {wrong[0]}; run `trol-edge build --force`"
            )
        if not is_plain_name(engine.file) or name not in names or found.key.target != target:
            raise BundleError(
                f"{path}: says {printable(engine.file)[:80]!r} of {printable(name)[:80]!r} for target "
                f"{printable(found.key.target)[:80]!r}, which is not an engine of {target}; "
                "run `trol-edge build --force`"
            )
    return found


def write(folder: Path, engines: EngineSet) -> None:
    """Write engines.json with its own hash in it. It is written last."""
    data = json.loads(json.dumps(dataclasses.asdict(engines)))
    (folder / MANIFEST).write_text(json.dumps(data | {"sha256": digest_of(data)}, indent=1) + "\n", encoding="utf-8")


def differences(bundle: Bundle, engines: EngineSet, key: Key) -> list[str]:
    """Reasons why engines cannot be used here: what they were built with, and what is here. Empty if they can."""
    found = []
    for field in ("library", "gpu", "capability", "driver"):
        built, here = getattr(engines.key, field), getattr(key, field)
        if built != here and built:  # an empty value matches any
            found.append(f"built with {field} {built!r}, but here is {here or 'nothing'!r}")
    if bundle.manifest.files[WEIGHTS].sha256 != engines.weights_sha256:
        found.append("built from other weights than the bundle has now")
    for name, engine in engines.engines.items():
        graph = bundle.manifest.graphs.get(source_of(name))
        if graph is None or bundle.manifest.files[graph.file].sha256 != engine.graph_sha256:
            found.append(f"built from another {source_of(name)} graph than the bundle has now")
    return list(dict.fromkeys(found))


def verified(bundle: Bundle, engines: EngineSet, name: str) -> Path:
    """The path of an engine file, after checking its size and sha256. Raises BundleError if they differ."""
    path = _path_of(bundle, engines, name)
    if sha256_of(path) != engines.engines[name].sha256:
        raise BundleError(f"{path}: {_ALTERED}")
    return path


def plan_of(bundle: Bundle, engines: EngineSet, name: str) -> bytes:
    """The bytes of an engine file, for loading it. Raises BundleError if they are not those of the build.

    They are read and not mapped, so what is used is what was hashed, and a file that is shortened meanwhile does not
    end the process.
    """
    info, path = engines.engines[name], _path_of(bundle, engines, name)
    with open_plain(path) as file, guard(path, BundleError, "run `trol-edge build --force`"):
        plan = file.read(info.bytes)
    if hashlib.sha256(plan).hexdigest() != info.sha256:
        raise BundleError(f"{path}: {_ALTERED}")
    return plan


@contextmanager
def mapped(bundle: Bundle, engines: EngineSet, name: str) -> Iterator[mmap.mmap]:
    """Yield the bytes of an engine file, mapped, to look for its text. Raises BundleError if they are not those of the
    build."""
    info, path = engines.engines[name], _path_of(bundle, engines, name)
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size != info.bytes:
            raise BundleError(f"{path}: {_ALTERED}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            if hashlib.sha256(plan).hexdigest() != info.sha256:
                raise BundleError(f"{path}: {_ALTERED}")
            yield plan


def _path_of(bundle: Bundle, engines: EngineSet, name: str) -> Path:
    """The path of an engine file that is there, with its size."""
    info = engines.engines[name]
    path = folder_of(bundle, engines.key.target) / info.file
    if not path.is_file() or not stays_inside(path):
        raise BundleError(
            f"{path}: missing, or a link to another place; build the engines again with `trol-edge build --force`"
        )
    if path.stat().st_size != info.bytes or not info.bytes:
        raise BundleError(
            f"{path}: {path.stat().st_size} bytes instead of {info.bytes}, so truncated or altered; it was not loaded; "
            "build the engines again with `trol-edge build --force`"
        )
    return path
