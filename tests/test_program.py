"""Programs of engines: what is read from them, on small networks with known traffic, and what is refused."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import small_engines, trt_standin
from tests.conftest import NANO
from tests.small_engines import INNER, OUTER, ROWS, engine_of, stored
from trol_edge.bundle.engines import ENGINES, FORMAT_VERSION, EngineInfo, EngineSet, Key, folder_of, read, write
from trol_edge.bundle.folder import sha256_of
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.sizes import shared_weights
from trol_edge.cli.main import main
from trol_edge.errors import BackendError, BundleError, TrolEdgeError, UsageError
from trol_edge.program import inspector, text
from trol_edge.program.model import Program
from trol_edge.program.traffic import COPY, REARRANGED, UNFILLED, WIDENED, Traffic, count
from trol_edge.runtimes.trt import build as trt_build
from trol_edge.runtimes.trt.api import Library
from trol_edge.runtimes.trt.programs import programs as programs_of

ROW = 4 * 64 * 2  # bytes of one row of a cache
CACHE = 256 * ROW
FILLED = 100
CACHES = {"past": 2, "present": 2, "values": 2}


def traffic(program: Program, **more: Any) -> Traffic:
    """One run with 100 filled rows; an output of a dynamic size has as many."""
    output = program.tensors.get(program.outputs.get("y", ""))
    dynamic = output is not None and any(isinstance(dim, str) for dim in output.dims)
    shapes = {"y": (1, 4, FILLED, 64)} if dynamic else {}
    return count(program, shapes, **({"caches": CACHES, "filled": FILLED} | more))


def program_of(name: str, tmp_path: Path, really: bool) -> Program:
    """The program of a small network: of an engine built here, or the committed text."""
    if really:
        pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (make test-rtx installs it)")
        path = small_engines.build(name, tmp_path)
    else:
        path = tmp_path / "stored.engine"
        path.write_bytes(engine_of(stored(name)))
    (program,) = text.read(path)
    assert program.library == "TensorRT for RTX 1.7.1"
    return program


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.rtx)], ids=["stored", "built"])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A function from the name of a network to its program."""
    return lambda name: program_of(name, tmp_path, request.param)


# -- known answers -----------------------------------------------------------------------------------------------------


def test_a_copied_cache(program: Any) -> None:
    """The whole cache is read and written, and one row of each head is scattered into it."""
    found = traffic(program("copy"))
    copy, scatter = found.kernels
    assert (copy.read, copy.written) == (CACHE, CACHE)
    assert scatter.writes == {"present.1": ROW}
    assert scatter.reads == {"present.1": 0, "rows.1": 4 * 3 * 8, "new.1": ROW}
    assert found.moved == 2 * CACHE + 2 * ROW + 96
    (avoidable,) = found.avoidable
    assert (avoidable.kind, avoidable.bytes, avoidable.what) == (COPY, 2 * CACHE, "past.1 to present.1")
    assert (found.constants, found.cache, found.results, found.ideal) == (0, FILLED * ROW, 0, FILLED * ROW)


def test_a_copy_is_named_without_knowing_caches(program: Any) -> None:
    found = count(program("copy"))
    assert [(a.kind, a.bytes) for a in found.avoidable] == [(COPY, 2 * CACHE)]
    assert (found.cache, found.results) == (0, CACHE)


def test_a_cache_in_place(program: Any) -> None:
    """Only the new row moves."""
    found = traffic(program("scatter"))
    assert found.moved == 2 * ROW + 8
    assert found.avoidable == ()


def test_a_slice_reads_what_it_gives(program: Any) -> None:
    """The size of the dynamic dimension comes from the program's own arithmetic."""
    sliced = program("slice")
    found = traffic(sliced)
    assert (found.kernels[0].read, found.kernels[0].written) == (FILLED * ROW, FILLED * ROW)
    assert count(sliced, {"y": (1, 4, 7, 64)}).moved == 2 * 7 * ROW
    with pytest.raises(UsageError, match=r"outside this profile: .* out of bounds \[1, 256\]"):
        count(sliced, {"y": (1, 4, 257, 64)})
    with pytest.raises(UsageError, match="y has a dimension of 64, not 65"):
        count(sliced, {"y": (1, 4, 7, 65)})
    with pytest.raises(BundleError, match="cannot be computed from the input shapes"):
        count(sliced)


