"""The PyTorch reference equals the authors' code: every array of every golden case of the family, in FP32."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests import cases
from tests.cases import APART, NOT_COMPUTED, TOLERANCE, VISION, Array, compare, difference
from tests.golden import GOLDEN
from tests.reference import reference
from trol_edge.export.reference import internlm2
from trol_edge.prompt.images import load_rgb, preprocess

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize(("case", "name"), cases.names())
def test_decoder_equals_golden(case: str, name: str) -> None:
    """Integers exact, the rest within 1e-4 of an array's largest magnitude; greedy tokens equal; both semantics."""
    run = cases.load(case, name)
    assert compare(run, [reference(case).row(run, row) for row in run.rows]) == []


@pytest.mark.parametrize(("case", "name"), cases.names())
def test_extending_both_passes_equals_traversing_everything(case: str, name: str) -> None:
    """New tokens traversed one by one, with both passes' keys and values kept: no re-run is needed."""
    run = cases.load(case, name)
    for row in run.rows:
        ours = reference(case).row(run, row)
        assert difference(ours["extended_logits"], ours["nocache_logits"]) <= TOLERANCE
        assert np.array_equal(ours["extended_ids"], ours["nocache_ids"])


@pytest.mark.parametrize(("case", "name"), [n for n in cases.names() if cases.has_pictures(*n)])
def test_vision_equals_golden(case: str, name: str) -> None:
    """Pixels to the bit, tower and projector within the tolerance."""
    run, ref = cases.load(case, name), reference(case)
    expected, spec = run.expected, ref.spec
    settings = internlm2.FAMILY.image(spec)
    pixels = preprocess([load_rgb(GOLDEN / case / file) for file in run.image_files], settings)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == run.info["pixel_values_sha256"]
    table = expected["pixel_lut"]
    if "pixel_u8" in expected:  # in the full data; above all pixels were compared by their hash
        assert np.array_equal(pixels, np.stack([table[c][expected["pixel_u8"][:, c]] for c in range(3)], axis=1))
        assert np.array_equal(pixels[:, :, ::7, ::7], expected["pixel_values_s7"])
    ramp = np.zeros((spec.vision.image_size, spec.vision.image_size, 3), np.uint8)  # no resize: every byte stays
    ramp.reshape(-1, 3)[:256] = np.arange(256, dtype=np.uint8)[:, None]
    assert np.array_equal(preprocess([ramp], settings)[0].reshape(3, -1)[:, :256], table)

    states = ref.vision.encode(torch.from_numpy(pixels))
    stored = torch.stack(states)[:, [0, -1]][:, :, torch.from_numpy(run.inputs["vision_tokens"])]
    found = {
        "vision_hidden": stored,
        "vision_features": run.stored(states[-1][:, 1:]),
        "projector": run.stored(ref.vision(torch.from_numpy(pixels))),
    }
    pixel_arrays = {"pixel_u8", "pixel_values_s7"} & set(expected)
    assert {*found, "pixel_lut"} | pixel_arrays == set(VISION) & set(expected)
    off = {key: difference(tensor.numpy(), expected[key]) for key, tensor in found.items()}
    assert {key: value for key, value in off.items() if value > TOLERANCE} == {}


@pytest.mark.parametrize("case", sorted({case for case, _ in cases.names()}))
def test_no_golden_array_is_forgotten(case: str) -> None:
    """Every key of expected.npz belongs to a run that is compared, or to a test of its own."""
    runs = {name for other, name in cases.names() if other == case}
    loose = {key for key in cases.arrays(case, "expected") if key.split("/")[0] not in runs}
    assert loose == ({"clip_pos_35"} if case == "internlm2-gqa-image" else set())


def test_every_exception_is_met() -> None:
    """An exception that no longer covers any array would hide nothing, and mislead a reader."""
    stored = [(f"{case}/{name}", key) for case, name in cases.names() for key in cases.load(case, name).expected]
    for entry in APART:
        for key in entry.arrays:
            assert any(fnmatch.fnmatch(run, entry.run) and key == other for run, other in stored), (entry.run, key)
    assert set(NOT_COMPUTED) <= {key for _, key in stored}


def test_comparator_fails() -> None:
    """Planted faults of each kind are found: a number, an integer, a forgotten array, an idle exception."""
    run = cases.load("internlm2-text", "main")
    good = reference(run.case).row(run, run.rows[0])
    assert compare(run, [good]) == []

    def problems(key: str, change: Callable[[Array], Array]) -> list[str]:
        return compare(run, [good | {key: change(good[key])}])

    def nudged(array: Array) -> Array:
        array = array.copy()
        array.flat[-1] += 2e-4 * np.abs(array).max() if array.dtype == np.float32 else 1
        return array

    for key in set(run.expected) - set(VISION) - set(NOT_COMPUTED):
        assert [text.split(",")[0] for text in problems(key, nudged)] == [key]
    assert problems("gate", lambda array: array * np.float32(np.nan))
    extra = dataclasses.replace(run, expected=run.expected | {"new_array": np.zeros(1)})
    assert compare(extra, [good]) == ["new_array: neither compared nor an exception"]
    beyond = cases.load("internlm2-dynamic-rope", "crossing")
    idle = dataclasses.replace(beyond, expected={"k0_decode": good["k0_decode"][None]})
    assert "no exception" in compare(idle, [good])[0]


def test_position_table_is_resized_as_the_authors_do() -> None:
    """CLIP's published 24 x 24 grid becomes the 35 x 35 grid of golden."""
    table = torch.from_numpy(cases.arrays("internlm2-gqa-image", "inputs")["clip_pos_24"])
    expected = cases.arrays("internlm2-gqa-image", "expected")["clip_pos_35"]
    resized = internlm2.resize_positions(table, 35).numpy()
    rows = cases.arrays("internlm2-gqa-image", "inputs").get("clip_pos_35_rows", np.arange(len(resized)))
    assert difference(resized[rows], expected) <= TOLERANCE


def test_the_two_semantics_differ() -> None:
    """Stepping is not traversing: a test that mixes them up could not pass by accident."""
    run = cases.load("internlm2-text", "main")
    ours = reference(run.case).row(run, run.rows[0])
    assert difference(ours["cached_logits"][1:2], ours["nocache_logits"][1:2]) > 0.1
