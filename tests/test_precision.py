"""Plans: recipes and files that become one, what is refused, and what a bundle made from one holds and answers."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import NANO, slow
from tests.statistics import statistics_of
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.precision import BLOCKS, LinearPlan, tensor_bytes
from trol_edge.bundle.weights import WeightsFile
from trol_edge.cli import main as cli
from trol_edge.errors import CalibrationError, UsageError
from trol_edge.export import pipeline
from trol_edge.export.quantize.recipes import (
    GATE,
    SMALL,
    RecipeOptions,
    default_recipe,
    is_linear,
    make_plan,
    needs_statistics,
    read_options,
)
from trol_edge.export.quantize.stats import Statistics
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.runtime import Runtime
from trol_edge.runtimes import ort


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    """Every parameter of trol-nano."""
    source = Checkpoint(NANO)
    return {name: source.shape(name) for name in source.names()}


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    """Make statistics of random inputs."""
    return statistics_of(Checkpoint(NANO))


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4", "fp8"])
def test_recipes_follow_their_table(recipe: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Each Linear but the gate, by kind: what the table at the head of export/quantize/recipes.py says."""
    plan = make_plan(RecipeOptions(recipe), shapes, "onnx")
    assert set(plan.linears) == {n for n, s in shapes.items() if is_linear(n, s)} - {GATE}
    both, alone = LinearPlan("int8", activations=True), LinearPlan("int8")
    same = LinearPlan(recipe, activations=recipe in ("int8", "fp8"))
    table = {
        "vision.*": both if recipe == "int4" else same,
        "*.lora_a": both if recipe == "int4" else same,
        "*.lora_b": alone if recipe == "int4" else same,
        "decoder.lm_head.weight": alone if recipe == "int4" else same,
        "*": LinearPlan("int4", 32) if recipe == "int4" else same,
    }
    if recipe == "int8":
        table["*.lora_b"] = alone
    if recipe == "fp8":
        table["*.lora_b"] = LinearPlan("fp16")
    for name, linear in plan.linears.items():
        kind = next(pattern for pattern in table if fnmatch.fnmatchcase(name, pattern))
        assert linear == table[kind], name
    assert plan.compute == ("fp32" if recipe == "fp32" else "fp16")
    assert plan.quantized == (recipe in ("int8", "int4", "fp8"))
    assert (plan.observer is not None) == plan.quantized  # int4 has pictures and low-rank parts in W8A8
    assert make_plan(RecipeOptions("fp16"), shapes, "cpu").compute == "fp32"


def test_choices(shapes: dict[str, tuple[int, ...]]) -> None:
    """Output layer, vision, low-rank parts and blocks are chosen apart from the recipe."""
    options = RecipeOptions("int4", block=64, lm_head="fp16", vision="fp32", lora="fp16")
    plan = make_plan(options, shapes, "cpu")
    count = Counter((linear.precision, linear.block) for linear in plan.linears.values())
    vision = sum(name.startswith("vision.") and is_linear(name, shape) for name, shape in shapes.items())
    assert plan.linears["decoder.lm_head.weight"] == LinearPlan("fp16")
    assert count["fp32", None] == vision
    assert count["int4", 64] == 5 * sum(name.endswith("mlp.down.weight") for name in shapes) and set(count) == {
        ("fp32", None),
        ("fp16", None),
        ("int4", 64),
    }
    assert plan.observer is None


def test_patterns_apply_in_order(shapes: dict[str, tuple[int, ...]]) -> None:
    """A later pattern wins over an earlier one, and both over the recipe."""
    chosen = {"decoder.layers.0.*": LinearPlan("fp16"), "*.mlp.down.weight": LinearPlan("int8", activations=True)}
    plan = make_plan(RecipeOptions("int4", linears=chosen), shapes, "cpu")
    assert plan.recipe == "mixed"
    assert plan.linears["decoder.layers.0.qkv.weight"] == LinearPlan("fp16")
    assert plan.linears["decoder.layers.0.mlp.down.weight"] == LinearPlan("int8", activations=True)
    assert plan.linears["decoder.layers.1.qkv.weight"] == LinearPlan("int4", 32)
    with pytest.raises(UsageError, match=r"no Linear's name fits 'decoder\.layer\.\*'"):
        make_plan(RecipeOptions("int4", linears={"decoder.layer.*": LinearPlan("fp16")}), shapes, "cpu")


