"""The bundle: its format to the byte, every way it can be damaged, and exports that fail or are interrupted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import CHECKPOINTS, NANO, NANOS, slow
from trol_edge.bundle import folder as folder_module
from trol_edge.bundle import manifest as bundle_module
from trol_edge.bundle.folder import new_folder
from trol_edge.bundle.manifest import Bundle, FileInfo, Manifest, write_manifest
from trol_edge.bundle.names import MANIFEST, SELFTEST, TOKENIZER, WEIGHTS
from trol_edge.bundle.precision import CalibrationInfo, LinearPlan, Part, PrecisionPlan
from trol_edge.bundle.spec import LongRope, ModelSpec, VisionSpec
from trol_edge.bundle.weights import WeightsFile
from trol_edge.errors import BundleError, ExportError, UsageError
from trol_edge.export import pipeline
from trol_edge.prompt.images import ImageSpec
from trol_edge.prompt.template import PromptSpec
from trol_edge.runtime import Runtime

FILES = (SELFTEST, "step.onnx", TOKENIZER, "traverse.onnx", "traverse_text.onnx", "vision.onnx", WEIGHTS)


@pytest.fixture
def copy(nano_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose files may be changed: replace a file, do not write into it (they are hard links)."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in nano_bundle.iterdir():
        os.link(path, folder / path.name)
    return folder


def replace(path: Path, data: bytes) -> None:
    """New content under an old name."""
    path.unlink()
    path.write_bytes(data)


def resealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the hash that fits, as a tool that knows the format would."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    data.pop("manifest_sha256")
    change(data)
    data["manifest_sha256"] = hash_of(data)
    replace(folder / MANIFEST, json.dumps(data).encode())


def hash_of(data: dict[str, Any]) -> str:
    """The manifest's own hash: of its JSON with sorted keys, Python's default separators, UTF-8."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# -- the format ------------------------------------------------------------------------------------------------------


def small_manifest() -> Manifest:
    """A manifest with a value of every kind."""
    spec = ModelSpec(
        family="internlm2",
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=10,
        embedding_rows=11,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=32,
        lora_rank=2,
        eos_token_id=2,
        image_token_id=10,
        vision=VisionSpec(8, 16, 1, 2, 14, 28, 1e-5, 4),
        long_rope=LongRope((1.0, 1.5), (2.0, 3.0), 16, 1.25),
    )
    return Manifest(
        format="trol-edge-bundle",
        format_version=2,
        model="ünî",
        created_by="trol-edge 0.1.0",
        target="cpu",
        context=32,
        spec=spec,
        prompt=PromptSpec(
            before_system="<s>system\n",
            system="Be brief.",
            before_question="<end>user\n",
            after_question="<end>assistant\n",
            image="<image>",
            image_prefix="",
            image_suffix="",
            after_image="\n",
            tokens_per_image=4,
            special_tokens=("<s>", "<end>", "<image>"),
            end_markers=("<end>", "</s>"),
        ),
        image=ImageSpec("tiles", 28, (0.5, 0.25, 0.125), (1.0, 0.5, 0.25), 6),
        graphs={
            "step": bundle_module.GraphInfo(
                "step.onnx", (bundle_module.Port("x", "float32", (1, "S")),), (), ("a.weight", "b"), ("b",), {"Add": 2}
            )
        },
        files={"step.onnx": FileInfo(3, hashlib.sha256(b"abc").hexdigest())},
        checkpoint={"folder": "here"},
        tools={"torch": "2.9"},
        notes=("a note",),
        parts={"decoder": Part(8, {"int4": 1}, 6)},
        plan=PrecisionPlan(
            "int4", "fp32", {"a.weight": LinearPlan("int4", 32)}, "mse", True, True, ("decoder.residual",)
        ),
        calibration=CalibrationInfo(7, "abc"),
    )


