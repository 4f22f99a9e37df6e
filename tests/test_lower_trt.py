"""Graphs lowered for TensorRT compute what the canonical ones do, and hold nothing that a target's parser refuses."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests import cases, test_phi3
from tests.cases import TOLERANCE, Array, difference
from tests.conftest import CHECKPOINTS, NANOS, context_of, slow
from tests.golden import GOLDEN
from trol_edge.bundle.engines import left_out
from trol_edge.bundle.folder import sha256_of
from trol_edge.bundle.manifest import Bundle, FileInfo, write_manifest
from trol_edge.bundle.targets import TARGETS
from trol_edge.errors import ExportError
from trol_edge.export import pipeline
from trol_edge.export.lower import trt as lower_trt
from trol_edge.export.lower.cache import give_rows, read_filled
from trol_edge.export.lower.trt import add_token, lower, refusals
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.runtime import Runtime
from trol_edge.runtimes.ort import OrtBackend

NANO = CHECKPOINTS / "trol-nano"
PLAIN, RTX, TRT11 = TARGETS["jetson-jp6"], TARGETS["rtx"], TARGETS["jetson-trt11"]
LOWERED = {"Attention", "RMSNormalization", "RotaryEmbedding"}
EXACT = 1e-5  # of the largest magnitude: the same sums in another order, FP32


def lowered_bundle(source: Path, folder: Path, target: str = "jetson-jp6") -> Path:
    """A copy of a cpu bundle with its graphs lowered for a target; weights stay inputs, so ONNX Runtime runs it."""
    shutil.copytree(source, folder)
    manifest = Bundle(source).manifest
    files, graphs = dict(manifest.files), dict(manifest.graphs)
    in_place = "TensorScatter" in TARGETS[target].takes()
    for name, graph in manifest.graphs.items():
        model = ir.load(source / graph.file)
        if name != "vision" and not in_place:
            read_filled(model, give_rows=True) if name == "step" else give_rows(model)
            outputs = pipeline.ports(model.graph.outputs)
            weights = set(graph.weights)
            inputs = pipeline.ports([v for v in model.graph.inputs if v.name not in weights])
            graph = dataclasses.replace(graph, inputs=inputs, outputs=outputs)
        model = lower(model, TARGETS[target])
        path = folder / graph.file
        path.write_bytes(ir.to_proto(model).SerializeToString())
        onnx.checker.check_model(path, full_check=True)
        files[graph.file] = FileInfo(path.stat().st_size, sha256_of(path))
        operators = dict(Counter(node.op_type for node in model.graph))
        graphs[name] = dataclasses.replace(graph, operators=operators)
    write_manifest(folder, dataclasses.replace(manifest, files=files, graphs=graphs))
    return folder


def answers(runtime: Runtime, ids: Array, pixels: Array | None, steps: int) -> list[Array]:
    """Logits of a prompt and of some greedy steps after it, then the image features."""
    session = runtime.session()
    logits = [session.prefill(ids, pixels)]
    while len(logits) <= steps and session.length < session.limit:
        logits.append(session.step(int(logits[-1].argmax())))
    features = [] if pixels is None else [runtime.model.backend.encode_image(session.check_pixels(pixels))]
    return [*logits, *features]


def golden_cases() -> list[str]:
    """Every golden case, of both families."""
    return sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))


def prompts_of(case: str) -> Iterator[tuple[Array, Array | None, Array | None]]:
    """Ids, pixels and, where the row has no padding, golden's logits after it, of every prompt of a golden case."""
    if case.startswith("phi3"):
        for run in (test_phi3.Run(c, name) for c, name in test_phi3.RUNS if c == case):
            for row in run.rows():
                yield row.ids, row.pixels, _golden(run.expected, row.index, row.padding)
    for loaded in (cases.load(c, name) for c, name in cases.names() if c == case):
        for i, prompt in enumerate(loaded.rows):
            yield prompt.ids, loaded.pixels(prompt), _golden(loaded.expected, i, prompt.padding)


