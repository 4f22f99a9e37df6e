"""The bundle: one folder that is all a robot needs. Never pickles; opened without executing anything.

    bundle.json             this manifest: what the model is, and size and sha256 of every other file
    vision.onnx ...         graphs; their weights are inputs (target cpu) or point into the weights file
    weights.safetensors     every tensor of the checkpoint once, Linear weights transposed: in the checkpoint's dtype,
                            or quantized as the manifest's plan says, with their scales beside them
    tokenizer.json          for the `tokenizers` library; absent: token level only
    selftest.safetensors    what the FP32 reference computes, see selftest.py; absent: nothing to verify against
    verified-*.json         written by the robot, in no hash: this machine's numbers were right, see verify.py

A bundle is written beside its final place and renamed when complete, so a folder with a bundle.json is whole.
"""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trol_edge.bundle.costs import Costs
from trol_edge.bundle.precision import CalibrationInfo, Part, Plan
from trol_edge.bundle.spec import ModelSpec, from_dict
from trol_edge.bundle.weights import WeightsFile
from trol_edge.errors import BundleError, ExportError
from trol_edge.prompt.images import ImageSpec
from trol_edge.prompt.tokenizer import PromptSpec

FORMAT = "trol-edge-bundle"
# 2: traverse goes on from a prefix (slots, and a cache of the second pass); a plan of precisions
FORMAT_VERSION = 2
MANIFEST = "bundle.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
SELFTEST = "selftest.safetensors"
VERIFIED = "verified-*.json"
# Patterns of all that a bundle's folder may hold.
BUNDLE_FILES = (MANIFEST, WEIGHTS, TOKENIZER, SELFTEST, VERIFIED, "*.onnx", "engines")
EMBEDDING = "embedding"  # looked up by the runtime, in no graph


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
    plan: Plan  # how each Linear is stored and computed
    calibration: CalibrationInfo | None  # what the scales were made of; None: nothing was calibrated

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one K/V set per token of context, in the types of the graphs."""
        past = [port for port in self.graphs["step"].inputs if port.name.startswith("past_")]
        row = self.spec.num_kv_heads * self.spec.head_dim
        return row * sum(np.dtype(port.dtype).itemsize for port in past)


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
        if self.identity != _digest(data):
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


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json, last of all, with its own hash in it."""
    data = dataclasses.asdict(manifest)
    data = json.loads(json.dumps(data))  # tuples become lists before hashing, as a reader sees them
    data["manifest_sha256"] = _digest(data)
    (folder / MANIFEST).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@contextmanager
def new_folder(
    target: str | os.PathLike[str], overwrite: bool = False, ours: Collection[str] = BUNDLE_FILES
) -> Iterator[Path]:
    """Yield a temporary folder beside `target` and rename it to `target` on success; on any failure remove it.

    Ctrl-C and a full disk count as failures, and leave what was there before. Raises ExportError where target exists
    (unless overwrite, and then it must hold nothing but files named as in `ours`, patterns) or cannot be written.
    """
    final = Path(target)
    if final.exists() and not overwrite:
        raise ExportError(f"{final}: exists; choose another name or allow overwriting (--force)")
    if final.exists() and not final.is_dir():
        raise ExportError(f"{final}: is a file, a folder is to be written there; remove it or choose another name")
    if final.is_dir():
        others = sorted(p.name for p in final.iterdir() if not any(fnmatch.fnmatch(p.name, name) for name in ours))
        if others:
            raise ExportError(
                f"{final}: holds other files ({', '.join(others[:3])}), which would be lost; choose another name"
            )
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(final)
        folder = _part(final)
    except OSError as error:
        raise ExportError(f"{final}: cannot be written ({error.strerror}); choose another place") from error
    old: Path | None = None
    try:
        yield folder
        folder.chmod(0o755)
        if overwrite and final.exists():
            old = _part(final)
            final.rename(old)  # onto an empty folder: POSIX allows it
        folder.rename(final)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ExportError(f"{final}: the disk is full; make room or choose another place") from error
        raise ExportError(f"{final}: cannot be written ({error}); nothing was left there") from error
    finally:
        if old is not None and not final.exists():
            old.rename(final)
        for part in (folder, old):
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)


def _part(final: Path) -> Path:
    """A new folder beside `final`, whose name says which process made it."""
    return Path(tempfile.mkdtemp(prefix=f".{final.name}.{os.getpid()}.", suffix=".part", dir=final.parent))


def _remove_left_overs(final: Path) -> None:
    """Remove what writers that were killed (so that no `finally` ran) left beside `final`."""
    name = re.compile(rf"\.{re.escape(final.name)}\.(\d+)\.[^.]+\.part")
    for folder in final.parent.iterdir():
        if not (match := name.fullmatch(folder.name)):
            continue
        try:
            os.kill(int(match[1]), 0)
        except (ProcessLookupError, OverflowError):
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # alive, and someone else's
