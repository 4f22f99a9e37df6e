"""Counts of graphs: the polynomials, what a manifest keeps of them, and the walker against counts by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from trol_edge.costs import Cost, Costs, Operation
from trol_edge.errors import UsageError
from trol_edge.spec import from_dict

COSTS = Costs(
    operations=(
        Operation("linear", "float32", "float32", 2, {"tokens": 6}, 12, {"tokens": 20, "1": 4}, {}),
        Operation("attention", "float32", None, 1, {"tokens*slots": 4}, 0, {"tokens": 8}, {"slots": 16, "tokens": 2}),
    ),
    peak=({"tokens": 8}, {"1": 100}),
    defaults={"slots": 10},
)


def test_totals() -> None:
    assert COSTS.at(tokens=5, slots=7) == Cost(2 * 30 + 140, 24, 2 * 104 + 40, 7 * 16 + 10)
    assert COSTS.at(tokens=5).flops == 60 + 4 * 5 * 10, "slots has a default"
    assert COSTS.at(tokens=1, images=3) == COSTS.at(tokens=1), "other graphs' dimensions are ignored"
    assert COSTS.at(tokens=1).bytes == 24 + 2 * 24 + 8 + 162
    assert COSTS.by_kind(tokens=5, slots=7)["linear"] == Cost(60, 24, 208, 0)
    assert (COSTS.peak_bytes(tokens=5), COSTS.peak_bytes(tokens=50)) == (100, 400)


def test_missing_dimension() -> None:
    with pytest.raises(UsageError, match="tokens"):
        COSTS.at(slots=3)


def test_survives_json() -> None:
    read = from_dict(Costs, json.loads(json.dumps(dataclasses.asdict(COSTS))), "costs")
    assert read == COSTS
