"""A sample of the faults that `make fault-catalogue` plants; and what a self-test of arithmetic is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.conftest import CHECKPOINTS, NANO, NANOS
from tests.selftest_faults import stand_in
from tests.selftest_faults.catalogue import Fault, faults, rehash
from tests.selftest_faults.runs import first_wrong, plant, variants
from trol_edge.bundle import graph_cut, probes, selftest
from trol_edge.bundle.manifest import Bundle, write_manifest
from trol_edge.bundle.names import SELFTEST
from trol_edge.bundle.weights import WeightsFile
from trol_edge.errors import BundleError
from trol_edge.runtimes.ort import OrtBackend
from trol_edge.verify import report as budgets
from trol_edge.verify.replay import verify


def sample(every: list[Fault], count: int) -> list[Fault]:
    """Some of the faults: one of every kind, and `count` more."""
    kinds = {fault.kind: fault for fault in every}
    rest = [fault for fault in every if fault not in kinds.values()]
    return [*kinds.values(), *rest[:: max(1, len(rest) // count)]]


def missed(pristine: Path, work: Path, chosen: list[Fault], ready: Callable[[Path], object] = lambda f: None) -> Any:
    """Faults that were not found, or not named at their place."""
    outcomes = list(plant(pristine, work, chosen, ready))
    return [(o.fault.kind, o.fault.what, o.stage) for o in outcomes if not o.named]


@pytest.mark.slow
def test_faults_in_int8(exported: Callable[..., Path], tmp_path: Path) -> None:
    """One of each kind, where rounding hid 30 of 30."""
    folder = exported(NANO, recipe="int8")
    assert missed(folder, tmp_path / "copy", sample(list(faults(folder, 0)), 2)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        (NANOS[0], "fp32"),
        (NANOS[0], "int8"),
        (NANOS[0], "int4-dynamic"),
        (NANOS[1], "int4"),
        (NANOS[1], "int8-dynamic"),
    ],
)
def test_faults_on_a_cpu(model: str, recipe: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing is wrong in any healthy variant, and a sample of the faults is found and named."""
    folder = exported(CHECKPOINTS / model, recipe=recipe)
    for title, patched, threads in variants():
        with patched:
            report = verify(folder_copy(folder, tmp_path / title), threads=threads)
        assert report.first_wrong is None, title
    assert missed(folder, tmp_path / "copy", sample(list(faults(folder, 1)), 12)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "recipe"), [(NANOS[0], "int8"), (NANOS[0], "fp8"), (NANOS[1], "fp16"), (NANOS[1], "int4")]
)
def test_faults_on_the_stand_in(model: str, recipe: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    """The same with engines, stale ones among the faults."""
    folder = folder_copy(exported(CHECKPOINTS / model, target=stand_in.TARGET, recipe=recipe), tmp_path / "pristine")
    with stand_in.machine() as build:
        build(folder)
        assert first_wrong(folder) == ""
        every = [*faults(folder, 2), *stand_in.stale(folder, tmp_path / "others", build)]
        assert missed(folder, tmp_path / "copy", sample(every, 12), build) == []


def folder_copy(folder: Path, to: Path) -> Path:
    """A copy, because what passes is noted in the folder."""
    import shutil

    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("verified-*", "engines"))
    return to