def test_a_fused_product(program: Any) -> None:
    """Weights and inputs of 8 bits are read as they are."""
    found = traffic(program("product"))
    (product,) = [moved for moved in found.kernels if moved.product]
    assert (product.product, product.operations) == ("int8", 2 * ROWS * INNER * OUTER)
    assert product.read == pytest.approx(INNER * OUTER + ROWS * INNER, abs=16)
    assert found.constants == pytest.approx(INNER * OUTER + 2 * OUTER, abs=16)
    assert found.results == ROWS * OUTER * 2
    assert found.avoidable == ()


def test_a_dequantization_into_scratch(program: Any) -> None:
    """8-bit weights of a single row's FP16 product are widened at every run: written, and read again."""
    found = traffic(program("widened"))
    widen, product = found.kernels
    assert (widen.read, widen.written) == (INNER * OUTER + 2 * OUTER, 2 * INNER * OUTER)
    assert (product.product, product.operations) == ("float16", 2 * INNER * OUTER)
    (avoidable,) = found.avoidable
    assert (avoidable.kind, avoidable.bytes) == (WIDENED, 4 * INNER * OUTER)
    assert "node_of_w" in avoidable.what
    assert found.scratch >= 2 * INNER * OUTER


def test_weights_in_blocks(program: Any) -> None:
    """4-bit weights are read by the product itself."""
    found = traffic(program("blocks"))
    (product,) = found.kernels
    assert product.read == INNER * OUTER // 2 + INNER // 128 * OUTER * 2 + INNER * 2
    assert (product.product, product.operations) == ("float16", 2 * INNER * OUTER)
    assert found.avoidable == ()


def test_attention_over_a_cache(program: Any) -> None:
    """It reads all rows; those that are not filled are avoidable."""
    found = traffic(program("attention"))
    attention = next(moved for moved in found.kernels if moved.product == "attention")
    assert attention.read == 2 * CACHE + 512 + 256
    wasted = (256 - FILLED) * ROW
    assert sorted((a.kind, a.bytes) for a in found.avoidable) == [(UNFILLED, wasted), (UNFILLED, wasted)]
    full = traffic(program("attention"), filled=None)
    assert full.avoidable == () and full.cache == 2 * CACHE


def test_weights_that_are_inputs_count_as_constants() -> None:
    program = text.parse(stored("attention"), "a test")
    found = count(program, weights=["past", "no such input"])
    assert found.constants == CACHE


def test_rearranged_constants_are_named() -> None:
    """A tensor that is made from constants at every run, and is not larger than they are."""
    other = stored("widened").replace("__myl_CastMulCast ", "__myl_TranResh ")
    other = other.replace(f"const_payload_size={INNER * OUTER}", f"const_payload_size={3 * INNER * OUTER}")
    (avoidable,) = count(text.parse(other, "a test")).avoidable
    assert avoidable.kind == REARRANGED


# -- other files -------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, data: bytes) -> str:
    """What the reader says about a file that it does not read."""
    path = tmp_path / "some.engine"
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        text.read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_engines_of_another_tensorrt(tmp_path: Path) -> None:
    assert "an engine of classic TensorRT; only programs of TensorRT for RTX" in refused(tmp_path, b"ftrt" + bytes(900))
    assert "RTX 1.8.0, whose format is unknown" in refused(tmp_path, engine_of(stored("copy"), version=(1, 8, 0)))
    assert "begins with 'PK" in refused(tmp_path, b"PK\3\4" + bytes(900))
    refused(tmp_path, b"")


def test_truncated_engines(tmp_path: Path) -> None:
    whole = engine_of(stored("copy"))
    for length in (len(whole) - 1, len(whole) // 2, 113, 112, 111, 64, 30):
        assert "truncated or altered" in refused(tmp_path, whole[:length])


def test_absent_or_compressed_programs(tmp_path: Path) -> None:
    assert "absent or compressed" in refused(tmp_path, engine_of())
    assert "absent or compressed" in refused(tmp_path, engine_of("\x1f\x8b not a text"))
    later = stored("copy").replace("version = 5", "version = 6")
    assert "absent or compressed" in refused(tmp_path, engine_of(later))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("function={", "jump={ to=7 } function={", "an unknown statement 'jump'"),
        (" label bb1:", " label bb1: label bb2:", "branches"),
        ('input_args={ "past.1" }', 'input_args={ "future.1" }', "uses future.1, which is not described"),
        ("main {", "mean {", "a program without main"),
        ('region=""', 'region="moon"', "unknown place 'moon'"),
        ("dims={ 1 4 256 64 }", "dims={ 1 4 99999999999999999999 64 }", "where a count is expected"),
        ("= {", "= {{{{{{{{{{{{", "braces in each other"),
        ("descriptors {", "descriptors { {", "inside 1 braces"),
        ("  tensor={", "  tensor= = {", "without a key"),
    ],
)
def test_unknown_texts(tmp_path: Path, old: str, new: str, said: str) -> None:
    """What is not as in 1.7's programs is named, and nothing is claimed."""
    assert old in stored("copy")
    assert said in refused(tmp_path, engine_of(stored("copy").replace(old, new, 1)))


