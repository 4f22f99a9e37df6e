"""Each lowering pass computes what the canonical graph computes, on the ONNX Runtime that is installed.

With TROL_EDGE_LOWERED_OUT=folder these tests leave their lowered graphs and results there, and tests/replay_lowered.py
runs them again on the oldest ONNX Runtime, where export is not installed (`make test-oldest`).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from tests.conftest import slow
from trol_edge.bundle.derived import (
    INT8,
    INT8_SCALE,
    NBITS,
    NBITS_SCALE,
    derive_int8,
    derived_parameters,
    int8_from_nbits,
)
from trol_edge.bundle.precision import LinearPlan, PrecisionPlan
from trol_edge.bundle.spec import LongRope, ModelSpec, VisionSpec
from trol_edge.errors import ExportError
from trol_edge.export.graphs import canonical as graphs
from trol_edge.export.lower import ort as lower_ort
from trol_edge.export.quantize import qdq
from trol_edge.export.reference import internlm2, phi3
from trol_edge.export.reference.family import Family
from trol_edge.export.storage import Layout, Rows

Array = NDArray[Any]
CAPACITY = 40
VISION = VisionSpec(16, 32, 1, 2, 4, 8, 1e-5, 4)
SPEC = ModelSpec("internlm2", 64, 96, 2, 4, 2, 16, 96, 97, 1e-5, 1e4, 64, 8, 2, 96, VISION)
SHORT = LongRope((1.0,) * 8, (2.0,) * 8, 24, 1.1)
PHI3 = ModelSpec("phi3", 64, 96, 2, 4, 4, 16, 96, 96, 1e-5, 1e4, 64, 0, 2, 95, VISION, SHORT)


class Case:
    """One traced graph: quantized by `treatment`, in its canonical and its lowered form, with made-up weights."""

    def __init__(self, name: str, family: Family, spec: ModelSpec, treatment: LinearPlan | None) -> None:
        self.name, self.spec, self.rng = name, spec, np.random.default_rng(5)
        self.canonical = graphs.trace("traverse" if name == "traverse_text" else name, family, spec, CAPACITY)
        if name == "traverse_text":
            self.canonical = graphs.without_lora(self.canonical)
        graphs.fold_transposes(self.canonical)
        parameters = {n: v.shape for n, v in self.canonical.graph.initializers.items() if v.const_value is None}
        linears = {
            n: treatment
            for n, shape in parameters.items()
            if treatment is not None
            and n.endswith((".weight", "lora_a", "lora_b"))
            and "norm" not in n
            and n != "decoder.gate.weight"
            and not (treatment.block and int(shape[0]) % treatment.block)  # type: ignore[index]
        }
        plan = PrecisionPlan("mixed", "fp32", linears)
        if treatment is not None:
            qdq.insert(self.canonical, plan, dict.fromkeys(linears, 0.04))
        self.lowered = self.canonical.clone()
        self.layouts = lower_ort.lower(name, self.lowered)
        self.values, self.rows = {}, {}
        for n, shape in parameters.items():
            self._make_up(n, tuple(int(d) for d in shape), plan.linears.get(n))  # type: ignore[union-attr]

    def _make_up(self, name: str, shape: tuple[int, ...], linear: LinearPlan | None) -> None:
        values = self.rng.standard_normal(shape, dtype=np.float32)
        if linear is None:
            factor = 1 / np.sqrt(shape[0]) if len(shape) == 2 and "rope" not in name else 0.5
            self.values[name] = (values * np.float32(factor)).astype(np.float32)
            return
        blocks = values.T.reshape(shape[1], -1, linear.block or shape[0])
        steps = 7 if linear.precision == "int4" else 127
        scale = (np.abs(blocks).max(axis=-1) / steps).astype(np.float32)
        rounded = np.rint(blocks / scale[..., None]).astype(np.int8).reshape(shape[1], shape[0])
        scale = (scale if linear.block else scale[:, 0]) / np.float32(np.sqrt(shape[0]))
        self.rows[name] = Rows(0, rounded, scale)
        self.values[name] = np.ascontiguousarray(rounded.T)
        self.values[f"{name}.scale"] = np.ascontiguousarray(scale.T)

    def constants(self) -> dict[str, Array]:
        """What the weights file holds besides the parameters, and what is derived of it on load."""
        made = {
            n: np.ascontiguousarray(x.convert(self.rows[x.source])).reshape(x.shape) for n, x in self.layouts.items()
        }
        derive_int8(made, derived_parameters(graphs.weight_names(self.lowered)), keep=set(made))
        return made

    def run(self, lowered: bool, feeds: dict[str, Array]) -> dict[str, Array]:
        model = (self.lowered if lowered else self.canonical).clone()
        given = self.values | (self.constants() if lowered else {})
        for name in graphs.weight_names(model):
            value = model.graph.initializers[name]
            value.const_value = ir.tensor(given[name], dtype=value.dtype, name=name)
        data = ir.to_proto(model).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if not lowered:  # the reference is the graph as it is written
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_inputs()]
        result = dict(
            zip([p.name for p in session.get_outputs()], session.run(None, {n: feeds[n] for n in names}), strict=True)
        )
        if lowered and (out := os.environ.get("TROL_EDGE_LOWERED_OUT")):
            _leave(Path(out), data, {n: feeds[n] for n in names}, result)
        return result

    def feeds(self, length: int, start: int, offset: int = 0) -> dict[str, Array]:
        """Make inputs of `length` tokens after `start` cached ones."""
        out: dict[str, Array] = {
            "inputs_embeds": self.rng.standard_normal((1, length, self.spec.hidden_size), dtype=np.float32),
            "position_ids": np.arange(start, start + length)[None],
            "slots": np.arange(start + length),
            "image_mask": (np.arange(length) % 3 > 0).astype(np.float32)[None, :, None],
            "rope_offset": np.array([offset]),
        }
        for value in self.canonical.graph.inputs:
            if value.name and value.name.startswith("past_"):
                assert value.shape is not None
                cache = self.rng.standard_normal(tuple(int(d) for d in value.shape), dtype=np.float32)  # type: ignore[arg-type]
                out[value.name] = cache
        return out

    def difference(self, length: int, start: int, offset: int = 0) -> float:
        """Largest difference of logits and of the caches' filled rows, relative to the largest value of each."""
        feeds = self.feeds(length, start, offset)
        expected, found = self.run(False, feeds), self.run(True, feeds)
        assert set(expected) == set(found)
        worst = 0.0
        for name, array in expected.items():
            cut = (slice(None),) * 2 + ((slice(start + length),) if name != "logits" else ())
            a, b = array[cut], found[name][cut]
            worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
        return worst


