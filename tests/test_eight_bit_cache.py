"""Keys and values in 8 bits: what a bundle with them holds and answers, and who refuses them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.conftest import NANO
from tests.statistics import statistics_of
from trol_edge.bundle.cache_scales import OLDEST_ONNXRUNTIME, scale_name, scale_names, scale_of, unusable
from trol_edge.bundle.manifest import Bundle, write_manifest
from trol_edge.bundle.names import KINDS, MANIFEST, WEIGHTS
from trol_edge.calibration.collect import CachePeaks
from trol_edge.errors import BackendError, BundleError, CalibrationError, UsageError
from trol_edge.export import pipeline
from trol_edge.export.lower import ort as lower_ort
from trol_edge.export.quantize.cache import find_cache_scales, rounding_of
from trol_edge.export.quantize.recipes import RecipeOptions, make_plan, needs_statistics, read_options
from trol_edge.export.quantize.stats import SMALLEST, Statistics
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.model import EagerAttention
from trol_edge.runtime import Runtime
from trol_edge.verify.replay import verify

QUESTION, HARDER = "What is left of the red star?", "How many objects are there?"
SCENE = NANO / "scene.png"
SPLITS = (1, 2, 7, 40, 100)
FLIPPED = 1e-3  # share of rounded numbers that another order of sums may move, by one step


@pytest.fixture(scope="module")
def folder(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trol-nano in FP32 with 8-bit keys and values; a copy, because what passes is noted in the folder."""
    copy = tmp_path_factory.mktemp("eight") / "bundle"
    shutil.copytree(exported(NANO, kv="int8"), copy)
    return copy


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Iterator[Runtime]:
    with Runtime(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def prompt(runtime: Runtime) -> tuple[Any, Any]:
    """Ids of a question about the scene, and the features of its picture."""
    pixels = runtime.preprocess([SCENE])
    ids = runtime.tokenize(QUESTION, runtime.count_tiles([SCENE]))
    return np.array(ids), runtime.model.backend.encode_image(pixels)


# -- the bundle --------------------------------------------------------------------------------------------------------


def test_what_the_bundle_says_and_holds(folder: Path, exported: Callable[..., Path]) -> None:
    """A plan, the version that it needs, caches in a quarter of the bytes, and a scale for each head and channel."""
    bundle, plain = Bundle(folder), Bundle(exported(NANO))
    spec = bundle.manifest.spec
    assert (bundle.manifest.plan.kv, bundle.manifest.requires) == ("int8", {"onnxruntime": OLDEST_ONNXRUNTIME})
    assert (plain.manifest.plan.kv, plain.manifest.requires) == (None, {})
    assert bundle.manifest.calibration is not None
    for name in ("traverse", "traverse_text", "step"):
        ports = [port for port in bundle.manifest.graphs[name].inputs if port.name.startswith("past_")]
        assert {port.dtype for port in ports} == {"int8"} and len(ports) == spec.num_layers * (
            2 if name == "step" else 4
        )
        assert {scale_name(port.name) for port in ports} <= set(bundle.manifest.graphs[name].weights)
    scales = bundle.weights().load(scale_names(spec))
    assert len(scales) == 4 * spec.num_layers and not list(unusable(scales))
    assert {array.shape for array in scales.values()} == {(1, spec.num_kv_heads, 1, spec.head_dim)}
    assert len({array.tobytes() for array in scales.values()}) == len(scales)
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    assert '"kv"' in text and '"kv"' not in (plain.folder / MANIFEST).read_text(encoding="utf-8")
    with Runtime(folder) as rounded, Runtime(plain.folder) as exact:
        assert 4 * rounded.model.backend.cache_bytes == exact.model.backend.cache_bytes
        assert rounded.generate(QUESTION, SCENE).text == exact.generate(QUESTION, SCENE).text == "cyan ring"


def test_the_self_test_passes(folder: Path) -> None:
    """On the bundle's own arithmetic: every layer and pass, whose scales all differ, and the tokens."""
    report = verify(folder, threads=1)
    assert report.first_wrong is None, report.verdict
    rounded = [stage for stage in report.stages if stage.name.startswith("traverse.layers.") and "pass2" in stage.name]
    assert len(rounded) == 2 * Bundle(folder).manifest.spec.num_layers


def test_rows_are_what_the_reference_rounds(runtime: Runtime, prompt: tuple[Any, Any]) -> None:
    """Every row is a whole number of steps of its scale, in use of the whole range, and read back as such."""
    session = runtime.session()
    session.prefill_features(*prompt)
    state: Any = session.cache.state
    backend: Any = runtime.model.backend
    for which, rows in enumerate((state.cache, state.second)):
        read = state.rows(np.arange(len(prompt[0]), dtype=np.int32), which)
        for place, (array, numbers) in enumerate(zip(rows, read, strict=True)):
            assert array.dtype == np.int8
            layer, kind = divmod(place, 2)
            layer = runtime.bundle.manifest.spec.cached_layers[which][layer]
            scale = backend.cache_scales[scale_of(KINDS[kind], layer, which)]
            wanted = array[0][:, : len(prompt[0])].astype(np.float32) * scale[0]
            assert np.array_equal(numbers, wanted.swapaxes(0, 1).reshape(len(numbers), -1))
            assert np.abs(array.astype(int)).max() > 60 and not array[:, :, len(prompt[0]) :].any()


# -- prefixes, forks, beams, both modes --------------------------------------------------------------------------------


def test_a_prefix_is_exact(runtime: Runtime, prompt: tuple[Any, Any]) -> None:
    """After every split: rows and logits of a fresh prefill. Attention reads new rows rounded, as it reads old ones."""
    ids, features = prompt
    fresh = runtime.session()
    logits = fresh.prefill_features(ids, features).copy()
    state: Any = fresh.cache.state
    wanted = [array[:, :, : len(ids)].copy() for array in (*state.cache, *state.second)]
    for split in (len(ids) - n for n in SPLITS):
        session = runtime.session()
        session.prefill_features(ids, features)
        session.truncate(split)
        state = session.cache.state
        for array in (*state.cache, *state.second):
            array[:, :, split:] = 99  # stale rows
        with_prefix = session.prefill_features(ids, features, reuse=True)
        assert session.reused == split
        assert np.abs(with_prefix - logits).max() <= 1e-3 * np.abs(logits).max()
        assert with_prefix.argmax() == logits.argmax()
        for array, rows in zip((*state.cache, *state.second), wanted, strict=True):
            off = np.abs(array[:, :, : len(ids)].astype(int) - rows)
            assert off.max() <= 1 and (off > 0).mean() <= FLIPPED


def test_forks_and_copies(runtime: Runtime, prompt: tuple[Any, Any]) -> None:
    """A fork and a session that became another one step as the first does, bit by bit."""
    session = runtime.session()
    first = int(session.prefill_features(*prompt).argmax())
    twin, other = session.fork(), runtime.session()
    other.prefill(prompt[0][:8])  # before the picture
    other.become(session)
    for token in (first, 11, 12, 13):
        steps = [each.step(token) for each in (session, twin, other)]
        assert np.array_equal(steps[0], steps[1]) and np.array_equal(steps[0], steps[2])


@pytest.mark.parametrize(
    "options", [{}, {"answer_mode": "traverse"}, {"num_beams": 3}], ids=["steps", "traverse", "beams"]
)
def test_answers_do_not_depend_on_what_is_kept(runtime: Runtime, folder: Path, options: dict[str, Any]) -> None:
    """A question after another one about the same picture, and the same one to a Runtime that was asked nothing."""
    runtime.generate(QUESTION, SCENE, **options)
    second = runtime.generate(HARDER, SCENE, **options)
    with Runtime(folder) as other:
        alone = other.generate(HARDER, SCENE, **options)
    assert second.token_ids == alone.token_ids and second.text


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int4", "int8-dynamic", "int4-dynamic"])
def test_other_recipes(recipe: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    """Each recipe that runs on a CPU: the self-test passes, and the picture's question is answered."""
    folder = tmp_path / "bundle"
    shutil.copytree(exported(NANO, recipe=recipe, kv="int8"), folder)
    report = verify(folder, threads=1)
    assert report.first_wrong is None, report.verdict
    for reuse in (True, False):
        with Runtime(folder, prefix_reuse=reuse) as opened:
            assert opened.generate(QUESTION, SCENE).text == "cyan ring"
            state: Any = opened.model.backend.new_state()
            assert {array.dtype for array in state.cache} == {np.dtype(np.int8)}


# -- scales ------------------------------------------------------------------------------------------------------------


def test_scales_are_those_of_the_largest() -> None:
    """By layer, pass, head and channel: the largest value is 127 steps, and nothing is zero."""
    source = Checkpoint(NANO)
    statistics = statistics_of(source)
    loud = {i: array.copy() for i, array in statistics.caches.items()}
    loud[1][0, 1, 1, 3], loud[2][1, 0, 0, 0] = 1000.0, 0.0
    scales = find_cache_scales(source.spec, Statistics({}, {}, statistics.state, loud))
    assert sorted(scales) == sorted(scale_names(source.spec))
    key = scales[scale_name("past_second_key_1")]
    assert key[0, 1, 0, 3] == np.float32(1000) / np.float32(127) and key[0, 1, 0, 4] < 1
    assert scales[scale_name("past_value_2")][0, 0, 0, 0] == np.float32(SMALLEST) / np.float32(127)
    for layer, peaks in statistics.caches.items():
        assert np.allclose(
            127 * scales[scale_name(f"past_key_{layer}")][0, :, 0], np.maximum(loud[layer][0, 0], SMALLEST)
        )
        assert peaks.shape == (2, 2, source.spec.num_kv_heads, source.spec.head_dim)


def test_peaks_of_two_prompts() -> None:
    """The larger of both, each pass, head and channel by itself."""
    spec = Checkpoint(NANO).spec
    found = CachePeaks(spec.num_kv_heads, spec.head_dim)
    generator = torch.Generator().manual_seed(0)
    seen: list[list[list[torch.Tensor]]] = [[[], []], [[], []]]
    for length in (3, 5):
        attend = EagerAttention(spec, torch.empty(0), torch.empty(0))
        for kind, cached in enumerate((attend.keys, attend.values)):
            for traversal in (0, 1):
                rows = torch.randn(1, spec.num_kv_heads, length, spec.head_dim, generator=generator)
                cached[traversal][0] = rows
                seen[kind][traversal].append(rows)
        found.add(attend)
    for kind in (0, 1):
        for traversal in (0, 1):
            wanted = torch.cat(seen[kind][traversal], 2).abs().amax(2)[0].numpy()
            assert np.array_equal(found.found[kind, traversal], wanted)


def test_rounding_of_the_reference() -> None:
    """Half to even, and clamped to -128..127; a row that was rounded stays what it is."""
    scale = {scale_name(f"past_{name}_4"): torch.full((1, 1, 1, 2), 0.5) for name in ("key", "value", "second_key")}
    rounded = rounding_of(4, scale)
    x = torch.tensor([[[[0.25, 0.75], [-1000.0, 1000.0]]]])
    keys, values = rounded(x, x, 0)
    assert keys.tolist() == values.tolist() == [[[[0.0, 1.0], [-64.0, 63.5]]]]
    assert torch.equal(rounded(keys, values, 0)[0], keys)


# -- who refuses -------------------------------------------------------------------------------------------------------


def test_an_older_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail at the first answer; it is refused when the bundle is opened, with the version that is needed."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(BackendError, match=rf"needs onnxruntime {OLDEST_ONNXRUNTIME} or newer .* 1\.26\.0"):
        Runtime(folder)


def test_choices_that_have_no_kernel() -> None:
    """Other targets, and other words."""
    shapes = {"decoder.layers.0.qkv.weight": (8, 8)}
    for target in ("onnx", "rtx", "tensorrt", "jetson-jp6"):
        with pytest.raises(UsageError, match="only the target cpu"):
            make_plan(RecipeOptions(kv="int8"), shapes, target)
    with pytest.raises(UsageError, match="kv 'int4' is not one of int8"):
        read_options("fp32", kv="int4")
    for recipe in ("fp32", "int8-dynamic", "int4-dynamic"):
        options = RecipeOptions(recipe, kv="int8")
        assert needs_statistics(options, make_plan(options, shapes, "cpu"))


def test_exports_that_lack_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No calibration, one of an earlier version, and heads without a kernel: refused, and nothing is left."""
    options = RecipeOptions(kv="int8")
    with pytest.raises(UsageError, match="needs the statistics"):
        pipeline.export(NANO, tmp_path / "a", options=options)

    def older(source: Checkpoint) -> Statistics:
        found = statistics_of(source)
        return Statistics(found.points, found.peaks, found.state)

    with pytest.raises(CalibrationError, match=r"how large keys and values of layer 0 are .* calibrate again"):
        pipeline.export(NANO, tmp_path / "a", options=options, calibration=older)
    monkeypatch.setattr(lower_ort, "takes_eight_bit_caches", lambda size: False)
    with pytest.raises(UsageError, match="heads of 32 numbers have no kernel"):
        pipeline.export(NANO, tmp_path / "a", options=options, calibration=statistics_of)
    assert not list(tmp_path.iterdir())


def test_bundles_that_contradict_themselves(folder: Path, exported: Callable[..., Path], tmp_path: Path) -> None:
    """Caches of another type than the plan says, a version that is none, and scales that are no numbers above 0."""
    manifest, plain = Bundle(folder).manifest, Bundle(exported(NANO)).manifest
    rounded = dataclasses.replace(plain.plan, kv="int8")
    changed = {
        "which its plan does not say": (folder, dataclasses.replace(manifest, plan=plain.plan)),
        "requires no version of onnxruntime": (folder, dataclasses.replace(manifest, requires={})),
        "names no version": (folder, dataclasses.replace(manifest, requires={"onnxruntime": "new"})),
        "is not int8": (folder, dataclasses.replace(manifest, plan=dataclasses.replace(manifest.plan, kv="int2"))),
        "it has no decoder.layers.0.key_scale": (
            exported(NANO),
            dataclasses.replace(plain, plan=rounded, requires=manifest.requires),
        ),
    }
    for i, (message, (source, wrong)) in enumerate(changed.items()):
        copy = tmp_path / str(i)
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("verified-*"))
        write_manifest(copy, wrong)
        with pytest.raises(BundleError, match=message):
            Bundle(copy)
    copy = tmp_path / "zero"
    shutil.copytree(folder, copy)
    info = Bundle(folder).weights().tensors["decoder.layers.3.value_scale"]
    with (copy / WEIGHTS).open("r+b") as file:
        file.seek(info.offset + 4)
        file.write(bytes(4))
    with pytest.raises(BundleError, match=r"decoder\.layers\.3\.value_scale is not a number above 0"):
        Runtime(copy, verify=False)
