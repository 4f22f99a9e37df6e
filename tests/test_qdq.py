"""The graph passes on graphs small enough to compute by hand: Q/DQ insertion, FP16 with FP32 islands, int4 readers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from tests.conftest import NANO
from trol_edge.bundle.precision import QUANTIZED, LinearPlan, PrecisionPlan
from trol_edge.errors import ExportError
from trol_edge.export.graphs import canonical as graphs
from trol_edge.export.quantize import half, qdq
from trol_edge.export.quantize import rounding as quantize
from trol_edge.export.quantize.recipes import GATE, RecipeOptions, make_plan
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.rope import TABLES

Array = NDArray[Any]
S, K, N = 5, 64, 6
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
W8A8, W8, W4 = LinearPlan("int8", activations=True), LinearPlan("int8"), LinearPlan("int4", 32)
RANDOM = np.random.default_rng(0)


class Builder:
    """A graph of one input x [1, S, K], written top down."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.x = ir.Value(name="x", shape=ir.Shape((1, S, K)), type=ir.TensorType(FLOAT))

    def weight(self, name: str, *shape: int) -> ir.Value:
        """A parameter without a value."""
        self.initializers.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(FLOAT)))
        return self.initializers[-1]

    def node(self, op: str, name: str, *inputs: ir.Value, shape: tuple[int, ...], **attributes: Any) -> ir.Value:
        """A node of one output, which has the name."""
        node = ir.node(op, list(inputs), attributes=attributes, name=f"node_{name}")
        self.nodes.append(node)
        node.outputs[0].name, node.outputs[0].shape = name, ir.Shape(shape)
        node.outputs[0].type = ir.TensorType(FLOAT)
        return node.outputs[0]

    def model(self, *outputs: ir.Value) -> ir.Model:
        """What was written so far."""
        graph = ir.Graph([self.x], list(outputs), nodes=self.nodes, opset_imports={"": graphs.OPSET}, name="g")
        for value in self.initializers:
            graph.initializers.add(value)
        return ir.Model(graph, ir_version=graphs.IR_VERSION)


def pair() -> ir.Model:
    """Two Linears on one input, and a third on their sum: the weights of `a` are used twice."""
    b = Builder()
    a, c = b.weight("a.weight", K, N), b.weight("c.weight", K, N)
    first = b.node("MatMul", "first", b.x, a, shape=(1, S, N))
    second = b.node("MatMul", "second", b.x, c, shape=(1, S, N))
    double = b.node("Add", "double", b.x, b.x, shape=(1, S, K))
    third = b.node("MatMul", "third", double, a, shape=(1, S, N))
    total = b.node("Add", "total", first, second, shape=(1, S, N))
    return b.model(b.node("Add", "y", total, third, shape=(1, S, N)))


def plan(linears: Mapping[str, LinearPlan], compute: str = "fp32") -> PrecisionPlan:
    """A plan for a small graph."""
    return PrecisionPlan("mixed", compute, dict(linears))


