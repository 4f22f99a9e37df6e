"""Counts of graphs: the polynomials, what a manifest keeps of them, and the walker against counts by hand."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from tests.conftest import CHECKPOINTS, NANOS, slow
from trol_edge.bundle.costs import Cost, Costs, Operation
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.spec import ModelSpec
from trol_edge.bundle.strict import from_dict
from trol_edge.errors import ExportError, UsageError
from trol_edge.export import unbuilt
from trol_edge.export.graphs import counts
from trol_edge.export.quantize.recipes import RecipeOptions
from trol_edge.plan.subject import Subject, subject_of

COSTS = Costs(
    operations=(
        Operation("linear", "float32", "float32", 2, {"tokens": 6}, 12, {"tokens": 20, "1": 4}, {}),
        Operation("attention", "float32", None, 1, {"tokens*slots": 4}, 0, {"tokens": 8}, {"slots": 16, "tokens": 2}),
    ),
    peak=({"tokens": 8}, {"1": 100}),
    defaults={"slots": 10},
)


def by_kind(costs: Costs, **dims: int) -> dict[str, Cost]:
    """Totals of one run for each kind of operator that the graph has."""
    sizes = costs.dims(dims)
    kinds = dict.fromkeys(o.kind for o in costs.operations)
    own = {kind: tuple(o for o in costs.operations if o.kind == kind) for kind in kinds}
    return {kind: dataclasses.replace(costs, operations=own[kind]).at(**sizes) for kind in kinds}


def test_totals() -> None:
    assert COSTS.at(tokens=5, slots=7) == Cost(2 * 30 + 140, 24, 2 * 104 + 40, 7 * 16 + 10)
    assert COSTS.at(tokens=5).flops == 60 + 4 * 5 * 10, "slots has a default"
    assert COSTS.at(tokens=1, images=3) == COSTS.at(tokens=1), "other graphs' dimensions are ignored"
    assert COSTS.at(tokens=1).bytes == 24 + 2 * 24 + 8 + 162
    assert by_kind(COSTS, tokens=5, slots=7)["linear"] == Cost(60, 24, 208, 0)
    assert (COSTS.peak_bytes(tokens=5), COSTS.peak_bytes(tokens=50)) == (100, 400)


def test_missing_dimension() -> None:
    with pytest.raises(UsageError, match="tokens"):
        COSTS.at(slots=3)


def test_survives_json() -> None:
    read = from_dict(Costs, json.loads(json.dumps(dataclasses.asdict(COSTS))), "costs")
    assert read == COSTS


# -- against counts by hand: FP32 on a CPU, both families -----------------------------------------------------------
# D hidden, F intermediate, H query heads, G key/value heads, E head size, R LoRA rank, V vocabulary, L layers;
# S tokens, T tokens in the cache after the run.

SIZES = [(1, 1), (7, 7), (135, 135), (30, 200)]


def linears(spec: ModelSpec) -> list[tuple[int, int]]:
    """[K, N] of the products of one pass through one layer, LoRA left out."""
    d, f, h, g, e = spec.hidden_size, spec.intermediate_size, spec.num_heads, spec.num_kv_heads, spec.head_dim
    mlp = [(d, 2 * f)] if spec.family == "phi3" else [(d, f), (d, f)]
    return [(d, (h + 2 * g) * e), (h * e, d), *mlp, (f, d)]


def with_lora(spec: ModelSpec) -> list[tuple[int, int]]:
    """The same and the low-rank parts: [K, R] and [R, N] of each."""
    r = spec.lora_rank
    return linears(spec) + [shape for k, n in linears(spec) if r for shape in ((k, r), (r, n))]


def products(shapes: list[tuple[int, int]], tokens: int) -> Cost:
    return Cost(
        sum(2 * tokens * k * n for k, n in shapes),
        sum(4 * k * n for k, n in shapes),
        sum(4 * tokens * (k + n) for k, n in shapes),
        0,
    )


def total(*costs: Cost) -> Cost:
    return Cost(*(sum(values) for values in zip(*(dataclasses.astuple(c) for c in costs), strict=True)))


def attention(spec: ModelSpec, layers: int, s: int, t: int) -> Cost:
    h, g, e = spec.num_heads, spec.num_kv_heads, spec.head_dim
    scores, rotated = h * s * t, s * (h + g) * e
    tensors = 4 * (s * (h + 2 * g) * e + s * h * e + s * e + 4 * scores)  # qkv, context, cos and sin, scores
    return Cost(layers * (scores * (4 * e + 4) + 3 * rotated), 0, layers * tensors, layers * 2 * g * e * 4 * (s + t))


@pytest.fixture(scope="module")
def counted(each_bundle: Path) -> tuple[ModelSpec, dict[str, Costs]]:
    manifest = Bundle(each_bundle).manifest
    found = {name: info.costs for name, info in manifest.graphs.items() if info.costs is not None}
    assert found.keys() == manifest.graphs.keys()
    return manifest.spec, found


@pytest.mark.parametrize(("s", "t"), SIZES)
def test_traverse_by_hand(counted: Any, s: int, t: int) -> None:
    spec, costs = counted
    d, f, r, v, passes = spec.hidden_size, spec.intermediate_size, spec.lora_rank, spec.vocab_size, 2 * spec.num_layers
    for graph in costs.keys() & {"traverse", "traverse_text"}:
        lora = r and graph == "traverse"
        shapes = with_lora(spec) if lora else linears(spec)
        kinds = by_kind(costs[graph], tokens=s, slots=t)
        layers = products([*(shapes * passes), *([(d, 1)] * spec.num_layers)], s)
        assert kinds["linear"] == total(layers, products([(d, v)], 1))
        assert kinds["attention"] == attention(spec, passes, s, t)
        normed = 2 * passes * s + 1
        assert kinds["norm"] == Cost(4 * d * normed, 4 * d * (2 * passes + 1), 8 * d * normed, 0)
        once = passes * s * (3 * f + 2 * d)  # SwiGLU, two residuals
        gate = spec.num_layers * s * (5 + 3 * d)  # bias, tanh, two halves, 1 - s; the mixture
        low_rank = passes * s * sum(r + n for _, n in linears(spec)) if lora else 0  # mask, sum
        assert kinds["pointwise"].flops == once + gate + low_rank + 2  # and two numbers about the cache's length


@pytest.mark.parametrize("t", [1, 9, 2048])
def test_step_by_hand(counted: Any, t: int) -> None:
    spec, costs = counted
    d, f, v, layers = spec.hidden_size, spec.intermediate_size, spec.vocab_size, spec.num_layers
    kinds = by_kind(costs["step"], slots=t)
    assert kinds["linear"] == products([*(linears(spec) * layers), (d, v)], 1)
    assert kinds["attention"] == attention(spec, layers, 1, t)
    assert kinds["norm"] == Cost(4 * d * (2 * layers + 1), 4 * d * (2 * layers + 1), 8 * d * (2 * layers + 1), 0)
    assert kinds["pointwise"].flops == layers * (3 * f + 2 * d) + 2


def test_step_without_slots_is_a_full_cache(counted: Any, each_bundle: Path) -> None:
    _, costs = counted
    assert costs["step"].at() == costs["step"].at(slots=Bundle(each_bundle).manifest.context)


@pytest.mark.parametrize("images", [1, 5])
def test_vision_by_hand(counted: Any, images: int) -> None:
    spec, costs = counted
    v, hidden = spec.vision, spec.hidden_size
    w, f, phi3 = v.hidden_size, v.intermediate_size, spec.family == "phi3"
    tokens = v.tokens_per_image
    patches = 4 * tokens if phi3 else tokens
    n = images * (patches + 1)
    kinds = by_kind(costs["vision"], images=images)
    qkv = [(w, 3 * w)] if phi3 else [(w, w)] * 3
    tower = products([*qkv, (w, w), (w, f), (f, w)] * v.num_layers, n)
    features = 4 * w if phi3 else w
    assert kinds["linear"] == total(tower, products([(features, hidden), (hidden, hidden)], images * tokens))
    pixels = 3 * v.image_size**2
    taps = 3 * v.patch_size**2
    assert kinds["convolution"] == Cost(
        2 * images * patches * w * taps, 4 * (w * taps + (w if phi3 else 0)), 4 * images * (pixels + patches * w), 0
    )
    scores = images * v.num_heads * (patches + 1) ** 2
    size = w // v.num_heads
    assert kinds["attention"] == Cost(
        scores * (4 * size + 4) * v.num_layers, 0, 16 * (n * w + scores) * v.num_layers, 0
    )
    extra = images * tokens * features if phi3 else n * w  # norm of the projector; norm before the tower
    assert kinds["norm"].flops == 7 * (2 * v.num_layers * n * w + extra)


@pytest.mark.parametrize("name", [NANOS[0], *slow(NANOS[1])])
def test_bundle_and_model_agree(name: str, bundle_of: Callable[[str], Path]) -> None:
    """Two traced layers stand for all: every count, the peaks and the bytes are those of the whole export."""
    whole = subject_of(Bundle(bundle_of(name)))
    quick = model(whole.name).subject("cpu", RecipeOptions())
    assert numbers(quick) == numbers(whole)


@pytest.mark.parametrize("name", [NANOS[0], *slow(NANOS[1])])
def test_bundle_and_model_agree_on_fewer_second_passes(name: str, exported: Callable[..., Path]) -> None:
    """A layer without one is counted apart: every count is that of the export with a second pass in these layers."""
    folder = exported(CHECKPOINTS / name, traversal={"trol-nano": "1,3", "trol-nano-phi3": "2"}[name])
    whole = subject_of(Bundle(folder))
    quick = model(whole.name).subject("cpu", RecipeOptions(), twice=2)
    layers = Bundle(folder).manifest.spec.num_layers
    assert numbers(quick)[1:] == numbers(whole)[1:]
    assert (
        (quick.twice, quick.second_bytes) == (whole.twice, whole.second_bytes) == (2, quick.cache_bytes * 2 // layers)
    )
    sizes = [{"images": 3, "tokens": s, "slots": t} for s, t in SIZES]
    for graph, costs in whole.graphs.items():
        for dims in sizes:
            assert by_kind(quick.graphs[graph], **dims) == by_kind(costs, **dims), graph
    assert whole.passes.startswith(f"{layers} layers, second pass in 2 (") and not quick.programs


def numbers(subject: Subject) -> Any:
    sizes = [{"images": 3, "tokens": s, "slots": t} for s, t in SIZES]
    found = {n: [(by_kind(c, **d), c.peak_bytes(**d)) for d in sizes] for n, c in subject.graphs.items()}
    embedding = subject.embedding_bytes
    return found, subject.weights, subject.decoder_bytes, subject.cache_bytes, subject.context, embedding


@functools.cache
def model(name: str) -> unbuilt.Unbuilt:
    """Traced once."""
    return unbuilt.published(name)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("target", ["cpu", "jetson-jp6"])
def test_precisions(target: str, precision: str) -> None:
    """A step reads each of its weights once, in the type in which it is loaded (and rows of the rotary tables)."""
    shape = model("trol-nano")
    subject, spec = shape.subject(target, RecipeOptions(recipe=precision)), shape.spec
    rotary = 2 * shape.context * spec.head_dim // 2 * 4
    cost = subject.graphs["step"].at()
    assert cost.weight_bytes + rotary == subject.weights["step"]
    stored = {o.stored for o in subject.graphs["step"].operations if o.kind == "linear"}
    floats = "float16" if target != "cpu" and precision == "fp16" else "float32"
    assert {"int8": "int8", "int4": "int4"}.get(precision, floats) in stored
    assert cost.flops >= 2 * sum(k * n for k, n in linears(spec)) * spec.num_layers
    item = 4 if target == "cpu" or precision == "fp32" else 2
    assert subject.cache_bytes == 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * shape.context * item


def test_peak_and_unknown_shapes() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["tokens", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    a = ir.node("Mul", [x, x])
    b = ir.node("Mul", [a.outputs[0], a.outputs[0]])
    c = ir.node("Add", [a.outputs[0], b.outputs[0]])
    d = ir.node("Relu", [c.outputs[0]])
    for node, name in ((a, "a"), (b, "b"), (c, "c"), (d, "d")):
        node.outputs[0].name = name
        node.outputs[0].type = x.type
    graph = ir.Graph([x], [d.outputs[0]], nodes=[a, b, c, d], opset_imports={"": 23}, name="g")
    found = counts.count(ir.Model(graph, ir_version=11), ())
    assert found.peak == ({"tokens": 3 * 16},), "a, b and c live together; x and d belong to the caller"
    assert found.at(tokens=2) == Cost(4 * 8, 0, 2 * 16 * (3 + 3 + 3 + 2), 0)
    x.shape = None
    with pytest.raises(ExportError, match="shape is not known"):
        counts.count(ir.Model(graph, ir_version=11), ())
