"""The exported graphs, run by ONNX Runtime, equal the authors' code; and they are the graphs that we say they are."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import cases
from tests.cases import STEPS, TOLERANCE, Array, Row, Run, compare, difference
from tests.conftest import CHECKPOINTS, NANO, NANOS
from tests.golden import GOLDEN
from tests.reference import Reference, reference
from tests.traces import reduced
from trol_edge.bundle.embedding import Embeddings
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.weights import to_float32
from trol_edge.errors import BundleError, ContextError, UsageError
from trol_edge.export.graphs import canonical
from trol_edge.export.graphs.canonical import TRACED
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.runtime import Runtime
from trol_edge.session import Session

pytestmark = pytest.mark.usefixtures("no_gradients")
CACHE = ("k0", "v0", "k2", "v2")
SERVED = ("cached_ids", "cached_logits", *CACHE, *(f"{name}_decode" for name in CACHE))
ONE_IMAGE = "internlm2-gqa-image"
TEXT = "internlm2-text"
BEYOND = {"over", "image"}  # runs longer than their model's positions: refused, see cases.APART
GRAPHS = ("vision", "traverse", "traverse_text", "step")


@pytest.fixture(scope="module")
def runtime(golden_bundle: Callable[..., Path]) -> Callable[[str], Runtime]:
    """A golden case's cpu bundle, loaded once."""
    loaded: dict[str, Runtime] = {}

    def load(case: str) -> Runtime:
        if case not in loaded:
            loaded[case] = Runtime(golden_bundle(case))
        return loaded[case]

    return load


def served(session: Session, run: Run, row: Row) -> dict[str, Array]:
    """What a session says and caches for one row, in golden's layout; it ends early where the context does."""
    pixels = run.pixels(row)
    logits = [session.prefill(row.ids, pixels)]
    assert session.length == len(row.ids)
    ids = [int(logits[0].argmax())]
    while len(ids) < STEPS and session.length < session.context:
        logits.append(session.step(ids[-1]))
        ids.append(int(logits[-1].argmax()))
    out = {"cached_ids": np.array(ids), "cached_logits": np.stack(logits)}
    for name in CACHE:
        cache = buffers(session)[2 * int(name[1:]) + "kv".index(name[0])][0]  # [G, C, E]
        out[name], out[f"{name}_decode"] = cache[:, : len(row.ids)], cache[:, len(row.ids) : session.length]
        out[name], out[f"{name}_decode"] = out[name].copy(), out[f"{name}_decode"].copy()
    return out


def buffers(session: Session) -> list[Array]:
    """The KV cache of a session on ONNX Runtime: per layer keys and values [1, G, C, E]."""
    cache: list[Array] = session.cache.state.cache  # type: ignore[attr-defined]
    return cache


@pytest.mark.parametrize(("case", "name"), [n for n in cases.names() if n[1] not in BEYOND])
def test_session_equals_golden(case: str, name: str, runtime: Callable[[str], Runtime]) -> None:
    """Logits, greedy tokens and the KV cache of every prompt, served one after the other by one session."""
    run = cases.load(case, name)
    session = runtime(case).session()
    ours = [served(session, run, row) for row in run.rows]
    assert set(SERVED) <= set(run.expected)
    assert compare(run, ours, only=SERVED) == []
    if name == "crossing":
        assert session.length == session.context == 92
        with pytest.raises(ContextError, match="context of 92 tokens is full"):
            session.step(0)


@pytest.mark.parametrize("name", [name for case, name in cases.names() if name in BEYOND])
def test_prompt_beyond_the_positions_is_refused(name: str, runtime: Callable[[str], Runtime]) -> None:
    """Where dynamic-NTK rope would begin, the context ends."""
    run = cases.load("internlm2-dynamic-rope", name)
    with pytest.raises(ContextError, match=f"{run.length} tokens, but this bundle holds 92"):
        runtime("internlm2-dynamic-rope").session().prefill(run.rows[0].ids, run.pixels(run.rows[0]))


