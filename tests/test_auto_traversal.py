"""`export --traversal auto` takes second passes out by what a calibration measured, within a budget."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import shut_gate
from tests.conftest import NANO
from trol_edge.bundle.folder import digest_of
from trol_edge.bundle.manifest import Bundle
from trol_edge.calibration import samples as sampling
from trol_edge.calibration.run import calibrate
from trol_edge.calibration.sensitivity import find_plan
from trol_edge.calibration.traversal import DEFAULT_NATS, SHARE, budget, choose, most
from trol_edge.cli.main import main
from trol_edge.errors import BundleError, CalibrationError, UsageError
from trol_edge.export.gates import Loss, load
from trol_edge.export.pipeline import export
from trol_edge.export.quantize.recipes import RecipeOptions
from trol_edge.export.quantize.stats import Statistics
from trol_edge.verify.replay import verify

pytestmark = pytest.mark.heavy

COUNT = 2
OPEN = tuple(i for i in range(shut_gate.LAYERS) if i not in shut_gate.SHUT)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shut_gate.make(tmp_path_factory.mktemp("checkpoint") / "shut")


@pytest.fixture(scope="module")
def calibration(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics") / "shut"
    calibrate(checkpoint, None, folder, count=COUNT, left_out=COUNT)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes, in FP32."""
    folder = tmp_path_factory.mktemp("bundle") / "auto"
    assert run("export", checkpoint, "--traversal", "auto", "--calibration", calibration, "-o", folder) == 0
    return folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_shut_layers_are_found(checkpoint: Path, calibration: Path) -> None:
    """Exactly those whose gate is shut, at next to no loss; with a larger budget, more, as measured together."""
    twice, choice = choose(checkpoint, calibration, DEFAULT_NATS)
    assert twice == OPEN and choice.nats < 1e-9 and choice.same_top == 1.0
    assert (choice.max_nats, choice.samples) == (DEFAULT_NATS, COUNT)
    alone = load(calibration, None).alone
    cheaper = min(OPEN, key=lambda layer: alone[layer].nats)
    assert alone[cheaper].nats > 50 * DEFAULT_NATS
    twice, choice = choose(checkpoint, calibration, 1e9)
    assert len(twice) == 1 and cheaper not in twice and choice.nats == pytest.approx(alone[cheaper].nats, rel=1e-3)
    twice, choice = choose(checkpoint, calibration, 1e-30)  # layer 3 alone costs nothing at all
    assert set(OPEN) < set(twice) and choice.nats <= 1e-30


def test_the_set_is_measured() -> None:
    """Costs that grow faster than their sum: as many as fit together, by the fewest measurements that show it."""
    asked: list[tuple[int, ...]] = []

    def measure(layers: tuple[int, ...]) -> Loss:
        asked.append(layers)
        return Loss(layers, float(len(layers) ** 2), 1.0)

    order = [5, 0, 3, 1, 4, 2, 6]
    for limit, count in ((0.5, 0), (1.0, 1), (8.9, 2), (9.0, 3), (48.9, 6), (49.0, 7)):
        asked.clear()
        found = most(order, measure, limit)
        assert found.layers == tuple(sorted(order[:count])) and found.nats == count**2, limit
        assert len(asked) == 3 and (not count or found.layers in asked)