SMALL: dict[str, Any] = {
    "format": "trol-edge-bundle",
    "format_version": 2,
    "model": "ünî",
    "created_by": "trol-edge 0.1.0",
    "target": "cpu",
    "context": 32,
    "spec": {
        "family": "internlm2",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "vocab_size": 10,
        "embedding_rows": 11,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32,
        "lora_rank": 2,
        "eos_token_id": 2,
        "image_token_id": 10,
        "vision": {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_layers": 1,
            "num_heads": 2,
            "patch_size": 14,
            "image_size": 28,
            "layer_norm_eps": 1e-05,
            "tokens_per_image": 4,
            "rms_norm": False,
            "qk_norm": False,
            "qkv_bias": True,
        },
        "long_rope": {
            "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 3.0],
            "original_max_position_embeddings": 16,
            "amplitude": 1.25,
        },
    },
    "prompt": {
        "before_system": "<s>system\n",
        "system": "Be brief.",
        "before_question": "<end>user\n",
        "after_question": "<end>assistant\n",
        "image": "<image>",
        "image_prefix": "",
        "image_suffix": "",
        "after_image": "\n",
        "tokens_per_image": 4,
        "special_tokens": ["<s>", "<end>", "<image>"],
        "end_markers": ["<end>", "</s>"],
    },
    "image": {"kind": "tiles", "size": 28, "mean": [0.5, 0.25, 0.125], "std": [1.0, 0.5, 0.25], "max_tiles": 6},
    "graphs": {
        "step": {
            "file": "step.onnx",
            "inputs": [{"name": "x", "dtype": "float32", "shape": [1, "S"]}],
            "outputs": [],
            "weights": ["a.weight", "b"],
            "constants": ["b"],
            "operators": {"Add": 2},
            "costs": None,
        }
    },
    "files": {"step.onnx": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}},
    "checkpoint": {"folder": "here"},
    "tools": {"torch": "2.9"},
    "notes": ["a note"],
    "parts": {"decoder": {"numbers": 8, "linears": {"int4": 1}, "bytes": 6}},
    "plan": {
        "recipe": "int4",
        "compute": "fp32",
        "linears": {"a.weight": {"precision": "int4", "block": 32, "activations": False}},
        "observer": "mse",
        "scaling": True,
        "clipping": True,
        "kept_fp32": ["decoder.residual"],
    },
    "calibration": {"samples": 7, "checkpoint": "abc"},
    "distance": None,
}
SMALL_SHA256 = "50a20ea2cd19b71d76d00d9cd9423c6c321fa29750870fdb92fc2671209212e5"


def test_manifest_is_this_json(tmp_path: Path) -> None:
    """Key by key, with the hash over everything else; and it reads back as it was."""
    write_manifest(tmp_path, small_manifest())
    data = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    own = data.pop("manifest_sha256")
    assert data == SMALL
    assert own == hash_of(SMALL) == SMALL_SHA256
    (tmp_path / "step.onnx").write_bytes(b"abc")
    assert Bundle(tmp_path).manifest == small_manifest()


def test_exported_manifest_follows_the_format(each_bundle: Path) -> None:
    """Its hash fits, and it lists size and sha256 of every other file in the folder."""
    data = json.loads((each_bundle / MANIFEST).read_text(encoding="utf-8"))
    assert data.pop("manifest_sha256") == hash_of(data)
    files = [name for name in FILES if data["spec"]["lora_rank"] or name != "traverse_text.onnx"]
    assert sorted(data["files"]) == sorted(files)
    assert sorted(path.name for path in each_bundle.iterdir()) == sorted([MANIFEST, *files])
    for name, info in data["files"].items():
        content = (each_bundle / name).read_bytes()
        assert info == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert oct(each_bundle.stat().st_mode & 0o777) == "0o755"


def test_weights_file_is_safetensors(each_bundle: Path) -> None:
    """Its own library opens it; header length little-endian, padded with spaces to 64 bytes, no holes, no overlap."""
    raw = (each_bundle / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + length]
    assert (8 + length) % 64 == 0
    assert text.startswith(b'{"embedding":{"dtype":"F16","shape":[')
    assert text.rstrip(b" ").endswith(b"]}}")
    header = json.loads(text)
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert spans[0][0] == 0
    assert [stop for _, stop in spans[:-1]] == [start for start, _ in spans[1:]]
    assert spans[-1][1] == len(raw) - 8 - length
    theirs = load_file(each_bundle / WEIGHTS)
    ours = WeightsFile(each_bundle / WEIGHTS)
    assert set(theirs) == set(ours.tensors) == set(header)
    loaded = ours.load(set(theirs))
    for name, array in theirs.items():
        assert np.array_equal(loaded[name], array.astype(np.float32)), name


