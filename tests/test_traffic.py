"""What the engines of full-width layers move, read in their programs: little more than weights and filled rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import one_layer
from trol_edge.bundle.programs import caches_of, shapes_of
from trol_edge.export.quantize.recipes import RecipeOptions
from trol_edge.program import text
from trol_edge.program.traffic import COPY, Traffic, count
from trol_edge.runtimes.trt.api import load

MODELS, RECIPES = ("trol-1.8b", "trol-3.8b"), ("fp16", "int8", "int4", "fp8")
MOST = 1.10  # times constants, filled rows and logits
SCRATCH = 32_000_000  # bytes


def library_or_skip() -> Any:
    """TensorRT for RTX, really."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (make test-rtx installs it)")
    return load("tensorrt_rtx")


def traffic(made: one_layer.Graph, engine: Path, **dims: int) -> Traffic:
    """One run of an engine at these sizes of its dynamic dimensions."""
    problems = []
    for program in text.read(engine):
        try:
            return count(
                program,
                shapes_of(made.info, dims),
                caches=caches_of(made.info, made.context),
                filled=dims.get("slots"),
            )
        except Exception as error:  # the other profile
            problems.append(str(error))
    raise AssertionError(problems)


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_moves_what_it_must(model: str, recipe: str, tmp_path: Path) -> None:
    """At a few, half and all filled rows; no cache is copied, no weight widened, and scratch is small."""
    library = library_or_skip()
    made = one_layer.graph(model, RecipeOptions(recipe=recipe), "step", tmp_path)
    engine = one_layer.engine(made, library)
    for slots in (256, 1024, made.context):
        found = traffic(made, engine, slots=slots)
        kinds = {a.kind: a.what for a in found.avoidable}
        print(f"{model} {recipe} {slots}: {found.constants=} {found.moved=} {found.ratio:.3f} {found.scratch=} {kinds}")
        assert found.ratio <= MOST
        assert not kinds
        assert found.scratch < SCRATCH
