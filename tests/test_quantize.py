"""Quantizers against brute force, foldings that change nothing, scales that are never zero, and weights on disk."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from tests.conftest import NANO
from tests.golden import GOLDEN
from tests.statistics import statistics_of
from trol_edge.bundle.precision import LinearPlan, PrecisionPlan
from trol_edge.calibration.outliers import make_outliers
from trol_edge.errors import CalibrationError
from trol_edge.export.quantize import folding, scales
from trol_edge.export.quantize import rounding as quantize
from trol_edge.export.quantize.folding import Folding, Group, groups
from trol_edge.export.quantize.recipes import GATE, RecipeOptions, is_linear, make_plan
from trol_edge.export.quantize.stats import Statistics
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.model import EagerAttention, rope_tables
from trol_edge.export.storage import Layout, Rows, write

INT8, INT4, FP8 = LinearPlan("int8"), LinearPlan("int4", 32), LinearPlan("fp8")


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers with some large ones among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.02, 5 * x, x)


def plain(x: float, scale: float, low: int, high: int) -> int:
    """One number, rounded half to even and clamped, in Python."""
    return max(low, min(high, round(x / scale)))


# -- quantizers --------------------------------------------------------------------------------------------------------


def test_int8_equals_plain_python() -> None:
    """Per channel, largest |weight| to 127, every number by itself."""
    w = weights(5, 12)
    stored, scale = quantize.quantize(w, INT8, clipping=False)
    for row, s, values in zip(w.tolist(), scale.tolist(), stored.tolist(), strict=True):
        assert math.isclose(s, max(map(abs, row)) / 127, rel_tol=1e-6)
        assert values == [plain(x, s, -127, 127) for x in row]


def test_int4_equals_plain_python() -> None:
    """In blocks: each 32 inputs of a channel have their own scale."""
    w = weights(3, 96)
    stored, scale = quantize.quantize(w, INT4, clipping=False)
    assert scale.shape == (3, 3)
    for i in range(3):
        for b in range(3):
            block = w[i, 32 * b : 32 * b + 32].tolist()
            s = float(scale[i, b])
            assert math.isclose(s, max(map(abs, block)) / 7, rel_tol=1e-6)
            assert stored[i, 32 * b : 32 * b + 32].tolist() == [plain(x, s, -8, 7) for x in block]


@pytest.mark.parametrize("plan", [INT8, INT4])
def test_clipping_takes_the_best_share(plan: LinearPlan) -> None:
    """The share with the least error, weighed by importance, wins; this test tries them one by one."""
    w, importance = weights(4, 64, seed=1), torch.rand(64, generator=torch.Generator().manual_seed(2)) ** 4
    stored, scale = quantize.quantize(w, plan, importance)
    block = plan.block or 64
    low, high, levels = (-127, 127, 127) if plan is INT8 else (-8, 7, 7)
    for i in range(4):
        for b in range(64 // block):
            at = slice(block * b, block * (b + 1))
            numbers, counts = w[i, at].tolist(), importance[at].tolist()

            def error(s: float, numbers: list[float] = numbers, counts: list[float] = counts) -> float:
                return sum(c * (plain(x, s, low, high) * s - x) ** 2 for x, c in zip(numbers, counts, strict=True))

            best = min(error(max(map(abs, numbers)) * share / levels) for share in quantize.CLIPS[plan.precision])
            chosen = float(scale.view(4, -1)[i, b])
            assert error(chosen) <= best * (1 + 1e-4)
    exact = quantize.restore(*quantize.quantize(w, plan, importance, clipping=False))
    clipped = quantize.restore(stored, scale)
    assert ((clipped - w) ** 2 * importance).sum() <= ((exact - w) ** 2 * importance).sum() * (1 + 1e-6)


def test_fp8_takes_the_nearest_value() -> None:
    """Against the list of all 253 finite values of E4M3, built from its definition."""
    values = {0.0}
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):  # NaN
                size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
                values |= {size, -size}
    assert len(values) == 253 and max(values) == quantize.FP8_MAX
    table = np.array(sorted(values))
    w = weights(4, 40, seed=3)
    stored, scale = quantize.quantize(w, FP8)
    for row, s, found in zip(w.numpy(), scale.numpy(), stored.numpy(), strict=True):
        nearest = np.abs((row / s)[:, None] - table).min(1)
        assert np.isin(found, table).all()
        assert np.allclose(np.abs(row / s - found), nearest, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("plan", [INT8, INT4, FP8])
@pytest.mark.parametrize("half", [False, True])
def test_scales_are_never_zero_or_infinite(plan: LinearPlan, half: bool) -> None:
    """Channels of zeros, of subnormal numbers, of one number, of FP16's largest."""
    rows = [
        torch.zeros(64),
        torch.full((64,), 1e-30),
        torch.full((64,), -3.0),
        torch.full((64,), 65504.0),
        torch.eye(64)[5] * 2,
    ]
    w = torch.stack(rows)
    stored, scale = quantize.quantize(w, plan, torch.zeros(64), half=half)
    assert bool((scale > 0).all()) and bool(scale.isfinite().all()) and bool(stored.isfinite().all())
    if half:
        assert torch.equal(scale.half().float(), scale)
    restored = quantize.restore(stored, scale)
    assert torch.equal(restored[:2], torch.zeros(2, 64))
    assert torch.allclose(restored[2:], w[2:], rtol=0.07 if plan is INT4 else 0.04, atol=1e-6)