def test_a_type_of_unknown_size_is_not_guessed() -> None:
    program = text.parse(stored("copy").replace("type=half", "type=posit"), "a test")
    with pytest.raises(BundleError, match="type posit, whose size is not known"):
        count(program)


def test_bounded_on_hostile_files(tmp_path: Path) -> None:
    """Sizes that lie, texts without an end and numbers without a bound take neither memory nor time."""
    whole = engine_of(stored("copy"))
    place = whole.index(b"NLYM")
    lying = whole[: place + 8] + (1 << 60).to_bytes(8, "little") + whole[place + 16 :]
    assert "does not fit its section" in refused(tmp_path, lying)
    assert "table of sections" in refused(tmp_path, whole[:80] + (1 << 62).to_bytes(8, "little") + whole[88:])
    marks = engine_of("-" * 8 * 110_000).replace(b"-" * 8, b"NLYM\xa1\xda\x1e\0")
    assert "more than 100000 parts" in refused(tmp_path, marks)
    operands = '"past.1" ' * 300
    many = stored("copy").replace('input_args={ "past.1" }', f"input_args={{ {operands}}}")
    assert "more than 256 operands" in refused(tmp_path, engine_of(many))
    assert "more than 16 programs" in refused(tmp_path, engine_of(*[stored("scatter")] * 17))
    start = time.process_time()
    widens = re.search(r"  function=.*__myl_CastMulCast .*", stored("widened"))
    assert widens
    many = stored("widened").replace(widens[0], "\n".join([widens[0]] * 5_000))
    assert len(count(text.parse(many, "a test")).kernels) == 5_001
    for filler in (
        "{" * 100_000,
        '"' * 100_001,
        "a=" * 100_000,
        "[ONNX Layer: " * 100_000,
    ):
        refused(tmp_path, engine_of(f"header {{\n  version = 5\n{filler}"))
    growing = "".join(
        f'mul={{ output={{"n{i + 1}" }} input={{"n{i}" "n{i}" }} }}\n' for i in range(20_000)
    )  # doubles the digits of a number each time
    squares = stored("slice").replace(
        "shape_main {", f'shape_main {{ memset={{ output={{"n0" }} src="7i64" }} {growing}'
    )
    assert traffic(text.parse(squares, "a test")).moved == 2 * FILLED * ROW
    assert time.process_time() - start < 60, "time grows faster than the text"


@pytest.mark.parametrize("name", ["slice", "widened"])
def test_damaged_texts_never_crash(name: str) -> None:
    """Whatever is cut, doubled or exchanged in a text: an answer, or an error of this package."""
    whole, chance = stored(name), random.Random(7)
    words = whole.split(" ")
    for _ in range(400):
        damaged = list(words)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(damaged))
            kind = chance.randrange(3)
            if kind == 0:
                del damaged[at]
            elif kind == 1:
                damaged[at] = chance.choice(words)
            else:
                damaged.insert(at, chance.choice(["{", "}", '"', "=", "-1", "0", "\0"]))
        try:
            traffic(text.parse(" ".join(damaged), "a test"))
        except TrolEdgeError:
            continue


# -- TensorRT's inspector ----------------------------------------------------------------------------------------------