def test_weights_file_by_hand(tmp_path: Path) -> None:
    """Literal bytes of all dtypes, in any order, with metadata."""
    header = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},'
        b'"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"c":{"dtype":"F16","shape":[],"data_offsets":[12,14]},'
        b'"d":{"dtype":"I8","shape":[2],"data_offsets":[14,16]},"e":{"dtype":"U8","shape":[1,2],"data_offsets":[16,18]},'
        b'"f":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[18,19]}}'
    )
    data = b"\x00\x00\x80\x3f\x00\x00\x00\xc0" + b"\x80\x3f\x00\xc0" + b"\x00\x3c" + b"\xff\x80" + b"\x21\xf8" + b"\x38"
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    file = WeightsFile(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = file.load(["a", "b", "c"], digest)
    assert {name: array.tolist() for name, array in loaded.items()} == {
        "a": [[1.0], [-2.0]],
        "b": [1.0, -2.0],
        "c": 1.0,
    }
    assert {array.dtype for array in loaded.values()} == {np.dtype(np.float32)}
    assert file.load(["b"])["b"].tolist() == [1.0, -2.0]
    stored = file.load(["d", "e", "f"], digest)
    assert {name: array.tolist() for name, array in stored.items()} == {"d": [-1, -128], "e": [[0x21, 0xF8]], "f": [56]}
    with pytest.raises(BundleError, match="altered since export"):
        file.load(["a"], "0" * 64)


BAD_HEADERS = {
    "list": b"[]",
    "no JSON": b"{broken",
    "no UTF-8": b"\xff\xfe{}",
    "entry is no object": b'{"a":5}',
    "unknown dtype": b'{"a":{"dtype":"I4","shape":[4],"data_offsets":[0,4]}}',
    "no shape": b'{"a":{"dtype":"F32","data_offsets":[0,4]}}',
    "fractional shape": b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
    "negative shape": b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
    "negative offset": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-4,4]}}',
    "size and offsets differ": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
    "beyond the file": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "short of the file": b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}',
    "no tensors": b"{}",
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_bad_weights_header(tmp_path: Path, what: str) -> None:
    """A file that is not what its header says, before any of it is allocated."""
    header = BAD_HEADERS[what]
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(BundleError, match=r"w\.safetensors.*copy the bundle again"):
        WeightsFile(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x01\x02", bytes(8), b"\xff" * 8, (1 << 40).to_bytes(8, "little") + bytes(64)]
)
def test_weights_file_without_header(tmp_path: Path, content: bytes) -> None:
    """Empty, shorter than its length field, or with an absurd length."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="copy the bundle again"):
        WeightsFile(path)


# -- damage ------------------------------------------------------------------------------------------------------------


def test_an_untouched_copy_opens(copy: Path) -> None:
    """The control for the tests below; other files in the folder do not matter."""
    (copy / "README.txt").write_text("mine")
    assert Runtime(copy).session().prefill([5, 6]).shape == (800,)


def test_missing(tmp_path: Path, nano_bundle: Path) -> None:
    """No folder, an empty folder, a file, a file of a bundle."""
    file = tmp_path / "file"
    file.write_text("{}")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty", file, nano_bundle / MANIFEST):
        with pytest.raises(BundleError, match=r"no bundle\.json here.*trol-edge export"):
            Runtime(path)


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_a_file_is_missing(copy: Path, name: str) -> None:
    """Half-copied: named, and what to do."""
    (copy / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}.*(copy the bundle again|trol-edge export)"):
        Runtime(copy)


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_file_is_truncated(copy: Path, name: str, share: float) -> None:
    """Half-copied, within a file."""
    data = (copy / name).read_bytes()
    replace(copy / name, data[: int(share * len(data))])
    with pytest.raises(BundleError, match=rf"{name}.*copy the bundle again"):
        Runtime(copy)


def test_every_damaged_file_is_listed(copy: Path) -> None:
    """One error is enough to mend it."""
    (copy / "vision.onnx").unlink()
    replace(copy / TOKENIZER, b"{}")
    replace(copy / WEIGHTS, b"")
    with pytest.raises(BundleError) as caught:
        Bundle(copy)
    assert all(name in str(caught.value) for name in ("vision.onnx is missing", TOKENIZER, WEIGHTS))
    assert "step.onnx" not in str(caught.value)


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9])
def test_a_byte_is_flipped(copy: Path, name: str, place: float) -> None:
    """In every file, near its beginning, middle and end; the weights' hash is checked as they are loaded."""
    data = bytearray((copy / name).read_bytes())
    data[int(place * len(data))] ^= 1
    replace(copy / name, bytes(data))
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Runtime(copy)


