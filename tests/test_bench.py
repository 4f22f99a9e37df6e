"""The benchmark runs, and writes what its readers expect. Nothing here looks at how fast anything is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trol_edge.bundle import Bundle
from trol_edge.errors import UsageError
from trol_edge.export import bench
from trol_edge.export.models import shipped_folder

NANO = shipped_folder("trol-nano")
SPREAD = {"median", "min", "max"}


@pytest.fixture(scope="module")
def result(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    few = dataclasses.replace(bench.SHAPES["nano"], repeats=1, decode=3, own_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.SHAPES, "nano", few)
        folder = tmp_path_factory.mktemp("bench")
        return bench.bench(("nano",), rounds=1, peers=False, folder=folder, bundles={"nano": nano_bundle})


def positive(spread: dict[str, float]) -> bool:
    return set(spread) == SPREAD and 0 < spread["min"] <= spread["median"] <= spread["max"]


def test_the_machine_is_described(result: dict[str, Any]) -> None:
    machine = result["machine"]
    assert set(machine) == {"cpu", "system", "cores", "ram_bytes", "read_gb_per_s", "others_cpus", "versions"}
    assert machine["cores"] >= 1 and machine["ram_bytes"] > 0 and machine["read_gb_per_s"] > 0
    assert {"python", "trol-edge", "onnxruntime", "torch"} <= set(machine["versions"])


def test_bundle_and_reference_stand_side_by_side(result: dict[str, Any]) -> None:
    (shape,) = result["shapes"]
    assert (shape["shape"], shape["model"], shape["weights"]) == ("nano", "trol-nano", "trained")
    assert shape["prompts"]["picture"]["image_tokens"] == 64 < shape["prompts"]["picture"]["tokens"]
    assert shape["prompts"]["text"]["image_tokens"] == 0 < shape["prompts"]["text"]["tokens"]
    assert [row["contender"] for row in shape["contenders"]] == ["trol-edge bundle", "torch reference"]
    for row in shape["contenders"]:
        assert row["error"] is None
        assert (row["prefill_passes"], row["decode_passes"]) == (2, 1)
        assert row["peak_bytes"] > 0 and row["load_s"] > 0 and row["step_weight_bytes"] > 0
        assert set(row["prompts"]) == {"picture", "text"}
        for prompt, numbers in row["prompts"].items():
            assert positive(numbers["prefill_tokens_per_s"]) and positive(numbers["decode_tokens_per_s"])
            assert positive(numbers["vision_ms"]) if prompt == "picture" else numbers["vision_ms"] is None


def test_the_runtimes_own_cost_is_what_the_inference_call_leaves(result: dict[str, Any]) -> None:
    own = result["shapes"][0]["own_cost"]
    assert all(positive(own[name]) for name in ("step_ms", "inference_ms", "own_ms"))
    assert own["inference_ms"]["median"] < own["step_ms"]["median"]


def test_numbers_are_json_and_print(result: dict[str, Any]) -> None:
    again = json.loads(json.dumps(result))
    again["shapes"][0]["contenders"].append(bench._row("F16", bench.NOT_INSTALLED))
    console = Console(width=128)
    with console.capture() as captured:
        bench.show(again, console)
    text = captured.get()
    assert bench.NOT_INSTALLED in text and "2/1" in text and "own" in text


def test_a_contender_that_fails_has_its_error_in_its_row(nano_bundle: Path, tmp_path: Path) -> None:
    job = bench.Job("bundle", str(NANO), str(tmp_path), "", {"text": [1]}, None, bench.SHAPES["nano"], 1)
    sample = bench._run_job(job)
    assert "no bundle.json" in sample["error"]
    good = dataclasses.replace(job, bundle=str(nano_bundle))
    (row,) = bench._summary("nano", good, {"bundle": [sample]})["contenders"]
    assert row["error"] == sample["error"] and not row["prompts"]


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="huge"):
        bench.bench(("huge",))
    with pytest.raises(UsageError, match="rounds"):
        bench.bench(("nano",), rounds=0)


def test_stand_in_tokenizer_speaks_every_id(nano_bundle: Path) -> None:
    manifest = Bundle(nano_bundle).manifest
    spec = dataclasses.replace(manifest.spec, vocab_size=92544, image_token_id=92544)
    tokenizer = bench.stand_in_tokenizer(spec, manifest.prompt)
    assert tokenizer.special_id(manifest.prompt.image) == 92544
    assert all(tokenizer.decode([i]) for i in (100, 92543))


def test_gguf_has_the_decoders_shape(nano_bundle: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    spec = Bundle(nano_bundle).manifest.spec
    for kind in ("F16", "Q8_0"):
        bench.write_gguf(tmp_path / "model.gguf", spec, kind)
        read = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
        shapes = bench.gguf_tensors(spec)
        assert {name: tuple(reversed(t.shape.tolist())) for name, t in read.items()} == shapes
        assert all(t.n_bytes == bench._ggml_bytes(name, shapes[name], kind) for name, t in read.items())