def _golden(expected: dict[str, Array], row: int, padding: int) -> Array | None:
    return expected["cached_logits"][row][0] if "cached_logits" in expected and not padding else None


# What the others differ in from these (pictures, padding on the left, fewer heads of keys) is hardly in a graph.
QUICK = {"internlm2-text", "phi3-tile1"}


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in golden_cases()]
)
def test_lowered_graphs_equal_the_canonical_ones(
    case: str, exported: Callable[..., Path], phi3_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Every prompt of every golden case, with steps after it: the plain operators of JetPack 6 against opset 23."""
    checkpoint = phi3_checkpoint(case) if case.startswith("phi3") else GOLDEN / case
    limit = Checkpoint(checkpoint).spec.max_position_embeddings
    canonical = exported(checkpoint, context=min(context_of(case), limit), lowered=False)
    runtimes = [Runtime(canonical), Runtime(lowered_bundle(canonical, tmp_path / "lowered"))]
    seen = 0
    for ids, pixels, golden in prompts_of(case):
        if len(ids) >= runtimes[0].bundle.manifest.context:
            continue
        ours, plain = (answers(r, ids, pixels, 4) for r in runtimes)
        assert [a.shape for a in ours] == [b.shape for b in plain]
        assert max(difference(b, a) for a, b in zip(ours, plain, strict=True)) <= EXACT
        if golden is not None:
            assert difference(plain[0], golden) <= TOLERANCE
            seen += 1
    assert seen


@pytest.mark.parametrize("model", [NANOS[1], *slow(NANOS[0])])
def test_nanos_lowered_give_the_same_answer(
    model: str, bundle_of: Callable[[str], Path], exported: Callable[..., Path], tmp_path: Path
) -> None:
    """Text, tokens and features of the shipped models, about a picture and without one."""
    picture = CHECKPOINTS / model / "scene.png"
    nano = Runtime(bundle_of(model))
    plain = Runtime(lowered_bundle(exported(CHECKPOINTS / model, lowered=False), tmp_path / "lowered"))
    for images in (picture, None):
        prompt = "Describe the scene."
        assert plain.generate(prompt, images).token_ids == nano.generate(prompt, images).token_ids
    pixels = nano.preprocess(picture)
    assert pixels is not None
    features = [r.model.backend.encode_image(pixels) for r in (nano, plain)]
    assert difference(features[1], features[0]) <= EXACT


def newest_or_skip() -> None:
    """TensorScatter is an operator of opset 24, which ONNX Runtime 1.23.2 does not load; 1.32 runs it in place."""
    x = [value("p", F32, 1, 2, 8, 4), value("u", F32, 1, 2, 1, 4), value("i", I64, 1)]
    model = graph_of("TensorScatter", list(x), axis=-2)
    model.graph.opset_imports[""], model.ir_version = 24, 12
    model.graph.outputs[0].type, model.graph.outputs[0].shape = ir.TensorType(F32), ir.Shape((1, 2, 8, 4))
    try:
        onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no TensorScatter: {error}")


@pytest.mark.parametrize("target", ["rtx", *slow("jetson-jp72")])
@pytest.mark.parametrize("case", ["internlm2-gqa-image", "phi3-text"])
def test_caches_in_place_equal_the_canonical_ones(
    case: str, target: str, exported: Callable[..., Path], phi3_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The graphs of targets that write caches in place, replayed by ONNX Runtime with past and present at one place."""
    newest_or_skip()
    checkpoint = phi3_checkpoint(case) if case.startswith("phi3") else GOLDEN / case
    limit = Checkpoint(checkpoint).spec.max_position_embeddings
    canonical = exported(checkpoint, context=min(context_of(case), limit), lowered=False)
    lowered = lowered_bundle(canonical, tmp_path / "lowered", target)
    operators = Bundle(lowered).manifest.graphs["step"].operators
    assert "ScatterND" not in operators and operators["TensorScatter"] > 0 and "Attention" not in operators
    runtimes = [Runtime(canonical), Runtime(lowered)]
    seen = 0
    for ids, pixels, golden in prompts_of(case):
        if len(ids) >= runtimes[0].bundle.manifest.context:
            continue
        ours, plain = (answers(r, ids, pixels, 4) for r in runtimes)
        assert max(difference(b, a) for a, b in zip(ours, plain, strict=True)) <= EXACT
        if golden is not None:
            assert difference(plain[0], golden) <= TOLERANCE
        seen += 1
    assert seen


def test_only_the_update_reads_a_cache(exported: Callable[..., Path]) -> None:
    """KVCacheUpdate may write before another layer has read: nothing but TensorScatter reads a past."""
    for name in ("traverse", "step"):
        lowered = lower(ir.load(exported(NANO, lowered=False) / f"{name}.onnx"), RTX)
        for past in (v for v in lowered.graph.inputs if str(v.name).startswith("past_")):
            ((node, index),) = past.uses()
            assert (node.op_type, index) == ("TensorScatter", 0)
            assert node.outputs[0].is_graph_output() and past.shape is not None and len(past.shape) == 4


@pytest.mark.parametrize(("name", "count"), [("step", 1), *slow(("traverse", 4))])
def test_graphs_that_give_their_rows(name: str, count: int, exported: Callable[..., Path], tmp_path: Path) -> None:
    """Without TensorScatter: new rows are those of the written caches, and the tokens' own rows of a past are not read.

    A cache may be written in place before or after attention reads it, and it may hold an older answer's rows.
    """
    folder = lowered_bundle(exported(NANO, lowered=False), tmp_path / "lowered", PLAIN.name)
    backend = Runtime(folder).model.backend
    assert isinstance(backend, OrtBackend)
    info, rng, position = Bundle(folder).manifest.graphs[name], np.random.default_rng(0), 11
    rows = 16 if name == "step" else position + count
    inputs: dict[str, Array] = {n: value.numpy() for n, value in backend.weights.items() if n in info.weights}
    inputs |= {
        "inputs_embeds": rng.standard_normal((1, count, backend.spec.hidden_size), np.float32),
        "position_ids": np.arange(position, position + count, dtype=np.int64)[None],
        "slots": np.arange(rows, dtype=np.int64),
    }
    if name == "traverse":
        inputs["image_mask"] = np.zeros((1, count, 1), np.float32)
    past = {
        p.name: rng.standard_normal([int(d) for d in p.shape], np.float32) for p in info.inputs if "past_" in p.name
    }
    names = [port.name for port in info.outputs]
    found = []
    for old in (0.0, 7.0):
        for cache in past.values():
            cache[:, :, position:] = old
            cache[:, :, rows:] = np.nan  # not read at all
        found.append(dict(zip(names, backend.graph(name).run(names, inputs | past), strict=True)))
    new = [port for port in names if port.startswith("new_")]
    assert sorted(new) == sorted(port.replace("past_", "new_", 1) for port in past)
    assert left_out(info) == {port.replace("past_", "present_", 1) for port in past}
    for port in ("logits", *new):
        assert np.isfinite(found[0][port]).all() and np.array_equal(found[0][port], found[1][port])
    for port in new:
        present = found[0][port.replace("new_", "present_", 1)]
        assert np.array_equal(found[0][port], present[:, :, position : position + count])
        assert np.abs(found[0][port]).max(axis=-1).min() > 0
    for port in ("past_value_0", *(["past_second_key_0"] if name == "traverse" else [])):
        changed = {each: cache.copy() for each, cache in past.items()}
        changed[port][:, :, position - 1] += 1
        (logits,) = backend.graph(name).run(["logits"], inputs | changed)
        assert not np.array_equal(logits, found[0]["logits"])


def test_what_each_target_keeps(exported: Callable[..., Path]) -> None:
    """RTX and TensorRT 11 take the canonical operators but for the cache and a step's attention; older ones none."""
    for name in ("vision", "traverse", "step"):
        model = ir.load(exported(NANO, lowered=False) / f"{name}.onnx")
        canonical = Counter(node.op_type for node in model.graph)
        assert canonical["Attention"] == (4 if name == "vision" else 16 if name == "traverse" else 8)
        for target in (RTX, TRT11):
            kept = lower(model, target)
            operators = Counter(node.op_type for node in kept.graph)
            same = ("MatMul", "RMSNormalization", "RotaryEmbedding", "LayerNormalization", "Conv")
            assert [operators[op] for op in same] == [canonical[op] for op in same]
            assert operators["Attention"] == (0 if name == "step" else canonical["Attention"])
            assert operators["TensorScatter"] == canonical["ScatterND"] and not operators["ScatterND"]
            assert kept.opset_imports[""] == 24
        plain = lower(model, PLAIN)
        operators = Counter(node.op_type for node in plain.graph)
        assert not LOWERED & set(operators)
        products = 0 if name == "step" else 2 * canonical["Attention"]  # a step's are sums
        assert operators["MatMul"] == canonical["MatMul"] + products
        assert operators["ScatterND"] == canonical["ScatterND"]
        assert plain.opset_imports[""] == 20 and plain.ir_version == 9
        # What no layer changes is in the graph once: rows of the rope tables, and the mask.
        assert operators["Where"] == (0 if name == "vision" else 1)
        assert operators["Gather"] - canonical["Gather"] == (0 if name == "vision" else 2)
        assert Counter(node.op_type for node in model.graph) == canonical  # the model given is left as it was
        assert [v.name for v in plain.graph.inputs] == [v.name for v in model.graph.inputs]
        assert [v.name for v in plain.graph.outputs] == [v.name for v in model.graph.outputs]


def graph_of(op: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Model:
    """A graph of one node."""
    node = ir.node(op, inputs, attributes=attributes, name="it")
    node.outputs[0].name = "out"
    given = [v for v in inputs if v is not None and v.const_value is None]
    constants = [v for v in inputs if v is not None and v.const_value is not None]
    graph = ir.Graph(given, node.outputs, nodes=[node], initializers=constants, opset_imports={"": 23})
    return ir.Model(graph, ir_version=11)


def value(name: str, dtype: ir.DataType, *shape: int) -> ir.Value:
    """An input of a graph."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def run_on_cpu(model: ir.Model, feeds: dict[str, Array]) -> Array:
    """The first output of a model, from ONNX Runtime."""
    graph = ir.to_proto(model).SerializeToString()
    (found,) = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, feeds)
    return found


F32, F16, I8, I64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.INT64


@pytest.mark.parametrize(
    ("model", "target", "why"),
    [
        (graph_of("TensorScatter", [value("x", F32, 1, 2, 8, 4), value("y", F32, 1, 2, 1, 4)]), PLAIN,
         "TensorScatter needs TensorRT 10.15, this is 10.3"),
        (graph_of("MatMulNBits", [value("x", F32, 4, 8)]), PLAIN, "MatMulNBits is not an operator of any TensorRT"),
        (graph_of("NonZero", [value("x", I64, 4)]), PLAIN, "NonZero takes FP32, FP16, but it has INT64"),
        (graph_of("ReduceMean", [value("x", F32, 4, 4), value("axes", I64, 1)]), PLAIN,
         "the axes of ReduceMean must be an initializer"),
        (graph_of("DequantizeLinear", [value("x", I8, 4), value("s", F32), value("z", I8)]), PLAIN,
         "the zero point of DequantizeLinear must be zero"),
        (graph_of("ScatterND", [value("x", F32, 4), value("i", I64, 1, 1), value("u", F32, 1)], reduction="add"), PLAIN,
         "ScatterND with a reduction is not supported"),
        (graph_of("TensorScatter", [value("x", F32, 1, 2, 8, 4), value("y", F32, 1, 2, 1, 4)], axis=1), RTX,
         "TensorScatter along another axis than -2 is not supported"),
        (graph_of("Attention", [value(n, F32, 1, 2, 8, 4) for n in "qkv"], softcap=5.0), RTX,
         "softcap is not supported"),
        (graph_of("Attention", [*(value(n, F32, 1, 2, 8, 4) for n in "qkv"), None, None, None, value("l", I64, 1)]),
         TRT11, "is ignored by the parser; give an explicit mask"),
    ],
)  # fmt: skip
def test_what_a_parser_would_refuse(model: ir.Model, target: object, why: str) -> None:
    """Operators, types and restrictions, each in words, before any parser sees the graph."""
    with pytest.raises(ExportError, match=why):
        lower(model, target)  # type: ignore[arg-type]


def test_int8_zero_points_of_zero_pass() -> None:
    """Restrictions do not forbid what they should not."""
    zero = value("z", I8)
    zero.const_value = ir.Tensor(np.zeros((), np.int8), name="z")
    model = graph_of("DequantizeLinear", [value("x", I8, 4), value("s", F32), zero])
    model.graph.outputs[0].type = ir.TensorType(F32)
    assert refusals(model, PLAIN) == []


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize(("kind", "length"), [("causal", 5), ("bool", 5), ("none", 5), ("bool", 1), ("none", 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_attention_written_out(share: int, kind: str, length: int, dtype: type, tmp_path: Path) -> None:
    """Shared heads, masks, one query and FP16, against ONNX Runtime's own Attention."""
    rng = np.random.default_rng(0)
    groups, total, size = 2, 5 if kind == "causal" else 9, 8
    shapes = {"q": (1, groups * share, length, size), "k": (1, groups, total, size), "v": (1, groups, total, size)}
    feeds = {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}
    kinds = ir.DataType.FLOAT if dtype == np.float32 else F16
    inputs: list[ir.Value | None] = [value(n, kinds, *s) for n, s in shapes.items()]
    if kind == "bool":
        feeds["mask"] = rng.random((1, 1, length, total)) < 0.6
        feeds["mask"][..., 0] = True
        inputs.append(value("mask", ir.DataType.BOOL, 1, 1, length, total))
    model = graph_of("Attention", inputs, **({"is_causal": 1} if kind == "causal" else {}))
    model.graph.outputs[0].type, model.graph.outputs[0].shape = ir.TensorType(kinds), ir.Shape(shapes["q"])
    found = []
    for each in (model, lower(model, PLAIN)):
        session = onnxruntime.InferenceSession(
            ir.to_proto(each).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        found.append(session.run(None, feeds)[0].astype(np.float32))
    assert difference(found[1], found[0]) <= (EXACT if dtype == np.float32 else 3e-3)


def test_qkv_is_split_along_heads() -> None:
    """The same q, k and v, by a Split of heads; a Split that makes no heads stays as it is."""
    x = value("x", F32, 1, 3, 20)
    sizes, shapes = [8, 4, 8], [(1, 3, n // 4, 4) for n in (8, 4, 8)]
    split = ir.node("Split", [x, constant("sizes", sizes)], attributes={"axis": -1}, num_outputs=3)
    nodes, outputs = [split], []
    for i, (part, shape) in enumerate(zip(split.outputs, shapes, strict=True)):
        part.type, part.shape = ir.TensorType(F32), ir.Shape((1, 3, sizes[i]))
        reshape = ir.node("Reshape", [part, constant(f"shape{i}", shape)])
        reshape.outputs[0].type, reshape.outputs[0].shape = ir.TensorType(F32), ir.Shape(shape)
        transpose = ir.node("Transpose", reshape.outputs, attributes={"perm": [0, 2, 1, 3]})
        out = ir.node("Identity", transpose.outputs)
        for made, name in ((transpose.outputs[0], f"heads{i}"), (out.outputs[0], f"out{i}")):
            made.name, made.type, made.shape = name, ir.TensorType(F32), ir.Shape((1, shape[2], 3, 4))
        nodes += [reshape, transpose, out]
        outputs.append(out.outputs[0])
    constants = [v for node in nodes for v in node.inputs if v is not None and v.const_value is not None]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=constants, opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=11)
    lowered = lower(model, RTX)
    operators = [node.op_type for node in lowered.graph if node.op_type != "Identity"]
    assert operators == ["Reshape", "Transpose", "Split"]
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 20), np.float32)}
    lowered.graph.opset_imports[""], lowered.ir_version = 23, 11  # for an older ONNX Runtime
    found = [
        onnxruntime.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, feeds
        )
        for m in (model, lowered)
    ]
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    transpose.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2, 3])
    assert [node.op_type for node in lower(model, RTX).graph].count("Split") == 1
    assert "Reshape" in [node.op_type for node in lower(model, RTX).graph]