def _leave(folder: Path, data: bytes, feeds: dict[str, Array], result: dict[str, Array]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = len(list(folder.glob("*.onnx")))
    (folder / f"{count}.onnx").write_bytes(data)
    arrays = {f"in.{n}": a for n, a in feeds.items()} | {f"out.{n}": a for n, a in result.items()}
    np.savez(folder / f"{count}.npz", **arrays)
    (folder / "made_by.json").write_text(json.dumps({"onnxruntime": onnxruntime.__version__}))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("internlm2", "traverse"),
        ("phi3", "step"),
        *slow(("internlm2", "step"), ("phi3", "traverse")),
    ],
)
def test_group_query_attention_equals_the_standard_operators(name: str, family: str) -> None:
    """In FP32, from an empty cache, after a prefix, and for one token; with both sets of rope factors."""
    chosen, spec = (internlm2.FAMILY, SPEC) if family == "internlm2" else (phi3.FAMILY, PHI3)
    case = Case(name, chosen, spec, None)
    assert case.layouts == {}
    assert operators(case.lowered)["GroupQueryAttention"] == 2 * (1 if name == "step" else 2)
    assert not {"Attention", "RotaryEmbedding", "ScatterND", "Slice"} & set(operators(case.lowered)) - {"Slice"}
    for length, start in [(1, 0), (1, 17)] + [(11, 0), (9, 12)] * (name != "step"):
        for offset in (0, 24) if spec.long_rope else (0,):
            assert case.difference(length, start, offset) < 1e-5


def test_heads_that_the_operator_cannot_rotate_stay_as_they_are() -> None:
    spec = ModelSpec("internlm2", 32, 48, 1, 4, 2, 8, 96, 97, 1e-5, 1e4, 64, 0, 2, 96, VISION)
    model = graphs.trace("step", internlm2.FAMILY, spec, CAPACITY)
    before = operators(model)
    assert not lower_ort.group_query_attention(model)
    assert operators(model) == before and before["Attention"] == 1


