"""A second pass in chosen layers only: another model, and everything about it exact."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from tests.conftest import CHECKPOINTS, NANO, NANOS, slow
from tests.test_prefix import EXACT, answer, off
from tests.test_pruning import PRUNED, Asked, question
from trol_edge.bundle.folder import digest_of
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.sizes import cache_bytes
from trol_edge.calibration.compare import compare, summary
from trol_edge.calibration.samples import load
from trol_edge.errors import BundleError, UsageError
from trol_edge.machine.devices import find
from trol_edge.measure.bench import bundle_id
from trol_edge.plan.memory import memory_of
from trol_edge.plan.rates import platform_of
from trol_edge.plan.subject import subject_of
from trol_edge.runtime import Runtime
from trol_edge.verify.replay import verify

CHOSEN = {"trol-nano": (1, 3), "trol-nano-phi3": (0, 1)}  # layers, of 8 each
TEXT = {"trol-nano": "1,3", "trol-nano-phi3": "2"}


@pytest.fixture(scope="session", params=[NANOS[0], *slow(NANOS[1])])
def chosen_bundle(request: pytest.FixtureRequest, exported: Callable[..., Path]) -> Path:
    """Bundle of each shipped model with a second pass in two layers."""
    return exported(CHECKPOINTS / request.param, traversal=TEXT[request.param])


@pytest.fixture
def asked(chosen_bundle: Path) -> Asked:
    """The question to it."""
    return question(Runtime(chosen_bundle))


def layers_of(ports: Any, start: str) -> list[int]:
    """The layers of cache tensors whose names begin so."""
    return [int(port.name.removeprefix(start)) for port in ports if port.name.startswith(start)]


def test_a_reference_with_the_same_passes(asked: Asked, no_gradients: None) -> None:
    """PyTorch, layer by layer: the prompt with a picture, and a step after it. All passes give something else."""
    import torch

    from trol_edge.export.reference.checkpoint import Checkpoint
    from trol_edge.export.reference.layerwise import rope_of
    from trol_edge.export.reference.model import EagerAttention

    manifest = asked.runtime.bundle.manifest
    spec, source = manifest.spec, Checkpoint(CHECKPOINTS / manifest.model)
    assert spec.traversed == CHOSEN[manifest.model]
    whole: Any = source.family.decoder(source.spec)
    source.load_into(decoder=whole)
    mask = asked.ids == spec.image_token_id
    x = asked.runtime.model.embeddings[asked.ids].copy()
    x[mask] = asked.features.reshape(-1, spec.hidden_size)
    lora = torch.from_numpy(mask).float()[None, :, None] if spec.lora_rank else None
    session = asked.runtime.session()
    ours = [asked.prefill(session, 1.0)]
    ours.append(session.step(5))
    attend = EagerAttention(spec, *rope_of(spec, len(mask) + 1))
    attend.positions = torch.arange(len(mask))
    hidden = torch.from_numpy(x)[None]
    for i, layer in enumerate(whole.layers):  # written out, not the product's own loop
        first = layer(hidden, lora, i, 0, attend)
        if i in CHOSEN[manifest.model]:
            share = 0.5 * torch.tanh(whole.gate(first)) + 0.5
            hidden = first * (1 - share) + layer(first, lora, i, 1, attend) * share
        else:
            hidden = first
    theirs = [whole.logits(hidden)[0, -1].numpy()]
    attend.positions = torch.tensor([len(mask)])
    after = torch.from_numpy(asked.runtime.model.embeddings[np.array([5])].copy())[None]
    theirs.append(whole.logits(whole.step(after, attend))[0, -1].numpy())
    assert cases.difference(np.stack(ours), np.stack(theirs)) <= cases.TOLERANCE
    chosen: Any = source.family.decoder(spec)  # what export records self-tests from
    source.load_into(decoder=chosen)
    for decoder, of, low, high in ((chosen, spec, 0, cases.TOLERANCE), (whole, source.spec, 100 * cases.TOLERANCE, 1)):
        attend = EagerAttention(of, *rope_of(spec, len(mask)))
        attend.positions = torch.arange(len(mask))
        found = decoder.logits(decoder.traverse(torch.from_numpy(x)[None], lora, attend))[0, -1].numpy()
        assert low <= cases.difference(ours[0], found) <= high


def test_no_second_pass_elsewhere(asked: Asked) -> None:
    """Graphs, caches and buffers have it in the chosen layers only, with prefix reuse and without."""
    manifest = asked.runtime.bundle.manifest
    chosen, total = CHOSEN[manifest.model], manifest.spec.num_layers
    for name, graph in manifest.graphs.items():
        if name.startswith("traverse"):
            assert layers_of(graph.inputs, "past_second_key_") == list(chosen)
            assert layers_of(graph.outputs, "present_second_value_") == list(chosen)
            assert layers_of(graph.inputs, "past_key_") == list(range(total))
            fused = sum(graph.operators.get(op, 0) for op in ("GroupQueryAttention", "Attention"))
            assert fused == total + len(chosen) and graph.operators["Tanh"] == len(chosen)
    first, both = (cache_bytes(manifest.graphs[name].inputs, manifest.context) for name in ("step", "traverse"))
    assert both - first == first * len(chosen) // total
    session = asked.runtime.session()
    want = asked.prefill(session, 1.0)
    state: Any = session.cache.state
    assert sum(a.nbytes for a in (*state.cache, *state.second)) == both == asked.runtime.model.backend.cache_bytes
    once = Runtime(asked.runtime.bundle.folder, prefix_reuse=False)
    session = once.session()
    assert off(asked.prefill(session, 1.0), want) <= 1e-6
    state = session.cache.state
    assert len(state.second) == 2
    assert (
        sum(a.nbytes for a in (*state.cache, *state.second)) == once.model.backend.cache_bytes == first + first // total
    )


@pytest.mark.parametrize("every", [31, *slow(1)])
@pytest.mark.parametrize("share", [1.0, PRUNED])
def test_every_split(asked: Asked, share: float, every: int) -> None:
    """What goes on from a prefix equals a fresh prefill of the same passes."""
    fresh, session = asked.runtime.session(), asked.runtime.session()
    want = asked.prefill(fresh, share)
    greedy = answer(fresh, want, 4)
    asked.prefill(session, share)
    kept = session.fork()
    for split in {*range(1, kept.length, every), kept.length - 1}:
        session = kept.fork()
        session.truncate(split)
        got = asked.prefill(session, share, reuse=True)
        assert session.reused == split
        assert off(got, want) <= EXACT, split
        assert answer(session, got, 4) == greedy, split


def test_chunks_turns_forks_and_beams(asked: Asked) -> None:
    """Both answer modes, chunks, forks, sessions that become others, and beam search."""
    runtime, fresh = asked.runtime, asked.runtime.session()
    want = asked.prefill(fresh, 1.0)
    for chunk in (7, 64):
        assert off(asked.prefill(runtime.session(prefill_chunk=chunk), 1.0), want) <= EXACT
    session = runtime.session()
    token = int(asked.prefill(session, 1.0).argmax())
    twin, other = session.fork(), runtime.session()
    session.step(token)
    got = session.extend([token, 7, 9])
    whole = dataclasses.replace(asked, ids=np.concatenate((asked.ids, [token, token, 7, 9])))
    want = whole.prefill(runtime.session(), 1.0)
    assert off(got, want) <= EXACT
    other.prefill(asked.ids[:5])
    other.become(session)
    want = session.step(3)
    assert off(other.step(3), want) <= EXACT
    for each in [token, token, 7, 9]:
        got = twin.extend([each])
    assert off(twin.step(3), want) <= EXACT
    picture = CHECKPOINTS / runtime.bundle.manifest.model / "scene.png"
    alone = Runtime(runtime.bundle.folder)
    for options in ({"num_beams": 3}, {"answer_mode": "traverse"}):
        given = alone.generate("What is left of the red star?", picture, max_new_tokens=6, **options)
        runtime.generate("Describe the scene.", picture, max_new_tokens=3)
        again = runtime.generate("What is left of the red star?", picture, max_new_tokens=6, **options)
        assert given.token_ids == again.token_ids


def test_the_self_test_follows(chosen_bundle: Path, tmp_path: Path) -> None:
    """It passes, with keys and values of the second pass of the chosen layers only."""
    folder = tmp_path / "bundle"
    shutil.copytree(chosen_bundle, folder)
    report = verify(folder, threads=1)
    assert report.first_wrong is None, report.verdict
    assert report.passes == Bundle(chosen_bundle).manifest.passes and "second pass in" in report.passes
    names = [stage.name for stage in report.stages]
    chosen = CHOSEN[Bundle(chosen_bundle).manifest.model]
    assert {int(n.split(".")[2]) for n in names if n.startswith("traverse.layers.") and "pass2" in n} == set(chosen)
    forced = {int(n.split(".")[3]) for n in names if n.startswith("arithmetic.traverse.layers.") and "pass2" in n}
    assert forced == set(chosen)


def test_plans_count_it(bundle_of: Callable[[str], Path], exported: Callable[..., Path]) -> None:
    """Less memory, and fewer operations of a prompt, by as much as there are fewer second passes."""
    subjects = [subject_of(Bundle(folder)) for folder in (bundle_of("trol-nano"), exported(NANO, traversal="1,3"))]
    machine = platform_of(*find("orin-nano-8gb"))
    dims = {"images": 1, "tokens": 99, "slots": 99}
    memory = [memory_of(s, machine, dims, s.context, True, False, False) for s in subjects]
    assert memory[1].cache * 16 == memory[0].cache * 10
    work = [s.graphs["traverse"].at(tokens=512, slots=512).flops for s in subjects]
    assert 0.61 < work[1] / work[0] < 0.68


def test_profiles_say_so(bundle_of: Callable[[str], Path], exported: Callable[..., Path]) -> None:
    """A bundle of fewer passes is no twin of the model's, and no baseline of it."""
    whole, fewer = (bundle_id(Bundle(f)) for f in (bundle_of("trol-nano"), exported(NANO, traversal="1,3")))
    assert (whole.kind, fewer.kind) == ("fp32", "fp32, second pass in 2 layer(s)")
    assert whole.traversed is None and fewer.traversed == (1, 3)