def filled(model: ir.Model, values: Mapping[str, Array]) -> bytes:
    """The graph with its parameters inside it."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            value.const_value = ir.tensor(np.asarray(values[name]).astype(value.dtype.numpy()), value.dtype, name=name)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def run(model: ir.Model, values: Mapping[str, Array], x: Array, optimize: bool = True) -> list[Array]:
    """Outputs by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(filled(model, values), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def run_in_half(model: ir.Model, values: Mapping[str, Array], x: Array) -> Array:
    """The first output by onnx's reference, in numpy: ONNX Runtime's CPU provider computes FP16 graphs in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(onnx.load_from_string(filled(model, values))).run(None, {"x": x})[0]


def stored(weight: Array, linear: LinearPlan) -> tuple[Array, Array]:
    """[N, K] -> stored numbers [K, N] and scales as the graph has them."""
    import torch

    values, scale = quantize.quantize(torch.from_numpy(weight), linear, clipping=False)
    return values.numpy().T, scale.numpy().T


def operators(model: ir.Model) -> list[str]:
    """Node types in order."""
    return [node.op_type for node in model.graph]


# -- Q/DQ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [W8A8, W8, W4])
@pytest.mark.parametrize("optimize", [True, False])
def test_quantized_graph_computes_what_it_says(linear: LinearPlan, optimize: bool) -> None:
    """ONNX Runtime against numpy on the stored numbers, the input rounded where the plan has it."""
    weights = {n: RANDOM.normal(size=(N, K)).astype(np.float32) for n in ("a.weight", "c.weight")}
    x = RANDOM.normal(size=(1, S, K)).astype(np.float32)
    scale = float(np.abs(x).max() * 0.8 / 127)  # some of it is clipped
    model = pair()
    scales = {"a.weight": scale, "c.weight": scale} if linear.activations else {}
    assert qdq.insert(model, plan({"a.weight": linear, "c.weight": linear}), scales)
    values, restored = {}, {}
    for name, weight in weights.items():
        values[name], values[f"{name}.scale"] = stored(weight, linear)
        wide = values[f"{name}.scale"]
        restored[name] = values[name] * (np.repeat(wide, 32, 0) if linear.block else wide)

    def rounded(t: Array) -> Array:
        return np.clip(np.rint(t / np.float32(scale)), -128, 127) * np.float32(scale) if linear.activations else t

    wanted = rounded(x) @ (restored["a.weight"] + restored["c.weight"]) + rounded(2 * x) @ restored["a.weight"]
    (found,) = run(model, values, x, optimize)
    # Optimized, ONNX Runtime multiplies weights alone as MatMulNBits, which rounds its input to 8 bits by itself.
    tolerance = 0.01 if optimize and not linear.activations else 2e-5
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


def test_one_pair_per_input_and_one_restoration_per_use() -> None:
    """x is rounded once for both its readers, its double separately; `a` is there once and is restored twice."""
    model = pair()
    before = {v.name for node in model.graph for v in node.outputs}
    qdq.insert(model, plan({"a.weight": W8A8, "c.weight": W8A8}), {"a.weight": 0.1, "c.weight": 0.1})
    found = operators(model)
    assert found.count("QuantizeLinear") == 2
    assert found.count("DequantizeLinear") == 2 + 3
    assert before < {v.name for node in model.graph for v in node.outputs}
    names = set(model.graph.initializers)
    assert names == {"a.weight", "c.weight", "a.weight.scale", "c.weight.scale", "a.input_scale", "zero.int8"}
    assert [node.op_type for node, _ in model.graph.initializers["a.weight"].uses()] == ["DequantizeLinear"] * 2
    assert model.graph.initializers["a.weight"].dtype == ir.DataType.INT8


def test_mixed_precisions_on_one_input() -> None:
    """Each reader gets what its plan says: rounded, as it was, or in another format."""
    model = pair()
    linears = {"a.weight": W8A8, "c.weight": LinearPlan("fp8", activations=True)}
    qdq.insert(model, plan(linears), {"a.weight": 0.1, "c.weight": 0.2})
    assert operators(model).count("QuantizeLinear") == 3  # x as int8, x as fp8, its double as int8
    assert {"zero.int8", "zero.fp8"} < set(model.graph.initializers)
    model = pair()
    qdq.insert(model, plan({"a.weight": W8A8, "c.weight": W8}), {"a.weight": 0.1})
    assert operators(model).count("QuantizeLinear") == 2
    second = next(node for node in model.graph if node.name == "node_second")
    assert second.inputs[0] is model.graph.inputs[0]


def test_unplanned_graph_is_left_alone() -> None:
    """Nothing of the plan is in it: not a node changes."""
    model = pair()
    assert not qdq.insert(model, plan({"a.weight": LinearPlan("fp16"), "other.weight": W8}), {})
    assert operators(model) == operators(pair())


def test_unexpected_graphs_are_refused() -> None:
    """A weight that something else reads too, a scale that is none, and a graph quantized before."""
    b = Builder()
    a = b.weight("a.weight", K, K)
    product = b.node("MatMul", "p", b.x, a, shape=(1, S, K))
    model = b.model(b.node("Add", "y", product, a, shape=(1, S, K)))
    with pytest.raises(ExportError, match=r"a\.weight is read by Add, MatMul, not by MatMul alone"):
        qdq.insert(model, plan({"a.weight": W8}), {})
    for scale in (0.0, float("nan"), float("inf"), -1.0):
        with pytest.raises(ExportError, match="input scale"):
            qdq.insert(pair(), plan({"a.weight": W8A8}), {"a.weight": scale})
    model = pair()
    qdq.insert(model, plan({"a.weight": W8}), {})
    with pytest.raises(ExportError, match="not by MatMul alone"):
        qdq.insert(model, plan({"a.weight": W8}), {})
    b = Builder()
    left = b.weight("left.weight", 1, S)
    model = b.model(b.node("MatMul", "y", left, b.x, shape=(1, 1, K)))
    with pytest.raises(ExportError, match="not by MatMul alone"):  # it is on the wrong side
        qdq.insert(model, plan({"left.weight": W8}), {})


@pytest.fixture(scope="module")
def traced(traces: dict[Any, Any]) -> dict[str, ir.Model]:
    """trol-nano's graphs with Linear weights as MatMul reads them."""
    source = Checkpoint(NANO)
    models = {name: graphs.trace(name, source.family, source.spec, 2048) for name in graphs.TRACED}
    for model in models.values():
        graphs.fold_transposes(model)
    return models


@pytest.mark.parametrize("recipe", ["int8", "int4", "fp8"])
def test_every_linear_of_the_model_is_quantized(traced: dict[str, ir.Model], recipe: str) -> None:
    """Counted without the pass's own check: each MatMul by a parameter, but the gate's, as the plan says."""
    source = Checkpoint(NANO)
    chosen = make_plan(RecipeOptions(recipe), {n: source.shape(n) for n in source.names()}, "onnx")
    scales = {name: 0.05 for name, linear in chosen.linears.items() if linear.activations}
    seen = set()
    for name, trace in traced.items():
        model = trace.clone()
        before = [node for node in model.graph if node.op_type == "MatMul"]
        products = {node.outputs[0].name: node.inputs[1].name for node in before if node.inputs[1] is not None}
        qdq.insert(model, chosen, scales)
        for node in model.graph:
            if node.op_type != "MatMul" or products.get(node.outputs[0].name) == GATE:
                continue
            weight = node.inputs[1]
            parameter = products.pop(node.outputs[0].name)
            assert weight is not None and parameter is not None
            linear = chosen.linears[parameter]
            producer = weight.producer()
            if linear.precision not in QUANTIZED:
                assert producer is None
                continue
            assert producer is not None and producer.op_type == "DequantizeLinear"
            assert producer.inputs[0] is not None and producer.inputs[0].name == parameter
            assert producer.inputs[0].dtype == qdq.STORED[linear.precision]
            x = node.inputs[0].producer() if node.inputs[0] is not None else None
            assert (x is not None and x.op_type == "DequantizeLinear") == linear.activations
            seen.add(parameter)
        assert all(parameter == GATE for parameter in products.values()), name
    assert seen == {name for name, linear in chosen.linears.items() if linear.precision in QUANTIZED}


# -- readers apart -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [W4, W8A8, LinearPlan("fp32")], ids=["int4", "int8", "fp32"])
def test_readers_of_one_input_are_set_apart(linear: LinearPlan) -> None:
    """Same numbers, same names, three shapes; a rounded input is rounded at each product, in its shape."""
    b = Builder()
    weights = {name: b.weight(f"{name}.weight", K, K) for name in ("gate", "up", "side")}
    x = b.x
    for i in range(2):
        g, u, s = (b.node("MatMul", f"{n}{i}", x, w, shape=(1, S, K)) for n, w in weights.items())
        x = b.node("Add", f"x{i}", b.node("Add", f"y{i}", g, u, shape=(1, S, K)), s, shape=(1, S, K))
    model = b.model(x)
    values = {}
    for name in weights:
        weight = RANDOM.normal(size=(K, K)).astype(np.float32)
        if linear.precision == "fp32":
            values[f"{name}.weight"] = weight
        else:
            values[f"{name}.weight"], values[f"{name}.weight.scale"] = stored(weight, linear)
    plans = {f"{name}.weight": linear for name in weights}
    qdq.insert(model, plan(plans), dict.fromkeys(plans, 0.02))
    data = RANDOM.normal(size=(1, S, K)).astype(np.float32)
    (wanted,) = run(model.clone(), values, data, optimize=False)
    names = {v.name for node in model.graph for v in node.outputs}
    assert qdq.separate_readers(model)
    assert operators(model).count("Squeeze") == operators(model).count("Unsqueeze") == 4
    assert operators(model).count("QuantizeLinear") == (6 if linear.activations else 0)
    assert names < {v.name for node in model.graph for v in node.outputs}
    shapes = [node.inputs[0].shape for node in model.graph if node.op_type == "MatMul" and node.inputs[0] is not None]
    assert [len(shape) for shape in shapes if shape is not None] == [3, 2, 4] * 2
    for node in model.graph:
        if node.op_type == "MatMul" and linear.activations:
            producer = node.inputs[0].producer() if node.inputs[0] is not None else None
            assert producer is not None and producer.op_type == "DequantizeLinear"
    (found,) = run(model, values, data, optimize=False)
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-4)
    once = pair()
    qdq.insert(once, plan({"c.weight": W4}), {})
    assert not qdq.separate_readers(once)