@pytest.mark.parametrize(("case", "name"), [n for n in cases.names() if cases.has_pictures(*n)])
def test_vision_graph_equals_golden(case: str, name: str, runtime: Callable[[str], Runtime]) -> None:
    """Image features of all pictures of a run in one call, and of each alone."""
    run = cases.load(case, name)
    encode = runtime(case).model.backend.encode_image
    pixels = np.concatenate([p for row in run.rows if (p := run.pixels(row)) is not None])
    together = encode(pixels)
    assert difference(run.stored(together), run.expected["projector"]) <= TOLERANCE
    alone = np.concatenate([encode(picture[None]) for picture in pixels])
    assert difference(alone, together) <= 1e-6


def test_self_contained_graphs_run_without_us(golden_bundle: Callable[..., Path]) -> None:
    """Target "onnx": plain ONNX Runtime opens the files, which find their weights themselves."""
    folder = golden_bundle(ONE_IMAGE, target="onnx")
    run = cases.load(ONE_IMAGE, "main")
    (row,) = run.rows
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in GRAPHS
    }
    table = load_file(folder / WEIGHTS)["embedding"].float().numpy()
    (features,) = sessions["vision"].run(None, {"pixel_values": run.pixels(row)})
    assert difference(run.stored(features), run.expected["projector"]) <= TOLERANCE
    mask = row.ids == run.info["image_token_index"]
    embeds = table[row.ids]
    embeds[mask] = features.reshape(-1, embeds.shape[1])
    past = [port for port in sessions["traverse"].get_inputs() if port.name.startswith("past_")]
    cache = [np.zeros(port.shape, np.float32) for port in past]  # the first pass's, then the second's

    def call(name: str, x: Array, positions: Array, **more: Array) -> Array:
        feeds = {"inputs_embeds": x[None], "position_ids": positions[None], **more}
        count = len(past)
        if name == "step":
            count //= 2
        else:
            feeds["slots"] = np.arange(positions[-1] + 1)
        feeds |= {port.name: array for port, array in zip(past[:count], cache, strict=False)}
        logits, cache[:count] = (found := sessions[name].run(None, feeds))[0], found[1:]
        return logits[0]

    logits = [call("traverse", embeds, np.arange(len(row.ids)), image_mask=mask[None, :, None].astype(np.float32))]
    ids = [int(logits[0].argmax())]
    while len(ids) < STEPS:
        logits.append(call("step", table[ids[-1:]], np.array([len(row.ids) + len(ids) - 1])))
        ids.append(int(logits[-1].argmax()))
    ours = {"cached_ids": np.array(ids), "cached_logits": np.stack(logits)}
    for name in CACHE:
        array = cache[2 * int(name[1:]) + "kv".index(name[0])][0]
        ours[name] = array[:, : len(row.ids)]
        ours[f"{name}_decode"] = array[:, len(row.ids) : len(row.ids) + STEPS - 1]
    assert compare(run, [ours], only=SERVED) == []

    rest = call("traverse_text", embeds[1290:], np.arange(1290, len(row.ids)))  # after a prefix, text alone
    assert difference(rest, logits[0]) <= 1e-5
    with_mask = call("traverse", embeds[:20], np.arange(20), image_mask=np.zeros((1, 20, 1), np.float32))
    assert difference(call("traverse_text", embeds[:20], np.arange(20)), with_mask) <= 1e-6


def test_self_contained_bundle_is_refused_by_the_runtime(golden_bundle: Callable[..., Path]) -> None:
    """It would need every weight twice; the error says how to export."""
    with pytest.raises(BundleError, match=r"target 'onnx'.*--target cpu"):
        Runtime(golden_bundle(ONE_IMAGE, target="onnx"))


def test_nano_bundle_equals_reference(nano: Runtime) -> None:
    """trol-nano, with its picture, its tokenizer and its default context."""
    ref = Reference(NANO)
    pixels = nano.preprocess(NANO / "scene.png")
    assert pixels is not None
    ids = np.array(nano.tokenize("What is left of the red circle?", 1))
    ours = ref.compute(ids, ref.vision(torch.from_numpy(pixels)), None)
    session = nano.session()
    logits = [session.prefill(ids, pixels)]
    logits += [session.step(int(token)) for token in ours["cached_ids"][:-1]]
    assert difference(np.stack(logits), ours["cached_logits"]) <= TOLERANCE