def test_int4_bytes_are_onnx_order(tmp_path: Path) -> None:
    """ONNX Runtime reads the packed bytes as meant: blocks along the inputs, the first value in the low half."""
    w = weights(6, 64, seed=4)
    stored, scale = quantize.quantize(w, INT4)
    packed = quantize.pack_int4(stored.to(torch.int8).t().contiguous())
    assert packed.shape == (64, 3)
    constants = [
        helper.make_tensor("w", TensorProto.INT4, (64, 6), packed.numpy().tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, (2, 6), scale.t().contiguous().numpy().tobytes(), raw=True),
    ]
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=0, block_size=32)
    graph = helper.make_graph(
        [node], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, (64, 6))], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {})
    assert np.array_equal(found, quantize.restore(stored, scale).t().numpy())


def test_layouts_do_not_depend_on_the_blocks(tmp_path: Path) -> None:
    """Rows streamed one, two or all at a time make the same file; every tensor is where the header says."""
    table = np.arange(48, dtype=np.int8).reshape(8, 6)
    layouts = {
        "turned": Layout("a", "I8", (6, 8), 8, lambda rows: rows.values.T, rows_axis=1),
        "straight": Layout("a", "I8", (8, 6), 8, lambda rows: rows.values),
        "halved": Layout("a", "U8", (6, 4), 8, lambda rows: rows.values.T[:, ::2].astype(np.uint8), rows_axis=1),
        "blocks": Layout("a", "I8", (8, 2, 3), 8, lambda rows: rows.values.reshape(-1, 2, 3)),
        "scale": Layout("a", "F32", (8,), 8, lambda rows: rows.values[:, 0].astype(np.float32)),
    }
    files = []
    for step in (2, 4, 8):
        path = tmp_path / f"{step}.safetensors"

        def read(name: str, step: int = step) -> Any:
            return (Rows(i, table[i : i + step]) for i in range(0, 8, step))

        write(path, layouts, read, lambda *_: None)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]
    from safetensors.numpy import load_file

    found = load_file(tmp_path / "2.safetensors")
    assert np.array_equal(found["turned"], table.T) and np.array_equal(found["straight"], table)
    assert np.array_equal(found["halved"], table.T[:, ::2])
    assert np.array_equal(found["blocks"].reshape(8, 6), table)
    assert np.array_equal(found["scale"], table[:, 0])


# -- foldings ----------------------------------------------------------------------------------------------------------


def logits(source: Checkpoint, change: Folding | None) -> torch.Tensor:
    """Outputs of a prompt (with an image if the family has LoRA), both passes and a step, then vision features."""
    modules = {"decoder": source.family.decoder(source.spec), "vision": source.family.vision(source.spec)}
    for prefix, module in modules.items():
        state = {}
        for key in module.state_dict():
            name = f"{prefix}.{key}"
            blocks = [(change.apply(name, b, i) if change else b.float()) for i, b in source.blocks(name)]
            state[key] = torch.cat(blocks).double()
        module.double().load_state_dict(state)
    decoder, vision = modules["decoder"], modules["vision"]
    spec = source.spec
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, spec.hidden_size, generator=generator).double()
    mask = (torch.arange(9) % 3 > 0).double()[None, :, None] if spec.lora_rank else None
    cos, sin = (t.double() for t in rope_tables(spec.head_dim, spec.rope_theta, 16))
    attend = EagerAttention(spec, cos, sin)
    attend.positions = torch.arange(9)
    with torch.no_grad():
        out = decoder.logits(decoder.traverse(x, mask, attend))  # type: ignore[operator]
        attend.positions = torch.arange(9, 10)
        out = torch.cat((out, decoder.logits(decoder.step(x[:, :1], attend))), 1)  # type: ignore[operator]
        pixels = torch.randn(1, 3, spec.vision.image_size, spec.vision.image_size, generator=generator).double()
        features = vision(pixels)
    return torch.cat((out.flatten(), features.flatten()))


