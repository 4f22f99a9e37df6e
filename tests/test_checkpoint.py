"""Checkpoints: every published layout reads alike, and everything that can be wrong is said at once."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import cases
from tests.cases import TOLERANCE, difference
from tests.conftest import NANO, context_of, slow
from tests.golden import GOLDEN
from tests.reference import Reference
from trol_edge.bundle.weights import WeightsFile
from trol_edge.errors import CheckpointError, ExportError, UsageError
from trol_edge.export import pipeline
from trol_edge.export.reference import hub as models
from trol_edge.export.reference import internlm2
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.synth import synth
from trol_edge.runtime import Runtime

pytestmark = pytest.mark.heavy

CASE = GOLDEN / "internlm2-text"
POSITIONS = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"
EMBEDDING = "model.tok_embeddings.weight"
NORM = "model.norm.weight"
IDS = [3, 17, 250, 9, 41]

State = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in the published layout, to be changed."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    for name in ("config.json", "clip_vision_config.json", "model.safetensors", "trol_gating.pt"):
        shutil.copyfile(CASE / name, path / name)  # the mode of a read-only original is not wanted
    return path


@pytest.fixture(scope="session")
def state() -> State:
    """The tensors of the checkpoint by their published names."""
    return load_file(CASE / "model.safetensors")


@pytest.fixture
def bundle(traces: dict[Any, Any], tmp_path: Path) -> Callable[[Path], Path]:
    """Bundle of a checkpoint folder that was made here."""

    def make(checkpoint: Path, **options: Any) -> Path:
        out = tmp_path / "out" / checkpoint.name
        pipeline.export(checkpoint, out, context=context_of(CASE.name), overwrite=True, **options)
        return out

    return make


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    data = {key: value for key, value in (data | changes).items() if value is not None}
    path.write_text(json.dumps(data), encoding="utf-8")


def in_shards(state: State, suffix: str) -> tuple[list[State], dict[str, str]]:
    """Three parts and the map of an index."""
    parts: list[State] = [{}, {}, {}]
    where = {}
    for i, (name, tensor) in enumerate(state.items()):
        parts[i % 3][name] = tensor
        where[name] = f"model-0000{i % 3 + 1}-of-00003.{suffix}"
    return parts, where


# -- layouts -----------------------------------------------------------------------------------------------------------


def as_single_file(folder: Path, state: State) -> None:
    """Leave the folder as it is."""


def as_shards(folder: Path, state: State) -> None:
    """model-0000i-of-00003.safetensors and their index."""
    (folder / "model.safetensors").unlink()
    parts, where = in_shards(state, "safetensors")
    for i, part in enumerate(parts):
        save_file(part, folder / f"model-0000{i + 1}-of-00003.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def as_pickle(folder: Path, state: State) -> None:
    """pytorch_model.bin, as older revisions have it."""
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def as_pickle_shards(folder: Path, state: State) -> None:
    """Several .bin files and their index."""
    (folder / "model.safetensors").unlink()
    parts, where = in_shards(state, "bin")
    for i, part in enumerate(parts):
        torch.save(part, folder / f"model-0000{i + 1}-of-00003.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def with_gate_in_safetensors(folder: Path, state: State) -> None:
    """trol_gating.safetensors in place of the pickle."""
    gates = torch.load(folder / "trol_gating.pt", weights_only=True)
    save_file({name: t.clone() for name, t in gates.items()}, folder / "trol_gating.safetensors")
    (folder / "trol_gating.pt").unlink()


def with_old_buffers(folder: Path, state: State) -> None:
    """What old transformers versions saved along is no surprise."""
    more = {
        "vit.vision_tower.vision_model.embeddings.position_ids": torch.arange(577)[None],
        "model.layers.0.attention.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file(state | more, folder / "model.safetensors")


LAYOUTS = [as_single_file, as_shards, as_pickle, as_pickle_shards, with_gate_in_safetensors, with_old_buffers]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_read_alike(folder: Path, state: State, layout: Callable[[Path, State], None]) -> None:
    """Same numbers, names, shapes and dtypes, whatever files they come from."""
    layout(folder, state)
    plain, other = Checkpoint(CASE), Checkpoint(folder)
    assert other.spec == plain.spec
    assert other.notes == plain.notes == []
    assert other.names() == plain.names()
    for name in plain.names():
        assert other.dtype(name) == plain.dtype(name)
        assert other.shape(name) == plain.shape(name) == tuple(other.tensor(name).shape)
        assert torch.equal(other.tensor(name), plain.tensor(name)), name


def test_blocks_make_up_the_tensor(monkeypatch: pytest.MonkeyPatch, folder: Path, state: State) -> None:
    """Read in pieces of a few rows, from either kind of file: the same tensors, no piece larger than asked."""
    from trol_edge.export.reference import checkpoint as module

    whole = {name: Checkpoint(CASE).tensor(name) for name in Checkpoint(CASE).names()}
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 64 * 40)
    for layout in (as_single_file, as_pickle):
        layout(folder, state)
        checkpoint = Checkpoint(folder)
        several = 0
        for name, tensor in whole.items():
            rows = 0
            for start, block in checkpoint.blocks(name):
                assert start == rows
                assert torch.equal(block, tensor[start : start + len(block)])
                rows += len(block)
            several += start > 0
            assert rows == len(tensor)
        assert several > 20


@pytest.mark.slow
def test_weights_file_does_not_depend_on_the_blocks(
    monkeypatch: pytest.MonkeyPatch, bundle: Callable[[Path], Path], folder: Path
) -> None:
    """Transposing block by block gives the same bytes."""
    from trol_edge.export.reference import checkpoint as module

    before = (bundle(folder) / "weights.safetensors").read_bytes()
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 64 * 100)  # of the table, one row is left over
    assert any(len(rows) == 1 for name in Checkpoint(folder).names() for _, rows in Checkpoint(folder).blocks(name))
    assert (bundle(folder) / "weights.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, None, *slow(torch.float32, torch.float16)])
def test_dtypes(folder: Path, state: State, bundle: Callable[[Path], Path], dtype: torch.dtype | None) -> None:
    """Stored as they are, computed in FP32; None: a different one for every other tensor."""
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    changed = {name: t.to(dtype or kinds[i % 3]) for i, (name, t) in enumerate(state.items())}
    save_file(changed, folder / "model.safetensors")
    checkpoint, out = Checkpoint(folder), bundle(folder)
    stored = WeightsFile(out / "weights.safetensors").tensors
    assert {name: stored[name].dtype for name in checkpoint.names()} == {
        name: checkpoint.dtype(name) for name in checkpoint.names()
    }
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    if dtype:
        assert {checkpoint.dtype(name) for name in checkpoint.parameters} == {names[dtype]}
    else:
        assert {checkpoint.dtype(name) for name in checkpoint.parameters} == set(names.values())
    with torch.no_grad():
        expected = Reference(folder).compute(np.array(IDS), None, None)["cached_logits"]
    session = Runtime(out).session()
    ours = [session.prefill(IDS), *(session.step(int(row.argmax())) for row in expected[:-1])]
    assert difference(np.stack(ours), expected) <= TOLERANCE


def test_position_table_of_another_grid(folder: Path) -> None:
    """CLIP's own 24 x 24 table is resized once, at export, as the authors do at load time."""
    image_case = GOLDEN / "internlm2-gqa-image"
    state = load_file(image_case / "model.safetensors")
    original = torch.from_numpy(cases.arrays(image_case.name, "inputs")["clip_pos_24"])
    save_file(state | {POSITIONS: original}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    adapted = checkpoint.tensor("vision.positions")
    assert checkpoint.shape("vision.positions") == tuple(adapted.shape) == (1226, 64)
    stored = state[POSITIONS]
    assert stored.dtype == torch.float16
    assert torch.equal(adapted.half(), stored)
    expected = cases.arrays(image_case.name, "expected")["clip_pos_35"]
    rows = cases.arrays(image_case.name, "inputs").get("clip_pos_35_rows", np.arange(len(adapted)))
    assert difference(adapted.numpy()[rows], expected) <= TOLERANCE


@pytest.mark.parametrize("rows", [0, 1, 578, 1225])
def test_position_table_of_no_square(folder: Path, state: State, rows: int) -> None:
    """A table that no square grid explains is an error, not a guess."""
    save_file(state | {POSITIONS: torch.zeros(rows, 64).half()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"wrong shape: {POSITIONS} is \[{rows}, 64\], expected \[1226, 64\]"):
        Checkpoint(folder)


# -- the gate ----------------------------------------------------------------------------------------------------------


def test_gates_that_differ(folder: Path, bundle: Callable[[Path], Path], caplog: pytest.LogCaptureFixture) -> None:
    """Said in the log, in the notes and in the bundle; the last entry is used everywhere, as in the authors' code."""
    gates = torch.load(folder / "trol_gating.pt", weights_only=True)
    last = {"weight": torch.full((1, 64), 0.25), "bias": torch.tensor([0.5])}
    torch.save(gates | {f"2.{kind}": t for kind, t in last.items()}, folder / "trol_gating.pt")
    with caplog.at_level(logging.WARNING):
        checkpoint = Checkpoint(folder)
    assert "gates of the 3 layers differ" in caplog.text
    assert len(checkpoint.notes) == 1
    for kind, tensor in last.items():
        assert torch.equal(checkpoint.tensor(f"decoder.gate.{kind}"), tensor)
    runtime = Runtime(bundle(folder))
    assert checkpoint.notes[0] in runtime.bundle.manifest.notes
    assert np.array_equal(runtime.bundle.weights().load(["decoder.gate.bias"])["decoder.gate.bias"], [0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gates: gates.pop("1.bias"), r"1\.bias should be float \(1,\)"),
        (lambda gates: gates.update({"3.bias": torch.zeros(1)}), r"extra 3\.bias"),
        (lambda gates: gates.update({"0.weight": torch.zeros(64)}), r"0\.weight should be float \(1, 64\)"),
        (lambda gates: gates.update({"0.weight": torch.zeros(1, 64).int()}), r"0\.weight should be float"),
        (lambda gates: gates.update({"2.weight": torch.zeros(1, 64).double()}), r"2\.weight should be float"),
        (lambda gates: gates.update({"2.bias": torch.tensor([torch.nan])}), r"NaN or infinite: decoder\.gate\.bias"),
        (lambda gates: gates.clear(), r"0\.weight should be"),
    ],
)
def test_unusable_gates(folder: Path, change: Callable[[State], object], message: str) -> None:
    """Missing, extra, wrong shape, wrong dtype, NaN, empty."""
    gates = torch.load(folder / "trol_gating.pt", weights_only=True)
    change(gates)
    torch.save(gates, folder / "trol_gating.pt")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


# -- pickles -----------------------------------------------------------------------------------------------------------


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["trol_gating.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("old_format", [False, True])
def test_malicious_pickle(folder: Path, state: State, tmp_path: Path, name: str, old_format: bool) -> None:
    """Refused, and nothing of it is executed."""
    mark = tmp_path / "executed"
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    tensors = state if name == "pytorch_model.bin" else torch.load(folder / name, weights_only=True)
    torch.save(tensors | {"extra": Malicious(mark)}, folder / name, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Checkpoint(folder)
    assert not mark.exists()
    torch.load(folder / name, weights_only=False)
    assert mark.exists()  # it would have been


@pytest.mark.parametrize(
    "content", [{"state_dict": {"a": torch.zeros(1)}}, [torch.zeros(1)], torch.zeros(1), {1: torch.zeros(1)}, 5]
)
@pytest.mark.parametrize("name", ["trol_gating.pt", "pytorch_model.bin"])
def test_pickle_of_something_else(folder: Path, name: str, content: Any) -> None:
    """Harmless, and not a dict of tensors."""
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    torch.save(content, folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*expected a dict of tensors"):
        Checkpoint(folder)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "trol_gating.pt"])
def test_truncated_file(folder: Path, state: State, name: str, share: float) -> None:
    """A download that stopped: the file is named."""
    if name == "pytorch_model.bin":
        as_pickle(folder, state)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "trol_gating.pt"])
