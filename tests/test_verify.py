"""The self-test: it passes where all is well, and names the stage of every fault that is put into a bundle.

The faults have valid hashes (the manifest is written again), so only the numbers show them. Nothing here ran on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import trt_standin
from tests.conftest import CHECKPOINTS, NANO, slow
from trol_edge.bundle import selftest
from trol_edge.bundle.engines import Key, folder_of, read, write
from trol_edge.bundle.folder import sha256_of
from trol_edge.bundle.manifest import Bundle, FileInfo, Manifest, write_manifest
from trol_edge.bundle.names import MANIFEST, SELFTEST, WEIGHTS
from trol_edge.bundle.strict import from_dict
from trol_edge.cli import main as cli
from trol_edge.errors import BundleError, VerifyError
from trol_edge.machine import identity as machine
from trol_edge.model import Model
from trol_edge.runtime import Runtime
from trol_edge.runtimes.cuda import CudaPython, Gpu
from trol_edge.runtimes.trt import backend as trt_module
from trol_edge.runtimes.trt.api import Library
from trol_edge.verify import passed
from trol_edge.verify import replay as verify
from trol_edge.verify import report as budgets

STORED = {"F16": np.uint16, "F32": np.uint32, "I8": np.uint8}  # bits of what is stored


def rehash(folder: Path, **changes: Any) -> None:
    """Write the manifest again, with the present hashes of the files."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del data["manifest_sha256"]
    for name in data["files"]:
        path = folder / name
        data["files"][name] = dataclasses.asdict(FileInfo(path.stat().st_size, sha256_of(path)))
    manifest: Manifest = from_dict(Manifest, data, str(folder))
    write_manifest(folder, dataclasses.replace(manifest, **changes))


