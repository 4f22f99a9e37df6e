"""What compare says of bundles with planted damage: nothing, where, and how much."""

from __future__ import annotations

import dataclasses
import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import NANO, slow
from trol_edge.bundle.folder import sha256_of
from trol_edge.bundle.manifest import Bundle, FileInfo, write_manifest
from trol_edge.bundle.names import WEIGHTS
from trol_edge.calibration import compare as comparing
from trol_edge.calibration import samples as sampling
from trol_edge.calibration.compare import Comparison, Place, compare, divergence, first_wrong, ratio_db
from trol_edge.cli.main import main
from trol_edge.errors import BundleError, UsageError
from trol_edge.export.scenes import HARD_KINDS, held_out


def damage(bundle: Path, folder: Path, parameter: str, noise: float) -> Path:
    """A copy of a bundle with random noise, relative to its deviation, in one float16 parameter."""
    shutil.copytree(bundle, folder)
    tensor = Bundle(bundle).weights().tensors[parameter]
    assert tensor.dtype == "F16"
    values = np.memmap(folder / WEIGHTS, "<f2", "r+", offset=tensor.offset, shape=tensor.shape)
    rng = np.random.default_rng(0)
    values += (noise * values.astype(np.float32).std() * rng.standard_normal(tensor.shape)).astype(np.float16)
    values.flush()
    info = FileInfo((folder / WEIGHTS).stat().st_size, sha256_of(folder / WEIGHTS))
    manifest = Bundle(bundle).manifest
    write_manifest(folder, dataclasses.replace(manifest, files=manifest.files | {WEIGHTS: info}))
    return folder


@pytest.fixture(scope="module")
def samples() -> sampling.SampleSet:
    return sampling.load(None, 4)


def places(comparison: Comparison) -> dict[str, float]:
    return {place.name: place.mean_db for place in comparison.places}


def test_a_bundle_agrees_with_itself(nano_bundle: Path, samples: sampling.SampleSet) -> None:
    (found,) = compare(nano_bundle, [nano_bundle], samples, scenes=8)
    assert set(places(found).values()) == {comparing.MOST_DB}
    assert list(places(found)) == [
        *(f"vision.layers.{i}" for i in range(3)),
        "vision.features",
        *(f"decoder.layers.{i}" for i in range(8)),
    ]
    assert (found.wrong, found.kl_nats, found.top1_percent, found.same_answers_percent) == (None, 0.0, 100.0, 100.0)
    assert found.accuracy_percent == found.reference_accuracy_percent and found.lost_points == 0
    assert found.hard_accuracy_percent == found.reference_hard_accuracy_percent and found.hard_lost_points == 0
    hard = sum(kind in HARD_KINDS for _, kind, _, _ in held_out(8, hard=True))
    assert found.answers == 4 + 8 + hard and found.forced_tokens >= 4


@pytest.mark.slow
def test_a_bundle_that_is_run_by_layers(
    nano_bundle: Path, exported: Callable[..., Path], samples: sampling.SampleSet
) -> None:
    """Its places are found in the whole graphs, which it has beside those of single passes."""
    (found,) = compare(nano_bundle, [exported(NANO, recipe="int4-dynamic")], samples, scenes=4)
    assert len(places(found)) == 3 + 1 + 8 and found.wrong is None
    assert all(20 < db < comparing.MOST_DB for db in places(found).values())
    assert 0 < found.kl_nats < 1e-2 and found.top1_percent > 90


@pytest.mark.parametrize(
    ("parameter", "before", "wrong"),
    [
        ("decoder.layers.2.mlp.down.weight", "decoder.layers.1", "decoder.layers.2"),
        *slow(
            ("vision.layers.1.fc2.weight", "vision.layers.0", "vision.layers.1"),
            ("vision.proj1.weight", "vision.layers.2", "vision.features"),
        ),
    ],
)
def test_the_damaged_layer_is_named(
    nano_bundle: Path, samples: sampling.SampleSet, tmp_path: Path, parameter: str, before: str, wrong: str
) -> None:
    """Large noise in one Linear: everything before it is equal, it is the first that goes wrong."""
    bad = damage(nano_bundle, tmp_path / "bad", parameter, 30.0)
    (found,) = compare(nano_bundle, [bad], samples)
    assert found.wrong == wrong
    assert places(found)[before] == comparing.MOST_DB and places(found)[wrong] < 20
    assert found.kl_nats > 0.01 and found.same_answers_percent < 100
    assert found.accuracy_percent is None


def test_small_noise_is_measured_and_not_blamed(nano_bundle: Path, samples: sampling.SampleSet, tmp_path: Path) -> None:
    light = damage(nano_bundle, tmp_path / "light", "decoder.layers.2.mlp.down.weight", 0.01)
    (found,) = compare(nano_bundle, [light], samples)
    assert found.wrong is None and 20 < places(found)["decoder.layers.2"] < 80
    assert 0 < found.kl_nats < 0.01


def test_command_line(nano_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two bundles against one reference, the report as JSON and as a self-contained picture."""
    bad = damage(nano_bundle, tmp_path / "bad & worse", "decoder.layers.3.qkv.weight", 5.0)
    arguments = ["compare", str(nano_bundle), str(nano_bundle), str(bad), "--samples", "2", "--scenes", "4"]
    assert main([*arguments, "-o", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    assert "decoder.layers.3" in shown and "KL divergence" in shown
    found = json.loads((tmp_path / "report" / "compare.json").read_text(encoding="utf-8"))
    assert [c["wrong"] for c in found] == [None, "decoder.layers.3"] and found[0]["scenes"] == 4
    picture = (tmp_path / "report" / "compare.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(picture)
    assert len(root.findall("{*}path")) == 2 and "goes wrong at decoder.layers.3" in picture
    assert "href" not in picture
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".compare")] == []


def test_other_models_are_refused(
    nano_bundle: Path, golden_bundle: Callable[..., Path], samples: sampling.SampleSet
) -> None:
    other = golden_bundle("internlm2-text")
    with pytest.raises(UsageError, match="which has other sizes"):
        compare(nano_bundle, [other], samples)
    with pytest.raises(BundleError, match="has no tokenizer"):
        compare(other, [other], samples)
    with pytest.raises(UsageError, match="two bundles"):
        compare(nano_bundle, [], samples)


def test_ratio_and_divergence_by_hand() -> None:
    reference = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    other = np.array([[3.0, 4.5], [1.0, 0.0], [0.0, -2.0], [np.nan, 1.0]])
    assert ratio_db(reference, other) == pytest.approx([20.0, 150.0, -6.0206, -150.0], abs=1e-3)
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    assert divergence(np.log(p), np.log(q) + 7) == pytest.approx(0.25 * np.log(2))
    assert divergence(np.log(p), np.array([0.0, np.nan, 1.0])) == np.inf


@pytest.mark.parametrize(
    ("db", "wrong"),
    [
        ((40, 38, 36, 35), None),
        ((40, 31, 21, 12), None),  # worse with every layer, nowhere a break
        ((40, 38, 19, 18), 2),
        ((40, 28, 27, 27), None),  # a drop, to what is still good
        ((40, 18, 30, 9), 1),
        ((15, 14, 9, 8), 0),
    ],
)
def test_what_counts_as_wrong(db: tuple[float, ...], wrong: int | None) -> None:
    found = first_wrong([Place(f"layer {i}", float(value), 0.0) for i, value in enumerate(db)])
    assert found == (None if wrong is None else f"layer {wrong}")
