"""Engines in a bundle: `engines/TARGET/engines.json` says what was built of which graphs, by whom and for which GPU.

A TensorRT engine is a program: it is loaded only where its sha256 is the one written here, and where library, GPU,
graphs and weights are those that it was built with; otherwise the difference is named. Several targets' engines may
stand in one bundle, one set each.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from trol_edge.bundle.folder import digest_of, sha256_of
from trol_edge.bundle.manifest import Bundle, FileInfo
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.strict import from_dict
from trol_edge.errors import BundleError

FORMAT_VERSION = 2
ENGINES = ("vision", "traverse", "step")  # traverse_text saves time on a CPU; here it would hold the weights once more
FOLDER, MANIFEST, KERNELS = "engines", "engines.json", "kernels.cache"
Range = tuple[int, int, int]  # smallest, best and largest size of a dynamic dimension


@dataclasses.dataclass(frozen=True)
class Key:
    """What an engine is bound to. gpu and capability are empty for engines that any GPU of the target takes."""

    target: str
    library: str  # "TensorRT 10.3.0"
    gpu: str
    capability: str
    driver: str


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """One engine. profiles: dynamic dimension -> range, one entry per optimization profile (none: all is fixed)."""

    file: str
    bytes: int
    sha256: str
    graph_sha256: str  # of the ONNX file that it was built from
    weight_bytes: int  # of the weights that the graph reads, each once, in the types it computes with
    layers: dict[str, int]  # "MATRIX_MULTIPLY float16" -> count, as the parser made them
    profiles: tuple[dict[str, Range], ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class EngineSet:
    """What `engines.json` says."""

    format_version: int
    created_by: str
    key: Key
    precision: str
    weights_sha256: str  # of the weights file that the engines were built from
    engines: dict[str, EngineInfo]  # by graph


def folder_of(bundle: Bundle, target: str) -> Path:
    """Where a target's engines stand."""
    return bundle.folder / FOLDER / target


def read(bundle: Bundle, target: str) -> EngineSet:
    """The engine set of a target. Raises BundleError where there is none, or it is altered."""
    path = folder_of(bundle, target) / MANIFEST
    if not path.is_file():
        raise BundleError(f"{bundle.folder}: no engines for target {target}; make them with `trol-edge build`")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not readable as JSON ({error}); `trol-edge build --force`") from error
    if not isinstance(data, dict) or data.pop("sha256", None) != digest_of(data):
        raise BundleError(f"{path}: altered since the build (its own hash differs); `trol-edge build --force`")
    if data.get("format_version") != FORMAT_VERSION:
        raise BundleError(f"{path}: engine format {data.get('format_version')!r}, this reads {FORMAT_VERSION}")
    found: EngineSet = from_dict(EngineSet, data, str(path))
    return found


def write(folder: Path, engines: EngineSet) -> None:
    """Write engines.json, last of all, with its own hash in it."""
    data = json.loads(json.dumps(dataclasses.asdict(engines)))
    (folder / MANIFEST).write_text(json.dumps(data | {"sha256": digest_of(data)}, indent=1) + "\n", encoding="utf-8")


def differences(bundle: Bundle, engines: EngineSet, key: Key) -> list[str]:
    """Why engines do not serve here: what they were built with, and what there is, in words; none: they do."""
    found = []
    for field in ("library", "gpu", "capability", "driver"):
        built, here = getattr(engines.key, field), getattr(key, field)
        if built != here and built:  # empty: any
            found.append(f"built with {field} {built!r}, here is {here or 'nothing'!r}")
    if bundle.manifest.files[WEIGHTS].sha256 != engines.weights_sha256:
        found.append("built from other weights than the bundle now holds")
    for name, engine in engines.engines.items():
        graph = bundle.manifest.graphs.get(name)
        if graph is None or bundle.manifest.files[graph.file].sha256 != engine.graph_sha256:
            found.append(f"built from another {name} graph than the bundle now holds")
    return found


def verified(bundle: Bundle, engines: EngineSet, name: str) -> Path:
    """Path of an engine file whose size and sha256 are the recorded ones. Raises BundleError where they are not."""
    info: EngineInfo | FileInfo = engines.engines[name]
    path = folder_of(bundle, engines.key.target) / engines.engines[name].file
    if not path.is_file():
        raise BundleError(f"{path}: missing; build the engines again with `trol-edge build --force`")
    if path.stat().st_size != info.bytes:
        raise BundleError(
            f"{path}: {path.stat().st_size} bytes instead of {info.bytes}, so truncated or altered; it was not loaded; "
            "build the engines again with `trol-edge build --force`"
        )
    if sha256_of(path) != info.sha256:
        raise BundleError(
            f"{path}: altered since the build (sha256 differs); it was not loaded, because an engine is a program; "
            "build the engines again with `trol-edge build --force`"
        )
    return path
