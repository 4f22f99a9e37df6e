"""The bound of a graph's tensors: it holds for what runs, real graphs are within it, and what grows is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests import one_layer
from tests.conftest import CHECKPOINTS, NANOS
from tests.fuzz.growth import GROWTHS, UNBOUNDED, grow
from trol_edge.bundle import graph_sizes
from trol_edge.bundle.graph_file import GraphFile, read_graph
from trol_edge.bundle.graph_shapes import Value
from trol_edge.bundle.graph_sizes import PREFILL_CHUNK, Work, tensors, work
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import WEIGHTS
from trol_edge.errors import BackendError
from trol_edge.export.quantize.recipes import RecipeOptions
from trol_edge.export.unbuilt import published
from trol_edge.runtime import Runtime
from trol_edge.runtimes import ort

TOKENS, SLOTS = 5, 9
SPANS = {"position_ids": (0, SLOTS - 1), "slots": (0, SLOTS - 1), "rope_offset": (0, 0)}
ENDLESS = 2**40


def written(model: ir.Model, folder: Path, name: str = "graph.onnx") -> GraphFile:
    """A graph as the runtime reads it."""
    (folder / name).write_bytes(ir.to_proto(model).SerializeToString())
    return read_graph(folder / name, WEIGHTS)


def bounded(bundle: Bundle, file: GraphFile, name: str) -> Work:
    """The bound of a graph of a bundle, as the bundle finds it."""
    manifest = bundle.manifest
    numbers = sum(math.prod(tensor.shape) for tensor in bundle.weights().tensors.values())
    return work(name, file, manifest.spec, manifest.image.most_tiles, manifest.context, numbers)


def run(bundle: Bundle, model: ir.Model, folder: Path) -> Iterator[tuple[str, Any]]:
    """Run a graph that has its weights as inputs; yields what each node computed."""
    outputs = {value.name for value in model.graph.outputs}
    for node in model.graph:
        model.graph.outputs.extend(v for v in node.outputs if v.name and v.name not in outputs)
    proto = ir.to_proto(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    weights = bundle.weights().load([w for g in bundle.manifest.graphs.values() for w in g.weights])
    dims, rng, feeds = {"tokens": TOKENS, "slots": SLOTS, "images": 1}, np.random.default_rng(0), dict[str, Any]()
    for port in session.get_inputs():
        shape = [dims.get(d, d) for d in port.shape]
        if port.name in weights:
            feeds[port.name] = weights[port.name]
        elif port.name in SPANS:
            high = SPANS[port.name][1]
            last = np.arange(high + 1 - math.prod(shape), high + 1) if high else np.zeros(shape)
            feeds[port.name] = last.reshape(shape).astype(np.int64)
        else:
            feeds[port.name] = rng.standard_normal(shape).astype(np.float32)
    yield from zip([port.name for port in session.get_outputs()], session.run(None, feeds), strict=True)


def require_within(array: Any, value: Value) -> None:
    """Fail if a tensor is outside of its bound."""
    assert array.size <= value.size, (array.shape, value)
    assert array.ndim == len(value.dims)
    assert all(low <= size <= high for size, (low, high) in zip(array.shape, value.dims, strict=True)), value
    if value.numbers is not None:
        assert array.size == len(value.numbers)
        assert all(low <= n <= high for n, (low, high) in zip(array.reshape(-1), value.numbers, strict=True))
    if value.span is not None and array.size:
        assert value.span[0] <= array.min() and array.max() <= value.span[1]


@pytest.mark.parametrize("name", ["vision", "traverse", "step"])
def test_what_runs_is_within_its_bound(each_bundle: Path, tmp_path: Path, name: str) -> None:
    """Every tensor of every graph: its size, each dimension, and the whole numbers that are followed."""
    bundle = Bundle(each_bundle)
    path = each_bundle / bundle.manifest.graphs[name].file
    found = tensors(read_graph(path, WEIGHTS), {"tokens": TOKENS}, 1 if name == "vision" else SLOTS, SPANS)
    known = {output: value for node, values, _ in found for output, value in zip(node.outputs, values, strict=False)}
    seen = 0
    for output, array in run(bundle, ir.load(path), tmp_path):
        require_within(array, known[output])
        seen += 1
    assert seen >= len(known) > 50


@pytest.mark.parametrize("growth", sorted(set(GROWTHS) - UNBOUNDED))
def test_small_growth_is_within_its_bound(nano_bundle: Path, tmp_path: Path, growth: str) -> None:
    """Graphs that grow a little are as sound as any: they run, and within their bound."""
    bundle, model = Bundle(nano_bundle), ir.load(nano_bundle / "step.onnx")
    grow(model, growth, 3)
    file = written(model, tmp_path)
    bounded(bundle, file, "step")
    found = tensors(file, {}, SLOTS, SPANS)
    known = {output: value for node, values, _ in found for output, value in zip(node.outputs, values, strict=False)}
    for output, array in run(bundle, model, tmp_path):
        require_within(array, known[output])


@pytest.mark.parametrize("name", ["step", "traverse"])
@pytest.mark.parametrize("growth", GROWTHS)
def test_growth_without_end_is_refused(nano_bundle: Path, tmp_path: Path, growth: str, name: str) -> None:
    """Whatever operator it uses, and however its size is hidden."""
    bundle, model = Bundle(nano_bundle), ir.load(nano_bundle / f"{name}.onnx")
    grow(model, growth, ENDLESS)
    why = "computed from values" if growth in UNBOUNDED | {"expand_by_a_shape"} else "than a model of this shape needs"
    with pytest.raises(ValueError, match=why):
        bounded(bundle, written(model, tmp_path), name)


def test_a_bundle_says_which_node_grows(nano_bundle: Path, tmp_path: Path) -> None:
    """Real bundles have a bound for each graph; between two counts of tokens it is on a line."""
    bundle = Bundle(nano_bundle)
    assert bundle.work.keys() == bundle.manifest.graphs.keys()
    one, all_ = (bundle.work["traverse"].at(n) for n in (PREFILL_CHUNK, bundle.manifest.context))
    assert bundle.work["traverse"].at(1) == one < bundle.work["traverse"].at(PREFILL_CHUNK + 1) < all_
    assert Work(((10, 100), (20, 300))).at(15) == 200


def test_a_run_that_needs_more_memory_than_is_free_is_refused(
    nano_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a bundle is opened, for a chunk of a prompt; and before a larger chunk runs."""
    bundle = Bundle(nano_bundle)
    backend = ort.OrtBackend(bundle)
    chunk = 4 * max(bundle.work[name].at(PREFILL_CHUNK) for name in ("traverse", "traverse_text"))
    held = backend.weight_bytes + backend.cache_bytes
    monkeypatch.setattr(ort, "available_memory", lambda: held + chunk - 1)
    with pytest.raises(BackendError, match=r"a run 0\.0\), but"):
        Runtime(nano_bundle, selftest=False)
    monkeypatch.setattr(ort, "available_memory", lambda: held + chunk)
    with Runtime(nano_bundle, selftest=False) as runtime:
        monkeypatch.setattr(ort, "available_memory", lambda: chunk)
        long = "there a star? " * 100
        assert len(runtime.generate(f"Is {long}", max_new_tokens=1).token_ids) == 1
        with pytest.raises(BackendError, match=r"tokens at once may take .* give a smaller prefill_chunk"):
            runtime.generate(f"Was {long}", max_new_tokens=1, prefill_chunk=2000)


