"""Checkpoint in, bundle out: trace the graphs, stream the weights, convert the tokenizer, write the manifest."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from trol_edge import targets
from trol_edge._version import __version__
from trol_edge.bundle import (
    FORMAT,
    FORMAT_VERSION,
    TOKENIZER,
    WEIGHTS,
    FileInfo,
    GraphInfo,
    Manifest,
    Port,
    new_folder,
    sha256_of,
    write_manifest,
)
from trol_edge.errors import CheckpointError, ExportError
from trol_edge.export import graphs, lower_trt, tokenizer
from trol_edge.export.checkpoint import Checkpoint, is_finite
from trol_edge.export.model import graph_rope_tables
from trol_edge.export.models import MODELS
from trol_edge.weights import ITEM_BYTES

GPU_TARGETS = {name: entry for name, entry in targets.TARGETS.items() if entry.gpu}
TARGETS = ("cpu", "onnx", *GPU_TARGETS)
MIN_DEFAULT_CONTEXT = 2048  # tokens
ROOM_FOR_TEXT = 768  # tokens of template, question and answer beside one picture, however many tiles it has
ALIGNMENT = 64  # bytes; where the first tensor starts

Progress = Callable[[str, int, int], None]  # (what, done, total); done and total in bytes or steps


def export(
    checkpoint: str | os.PathLike[str],
    bundle: str | os.PathLike[str],
    *,
    model: str | None = None,
    target: str = "cpu",
    context: int | None = None,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Write a bundle from a published checkpoint folder; returns its manifest.

    target "cpu" is what `trol_edge.Runtime` runs; "onnx" writes self-contained graphs whose initializers point into
    the weights file. context is the capacity of the KV cache in tokens (default: room for one picture and some
    700 tokens of text, 2048 for TroL-1.8B and 7B, 2560 for TroL-3.8B; at most the model's max_position_embeddings).
    Peak memory does not depend on the size of the model. A model name that is known must fit the checkpoint's family.

    Raises CheckpointError, ExportError, UsageError (see trol_edge.errors); then nothing is left at `bundle`.
    """
    if target not in TARGETS:
        raise ExportError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    source = Checkpoint(checkpoint, family=MODELS[model].family.name if model in MODELS else None)
    spec = source.spec
    limit = spec.max_position_embeddings
    if context is None:
        picture = spec.vision.tokens_per_image * source.family.image(spec).most_tiles
        context = min(max(MIN_DEFAULT_CONTEXT, -(-(picture + ROOM_FOR_TEXT) // 256) * 256), limit)
    if not 2 <= context <= limit:
        raise ExportError(
            f"context {context}: this model knows positions 0..{limit - 1} (max_position_embeddings), and beyond them "
            f"what its rotary embedding does depends on what ran before; choose 2..{limit}"
        )
    with new_folder(bundle, overwrite) as folder:
        # What can be wrong with a checkpoint shows in the first two steps; tracing looks at no value.
        _write_tokenizer(folder / TOKENIZER, source)
        offsets = _write_weights(folder / WEIGHTS, source, context, progress)
        traced = {}
        for i, name in enumerate(graphs.TRACED):
            progress("trace", i, len(graphs.TRACED))
            traced[name] = graphs.trace(name, source.family, spec, context)
        progress("trace", len(graphs.TRACED), len(graphs.TRACED))
        if spec.lora_rank:
            traced["traverse_text"] = graphs.without_lora(traced["traverse"])
        infos = {name: _write_graph(folder, name, m, target, offsets) for name, m in traced.items()}
        digests = _digests(folder, progress)
        manifest = Manifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            model=model or source.folder.resolve().name,
            created_by=f"trol-edge {__version__}",
            target=target,
            context=context,
            spec=spec,
            prompt=source.family.prompt(spec),
            image=source.family.image(spec),
            graphs=infos,
            files=digests,
            checkpoint={"folder": source.folder.resolve().name, "sha256": digests[WEIGHTS].sha256},
            tools={n: metadata.version(n) for n in ("torch", "onnx-ir", "onnxscript")}
            | {"python": platform.python_version()},
            notes=tuple(source.notes),
        )
        write_manifest(folder, manifest)
    return manifest


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One tensor of the weights file: safetensors dtype, shape as stored, offset in bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    transposed: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def _write_weights(
    path: Path, source: Checkpoint, context: int, progress: Progress
) -> dict[str, tuple[ir.DataType, int, int]]:
    """Stream every parameter into one safetensors file; returns name -> (dtype, offset in the file, bytes)."""
    rope = dict(zip(graphs.ROPE, graph_rope_tables(source.spec, context), strict=True))
    layout: dict[str, _Stored] = {}
    end = 0
    for name in [*source.names(), *rope]:
        shape = tuple(rope[name].shape) if name in rope else source.shape(name)
        dtype = "F32" if name in rope else source.dtype(name)
        transposed = _is_linear(name, shape)
        layout[name] = _Stored(dtype, shape[::-1] if transposed else shape, end, transposed)
        end += layout[name].nbytes
    header = {
        n: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.offset, t.offset + t.nbytes]}
        for n, t in layout.items()
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    base = 8 + len(text)
    _require_space(path, base + end)
    bad = []
    with path.open("wb", buffering=0) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(base + end)
        done = 0
        for name, stored in layout.items():
            finite = True
            for row, block in [(0, rope[name])] if name in rope else source.blocks(name):
                finite &= is_finite(block)
                _write_block(f.fileno(), base + stored.offset, block, row, stored)
                done += block.numel() * block.element_size()
                progress("weights", done, end)
            if not finite:
                bad.append(source.parameters[name][0].name)
    if bad:
        raise CheckpointError(
            f"{source.folder}: NaN or infinite values in {len(bad)} tensor(s): {', '.join(bad)}; download them again"
        )
    types = {"F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "F32": ir.DataType.FLOAT}
    return {n: (types[t.dtype], base + t.offset, t.nbytes) for n, t in layout.items()}


def _is_linear(name: str, shape: Sequence[object]) -> bool:
    """Whether a parameter is a Linear weight (or a low-rank part of one), which is stored as MatMul reads it."""
    return len(shape) == 2 and name.endswith((".weight", ".lora_a", ".lora_b"))


def _write_block(fd: int, start: int, block: Tensor, row: int, stored: _Stored) -> None:
    """Write rows row.. of a tensor that begins at byte `start`, transposed where it is stored so."""
    if not stored.transposed:
        row_bytes = block[0].numel() * block.element_size() if block.dim() else 0
        _write_at(fd, block, start + row * row_bytes)
        return
    columns = block.t().clone(memory_format=torch.contiguous_format)  # [in, rows of this block]
    if columns.shape == stored.shape:
        _write_at(fd, columns, start)
        return
    for i in range(columns.shape[0]):
        _write_at(fd, columns[i], start + (i * stored.shape[1] + row) * block.element_size())


def _write_at(fd: int, tensor: Tensor, offset: int) -> None:
    view = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _write_tokenizer(path: Path, source: Checkpoint) -> None:
    # Where no file lists the image token, the authors' loader adds it behind all others.
    image_token = (source.family.prompt(source.spec).image,)
    text = tokenizer.convert(source.folder, image_token)
    if text is None:
        source.notes.append("the checkpoint has no tokenizer: the bundle serves token ids only")
        return
    tokenizer.verify(text, source.folder, image_token)
    path.write_text(text, encoding="utf-8")


def _digests(folder: Path, progress: Progress) -> dict[str, FileInfo]:
    files = sorted(folder.iterdir())
    done, total = 0, sum(path.stat().st_size for path in files)
    digests = {}
    for path in files:
        size = path.stat().st_size
        digests[path.name] = FileInfo(size, sha256_of(path))
        progress("hash", done := done + size, total)
    return digests


def _require_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ExportError(f"{path.parent.parent}: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; make room")


def _write_graph(
    folder: Path, name: str, model: ir.Model, target: str, offsets: dict[str, tuple[ir.DataType, int, int]]
) -> GraphInfo:
    inputs, outputs = (tuple(_port(v) for v in values) for values in (model.graph.inputs, model.graph.outputs))
    weights = tuple(graphs.weight_names(model))
    linear = {w for w in weights if _is_linear(w, tuple(model.graph.initializers[w].shape or ()))}
    if graphs.fold_transposes(model) != linear:
        raise ExportError(f"the trace of {name} reads a weight otherwise than it is stored; please report this")
    if target == "cpu":
        graphs.weights_as_inputs(model)
    else:
        graphs.weights_from_file(model, WEIGHTS, offsets)
    if target in GPU_TARGETS:
        model = lower_trt.lower(model, GPU_TARGETS[target])
    file = f"{name}.onnx"
    (folder / file).write_bytes(ir.to_proto(model).SerializeToString())
    return GraphInfo(file, inputs, outputs, weights, dict(Counter(node.op_type for node in model.graph)))


def _port(value: ir.Value) -> Port:
    assert value.name and value.shape is not None and value.dtype is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape.dims)
    return Port(value.name, value.dtype.numpy().name, shape)
