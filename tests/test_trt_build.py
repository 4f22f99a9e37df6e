"""Building engines: really, by TensorRT for RTX where it is installed; and what is refused, on made-up networks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from tests.bench import engines_full
from tests.conftest import CHECKPOINTS, NANO, NANOS, slow
from trol_edge.bundle.engines import ENGINES, Key, left_out, names_of, read, verified
from trol_edge.bundle.folder import sha256_of
from trol_edge.bundle.layer_graphs import ATTENTION, ATTENTION_STEP, layer_of
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.precision import BITS
from trol_edge.bundle.sizes import (
    build_bytes,
    device_bytes,
    engine_weight_bytes,
    layered_bytes,
    shared_weights,
)
from trol_edge.bundle.targets import TARGETS
from trol_edge.cli import main as cli
from trol_edge.errors import BackendError, BundleError, UsageError
from trol_edge.export import pipeline
from trol_edge.export.quantize.made_up import made_up_statistics
from trol_edge.export.quantize.recipes import RecipeOptions
from trol_edge.export.unbuilt import published
from trol_edge.plan.subject import subject_of
from trol_edge.rope import TABLES
from trol_edge.runtimes import doctor
from trol_edge.runtimes.cuda import Gpu
from trol_edge.runtimes.trt import build as trt_build
from trol_edge.runtimes.trt.api import LayerInfo, load

ORIN = Gpu("Orin", "8.7", 8 << 30, (12, 6))


def library_or_skip() -> Any:
    """TensorRT for RTX, really."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (make test-rtx installs it)")
    return load("tensorrt_rtx")