CASES = ["internlm2-gqa-image", "internlm2-text", "phi3-text", "phi3-tile1"]


@pytest.mark.parametrize("case", CASES)
def test_every_folding_preserves_the_function(case: str) -> None:
    """Random scales of 1/50 to 50 on every group at once: logits of both passes and of a step, and image features."""
    source = Checkpoint(GOLDEN / case)
    shapes = {name: source.shape(name) for name in source.names()}
    change = Folding(shapes)
    generator = torch.Generator().manual_seed(1)
    found = groups(source.spec, shapes)
    for group in found:
        change.add(group, 50 ** (2 * torch.rand(group.width, generator=generator) - 1))
    kinds = {group.name.split(".")[-1] for group in found}
    assert {"attention_norm", "values", "mlp_norm", "product", "norm", "norm1", "norm2"} <= kinds
    before, after = logits(source, None), logits(source, change)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    # And it is no test of nothing: without one reader's columns the answer is another.
    del change.columns[found[0].readers[0]]
    assert float((logits(source, change) - before).abs().max() / before.abs().max()) > 1e-3


def test_foldings_cover_every_linear_that_can_be() -> None:
    """All readers of decoder and tower, except those after an activation that is not linear."""
    source = Checkpoint(NANO)
    shapes = {name: source.shape(name) for name in source.names()}
    read = {name for group in groups(source.spec, shapes) for name in group.readers}
    linears = {name for name in make_plan(RecipeOptions(), shapes, "cpu").linears if not name.endswith(".lora_b")}
    assert {name.split(".")[-2] for name in linears - read} == {"fc2", "proj1", "proj2"}
    assert read <= linears