@pytest.mark.parametrize(("name", "operator"), [("traverse", "MatMulIntegerToFloat"), ("step", "MatMulInteger")])
def test_w8a8_computes_the_same_numbers(name: str, operator: str) -> None:
    """u8 with zero point 128 for s8 with zero point 0: equal but for the order of float additions.

    It uses one layer, because after that a difference in the last bit may round to the neighbouring integer.
    """
    case = Case(name, internlm2.FAMILY, _one_layer(SPEC), LinearPlan("int8", activations=True))
    assert operators(case.lowered)[operator] == sum(
        node.op_type == "MatMul" and node.inputs[1].producer() is not None  # type: ignore[union-attr]
        for node in case.canonical.graph
    )
    # q, k and v are one Linear here, gate and up share their input, and so do a weight and its low-rank part.
    assert operators(case.lowered)["QuantizeLinear"] == operators(case.canonical)["QuantizeLinear"]
    assert case.difference(1, 9) < 5e-3


def test_w8a8_of_one_matmul_is_exact() -> None:
    """The integers are the same; only float32 rounding of the product of the scales differs."""
    for name in ("vision", "step"):
        model, values, rows = _one_matmul(LinearPlan("int8", activations=True))
        lowered = model.clone()
        layouts = lower_ort.lower(name, lowered)
        x = np.random.default_rng(1).standard_normal((1, 1, 64), dtype=np.float32) * 3  # some saturate
        more = {n: layout.convert(rows) for n, layout in layouts.items()}
        (expected,), (found,) = _run(model, values, x), _run(lowered, values | more, x)
        assert np.abs(expected - found).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("treatment", [LinearPlan("int8"), LinearPlan("int4", 32), LinearPlan("int4", 64)])
@pytest.mark.parametrize("name", ["vision", "step"])
def test_weights_alone_stay_close(name: str, treatment: LinearPlan) -> None:
    """Inputs are rounded token by token to 8 bits, 4-bit weights of a traverse become 8-bit ones: an error near 1 %."""
    model, values, rows = _one_matmul(treatment)
    lowered = model.clone()
    layouts = lower_ort.lower(name, lowered)
    made = {n: np.ascontiguousarray(x.convert(rows)).reshape(x.shape) for n, x in layouts.items()}
    derive_int8(made, derived_parameters(graphs.weight_names(lowered)), keep=set(made))
    rng = np.random.default_rng(1)
    for scale in (1.0, 1e-3, 0.0):  # tokens of any size, and none at all
        x = rng.standard_normal((1, 1, 64), dtype=np.float32) * np.float32(scale)
        (expected,), (found,) = _run(model, values, x), _run(lowered, values | made, x)
        assert np.isfinite(found).all()
        assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected) + 1e-12
    operator = {8: "MatMulInteger", 4: "MatMulNBits"}[8 if treatment.precision == "int8" else 4]
    assert operators(lowered)[operator if name == "step" else "MatMulIntegerToFloat"] == 1


def test_a_tokens_numbers_do_not_depend_on_its_neighbours() -> None:
    """Else a prompt in chunks would not be the prompt at once."""
    model, values, rows = _one_matmul(LinearPlan("int4", 32))
    layouts = lower_ort.lower("traverse", model)
    made = {n: np.ascontiguousarray(x.convert(rows)).reshape(x.shape) for n, x in layouts.items()}
    derive_int8(made, derived_parameters(graphs.weight_names(model)))
    x = np.random.default_rng(1).standard_normal((1, 7, 64), dtype=np.float32)
    x[0, 3] *= 1000
    (together,) = _run(model, values | made, x)
    for i in range(7):
        np.testing.assert_array_equal(_run(model, values | made, x[:, i : i + 1])[0][0, 0], together[0, i])


