"""Files that come from somewhere else: names, kinds, sizes and contradictions in them, each refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from trol_edge.bundle import engines
from trol_edge.bundle.folder import digest_of
from trol_edge.bundle.graph_file import read_graph
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import MANIFEST, SELFTEST, TOKENIZER, WEIGHTS
from trol_edge.bundle.program_counts import ProgramCounts, Work
from trol_edge.bundle.selftest import read as read_selftest
from trol_edge.bundle.weights import WeightsFile
from trol_edge.errors import BundleError, TrolEdgeError, UsageError
from trol_edge.prompt.charsmap import Charsmap
from trol_edge.prompt.tokenizer import Tokenizer
from trol_edge.reading import guard, is_plain_name, read_json, read_plain
from trol_edge.runtime import Runtime

DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE_JSON = {
    "deep": DEEP,
    "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "lone surrogate": '{"a": "\\ud800"}',
    "lone surrogate in a key": '{"\\udfff": 1}',
    "huge integer": '{"a": ' + "9" * 5000 + "}",
    "null": "null",
    "a list": "[]",
    "empty": "",
    "not UTF-8": b"\xff\xfe{",
    "git-lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "a web page": "<!DOCTYPE html><html></html>",
}


@pytest.fixture
def copy(nano_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose files may be replaced (they are hard links)."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in nano_bundle.iterdir():
        os.link(path, folder / path.name)
    return folder


def replace(path: Path, data: bytes) -> None:
    """New content under an old name."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def seal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda data: None) -> None:
    """Change the manifest, and give it and every file the hashes that fit, as a tool that knows the format would."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    data.pop("manifest_sha256")
    for name in data["files"]:
        content = (folder / name).read_bytes()
        data["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(data)
    data["manifest_sha256"] = digest_of(data)
    replace(folder / MANIFEST, json.dumps(data).encode())


def bounded(code: str, *arguments: object, seconds: float = 30) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that may take 3 GB of memory; it fails where it hangs."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, preexec_fn=limit, check=False)


# -- names and kinds ---------------------------------------------------------------------------------------------------

NAMES = [
    "../secret",
    "/etc/hostname",
    "sub/../vision.onnx",
    ".hidden.onnx",
    "..",
    "",
    "a\x00b.onnx",
    "x" * 300 + ".onnx",
]


@pytest.mark.parametrize("name", [*NAMES, "notes.txt", MANIFEST, "a\u202eb.onnx", "C:\\x.onnx"])
def test_files_of_a_manifest_are_plain_names(copy: Path, name: str) -> None:
    """Nothing else is opened, and the message tells nothing about it."""
    seal(copy, lambda data: data["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="not the name of a bundle's file"):
        Bundle(copy)


@pytest.mark.parametrize("name", ["../vision.onnx", "/proc/kmsg", "unlisted.onnx", "tokenizer.json", ""])
def test_graphs_of_a_manifest_are_listed_files(copy: Path, name: str) -> None:
    """A graph's file is one whose hash was checked."""
    (copy / "unlisted.onnx").write_bytes((copy / "step.onnx").read_bytes())
    seal(copy, lambda data: data["graphs"]["step"].update(file=name))
    with pytest.raises(BundleError, match=r"does not list .* the file of graph step"):
        Bundle(copy)


@pytest.mark.parametrize("name", ["step.onnx", WEIGHTS, TOKENIZER, SELFTEST])
def test_links_stay_in_the_folder(copy: Path, tmp_path: Path, name: str) -> None:
    """One to elsewhere is refused, whatever is there; one to a blob of a hub's cache, and one within, are as good."""
    content = (copy / name).read_bytes()
    for place, good in ((tmp_path / "elsewhere", False), (tmp_path / "blobs", True)):
        place.mkdir()
        (place / "content").write_bytes(content)
        (copy / name).unlink()
        (copy / name).symlink_to(place / "content")
        if good:
            Bundle(copy)
        else:
            with pytest.raises(BundleError, match=rf"{name} is a link to a place outside"):
                Bundle(copy)