# -- FP16 --------------------------------------------------------------------------------------------------------------


def mlp() -> ir.Model:
    """Norm, gate * up, down, residual, norm, output: names as the decoder has them."""
    b = Builder()
    layer = "decoder.layers.0"
    norm = b.weight(f"{layer}.mlp_norm.weight", K)
    gate, up, down = (b.weight(f"{layer}.mlp.{n}.weight", K, K) for n in ("gate", "up", "down"))
    final, head = b.weight("decoder.norm.weight", K), b.weight("decoder.lm_head.weight", K, N)
    n = b.node("RMSNormalization", "n", b.x, norm, shape=(1, S, K), epsilon=1e-5)
    g = b.node("MatMul", "g", n, gate, shape=(1, S, K))
    u = b.node("MatMul", "u", n, up, shape=(1, S, K))
    product = b.node("Mul", "product", g, u, shape=(1, S, K))
    d = b.node("MatMul", "d", product, down, shape=(1, S, K))
    residual = b.node("Add", "residual", b.x, d, shape=(1, S, K))
    last = b.node("RMSNormalization", "last", residual, final, shape=(1, S, K), epsilon=1e-5)
    return b.model(b.node("MatMul", "logits", last, head, shape=(1, S, N)))


def mlp_values(gain: float) -> dict[str, Array]:
    """Weights whose product grows to some 100 * gain^2."""
    values: dict[str, Array] = {}
    for name, value in mlp().graph.initializers.items():
        shape = [int(d) for d in value.shape or () if isinstance(d, int)]
        size = np.ones(shape) if len(shape) == 1 else RANDOM.normal(size=shape) / np.sqrt(shape[0])
        values[name] = size.astype(np.float32)
    for name in ("gate", "up"):
        values[f"decoder.layers.0.mlp.{name}.weight"] *= gain
    values["decoder.layers.0.mlp.down.weight"] /= gain  # so that the residual stays small: only the product is large
    return values