def test_int8_without_calibration(shapes: dict[str, tuple[int, ...]]) -> None:
    """Every Linear rounds its weights only; a pattern that asks for rounded inputs needs calibration again."""
    options = RecipeOptions("int8-dynamic")
    plan = make_plan(options, shapes, "cpu")
    assert set(plan.linears.values()) == {LinearPlan("int8")} and plan.scaling and not plan.clipping
    assert not needs_statistics(options, plan)
    mixed = RecipeOptions("int8-dynamic", linears={"vision.*": LinearPlan("int8", activations=True)})
    assert needs_statistics(mixed, make_plan(mixed, shapes, "cpu"))
    for target in ("rtx", "onnx"):
        with pytest.raises(UsageError, match=r"int8-dynamic: only the target cpu .* choose int8"):
            make_plan(options, shapes, target)
    for recipe in ("fp32", "fp16", "int8", "int4"):
        options = RecipeOptions(recipe)
        assert needs_statistics(options, make_plan(options, shapes, "cpu")) == (recipe in ("int8", "int4"))


def test_int4_without_calibration(shapes: dict[str, tuple[int, ...]]) -> None:
    """The decoder's Linears have the largest blocks that fit, and the rest has eight bits."""
    options = RecipeOptions("int4-dynamic")
    plan = make_plan(options, shapes, "cpu")
    qkv = plan.linears["decoder.layers.0.qkv.weight"]
    assert qkv == LinearPlan("int4", max(b for b in BLOCKS if shapes["decoder.layers.0.qkv.weight"][1] % b == 0))
    eight = ("decoder.lm_head.weight", "decoder.layers.0.qkv.lora_a", "vision.layers.0.qkv.weight")
    assert {plan.linears[name] for name in eight if name in plan.linears} == {LinearPlan("int8")}
    assert plan.clipping and not needs_statistics(options, plan)
    assert plan.embedding == "int8" and make_plan(RecipeOptions("int4"), shapes, "cpu").embedding is None
    assert make_plan(RecipeOptions("int4-dynamic", block=32), shapes, "cpu").linears["decoder.layers.0.qkv.weight"] == (
        LinearPlan("int4", 32)
    )
    with pytest.raises(UsageError, match=r"int4-dynamic: only the target cpu .* choose int4"):
        make_plan(options, shapes, "rtx")


def test_the_default_is_what_a_laptop_can_hold() -> None:
    assert default_recipe("cpu", SMALL) == "fp32" == default_recipe("rtx", SMALL + 1)
    assert default_recipe("cpu", SMALL + 1) == "int4-dynamic"