def constant(name: str, numbers: object) -> ir.Value:
    """An int64 initializer."""
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(I64), const_value=tensor)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_norm_and_swish_written_out(dtype: type) -> None:
    """RMSNormalization sums squares in float32 whatever the type; Swish is x * sigmoid(alpha x)."""
    x = (np.random.default_rng(0).standard_normal((1, 3, 16)) * (300 if dtype == np.float16 else 1)).astype(dtype)
    kind = F32 if dtype == np.float32 else F16
    scale = value("scale", kind, 16)
    weights = np.linspace(0.5, 2, 16).astype(dtype)
    scale.const_value = ir.Tensor(weights, name="scale")
    model = graph_of("RMSNormalization", [value("x", kind, 1, 3, 16), scale], epsilon=1e-5)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weights
    swish = graph_of("Swish", [value("x", kind, 1, 3, 16)], alpha=0.5)
    for each, wanted in ((model, expected), (swish, wide / (1 + np.exp(-0.5 * np.clip(wide, -700, 700))))):
        each.graph.outputs[0].type, each.graph.outputs[0].shape = ir.TensorType(kind), ir.Shape(x.shape)
        plain = lower(each, PLAIN)
        assert all(node.op_type not in ("RMSNormalization", "Swish") for node in plain.graph)
        session = onnxruntime.InferenceSession(
            ir.to_proto(plain).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (found,) = session.run(None, {"x": x})
        assert np.isfinite(found).all()
        assert difference(found.astype(np.float64), wanted) <= (EXACT if dtype == np.float32 else 2e-3)


def test_int4_takes_the_newer_opset() -> None:
    """Blocked DequantizeLinear came with opset 21."""
    scale, weight = value("s", F32, 2, 4), value("w", ir.DataType.INT4, 64, 4)
    model = graph_of("DequantizeLinear", [weight, scale], axis=0, block_size=32)
    model.graph.outputs[0].type = ir.TensorType(F32)
    plain = lower(model, PLAIN)
    assert (plain.opset_imports[""], plain.ir_version) == (21, 10)
    assert lower_trt.IR_VERSIONS[20] == 9


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_the_token_is_numpys_argmax(dtype: ir.DataType) -> None:
    """The first of equal ones; -1 if any logit is NaN or infinite, at any place."""
    given = ir.Value(name="x", shape=ir.Shape((1, 40)), type=ir.TensorType(dtype))
    node = ir.node("Identity", [given])
    logits = node.outputs[0]
    logits.name, logits.shape, logits.type = "logits", given.shape, given.type
    model = ir.Model(ir.Graph([given], [logits], nodes=[node], opset_imports={"": 20}, name="g"), ir_version=9)
    add_token(model)
    assert refusals(model, PLAIN) == []
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for trial in range(50):
        x = rng.integers(-3, 3, (1, 40)).astype(dtype.numpy())
        assert session.run(["token"], {"x": x})[0].tolist() == [int(x.argmax())]
        x[0, trial % 40] = (np.nan, np.inf, -np.inf)[trial % 3]
        assert session.run(["token"], {"x": x})[0].tolist() == [-1]