def test_weights_are_not_hashed_on_demand(copy: Path) -> None:
    """verify=False: a flipped bit in a weight goes unseen, as documented; other files are still checked."""
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    replace(copy / WEIGHTS, bytes(data))
    Runtime(copy, verify=False)
    replace(copy / "step.onnx", (copy / "step.onnx").read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"step\.onnx was altered"):
        Runtime(copy, verify=False)


def test_the_manifest_is_edited(copy: Path) -> None:
    """A value changed by hand does not fit the manifest's hash; neither does a hash that was removed."""
    text = (copy / MANIFEST).read_text(encoding="utf-8")
    for old, new in (('"context": 2048', '"context": 4096'), ('"manifest_sha256"', '"removed"')):
        assert text.count(old) == 1
        replace(copy / MANIFEST, text.replace(old, new).encode())
        with pytest.raises(BundleError, match="altered since export"):
            Runtime(copy)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_version(copy: Path, version: Any) -> None:
    """Both versions named, and the way out; a bundle of a later format is not called damaged."""
    resealed(copy, lambda data: data.update(format_version=version))
    with pytest.raises(BundleError, match=rf"bundle format {version!r}, but this version reads format 2; export"):
        Runtime(copy)


def test_another_format(copy: Path) -> None:
    """JSON that is no bundle of ours."""
    for content in (b"[]", b"null", b'{"format": "other"}', b"{}"):
        replace(copy / MANIFEST, content)
        with pytest.raises(BundleError, match="not a trol-edge bundle"):
            Runtime(copy)


def test_unknown_missing_and_wrong_fields_are_listed(copy: Path) -> None:
    """A manifest whose hash fits, from some other program: every field is checked, all problems in one message."""

    def change(data: dict[str, Any]) -> None:
        data["colour"] = "red"
        del data["notes"]
        data["context"] = "2048"
        data["spec"]["num_layers"] = True
        data["spec"]["vision"]["speed"] = 1
        data["files"][WEIGHTS]["bytes"] = 1.5
        data["graphs"]["step"]["inputs"][0]["shape"] = [None]

    resealed(copy, change)
    with pytest.raises(BundleError) as caught:
        Bundle(copy)
    for part in ("'colour'", "'notes'", ".context", "num_layers", "'speed'", "bytes", "shape[0]", "Export the bundle"):
        assert part in str(caught.value), part


def test_unusable_settings_in_a_manifest(copy: Path) -> None:
    """Values have the right type but are wrong."""
    resealed(copy, lambda data: data["image"].update(kind="round", std=[0, 1, 1]))
    with pytest.raises(BundleError, match=r"kind 'round' is unknown.*std"):
        Bundle(copy)


def test_another_target(copy: Path) -> None:
    """What runs it here, and how to export for that."""
    resealed(copy, lambda data: data.update(target="onnx"))
    with pytest.raises(BundleError, match=r"target 'onnx'.*it runs cpu.*--target cpu"):
        Runtime(copy)


def test_a_tokenizer_of_another_model(copy: Path) -> None:
    """Its image token is not the one that the graphs were exported for."""
    resealed(copy, lambda data: data["spec"].update(image_token_id=7))
    with pytest.raises(BundleError, match="<image> is token 800"):
        Runtime(copy)


def put(folder: Path, name: str, content: bytes) -> None:
    """Another file under a manifest that knows it."""
    replace(folder / name, content)
    info = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    resealed(folder, lambda data: data["files"].update({name: info}))


def test_a_graph_that_the_library_refuses(copy: Path) -> None:
    """No graph at all, which is seen before the library reads it."""
    put(copy, "step.onnx", b"no protobuf")
    with pytest.raises(BundleError, match=r"step\.onnx: not readable as an ONNX graph"):
        Runtime(copy)