def test_garbage_file(folder: Path, name: str) -> None:
    """An error page of a web server, saved under a weight file's name."""
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Checkpoint(folder)


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_a_long_list_of_problems_is_cut(folder: Path) -> None:
    """A config.json with far more layers than there are tensors: the number of what is missing, and the first 20."""
    edit_json(folder / "config.json", num_hidden_layers=100)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    lines = str(caught.value).splitlines()
    (count,) = map(int, re.findall(r"(\d+) problem\(s\)", lines[0]))
    assert count > 500 and len(lines) == 22
    assert lines[-1] == f"  and {count - 20} more"


def test_everything_wrong_is_listed_at_once(folder: Path, state: State, tmp_path: Path) -> None:
    """Missing, extra, wrong shape, wrong dtype, NaN and infinity, in several tensors: one error."""
    bad = dict(state)
    del bad["output.weight"], bad["model.layers.1.attention.wqkv.lora_A.weight"]
    bad["model.layers.9.ffn_norm.weight"] = torch.ones(64).half()
    bad["what.is.this"] = torch.ones(1).half()
    bad["model.layers.0.attention.wo.ffn.weight"] = torch.ones(64, 63).half()
    bad["vision_proj.0.bias"] = torch.ones(64, 1).half()
    bad["model.layers.2.ffn_norm.weight"] = torch.ones(64, dtype=torch.int32)
    bad["model.layers.2.attention_norm.weight"] = torch.ones(64, dtype=torch.float64)
    bad["model.layers.1.feed_forward.w1.ffn.weight"] = state["model.layers.1.feed_forward.w1.ffn.weight"].clone()
    bad["model.layers.1.feed_forward.w1.ffn.weight"][159, 63] = torch.nan
    bad["vision_proj.2.weight"] = state["vision_proj.2.weight"].clone()
    bad["vision_proj.2.weight"][0, 0] = -torch.inf
    save_file(bad, folder / "model.safetensors")
    gates = torch.load(folder / "trol_gating.pt", weights_only=True)
    del gates["1.bias"]
    torch.save(gates, folder / "trol_gating.pt")
    expected = [
        "missing: output.weight [500, 64]",
        "missing: model.layers.1.attention.wqkv.lora_A.weight [256, 64]",
        "extra: model.layers.9.ffn_norm.weight",
        "extra: what.is.this",
        "wrong shape: model.layers.0.attention.wo.ffn.weight is [64, 63], expected [64, 64]",
        "wrong shape: vision_proj.0.bias is [64, 1], expected [64]",
        "wrong dtype: model.layers.2.ffn_norm.weight is I32, expected one of F16, BF16, F32",
        "wrong dtype: model.layers.2.attention_norm.weight is F64, expected one of F16, BF16, F32",
        "NaN or infinite: model.layers.1.feed_forward.w1.ffn.weight",
        "NaN or infinite: vision_proj.2.weight",
        "1.bias should be float (1,)",
    ]
    for read in (lambda: Checkpoint(folder), lambda: pipeline.export(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError) as caught:
            read()
        text = str(caught.value)
        assert [line for line in expected if line not in text] == []
        assert f"{len(expected)} problem(s)" in text
        assert len(text.splitlines()) == 1 + len(expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [EMBEDDING, NORM, "model.layers.0.attention.wqkv.lora_B.weight", POSITIONS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_refused_by_export(folder: Path, state: State, tmp_path: Path, name: str, value: float) -> None:
    """All else is right: found while the weights are copied; nothing is left at the target nor beside it."""
    bad = state[name].clone()
    bad.flatten()[-1] = value
    save_file(state | {name: bad}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"NaN or infinite values in 1 tensor\(s\): {name}"):
        pipeline.export(folder, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_embedding_without_a_row_for_pictures(folder: Path, state: State) -> None:
    """InternLM2's own table has one row less than TroL's."""
    save_file(state | {EMBEDDING: state[EMBEDDING][:500].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{EMBEDDING} has 500 rows, none for image token 500"):
        Checkpoint(folder)


# -- files -------------------------------------------------------------------------------------------------------------


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    """Each is named, and where to take it from."""
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder; give the folder that holds config\.json"):
        Checkpoint(tmp_path / "nowhere")
    for name, message in (
        ("trol_gating.pt", r"missing: .*trol_gating\.pt"),
        ("model.safetensors", r"neither model\.safetensors \(or its index\) nor pytorch_model\.bin"),
        ("config.json", r"config\.json: missing; copy it from the published checkpoint"),
    ):
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(folder)


def test_missing_shards_and_bad_indices(folder: Path, state: State) -> None:
    """All missing shards are named; an index is data, not something to trip over."""
    as_shards(folder, state)
    (folder / "model-00003-of-00003.safetensors").unlink()
    (folder / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards missing: model-00001-of-00003\S*, model-00003-of-00003\S*;"):
        Checkpoint(folder)
    index = folder / "model.safetensors.index.json"
    for content in (
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": [1]}}',
        "[]",
        "no JSON",
        "",
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            Checkpoint(folder)


def test_tensor_in_two_shards(folder: Path, state: State) -> None:
    """Which one counts would depend on the order of reading."""
    as_shards(folder, state)
    first = load_file(folder / "model-00001-of-00003.safetensors")
    second = load_file(folder / "model-00002-of-00003.safetensors")
    name = next(iter(first))
    save_file(second | {name: first[name]}, folder / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' is also in .*00001"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "content", ["", "no JSON", "[]", "null", '{"hidden_size": 64', b"\xff\xfe", '{"model_type": "internlm"}']
)
def test_garbage_config(folder: Path, content: str | bytes) -> None:
    """No JSON, JSON of another kind, or without sizes."""
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(folder)


@pytest.mark.parametrize("value", ["64", 0, -1, 2.5, True, [64], {"a": 1}])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "img_size",
    ],
)
def test_garbled_sizes(folder: Path, key: str, value: Any) -> None:
    """A size that is no positive whole number, in each place."""
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", "small"),
        ("rope_theta", float("inf")),
        ("rope_theta", [1]),
        ("eos_token_id", "</s>"),
        ("eos_token_id", -1),
    ],
)
def test_garbled_numbers(folder: Path, key: str, value: Any) -> None:
    """The other numbers of config.json."""
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"{key}|is missing or unusable"):
        Checkpoint(folder)


def test_foreign_models(folder: Path) -> None:
    """The error says what fits. TroL-3.8B is another family, so its config with these tensors is listed as mixed."""
    config = folder / "config.json"
    config.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"not a TroL checkpoint .*LlamaForCausalLM.*BK-Lee/TroL-1\.8B"):
        Checkpoint(folder)
    config.write_text("{}")
    with pytest.raises(CheckpointError, match="not a TroL checkpoint"):
        Checkpoint(folder)
    config.write_text(json.dumps(models.find("trol-3.8b").config))
    with pytest.raises(CheckpointError, match="tensors of this phi3 checkpoint:\n  missing: language_model"):
        Checkpoint(folder)


def test_family_can_be_demanded(folder: Path) -> None:
    """A folder that is not what was asked for."""
    assert Checkpoint(folder, family="internlm2").family.name == "internlm2"
    with pytest.raises(CheckpointError, match="this is a internlm2 checkpoint, not phi3"):
        Checkpoint(folder, family="phi3")


def test_token_ids_from_the_side_files(folder: Path) -> None:
    """generation_config.json wins over config.json; added_tokens.json says which id <image> has."""
    assert Checkpoint(folder).spec.eos_token_id == 2
    assert Checkpoint(folder).spec.image_token_id == 500
    edit_json(folder / "generation_config.json", eos_token_id=[7, 8])
    edit_json(folder / "added_tokens.json", **{"<image>": 499, "<other>": 500})
    spec = Checkpoint(folder).spec
    assert (spec.eos_token_id, spec.more_end_ids, spec.image_token_id) == (7, (8,), 499)
    edit_json(folder / "generation_config.json", eos_token_id=9)
    assert (Checkpoint(folder).spec.eos_token_id, Checkpoint(folder).spec.more_end_ids) == (9, ())
    for bad, message in (
        (501, r"token 501 .*rows 0\.\.500"),
        (-1, "found -1"),
        ("500", "found '500'"),
        (1.0, "found 1.0"),
    ):
        edit_json(folder / "added_tokens.json", **{"<image>": bad})
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(folder)
    (folder / "added_tokens.json").unlink()
    for eos in ("</s>", -1, 2.5, {"id": 2}, [2, "</s>"], [2, 10**6], 2**31, [[2]], True):
        edit_json(folder / "generation_config.json", eos_token_id=eos)
        with pytest.raises(CheckpointError, match="eos_token_id"):
            Checkpoint(folder)


def test_without_clip_config_it_is_the_published_tower(folder: Path) -> None:
    """Absent: CLIP ViT-L/14-336; so this small one no longer fits, and every tensor of the tower is counted."""
    (folder / "clip_vision_config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert "expected [1024, 3, 14, 14]" in str(caught.value)
    assert ": 390 problem(s) with" in str(caught.value)


# -- what a configuration asks for -------------------------------------------------------------------------------------

NOT_SUPPORTED: dict[str, dict[str, Any]] = {
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000}},
    "longrope": {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
    "an unknown setting of the rope": {"rope_scaling": {"type": "dynamic", "factor": 2.0, "beta_fast": 3}},
    "two types": {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 1.0}},
    "two bases": {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    "a part of the head is turned": {"partial_rotary_factor": 0.5},
    "the same in the new place": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "rope per kind of layer": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "activation": {"hidden_act": "gelu"},
    "head_dim": {"head_dim": 32},
    "a bias": {"bias": True},
    "attention_bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "soft capping": {"final_logit_softcapping": 30.0},
    "a window": {"sliding_window": 16},
    "quantized": {"quantization_config": {"bits": 4}},
    "experts": {"num_experts": 8},
    "another rank": {"lora_rank": 8},
}


@pytest.mark.parametrize("changes", NOT_SUPPORTED.values(), ids=NOT_SUPPORTED)
def test_what_changes_the_computation_is_refused_by_name(folder: Path, changes: dict[str, Any]) -> None:
    """The self-test could not see it: its reference is made of the same numbers."""
    edit_json(folder / "config.json", **changes)
    (key,) = changes
    with pytest.raises(CheckpointError, match=rf"config\.json: .*({key}|rope|type)"):
        Checkpoint(folder)


def test_the_towers_activation_is_obeyed(folder: Path) -> None:
    """clip_vision_config.json is a configuration, too."""
    edit_json(folder / "clip_vision_config.json", hidden_act="gelu")
    with pytest.raises(CheckpointError, match="hidden_act 'gelu'"):
        Checkpoint(folder)


SAME: dict[str, dict[str, Any]] = {
    "nothing": {},
    "null": {"rope_scaling": None, "hidden_act": None, "head_dim": None},
    "default": {"rope_scaling": {"rope_type": "default"}},
    "dynamic, which begins beyond the positions": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "the newer word": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "both words": {"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}},
    "linear by 1": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "head_dim": {"head_dim": 16},
    "swish": {"hidden_act": "swish"},
    "training": {"attention_dropout": 0.1, "initializer_range": 5, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_other_spellings_of_the_same(folder: Path, changes: dict[str, Any]) -> None:
    """Read, and no remark."""
    edit_json(folder / "config.json", **changes)
    assert Checkpoint(folder).spec == Checkpoint(CASE).spec and Checkpoint(folder).notes == []


def test_the_base_of_the_rope_in_its_new_place(folder: Path) -> None:
    """Transformers 5 has it in rope_parameters."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = config.pop("rope_theta")
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": base}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert Checkpoint(folder).spec == Checkpoint(CASE).spec
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert Checkpoint(folder).spec.rope_theta == 5.0


def test_what_is_merely_unknown_is_a_note(folder: Path) -> None:
    """It goes into the bundle."""
    edit_json(folder / "config.json", favourite_colour="red", another=[1])
    assert Checkpoint(folder).notes == ["config.json: unknown and ignored: another, favourite_colour"]


# -- what is another thing ---------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17300000000\n"
PAGE = b"\n<!DOCTYPE html><html><body>401</body></html>"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "trol_gating.pt", "generation_config.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize(("content", "what"), [(POINTER, "git lfs pull"), (PAGE, "web page")])
def test_what_stands_for_a_file_is_called_by_its_name(folder: Path, name: str, content: bytes, what: str) -> None:
    """Whichever file of a checkpoint it is."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}.*{what}"):
        Checkpoint(folder)


def test_another_folder_than_the_checkpoints(folder: Path, tmp_path: Path, nano_bundle: Path) -> None:
    """The right one is named."""
    with pytest.raises(CheckpointError, match=rf"has no config\.json, but {folder} has; give that folder"):
        Checkpoint(folder.parent)
    (folder / "sub").mkdir()
    with pytest.raises(CheckpointError, match=rf"but {folder} above it has"):
        Checkpoint(folder / "sub")
    with pytest.raises(CheckpointError, match="is a bundle"):
        Checkpoint(nano_bundle)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(tmp_path / "file")


def test_a_hubs_cache(folder: Path, tmp_path: Path) -> None:
    """Its folder of a snapshot, full of links to blobs, is a checkpoint; its root is told from one."""
    model = tmp_path / "cache" / "models--BK-Lee--TroL-1.8B"
    snapshot = model / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    as_shards(folder, load_file(folder / "model.safetensors"))
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(model / "blobs" / f"{i:064x}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"{i:064x}")
    assert Checkpoint(snapshot).spec == Checkpoint(CASE).spec
    for root in (model, model.parent, tmp_path / "cache"):
        with pytest.raises(CheckpointError, match=rf"hub's cache; give .*{snapshot}"):
            Checkpoint(root)


def test_shards_are_files_of_their_folder(folder: Path, state: State, tmp_path: Path) -> None:
    """Names from an index lead nowhere else, nor do links under such names; without an index it is asked for."""
    as_shards(folder, state)
    index = folder / "model.safetensors.index.json"
    shard = folder / "model-00001-of-00003.safetensors"
    good = index.read_text(encoding="utf-8")
    for name in ("../x.safetensors", "/proc/kmsg", "sub/x.safetensors", "", "..", ".hidden", "a\x00b"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="not the name of a file beside it"):
            Checkpoint(folder)
    index.write_text(good, encoding="utf-8")
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="link to a place outside"):
        Checkpoint(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"3 shards \(model-00001.*but no index"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "trol_gating.pt"])
def test_links_under_fixed_names(folder: Path, tmp_path: Path, name: str) -> None:
    """They stay in the folder, too: what is elsewhere is not read, whatever it is."""
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name} is a link to a place outside"):
        Checkpoint(folder)
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / "beside")
    (folder / name).symlink_to("beside")
    Checkpoint(folder)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
def test_a_prefix_before_every_name(folder: Path, state: State, prefix: str) -> None:
    """As wrappers of training save it: said once, and not as a thousand missing names."""
    save_file({prefix + name: tensor for name, tensor in state.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"begins with '{prefix}'") as caught:
        Checkpoint(folder)
    assert len(str(caught.value)) < 500


def test_weights_of_zeros(folder: Path, state: State) -> None:
    """A download that was given its size and never filled; a low-rank part that was never trained is not meant."""
    zero = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    save_file(state | {n: t for n, t in zero.items() if "lora_B" in n}, folder / "model.safetensors")
    Checkpoint(folder)
    for some in (zero, {"output.weight": zero["output.weight"]}):
        save_file(state | some, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"only zeros: .*downloaded completely"):
            Checkpoint(folder)


def test_files_edited_on_windows(folder: Path) -> None:
    """A byte-order mark is no part of a file."""
    for name in ("config.json", "clip_vision_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert Checkpoint(folder).spec == Checkpoint(CASE).spec


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", ["[" * 99999, '{"a":' * 99999, '{"eos_token_id": "\\ud800"}', '{"a": ' + "9" * 9999 + "}"]
)
def test_hostile_json_of_a_checkpoint(folder: Path, name: str, content: str) -> None:
    """Deep, halves of characters, huge numbers."""
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=name) as caught:
        Checkpoint(folder)
    str(caught.value).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**7},
        {"vocab_size": 2**31},
        {"hidden_size": 10**9, "num_attention_heads": 1},
        {"intermediate_size": 2**62},
        {"max_position_embeddings": 10**300},
        {"rope_theta": 10**400},
        {"img_size": 10**9},
        {"eos_token_id": 2**31},
        {"num_key_value_heads": 3},
    ],
)
def test_sizes_that_no_model_has(folder: Path, changes: dict[str, Any]) -> None:
    """Refused before anything is made of that size."""
    edit_json(folder / "config.json", **changes)
    start = time.process_time()
    with pytest.raises(CheckpointError):
        Checkpoint(folder)
    assert time.process_time() - start < 5