@pytest.fixture(scope="module")
def rtx_bundle(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trol-nano exported for TensorRT for RTX, a copy that may be written to; nothing is exported without it."""
    library_or_skip()
    folder = tmp_path_factory.mktemp("rtx") / "bundle"
    shutil.copytree(exported(NANO, target="rtx", context=256), folder)
    return folder


@pytest.fixture(scope="module")
def plain_bundle(exported: Callable[..., Path]) -> Path:
    """trol-nano exported for classic TensorRT from 10.3 on."""
    return exported(NANO, target="tensorrt")


@pytest.fixture(scope="module")
def built(rtx_bundle: Path) -> trt_build.Build:
    """Its engines, really built, with what the progress said."""
    phases: list[tuple[str, int, int]] = []
    done = trt_build.build(Bundle(rtx_bundle), progress=lambda *report: phases.append(report))
    assert {what.split(":")[0] for what, _, _ in phases} == set(ENGINES)
    assert any("Building engine" in what for what, _, _ in phases)
    assert all(0 <= now <= steps for _, now, steps in phases)
    return done


@pytest.mark.rtx
def test_engines_are_really_built(built: trt_build.Build, rtx_bundle: Path) -> None:
    """Three engines, hashed, bound to their graphs and library; every weight in them once."""
    bundle = Bundle(rtx_bundle)
    assert built.built and built.reason.endswith("make them with `trol-edge build`")
    engines = read(bundle, "rtx")
    assert engines == built.engines
    assert engines.key == Key("rtx", load("tensorrt_rtx").title, "", "", "")
    assert list(engines.engines) == ["vision", "traverse", "step"]
    for name, engine in engines.engines.items():
        path = verified(bundle, engines, name)
        assert path.stat().st_size == engine.bytes > engine.weight_bytes
        assert engine.graph_sha256 == bundle.manifest.files[f"{name}.onnx"].sha256
        graph = ir.load(rtx_bundle / f"{name}.onnx").graph
        count = sum(node.op_type == "MatMul" for node in graph)
        assert engine.layers["MATRIX_MULTIPLY float32"] == count
        assert engine.layers.get("ATTENTION_INPUT float32", 0) == sum(node.op_type == "Attention" for node in graph)
    short, long = engines.engines["traverse"].profiles
    assert short["tokens"] == (1, 32, 64) and long["tokens"][0] == 65 and long["tokens"][2] == 256
    assert engines.engines["step"].profiles == ({"slots": (1, 128, 256)},)
    # Nothing half-written is left, and the bundle is still what its manifest says.
    assert sorted(p.name for p in (rtx_bundle / "engines").iterdir()) == ["rtx"]


def recipe(model: str, precision: str, folder: Path, shared: bool = False) -> Bundle:
    """A shipped model exported for TensorRT for RTX, with made-up scales: engines do not depend on them."""
    options = RecipeOptions(recipe=precision, scaling=False, clipping=False, sensitive=None, observer="minmax")
    pipeline.export(
        CHECKPOINTS / model,
        folder,
        target="rtx",
        context=256,
        options=options,
        shared_weights=shared,
        record_selftest=False,
        calibration=made_up_statistics,
    )
    return Bundle(folder)


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("model", NANOS)
def test_every_precision_is_really_built(model: str, precision: str, traces: dict[Any, Any], tmp_path: Path) -> None:
    """Products in FP16, every weight and input rounded as the plan has it, and the weights once in each engine."""
    library_or_skip()
    bundle = recipe(model, precision, tmp_path / "bundle")
    done = trt_build.build(bundle)
    assert done.built and done.engines.precision == precision
    assert read(bundle, "rtx") == done.engines, "the counts of programs are kept as they were taken"
    planned = subject_of(bundle).programs
    for name, engine in done.engines.engines.items():
        assert planned[name] == engine.programs and len(engine.programs) == max(1, len(engine.profiles))
        kinds = {work.kind for counts in engine.programs for work in counts.work}
        assert "rest" in kinds and kinds <= {"attention", "rest", "float16", "int8", "fp8"}
        for counts, ranges in zip(engine.programs, engine.profiles or ({},), strict=True):
            assert counts.ranges == {dim: (low, high) for dim, (low, _, high) in ranges.items()}
            most = {"capacity": 256, "images": 1, "tokens": 64, "slots": 256}
            assert counts.moved(most) > counts.constants > 0.9 * engine.weight_bytes
    quantized = [linear.precision for linear in bundle.manifest.plan.linears.values() if linear.precision in BITS]
    stored = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn"}
    assert bool(quantized) == (precision != "fp16")
    tensors = bundle.weights().tensors
    for name, engine in done.engines.engines.items():
        graph = bundle.manifest.graphs[name]
        assert verified(bundle, done.engines, name).stat().st_size == engine.bytes > engine.weight_bytes
        assert engine.weight_bytes == sum(tensors[w].nbytes for w in graph.constants)
        assert set(graph.weights) - set(graph.constants) == (set(TABLES) if name != "vision" else set())
        assert {kind for kind in engine.layers if kind.startswith("MATRIX")} == {"MATRIX_MULTIPLY float16"}
        assert engine.layers["MATRIX_MULTIPLY float16"] == graph.operators["MatMul"]
        found = {kind.split()[1]: n for kind, n in engine.layers.items() if kind.startswith("DEQUANTIZE")}
        assert sum(found.values()) == graph.operators.get("DequantizeLinear", 0)
        assert set(found) <= {stored[kind] for kind in quantized}
        if name != "vision" and precision in stored:
            assert found[stored[precision]] > 0


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("model", NANOS)
def test_layers_are_really_built(model: str, precision: str, traces: dict[Any, Any], tmp_path: Path) -> None:
    """Engines for each layer's prompts and steps, with every weight once and the products of the plan."""
    library_or_skip()
    bundle = recipe(model, precision, tmp_path / "bundle")
    done = trt_build.build(bundle, by_layer=True)
    assert read(bundle, "rtx") == done.engines and tuple(done.engines.engines) == names_of(bundle, by_layer=True)
    layers = bundle.manifest.spec.num_layers
    assert str(done.engines) == f"vision, attention, attention_step, mixture, head, {layers} layers"
    assert sum(engine.weight_bytes for engine in done.engines.engines.values()) == layered_bytes(bundle) - sum(
        tensor.nbytes for tensor in shared_weights(bundle).values()
    )
    for name, engine in done.engines.engines.items():
        if layer_of(name) is not None:
            assert [profile["tokens"] for profile in engine.profiles] == [(1, 256, 256)]
            assert len(engine.programs) == 1
        if name in (ATTENTION, ATTENTION_STEP):
            assert not engine.weight_bytes
            continue
        if precision in ("int8", "fp8") and name not in ("vision", "mixture"):
            asked, found = engine.products[precision]
            assert asked == pytest.approx(found, rel=0.05)
    planned = subject_of(bundle)
    assert planned.by_layer and planned.scratch_bytes > 0 and set(planned.programs) == {"vision"}


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_shared_weights_are_really_built(precision: str, traces: dict[Any, Any], tmp_path: Path) -> None:
    """Matrices that traverse and step both read are inputs of both engines, and in neither; nothing else changes."""
    library = library_or_skip()
    apart = recipe(NANOS[0], precision, tmp_path / "apart")
    bundle = recipe(NANOS[0], precision, tmp_path / "shared", shared=True)
    shared = shared_weights(bundle)
    tables = {name: shared.pop(name).nbytes for name in TABLES}  # inputs in any case
    assert shared and shared_weights(apart).keys() == set(TABLES)
    done = trt_build.build(bundle)
    size = sum(tensor.nbytes for tensor in shared.values())
    for name in ("traverse", "step"):
        graph = bundle.manifest.graphs[name]
        tensors = {t.name: t for t in library.parse(bundle.path(graph.file)).tensors() if t.is_input}
        assert shared.keys() | set(TABLES) == tensors.keys() - {port.name for port in graph.inputs}
        assert {tensors[w].dtype for w in shared} == {"float16" if precision == "fp16" else "int8"}
        assert {w: tensors[w].shape for w in shared} == {w: t.shape for w, t in shared.items()}
        whole = engine_weight_bytes(apart, apart.manifest.graphs[name].constants)
        assert done.engines.engines[name].weight_bytes == whole - size
    vision = done.engines.engines["vision"]
    assert vision.weight_bytes == engine_weight_bytes(apart, apart.manifest.graphs["vision"].constants)
    # What inspect says, of either bundle.
    assert device_bytes(bundle) == device_bytes(apart)
    before, after = device_bytes(bundle)
    assert before - after == size
    held = sum(engine.weight_bytes for engine in done.engines.engines.values())
    assert after == held + size + 2 * sum(tables.values())  # the shared ones, and those of a session
    # What plan says, of either bundle and of the model before it is exported.
    unbuilt = published("trol-nano").subject("rtx", RecipeOptions(recipe=precision))
    of_apart, of_shared = subject_of(apart), subject_of(bundle)
    assert (of_apart.shared, of_shared.shared, unbuilt.shared) == (False, True, False)
    assert {s.shareable_bytes for s in (of_apart, of_shared, unbuilt)} == {size}
    with pytest.raises(BackendError, match=r", the weights that they share 0\.00 GB and the K/V cache 0\.00 GB"):
        trt_build.build(bundle, memory_bytes=held, force=True)


@pytest.mark.rtx
def test_engines_are_built_again_for_a_reason(
    built: trt_build.Build, rtx_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to date: nothing is done. Otherwise the reason is reported."""
    assert trt_build.build(Bundle(rtx_bundle)).reason == "up to date"
    folder = tmp_path / "bundle"
    shutil.copytree(rtx_bundle, folder)
    bundle = Bundle(folder)
    key = built.engines.key
    assert trt_build.why(bundle, key) is None
    assert trt_build.why(bundle, dataclasses.replace(key, library="TensorRT for RTX 1.8.0")) == (
        f"built with library '{key.library}', but here is 'TensorRT for RTX 1.8.0'"
    )
    (folder / "engines" / "rtx" / "step.engine").write_bytes(b"")
    assert trt_build.why(bundle, key) == "step.engine is missing or truncated"
    (folder / "engines" / "rtx" / "engines.json").write_text("{}")
    assert "altered since the build" in (trt_build.why(bundle, key) or "")


@pytest.mark.rtx
def test_plain_graphs_are_taken_too(plain_bundle: Path, tmp_path: Path) -> None:
    """The graphs for JetPack 6 pass the real parser, with every input read, and the step the real builder."""
    library = library_or_skip()
    bundle = Bundle(plain_bundle)
    for name in ENGINES:
        graph = bundle.manifest.graphs[name]
        network = library.parse(plain_bundle / graph.file)
        assert network.unused_inputs() == []
        tensors = [t for t in network.tensors() if t.name not in TABLES]
        assert [t.name for t in tensors] == [p.name for p in (*graph.inputs, *graph.outputs)]
        assert [t.dtype for t in tensors] == [p.dtype for p in (*graph.inputs, *graph.outputs)]
        kept = {t.name for t in trt_build.parse(library, plain_bundle / graph.file, graph).tensors()}
        assert kept >= set(TABLES) or name == "vision"
        assert {t.name for t in tensors} - kept == left_out(graph)
        assert (left_out(graph) != set()) == (name == "step")
        assert "ATTENTION_INPUT float32" not in trt_build.count_layers(network)
    job = trt_build.Job(bundle, library, None, lambda *report: None)
    info = job.build("step", trt_build.Source.of(bundle, "step"), tmp_path)
    assert info.sha256 == sha256_of(tmp_path / "step.engine")


@pytest.mark.rtx
def test_an_unread_input_is_seen(tmp_path: Path) -> None:
    """The parser drops what it does not understand; here an input that nothing reads."""
    library = library_or_skip()
    x, y = (ir.Value(name=n, shape=ir.Shape((4,)), type=ir.TensorType(ir.DataType.FLOAT)) for n in "xy")
    node = ir.node("Exp", [x])
    node.outputs[0].name, node.outputs[0].type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x, y], node.outputs, nodes=[node], opset_imports={"": 23})
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "it.onnx")
    assert library.parse(tmp_path / "it.onnx").unused_inputs() == ["y"]


@pytest.mark.rtx
def test_a_graph_that_the_parser_refuses(tmp_path: Path) -> None:
    """What the parser said is in the error."""
    library = library_or_skip()
    x = ir.Value(name="x", shape=ir.Shape((4,)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Unheard", [x], domain="of")
    node.outputs[0].name, node.outputs[0].type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23, "of": 1})
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "it.onnx")
    with pytest.raises(BackendError, match=r"TensorRT for RTX 1\.7\.\d+ could not read it\.onnx: .*Unheard"):
        library.parse(tmp_path / "it.onnx")


@pytest.mark.rtx
def test_ctrl_c_ends_a_build(rtx_bundle: Path, tmp_path: Path) -> None:
    """What progress raises comes out when TensorRT has stopped, and nothing is left of the build."""
    folder = tmp_path / "bundle"
    shutil.copytree(rtx_bundle, folder, ignore=shutil.ignore_patterns("engines"))

    def stop(what: str, done: int, total: int) -> None:
        if "Building" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trt_build.build(Bundle(folder), progress=stop)
    assert list((folder / "engines").iterdir()) == []


@pytest.mark.rtx
def test_the_command(built: trt_build.Build, rtx_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """build (up to date), doctor and targets as a user sees them here."""
    assert cli.main(["build", str(rtx_bundle), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["built"] is False and said["engines"]["step"]["bytes"] == built.engines.engines["step"].bytes
    assert cli.main(["doctor", str(rtx_bundle), "--json"]) == 0
    checks = {c["what"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["engines"]["good"] and checks["fit"]["good"] and checks["tensorrt_rtx"]["good"]
    assert cli.main(["targets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rtx"]["builds"] is True


# -- without any TensorRT ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class MadeUpNetwork:
    """A parsed graph that is whatever a test says."""

    unused: list[str]
    kinds: list[LayerInfo]
    size: int = 1000

    def unused_inputs(self) -> list[str]:
        """See Network."""
        return self.unused

    def layers(self) -> list[LayerInfo]:
        """See Network."""
        return self.kinds

    def leave_out(self, names: Collection[str]) -> None:
        """See Network."""

    def build(self, path: Path, *rest: object) -> None:
        """Write the given number of bytes."""
        path.write_bytes(b"e" * self.size)


@dataclasses.dataclass
class MadeUpLibrary:
    """A TensorRT of some version, whose parser gives that network."""

    version: tuple[int, ...] = (10, 3, 0)
    network: MadeUpNetwork | None = None
    rtx: bool = False

    @property
    def title(self) -> str:
        """See Library."""
        return f"TensorRT {'.'.join(map(str, self.version))}"

    def parse(self, path: Path, model: bytes | None = None) -> MadeUpNetwork:
        """See Library."""
        assert self.network is not None
        return self.network


def product(dtype: str = "float32") -> LayerInfo:
    """One matrix product."""
    return LayerInfo("MATRIX_MULTIPLY", "it", (dtype, dtype), (dtype,))


def copy(bundle: Path, tmp_path: Path) -> Bundle:
    """A copy of a bundle without engines."""
    shutil.copytree(bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    return Bundle(tmp_path / "bundle")


def test_operators_are_checked_before_parsing(exported: Callable[..., Path], tmp_path: Path) -> None:
    """Graphs for a newer TensorRT on JetPack 6: the operator, the version that has it, the version here."""
    library: Any = MadeUpLibrary()
    with pytest.raises(BackendError, match=r"Attention needs TensorRT 10\.14, this is 10\.3\.0") as caught:
        trt_build.build(copy(exported(NANO, target="rtx"), tmp_path), "tensorrt", library=library)
    assert "RMSNormalization needs TensorRT 10.15" not in str(caught.value)  # vision has LayerNormalization
    assert "export with the target of this machine's TensorRT" in str(caught.value)
    assert list((tmp_path / "bundle" / "engines").iterdir()) == []


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (MadeUpNetwork(["image_mask"], [product()]), r"would ignore the input\(s\) image_mask"),
        (MadeUpNetwork([], [product("float16")]), "fp32 asks for products in float32, the network has {'float16': 1}"),
        (MadeUpNetwork([], []), "fp32 asks for products in float32, the network has {}"),
        (
            MadeUpNetwork([], [product(), LayerInfo("DEQUANTIZE", "it", ("int8",), ("float32",))]),
            "0 DequantizeLinear in the graph, the network has {'int8': 1}",
        ),
    ],
)
def test_networks_that_are_refused(network: MadeUpNetwork, message: str, plain_bundle: Path, tmp_path: Path) -> None:
    """Inputs that would be ignored, and another precision than the bundle's."""
    library: Any = MadeUpLibrary(network=network)
    with pytest.raises(BackendError, match=message):
        trt_build.build(copy(plain_bundle, tmp_path), library=library)


def test_too_little_memory_to_build(plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before TensorRT begins, with what it takes and what there is: a process without memory is killed."""
    library: Any = MadeUpLibrary(network=MadeUpNetwork([], [product()]))
    bundle = copy(plain_bundle, tmp_path)
    needed = build_bytes(engine_weight_bytes(bundle, bundle.manifest.graphs["traverse"].constants))
    assert (trt_build.available_memory(swap=True) or 1 << 40) > 1 << 20
    monkeypatch.setattr(trt_build, "available_memory", lambda swap: needed - 1)
    with pytest.raises(
        BackendError, match=r"traverse\.onnx: building its engine takes about 0\.6 GB of memory"
    ) as caught:
        trt_build.build(bundle, library=library)
    assert ", but 0.6 GB are available here; close other programs, add swap" in str(caught.value)
    assert list((bundle.folder / "engines").iterdir()) == []
    monkeypatch.setattr(trt_build, "available_memory", lambda swap: needed)
    assert trt_build.build(bundle, library=library).built


def test_limits_of_full_size_builds() -> None:
    """Each limit that a build misses is said, and none that it keeps."""
    case = engines_full.FullSize("trol-1.8b", "fp16", seconds=240, peak_bytes=14e9)
    engine = {"bytes": 1030, "weight_bytes": 1000}
    step = {"moved": 1100, "ideal": 1000, "ratio": 1.1}
    good = engines_full.Built("trol-1.8b", "fp16", "", 1.0, 240.0, 14 * 10**9, {"step": engine}, {"step": step}, ())
    assert engines_full.misses(case, good) == []
    more = dataclasses.replace(good, programs={"step": step | {"ratio": 1.8}})
    assert engines_full.misses(case, more) == ["step: moves 1.80 times what it must, at most 1.1"]
    unseen = dataclasses.replace(good, programs={"step": {"unknown": "it is absent"}})
    assert engines_full.misses(case, unseen) == ["step: its program cannot be counted: it is absent"]
    bad = dataclasses.replace(good, seconds=241.0, peak_bytes=15 * 10**9, engines={"step": engine | {"bytes": 1031}})
    assert engines_full.misses(case, bad) == [
        "241 s, at most 240",
        "peak memory 15.00 GB, at most 14.00",
        "step: 1.031 times its weights, at most 1.03",
    ]
    attention = {"bytes": 20, "weight_bytes": 0}
    runs = [f"{half}_{layer}, step" for layer in (0, 1) for half in ("enter", "leave")] + ["attention_step", "head"]
    run = {"moved": 700, "cache": 20, "results": 9}
    layers = engines_full.FullSize("trol-1.8b", "fp16", by_layer=True)
    held = dict.fromkeys(("enter_0", "leave_0", "enter_1", "leave_1", "head"), engine | {"bytes": 1040})
    apart = dataclasses.replace(
        good, engines=held | {"attention_step": attention}, programs=dict.fromkeys(runs, run), by_layer=True
    )
    assert apart.step == {"moved": 4900, "ideal": 5149, "ratio": 4900 / 5149}
    assert engines_full.misses(layers, apart) == []
    large = dataclasses.replace(apart, engines=held | {"attention_step": attention | {"bytes": 55}})
    assert engines_full.misses(layers, large) == ["all engines: 1.051 times their weights, at most 1.05"]
    slow = dataclasses.replace(apart, programs=dict.fromkeys(runs, run | {"moved": 820}))
    assert engines_full.misses(layers, slow) == ["step: moves 1.11 times what it must, at most 1.1"]
    machine = dataclasses.replace(good, peak_bytes=1 << 50)
    assert "peak memory" in engines_full.misses(engines_full.FullSize("trol-3.8b", "int8"), machine)[0]


def test_rows_of_full_size_builds(tmp_path: Path) -> None:
    """A run goes on from those that an earlier one wrote; another file is refused."""
    path, engine = tmp_path / "rows.json", {"step": {"bytes": 1030, "weight_bytes": 1000}}
    row = engines_full.Built("trol-1.8b", "int8", "", 1.0, 2.0, 3, engine, {}, ("late",), kernels=(1, 2), half=True)
    path.write_text(json.dumps([dataclasses.asdict(row)]))
    assert engines_full.rows_of(path) == [row]
    for other in ("{", "3", '[{"model": "trol-1.8b"}]'):
        path.write_text(other)
        with pytest.raises(UsageError, match=r"rows\.json: not the rows of an earlier run"):
            engines_full.rows_of(path)


def test_shared_weights_that_are_refused(tmp_path: Path) -> None:
    """Where no TensorRT would take them."""
    with pytest.raises(UsageError, match="shared weights are for TensorRT, and target cpu holds them once anyway"):
        pipeline.export(NANO, tmp_path / "it", shared_weights=True)
    with pytest.raises(UsageError, match="TensorRT takes no 4-bit inputs; choose int8 or fp16"):
        recipe(NANOS[0], "int4", tmp_path / "it", shared=True)
    assert not (tmp_path / "it").exists()


def test_engines_larger_than_the_device(plain_bundle: Path, tmp_path: Path) -> None:
    """With the K/V cache, in figures; and then no engines are left in the bundle."""
    library: Any = MadeUpLibrary(network=MadeUpNetwork([], [product()], size=3_000_000))
    bundle = copy(plain_bundle, tmp_path)
    cache = trt_build.cache_bytes(bundle.manifest.graphs["traverse"].inputs, bundle.manifest.context)
    assert cache == 2 * 2 * 8 * 2 * 2048 * 32 * 4  # sets, K and V, layers, heads, rows, head size, FP32
    with pytest.raises(BackendError, match=r"engines vision, traverse take 0\.01 GB and the K/V cache 0\.02 GB"):
        trt_build.build(bundle, library=library, memory_bytes=cache + 5_000_000)
    assert list((bundle.folder / "engines").iterdir()) == []
    done = trt_build.build(bundle, library=library, memory_bytes=cache + 9_500_000)  # three, and the rope tables
    assert done.built and read(bundle, "tensorrt") == done.engines


def test_a_board_with_little_memory_gets_engines_by_layer(
    plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nobody said which: where whole ones leave less than half of the memory that the board shares."""
    bundle = copy(plain_bundle, tmp_path)
    graphs = bundle.manifest.graphs
    needed = trt_build.cache_bytes(graphs["traverse"].inputs, bundle.manifest.context)
    needed += sum(trt_build.engine_weight_bytes(bundle, graphs[name].constants) for name in ENGINES)
    board = Gpu("Orin", "8.7", 2 * needed - 2, (12, 6), integrated=True)
    library: Any = MadeUpLibrary(network=Killed())
    for device, is_by_layer in (
        (board, True),
        (dataclasses.replace(board, memory_bytes=2 * needed), False),
        (dataclasses.replace(board, integrated=False), False),
    ):
        monkeypatch.setattr(trt_build, "devices", lambda device=device: [device])
        done = trt_build.build(bundle, library=library, force=True)
        assert (done.engines.by_layer, bool(done.form)) == (is_by_layer, is_by_layer)
    monkeypatch.setattr(trt_build, "devices", lambda: [board])
    done = trt_build.build(bundle, library=library)
    assert done.reason == "built whole, and now by layer" and f"of the {board.memory_bytes / 1e9:.2f} GB" in done.form
    assert not trt_build.build(bundle, library=library, by_layer=False).form


class Killed(MadeUpNetwork):
    """Builds other bytes each time, and notes of what. At the engine `at` it writes half of it and is interrupted."""

    at = ""

    def __init__(self, at: str = "") -> None:
        super().__init__([], [product()])
        self.at, self.built = at, list[str]()

    def build(self, path: Path, *rest: object) -> None:
        """See Network."""
        path.write_bytes(path.name.encode() * 10)
        if path.stem == self.at:
            raise KeyboardInterrupt
        path.write_bytes(path.name.encode() * 20)
        self.built.append(path.stem)


BEGUN = ["vision", "attention", "attention_step", "enter_0", "leave_0", "enter_1"]  # the first engines by layer


def unfinished(bundle: Bundle, at: str) -> Path:
    """Begin a build by layer that is killed at an engine; returns the folder with what it kept."""
    library: Any = MadeUpLibrary(network=Killed(at))
    with pytest.raises(KeyboardInterrupt):
        trt_build.build(bundle, by_layer=True, library=library)
    (folder,) = (bundle.folder / "engines").iterdir()
    with pytest.raises(BundleError, match="no engines for target tensorrt"):
        read(bundle, "tensorrt")
    return folder


def test_a_killed_build_goes_on(plain_bundle: Path, tmp_path: Path) -> None:
    """After the last engine that was finished; then they are those of a build at once, and nothing else is left."""
    bundle = copy(plain_bundle, tmp_path)
    names = list(names_of(bundle, by_layer=True))
    folder = unfinished(bundle, "leave_0")
    assert folder.name == ".tensorrt.unfinished"
    assert {path.name for path in folder.iterdir()} == {
        "leave_0.engine",
        *(f"{name}.{end}" for name in names[:4] for end in ("engine", "json")),
    }
    network = Killed()
    library: Any = MadeUpLibrary(network=network)
    done = trt_build.build(bundle, by_layer=True, library=library)
    assert network.built == names[4:]
    assert done.engines.by_layer and list(done.engines.engines) == names and read(bundle, "tensorrt") == done.engines
    assert [path.name for path in (bundle.folder / "engines").iterdir()] == ["tensorrt"]
    assert {path.name for path in done.folder.iterdir()} == {"engines.json", *(f"{name}.engine" for name in names)}
    for name in names:
        assert verified(bundle, done.engines, name).read_bytes() == f"{name}.engine".encode() * 20
    assert trt_build.build(bundle, by_layer=True, library=library).reason == "up to date"
    assert trt_build.why(bundle, done.engines.key) == "built by layer, and now whole"
    assert not trt_build.build(bundle, library=library).engines.by_layer


@pytest.mark.parametrize(
    ("harm", "again"),
    [
        ("an engine", ["enter_0"]),
        ("a note", ["enter_0"]),
        ("swapped", ["enter_0", "leave_0"]),
        ("touched weights", BEGUN),
        *slow(("another library", BEGUN), ("other settings", BEGUN), ("force", BEGUN)),
    ],
)
def test_what_is_not_of_this_build_is_built_again(
    harm: str, again: list[str], plain_bundle: Path, tmp_path: Path
) -> None:
    """An engine that was changed, one in another's place, and those that were built otherwise."""
    bundle = copy(plain_bundle, tmp_path)
    names = list(names_of(bundle, by_layer=True))
    folder = unfinished(bundle, "leave_1")
    one, two = (folder / f"{half}_0" for half in ("enter", "leave"))
    engine, note = one.with_suffix(".engine"), one.with_suffix(".json")
    if harm == "an engine":
        engine.write_bytes(engine.read_bytes()[:-1] + b"!")
    elif harm == "a note":
        note.write_text(note.read_text().replace('"seconds": ', '"seconds": 1'))
    elif harm == "swapped":
        first, second = engine.read_bytes(), two.with_suffix(".engine").read_bytes()
        engine.write_bytes(second)
        two.with_suffix(".engine").write_bytes(first)
    elif harm == "touched weights":
        (bundle.folder / WEIGHTS).touch()
    network = Killed()
    library: Any = MadeUpLibrary(version=(10, 7, 0) if harm == "another library" else (10, 3, 0), network=network)
    workspace = 1 << 30 if harm == "other settings" else None
    done = trt_build.build(bundle, by_layer=True, library=library, workspace_bytes=workspace, force=harm == "force")
    assert network.built == again + names[len(BEGUN) :]
    assert list(done.engines.engines) == names
    for name in names:
        assert verified(bundle, done.engines, name)


@pytest.mark.slow
def test_layers_have_no_use_for_shared_weights(traces: dict[Any, Any], tmp_path: Path) -> None:
    """Each engine holds its own weights once."""
    library: Any = MadeUpLibrary(version=(1, 7, 1), rtx=True)
    with pytest.raises(UsageError, match="exported with --shared-weights, which engines by layer have no use for"):
        trt_build.build(recipe(NANOS[0], "fp16", tmp_path / "it", shared=True), by_layer=True, library=library)


@pytest.mark.parametrize("name", [WEIGHTS, "step.onnx"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_engines_are_built_from_what_was_exported(plain_bundle: Path, tmp_path: Path, name: str, when: str) -> None:
    """No self-test sees one wrong weight in an engine, so none comes from a file with a wrong bit."""
    bundle = copy(plain_bundle, tmp_path)
    path = bundle.folder / name

    def damage() -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    class Damaging(MadeUpNetwork):
        def build(self, file: Path, *rest: object) -> None:
            super().build(file)
            if file.name == "step.engine":
                damage()

    library: Any = MadeUpLibrary(network=(MadeUpNetwork if when == "before" else Damaging)([], [product()]))
    if when == "before":
        damage()
    with pytest.raises(BundleError, match=f"{name} was altered since export .* no engines were built from it"):
        trt_build.build(bundle, library=library)
    assert not list(bundle.folder.glob("engines/*/*.engine"))


def test_targets_and_machines_that_do_not_fit(nano_bundle: Path, plain_bundle: Path) -> None:
    """Wrong target of the bundle, wrong TensorRT, wrong GPU; each says what to do."""
    with pytest.raises(BundleError, match="which needs no engines; export with --target rtx"):
        trt_build.build(Bundle(nano_bundle))
    with pytest.raises(BundleError, match="its graphs were made for target 'cpu'; export with --target rtx"):
        trt_build.build(Bundle(nano_bundle), "rtx")
    with pytest.raises(UsageError, match="target 'orin' is not one of"):
        trt_build.build(Bundle(plain_bundle), "orin")
    library: Any = MadeUpLibrary(version=(10, 16, 1))
    with pytest.raises(BackendError, match=r"target jetson-jp6 is for TensorRT 10\.3 .*, but TensorRT 10\.16\.1"):
        trt_build.key_here(TARGETS["jetson-jp6"], library, ORIN)
    desktop = Gpu("RTX 4090", "8.9", 24 << 30, (13, 0))
    with pytest.raises(
        BackendError, match=r"compute capability 8\.7 and 11\.0, but this machine has RTX 4090 \(8\.9\)"
    ):
        trt_build.key_here(TARGETS["jetson-jp72"], library, desktop)
    assert trt_build.key_here(TARGETS["jetson-jp72"], library, ORIN) == Key(
        "jetson-jp72", "TensorRT 10.16.1", "Orin", "8.7", "12.6"
    )


def test_what_this_machine_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor's table on made-up machines: nothing, a desktop, a Jetson."""

    def machine(modules: dict[str, MadeUpLibrary], found: list[Gpu] | str) -> dict[str, doctor.Status]:
        def loaded(name: str) -> Any:
            if name not in modules:
                raise BackendError(f"{name} is not here")
            return modules[name]

        monkeypatch.setattr(doctor, "load", loaded)
        monkeypatch.setattr(doctor, "devices", lambda: found)
        monkeypatch.setattr(doctor, "is_there", lambda name: name == "cuda")
        return {s.target: s for s in doctor.statuses()}

    nothing = machine({}, "there is no NVIDIA driver")
    assert nothing["cpu"].runs and doctor.best()[0] == "cpu"
    assert [n for n, s in nothing.items() if s.builds or s.runs] == ["cpu"]
    assert nothing["rtx"].why_no_build == "tensorrt_rtx is not here"
    here = {"tensorrt_rtx": MadeUpLibrary((1, 7, 1), rtx=True)}
    workstation = machine(here, "there is no NVIDIA driver")
    assert (workstation["rtx"].builds, workstation["rtx"].runs) == (True, False)
    assert workstation["rtx"].why_no_run == "there is no NVIDIA driver"
    assert doctor.best() == ("cpu", "no GPU target runs here: there is no NVIDIA driver")
    desktop = machine(here, [Gpu("RTX 4060", "8.9", 8 << 30, (13, 0))])
    assert desktop["rtx"].runs and doctor.best()[0] == "rtx"
    assert "not yet run on a GPU" in doctor.best()[1]
    old = machine(here, [Gpu("GTX 1080", "6.1", 8 << 30, (12, 0))])
    assert "GTX 1080 has compute capability 6.1, not 8.0 or 8.6" in old["rtx"].why_no_run
    jetson = machine({"tensorrt": MadeUpLibrary((10, 3, 0))}, [ORIN])
    assert [n for n, s in jetson.items() if s.runs] == ["cpu", "tensorrt", "jetson-jp6"]
    assert doctor.best()[0] == "jetson-jp6"
    why = "TensorRT 10.3.0 is installed, but this target is for 10.13 to below 10.15"
    assert jetson["jetson-jp7"].why_no_run == why