def test_grouped_heads_share_a_scale() -> None:
    """The columns of `out` that belong to one value channel are multiplied by one number."""
    group = Group("g", (), (), width=4, head=2, repeat=3)
    columns = group.columns(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert columns.tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert group.channels(torch.arange(12.0)).tolist() == [4, 5, 10, 11]


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    """Statistics of trol-nano on a few random rows, which are enough to drive the search."""
    return statistics_of(Checkpoint(NANO))


def test_the_search_lowers_the_error(statistics: Statistics) -> None:
    """Outliers in one channel of a norm: scaled, the output of its readers is many times nearer."""
    source = Checkpoint(NANO)
    shapes = {name: source.shape(name) for name in source.names()}
    name = "decoder.layers.1.qkv"
    point = statistics.points[name]
    grown = np.ones(len(point.absmax), np.float32)
    grown[7] = 80
    loud = dataclasses.replace(
        point,
        absmax=point.absmax * grown,
        mean_abs=point.mean_abs * grown,
        mean_square=point.mean_square * grown**2,
        rows=point.rows * grown,
    )
    seen = Statistics({**statistics.points, name: loud}, statistics.peaks, statistics.state)
    errors = {}
    for scaling in (False, True):
        only = {f"{name}.weight": LinearPlan("int8", activations=True)}
        plan = make_plan(RecipeOptions("int8", scaling=scaling, observer="minmax"), shapes, "cpu")
        plan = dataclasses.replace(plan, linears=only)
        found = scales.find_scales(source, plan, seen, None, lambda *_: None)
        errors[scaling] = found.errors[f"{name}.weight"]
        assert (f"{name}.weight" in found.folding) == scaling
    assert errors[True] < errors[False] / 10


def test_linears_that_share_an_input_share_its_scale(statistics: Statistics) -> None:
    """gate and up, and their low-rank parts, read one tensor; so do q, k and v of the tower."""
    source = Checkpoint(NANO)
    plan = make_plan(RecipeOptions("int8", observer="minmax"), {n: source.shape(n) for n in source.names()}, "cpu")
    found = scales.find_scales(source, plan, statistics, None, lambda *_: None)
    assert set(found.inputs) == {n for n, linear in plan.linears.items() if linear.activations}
    assert all(math.isfinite(s) and s > 0 for s in found.inputs.values())
    mlp = "decoder.layers.0.mlp"
    names = [f"{mlp}.{p}.{part}" for p in ("gate", "up") for part in ("weight", "lora_a")]
    assert len({found.inputs[name] for name in names}) == 1
    assert len({found.inputs[f"vision.layers.0.{p}.weight"] for p in "qkv"}) == 1


def test_sensitive_linears_get_more_bits(statistics: Statistics) -> None:
    """int4: what loses more than the limit is int8, and then loses less; without a limit nothing changes."""
    source = Checkpoint(NANO)
    shapes = {n: source.shape(n) for n in source.names()}
    plan = make_plan(RecipeOptions("int4", scaling=False, clipping=False), shapes, "cpu")
    free = scales.find_scales(source, plan, statistics, None, lambda *_: None)
    assert free.plan.linears == plan.linears
    blocked = {n: e for n, e in free.errors.items() if plan.linears[n].precision == "int4"}
    limit = float(np.median(list(blocked.values())))
    found = scales.find_scales(source, plan, statistics, limit, lambda *_: None)
    raised = {n for n, linear in found.plan.linears.items() if linear != plan.linears[n]}
    assert raised == {n for n, e in blocked.items() if e > limit} and 0 < len(raised) < len(blocked)
    assert all(found.plan.linears[n] == LinearPlan("int8") and found.errors[n] < blocked[n] for n in raised)


@pytest.mark.slow
def test_odd_activations_give_usable_scales(statistics: Statistics) -> None:
    """A point that was zero throughout, and one number in one channel: every scale stays finite and above zero."""
    source = Checkpoint(NANO)
    points = dict(statistics.points)
    for name, number in (("decoder.layers.0.mlp.down", 0.0), ("decoder.layers.1.mlp.down", 2.5)):
        point = statistics.points[name]
        x = np.zeros_like(point.absmax)
        x[3] = number
        points[name] = dataclasses.replace(
            point, absmax=x, mean_abs=x, mean_square=x**2, rows=np.broadcast_to(x, point.rows.shape).copy(),
            histogram=np.zeros_like(point.histogram), histogram_max=float(x.max()),
        )  # fmt: skip
    seen = Statistics(points, statistics.peaks, statistics.state)
    for recipe in ("int8", "int4"):
        plan = make_plan(RecipeOptions(recipe), {n: source.shape(n) for n in source.names()}, "cpu")
        found = scales.find_scales(source, plan, seen, 0.02, lambda *_: None)
        factors = [*found.folding.columns.values(), *found.folding.rows.values()]
        assert all(bool((t > 0).all()) and bool(t.isfinite().all()) for t in factors)
        assert all(math.isfinite(s) and s > 0 for s in found.inputs.values())


def test_bad_statistics_are_refused(statistics: Statistics) -> None:
    """NaN in a point, and a point that is missing."""
    source = Checkpoint(NANO)
    plan = make_plan(RecipeOptions("int8"), {n: source.shape(n) for n in source.names()}, "cpu")
    name = "decoder.layers.0.qkv"
    point = statistics.points[name]
    nan = dataclasses.replace(point, absmax=np.full_like(point.absmax, np.nan))
    seen = Statistics({**statistics.points, name: nan}, statistics.peaks, statistics.state)
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        scales.find_scales(source, plan, seen, None, lambda *_: None)
    fewer = {key: value for key, value in statistics.points.items() if key != name}
    with pytest.raises(CalibrationError, match=r"nothing about the input of decoder\.layers\.0\.qkv"):
        scales.find_scales(source, plan, Statistics(fewer, statistics.peaks, statistics.state), None, lambda *_: None)


def test_weights_of_norms_tell_how_to_rescale(tmp_path: Path) -> None:
    """Outlier channels that cancel are taken out: what is stored is what the checkpoint without them gives."""
    outliers = tmp_path / "outliers"
    make_outliers(NANO, outliers, factor=64)
    plan = PrecisionPlan("int8-dynamic", "fp32", {}, scaling=True)
    sources = Checkpoint(NANO), Checkpoint(outliers)
    names = [name for name in sources[0].names() if is_linear(name, sources[0].shape(name)) and name != GATE]
    plan = dataclasses.replace(plan, linears=dict.fromkeys(names, LinearPlan("int8")))
    found = [scales.scales_of_norms(source, plan, lambda *_: None).folding for source in sources]
    changed = 0
    for name in names:
        plain, outlying = (f.apply(name, s.tensor(name), 0) for f, s in zip(found, sources, strict=True))
        factor = (outlying / plain)[plain != 0].median()
        torch.testing.assert_close(outlying, plain * factor, rtol=1e-4, atol=1e-6)
        changed += not torch.equal(sources[0].tensor(name), sources[1].tensor(name))
    assert changed > 10


def test_every_group_has_a_reader_and_a_maker() -> None:
    """Whatever the family."""
    for case in [NANO, *(GOLDEN / c for c in CASES)]:
        source = Checkpoint(case)
        found = folding.groups(source.spec, source.names())
        assert all(group.readers and group.makers for group in found)
        assert len({name for g in found for name in g.readers}) == sum(len(g.readers) for g in found)
