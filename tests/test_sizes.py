"""Bytes of weights and caches: the formulas that export, plan, doctor and the back ends share."""

from __future__ import annotations

from pathlib import Path

from trol_edge.bundle.manifest import Bundle, Port
from trol_edge.bundle.sizes import cache_bytes, cpu_bytes, embedding_bytes, largest_bytes, loaded_bytes
from trol_edge.bundle.targets import TARGETS, is_gpu
from trol_edge.bundle.weights import TensorInfo
from trol_edge.runtime import Runtime


def test_weights_on_a_cpu() -> None:
    """Floating point is widened, quantized stays; 8 bits that are derived from 4 take twice as much."""
    tensors = {
        "a": TensorInfo("BF16", (3, 5), 0),
        "b": TensorInfo("I8", (7,), 0),
        "c.nbits": TensorInfo("U8", (6, 2, 16), 0),
        "c.nbits_scale": TensorInfo("F32", (12,), 0),
    }
    assert loaded_bytes("a", tensors) == 4 * 15
    assert loaded_bytes("b", tensors) == 7
    assert loaded_bytes("c.nbits", tensors) == 6 * 2 * 16
    assert loaded_bytes("c.int8", tensors) == 2 * 6 * 2 * 16
    assert loaded_bytes("c.int8_scale", tensors) == 4 * 6


def test_caches() -> None:
    """Each K/V tensor among the inputs, in its own type; nothing else."""
    ports = (
        Port("inputs_embeds", "float32", (1, "tokens", 8)),
        Port("past_key_0", "float16", (1, 2, 64, 16)),
        Port("past_value_0", "float32", (1, 2, 64, 16)),
        Port("past_second_key_0", "float16", (1, 2, "slots", 16)),
    )
    assert cache_bytes(ports, 64) == 2 * 64 * 16 * (2 + 4 + 2)
    assert largest_bytes(ports[0], {"tokens": 64}) == 64 * 8 * 4


def test_a_bundle_takes_what_is_said(nano_bundle: Path) -> None:
    """What the back end counts is what its arrays hold."""
    with Runtime(nano_bundle) as runtime, runtime.session() as session:
        manifest = Bundle(nano_bundle).manifest
        used = {name for graph in manifest.graphs.values() for name in graph.weights}
        backend = runtime.model.backend
        table = runtime.bundle.weights().tensors["embedding"].nbytes
        assert embedding_bytes(runtime.bundle) == table == sum(a.nbytes for a in (backend.embedding or {}).values())
        assert backend.weight_bytes == cpu_bytes(runtime.bundle, used) + table
        one = cache_bytes(manifest.graphs["step"].inputs, manifest.context)
        assert backend.cache_bytes == 2 * one == cache_bytes(manifest.graphs["traverse"].inputs, manifest.context)
        assert one == 4 * manifest.spec.kv_values_per_token * manifest.context
        session.prefill(runtime.tokenize("What is this?"))
        state = session.cache.state
        assert sum(a.nbytes for a in (*state.cache, *state.second)) == backend.cache_bytes  # type: ignore[union-attr]


def test_which_targets_are_for_a_gpu() -> None:
    """All but those for ONNX Runtime on a CPU and for other tools; a name that nobody knows is none."""
    assert [name for name in ("cpu", "onnx", "unknown", *TARGETS) if is_gpu(name)] == [n for n in TARGETS if n != "cpu"]