def test_the_bundle_says_so(
    bundle: Path, checkpoint: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Manifest, inspect and self-test; it is the bundle that the same list gives, but for the choice."""
    manifest = Bundle(bundle).manifest
    assert manifest.spec.traversed == OPEN and manifest.traversal is not None
    assert manifest.traversal.nats < 1e-9 and manifest.traversal.max_nats == DEFAULT_NATS
    assert verify(bundle, threads=1).first_wrong is None
    capsys.readouterr()
    assert run("inspect", bundle) == 0
    said = r"4 layers, second pass in 2 \(0, 1\), chosen on 2 samples: \d\.\de-\d\d nats, at most 1\.0e-04"
    assert re.search(said, capsys.readouterr().out)
    given = tmp_path / "given"
    export(checkpoint, given, traversal=OPEN, record_selftest=False)
    other = Bundle(given).manifest
    assert other.traversal is None and "traversal" not in json.loads((given / "bundle.json").read_text("utf-8"))
    assert other.spec == manifest.spec
    assert {n: g.operators for n, g in other.graphs.items()} == {n: g.operators for n, g in manifest.graphs.items()}


@pytest.mark.parametrize("change", [{"nats": -1.0}, {"nats": 1.0}, {"same_top": 2.0}, {"samples": 0}])
def test_choices_that_nothing_measured(bundle: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    data = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    del data["manifest_sha256"]
    data["traversal"] |= change
    data["manifest_sha256"] = digest_of(data)
    (folder / "bundle.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleError, match="traversal has numbers that no measurement gives"):
        Bundle(folder)


# -- one budget --------------------------------------------------------------------------------------------------------


def test_who_gets_what(checkpoint: Path) -> None:
    """A recipe that rounds gets the rest of --max-loss; one that does not leaves all of it to the traversal."""
    plain, int8 = RecipeOptions("fp32"), RecipeOptions("int8")
    assert budget(checkpoint, plain, None) == budget(checkpoint, int8, None) == (DEFAULT_NATS, False)
    assert budget(checkpoint, plain, 0.2) == (0.2, False)
    assert budget(checkpoint, int8, 0.2) == (SHARE * 0.2, True)
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="choose a limit above 0"):
            budget(checkpoint, int8, limit)
        with pytest.raises(UsageError, match="choose a limit above 0"):
            choose(checkpoint, "nowhere", limit)


@pytest.mark.slow
def test_the_search_for_precision_counts_it(checkpoint: Path, calibration: Path) -> None:
    """With an open layer's second pass left out, that loss is in every loss, and no precision makes up for it."""
    statistics = Statistics.load(calibration, None)
    options = RecipeOptions("int4", vision="fp32", lora="fp32", lm_head="fp32", scaling=False, clipping=False)
    samples = sampling.load(None, 1)

    def nats(traversal: str | Sequence[int], limit: float = 1e9) -> float:
        return find_plan(checkpoint, lambda source: statistics, samples, options, limit, traversal=traversal).nats

    whole = nats("all")
    assert nats(OPEN) == pytest.approx(whole, rel=1e-3)
    fewer = find_plan(checkpoint, lambda source: statistics, samples, options, 1e-3, traversal=(0, 2, 3))
    assert not fewer.reached and fewer.nats > 4e-3  # every Linear is as it was, and layer 1 is still missed
    assert find_plan(checkpoint, lambda source: statistics, samples, options, 1e-3, traversal=OPEN).reached


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_refused_before_any_work(
    checkpoint: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No calibration, that of another checkpoint, one without second passes left out, and budgets that are none."""
    out = tmp_path / "bundle"
    auto = ("--traversal", "auto", "-o", out)
    bare = tmp_path / "bare"
    calibrate(checkpoint, None, bare, count=1)
    for words, message in (
        ((checkpoint,), r"--traversal auto takes out .* give its folder \(--calibration"),
        ((NANO, "--calibration", calibration), "statistics of another checkpoint"),
        ((checkpoint, "--calibration", bare), r"without leaving out second passes.*--leave-out 4"),
        ((checkpoint, "--calibration", tmp_path / "none"), r"no state\.json here"),
        ((checkpoint, "--calibration", calibration, "--max-loss", "nan"), "nan is not a number"),
        ((checkpoint, "--calibration", calibration, "--max-loss", "0"), "choose a limit above 0"),
    ):
        capsys.readouterr()
        assert run("export", *words, *auto) in (1, 2)
        assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


def test_refused_by_the_function(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="gather statistics with"):
        choose(checkpoint, tmp_path, DEFAULT_NATS)
