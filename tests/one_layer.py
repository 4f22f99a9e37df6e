"""Engines of models with few layers and random weights, at the published widths: seconds each, without a checkpoint."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir

from trol_edge.bundle.engines import Range
from trol_edge.bundle.layer_graphs import Parts
from trol_edge.bundle.manifest import GraphInfo
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.precision import PrecisionPlan
from trol_edge.bundle.spec import ModelSpec
from trol_edge.bundle.targets import TARGETS
from trol_edge.export import pipeline
from trol_edge.export.graphs import canonical
from trol_edge.export.lower import trt as lower_trt
from trol_edge.export.quantize.qdq import scale_name
from trol_edge.export.quantize.recipes import RecipeOptions, make_plan
from trol_edge.export.quantize.stored import IR_TYPES, stored_dtype
from trol_edge.export.unbuilt import PUBLISHED, published
from trol_edge.rope import TABLES
from trol_edge.runtimes.trt import build as trt_build
from trol_edge.runtimes.trt.api import Library

POOL = 1 << 20  # random numbers, which repeat
STEP = 997  # numbers between the beginnings of two weights, because TensorRT stores equal weights once


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a weights file says of a tensor; two INT4 values share a byte of it."""

    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Graph:
    """A lowered graph with weights beside it. info, spec, plan: as a manifest has them; tensors: of its weights.

    gives_rows: whether the traverse that a part was cut from gives its new rows.
    """

    path: Path
    info: GraphInfo
    context: int
    tiles: int
    spec: ModelSpec
    plan: PrecisionPlan
    tensors: dict[str, Stored]
    gives_rows: bool = False


def graph(model: str, options: RecipeOptions, name: str, folder: Path, layers: int = 1, target: str = "rtx") -> Graph:
    """Write a graph of a published model with this number of layers, lowered for a target, and random weights."""
    whole = published(model)
    vision = dataclasses.replace(whole.spec.vision, num_layers=layers)
    spec = dataclasses.replace(whole.spec, num_layers=layers, vision=vision)
    shapes = {name: source.shape for name, source in whole.family.sources(spec).items()}
    shapes |= {"decoder.gate.weight": (1, spec.hidden_size), "decoder.gate.bias": (1,)}
    plan = make_plan(options, shapes, target)
    dtypes = {n: IR_TYPES[stored_dtype(n, s, PUBLISHED, plan, False)] for n, s in shapes.items()}
    dtypes |= dict.fromkeys(TABLES, ir.DataType.FLOAT)
    dtypes |= {
        scale_name(n): ir.DataType.FLOAT16 if plan.compute == "fp16" else ir.DataType.FLOAT for n in plan.linears
    }
    made = canonical.trace(name, whole.family, spec, whole.context)
    pipeline.prepare(name, made, target, plan, defaultdict(lambda: 0.03), dtypes)
    inputs, outputs = pipeline.ports(made.graph.inputs), pipeline.ports(made.graph.outputs)
    weights, as_inputs, costs = pipeline.take_inputs(name, made, target, ())
    tensors = _write(made, weights, dtypes, folder / WEIGHTS, as_inputs)
    lowered = lower_trt.lower(made, TARGETS[target])
    path = folder / f"{name}.onnx"
    path.write_bytes(ir.to_proto(lowered).SerializeToString())
    operators: dict[str, int] = defaultdict(int)
    for node in lowered.graph:
        operators[node.op_type] += 1
    constants = tuple(name for name in weights if name not in as_inputs)
    info = GraphInfo(path.name, inputs, outputs, weights, constants, dict(operators), costs)
    return Graph(path, info, whole.context, whole.family.image(spec).most_tiles, spec, plan, tensors)


def _write(
    made: ir.Model,
    weights: tuple[str, ...],
    dtypes: dict[str, ir.DataType],
    path: Path,
    as_inputs: list[str],
) -> dict[str, Stored]:
    """Write random weights, and point the graph's initializers at them; returns what a weights file says of them."""
    rng = np.random.default_rng(0)
    numbers, raw = rng.standard_normal(POOL, dtype=np.float32) * 0.02, rng.integers(0, 256, POOL, dtype=np.uint8)
    places: dict[str, tuple[ir.DataType, int, int]] = {}
    tensors = {}
    with path.open("wb") as file:
        for index, name in enumerate(weights):
            value = made.graph.initializers[name]
            assert value.shape is not None and value.dtype is not None
            floats = value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
            dtype = dtypes[name] if floats else value.dtype
            count = int(np.prod(value.shape.numpy()))
            if floats:
                block = np.abs(numbers) * 0.01 + 1e-4 if name.endswith(".scale") else numbers
                data = np.resize(np.roll(block, index * STEP), count).astype(dtype.numpy()).tobytes()
            else:
                bits = raw & 0xBF if dtype == ir.DataType.FLOAT8E4M3FN else raw  # no NaN
                data = np.resize(np.roll(bits, index * STEP), round(count * dtype.itemsize)).tobytes()
            file.write(bytes(-file.tell() % 64))
            places[name] = (dtype, file.tell(), len(data))
            shape = (len(data),) if dtype == ir.DataType.INT4 else tuple(map(int, value.shape.numpy()))
            tensors[name] = Stored(shape, len(data))
            file.write(data)
    canonical.weights_from_file(made, WEIGHTS, places, as_inputs)
    return tensors


def part(made: Graph, name: str, step: Graph | None = None) -> tuple[Graph, bytes]:
    """A part of a traverse, or of a step beside it: what it is cut from, with the part's ports, and its graph."""
    graphs = {"traverse": made.info} | ({} if step is None else {"step": step.info})
    files = {each.info.file: each.path for each in (made, step) if each is not None}
    manifest = SimpleNamespace(graphs=graphs, spec=made.spec, plan=made.plan)
    weights = SimpleNamespace(tensors=made.tensors)
    bundle: Any = SimpleNamespace(  # all that is read of one
        manifest=manifest, folder=made.path.parent, path=lambda file: files[file], weights=lambda: weights
    )
    cut = Parts(bundle).cut(name)
    source = step if step is not None and cut.info.file == step.info.file else made
    return dataclasses.replace(source, info=cut.info, gives_rows=made.info.gives_rows), cut.model


def profiles_of(made: Graph) -> tuple[dict[str, Range], ...]:
    """The optimization profiles that a bundle's engine of this graph has."""
    graphs = {"traverse": SimpleNamespace(gives_rows=made.gives_rows)}
    sizes = SimpleNamespace(context=made.context, image=SimpleNamespace(most_tiles=made.tiles), graphs=graphs)
    bundle: Any = SimpleNamespace(manifest=sizes, folder=made.path.parent)  # all that is read of one
    return trt_build.profiles(bundle, made.info)


def engine(made: Graph, library: Library, model: bytes | None = None) -> Path:
    """Build a graph's engine beside it, with the optimization profiles that a bundle's engine has.

    model: a part that was cut from the graph, to be built instead.
    """
    path = made.path.with_suffix(".engine")
    profiles = [trt_build.shapes_of(made.info, each) for each in profiles_of(made)]
    trt_build.parse(library, made.path, made.info, model).build(path, profiles, None, lambda *progress: None)
    return path