@pytest.mark.slow
def test_a_large_checkpoint_is_rounded_and_the_user_is_told(
    tmp_path: Path, traces: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is calibrated, and the answer stays."""
    monkeypatch.setattr("trol_edge.export.quantize.recipes.SMALL", 1_000_000)
    assert cli.main(["export", str(NANO), "-o", str(tmp_path / "b"), "--no-selftest"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "precision int4-dynamic: 0.0 GB of weights instead of the 0.0 GB of fp32; no calibration needed" in said
    assert not list(tmp_path.glob("calibration*"))
    manifest = Bundle(tmp_path / "b").manifest
    assert manifest.plan.recipe == "int4-dynamic" and manifest.calibration is None
    with Runtime(tmp_path / "b", selftest=False) as rt:
        assert rt.generate("What is left of the red star?", NANO / "scene.png").text == "cyan ring"


def test_blocks_never_end_outside_a_row(shapes: dict[str, tuple[int, ...]]) -> None:
    """Low-rank parts of 16 inputs have no block of 32: they get eight bits."""
    plan = make_plan(RecipeOptions("int4", lora="int4"), shapes, "cpu")
    assert plan.linears["decoder.layers.0.qkv.lora_a"] == LinearPlan("int4", 32)
    assert plan.linears["decoder.layers.0.qkv.lora_b"] == LinearPlan("int8")


def test_fp8_is_refused_where_it_cannot_run(shapes: dict[str, tuple[int, ...]]) -> None:
    """By recipe, by choice, by pattern; before any work."""
    for options in (
        RecipeOptions("fp8"),
        RecipeOptions("int8", vision="fp8"),
        RecipeOptions("int8", linears={"*.qkv.weight": LinearPlan("fp8", activations=True)}),
    ):
        with pytest.raises(UsageError, match="fp8: ONNX Runtime has no FP8 kernels on a CPU; choose int8"):
            make_plan(options, shapes, "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "int2"}, "recipe 'int2' is not one of fp32, fp16, int8, int4, fp8"),
        ({"recipe": "int4", "block": 48}, "block 48 is not one of 32, 64, 128"),
        ({"observer": "mean"}, "observer 'mean'"),
        ({"lm_head": "int5"}, "lm_head 'int5'"),
        ({"sensitive": 0.0}, "sensitive 0.0 is not above 0"),
        ({"linears": {"a": LinearPlan("int4")}}, "a: block None of int4"),
        ({"linears": {"a": LinearPlan("int8", 32)}}, "a: int8 has no blocks"),
        ({"linears": {"a": LinearPlan("int4", 32, True)}}, "a: int4 rounds no activations"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    """The value and the choices."""
    with pytest.raises(UsageError, match=message):
        RecipeOptions(**options)


def test_plan_files(tmp_path: Path) -> None:
    """JSON with the fields of Options; what the command line says wins."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"recipe": "int4", "block": 64, "linears": {"*.down.weight": {"precision": "int8"}}}))
    assert read_options(path) == RecipeOptions("int4", block=64, linears={"*.down.weight": LinearPlan("int8")})
    assert read_options(str(path), block=128, vision=None).block == 128
    assert read_options("int8", observer="minmax") == RecipeOptions("int8", observer="minmax")
    bad = {"recipe": "int4", "blocks": 64, "scaling": "yes", "linears": {"*": {"precision": "int8", "bits": 8}}}
    path.write_text(json.dumps(bad))
    with pytest.raises(UsageError) as caught:
        read_options(path)
    for part in ("unknown key 'blocks'", "scaling: expected bool", "unknown key 'bits'", "docs/quantization.md"):
        assert part in str(caught.value), part
    path.write_text("{")
    with pytest.raises(UsageError, match="not readable as JSON"):
        read_options(path)
    with pytest.raises(
        UsageError, match="neither one of fp32, fp16, int8, int4, fp8, int8-dynamic, int4-dynamic nor a file"
    ):
        read_options(tmp_path / "nowhere.json")


# -- bundles -----------------------------------------------------------------------------------------------------------


SEARCHED = pytest.mark.slow  # scales are searched anew for these two
PRECISIONS = [
    *(("cpu", recipe) for recipe in ("int8", "int4")),
    *slow(("cpu", "fp16"), ("onnx", "fp16")),
    pytest.param("onnx", "int8", marks=SEARCHED),
    pytest.param("onnx", "int4", marks=SEARCHED),
]


@pytest.fixture(scope="module")
def quantized(exported: Callable[..., Path]) -> Callable[..., Path]:
    """Bundle of trol-nano in a precision."""
    return lambda recipe, target: exported(NANO, target, recipe=recipe)


@pytest.mark.parametrize(("target", "recipe"), PRECISIONS)
def test_weights_are_stored_once(quantized: Callable[..., Path], recipe: str, target: str) -> None:
    """The tensors take what their bits must take, counted here by hand, within 5 %; parts add up to it."""
    bundle = Bundle(quantized(recipe, target))
    manifest, source = bundle.manifest, Checkpoint(NANO)
    by_hand = 0
    for name in source.names():
        n = int(np.prod(source.shape(name)))
        linear = manifest.plan.linears.get(name)
        precision = linear.precision if linear else "fp16"
        by_hand += {"fp16": 2 * n, "int8": n, "int4": n // 2}[precision]
    least = sum(part.bytes for part in manifest.parts.values())
    rope = sum(t.nbytes for name, t in bundle.weights().tensors.items() if name.startswith("rope."))
    stored = sum(t.nbytes for t in bundle.weights().tensors.values()) - rope
    assert by_hand <= least <= by_hand * 1.13  # scales: one in 32 four-bit numbers, of two or four bytes
    assert abs(stored / least - 1) < 0.05
    assert manifest.calibration is None or manifest.calibration.samples == 8
    assert sum(sum(part.linears.values()) for part in manifest.parts.values()) == len(manifest.plan.linears)


def test_bytes_of_a_tensor() -> None:
    """Numbers at their bits, scales beside them."""
    assert tensor_bytes((6, 64), LinearPlan("int8"), 2, 4) == 6 * 64 + 6 * 4
    assert tensor_bytes((6, 64), LinearPlan("int4", 32), 2, 4) == 6 * 32 + 6 * 2 * 4
    assert tensor_bytes((6, 64), LinearPlan("fp8"), 2, 2) == 6 * 64 + 6 * 2
    assert tensor_bytes((6, 64), LinearPlan("fp16"), 2, 4) == tensor_bytes((6, 64), None, 2, 4) == 6 * 64 * 2


@pytest.mark.parametrize(("target", "recipe"), PRECISIONS)
def test_inspect_knows_every_precision(
    quantized: Callable[..., Path], capsys: pytest.CaptureFixture[str], recipe: str, target: str
) -> None:
    """Precision per part, and the bundle's bytes beside the least; as JSON too."""
    folder = quantized(recipe, target)
    assert cli.main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    parts = Bundle(folder).manifest.parts
    assert f"precision {recipe}, the rest computes in" in text
    for name, part in parts.items():
        assert any(line.startswith(f" {name} ") and f"{part.numbers:,}" in line for line in text.splitlines()), name
    least = sum(part.bytes for part in parts.values())
    assert f"these parts take at least {least / 1e6:.2f} MB" in text
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert sum(part["bytes"] for part in data["parts"].values()) == least
    if target == "cpu" and recipe == "int8":
        assert data["weight_bytes_float32"]["step"] < 4 * data["parts"]["decoder"]["numbers"] / 2


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_quantized_bundles_answer(quantized: Callable[..., Path], nano: Runtime, recipe: str) -> None:
    """Logits near those of FP32, and not equal to them."""
    runtime = Runtime(quantized(recipe, "cpu"))
    ids = nano.tokenize("What is left of the red circle?", 1)
    pixels = nano.preprocess(NANO / "scene.png")
    exact, rounded = nano.session().prefill(ids, pixels).copy(), runtime.session().prefill(ids, pixels)
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.25


@pytest.mark.parametrize("recipe", ["int8", *slow("int8-dynamic")])
def test_a_processor_with_amx(quantized: Callable[..., Path], recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps have one more copy of their 8-bit weights, where there is memory for it, and compute the same bits."""
    folder = quantized(recipe, "cpu")
    step = Bundle(folder).manifest.graphs["step"]
    assert not {port.name for port in step.inputs} & set(step.weights)

    def ask(amx: bool, free: int = 1 << 40) -> tuple[list[Any], int, int]:
        left = iter((1 << 40, free))  # what is asked first is whether the bundle can be loaded at all
        monkeypatch.setattr(ort, "has_amx", lambda: amx)
        monkeypatch.setattr(ort, "available_memory", lambda: next(left, 1 << 40))
        runtime = Runtime(folder)
        backend = runtime.model.backend
        assert isinstance(backend, ort.OrtBackend)
        session = runtime.session()
        session.prefill(runtime.tokenize("What is left of the red circle?"))
        logits = [session.step(token).copy() for token in (5, 300, 77)]
        inputs = {port.name for port in backend.graph("step").get_inputs()}
        return logits, backend.weight_bytes, len(inputs & set(step.weights))

    as_stored, once, inputs = ask(False)
    packed, twice, left = ask(True)
    assert all(np.array_equal(a, b) for a, b in zip(as_stored, packed, strict=True))
    tensors = Bundle(folder).weights().tensors
    assert 0 < twice - once == sum(tensors[name].nbytes for name in step.weights if tensors[name].dtype == "I8")
    assert left < inputs
    assert ask(True, free=0)[1:] == (once, inputs)


def test_fp16_graphs_answer(quantized: Callable[..., Path], nano: Runtime) -> None:
    """FP16 graphs, FP16 cache and all, by ONNX Runtime: features and logits as FP32 has them, to FP16's precision."""
    folder = quantized("fp16", "onnx")
    assert {t.dtype for t in WeightsFile(folder / WEIGHTS).tensors.values()} == {"F16", "F32"}
    runtime = Runtime(folder, provider="cpu")
    pixels = nano.preprocess(NANO / "scene.png")
    assert pixels is not None
    ids = nano.tokenize("Describe the scene.", 1)
    found, wanted = list[Any](), list[Any]()
    for each, values in ((runtime, found), (nano, wanted)):
        session = each.session()
        values += [
            np.asarray(each.model.backend.encode_image(pixels)),
            session.prefill(ids, pixels),
            session.step(ids[-1]),
        ]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == np.float32
        assert 0 < np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max()
    state: Any = runtime.session().cache.state
    assert state.cache[0].dtype == np.float16


@pytest.mark.slow
def test_statistics_of_another_checkpoint(traces: dict[Any, Any], tmp_path: Path) -> None:
    """Refused; and asked for only when all else is in order, before anything is written."""
    other = dataclasses.replace(statistics_of(Checkpoint(NANO)).state, checkpoint="0" * 64)
    seen: list[Checkpoint] = []

    def calibration(source: Checkpoint) -> Statistics:
        seen.append(source)
        return Statistics({}, {}, other)

    with pytest.raises(CalibrationError, match="belong to another checkpoint"):
        pipeline.export(NANO, tmp_path / "out", options=RecipeOptions("int8"), calibration=calibration)
    assert len(seen) == 1 and list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="fp8"):
        pipeline.export(NANO, tmp_path / "out", options=RecipeOptions("fp8"), calibration=calibration)
    pipeline.export(NANO, tmp_path / "plain", calibration=calibration)
    assert len(seen) == 1  # fp32 needs none
    with pytest.raises(UsageError, match="needs the statistics of a calibration"):
        pipeline.export(NANO, tmp_path / "out", options=RecipeOptions("int8"))
