"""Traced layers that are kept between runs: they hold no weights, so checkpoints of one architecture share them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tests import kept
from tests.conftest import installed
from trol_edge.bundle.spec import LongRope, ModelSpec
from trol_edge.export.graphs import canonical as graphs

Trace = Callable[[str, Any, Any, int], ir.Model]
# Numbers of a checkpoint that do not reach a graph, as they stand in keys.
NEVER: dict[str, Any] = {
    "rope_theta": 0.0,
    "max_position_embeddings": 0,
    "eos_token_id": 0,
    "more_end_ids": (),
    "image_token_id": 0,
    "embedding_rows": 0,
}
NOT_IN_VISION: dict[str, Any] = {
    **dict.fromkeys(("intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"), 0),
    "rms_norm_eps": 0.0,
    "lora_rank": 0,
    "long_rope": None,
}


def remember(trace_one: Trace) -> Trace:
    """A trace that is made once per architecture, for all processes and for later runs with the same sources."""
    versions = installed()
    memo: dict[str, ir.Model] = {}

    def once(name: str, family: Any, one: ModelSpec, capacity: int) -> ir.Model:
        made_by = family.vision if name == "vision" else family.decoder
        key = kept.digest(
            sorted({*kept.sources(graphs.__name__), *kept.sources(made_by.__module__), Path(__file__)}),
            *(versions, name, family.name, made_by.__module__, made_by.__qualname__, reduced(name, one, capacity)),
            capacity,
        )
        if key not in memo:
            memo[key] = load(
                kept.folder("traces", key, lambda folder: save(trace_one(name, family, one, capacity), folder))
            )
        return memo[key]

    return once


def reduced(name: str, spec: ModelSpec, capacity: int) -> ModelSpec:
    """The same without what does not reach the graph; whole checkpoints share a trace so, or the tower's alone."""
    if name == "vision":
        return dataclasses.replace(spec, **NEVER, **NOT_IN_VISION)
    rope = spec.long_rope and LongRope((), (), spec.long_rope.short_rows(capacity), 0.0)
    return dataclasses.replace(spec, **NEVER, vision=None, long_rope=rope)


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