@pytest.mark.parametrize("name", ["step.onnx", WEIGHTS, MANIFEST])
def test_a_pipe_is_no_file(copy: Path, name: str) -> None:
    """It would be waited for, for ever."""
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(BundleError, match=r"named pipe|not a regular file"):
        Bundle(copy)


def test_plain_files_only(tmp_path: Path) -> None:
    """Folders, pipes, devices and files of /proc that never end."""
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "a named pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path / "nothing", "No such file"),
        (tmp_path / ("n" * 5000), "too long"),
    ):
        with pytest.raises(UsageError, match=message):
            read_plain(path, UsageError)
    assert read_plain(Path("/proc/kmsg"), UsageError) == b"" if os.access("/proc/kmsg", os.R_OK) else True
    (tmp_path / "large").write_bytes(bytes(100))
    with pytest.raises(UsageError, match="100 bytes, more than the 10"):
        read_plain(tmp_path / "large", UsageError, most=10)


def test_plain_names() -> None:
    """What may stand in a file that somebody else wrote."""
    assert all(map(is_plain_name, ("a", "model-00001-of-00002.safetensors", "é.onnx", "a b.bin")))
    assert not any(map(is_plain_name, (*NAMES, None, 5, "a/b", "a\nb", "\ud800", "-rf")))


# -- readers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_hostile_json(tmp_path: Path, content: str | bytes) -> None:
    """One error, short, printable, that names the file and says what to do."""
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        read_json(path, UsageError, "do this")
    text = str(caught.value)
    assert str(path) in text and len(text) < 1000
    assert "do this" in text or "git lfs pull" in text or "web page" in text
    text.encode()


@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
@pytest.mark.parametrize("name", [MANIFEST, TOKENIZER])
def test_hostile_json_in_a_bundle(copy: Path, name: str, content: str | bytes) -> None:
    """In the manifest, and in the tokenizer."""
    replace(copy / name, content if isinstance(content, bytes) else content.encode())
    if name != MANIFEST:
        seal(copy)
    with pytest.raises(BundleError, match=name):
        Runtime(copy)


def test_a_byte_order_mark_is_no_part_of_a_file(copy: Path) -> None:
    """As editors on Windows write it."""
    replace(copy / MANIFEST, b"\xef\xbb\xbf" + (copy / MANIFEST).read_bytes())
    Bundle(copy)