def alter(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change the stored bits of a tensor in place, and write the manifest again."""
    info = Bundle(folder).weights().tensors[name]
    bits = np.memmap(folder / WEIGHTS, STORED[info.dtype], "r+", info.offset, info.shape)
    change(bits)
    bits.flush()
    rehash(folder)


def flip_sign(bits: Any) -> None:
    """Change the sign of one number of medium magnitude."""
    flat = bits.reshape(-1)
    top = flat.dtype.type(1 << (8 * flat.dtype.itemsize - 1))
    order = np.argsort(flat & (top - flat.dtype.type(1)), kind="stable")
    flat[order[len(order) * 3 // 4]] ^= top


def test_arithmetic_is_named_where_it_began_to_differ() -> None:
    """A fault that is just within the budget at its own place is above it where sums are read."""

    def named(*drifts: float, names: tuple[str, str, str] = ("a", "b", "c"), graph: str = "arithmetic.step") -> Any:
        pairs = zip(names, drifts, strict=True)
        return budgets.place_of(budgets.Stage(f"{graph}.{name}", drift, 20.0) for name, drift in pairs)

    assert named(1, 15, 19) is None
    found = named(1, 15, 21)
    assert found.name == "arithmetic.step.b" and "1.5e+01, and 2.1e+01 at arithmetic.step.c" in found.text
    assert named(1, 4, 21).name == "arithmetic.step.c"
    assert named(1, 15, 21, graph="traverse").name == "traverse.c"
    other = [budgets.Stage("arithmetic.vision.a", 15, 20), budgets.Stage("arithmetic.step.a", 21, 20)]
    assert budgets.place_of(other) == other[1]


def first_wrong(folder: Path) -> str:
    """Where the self-test says that it goes wrong."""
    wrong = verify.verify(folder).first_wrong
    return "nothing" if wrong is None else wrong.name


@pytest.fixture
def copy(nano_bundle: Path, tmp_path: Path) -> Path:
    """trol-nano's bundle, to be damaged."""
    shutil.copytree(nano_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("verified-*"))
    return tmp_path / "bundle"


# -- all is well -------------------------------------------------------------------------------------------------------


def test_both_models_pass(each_bundle: Path, tmp_path: Path) -> None:
    """Every stage is there, within its budget and far from it; the file is small; all passes and both graphs ran."""
    shutil.copytree(each_bundle, tmp_path / "bundle")  # what passes is noted in the folder
    report = verify.verify(tmp_path / "bundle")
    assert report.first_wrong is None and report.precision == "fp32"
    spec = Bundle(each_bundle).manifest.spec
    names = [stage.name for stage in report.stages]
    assert names[:4] == ["tokenizer", "prompt", "preprocess", "rope"]
    exact = [name.split(".")[0] for name in names if name.startswith(("arithmetic.", "stored."))]
    assert names[4 + len(exact) :][:2] == ["vision", "embedding"] and exact == sorted(exact)
    graphs = {name.split(".")[1] for name in names if name.startswith("arithmetic.")}
    assert graphs == {*Bundle(each_bundle).manifest.graphs, "projector"}
    names = names[:4] + names[4 + len(exact) :]
    per_case = 4 * spec.num_layers + 1 + 2 * spec.num_layers + 1 + 1
    assert len(names) == 6 + per_case * (2 if spec.long_rope else 1) == len(set(names))
    assert all(stage.drift <= stage.budget / 10 for stage in report.stages)
    assert (each_bundle / SELFTEST).stat().st_size < 450_000
    test = selftest.read(Bundle(each_bundle))
    picture = test.cases["picture"]
    assert 0 < int((picture.ids == spec.image_token_id).sum()) < len(picture.ids)
    assert len(picture.forced) >= 4 and picture.positions[-1] == len(picture.ids) - 1
    assert set(test.cases) == ({"picture", "long"} if spec.long_rope else {"picture"})


def test_what_is_recorded_is_the_reference(each_bundle: Path, no_gradients: None) -> None:
    """Layer by layer with tokens stepped together, against the whole model with one step after the other."""
    import torch

    from trol_edge.export.reference.checkpoint import Checkpoint
    from trol_edge.export.reference.layerwise import rope_of
    from trol_edge.export.reference.model import EagerAttention
    from trol_edge.prompt.images import preprocess

    bundle = Bundle(each_bundle)
    source, test = Checkpoint(CHECKPOINTS / bundle.manifest.model), selftest.read(bundle)
    spec = source.spec
    decoder, vision = source.family.decoder(spec), source.family.vision(spec)
    source.load_into(decoder=decoder, vision=vision)
    embedding = source.tensor("embedding").float()
    pixels = torch.from_numpy(preprocess([test.picture], bundle.manifest.image))
    features = vision(pixels).flatten(0, 1)[test.feature_rows]
    assert np.allclose(features.numpy(), test.features, atol=1e-4)
    for name, case in test.cases.items():
        attend = EagerAttention(spec, *rope_of(spec, 256, name == "long"))
        x, mask = embedding[case.ids], torch.from_numpy(case.ids == spec.image_token_id)
        if mask.any():
            x[mask] = features
        attend.positions = torch.arange(len(x))
        lora = mask.float()[None, :, None] if spec.lora_rank and mask.any() else None
        logits = [decoder.logits(decoder.traverse(x[None], lora, attend))[0, -1]]  # type: ignore[operator]
        for i, token in enumerate(case.forced):
            attend.positions = torch.tensor([len(x) + i])
            logits.append(decoder.logits(decoder.step(embedding[token][None, None], attend))[0, 0])  # type: ignore[operator]
        for i, row in ((0, logits[0]), (1, logits[-1])):
            assert np.allclose(row.numpy(), case.logits[i], atol=2e-4)
        assert [int(row.argmax()) for row in logits] == case.best.tolist()
        for traversal in (0, 1):
            for layer in range(spec.num_layers):
                for kind, cache in enumerate((attend.keys, attend.values)):
                    whole = cache[traversal][layer]
                    assert whole is not None
                    rows = whole[0].transpose(0, 1).flatten(1).numpy()
                    assert np.allclose(rows[case.positions], case.cache[traversal, layer, kind], atol=1e-4)
                    if not traversal:
                        assert np.allclose(rows[-1], case.step_cache[layer, kind], atol=1e-4)


@pytest.mark.parametrize("case", ["internlm2-text", *slow("phi3-text")])
def test_without_a_tokenizer(case: str, golden_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Random weights and random tokens: a bundle for the token level."""
    shutil.copytree(golden_bundle(case, selftest=True), tmp_path / "bundle")
    assert verify.verify(tmp_path / "bundle").first_wrong is None


def test_one_set_of_keys_and_values(nano_bundle: Path) -> None:
    """prefix_reuse=False keeps no second pass: what there is, is compared."""
    with Runtime(nano_bundle, prefix_reuse=False) as runtime:
        report = verify.replay(runtime.model, selftest.read(runtime.bundle))
    assert report.first_wrong is None
    names = [stage.name for stage in report.stages if "pass2" in stage.name]
    assert all(name.startswith("arithmetic.") and not name.endswith((".keys", ".values")) for name in names)


@pytest.mark.slow
def test_short_contexts(nano_bundle: Path, tmp_path: Path) -> None:
    """A prompt that is cut to fit; and a context too short for any, which export then notes."""
    from trol_edge.bundle.weights import WeightsFile
    from trol_edge.export.graphs import canonical
    from trol_edge.export.reference.checkpoint import Checkpoint
    from trol_edge.export.selftest import record as recording
    from trol_edge.export.selftest.emulation import Emulation, find_cuts

    source, path, plan = Checkpoint(NANO), tmp_path / SELFTEST, Bundle(nano_bundle).manifest.plan
    (tmp_path / WEIGHTS).symlink_to(nano_bundle / WEIGHTS)
    traced = {name: canonical.trace(name, source.family, source.spec, 2048) for name in canonical.TRACED}
    traced["traverse_text"] = canonical.without_lora(traced["traverse"])
    cuts = {name: find_cuts(model) for name, model in traced.items()}

    def record(context: int) -> Any:
        emulation = Emulation(plan, "cpu", {}, cuts)
        return recording.record(source, path, context, None, lambda *_: None, plan, emulation)

    assert record(12) is None and not path.exists()
    for context in (16, 40):
        assert record(context)
        shapes = {name: info.shape for name, info in WeightsFile(path).tensors.items()}
        assert shapes["picture.ids"][0] + shapes["picture.forced"][0] == context
        assert shapes["features"][0] == (context - 8) // 2


def test_inputs_are_rounded_as_by_their_graph() -> None:
    """To the nearest step, half to even, as QuantizeLinear does; beyond the last step to that."""
    import torch

    from trol_edge.bundle.precision import LinearPlan, PrecisionPlan
    from trol_edge.export.selftest.emulation import Cut, Emulation

    linear = LinearPlan("int8", activations=True)
    plan = PrecisionPlan("int8", "fp32", {"w": linear})
    emulation = Emulation(plan, "cpu", {"w": 0.5}, {"traverse": {("w", 0): Cut("x", "w", 0)}})
    emulation.begin("traverse")
    numbers = torch.tensor([[0.2, 0.25, 0.3, 0.74, 0.75, 0.76, -0.3, 70.0, -70.0]])
    rounded = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, -0.5, 63.5, -64.0]
    assert emulation.input("w", numbers)[0].tolist() == rounded


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("vision.layers.1.fc1.weight", "arithmetic.vision.layers.1.fc1"),
        ("decoder.layers.3.out.lora_b", "arithmetic.traverse.layers.3.pass1.out"),
        ("decoder.gate.weight", "arithmetic.traverse.layers.0.gate"),
        ("decoder.lm_head.weight", "arithmetic.traverse.output_layer"),
        *slow(
            ("vision.proj2.weight", "arithmetic.projector.proj2"),
            ("decoder.layers.1.attention_norm.weight", "arithmetic.traverse.layers.0.gate"),
            ("decoder.layers.2.mlp.down.weight", "arithmetic.traverse.layers.2.pass1.down"),
            ("decoder.layers.4.mlp.up.weight", "arithmetic.traverse.layers.4.pass1.mlp"),
            ("decoder.norm.weight", "arithmetic.traverse.norm"),
        ),
    ],
)
def test_a_flipped_weight(tensor: str, stage: str, copy: Path) -> None:
    """The sign of one number among four million."""
    alter(copy, tensor, flip_sign)
    assert first_wrong(copy) == stage


def test_a_flipped_weight_of_one_head(copy: Path) -> None:
    """Query, key and value weights are one tensor: the stage says which of them it was."""
    spec = Bundle(copy).manifest.spec
    keys = spec.num_heads * spec.head_dim
    values = keys + spec.num_kv_heads * spec.head_dim

    def flip_in(column: int) -> None:
        def change(bits: Any) -> None:
            part = bits[:, column].copy()
            flip_sign(part)
            bits[:, column] = part

        alter(copy, "decoder.layers.2.qkv.weight", change)

    flip_in(values + 3)
    assert first_wrong(copy) == "arithmetic.traverse.layers.2.pass1.values"
    flip_in(keys + 3)
    assert first_wrong(copy) == "arithmetic.traverse.layers.2.pass1.keys"


def test_a_flipped_row_of_the_embedding(copy: Path) -> None:
    """The fault is in the row of a token that the self-test looks up."""
    token = int(selftest.read(Bundle(copy)).cases["picture"].forced[0])
    alter(copy, "embedding", lambda bits: flip_sign(bits[token]))
    assert first_wrong(copy) == "stored.embedding"


def swap_keys_and_values(folder: Path, name: str) -> None:
    """Exchange the key and value columns of a layer."""
    spec = Bundle(folder).manifest.spec
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def change(bits: Any) -> None:
        bits[..., q:] = np.concatenate((bits[..., q + kv :], bits[..., q : q + kv]), axis=-1)

    alter(folder, name, change)


def test_swapped_keys_and_values(copy: Path) -> None:
    """In one layer."""
    swap_keys_and_values(copy, "decoder.layers.3.qkv.weight")
    assert first_wrong(copy) == "arithmetic.traverse.layers.3.pass1.keys"


def test_wrong_rope_tables(copy: Path) -> None:
    """Frequencies of another theta, from the second row on."""

    def change(bits: Any) -> None:
        table = bits.view(np.float32)
        powers = 10000.0 ** (np.arange(table.shape[1]) / table.shape[1])
        table[:] = np.cos(np.arange(len(table))[:, None] / powers)

    alter(copy, "rope.cos", change)
    report = verify.verify(copy)
    assert report.first_wrong is not None and report.first_wrong.name == "rope"
    wrong = {stage.name for stage in report.stages if not stage.good}
    assert "traverse.layers.0.pass1.keys" in wrong and "traverse.layers.0.pass1.values" not in wrong


def exchange(folder: Path, graph: str, one: str, other: str) -> None:
    """Let a graph read two of its inputs in each other's place."""
    import onnx

    path = folder / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    names = {one: other, other: one}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, path)
    rehash(folder)


def test_wrong_rope_in_a_graph(copy: Path) -> None:
    """The tables are right, but a graph takes the one for the other."""
    exchange(copy, "traverse", "rope.cos", "rope.sin")
    assert first_wrong(copy) == "arithmetic.traverse.layers.0.pass1.keys"


def test_a_wrong_step(copy: Path) -> None:
    """The prompt is right, and the step reads another layer's weights."""
    exchange(copy, "step", "decoder.layers.1.qkv.weight", "decoder.layers.2.qkv.weight")
    assert first_wrong(copy) == "arithmetic.step.layers.1.keys"


def test_a_wrong_second_text_graph(copy: Path) -> None:
    """traverse_text computes the part after the picture, and its faults show, too."""
    exchange(copy, "traverse_text", "decoder.layers.0.mlp.gate.weight", "decoder.layers.0.mlp.up.weight")
    assert first_wrong(copy) == "arithmetic.traverse_text.layers.0.pass1.mlp"


@pytest.mark.parametrize("wrong", ["statistics", "size"])
def test_wrong_picture_settings(wrong: str, copy: Path) -> None:
    """ImageNet's mean and deviation instead of CLIP's; and channels in another order."""
    image = Bundle(copy).manifest.image
    if wrong == "statistics":
        changed = dataclasses.replace(image, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    else:
        changed = dataclasses.replace(image, mean=image.mean[::-1], std=image.std[::-1])
    rehash(copy, image=changed)
    report = verify.verify(copy)
    assert report.first_wrong is not None and report.first_wrong.name == "preprocess"
    assert "the picture settings in bundle.json" in report.verdict


# -- on the stand-in for a GPU -----------------------------------------------------------------------------------------

GPU = Gpu("stand-in for Orin", "8.7", 8 << 30, (12, 6))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Give a folder engines, as if built here: of its own graphs, or of another folder's."""
    from tests.test_trt import add_engines

    cuda = trt_standin.CudaRuntime()
    library = Library(trt_standin.module("tensorrt", "10.3.0", cuda))
    monkeypatch.setattr(trt_module, "load", lambda name: library)
    monkeypatch.setattr(trt_module, "open_cuda", lambda: CudaPython(cuda))
    monkeypatch.setattr(trt_module, "devices", lambda: [GPU])

    def engines(folder: Path, title: str = library.title) -> Path:
        add_engines(folder, Key("tensorrt", title, GPU.name, GPU.capability, "12.6"))
        return folder

    return engines


@pytest.mark.slow
def test_engines(exported: Callable[..., Path], stand_in: Callable[..., Path], tmp_path: Path) -> None:
    """They pass; those of another TensorRT or checkpoint are recognised by their key, wrong ones by their numbers."""
    folder = tmp_path / "bundle"
    shutil.copytree(exported(NANO, target="tensorrt"), folder)
    report = verify.verify(stand_in(folder))
    assert report.first_wrong is None
    assert report.runs_on.startswith("TensorRT 10.3.0 on stand-in for Orin, driver 12.6, engines ")
    assert len([stage for stage in report.stages if "pass2" in stage.name]) == 16  # both sets come down

    shutil.rmtree(folder / "engines")
    report = verify.verify(stand_in(folder, "TensorRT 10.7.0"))
    assert report.first_wrong is not None and report.first_wrong.name == "engines"
    assert "built with library 'TensorRT 10.7.0', but here is 'TensorRT 10.3.0'" in report.verdict

    shutil.rmtree(folder / "engines")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    alter(
        other, "vision.layers.2.out.weight", lambda bits: np.negative(bits.view(np.float16), out=bits.view(np.float16))
    )
    shutil.copytree(stand_in(other) / "engines", folder / "engines")
    report = verify.verify(folder)
    assert report.first_wrong is not None and report.first_wrong.name == "engines"
    assert "built from other weights than the bundle has now" in report.verdict
    bundle = Bundle(folder)
    weights = bundle.manifest.files[WEIGHTS].sha256
    write(folder_of(bundle, "tensorrt"), dataclasses.replace(read(bundle, "tensorrt"), weights_sha256=weights))
    assert first_wrong(folder) == "vision"


@pytest.mark.slow
def test_an_overflow_in_fp16(
    exported: Callable[..., Path],
    stand_in: Callable[..., Path],
    tmp_path: Path,
    traces: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values beyond 65504 in one layer, in a bundle whose calibration did not see them: infinite, named there."""
    import torch
    from safetensors.torch import load_file, save_file

    from tests.statistics import statistics_of
    from trol_edge.export import pipeline
    from trol_edge.export.quantize import half
    from trol_edge.export.quantize.recipes import RecipeOptions

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(NANO, checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    for name in [n for n in tensors if n.startswith("model.layers.2.attention.w")]:
        tensor = tensors[name].float()
        if ".wqkv." in name and not name.endswith("lora_A.weight"):
            tensor.view(2, 4, 32, -1)[:, 3] *= 2.0**16  # the rows of values, after two query heads and one of keys
        elif ".wo." in name and not name.endswith("lora_B.weight"):
            tensor *= 2.0**-16
        tensors[name] = tensor
    save_file(tensors, checkpoint / "model.safetensors")
    monkeypatch.setattr(half, "find_overflows", lambda statistics: ())
    for name, source in (("plain", NANO), ("large", checkpoint)):
        pipeline.export(
            source, tmp_path / name, target="tensorrt", options=RecipeOptions(recipe="fp16"), calibration=statistics_of
        )
    assert first_wrong(stand_in(tmp_path / "plain")) == "nothing"
    report = verify.verify(stand_in(tmp_path / "large"))
    wrong = report.first_wrong
    assert wrong is not None and wrong.name == "traverse.layers.2.pass1.values"
    assert "NaN or infinite (FP16 ends at 65504)" in wrong.text
    assert torch.isfinite(torch.from_numpy(selftest.read(Bundle(tmp_path / "large")).cases["picture"].cache)).all()
    json.dumps(report.json(), allow_nan=False)


# -- rounded weights ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["int8", "int4"])
def rounded(
    request: pytest.FixtureRequest, exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """trol-nano in a precision with rounded weights; a copy, because what passes is noted in the folder."""
    folder = tmp_path_factory.mktemp("rounded") / "bundle"
    shutil.copytree(exported(NANO, recipe=request.param), folder)
    return folder


@pytest.mark.slow
def test_rounded_weights(rounded: Path, tmp_path: Path) -> None:
    """Within the budget; and faults that rounding cannot explain are out of it."""
    assert first_wrong(rounded) == "nothing"
    folder = tmp_path / "bundle"
    shutil.copytree(rounded, folder)
    swapped = "decoder.layers.3.qkv.weight"
    if swapped in Bundle(folder).weights().tensors:  # int4 is stored in blocks
        swap_keys_and_values(folder, swapped)
        swap_keys_and_values(folder, f"{swapped}.scale")
        assert first_wrong(folder) == "arithmetic.traverse.layers.3.pass1.keys"
    shutil.rmtree(folder)
    shutil.copytree(rounded, folder)
    exchange(folder, "traverse", "rope.cos", "rope.sin")
    assert first_wrong(folder) == "arithmetic.traverse.layers.0.pass1.keys"
    shutil.rmtree(folder)
    shutil.copytree(rounded, folder)
    alter(folder, "vision.proj2.weight", lambda bits: bits.__setitem__((slice(None), slice(0, 8)), 0))
    assert first_wrong(folder) == "arithmetic.projector.proj2"


def test_budgets_of_deep_models() -> None:
    """Budgets are as measured to the depth of the small models, then larger, but below what unrelated values drift."""
    keys, values = budgets.BUDGETS["int8"].keys, budgets.BUDGETS["int8"].values
    assert [budgets.at_depth(layers, keys) for layers in (1, budgets.SMALL)] == [keys, keys]
    assert budgets.at_depth(4 * budgets.SMALL, keys) == pytest.approx(2 * keys)
    assert budgets.at_depth(32, values) == 0.9 < budgets.UNRELATED
    # TroL-3.8B's shape, int8, random weights: keys of layer 0 to 31, logits, tower.
    for layers, found in ((1, 0.057), (8, 0.146), (16, 0.158), (32, 0.253)):
        assert found < budgets.at_depth(layers, keys) < 4.5 * found
    assert budgets.at_depth(32, budgets.BUDGETS["int8"].logits) > 0.224
    assert budgets.at_depth(24, budgets.BUDGETS["int8"].vision) > 0.033


# -- the first load ----------------------------------------------------------------------------------------------------


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """One entry per replay that was made; a cache folder of its own."""
    made: list[str] = []
    replay = verify.replay

    def counted(model: Model, *rest: Any) -> Any:
        made.append(str(model.bundle.folder))
        return replay(model, *rest)

    monkeypatch.setattr(verify, "replay", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(passed.SWITCH)
    return made


def test_once_per_machine_library_and_bundle(copy: Path, replays: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first load replays, later ones do not; another machine, another library or other weights do again."""
    Runtime(copy).close()
    (record,) = copy.glob("verified-*.json")
    assert json.loads(record.read_text())["runs_on"].startswith("onnxruntime ")
    Runtime(copy).close()
    assert len(replays) == 1
    here = machine.read()
    monkeypatch.setattr(machine, "read", lambda: dataclasses.replace(here, fingerprint="another"))
    assert passed.passed_here(Bundle(copy)) == []
    Runtime(copy).close()
    Runtime(copy).close()
    assert len(replays) == 2 and len(list(copy.glob("verified-*.json"))) == 2
    monkeypatch.undo()
    assert len(passed.passed_here(Bundle(copy))) == 1


def test_what_turns_it_off(copy: Path, replays: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The option, and the environment; an explicit True wins over that."""
    Runtime(copy, selftest=False).close()
    monkeypatch.setenv(passed.SWITCH, "0")
    Runtime(copy).close()
    assert replays == [] and not list(copy.glob("verified-*"))
    Runtime(copy, selftest=True).close()
    assert len(replays) == 1


def test_a_wrong_bundle_is_not_loaded(copy: Path, replays: list[str]) -> None:
    """The stage and what to do are in the error; nothing is noted, so the next load says so again."""
    alter(copy, "decoder.layers.2.mlp.down.weight", flip_sign)
    for _ in range(2):
        with pytest.raises(
            VerifyError, match=r"goes wrong at arithmetic.traverse.layers.2.pass1.down: drift .* budget of fp32"
        ):
            Runtime(copy)
    assert len(replays) == 2 and not list(copy.glob("verified-*"))
    with Runtime(copy, selftest=False) as runtime:
        assert runtime.generate("What is this?", max_new_tokens=1).token_ids


@pytest.mark.slow
def test_worse_rounding_is_a_warning(
    rounded: Path, replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A large model may round more than the small ones; what no rounding does is refused."""
    copy = tmp_path / "bundle"
    shutil.copytree(rounded, copy, ignore=shutil.ignore_patterns("verified-*"))
    tight = budgets.Budget(embedding=1e-3, vision=1e-9, keys=1e-9, values=1e-9, logits=1e-9)
    monkeypatch.setattr(budgets, "APART", 0.0)
    monkeypatch.setattr(budgets, "BUDGETS", dict.fromkeys(budgets.BUDGETS, tight))
    with caplog.at_level(logging.WARNING):
        Runtime(copy).close()
    assert "goes wrong at vision" in caplog.text and "good enough" in caplog.text and not list(copy.glob("verified-*"))
    monkeypatch.setattr(budgets, "UNRELATED", 1e-10)
    with pytest.raises(VerifyError, match="goes wrong at vision"):
        Runtime(copy)


def test_read_only_bundles(
    copy: Path, replays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The record goes to the cache folder; where that cannot be written either, nothing is replayed at every load."""
    access = passed.os.access
    locked = {copy}
    monkeypatch.setattr(passed.os, "access", lambda path, mode: path not in locked and access(path, mode))
    Runtime(copy).close()
    Runtime(copy).close()
    assert len(replays) == 1 and not list(copy.glob("verified-*"))
    (record,) = (tmp_path / "cache" / "trol-edge").glob("verified-*.json")
    record.unlink()
    locked.add(record.parent)
    with caplog.at_level(logging.WARNING):
        Runtime(copy).close()
    assert len(replays) == 1 and "run `trol-edge verify` once" in caplog.text


def test_two_first_loads_at_once(copy: Path, replays: list[str]) -> None:
    """Both pass, and one record is left, whole."""
    errors: list[BaseException] = []

    def load() -> None:
        try:
            Runtime(copy).close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    (record,) = copy.glob("*verified-*")
    json.loads(record.read_text())


# -- bad input, and the command line -----------------------------------------------------------------------------------


def test_no_selftest(copy: Path, replays: list[str]) -> None:
    """A bundle of before, or one that was made without: verify says so, a Runtime loads it."""
    manifest = Bundle(copy).manifest
    files = {name: info for name, info in manifest.files.items() if name != SELFTEST}
    (copy / SELFTEST).unlink()
    write_manifest(copy, dataclasses.replace(manifest, files=files))
    with pytest.raises(
        BundleError,
        match=r"has no self-test to check its numbers with \(made by an older version, or with --no-selftest\)",
    ):
        verify.verify(copy)
    Runtime(copy).close()
    assert replays == []


def test_a_malformed_selftest(copy: Path) -> None:
    """Right by its hash, but not what this version reads."""
    path = copy / SELFTEST
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"picture.forced"', b'"picture.forces"'))
    rehash(copy)
    with pytest.raises(BundleError, match=r"not a self-test of this version \(KeyError: 'picture.forced'\)"):
        verify.verify(copy)
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"selftest.safetensors has \d+ bytes instead of"):
        verify.verify(copy)


def test_the_command(copy: Path, replays: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A table, one line per layer; --all; --json; exit code 1 with the stage; and what passed is noted."""
    assert cli.main(["verify", str(copy)]) == 0
    text = capsys.readouterr().out
    assert "traverse.layers.4" in text and "stages of the self-test are within the budget of fp32" in text
    assert len(text.splitlines()) < 40
    assert len(passed.passed_here(Bundle(copy))) == 1
    assert cli.main(["verify", str(copy), "--all"]) == 0
    assert "traverse.layers.4.pass2.values" in capsys.readouterr().out
    alter(copy, "decoder.lm_head.weight", flip_sign)
    assert cli.main(["verify", str(copy), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["passed"], data["first_wrong"]) == (False, "arithmetic.traverse.output_layer")
    assert next(s["name"] for s in data["stages"] if not s["good"]) == "arithmetic.traverse.output_layer"


def test_a_drift_that_is_no_number_is_not_within_a_budget() -> None:
    """A back end that computes NaN must not pass, whatever the budget."""
    for drift in (math.nan, math.inf, 0.2):
        assert not budgets.Stage("traverse.logits", drift, 0.1).good
    assert budgets.Stage("traverse.logits", 0.1, 0.1).good
