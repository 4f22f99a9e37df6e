"""The bundle: one folder that is all a robot needs. Never pickles; opened without executing anything.

    bundle.json             this manifest: what the model is, and size and sha256 of every other file
    vision.onnx ...         graphs; their weights are inputs (target cpu) or point into the weights file
    weights.safetensors     every tensor of the checkpoint once, Linear weights transposed: in the checkpoint's dtype,
                            or quantized as the manifest's plan says, with their scales beside them
    tokenizer.json          for the `tokenizers` library; absent: token level only
    selftest.safetensors    what the FP32 reference computes, see selftest.py; absent: nothing to verify against
    verified-*.json         written by the robot, in no hash: this machine's numbers were right, see verify/

A bundle is written beside its final place and renamed when complete, so a folder with a bundle.json is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from trol_edge.bundle.costs import Costs
from trol_edge.bundle.folder import digest_of, sha256_of
from trol_edge.bundle.names import MANIFEST, WEIGHTS
from trol_edge.bundle.precision import CalibrationInfo, Part, PrecisionPlan
from trol_edge.bundle.spec import ModelSpec
from trol_edge.bundle.strict import from_dict
from trol_edge.bundle.weights import WeightsFile
from trol_edge.errors import BundleError
from trol_edge.prompt.images import ImageSpec
from trol_edge.prompt.template import PromptSpec

FORMAT = "trol-edge-bundle"
# 2: traverse goes on from a prefix (slots, and a cache of the second pass); a plan of precisions
FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """Size in bytes and sha256 (hex) of a file of the bundle."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of a graph. A str in shape names a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class GraphInfo:
    """One graph: its file, its inputs and outputs, the weights it reads, its operators (type -> count).

    `constants` are those of `weights` that the graph file itself points into the weights file; the others are inputs.
    `costs` are what a run of it does; None in bundles made before they were counted.
    """

    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: tuple[str, ...]
    constants: tuple[str, ...]
    operators: dict[str, int]
    costs: Costs | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `bundle.json` says."""

    format: str
    format_version: int
    model: str  # "trol-1.8b", or the checkpoint folder's name
    created_by: str  # "trol-edge 0.1.0"
    target: (
        str  # "cpu": floating point weights are float32 graph inputs; "onnx": graphs read the weights file themselves
    )
    context: int  # tokens, prompt and answer together: the capacity of the KV cache
    spec: ModelSpec
    prompt: PromptSpec
    image: ImageSpec
    graphs: dict[str, GraphInfo]
    files: dict[str, FileInfo]
    checkpoint: dict[str, str]  # where the weights came from: folder, identity
    tools: dict[str, str]  # versions that made it
    notes: tuple[str, ...]
    parts: dict[str, Part]  # vision, projector, embedding, decoder, low-rank, output layer
    plan: PrecisionPlan  # how each Linear is stored and computed
    calibration: CalibrationInfo | None  # what the scales were made of; None: nothing was calibrated


class Bundle:
    """An opened bundle folder: the manifest, and the paths of files whose size (and hash) have been checked.

    Raises BundleError where the folder is missing, incomplete, altered or of another version. The weights file is
    hashed while it is loaded, all other files here.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise BundleError(
                f"{self.folder}: no {MANIFEST} here, so this is not a (complete) bundle; "
                "make one with `make engine` or `trol-edge export`"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path}: not readable as JSON ({error}); copy the bundle again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"{path}: not a trol-edge bundle; make one with `trol-edge export`")
        if data.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"{path}: bundle format {data.get('format_version')!r}, this trol-edge reads format {FORMAT_VERSION}; "
                "export the bundle again with this version"
            )
        self.identity = data.pop("manifest_sha256", None)  # of the manifest, and so of every file that it lists
        if self.identity != digest_of(data):
            raise BundleError(f"{path}: altered since export (its own hash differs); copy or export the bundle again")
        self.manifest: Manifest = from_dict(Manifest, data, str(path))
        self._check_files()

    def _check_files(self) -> None:
        problems = []
        for name, info in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != info.bytes:
                problems.append(f"{name} has {path.stat().st_size} bytes instead of {info.bytes}")
            elif name != WEIGHTS and sha256_of(path) != info.sha256:
                problems.append(f"{name} was altered (sha256 differs)")
        if problems:
            raise BundleError(f"{self.folder}: {'; '.join(problems)}; copy the bundle again")

    def path(self, name: str) -> Path:
        """Path of a file that the manifest lists; BundleError where it does not."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder}: the manifest lists no {name}; export the bundle again")
        return self.folder / name

    def weights(self) -> WeightsFile:
        """The weights file, its header read and checked."""
        return WeightsFile(self.path(WEIGHTS))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json, last of all, with its own hash in it."""
    data = dataclasses.asdict(manifest)
    data = json.loads(json.dumps(data))  # tuples become lists before hashing, as a reader sees them
    data["manifest_sha256"] = digest_of(data)
    (folder / MANIFEST).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