def test_a_panic_of_the_tokenizer_library_is_an_error(copy: Path) -> None:
    """It is a BaseException, which nothing else catches; Ctrl-C goes through."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(BundleError, match="PanicException: dance"), guard("x"):
        raise panic("dance")
    for cause in (KeyboardInterrupt, SystemExit):
        with pytest.raises(cause), guard("x"):
            raise cause
    data = json.loads((copy / TOKENIZER).read_text(encoding="utf-8"))
    data["normalizer"]["normalizers"].insert(0, {"type": "Precompiled", "precompiled_charsmap": "AAAAQEFBQUE="})
    with pytest.raises(BundleError, match="copy or export"):
        Tokenizer(json.dumps(data))


SLOW_STEPS = {
    "backtracking": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    "quadratic": {"type": "Replace", "pattern": {"Regex": "▁+\\z"}, "content": ""},
    "growing": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100},
    "unknown": {"type": "NFKC"},
}


@pytest.mark.parametrize("step", SLOW_STEPS.values(), ids=SLOW_STEPS)
def test_a_tokenizer_has_only_steps_that_export_writes(copy: Path, step: dict[str, Any]) -> None:
    """Regular expressions of somebody else may take hours, and replacements may make a text endless."""
    data = json.loads((copy / TOKENIZER).read_text(encoding="utf-8"))
    data["normalizer"]["normalizers"].append(step)
    with pytest.raises(BundleError, match="a step that export does not write"):
        Tokenizer(json.dumps(data))


def test_a_character_map_that_makes_texts_endless() -> None:
    """One character becomes ten thousand."""
    units = np.zeros(1024, "<u4")
    units[0] = 256 << 10  # where the children of the root are: at 256 ^ byte
    units[256 ^ ord("a")] = ord("a") | 0x100 | (512 << 10)
    units[(256 ^ ord("a")) ^ 512] = 0x80000000  # the place of its replacement: 0
    blob = len(units.tobytes()).to_bytes(4, "little") + units.tobytes() + b"b" * 10_000 + bytes(1)
    with pytest.raises(ValueError, match="too long"):
        Charsmap(blob).normalise("a" * 1000)
    assert Charsmap(blob[:-10_001] + b"bb\0").normalise("xaax") == "xbbbbx"


def test_texts_of_one_character(nano: Runtime) -> None:
    """As long as a context may hold: no step looks at each character again for each."""
    tokenizer = nano.model.text
    for character in "▁ a\u0301\U0001f468":
        start = time.process_time()
        tokenizer.encode(character * 30_000 + "x")
        assert time.process_time() - start < 5, repr(character)


@pytest.mark.parametrize("token", [2**31, 2**24 + 2**22, 70_000])
def test_a_token_beyond_the_embedding_table(copy: Path, token: int) -> None:
    """A vocabulary of another model."""
    data = json.loads((copy / TOKENIZER).read_text(encoding="utf-8"))
    data["model"]["vocab"]["zzz"] = token
    replace(copy / TOKENIZER, json.dumps(data).encode())
    seal(copy)
    with pytest.raises(BundleError, match=f"token {token}, but the embedding table of this model has 801 rows"):
        Runtime(copy)


# -- manifests that contradict -----------------------------------------------------------------------------------------

ROPE = {"short_factor": [1.0], "long_factor": [1.0], "original_max_position_embeddings": 9, "amplitude": 1.0}
CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "layers": lambda d: d["spec"].update(num_layers=4),
    "many layers": lambda d: d["spec"].update(num_layers=10**7),
    "huge layers": lambda d: d["spec"].update(num_layers=10**40),
    "width": lambda d: d["spec"].update(hidden_size=64),
    "heads": lambda d: d["spec"].update(num_kv_heads=3),
    "head": lambda d: d["spec"].update(head_dim=16),
    "vocabulary": lambda d: d["spec"].update(vocab_size=2**31),
    "rows": lambda d: d["spec"].update(embedding_rows=900),
    "context": lambda d: d.update(context=1024),
    "huge context": lambda d: d.update(context=2**50),
    "positions": lambda d: d["spec"].update(max_position_embeddings=10),
    "end": lambda d: d["spec"].update(eos_token_id=2**31),
    "negative end": lambda d: d["spec"].update(eos_token_id=-1),
    "picture's tokens": lambda d: d["prompt"].update(tokens_per_image=10**9),
    "both picture's tokens": lambda d: (
        d["prompt"].update(tokens_per_image=65),
        d["spec"]["vision"].update(tokens_per_image=65),
    ),
    "tiles": lambda d: d["image"].update(kind="tiles", max_tiles=10**9),
    "size": lambda d: d["image"].update(size=10**6),
    "another size": lambda d: d["image"].update(size=56),
    "no step": lambda d: d["graphs"].pop("step"),
    "another graph": lambda d: d["graphs"]["step"].update(file="vision.onnx"),
    "port": lambda d: d["graphs"]["step"]["inputs"].pop(),
    "type": lambda d: d["graphs"]["step"]["inputs"][0].update(dtype="float16"),
    "unknown type": lambda d: d["graphs"]["step"]["inputs"][0].update(dtype="complex"),
    "operators": lambda d: d["graphs"]["step"]["operators"].update(Add=1),
    "a weight": lambda d: d["graphs"]["step"]["weights"].append("nothing"),
    "fewer weights": lambda d: d["graphs"]["step"]["weights"].pop(),
    "rope": lambda d: d["spec"].update(long_rope=ROPE),
    "nothing": lambda d: d.update(spec=None),
    "null graph": lambda d: d["graphs"].update(step=None),
    "infinite": lambda d: d["spec"].update(rope_theta=float("inf")),
    "not a number": lambda d: d["spec"].update(rms_norm_eps=float("nan")),
    "query heads": lambda d: d["spec"].update(num_heads=4096),
    "wide layers": lambda d: d["spec"].update(intermediate_size=2**20),
    "tower's width": lambda d: d["spec"]["vision"].update(hidden_size=2**17),
    "patches": lambda d: d["spec"]["vision"].update(image_size=2**13, patch_size=1),
    "many unknown keys": lambda d: d.update({f"key {i}": 1 for i in range(50_000)}),
    "a name without end": lambda d: d.update(model="x" * 2_000_000),
    "a long unknown key": lambda d: d.update({"x" * 1_000_000: 1}),
    "endless costs": lambda d: costs(d)["operations"][0].update(flops={"*".join(["tokens"] * 100_000): 1}),
    "endless peak": lambda d: costs(d).update(peak=[{"*".join(["slots"] * 100_000): 1}]),
    "another dimension": lambda d: costs(d)["operations"][0].update(flops={"anything": 1}),
    "huge costs": lambda d: costs(d)["operations"][0].update(flops={"tokens": 2**62}),
    "many times": lambda d: costs(d)["operations"][0].update(count=2**62),
    "many operations": lambda d: costs(d).update(operations=costs(d)["operations"] * 1000),
}


def costs(data: dict[str, Any]) -> dict[str, Any]:
    """The counts of a graph in a manifest."""
    found: dict[str, Any] = data["graphs"]["traverse"]["costs"]
    return found


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_manifests_that_contradict_their_files(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Found when the bundle is opened, in a second, before anything is sized by it."""
    seal(copy, change)
    start = time.process_time()
    with pytest.raises(BundleError) as caught:
        Bundle(copy)
    assert time.process_time() - start < 5
    assert "export" in str(caught.value).lower() and len(str(caught.value)) < 3000