def types(values: Mapping[str, Array]) -> dict[str, ir.DataType]:
    """The types in which StoredWeights stores them: norms in F32, all else in F16."""
    return {name: FLOAT if "norm" in name else HALF for name in values}


def half_by_hand(values: Mapping[str, Array], x: Array, wide_product: bool) -> Array:
    """The same in numpy, rounding to FP16 after every operator."""

    def h(t: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return t.astype(np.float16).astype(np.float32)

    def rms(t: Array, w: Array) -> Array:
        return t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-5) * w

    w = {name.removeprefix("decoder.layers.0."): h(a) if "norm" not in name else a for name, a in values.items()}
    n = h(rms(x, w["mlp_norm.weight"]))
    wide = (lambda t: t) if wide_product else h
    with np.errstate(over="ignore", invalid="ignore"):
        g, u = wide(n @ w["mlp.gate.weight"]), wide(n @ w["mlp.up.weight"])
        product = wide(g * u)
        residual = h(h(x) + h(wide(product @ w["mlp.down.weight"])))
        return rms(residual, w["decoder.norm.weight"]) @ w["decoder.lm_head.weight"]


def test_overflowing_product_needs_its_island() -> None:
    """By hand, in numpy: without it there is no answer. By the graph: with it, the answer of FP32."""
    values = mlp_values(600.0)
    x = RANDOM.normal(size=(1, S, K)).astype(np.float32)
    (wanted,) = run(mlp(), values, x)
    assert not np.isfinite(half_by_hand(values, x, wide_product=False)).all()
    by_hand = half_by_hand(values, x, wide_product=True)
    assert np.abs(by_hand - wanted).max() < 0.02 * np.abs(wanted).max()

    model = mlp()
    half.convert(model, ("decoder.layers.0.mlp.down",), types(values))
    kinds = {node.outputs[0].name: node.outputs[0].dtype for node in model.graph}
    assert {kinds[name] for name in ("g", "u", "n", "last")} >= {FLOAT}
    assert kinds["product"] == kinds["d"] == FLOAT
    found = run_in_half(model, values, x)
    assert found.dtype == np.float32
    assert np.abs(found - run(model, values, x)[0]).max() < 0.02 * np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()

    model = mlp()
    half.convert(model, (), types(values))
    kinds = {node.outputs[0].name: node.outputs[0].dtype for node in model.graph}
    assert kinds["product"] == kinds["d"] == kinds["residual"] == HALF
    found = run_in_half(model, values, x)
    assert not np.isfinite(found).all()