def test_gates_saved_as_parameters(folder: Path) -> None:
    """An innocent file: torch.save of a module's parameters instead of its state_dict."""
    gates = torch.load(folder / "trol_gating.pt", weights_only=True)
    torch.save({name: torch.nn.Parameter(t) for name, t in gates.items()}, folder / "trol_gating.pt")
    checkpoint = Checkpoint(folder)
    assert not checkpoint.tensor("decoder.gate.weight").requires_grad
    checkpoint.tensor("decoder.gate.weight").numpy()


@pytest.mark.parametrize("kind", ["meta", "sparse"])
@pytest.mark.parametrize("name", ["trol_gating.pt", "pytorch_model.bin"])
def test_tensors_without_numbers_in_memory(folder: Path, state: State, name: str, kind: str) -> None:
    """Named where they are read, and not where they are first used."""
    make = {"meta": lambda t: t.to("meta"), "sparse": lambda t: t.float().to_sparse()}[kind]
    if name == "pytorch_model.bin":
        as_pickle(folder, state)
        torch.save({n: make(t) for n, t in state.items()}, folder / name)
    else:
        torch.save({n: make(t) for n, t in torch.load(folder / name, weights_only=True).items()}, folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*(not a dense tensor|not a PyTorch file)"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "trol_gating.pt"])
def test_a_pipe_in_the_place_of_a_file(folder: Path, name: str) -> None:
    """It would be waited for, for ever."""
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"named pipe|neither model|missing"):
        Checkpoint(folder)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def test_without_tokenizer_only_ids(folder: Path, bundle: Callable[[Path], Path]) -> None:
    """The bundle says so, serves ids, and answers a question with what to do about it."""
    runtime = Runtime(bundle(folder))
    assert any("no tokenizer" in note for note in runtime.bundle.manifest.notes)
    assert runtime.session().prefill(IDS).shape == (500,)
    for ask in (runtime.generate, runtime.stream, runtime.tokenize):
        with pytest.raises(UsageError, match=r"no tokenizer.*session\(\), or export again with the tokenizer"):
            ask("What is this?")