def test_one_token_prompt_is_traversed(runtime: Callable[[str], Runtime]) -> None:
    """The authors' code would step it; a prefill is a traverse whatever its length."""
    ref = reference(TEXT)
    ours = ref.compute(np.array([7]), None, None)
    session = runtime(TEXT).session()
    logits = session.prefill([7])
    assert difference(logits, ours["cached_logits"][0]) <= TOLERANCE
    stepped = ref.decoder.logits(ref.step(7, ref.attention()))[0].numpy()
    assert difference(logits, stepped) > 0.1
    assert difference(session.step(11), ref.after(np.array([7]), 11)) <= TOLERANCE


@pytest.fixture
def graphs_run(monkeypatch: pytest.MonkeyPatch, runtime: Callable[[str], Runtime]) -> list[str]:
    """Names of the graphs that the picture case's backend runs from here on."""
    seen: list[str] = []
    backend: Any = runtime(ONE_IMAGE).model.backend
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda name, *args, **more: (seen.append(name), run(name, *args, **more))[1])
    return seen


def test_text_prompt_skips_lora(runtime: Callable[[str], Runtime], graphs_run: list[str]) -> None:
    """A prompt without pictures uses traverse_text, which equals traverse with an empty image mask."""
    session = runtime(ONE_IMAGE).session()
    ids = np.arange(3, 40)
    logits = session.prefill(ids)
    keys = [array.copy() for array in buffers(session)]
    assert graphs_run == ["traverse_text"]
    embeddings = Embeddings(runtime(ONE_IMAGE).bundle)[ids]
    state = runtime(ONE_IMAGE).model.backend.new_state()
    masked = state.traverse(embeddings, np.zeros(len(ids), bool))
    assert graphs_run == ["traverse_text", "traverse"]
    assert difference(logits, masked) <= 1e-6
    for ours, theirs in zip(keys, state.cache, strict=True):  # type: ignore[attr-defined]
        assert difference(ours, theirs) <= 1e-6
    marked = runtime(ONE_IMAGE).model.backend.new_state().traverse(embeddings, np.ones(len(ids), bool))
    assert difference(logits, marked) > 0.1  # the mask matters


def test_picture_prompt_uses_lora(runtime: Callable[[str], Runtime], graphs_run: list[str]) -> None:
    """vision once, traverse once, then steps."""
    run = cases.load(ONE_IMAGE, "main")
    session = runtime(ONE_IMAGE).session()
    session.step(int(session.prefill(run.rows[0].ids, run.pixels(run.rows[0])).argmax()))
    assert graphs_run == ["vision", "traverse", "step"]


@pytest.fixture(scope="module", params=["cpu", "onnx"])
def bundle(request: pytest.FixtureRequest, golden_bundle: Callable[..., Path]) -> Bundle:
    """The picture case for either target."""
    return Bundle(golden_bundle(ONE_IMAGE, target=request.param))


def model(bundle: Bundle, name: str) -> onnx.ModelProto:
    """A graph of a bundle, its weights not read."""
    return onnx.load(bundle.folder / f"{name}.onnx", load_external_data=False)


def test_graphs_are_standard_onnx(bundle: Bundle) -> None:
    """Only the standard operator set (on a CPU one more), no functions, loops or branches; the checker is content."""
    assert set(bundle.manifest.graphs) == set(GRAPHS)
    for name, info in bundle.manifest.graphs.items():
        onnx.checker.check_model(bundle.folder / info.file, full_check=True)
        proto = model(bundle, name)
        # On a CPU one operator stands for rotation, cache and attention, see lower/ort.py.
        fused = {("com.microsoft", "GroupQueryAttention")} if bundle.manifest.target == "cpu" else set()
        assert {(o.domain, o.version) for o in proto.opset_import} - {("com.microsoft", 1)} == {("", 23)}
        assert not proto.functions
        assert {(node.domain, node.op_type) for node in proto.graph.node if node.domain} <= fused
        assert not any(a.type in (a.GRAPH, a.GRAPHS) for node in proto.graph.node for a in node.attribute)
        assert dict(Counter(node.op_type for node in proto.graph.node)) == info.operators