@pytest.mark.slow
@pytest.mark.parametrize("model", NANOS)
@pytest.mark.parametrize("target", ["cpu", "tensorrt", "rtx"])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_real_bundles_stay_below_half_of_the_limits(
    exported: Callable[..., Path], model: str, target: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of three lowerings and three precisions (by hand: of all)."""
    monkeypatch.setattr(graph_sizes, "MOST_ALIVE", graph_sizes.MOST_ALIVE / 2)
    monkeypatch.setattr(graph_sizes, "MOST_MADE", graph_sizes.MOST_MADE / 2)
    assert Bundle(exported(CHECKPOINTS / model, target, recipe=precision)).work


@pytest.mark.slow
@pytest.mark.parametrize("model", ["trol-1.8b", "trol-3.8b"])
def test_published_widths_stay_below_half_of_the_limits(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer of each graph, as its engine is built from it, in the form that has the most tensors."""
    monkeypatch.setattr(graph_sizes, "MOST_ALIVE", graph_sizes.MOST_ALIVE / 2)
    monkeypatch.setattr(graph_sizes, "MOST_MADE", graph_sizes.MOST_MADE / 2)
    whole = published(model)
    for name in ("step", "traverse", "vision"):
        made = one_layer.graph(model, RecipeOptions("int8"), name, tmp_path, target="tensorrt")
        vision = dataclasses.replace(whole.spec.vision, num_layers=1)
        spec = dataclasses.replace(whole.spec, num_layers=1, vision=vision)
        file = read_graph(made.path, WEIGHTS)
        numbers = sum(math.prod(tensor.shape) for tensor in file.constants.values())
        assert work(name, file, spec, made.tiles, made.context, numbers).peaks