@pytest.mark.parametrize("block", [32, 64, 128])
def test_int8_from_nbits(block: int) -> None:
    rng = np.random.default_rng(3)
    k, n = 256, 600  # more than one part
    values = rng.integers(-8, 8, (n, k), dtype=np.int8)
    values[5] = 0
    scale = rng.random((n, k // block), dtype=np.float32)
    scale[6] = 0
    layouts = lower_ort.nbits_layouts("w", k, n, block)
    rows = Rows(0, values, scale)
    arrays = {name: layout.convert(rows).reshape(layout.shape) for name, layout in layouts.items()}
    real = (values.reshape(n, -1, block) * scale[..., None]).reshape(n, k)
    made, step = int8_from_nbits(arrays["w" + NBITS], arrays["w" + NBITS_SCALE])
    assert (made.shape, made.dtype, step.shape) == ((k, n), np.int8, (n,))
    error = np.abs(made.T * step[:, None] - real)
    assert (error <= step[:, None] * 0.5001).all() and not made[:, 5:7].any() and np.isfinite(step).all()
    derive_int8(arrays, ["w"])
    assert set(arrays) == {"w" + INT8, "w" + INT8_SCALE}


def test_what_has_no_operator_is_refused() -> None:
    model, _, _ = _one_matmul(LinearPlan("int8", activations=True))
    model.graph.initializers["w"].type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    with pytest.raises(ExportError, match=r"w: FLOAT8E4M3FN .* no operator"):
        lower_ort.lower("traverse", model)
    with pytest.raises(ExportError, match="comes from Add, not from"):
        case = Case("step", internlm2.FAMILY, _one_layer(SPEC), None)
        model = case.canonical
        rotary = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
        added = ir.node("Add", [rotary.outputs[0], rotary.outputs[0]])
        (user, index), *_ = rotary.outputs[0].uses()
        model.graph.insert_before(user, added)
        user.replace_input_with(index, added.outputs[0])
        lower_ort.group_query_attention(model)


def test_nothing_to_do_is_said() -> None:
    x, y = (ir.Value(name=n, shape=ir.Shape((1, 2)), type=ir.TensorType(ir.DataType.FLOAT)) for n in "xy")
    node = ir.node("Relu", [x], outputs=[y])
    model = ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 23}), ir_version=11)
    layouts: dict[str, Layout] = {}
    assert not lower_ort.group_query_attention(model)
    assert not lower_ort.integer_matmul(model, layouts)
    assert not lower_ort.one_token_matmul(model, layouts)
    assert not lower_ort.nbits_matmul(model, layouts)
    assert list(model.graph) == [node] and model.opset_imports == {"": 23} and not layouts


def _one_layer(spec: ModelSpec) -> ModelSpec:
    import dataclasses

    return dataclasses.replace(spec, num_layers=1)


def _one_matmul(treatment: LinearPlan, k: int = 64, n: int = 48) -> tuple[ir.Model, dict[str, Array], Rows]:
    """MatMul(x, w) as `qdq.insert` quantizes it, its weights, and the same as rows."""
    f = ir.TensorType(ir.DataType.FLOAT)
    x, y = (ir.Value(name=m, shape=ir.Shape((1, "S", d)), type=f) for m, d in (("x", k), ("y", n)))
    w = ir.Value(name="w", shape=ir.Shape((k, n)), type=f)
    node = ir.node("MatMul", [x, w], outputs=[y])
    model = ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 23}), ir_version=11)
    model.graph.initializers["w"] = w
    qdq.insert(model, PrecisionPlan("mixed", "fp32", {"w": treatment}), {"w": 0.05})
    rng = np.random.default_rng(2)
    top = 7 if treatment.precision == "int4" else 127
    values = rng.integers(-top, top + 1, (n, k), dtype=np.int8)
    shape = (n, k // treatment.block) if treatment.block else (n,)
    scale = (0.5 + rng.random(shape, dtype=np.float32)) / top
    arrays = {"w": np.ascontiguousarray(values.T), "w.scale": np.ascontiguousarray(scale.T)}
    return model, arrays, Rows(0, values, scale)


def _run(model: ir.Model, values: dict[str, Array], x: Array) -> list[Array]:
    model = model.clone()
    for name in graphs.weight_names(model):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(values[name], dtype=value.dtype, name=name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    result: list[Array] = session.run(None, {"x": x})
    lowered = any(node.domain == lower_ort.MICROSOFT for node in model.graph)
    if lowered and (out := os.environ.get("TROL_EDGE_LOWERED_OUT")):
        _leave(Path(out), data, {"x": x}, {"y": result[0]})
    return result
