"""What the engines of full-width layers move, read in their programs: little more than weights and filled rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import one_layer
from trol_edge.bundle.layer_graphs import ATTENTION, ATTENTION_STEP, ENTER, LEAVE, half_name, layer_of
from trol_edge.bundle.programs import caches_of, shapes_of
from trol_edge.bundle.sizes import cache_bytes, largest_bytes
from trol_edge.errors import UsageError
from trol_edge.export.quantize.recipes import RecipeOptions
from trol_edge.program import text
from trol_edge.program.traffic import WIDENED, Traffic, count
from trol_edge.runtimes.trt.api import load
from trol_edge.runtimes.trt.products import differences, operations, products

MODELS, RECIPES = ("trol-1.8b", "trol-3.8b"), ("fp16", "int8", "int4", "fp8")
MOST = 1.10  # times constants, filled rows and logits
SCRATCH = 32_000_000  # bytes
LAYER_FILE = 1.05  # times the weights of a layer
LAYER_SCRATCH = 60_000_000  # bytes, for at most 512 tokens
LAYER_MOVED = 1.05  # times the weights of a layer and the filled rows
ATTENTION_FILE = 5_000_000  # bytes of both engines of attention, which serve all layers


def library_or_skip() -> Any:
    """TensorRT for RTX, really."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (make test-rtx installs it)")
    return load("tensorrt_rtx")