def test_traversal_is_unrolled(bundle: Bundle) -> None:
    """Every layer is in a traverse twice and in a step once; each pass writes keys and values, and reads them."""
    layers, graphs = bundle.manifest.spec.num_layers, bundle.manifest.graphs
    for name, passes in (("traverse", 2), ("traverse_text", 2), ("step", 1)):
        operators = Counter(graphs[name].operators)
        if bundle.manifest.target == "cpu":
            assert operators["GroupQueryAttention"] == passes * layers
        else:
            assert operators["Attention"] == passes * layers
            assert operators["ScatterND"] == 2 * passes * layers
        cached = [p.name for p in graphs[name].inputs if p.name.startswith("past_")]
        assert len(cached) == 2 * passes * layers
        assert sum("_second_" in name for name in cached) == 2 * (passes - 1) * layers
        assert not {"Loop", "If", "Scan"} & set(graphs[name].operators)
        gates = [w for w in graphs[name].weights if w.startswith("decoder.gate")]
        assert len(gates) == (0 if name == "step" else 2)


def test_layers_are_copies_of_one() -> None:
    """A layer more adds the same operators each time; the mask and the places of new rows are computed once for all."""
    checkpoint = Checkpoint(NANO)
    tower = checkpoint.spec.vision
    counted = {}
    for layers, second in ((2, None), (3, None), (5, None), (5, (0, 3))):
        vision = dataclasses.replace(tower, num_layers=layers)
        spec = dataclasses.replace(checkpoint.spec, num_layers=layers, traversed=second, vision=vision)
        for name in ("traverse", "vision"):
            traced = canonical.trace(name, checkpoint.family, spec, 2048)
            counted[name, layers, second] = Counter(node.op_type for node in traced.graph)
    for name in ("traverse", "vision"):
        two, three, five = (counted[name, layers, None] for layers in (2, 3, 5))
        assert five - two == Counter({kind: 3 * n for kind, n in (three - two).items()})
    fewer = counted["traverse", 5, (0, 3)]
    assert (fewer["Attention"], fewer["Tanh"], fewer["ScatterND"]) == (7, 2, 14)
    for counts in (counted["traverse", 5, None], fewer):
        assert (counts["LessOrEqual"], counts["Shape"]) == (1, 3)


def test_lora_is_only_where_pictures_are(bundle: Bundle) -> None:
    """No low-rank tensor in step and traverse_text, by manifest, by inputs and by initializers; all in traverse."""
    lora = {name for name in bundle.weights().tensors if ".lora_" in name}
    layers = bundle.manifest.spec.num_layers
    assert len(lora) == 2 * 5 * layers  # A and B of wqkv, wo, w1, w2, w3
    for name, info in bundle.manifest.graphs.items():
        proto = model(bundle, name)
        read = {value.name for value in (*proto.graph.input, *proto.graph.initializer)}
        assert set(info.weights) <= read
        expected = lora if name == "traverse" else set()
        assert set(info.weights) & lora == read & lora == expected
        assert ("image_mask" in read) == (name == "traverse")


def test_graph_files_hold_no_weights(bundle: Bundle) -> None:
    """A file is structure and small constants; each weight is in a graph once, and both passes share it."""
    for name, info in bundle.manifest.graphs.items():
        proto = model(bundle, name)
        inside = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(t.ByteSize() for t in inside) < 4096 + 8 * bundle.manifest.context  # a step counts the slots
        assert len(info.weights) == len(set(info.weights))
        data = (bundle.folder / info.file).read_bytes()
        assert len(data) < 100_000
        # The exporter would note where each node came from: paths of this machine, in a file that others get.
        assert str(Path(__file__).resolve().parents[1]).encode() not in data
        assert b".py" not in data