def test_weights_of_another_model(copy: Path, tmp_path: Path) -> None:
    """A proper file that lacks what the graphs read."""
    save_file({"embedding": np.zeros((4, 4), np.float16)}, tmp_path / "other.safetensors")
    put(copy, WEIGHTS, (tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(BundleError, match="lacks decoder"):
        Runtime(copy)


def test_without_tokenizer(copy: Path) -> None:
    """The token level works; asking for text says why it does not."""
    (copy / TOKENIZER).unlink()
    resealed(copy, lambda data: data["files"].pop(TOKENIZER))
    runtime = Runtime(copy)
    assert runtime.session().prefill([5]).shape == (800,)
    for ask in (runtime.generate, runtime.stream, runtime.tokenize):
        with pytest.raises(UsageError, match=r"no tokenizer.*session"):
            ask("What is this?")


def test_pickles_are_never_loaded(copy: Path) -> None:
    """A bundle is opened without executing anything of it: no module that unpickles is even imported for it."""
    replace(copy / WEIGHTS, b"\x80\x04\x95cos\nsystem\n(S'true'\ntR." + bytes(100))
    with pytest.raises(BundleError):
        Runtime(copy)


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(nano_bundle: Path) -> Callable[..., Manifest]:
    """Export of the shipped model, without a self-test; its graphs have been traced already."""

    def run(target: Path, **options: Any) -> Manifest:
        return pipeline.export(NANO, target, **{"record_selftest": False} | options)

    return run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a bundle is to be written, in a folder of its own."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "nano"


def listing(folder: Path) -> list[str]:
    """Everything below a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("each_bundle", [NANOS[1], *slow(NANOS[0])], indirect=True)
def test_export_is_reproducible(place: Path, each_bundle: Path) -> None:
    """Same checkpoint, same bytes, whatever the folder is called."""
    model = Bundle(each_bundle).manifest.model
    pipeline.export(CHECKPOINTS / model, place, model=model)
    assert listing(place) == listing(each_bundle)
    for name in listing(place):
        assert (place / name).read_bytes() == (each_bundle / name).read_bytes(), name


@pytest.mark.parametrize("stage", ["weights", *slow("trace", "hash")])
def test_interrupted_export(export: Callable[..., Manifest], place: Path, stage: str) -> None:
    """Ctrl-C at any stage leaves nothing at the target nor beside it, and a second try works."""

    def progress(what: str, done: int, total: int) -> None:
        if what == stage and done * 2 >= total:
            assert len(listing(place.parent)) > 0  # something was there to clean up
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(place, progress=progress)
    assert listing(place.parent) == []
    export(place)
    Runtime(place)


def full(*args: Any, **more: Any) -> Any:
    """What every write says once the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where",
    ["os.pwrite", "pathlib.Path.write_bytes", "pathlib.Path.write_text", "trol_edge.export.pipeline.write_manifest"],
)
def test_full_disk(export: Callable[..., Manifest], place: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """In the weights, in a graph, in the manifest: an error that says so, and nothing is left over."""
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(ExportError, match="the disk is full; make room"):
            export(place)
    assert listing(place.parent) == []


def test_disk_too_small(export: Callable[..., Manifest], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before writing: both numbers."""
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match=r"\d+\.\d MB needed, 0\.0 MB free; make room"):
        export(place)
    assert listing(place.parent) == []


def test_existing_folder(export: Callable[..., Manifest], place: Path) -> None:
    """Refused without overwrite, whatever is in it, before any work; replaced with it."""
    place.mkdir()
    with pytest.raises(ExportError, match=r"exists; choose another name.*--force"):
        export(place)
    export(place, overwrite=True)  # empty
    before = (place / MANIFEST).read_bytes()
    with pytest.raises(ExportError, match="exists"):
        export(place)
    assert (place / MANIFEST).read_bytes() == before
    export(place, overwrite=True, model="renamed")
    assert Bundle(place).manifest.model == "renamed"
    assert listing(place.parent) == sorted(
        ["nano", *(f"nano/{name}" for name in (MANIFEST, *FILES) if name != SELFTEST)]
    )


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "model.safetensors", ".git"])
def test_foreign_folder_is_never_deleted(
    export: Callable[..., Manifest], place: Path, nano_bundle: Path, name: str
) -> None:
    """Overwriting replaces bundles, not a folder that holds anything else, a checkpoint for example."""
    shutil.copytree(nano_bundle, place)
    (place / name).write_text("mine")
    before = listing(place.parent)
    with pytest.raises(ExportError, match=rf"holds other files \({name}\)"):
        export(place, overwrite=True)
    assert listing(place.parent) == before
    assert (place / name).read_text() == "mine"


def test_export_onto_its_own_checkpoint(place: Path, nano_bundle: Path) -> None:
    """The same path twice by mistake, with --force: the checkpoint survives."""
    shutil.copytree(NANO, place)
    before = listing(place)
    with pytest.raises(ExportError, match="holds other files"):
        pipeline.export(place, place, overwrite=True)
    assert listing(place) == before


def test_target_is_a_file(export: Callable[..., Manifest], place: Path) -> None:
    """Refused with and without overwrite; so is a place below a file."""
    place.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match=r"exists|is a file"):
            export(place, overwrite=overwrite)
    with pytest.raises(ExportError, match="cannot be written"):
        export(place / "below")
    assert place.read_text() == "mine"


def test_failed_overwrite_keeps_the_old(
    export: Callable[..., Manifest], place: Path, nano_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the new one is whole, and even if the last rename fails."""
    shutil.copytree(nano_bundle, place)
    before = (place / MANIFEST).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ExportError):
            export(place, overwrite=True)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == place and (self / MANIFEST).read_bytes() != before:
            raise OSError(errno.EIO, "planted")
        return rename(self, target)

    monkeypatch.setattr(folder_module, "_exchanged_at_once", lambda new, final: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ExportError, match="planted"):
        export(place, overwrite=True, model="new")
    assert (place / MANIFEST).read_bytes() == before
    Runtime(place)
    assert listing(place.parent) == sorted(["nano", *(f"nano/{name}" for name in (MANIFEST, *FILES))])


def test_left_overs_of_killed_writers(tmp_path: Path) -> None:
    """Removed by the next writer of the same name where nobody holds their lock; those of other names are not."""
    gone = [".nano.abc12_x9.part", ".nano.00000000.part"]
    kept = [
        ".nano.v2.abc12_x9.part",
        ".nanos.abc12_x9.part",
        ".nano.x.part",
        "nano.abc12_x9.part",
        ".nano.abc12_x9.part.txt",
    ]
    for name in gone + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    with new_folder(tmp_path / "nano") as folder:
        (folder / MANIFEST).write_text("{}")
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, folder.name])
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "nano"])