def test_residual_island() -> None:
    """A stream above 65504 stays FP32, and the norm after it brings it back."""
    values = mlp_values(1.0)
    x = RANDOM.normal(size=(1, S, K)).astype(np.float32)
    x[..., 3] = 3e5
    (wanted,) = run(mlp(), values, x)
    model = mlp()
    half.convert(model, ("decoder.residual",), types(values))
    kinds = {node.outputs[0].name: node.outputs[0].dtype for node in model.graph}
    assert kinds["residual"] == FLOAT and kinds["product"] == HALF
    found = run_in_half(model, values, x)
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    model = mlp()
    half.convert(model, (), types(values))
    found = run_in_half(model, values, x)
    assert not np.isfinite(found).all() or np.abs(found - wanted).max() > 0.1 * np.abs(wanted).max()


def test_quantized_half_graph_runs() -> None:
    """Pairs inside an FP16 graph: scales in FP16, sums as near to FP32's as eight bits allow."""
    values = mlp_values(1.0)
    x = RANDOM.normal(size=(1, S, K)).astype(np.float32)
    (wanted,) = run(mlp(), values, x)
    names = [name for name in values if name.endswith(".weight") and "norm" not in name]
    for linear in (W8A8, W4):
        if linear is W4:
            names = [name for name in names if "lm_head" not in name]
        model = mlp()
        qdq.insert(model, plan(dict.fromkeys(names, linear)), dict.fromkeys(names, 0.05))
        quantized = dict(values)
        for name in names:
            quantized[name], quantized[f"{name}.scale"] = stored(np.ascontiguousarray(values[name].T), linear)
        kinds = types(quantized) | {f"{name}.scale": HALF for name in names}
        half.convert(model, (), kinds)
        assert model.graph.initializers[f"{names[0]}.scale"].dtype == HALF
        (found,) = run(model, quantized, x)
        assert np.abs(found - wanted).max() < (0.35 if linear is W4 else 0.1) * np.abs(wanted).max()


