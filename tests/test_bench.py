"""The benchmark runs, and writes what its readers expect. Nothing here looks at how fast anything is."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.bench import contenders, peers
from tests.bench import speed as bench
from trol_edge.bundle.manifest import Bundle
from trol_edge.errors import UsageError
from trol_edge.export.reference.hub import shipped_folder

NANO = shipped_folder("trol-nano")
SPREAD = {"median", "min", "max"}


@pytest.fixture(scope="module")
def result(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    few = dataclasses.replace(bench.SHAPES["nano"], repeats=1, decode=3, own_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.SHAPES, "nano", few)
        folder = tmp_path_factory.mktemp("bench")
        given = {("nano", name): nano_bundle for name in contenders.OURS}
        only = ("fp32", "int8", "torch")
        return bench.bench(("nano",), rounds=1, only=only, folder=folder, bundles=given)


def positive(spread: dict[str, float]) -> bool:
    return set(spread) == SPREAD and 0 < spread["min"] <= spread["median"] <= spread["max"]


@pytest.mark.slow
def test_the_machine_is_described(result: dict[str, Any]) -> None:
    machine = result["machine"]
    assert set(machine) == {"cpu", "system", "cores", "ram_bytes", "read_gb_per_s", "others_cpus", "versions"}
    assert machine["cores"] >= 1 and machine["ram_bytes"] > 0 and positive(machine["read_gb_per_s"])
    assert {"python", "trol-edge", "onnxruntime", "torch"} <= set(machine["versions"])


@pytest.mark.slow
def test_bundle_and_reference_stand_side_by_side(result: dict[str, Any]) -> None:
    (shape,) = result["shapes"]
    assert (shape["shape"], shape["model"], shape["weights"]) == ("nano", "trol-nano", "trained")
    assert shape["prompts"]["picture"]["image_tokens"] == 64 < shape["prompts"]["picture"]["tokens"]
    assert shape["prompts"]["text"]["image_tokens"] == 0 < shape["prompts"]["text"]["tokens"]
    assert [row["contender"] for row in shape["contenders"]] == ["trol-edge bundle"] * 2 + ["torch reference"]
    for row in shape["contenders"]:
        assert row["error"] is None
        assert (row["prefill_passes"], row["decode_passes"]) == (2, 1)
        assert row["peak_bytes"] > 0 and row["load_s"] > 0
        assert 0 < row["step_weight_bytes"] < row["weight_bytes"]
        assert set(row["prompts"]) == {"picture", "text"}
        for prompt, numbers in row["prompts"].items():
            assert positive(numbers["prefill_tokens_per_s"]) and positive(numbers["decode_tokens_per_s"])
            assert positive(numbers["vision_ms"]) if prompt == "picture" else numbers["vision_ms"] is None


@pytest.mark.slow
def test_the_runtimes_own_cost_is_what_the_inference_call_leaves(result: dict[str, Any]) -> None:
    own = result["shapes"][0]["own_cost"]
    assert all(positive(own[name]) for name in ("step_ms", "inference_ms", "own_ms"))
    assert own["inference_ms"]["median"] < own["step_ms"]["median"]


@pytest.mark.slow
def test_numbers_are_json_and_print(result: dict[str, Any]) -> None:
    again = json.loads(json.dumps(result))
    again["shapes"][0]["contenders"].append(bench.row_of("Q4_0", "not installed ('gguf')"))
    console = Console(width=128)
    with console.capture() as captured:
        bench.show(again, console)
    text = captured.get()
    assert "llama.cpp Q4_0: not installed ('gguf')" in text and "2/1" in text and "own" in text
    assert "peak memory / weights held, INT8" in text


def test_a_contender_that_fails_has_its_error_in_its_row(nano_bundle: Path, tmp_path: Path) -> None:
    job = contenders.Task("int8", str(NANO), str(tmp_path), "", {"text": [1]}, None, bench.SHAPES["nano"], 1)
    sample = bench.run_task(job)
    assert "no bundle.json" in sample["error"]
    good = dataclasses.replace(job, bundle=str(nano_bundle))
    (row,) = bench.summary("nano", {"int8": good}, {"int8": [sample]})["contenders"]
    assert row["error"] == sample["error"] and not row["prompts"]


@pytest.mark.slow
def test_half_of_the_second_passes(tmp_path: Path) -> None:
    """A contender of its own: the same weights, a second pass in the first half of the layers, passes as they are."""
    bundle = bench.prepare(
        bench.SHAPES["nano"], ["int8-half"], tmp_path, {}, {"int8-half": sys.executable}, {}, lambda line: None
    )["int8-half"].bundle
    manifest = Bundle(bundle).manifest
    assert (manifest.plan.recipe, manifest.spec.traversed) == ("int8", (0, 1, 2, 3))
    few = dataclasses.replace(bench.SHAPES["nano"], repeats=1, decode=2, own_steps=2)
    job = contenders.Task("int8-half", str(NANO), bundle, "", {"text": [1, 5, 7]}, None, few, 1)
    (row,) = bench.summary("nano", {"int8-half": job}, {"int8-half": [bench.run_task(job)]})["contenders"]
    assert row["error"] is None and row["prefill_passes"] == 1.5


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="huge"):
        bench.bench(("huge",))
    with pytest.raises(UsageError, match=r"F16.*none of.*Q4_0"):
        bench.bench(("nano",), only=("F16",))
    with pytest.raises(UsageError, match="rounds"):
        bench.bench(("nano",), rounds=0)


def test_stand_in_tokenizer_speaks_every_id(nano_bundle: Path) -> None:
    manifest = Bundle(nano_bundle).manifest
    spec = dataclasses.replace(manifest.spec, vocab_size=92544, image_token_id=92544)
    tokenizer = contenders.stand_in_tokenizer(spec, manifest.prompt)
    assert tokenizer.special_id(manifest.prompt.image) == 92544
    assert all(tokenizer.decode([i]) for i in (100, 92543))


def test_gguf_has_the_decoders_shape(nano_bundle: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    spec = Bundle(nano_bundle).manifest.spec
    for kind in ("Q8_0", "Q4_0"):
        contenders.write_gguf(tmp_path / "model.gguf", spec, kind)
        read = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
        shapes = contenders.gguf_tensors(spec)
        assert {name: tuple(reversed(t.shape.tolist())) for name, t in read.items()} == shapes
        assert all(t.n_bytes == contenders.ggml_bytes(name, shapes[name], kind) for name, t in read.items())


def test_targets_are_judged_by_what_was_measured() -> None:
    def row(name: str, prefill: float, decode: float) -> dict[str, Any]:
        rates = {"prefill_tokens_per_s": {"median": prefill}, "decode_tokens_per_s": {"median": decode}}
        made = bench.row_of(name, None) | {"prompts": {"long": rates}, "peak_bytes": 130, "weight_bytes": 100}
        return made

    rows = [row("int8", 80, 10), row("Q8_0", 60, 9), row("Q4_0", 90, 20), row("int4", 80, 19)]
    rows.append(row("int8-half", 100, 10) | {"peak_bytes": 131})
    found = {t["what"]: (round(t["ratio"], 3), t["met"]) for t in bench.targets(rows, "long")}
    assert found == {
        "prefill, one pass (each of our two passes counted) / llama.cpp's best": (1.778, True),
        "whole two-pass traverse / llama.cpp's best single pass": (0.889, True),
        "prefill, one pass, INT4 / llama.cpp's best": (1.778, True),
        "prefill, second pass in half of the layers / in all": (1.25, True),
        "decode, 8 bits / llama.cpp Q8_0": (1.111, True),
        "decode, 4 bits / llama.cpp Q4_0": (0.95, False),
        "peak memory / weights held, INT8": (1.3, True),
        "peak memory / weights held, INT4": (1.3, True),
        "peak memory / weights held, INT8, second pass in half": (1.31, False),
    }
    assert bench.targets(rows, "text") == []


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path) -> None:
    said = bench.absent("openvino", str(tmp_path / "python"))
    assert said is not None and "does not run" in said
    kind = dataclasses.replace(contenders.CONTENDERS["Q4_0"], modules=("json", "no_such_module"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(contenders.CONTENDERS, "Q4_0", kind)
        said = bench.absent("Q4_0", sys.executable)
    assert said is not None and "'no_such_module'" in said and "pip install llama-cpp-python gguf" in said


def test_a_peer_whose_model_cannot_be_made_does_not_stop_the_others(nano_bundle: Path, tmp_path: Path) -> None:
    broken = dataclasses.replace(contenders.CONTENDERS["Q4_0"], prepare="no_such_function", modules=("json",))
    failed: dict[str, str | None] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(contenders.CONTENDERS, "Q4_0", broken)
        bundles, pythons = {"int8": nano_bundle}, {"int8": sys.executable, "Q4_0": sys.executable}
        shape = bench.SHAPES["nano"]
        jobs = bench.prepare(shape, ("int8", "Q4_0"), tmp_path, bundles, pythons, failed, lambda line: None)
    assert set(jobs) == {"int8"} and "no_such_function" in str(failed["Q4_0"])


def test_an_environment_for_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip says last is why there is none; without an environment the peer is looked for here."""
    assert peers.python_of("OpenVINO", tmp_path) == sys.executable
    python = tmp_path / "openvino" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    said = subprocess.CompletedProcess([], 1, "", "first\nERROR: No matching distribution found for nothing\n")
    monkeypatch.setattr(peers.subprocess, "run", lambda *a, **b: said)
    assert peers.make("OpenVINO", ("nothing",), tmp_path) == "ERROR: No matching distribution found for nothing"
    assert peers.python_of("OpenVINO", tmp_path) == str(python)


def test_a_run_that_is_stopped_has_the_rows_so_far(
    nano_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"vision_s": [], "prefill_s": [1.0], "step_s": [1.0]}
    sizes = {"load_s": 1.0, "peak_bytes": 2, "step_bytes": 1, "weight_bytes": 1}
    taken: list[str] = []

    def run(job: Any, python: str) -> dict[str, Any]:
        if taken:
            raise KeyboardInterrupt
        taken.append(job.contender)
        return {**sizes, "times": dict.fromkeys(job.prompts, times)}

    monkeypatch.setattr(bench, "run_task", run)
    given = {("nano", name): nano_bundle for name in contenders.OURS}
    found = bench.bench(("nano",), rounds=2, only=("fp32", "int8"), folder=tmp_path, bundles=given)
    (shape,) = found["shapes"]
    rows = {row["name"]: row["error"] for row in shape["contenders"]}
    assert found["stopped"] and rows == {"fp32": None, "int8": "the run was stopped before"}
    bench.show(found, Console(file=io.StringIO()))