def test_two_writers_of_one_name(tmp_path: Path) -> None:
    """The slower one gets an error; the faster one's folder is complete."""
    with pytest.raises(ExportError, match="cannot be written"), new_folder(tmp_path / "a") as slow:
        (slow / MANIFEST).write_text("slow")
        with new_folder(tmp_path / "a") as fast:
            (fast / MANIFEST).write_text("fast")
    assert (tmp_path / "a" / MANIFEST).read_text() == "fast"
    assert os.listdir(tmp_path) == ["a"]


def test_context_limits(export: Callable[..., Manifest], place: Path) -> None:
    """More than the model's positions, or less than a prompt and an answer."""
    for context in (0, 1, -5, 2049, 10**9):
        with pytest.raises(ExportError, match=rf"context {context}: .*choose 2\.\.2048"):
            export(place, context=context)
    with pytest.raises(ExportError, match="target 'gpu' is not one of cpu, onnx"):
        pipeline.export(NANO, place, target="gpu")
    assert listing(place.parent) == []


STAGES = ("weights", "trace", "selftest", "hash")


def test_progress_reports_every_stage(export: Callable[..., Manifest], place: Path) -> None:
    """Each stage counts up to its total, and says when it is done."""
    calls: list[tuple[str, int, int]] = []
    export(place, record_selftest=True, progress=lambda *call: calls.append(call))
    for stage in STAGES:
        done = [(d, t) for what, d, t in calls if what == stage]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1] > 0
        assert len({t for _, t in done}) == 1
    assert {what for what, _, _ in calls} == set(STAGES)