@pytest.mark.parametrize("kept", [(), ("decoder.residual", "vision.residual", "decoder.layers.2.scores")])
def test_half_graphs_of_the_model_are_well_typed(traced: dict[str, ir.Model], kept: tuple[str, ...]) -> None:
    """onnx's own type inference agrees; the cache is FP16, what a caller hands over and reads stays float32."""
    source = Checkpoint(NANO)
    kinds = {name: FLOAT if len(source.shape(name)) == 1 and "norm" in name else HALF for name in source.names()}
    kinds |= dict.fromkeys(TABLES, FLOAT)
    for name, trace in traced.items():
        model = trace.clone()
        half.convert(model, kept, kinds)
        ports = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
        for port, dtype in ports.items():
            if dtype in (HALF, FLOAT):
                assert port is not None
                assert dtype == (HALF if port.startswith(("past_", "present_")) else FLOAT), (name, port)
        attention = [node.inputs[0].dtype for node in model.graph if node.op_type == "Attention" and node.inputs[0]]
        wide = {"vision": 0, "traverse": 2, "step": 1}[name] if kept else 0
        assert attention.count(FLOAT) == wide
        values = {n: np.zeros([d if isinstance(d, int) else 1 for d in v.shape or ()])
                  for n, v in model.graph.initializers.items() if v.const_value is None}  # fmt: skip
        filled(model, values)


def test_overflows_are_found_with_a_margin() -> None:
    """Inputs, outputs and peaks beyond a quarter of FP16's range; the residual stream as a whole."""
    import dataclasses

    from tests.statistics import statistics_of
    from trol_edge.export.quantize.stats import Statistics

    seen = statistics_of(Checkpoint(NANO))
    assert half.find_overflows(seen) == ()
    points = dict(seen.points)
    down, qkv = "decoder.layers.1.mlp.down", "decoder.layers.2.qkv"
    points[down] = dataclasses.replace(points[down], absmax=points[down].absmax * 0 + 17000)
    points[qkv] = dataclasses.replace(points[qkv], output_absmax=16400.0)
    near = "decoder.layers.3.out"
    points[near] = dataclasses.replace(points[near], output_absmax=16000.0)
    peaks = {
        **seen.peaks,
        "decoder.layers.4.residual": 1e6,
        "decoder.layers.0.scores": 2e4,
        "vision.layers.0.scores": 9.0,
    }
    found = half.find_overflows(Statistics(points, peaks, seen.state))
    assert found == ("decoder.layers.0.scores", down, qkv, "decoder.residual")


# -- TensorRT's own parser and builder ---------------------------------------------------------------------------------


@pytest.mark.rtx
@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4", "fp8"])
def test_tensorrt_builds_every_graph(traces: dict[Any, Any], tmp_path: Path, recipe: str) -> None:
    """Strongly typed, without a GPU: what we write is parsed and built as it is, and no input is left unused."""
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'trol-edge[rtx]'")
    from tests.statistics import statistics_of
    from trol_edge.export import pipeline

    folder = tmp_path / recipe
    manifest = pipeline.export(
        NANO, folder, target="onnx", context=256, options=RecipeOptions(recipe), calibration=lambda c: statistics_of(c)
    )
    messages: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                messages.append(message)

    for name, graph in manifest.graphs.items():
        logger = Logger()
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse_from_file(str(folder / graph.file))
        assert parsed, (name, [parser.get_error(i).desc() for i in range(parser.num_errors)])
        profile, dynamic = builder.create_optimization_profile(), False
        for i in range(network.num_inputs):
            port = network.get_input(i)
            if -1 in port.shape:
                dynamic = True
                few, many = (1, 2) if name == "vision" else (8, 64)
                profile.set_shape(port.name, *([d if d >= 0 else n for d in port.shape] for n in (1, few, many)))
        config = builder.create_builder_config()
        if dynamic:
            config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None, (name, messages[-3:])
        assert network.num_inputs == len(graph.inputs)
    assert [m for m in messages if "nused" in m] == []