def reshaped(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    """Another shape for a tensor of the weights file."""
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = np.zeros(shape, tensors[name].dtype)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)
    seal(folder)


@pytest.mark.parametrize("name", ["embedding", "rope.cos", "decoder.layers.0.qkv.weight", "decoder.norm.weight"])
def test_weights_of_another_shape(copy: Path, name: str) -> None:
    """Named, with both shapes."""
    reshaped(copy, name, (3, 5))
    with pytest.raises(BundleError, match=rf"{name}.*\[3, 5\]"):
        Bundle(copy)


HEADERS: dict[str, Any] = {
    "deep": DEEP,
    "list": "[]",
    "null tensor": '{"a": null}',
    "huge shape": json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}),
    "zero times huge": json.dumps({"a": {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}}),
    "fraction": json.dumps({"a": {"dtype": "F32", "shape": [0.5], "data_offsets": [0, 2]}}),
    "bool": json.dumps({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}),
    "no type": json.dumps({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}),
    "overlap": json.dumps({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}),
    "many axes": json.dumps({"a": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_of_weights(tmp_path: Path, header: str) -> None:
    """Whatever stands there."""
    path = tmp_path / WEIGHTS
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(BundleError, match="copy the bundle again"):
        WeightsFile(path)


@pytest.mark.parametrize("field", ["ids", "forced", "positions", "best", "logits", "cache", "margin"])
@pytest.mark.parametrize("how", ["shape", "values"])
def test_self_tests_of_another_shape(copy: Path, field: str, how: str) -> None:
    """One error that names the field, before it is replayed."""
    tensors = load_file(copy / SELFTEST)
    array = tensors[f"picture.{field}"]
    if how == "values" and array.dtype == np.int32:
        tensors[f"picture.{field}"] = np.full_like(array, 2**30)
    else:
        tensors[f"picture.{field}"] = np.zeros((2, 3, *array.shape), array.dtype)
    (copy / SELFTEST).unlink()
    save_file(tensors, copy / SELFTEST)
    seal(copy)
    with pytest.raises(BundleError, match=rf"{SELFTEST}.*{field if field != 'ids' else 'picture'}"):
        read_selftest(Bundle(copy))


# -- graphs ------------------------------------------------------------------------------------------------------------


def changed_graph(folder: Path, change: Callable[[ir.Model], object], name: str = "step.onnx") -> None:
    """Change a graph, and make the manifest agree."""
    model = ir.load(folder / name)
    change(model)
    replace(folder / name, ir.to_proto(model).SerializeToString())
    seal(folder)


def with_loop(model: ir.Model) -> None:
    """An innocent-looking loop of 2**62 rounds."""
    body = ir.Graph([], [], nodes=[], name="body")
    count = ir.node("Constant", [], {"value": ir.tensor(np.array(2**62, np.int64))})
    model.graph.append(count)
    model.graph.append(ir.node("Loop", [count.outputs[0], None], {"body": body}))


def with_another_domain(model: ir.Model) -> None:
    """An operator of a library that somebody would have to load."""
    model.graph.append(ir.node("Anything", [model.graph.inputs[0]], domain="com.example"))


def with_a_file_of_its_own(model: ir.Model) -> None:
    """Numbers from a file that no hash covers."""
    tensor = ir.ExternalTensor("tokenizer.json", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="secret")
    value = ir.Value(name="secret", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    model.graph.register_initializer(value)


def with_another_place(model: ir.Model) -> None:
    """Numbers of the weights file, from where the header has them not."""
    tensor = ir.ExternalTensor(WEIGHTS, 8, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="embedding")
    value = ir.Value(name="embedding", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    model.graph.register_initializer(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_loop, "Loop.*none that export writes"),
        (with_another_domain, "com.example.Anything.*none that export writes"),
        (with_a_file_of_its_own, "reads 'tokenizer.json'"),
        (with_another_place, "reads embedding where"),
    ],
)
def test_graphs_that_are_none_of_ours(copy: Path, change: Callable[[ir.Model], object], message: str) -> None:
    """Refused before the inference library reads them."""
    changed_graph(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle(copy)


def test_damaged_graphs_are_errors(copy: Path) -> None:
    """Cut at any place, and with any byte changed: read, or refused."""
    whole = (copy / "step.onnx").read_bytes()
    rng = np.random.default_rng(0)
    path = copy / "step.onnx"
    for i in range(400):
        data = bytearray(whole)
        if i % 2:
            del data[int(rng.integers(len(data))) :]
        else:
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        replace(path, bytes(data))
        try:
            read_graph(path, WEIGHTS)
        except BundleError as error:
            assert "step.onnx" in str(error)


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_hostile_engine_lists(copy: Path, content: str | bytes) -> None:
    """As any other JSON."""
    folder = copy / "engines" / "rtx"
    folder.mkdir(parents=True)
    (folder / "engines.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TrolEdgeError, match=r"engines\.json"):
        engines.read(Bundle(copy), "rtx")


@pytest.mark.parametrize("polynomial", [{"tokens*" * 100_000 + "1": 1}, {"anything": 1}, {"tokens": 2**60}])
def test_counts_of_engines_are_bounded(copy: Path, polynomial: dict[str, int]) -> None:
    """`plan` evaluates them."""
    folder = copy / "engines" / "rtx"
    folder.mkdir(parents=True)
    counts = ProgramCounts({}, 1, 1, 1, (Work("rest", {}, polynomial),), {})
    one = engines.EngineInfo("step.engine", 1, "", "", 0, {}, (), 0.0, (counts,))
    key = engines.Key("rtx", "", "", "", "")
    engines.write(folder, engines.EngineSet(2, "", key, "", "", dict.fromkeys(engines.ENGINES, one)))
    with pytest.raises(BundleError, match=r"the counts of vision have a (term|coefficient)"):
        engines.read(Bundle(copy), "rtx")


@pytest.mark.parametrize("file", ["../../../vision.engine", "/etc/passwd", "a/b"])
def test_engines_are_files_of_their_folder(copy: Path, file: str) -> None:
    """An engine is a program."""
    folder = copy / "engines" / "rtx"
    folder.mkdir(parents=True)
    key = engines.Key("rtx", "", "", "", "")
    one = engines.EngineInfo(file, 1, "", "", 0, {}, (), 0.0)
    engines.write(folder, engines.EngineSet(2, "", key, "", "", dict.fromkeys(engines.ENGINES, one)))
    with pytest.raises(BundleError, match="not an engine of rtx"):
        engines.read(Bundle(copy), "rtx")