def test_no_rounding_moves_a_pattern() -> None:
    """In steps of a tensor, of a token, of a block of 32, and of an asymmetric rounding."""
    for width in (32, 64, 256, 1000):
        numbers = probes.pattern("any", width).astype(np.float64)
        assert numbers.min() == -128 and numbers.max() == 127 and (numbers != 0).all()
        blocks = numbers[:, : width // 32 * 32].reshape(len(numbers), -1, 32)
        assert (np.abs(blocks).max(-1) >= 127).all()
        for values, scale in (
            (numbers, 1.0),
            (numbers, np.abs(numbers).max(-1, keepdims=True) / 127),
            (blocks, np.abs(blocks).max(-1, keepdims=True) / 127),
            (numbers, (numbers.max(-1, keepdims=True) - numbers.min(-1, keepdims=True)) / 255),
        ):
            assert (np.abs(np.abs(values / scale % 1) - 0.5) > 0.01).all()


def test_sums_see_one_number_and_an_exchange(nano_bundle: Path) -> None:
    """Of a stored tensor: any number, and two blocks in each other's place."""
    file = WeightsFile(nano_bundle / "weights.safetensors")
    (name,) = [n for n in file.tensors if n == "decoder.lm_head.weight"]
    before = probes.stored_sums(file, [name])[name]
    array = file.load([name])[name].reshape(-1)

    class Changed:
        tensors: ClassVar = {name: dataclasses.replace(file.tensors[name], dtype="F32")}

        @staticmethod
        def blocks(names: Any, sha256: Any) -> Any:
            yield name, 0, array

    def moved() -> float:
        return float(np.abs(probes.stored_sums(Changed, [name])[name][:-1] - before[:-1]).max() / before[-1])  # type: ignore[arg-type]

    assert moved() < 1e-13
    array[12345] *= -1
    assert moved() > 1e-9
    array[12345] *= -1
    one, other = slice(0, 10000), slice(probes.PERIOD, probes.PERIOD + 10000)
    array[one], array[other] = array[other].copy(), array[one].copy()
    assert moved() > 1e-9
    array[one], array[other] = array[other].copy(), array[one].copy()

    def exchanged(place: int) -> float:
        pair = slice(place, place + 2)
        array[pair] = array[pair][::-1].copy()
        found = moved()
        array[pair] = array[pair][::-1].copy()
        return found

    # Two neighbours count in one of 8 sums with one sign in a sixteenth of all places; without signs in an eighth.
    assert sum(exchanged(place) < 1e-9 for place in range(0, 600, 2)) < 300 / 11


def test_a_cut_of_what_is_not_there(nano_bundle: Path) -> None:
    """A self-test names values of the graphs, and others are refused."""
    with pytest.raises(BundleError, match="no graph computes nothing_like_it"):
        graph_cut.cut((nano_bundle / "step.onnx").read_bytes(), ["nothing_like_it"])


def test_a_record_that_asks_for_memory(nano_bundle: Path, tmp_path: Path) -> None:
    """Widths and tokens that no graph has are refused before anything is made of them."""
    from safetensors.numpy import load_file, save_file

    copy = folder_copy(nano_bundle, tmp_path / "bundle")
    arrays = load_file(copy / SELFTEST)
    for field, value in (("widths", 1 << 30), ("tokens", 1 << 30)):
        changed = arrays[f"forced.traverse.{field}"].copy()
        changed[0] = value
        save_file(arrays | {f"forced.traverse.{field}": changed}, copy / SELFTEST)
        rehash(copy, SELFTEST)
        with pytest.raises(BundleError, match=f"forced.traverse.{field} is not a list of numbers"):
            verify(copy)


def test_a_self_test_of_an_earlier_version(nano_bundle: Path, tmp_path: Path) -> None:
    """It holds FP32 results only: verify compares with them, and says what that is worth."""
    from safetensors.numpy import load_file, save_file

    copy = folder_copy(nano_bundle, tmp_path / "bundle")
    arrays = {n: a for n, a in load_file(copy / SELFTEST).items() if not n.startswith("forced.") and n != "stored"}
    save_file(arrays, copy / SELFTEST)
    rehash(copy, SELFTEST)
    write_manifest(copy, dataclasses.replace(Bundle(copy).manifest, distance=None))
    assert selftest.read(Bundle(copy)).forced == {}
    report = verify(copy)
    assert report.first_wrong is None and report.notes == (budgets.OLDER,)
    assert report.verdict.endswith("export the bundle again to have its own arithmetic checked")


@pytest.mark.slow
def test_a_processor_that_clips(exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and what it computes may be rounding; a fault elsewhere may not."""
    copy = folder_copy(exported(NANO, recipe="int8"), tmp_path / "bundle")
    assert not verify(copy).notes
    monkeypatch.setattr(OrtBackend, "saturates", True)
    monkeypatch.setattr(budgets, "ALWAYS", budgets.ALWAYS)
    monkeypatch.setitem(budgets.ALWAYS, "arithmetic", 1e-9)
    report = verify(copy)
    assert report.first_wrong is not None and report.first_wrong.name.startswith("arithmetic.")
    assert report.could_be_rounding and "x86 without VNNI" in report.verdict
    monkeypatch.setattr(OrtBackend, "saturates", False)
    assert not verify(copy).could_be_rounding
