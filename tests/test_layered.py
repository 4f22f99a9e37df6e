"""Bundles that hold each 4-bit weight once: passes run layer by layer give what the whole graphs give, to the bit."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import CHECKPOINTS, NANO, NANOS, slow
from trol_edge import Runtime
from trol_edge.bundle.embedding import Embeddings
from trol_edge.bundle.graph_part import SinglePasses
from trol_edge.bundle.manifest import Bundle, write_manifest
from trol_edge.bundle.names import LAYERS, MIX, SINGLE
from trol_edge.bundle.sizes import embedding_bytes
from trol_edge.errors import BackendError, BundleError
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.runtimes import ort
from trol_edge.runtimes.ort import OrtBackend
from trol_edge.verify import replay as verify

Array = NDArray[Any]
RECIPE = "int4-dynamic"
PREFIX, REST, STEPS = 40, 9, 3


def computed(backend: OrtBackend, rope: bool = False) -> list[Array]:
    """Logits of a prompt in two parts, of steps, and of a token with both passes; then the rows of both caches."""
    spec, rng = backend.spec, np.random.default_rng(1)
    rows = rng.standard_normal((PREFIX + REST + STEPS, spec.hidden_size)).astype(np.float32)
    mask = np.zeros(PREFIX, np.bool_)
    mask[7:30] = True
    state = backend.new_state()
    rotary = np.arange(PREFIX, PREFIX + REST) + 2 if rope else None
    found = [
        state.traverse(rows[:PREFIX].copy(), mask if spec.lora_rank else None, long_rope=rope).copy(),
        state.traverse(rows[PREFIX : PREFIX + REST].copy(), None, long_rope=rope, start=PREFIX, rotary=rotary).copy(),
    ]
    end = PREFIX + REST
    found += [state.step(rows[end + i], end + i).copy() for i in range(STEPS)]
    found.append(state.traverse(rows[:1].copy(), None, long_rope=rope, start=end + STEPS).copy())
    positions = np.arange(end + STEPS + 1, dtype=np.int32)
    return found + [row for which in (0, 1) for row in state.rows(positions, which)]


def whole(backend: OrtBackend) -> OrtBackend:
    """The same weights in whole graphs: measurements ask for further outputs, which only these have."""
    backend.layers = None
    return backend


@pytest.mark.parametrize("model", [NANOS[0], *slow(NANOS[1])])
def test_layer_by_layer_is_what_the_whole_graphs_compute(exported: Callable[..., Path], model: str) -> None:
    """With image tokens (and their low-rank terms), with moved rope tables, and after a prefix."""
    bundle = Bundle(exported(CHECKPOINTS / model, recipe=RECIPE))
    backend = OrtBackend(bundle)
    assert not {"traverse", "traverse_text", "step"} & backend.sessions.keys()
    for rope in (False, True):
        mine = computed(backend, rope)
        theirs = computed(whole(OrtBackend(bundle)), rope)
        assert len(mine) == len(theirs) and all(map(np.array_equal, mine, theirs))


@pytest.mark.slow
def test_fewer_second_passes_and_one_scratch_set(exported: Callable[..., Path]) -> None:
    bundle = Bundle(exported(NANO, recipe=RECIPE, traversal="1-3", selftest=False))
    mine = computed(OrtBackend(bundle, prefix_reuse=True))
    theirs = computed(whole(OrtBackend(bundle)))
    assert all(map(np.array_equal, mine, theirs))
    prompt = np.random.default_rng(2).standard_normal((20, bundle.manifest.spec.hidden_size)).astype(np.float32)
    kept, scratch = (OrtBackend(bundle, prefix_reuse=reuse).new_state() for reuse in (True, False))
    assert np.array_equal(kept.traverse(prompt.copy(), None), scratch.traverse(prompt.copy(), None))


@pytest.mark.parametrize("model", [NANOS[0], *slow(NANOS[1])])
def test_passes_chosen_at_run_time(exported: Callable[..., Path], model: str) -> None:
    """As many bits of a bundle that was exported with these passes, with and without its own set of caches."""
    both = exported(CHECKPOINTS / model, recipe=RECIPE)
    few = exported(CHECKPOINTS / model, recipe=RECIPE, traversal="1-2", selftest=False)
    for reuse in (True, False):
        with (
            Runtime(both, traversal=[1, 2], prefix_reuse=reuse) as ours,
            Runtime(few, prefix_reuse=reuse, selftest=False) as theirs,
        ):
            assert ours.model.backend.cache_bytes == theirs.model.backend.cache_bytes
            ids = np.arange(5, 45)
            found = [rt.session().prefill(ids).copy() for rt in (ours, theirs)]
            assert np.array_equal(*found)
    mine, theirs = OrtBackend(Bundle(both)), OrtBackend(Bundle(few))
    mine.second_layers = (1, 2)
    assert all(map(np.array_equal, computed(mine), computed(theirs)))


@pytest.mark.parametrize("reuse", [True, False])
def test_a_long_prompt_passes_each_layer_in_parts(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, reuse: bool
) -> None:
    """No run computes more tokens than a part has, and the numbers are those of calls with a part each, to the bit."""
    bundle = Bundle(exported(NANO, recipe=RECIPE))
    prompt = np.random.default_rng(2).standard_normal((61, bundle.manifest.spec.hidden_size)).astype(np.float32)
    mask = np.zeros(len(prompt), np.bool_)
    mask[9:40] = True
    plain = OrtBackend(bundle).new_state()
    for first, end in itertools.pairwise((0, 15, 30, 45, 61)):
        part = mask[first:end] if mask[first:end].any() else None
        wanted = plain.traverse(prompt[first:end].copy(), part, start=first).copy()
    monkeypatch.setattr(ort, "PREFILL_CHUNK", 20)
    backend, counts = OrtBackend(bundle, prefix_reuse=reuse), []
    run = backend.run_session

    def counted(name: str, session: Any, binding: Any, shrink: bool = False) -> None:
        run(name, session, binding, shrink)
        if name == LAYERS:
            counts.append(binding.get_outputs()[0].shape()[1])

    monkeypatch.setattr(backend, "run_session", counted)
    state = backend.new_state()
    assert np.array_equal(state.traverse(prompt.copy(), mask), wanted)
    assert counts == [15, 15, 15, 16] * 2 * bundle.manifest.spec.num_layers
    for i in range(STEPS):
        assert np.array_equal(state.step(prompt[i], 61 + i), plain.step(prompt[i], 61 + i))


def test_the_table_of_words_has_eight_bits(exported: Callable[..., Path], nano_bundle: Path, tmp_path: Path) -> None:
    """Each row is within half a step of the checkpoint's; a table that is not what the manifest says is refused."""
    bundle, table = Bundle(exported(NANO, recipe=RECIPE)), Checkpoint(NANO).tensor("embedding").float().numpy()
    ids = np.array([3, 700, 4])
    off = np.abs(Embeddings(bundle)[ids] - table[ids]).max(1)
    assert (off > 0).all() and (off <= np.abs(table[ids]).max(1) / 254 * 1.001).all()
    assert np.array_equal(Embeddings(bundle)[4], Embeddings(bundle)[ids][2])
    assert embedding_bytes(bundle) == table.size + 4 * len(table)
    copy = tmp_path / "copy"
    shutil.copytree(nano_bundle, copy)
    manifest = Bundle(copy).manifest
    write_manifest(copy, dataclasses.replace(manifest, plan=dataclasses.replace(manifest.plan, embedding="int8")))
    with pytest.raises(BundleError, match="embedding does not have 8 bits and a scale for each row"):
        Bundle(copy)


