"""Makes a temporary copy of a bundle whose graphs also output the residual stream after every layer.

The places are found by structure, so canonical, quantized and lowered graphs of one model give the same list:
- decoder: the Add that mixes the first and the second pass, after each gate's Tanh;
- vision: the input of the first norm of each layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trol_edge.bundle.folder import sha256_of, writing
from trol_edge.bundle.manifest import Bundle, FileInfo, write_manifest
from trol_edge.bundle.names import MANIFEST, SINGLE
from trol_edge.errors import BundleError, UsageError
from trol_edge.runtime import Runtime

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
PASSED = ("Cast", "DequantizeLinear", "Identity")  # skipped between a norm and the parameter that names it


@contextlib.contextmanager
def probed(
    folder: str | os.PathLike[str], seen: Callable[[str, Any], None], threads: int | None = None
) -> Iterator[Runtime]:
    """Yield a Runtime of a bundle that calls seen(place, values) for every layer that ran.

    place: "vision.layers.<i>" (values [N, tokens, d]) or "decoder.layers.<i>" ([1, S, D]), after that layer. Only the
    traverse of a prompt is reported, no step. Raises BundleError for a bundle in which the places are not found.
    """
    bundle = Bundle(folder)
    with _copy(bundle) as copy:
        places: dict[str, dict[str, str]] = {}
        manifest = bundle.manifest
        files = dict(manifest.files)
        for name, graph in manifest.graphs.items():
            if name == "step" or name in SINGLE:
                continue
            path = copy / graph.file
            model = ir.load(path)
            twice = manifest.spec.second_layers
            found = _vision_places(model) if name == "vision" else _decoder_places(model, twice)
            layers = manifest.spec.vision.num_layers - 1 if name == "vision" else len(twice)
            if len(found) != layers:
                raise BundleError(
                    f"{bundle.folder}: {graph.file} shows {len(found)} of {layers} layers; compare reads graphs that "
                    "this version of trol-edge exported, for --target cpu"
                )
            places[name] = {str(value.name): place for place, value in found.items()}
            outputs = {value.name for value in model.graph.outputs}
            for value in found.values():
                value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
                if value.name not in outputs:
                    model.graph.outputs.append(value)
            path.unlink()  # it is a link to the bundle's own file, which must not change
            with writing(path, UsageError, "set TMPDIR to a larger place"):
                path.write_bytes(ir.to_proto(model).SerializeToString())
            files[graph.file] = FileInfo(path.stat().st_size, sha256_of(path))
        write_manifest(copy, dataclasses.replace(manifest, files=files))
        runtime = Runtime(copy, threads=threads, verify=False, selftest=False)
        backend: Any = runtime.model.backend
        backend.watched = {name: tuple(values) for name, values in places.items()}

        def watcher(graph: str, values: dict[str, Any]) -> None:
            for key, array in values.items():
                seen(places[graph][key], array)

        backend.watcher = watcher
        yield runtime


@contextlib.contextmanager
def _copy(bundle: Bundle) -> Iterator[Path]:
    """A folder with the files of a bundle but for its manifest, as hard links if the file system supports them."""
    with contextlib.ExitStack() as stack:
        try:
            parent = tempfile.TemporaryDirectory(prefix=".compare.", dir=bundle.folder.parent)
        except OSError:  # the folder is read-only
            parent = tempfile.TemporaryDirectory()
        copy = Path(stack.enter_context(parent))
        with writing(copy, UsageError, "set TMPDIR to a larger place"):
            for name in bundle.manifest.files:
                try:
                    os.link(bundle.path(name), copy / name)
                except OSError:  # it is on another file system
                    shutil.copyfile(bundle.path(name), copy / name)
        assert not (copy / MANIFEST).exists()
        yield copy


def _decoder_places(model: ir.Model, twice: Sequence[int]) -> dict[str, ir.Value]:
    """The mixture after every gate, in the order of the graph. twice: the layers that have one."""
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        if node.op_type == "Tanh":
            mixture = _mixture(node.outputs[0])
            if mixture is not None and len(found) < len(twice):
                found[f"decoder.layers.{twice[len(found)]}"] = mixture
    return found


def _mixture(value: ir.Value) -> ir.Value | None:
    """The first Add of two Muls after the gate's tanh."""
    front, seen = [value], 0
    while front and seen < 20:  # the gate has six nodes
        seen += 1
        for user, _ in front.pop(0).uses():
            producers = [v.producer() for v in user.inputs if v is not None]
            if user.op_type == "Add" and all(p is not None and p.op_type == "Mul" for p in producers):
                return user.outputs[0]
            front.append(user.outputs[0])
    return None


def _vision_places(model: ir.Model) -> dict[str, ir.Value]:
    """The outputs of the layers. The output of layer i is the input of the first norm of layer i + 1."""
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        if node.op_type in NORMS and node.inputs[0] is not None and node.inputs[1] is not None:
            match = re.match(r"vision\.layers\.(\d+)\.norm1\.weight", _parameter(node.inputs[1]))
            if match and int(match[1]):
                found[f"vision.layers.{int(match[1]) - 1}"] = node.inputs[0]
    return found


def _parameter(value: ir.Value) -> str:
    while (producer := value.producer()) is not None and producer.op_type in PASSED and producer.inputs[0] is not None:
        value = producer.inputs[0]
    return str(value.name)
