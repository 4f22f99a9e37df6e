"""Traces that are kept between runs: a trace holds no weights, so checkpoints of one architecture share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tests import kept
from tests.conftest import installed
from trol_edge.export.graphs import canonical as graphs

Trace = Callable[[str, Any, Any, int], ir.Model]
# Numbers of a checkpoint that do not reach the graph.
NOT_IN_THE_GRAPH = {
    "rope_theta": 0.0,
    "max_position_embeddings": 0,
    "eos_token_id": 0,
    "image_token_id": 0,
    "embedding_rows": 0,
}


def remember(trace: Trace) -> Trace:
    """A trace that is made once per architecture, for all processes and for later runs with the same sources."""
    versions = installed()
    memo: dict[str, ir.Model] = {}

    def once(name: str, family: Any, spec: Any, capacity: int) -> ir.Model:
        same = dataclasses.replace(spec, **NOT_IN_THE_GRAPH)
        made_by = family.vision if name == "vision" else family.decoder
        key = kept.digest(
            sorted({*kept.sources(graphs.__name__), *kept.sources(made_by.__module__), Path(__file__)}),
            *(versions, name, family.name, made_by.__module__, made_by.__qualname__, same),
            None if name == "vision" else capacity,
        )
        if key not in memo:
            memo[key] = load(
                kept.folder("traces", key, lambda folder: save(trace(name, family, spec, capacity), folder))
            )
        return memo[key].clone()

    return once


def save(model: ir.Model, folder: Path) -> None:
    """As model.onnx in a new folder; a parameter without a value stands there as if it were in a file of its own."""
    folder.mkdir()
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if value.const_value is None:
            assert value.dtype is not None and isinstance(value.shape, ir.Shape) and value.name
            value.const_value = ir.ExternalTensor("none", 0, 0, value.dtype, shape=value.shape, name=value.name)
    ir.save(copy, folder / "model.onnx")


def load(folder: Path) -> ir.Model:
    """What was saved."""
    model = ir.load(folder / "model.onnx")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model