def test_it_answers(exported: Callable[..., Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"  # into which verify writes a note
    shutil.copytree(exported(NANO, recipe=RECIPE), copy)
    with Runtime(copy) as rt:
        assert rt.generate("What is left of the red star?", NANO / "scene.png").text == "cyan ring"
    assert verify.verify(copy).first_wrong is None


def test_a_layer_without_its_graph(exported: Callable[..., Path], tmp_path: Path) -> None:
    """A bundle that lacks a graph or a port is refused in one sentence."""
    folder = exported(NANO, recipe=RECIPE)
    model = Bundle(folder).read("layers.onnx")
    with pytest.raises(BundleError, match=r"no graph computes \w+_99; export the bundle again"):
        SinglePasses(model).part(99, {})
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    manifest = Bundle(copy).manifest
    del manifest.graphs[MIX]
    write_manifest(copy, manifest)
    with pytest.raises(BundleError, match="lists no graph mix"):
        Bundle(copy)


def test_each_weight_is_read_by_one_layer(exported: Callable[..., Path]) -> None:
    bundle = Bundle(exported(NANO, recipe=RECIPE))
    model, graph = bundle.read("layers.onnx"), bundle.manifest.graphs[LAYERS]
    found = [
        SinglePasses(model).constants(layer) & set(graph.constants) for layer in range(bundle.manifest.spec.num_layers)
    ]
    assert set().union(*found) == set(graph.constants) and sum(map(len, found)) == len(graph.constants)
    assert any(name.endswith(".nbits") for name in found[0]) and graph.costs is None
    assert {name for name, info in bundle.manifest.graphs.items() if info.costs is None} == SINGLE


def test_no_session_keeps_the_bytes_that_it_is_made_from(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a layer come from a file in memory, which is gone afterwards; other models have no weights."""
    opened: list[str | bytes] = []

    def spied(model: str | bytes, options: Any, providers: list[Any]) -> Any:
        opened.append(model)
        return real(model, options, providers)

    real = ort.open_session
    monkeypatch.setattr(ort, "open_session", spied)
    bundle = Bundle(exported(NANO, recipe=RECIPE))
    OrtBackend(bundle)
    files = [model for model in opened if isinstance(model, str)]
    assert len(files) == bundle.manifest.spec.num_layers and not any(map(os.path.exists, files))
    assert max(len(model) for model in opened if isinstance(model, bytes)) < 10_000


def test_too_little_memory_names_the_recipe_that_takes_least(
    nano_bundle: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "available_memory", lambda: 1000)
    with pytest.raises(BackendError, match="export with --precision int4-dynamic, which takes least, or free memory"):
        OrtBackend(Bundle(nano_bundle))
    with pytest.raises(BackendError, match="are free; free memory, export with a smaller --context"):
        OrtBackend(Bundle(exported(NANO, recipe=RECIPE)))