def described(**changes: Any) -> str:
    """What an inspector says, in the fields of NVIDIA's documentation: a widened weight, its product, a cache."""

    def port(name: str, dims: list[int], kind: str) -> dict[str, Any]:
        return {"Name": name, "Location": "Device", "Dimensions": dims, "Format/Datatype": kind}

    wide = port("wide", [512, 384], "Row major linear FP16 format (kLINEAR)")
    layers: list[Any] = [
        {"Name": "__myl_CastMulCast_myl0_1", "LayerType": "kgen", "Inputs": [port("w", [512, 384], "Int8")],
         "Outputs": [wide], "Metadata": "[ONNX Layer: dequantized]"},
        {"Name": "signal_myl0_2", "LayerType": "signal", "Inputs": [], "Outputs": []},
        {"Name": "product_myl0_3", "LayerType": "gemm", "Inputs": [port("x", [1, 512], "Half"), wide],
         "Outputs": [port("y", [1, 384], "Half")], "Metadata": "[ONNX Layer: product]"},
        {"Name": "__myl_Move_myl0_4", "LayerType": "kgen", "Inputs": [port("past", [1, 4, 256, 64], "Half")],
         "Outputs": [port("present", [1, 4, 256, 64], "Half")], "Metadata": ""},
    ]  # fmt: skip
    return json.dumps({"Layers": layers, "Bindings": ["x", "y", "past", "present"]} | changes)