def traffic(made: one_layer.Graph, engine: Path, filled: int | None = None, **dims: int) -> Traffic:
    """One run of an engine at these sizes of its dynamic dimensions. filled: rows of the cache (default: slots)."""
    dims = {dim: size for dim, size in dims.items() if any(dim in port.shape for port in made.info.inputs)}
    caches = caches_of(made.info, made.context)
    problems = []
    for program in text.read(engine):
        try:
            return count(
                program,
                shapes_of(made.info, dims),
                caches=caches,
                filled=(filled or dims.get("slots")) if caches else None,
                weights=set(made.info.weights) - set(made.info.constants),
            )
        except UsageError as error:  # the other profile
            problems.append(str(error))
    raise AssertionError(problems)


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_moves_what_it_must(model: str, recipe: str, layers: int, tmp_path: Path) -> None:
    """At a few, half and all filled rows; no cache is copied, no weight widened, and scratch is small."""
    library = library_or_skip()
    made = one_layer.graph(model, RecipeOptions(recipe=recipe), "step", tmp_path, layers)
    engine = one_layer.engine(made, library)
    for slots in (256, 1024, made.context):
        found = traffic(made, engine, slots=slots)
        kinds = {a.kind: a.what for a in found.avoidable}
        assert found.ratio <= MOST
        assert not kinds
        assert found.scratch < SCRATCH


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_without_updates_in_place(model: str, recipe: str, tmp_path: Path) -> None:
    """The graphs for TensorRT 10.3 to 10.13, by TensorRT for RTX: filled rows are read once, new ones copied after it.

    The copy reads and writes the new rows. The program does not hold it.
    """
    library = library_or_skip()
    made = one_layer.graph(model, RecipeOptions(recipe=recipe), "step", tmp_path, target="tensorrt")
    engine = one_layer.engine(made, library)
    new = [port for port in made.info.outputs if port.name.startswith("new_")]
    copied = 2 * sum(largest_bytes(port, {}) for port in new)
    assert copied == 4 * cache_bytes(made.info.inputs, made.context) // 2 // made.context
    for slots in (256, 1024, 2048):
        found = traffic(made, engine, slots=slots)
        read = sum(size for each in found.kernels for name, size in each.reads.items() if name.startswith("past_"))
        assert found.cache * 0.99 < read and read + copied <= 1.02 * found.cache
        assert not any(name.startswith(("past_", "present_")) for each in found.kernels for name in each.writes)
        assert found.moved + copied <= MOST * found.ideal
        assert not found.avoidable
        assert found.scratch < SCRATCH


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("target", ["rtx", "tensorrt"])
@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_a_traverse_copies_no_cache(model: str, recipe: str, target: str, tmp_path: Path) -> None:
    """No kernel reads and writes a whole cache; the filled rows are read once, and each weight is widened once.

    Without updates in place (target "tensorrt") no cache is written at all, and new rows are outputs.
    """
    library = library_or_skip()
    made = one_layer.graph(model, RecipeOptions(recipe=recipe), "traverse", tmp_path, target=target)
    engine = one_layer.engine(made, library)
    for tokens, slots in ((32, 1024), (256, 1024), (256, made.context)):
        found = traffic(made, engine, tokens=tokens, slots=slots)
        assert not sum(each.whole_caches for each in found.kernels) or slots == made.context
        read = sum(size for each in found.kernels for name, size in each.reads.items() if "past_" in name)
        written = sum(size for each in found.kernels for name, size in each.writes.items() if "past_" in name)
        if target == "tensorrt":
            assert read <= 1.02 * found.cache and not written
            assert not any("present_" in name for each in found.kernels for name in each.writes)
        widened = Counter(a.what.split(".dequantized")[0] for a in found.avoidable if a.kind == WIDENED)
        assert set(widened.values()) <= {1} and bool(widened) == (recipe == "int4")


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("target", ["rtx", "tensorrt"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_holds_its_weights_once(model: str, recipe: str, target: str, tmp_path: Path) -> None:
    """Engines of a layer for prompts and steps: little more than its weights, and the scratch of activations.

    A step by layer reads the weights and the filled rows once.
    """
    library = library_or_skip()
    folders = {name: tmp_path / name for name in ("traverse", "step")}
    for folder in folders.values():
        folder.mkdir()
    options = RecipeOptions(recipe=recipe)
    whole = one_layer.graph(model, options, "traverse", folders["traverse"], 2, target)
    step = one_layer.graph(model, options, "step", folders["step"], 2, target)
    built = {}
    for name in (half_name(ENTER, 1), half_name(LEAVE, 1), ATTENTION, ATTENTION_STEP):
        made, part = one_layer.part(whole, name, step)
        engine = one_layer.engine(made, library, part)
        built[name] = made, engine.rename(engine.with_name(f"{name}.engine"))
    holding = {name: of for name, of in built.items() if layer_of(name) is not None}
    weights = sum(whole.tensors[weight].nbytes for made, _ in holding.values() for weight in made.info.constants)
    files = sum(engine.stat().st_size for _, engine in holding.values())
    shared = sum(engine.stat().st_size for _, engine in built.values()) - files
    sizes = f"weights {weights / 1e6:.1f} MB, engines {files / 1e6:.1f}, of attention {shared / 1e6:.1f}"
    print(f"{model} {recipe} {target}: {sizes}")
    assert files <= LAYER_FILE * weights and shared < ATTENTION_FILE
    for tokens, filled in ((1, 256), (1, 1000), (1, 2000), (512, made.context)):
        slots = min(made.context, -(-filled // 256) * 256)  # what a step reads
        left_out = ATTENTION if tokens == 1 else ATTENTION_STEP
        dims = {"tokens": min(tokens, 256 if whole.info.gives_rows else 512), "slots": slots}
        runs = [traffic(made, engine, filled, **dims) for name, (made, engine) in built.items() if name != left_out]
        moved, cache = sum(run.moved for run in runs), sum(run.cache for run in runs)
        scratch = max(run.scratch for run in runs)
        print(
            f"  {dims['tokens']} of {filled} moves {moved / 1e6:.1f} ({moved / (weights + cache):.3f}), "
            f"scratch {scratch / 1e6:.1f}"
        )
        assert scratch < LAYER_SCRATCH
        assert not any(avoidable.kind == WIDENED for run in runs for avoidable in run.avoidable)
        if tokens == 1:
            assert moved <= LAYER_MOVED * (weights + cache)


DIMS = {"step": {"slots": 1024}, "traverse": {"tokens": 1024, "slots": 1024}, "vision": {}}


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "fp8"])
@pytest.mark.parametrize("name", list(DIMS))
@pytest.mark.parametrize("model", MODELS)
def test_products_are_those_of_the_plan(model: str, name: str, recipe: str, tmp_path: Path) -> None:
    """Operations by type, of the program and of the plan; qkv is among those of 8 bits."""
    library = library_or_skip()
    made = one_layer.graph(model, RecipeOptions(recipe=recipe), name, tmp_path)
    dims = DIMS[name] or {"images": made.tiles}
    found, asked = products(traffic(made, one_layer.engine(made, library), **dims)), operations(made.info, dims)
    assert differences(asked, found) == []
    assert found[recipe] > 0.8 * sum(asked.values())


def test_products_of_another_type_are_seen() -> None:
    """Half of the 8-bit operations in FP16, and the other way round; what a compiler pads passes."""
    asked = {"int8": 1000, "float16": 100}
    assert differences(asked, asked | {"int8": 1040, "float16": 5000}) == []
    assert differences(asked, {"int8": 500, "float16": 600}) == [
        "int8: 0.000 billion operations asked for, 0.000 found"
    ]
    assert len(differences({"float16": 1100}, {"fp8": 100, "float16": 1000})) == 1