def test_external_weights_point_at_their_tensors(golden_bundle: Callable[..., Path]) -> None:
    """Offset, length, type and shape of every reference into the weights file."""
    bundle = Bundle(golden_bundle(ONE_IMAGE, target="onnx"))
    tensors = bundle.weights().tensors
    types = {"F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16}
    for name, info in bundle.manifest.graphs.items():
        outside = {t.name: t for t in model(bundle, name).graph.initializer if t.external_data}
        assert set(outside) == set(info.weights)
        for weight, proto in outside.items():
            where = {entry.key: entry.value for entry in proto.external_data}
            found = (where["location"], int(where["offset"]), int(where["length"]), proto.data_type, tuple(proto.dims))
            t = tensors[weight]
            assert found == (WEIGHTS, t.offset, t.nbytes, types[t.dtype], t.shape)


def test_each_tensor_of_the_checkpoint_stands_once(bundle: Bundle) -> None:
    """Names, count, bytes and values: the checkpoint's used tensors, one gate, two rope tables, and nothing else."""
    checkpoint = Checkpoint(GOLDEN / ONE_IMAGE)
    with safe_open(GOLDEN / ONE_IMAGE / "model.safetensors", "pt") as file:
        published = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    used = {name: t for name, t in published.items() if "post_layernorm" not in name}
    assert len(published) - len(used) == 2
    tensors = bundle.weights().tensors
    rope = {"rope.cos", "rope.sin"}
    gate = {"decoder.gate.weight", "decoder.gate.bias"}
    assert len(tensors) == len(used) + len(gate) + len(rope)
    assert set(tensors) == set(checkpoint.names()) | rope
    spec = bundle.manifest.spec
    gating = torch.load(GOLDEN / ONE_IMAGE / "trol_gating.pt", weights_only=True)
    size = sum(t.nbytes for t in used.values()) + sum(t.nbytes for t in gating.values()) // spec.num_layers
    size += 2 * 4 * bundle.manifest.context * spec.head_dim // 2
    assert sum(t.nbytes for t in tensors.values()) == size
    assert bundle.manifest.files[WEIGHTS].bytes == bundle.weights().header_bytes + size
    stored = load_file(bundle.folder / WEIGHTS)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        assert stored[name].dtype == tensor.dtype
        same = torch.equal(stored[name], tensor)
        assert same or torch.equal(stored[name], tensor.t()), name
    unread = set(tensors) - {w for info in bundle.manifest.graphs.values() for w in info.weights}
    assert unread == {"embedding"}


def test_weights_in_memory_are_shared(runtime: Callable[[str], Runtime]) -> None:
    """One float32 buffer per weight, bound to every graph that reads it."""
    backend: Any = runtime(ONE_IMAGE).model.backend
    names = {name for info in backend.bundle.manifest.graphs.values() for name in info.weights}
    assert set(backend.weights) == names
    addresses = {value.data_ptr() for value in backend.weights.values()}
    assert len(addresses) == len(names)
    held = sum(4 * int(np.prod(v.shape())) for v in backend.weights.values())
    assert backend.weight_bytes == held + sum(array.nbytes for array in backend.embedding.values())


def test_cache_is_written_in_place(runtime: Callable[[str], Runtime]) -> None:
    """Past and present are one buffer, bound once; a step writes one row of it and leaves the others alone."""
    session = runtime(TEXT).session()
    state: Any = session.cache.state
    addresses = [array.ctypes.data for array in buffers(session)]
    assert [value.data_ptr() for value in state.past.values()][: len(addresses)] == addresses
    assert [value.data_ptr() for value in state.present.values()][: len(addresses)] == addresses
    token = int(session.prefill(np.arange(3, 20)).argmax())
    for _ in range(10):
        before = [array.copy() for array in buffers(session)]
        position = session.length
        token = int(session.step(token).argmax())
        for old, new in zip(before, buffers(session), strict=True):
            rows = np.flatnonzero((old != new).any(axis=(0, 1, 3)))
            assert rows.tolist() == [position]
        outputs = state.step_binding.get_outputs()
        assert [value.data_ptr() for value in outputs[1:]] == addresses
    session.prefill(np.arange(3, 9))
    assert [array.ctypes.data for array in buffers(session)] == addresses


def test_a_step_allocates_next_to_nothing(runtime: Callable[[str], Runtime]) -> None:
    """Python and numpy keep a row of the embedding and small objects, the same for every token; the cache is 2 MB."""
    session = runtime(TEXT).session()
    session.prefill(np.arange(3, 20))
    for token in range(200):  # until Python's free lists are full
        session.step_view(token)
    cache = sum(array.nbytes for array in buffers(session))
    tracemalloc.start()
    try:
        peaks = np.zeros(50, np.int64)
        start, _ = tracemalloc.get_traced_memory()
        for token in range(50):
            tracemalloc.reset_peak()
            now, _ = tracemalloc.get_traced_memory()
            session.step_view(token)
            peaks[token] = tracemalloc.get_traced_memory()[1] - now
        kept = tracemalloc.get_traced_memory()[0] - start
    finally:
        tracemalloc.stop()
    assert cache > 1_900_000
    assert peaks.max() < 4096
    assert kept < 512


def test_view_of_the_logits_is_overwritten(runtime: Callable[[str], Runtime]) -> None:
    """step_view hands out the buffer itself, step a copy."""
    session = runtime(TEXT).session()
    session.prefill([5, 6, 7])
    first = session.step_view(9)
    kept = first.copy()
    second = session.step_view(10)
    assert second.ctypes.data == first.ctypes.data
    assert not np.array_equal(first, kept)
    copied = session.step(11)
    again = copied.copy()
    session.step(12)
    assert np.array_equal(copied, again)


@pytest.mark.slow
@pytest.mark.parametrize("model", NANOS)
@pytest.mark.parametrize("name", TRACED)
def test_kept_traces_are_true(model: str, name: str, traces: Callable[..., Any]) -> None:
    """The suite traces a layer of each architecture once; fresh, without what the key leaves out, it is the same."""
    import onnx_ir

    checkpoint = Checkpoint(CHECKPOINTS / model)
    spec, family = checkpoint.spec, checkpoint.family
    one = dataclasses.replace(spec, num_layers=1, vision=dataclasses.replace(spec.vision, num_layers=1))
    fresh = traces(name, family, reduced(name, one, 2048), 2048)
    kept = canonical.trace_one(name, family, one, 2048)
    assert canonical.weight_names(fresh) == canonical.weight_names(kept)
    assert onnx_ir.to_proto(fresh).SerializeToString() == onnx_ir.to_proto(kept).SerializeToString()


def test_embedding_rows_are_exact(runtime: Callable[[str], Runtime]) -> None:
    """Half-precision rows widen without rounding; the table is mapped, not loaded."""
    bundle = runtime(TEXT).bundle
    stored = load_file(bundle.folder / WEIGHTS)["embedding"]
    embeddings = Embeddings(bundle)
    assert len(embeddings) == len(stored) == 501
    assert np.array_equal(embeddings[np.arange(501)], stored.float().numpy())
    bits = np.array([0x3F80, 0xC000, 0x7F80], np.uint16)
    assert to_float32(bits, "BF16").tolist() == [1.0, -2.0, float("inf")]


def test_session_counts_image_tokens(runtime: Callable[[str], Runtime]) -> None:
    """Too few and too many image tokens are errors; the authors' code ignores some of these."""
    run = cases.load(ONE_IMAGE, "main")
    (row,), session = run.rows, runtime(ONE_IMAGE).session()
    for ids in (row.ids[:-200], np.append(row.ids, 500), row.ids[row.ids != 500]):
        with pytest.raises(UsageError, match=r"image tokens \(id 500\), but 1 picture"):
            session.prefill(ids, run.pixels(row))
    with pytest.raises(UsageError, match="1225 image tokens"):
        session.prefill(row.ids)
    assert session.length == 0