def test_it_is_compared(bundle_of: Callable[[str], Path], exported: Callable[..., Path]) -> None:
    """With the model itself, in the layers that both pass twice, and in logits."""
    chosen = exported(NANO, traversal="1,3")
    found = compare(bundle_of("trol-nano"), [chosen, bundle_of("trol-nano")], load(None, 2))
    for comparison in found:
        names = [place.name for place in comparison.places if place.name.startswith("decoder.")]
        assert names == ["decoder.layers.1", "decoder.layers.3"]
    row = dict(summary(found))["passes (reference 8 layers x 2 passes)"]
    assert row == ["8 layers, second pass in 2 (1, 3)", "8 layers x 2 passes"]
    assert not any(title.startswith("passes") for title, _ in summary(found[1:]))
    assert found[0].kl_nats > 1e-6 > found[1].kl_nats


# --- the choice ------------------------------------------------------------------------------------------------------


def test_what_is_chosen() -> None:
    """Text and numbers, in any order; all of them is the model itself."""
    from trol_edge.traversal import traversed_layers

    for given, wanted in {
        "all": None,
        "5": None,
        "0-4": None,
        "2": (0, 1),
        "1,3": (1, 3),
        "3, 0-1": (0, 1, 3),
        "4-4": (4,),
    }.items():
        assert traversed_layers(given, 5) == wanted
    assert traversed_layers([3, 1, 1], 5) == (1, 3)
    assert traversed_layers(range(5), 5) is None


