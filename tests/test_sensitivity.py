"""Mixed precision by measured sensitivity: the costly Linear is found, and raised first."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.conftest import NANO
from trol_edge.bundle.precision import QUANTIZED, LinearPlan
from trol_edge.calibration import samples as sampling
from trol_edge.calibration.run import calibrate
from trol_edge.calibration.sensitivity import RAISED, RoundedModel, fewest, find_plan
from trol_edge.errors import CalibrationError, UsageError
from trol_edge.export.quantize.recipes import RecipeOptions, make_plan, read_options
from trol_edge.export.quantize.scales import find_scales
from trol_edge.export.quantize.stats import Statistics
from trol_edge.export.reference.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def samples() -> sampling.SampleSet:
    return sampling.load(None, 2)


@pytest.fixture(scope="module")
def statistics(samples: sampling.SampleSet, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return calibrate(NANO, samples, tmp_path_factory.mktemp("statistics") / "nano")


INT4 = RecipeOptions(recipe="int4", vision="fp32", lora="fp32", lm_head="fp32", scaling=False, clipping=False)


@pytest.mark.slow
def test_a_plan_keeps_its_limit_with_few_raised(
    statistics: Statistics, samples: sampling.SampleSet, tmp_path: Path
) -> None:
    """Half of what int4 loses is the limit: some Linears are raised, not all, and the costliest first."""
    loose = find_plan(NANO, lambda source: statistics, samples, INT4, 1e9)
    assert not loose.linears and loose.reached and loose.nats == loose.recipe_nats > 0
    found = find_plan(NANO, lambda source: statistics, samples, INT4, loose.nats / 2)
    assert found.reached and found.nats <= loose.nats / 2 and found.sensitivity == loose.sensitivity
    assert 0 < len(found.linears) < len(found.sensitivity) == 40
    order = sorted(found.sensitivity, key=lambda name: -found.sensitivity[name])
    assert set(found.linears) == set(order[: len(found.linears)])
    assert set(found.linears.values()) == {LinearPlan("int8")}
    found.save(tmp_path / "plan.json")
    options = read_options(tmp_path / "plan.json")
    assert options.linears == dict(found.linears) and options.recipe == "int4" and options.sensitive is None
    source = Checkpoint(NANO)
    plan = make_plan(options, {name: source.shape(name) for name in source.names()}, "cpu")
    assert plan.linears[order[0]].precision == "int8" and plan.linears[order[-1]].precision == "int4"
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["linears"]


@pytest.mark.slow
def test_rounding_is_undone(statistics: Statistics, samples: sampling.SampleSet) -> None:
    """One Linear rounded changes the logits; afterwards they are what they were, and folding never changed them."""
    source = Checkpoint(NANO)
    plan = make_plan(RecipeOptions(recipe="int8"), {name: source.shape(name) for name in source.names()}, "cpu")
    scales = find_scales(source, plan, statistics, None, lambda what, done, total: None)
    assert scales.folding.columns
    model = RoundedModel(source, samples, scales)
    plain = RoundedModel(source, samples, dataclasses.replace(scales, folding=type(scales.folding)({})))
    before = model.logits({})
    for name in ("decoder.layers.1.qkv.weight", "vision.layers.0.fc1.weight", "decoder.lm_head.weight"):
        rounded = model.logits({name: plan.linears[name]})
        assert 0 < max(float((a - b).abs().max()) for a, b in zip(before, rounded, strict=True)) < 3
    for a, b, c in zip(before, model.logits({}), plain.logits({}), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-3)


def test_unusable_limits_and_recipes(statistics: Statistics, samples: sampling.SampleSet) -> None:
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="choose a limit above 0"):
            find_plan(NANO, lambda source: statistics, samples, INT4, limit)
    with pytest.raises(UsageError, match="rounds no Linear"):
        find_plan(NANO, lambda source: statistics, samples, RecipeOptions(recipe="fp32"), 0.1)
    stranger = Statistics(
        statistics.points, statistics.peaks, dataclasses.replace(statistics.state, checkpoint="0" * 64)
    )
    with pytest.raises(CalibrationError, match="another checkpoint"):
        find_plan(NANO, lambda source: stranger, samples, INT4, 0.1)


def test_bisection_finds_the_fewest() -> None:
    """Each raised Linear takes its own cost away: as many as needed, no more; and all where that is not enough."""
    costs = {"a": 8.0, "b": 4.0, "c": 2.0, "d": 1.0}
    plans = dict.fromkeys(costs, LinearPlan("int4", 32))

    def loss(linears: object) -> float:
        assert isinstance(linears, dict)
        return sum(cost for name, cost in costs.items() if linears[name].precision == "int4")

    for limit, count in ((14.9, 1), (7.0, 1), (6.9, 2), (3.0, 2), (1.0, 3), (0.5, 4), (0.0, 4)):
        raised, nats = fewest(plans, list(costs), loss, limit)
        assert len(raised) == count and nats <= limit, limit
    raised, nats = fewest(plans, list(costs), lambda linears: 5.0, 1.0)
    assert len(raised) == 4 and nats == 5.0
    assert all(RAISED[p].precision not in ("int4",) for p in QUANTIZED)