def test_damaged_tokenizer(tmp_path: Path) -> None:
    """The fault is found before anything is traced, and nothing is left over."""
    folder = tmp_path / "nano"
    shutil.copytree(NANO, folder)
    data = (folder / "tokenizer.model").read_bytes()
    for content in (data[: len(data) // 2], b"", b"no protobuf"):
        (folder / "tokenizer.model").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            pipeline.export(folder, tmp_path / "place" / "out")
        assert list((tmp_path / "place").iterdir()) == []
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"added_tokens\.json but no tokenizer\.model"):
        pipeline.export(folder, tmp_path / "place" / "out")


# -- the published sizes, and synth ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trol-1.8b", "trol-7b"])
def test_published_names_and_shapes(name: str) -> None:
    """Every tensor of the full-size models is accounted for, and their configs are those published."""
    model = models.find(name)
    published = json.loads((GOLDEN / "real_configs" / f"{name}.json").read_text(encoding="utf-8"))
    assert {key: published[key] for key in model.config} == model.config
    with (GOLDEN / "real_configs" / "names.tsv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["model"] == name]
    shapes = {row["name"]: tuple(json.loads(row["shape"])) for row in rows if row["file"] == "model"}
    spec = internlm2.model_spec(published, None, shapes)
    assert model.family.published(model.config) == shapes
    sources = {source.name: source.shape for source in internlm2.sources(spec).values()}
    unused = {key for key in shapes if internlm2.FAMILY.unused(key)}
    assert sources == {key: shape for key, shape in shapes.items() if key not in unused}
    assert unused == {f"vit.vision_tower.vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")}
    gates = {row["name"]: json.loads(row["shape"]) for row in rows if row["file"] != "model"}
    assert gates == {
        f"{i}.{kind}": shape
        for i in range(spec.num_layers)
        for kind, shape in (("weight", [1, spec.hidden_size]), ("bias", [1]))
    }


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model by name, of golden's size, so that its graphs have been traced already."""
    config = json.loads((CASE / "config.json").read_text(encoding="utf-8"))
    clip = json.loads((CASE / "clip_vision_config.json").read_text(encoding="utf-8"))
    monkeypatch.setitem(models.MODELS, "tiny", models.Published("tiny", "nobody/tiny", internlm2.FAMILY, config))
    monkeypatch.setattr(internlm2, "CLIP_L_14_336", clip)
    return "tiny"


def test_synth(tiny: str, tmp_path: Path, bundle: Callable[[Path], Path], state: State) -> None:
    """Published layout and names, FP16, values that keep logits of order one; it exports and runs."""
    calls: list[tuple[str, int, int]] = []
    result = synth(tiny, tmp_path / "tiny", progress=lambda *call: calls.append(call))
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == [
        "config.json",
        "model.safetensors",
        "trol_gating.pt",
    ]
    made = load_file(tmp_path / "tiny" / "model.safetensors")
    assert {name: t.shape for name, t in made.items()} == {name: t.shape for name, t in state.items()}
    assert {t.dtype for t in made.values()} == {torch.float16}
    assert result == {
        "tensors": len(made),
        "parameters": sum(t.numel() for t in made.values()),
        "bytes": sum(t.nbytes for t in made.values()),
    }
    assert calls[-1][1] == calls[-1][2]
    session = Runtime(bundle(tmp_path / "tiny")).session()
    logits = session.prefill(IDS)
    logits = session.step(int(logits.argmax()))
    assert 0.1 < logits.std() < 10
    with torch.no_grad():
        expected = Reference(tmp_path / "tiny").compute(np.array(IDS), None, None)["cached_logits"]
    assert difference(logits, expected[1]) <= TOLERANCE


@pytest.mark.slow
def test_synth_is_reproducible(tiny: str, tmp_path: Path) -> None:
    """By seed; and it overwrites nothing but what it wrote."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synth(tiny, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    with pytest.raises(ExportError, match="exists"):
        synth(tiny, tmp_path / "a")
    synth(tiny, tmp_path / "a", seed=1, overwrite=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == c
    (tmp_path / "a" / "tokenizer.model").write_text("mine")
    with pytest.raises(ExportError, match=r"holds other files \(tokenizer\.model\)"):
        synth(tiny, tmp_path / "a", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_synth_interrupted(tiny: str, tmp_path: Path) -> None:
    """Nothing half-written."""

    def interrupt(*call: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth(tiny, tmp_path / "a", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_unknown_models(tmp_path: Path) -> None:
    """The names there are; and the one that needs no random weights."""
    for name, message in (
        ("trol-13b", r"no model 'trol-13b'; choose one of trol-nano, trol-nano-phi3, trol-1\.8b, trol-3\.8b, trol-7b"),
        ("trol-nano", "ships with its trained weights"),
    ):
        with pytest.raises(UsageError, match=message):
            synth(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_spec_is_what_the_config_says() -> None:
    """Field by field, for the golden case."""
    spec = Checkpoint(CASE).spec
    assert dataclasses.asdict(spec) == {
        "family": "internlm2",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 500,
        "embedding_rows": 501,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "lora_rank": 256,
        "eos_token_id": 2,
        "more_end_ids": (),
        "traversed": None,
        "image_token_id": 500,
        "vision": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 3,
            "num_heads": 4,
            "patch_size": 14,
            "image_size": 490,
            "layer_norm_eps": 1e-5,
            "tokens_per_image": 1225,
            "rms_norm": False,
            "qk_norm": False,
            "qkv_bias": True,
        },
        "long_rope": None,
    }
    assert spec.kv_values_per_token == 2 * 3 * 2 * 16