BAD: list[Any] = ["", "0", "9", "none", "8-8", "3-1", "1,,2", "-1", "1.5", "1,9", "auto", [], [8], [-1], [True], [1.5]]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_bad_lists(value: Any, tmp_path: Path) -> None:
    """Refused before anything is traced or written."""
    from trol_edge.export.pipeline import export

    with pytest.raises(UsageError, match=r"^traversal .*\d"):
        export(NANO, tmp_path / "bundle", traversal=value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [[], [3, 1], [1, 1], [1, 8], [-1]], ids=repr)
def test_manifests_with_bad_lists(value: list[int], exported: Callable[..., Path], tmp_path: Path) -> None:
    """A bundle that names layers it does not have, or other ones than its graphs pass twice, is not opened."""
    folder = tmp_path / "bundle"
    shutil.copytree(exported(NANO, traversal="1,3"), folder)
    path = folder / "bundle.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["manifest_sha256"]
    data["spec"]["traversed"] = value
    data["manifest_sha256"] = digest_of(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleError, match=r"traversed|inputs for the cache"):
        Bundle(folder)


def test_on_a_gpu(exported: Callable[..., Path]) -> None:
    """Graphs for TensorRT, run by ONNX Runtime: the same as on a CPU, pruned or not, and with a prefix."""
    ours = question(Runtime(exported(NANO, target="tensorrt", traversal="1,3"), provider="cpu"))
    theirs = question(Runtime(exported(NANO, traversal="1,3")))
    ours = dataclasses.replace(ours, features=theirs.features)
    sessions = [asked.runtime.session() for asked in (ours, theirs)]
    for share in (1.0, PRUNED, 1.0):
        one, two = (asked.prefill(s, share, reuse=True) for asked, s in zip((ours, theirs), sessions, strict=True))
        assert off(one, two) <= EXACT
        assert off(*(session.step(7) for session in sessions)) <= EXACT