def test_the_inspector_gives_the_same_report() -> None:
    program = inspector.parse(described(), "TensorRT 10.3.0", "step.engine", 12345)
    found = count(program, caches=CACHES, filled=FILLED)
    assert [moved.kernel.name for moved in found.kernels] == ["__myl_CastMulCast", "product", "__myl_Move"]
    assert found.constants == 512 * 384 and found.scratch == 12345 and found.results == 768
    assert [(k.product, k.operations) for k in found.kernels if k.product] == [("float16", 2 * 512 * 384)]
    assert {a.kind: a.bytes for a in found.avoidable} == {WIDENED: 4 * 512 * 384, COPY: 2 * CACHE}
    newer = json.loads(described())
    newer["I/O Tensors"] = [{"Name": name} for name in newer.pop("Bindings")]
    assert (
        count(inspector.parse(json.dumps(newer), "TensorRT 11.4.0", "step.engine"), caches=CACHES).moved == found.moved
    )


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (described(Layers=["kernel one", "kernel two"]), "by their names only"),
        (described(Layers=[]), "lists no layers"),
        ("[]", "lists no layers"),
        ("{", "not readable"),
        (described().replace("[1, 384]", "[-1, 384]"), "gives tensor y no fixed shape"),
        (described().replace("Int8", "Int5"), "'Int5', which is not known"),
        (described().replace('"Inputs": [{"Name": "x"', '"Nothing": [{"Name": "x"'), "which weights layer product"),
        (described().replace('"Name"', '"Title"'), "not readable"),
    ],
)
def test_what_an_inspector_leaves_open(said: str, problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        inspector.parse(said, "TensorRT 10.3.0", "step.engine")


# -- engines of a bundle -----------------------------------------------------------------------------------------------


def put_engines(folder: Path, target: str, library: str, files: dict[str, bytes]) -> Bundle:
    """Put files into a bundle as its engines."""
    bundle = Bundle(folder)
    place = folder_of(bundle, target)
    place.mkdir(parents=True)
    infos = {}
    for name in ENGINES:
        graph = bundle.manifest.graphs[name]
        path = place / f"{name}.engine"
        path.write_bytes(files[name])
        ranges = trt_build.profiles(bundle, graph)
        sha = bundle.manifest.files[graph.file].sha256
        infos[name] = EngineInfo(path.name, path.stat().st_size, sha256_of(path), sha, 1, {}, ranges, 0.0)
    weights = bundle.manifest.files[WEIGHTS].sha256
    write(place, EngineSet(FORMAT_VERSION, "a test", Key(target, library, "", "", ""), "fp32", weights, infos))
    return bundle


@pytest.fixture
def rtx_bundle(exported: Callable[..., Path], tmp_path: Path) -> Path:
    """trol-nano exported for TensorRT for RTX, without engines."""
    return Path(shutil.copytree(exported(NANO, target="rtx"), tmp_path / "bundle"))


def test_inspect_prints_programs(rtx_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One readable engine, one of another TensorRT and one whose program is absent: each says what is known of it."""
    assert main(["inspect", str(rtx_bundle), "--program"]) == 1
    assert "has no engines; make them with `trol-edge build`" in capsys.readouterr().err
    files = {"vision": b"ftrt" + bytes(200), "traverse": engine_of(), "step": engine_of(stored("copy"))}
    put_engines(rtx_bundle, "rtx", "TensorRT for RTX 1.7.1", files)
    assert main(["inspect", str(rtx_bundle), "--program", "--tokens", "20", "--filled", "30", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["tokens"], data["filled"], data["images"]) == (20, 30, 1)
    found = data["engines"]["rtx"]
    assert "an engine of classic TensorRT" in found["vision"]["unknown"]
    assert "absent or compressed" in found["traverse"]["unknown"]
    assert found["step"]["moved"] == 2 * CACHE + 2 * ROW + 96
    assert [kernel["name"] for kernel in found["step"]["kernels"]] == ["__myl_Move", "__myl_Scat"]
    assert found["step"]["avoidable"] == [{"kind": COPY, "what": "past.1 to present.1", "bytes": 2 * CACHE}]
    assert main(["inspect", str(rtx_bundle), "--program"]) == 0
    shown = capsys.readouterr().out
    assert "vision: nothing is known of its program" in shown
    assert "step: moves 0.3 MB" in shown and "avoidable, cache copy: 0.3 MB: past.1 to present.1" in shown
    assert main(["inspect", str(rtx_bundle), "--program", "--tokens", "2049"]) == 1
    assert "2049 tokens and 2049 filled rows: the bundle's context is 2048" in capsys.readouterr().err
    assert main(["inspect", str(rtx_bundle), "--tokens", "20"]) == 1
    assert "are for --program" in capsys.readouterr().err
    (rtx_bundle / "engines" / "rtx" / "step.engine").write_bytes(b"vtrt")
    assert main(["inspect", str(rtx_bundle), "--program", "--json"]) == 0
    assert "build it again" in json.loads(capsys.readouterr().out)["engines"]["rtx"]["step"]["unknown"]


@pytest.mark.rtx
def test_programs_of_real_engines(rtx_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """trol-nano: constants are the engine's weights, caches those of its ports, and every size is computed."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (make test-rtx installs it)")
    bundle = Bundle(rtx_bundle)
    trt_build.build(bundle)
    spec = bundle.manifest.spec
    row = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * 4  # float32, as this bundle computes
    tables = sum(tensor.nbytes for tensor in shared_weights(bundle).values())  # inputs, which count as constants
    for tokens, filled in ((20, 30), (100, 200)):
        given = ["--tokens", str(tokens), "--filled", str(filled)]
        assert main(["inspect", str(rtx_bundle), "--program", *given, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["engines"]["rtx"]
        assert found["step"]["cache"] == filled * row
        assert found["traverse"]["cache"] == 2 * filled * row
        assert found["step"]["results"] == pytest.approx(4 * spec.vocab_size, abs=64)
        engines = read(bundle, "rtx").engines
        for name in ENGINES:
            held = engines[name].weight_bytes + (tables if name != "vision" else 0)
            assert found[name]["constants"] == pytest.approx(held, rel=0.1)  # some are stored in two layouts
            assert found[name]["moved"] > found[name]["ideal"]
            products = [kernel for kernel in found[name]["kernels"] if kernel["product"]]
            assert len(products) > spec.num_layers
            assert {kernel["product"] for kernel in products} <= {"float32", "float16", "attention"}


def test_classic_engines_are_asked(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inspector of classic TensorRT gets a context with the shapes, and its report is the same."""
    folder = Path(shutil.copytree(exported(NANO, target="tensorrt"), tmp_path / "bundle"))
    bundle = Bundle(folder)
    plans = {
        name: trt_standin.engine_file(
            folder / graph.file, [{k: list(v) for k, v in r.items()} for r in trt_build.profiles(bundle, graph)]
        )
        for name, graph in bundle.manifest.graphs.items()
    }
    put_engines(folder, "tensorrt", "TensorRT 10.3.0", plans)
    engines = read(bundle, "tensorrt")
    library = Library(trt_standin.module("tensorrt", "10.3.0", trt_standin.CudaRuntime()))
    dims = {"images": 1, "tokens": 100, "slots": 120}
    with pytest.raises(BundleError, match="by their names only"):
        programs_of(bundle, engines, "step", bundle.manifest.graphs["step"], dims, library)
    monkeypatch.setattr(trt_standin.EngineInspector, "said", described())
    for name in ENGINES:
        (program,) = programs_of(bundle, engines, name, bundle.manifest.graphs[name], dims, library)
        assert (len(program.kernels), program.library) == (3, "TensorRT 10.3.0")
    with pytest.raises(BackendError, match="none of its profiles takes"):
        graph = bundle.manifest.graphs["traverse"]
        programs_of(bundle, engines, "traverse", graph, dims | {"tokens": 3000}, library)
