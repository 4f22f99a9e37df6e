"""ONNX Runtime on the graphs of a bundle for a GPU: its providers, and the CPU where a user asked to fall back.

No GPU is needed here. What is tested of the providers for GPUs is how they are chosen, what they are given, and what a
user hears where they are not there.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import NANO, NANOS, slow
from trol_edge.bundle.manifest import Bundle
from trol_edge.errors import BackendError, BundleError, UsageError
from trol_edge.runtime import Runtime
from trol_edge.runtimes import ort as ort_module
from trol_edge.runtimes.ort import OrtBackend
from trol_edge.runtimes.trt import build as trt_build

PICTURE = NANO / "scene.png"
QUESTIONS: tuple[tuple[str, Any], ...] = (("Describe the scene.", PICTURE), ("What is this?", None))
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


@pytest.fixture(scope="module")
def gpu_bundle(exported: Callable[..., Path]) -> Path:
    """trol-nano for classic TensorRT: plain operators of opset 20, weights in the graphs; no engines."""
    return exported(NANO, target="tensorrt")


@pytest.mark.parametrize("name", [NANOS[1], *slow(NANOS[0])])
def test_the_same_answers_as_a_cpu_bundle(
    name: str, exported: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    """Tokens of both families, with and without a picture, and one token at a time with both passes."""
    plain = Runtime(exported(NANO.parent / name, target="tensorrt"), provider="cpu")
    usual = Runtime(bundle_of(name))
    for prompt, picture in QUESTIONS:
        for options in ({}, {"answer_mode": "traverse", "max_new_tokens": 4}):
            ours, theirs = (r.generate(prompt, picture, **options) for r in (plain, usual))
            assert ours.token_ids == theirs.token_ids
    scratch = Runtime(plain.bundle.folder, provider="cpu", prefix_reuse=False)
    assert scratch.generate(*QUESTIONS[0]).token_ids == usual.generate(*QUESTIONS[0]).token_ids
    backend = scratch.model.backend
    assert isinstance(backend, OrtBackend)
    state = backend.new_state()
    assert backend.cache_bytes == sum(array.nbytes for array in (*state.cache, *state.second))


def test_caches_that_lie_on_a_gpu(gpu_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like ONNX Runtime on a GPU, buffers are not arrays, and an input is copied when it is bound, not at a run.

    Forks, sessions that become others, steps, tokens with both passes, and the rows that `verify` reads.
    """
    runtime, usual = Runtime(gpu_bundle, provider="cpu"), Runtime(gpu_bundle, provider="cpu")
    backend: Any = runtime.model.backend

    value, bind, on_gpu = ort_module.value_of, OrtBackend.bind, list[Any]()

    def made(array: Any, memory: str = "cpu") -> Any:
        found = value(array)
        if memory == "cuda":
            on_gpu.append(found)
        return found

    class Binding:
        """An IOBinding that copies what is not on the GPU."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def bind_ortvalue_input(self, name: str, given: Any) -> None:
            there = any(given is other for other in on_gpu)
            self._inner.bind_ortvalue_input(name, given if there else value(given.numpy().copy()))

    def bound(self: OrtBackend, name: str, values: Any) -> Any:
        plain = bind(self, name, {})
        binding = Binding(plain)
        for key, given in values.items():
            binding.bind_ortvalue_input(key, given)
        return binding

    def run(self: OrtBackend, name: str, binding: Any, shrink: bool = False) -> None:
        plain_run(self, name, getattr(binding, "_inner", binding), shrink)

    plain_run = OrtBackend.run
    monkeypatch.setattr(ort_module, "value_of", made)
    monkeypatch.setattr(backend, "bind", bound.__get__(backend))
    monkeypatch.setattr(backend, "run", run.__get__(backend))
    backend.memory = "cuda"  # as our code sees it; ONNX Runtime is given the CPU's
    ids, pixels = runtime.tokenize("What is this?"), runtime.preprocess(NANO / "scene.png")
    pictured = runtime.tokenize("What is this?", 1)

    def tell(r: Runtime) -> list[int]:
        session = r.session()
        for share in (0.5, 1.0, 0.25):  # with tables of its own, which change
            token = int(session.prefill(pictured, pixels, image_tokens=share).argmax())
            tokens = [token, session.step_token(token), int(session.extend([7]).argmax())]
        tokens += [int(session.prefill(ids).argmax())]
        twin = session.fork()
        for each in (session, twin):
            tokens += [each.step_token(tokens[-1]) for _ in range(3)]
        tokens.append(int(twin.extend(ids[-3:]).argmax()))
        session.become(twin)
        tokens += [int(session.extend([token]).argmax()) for token in (5, 7, 9)]
        return [*tokens, session.step_token(3)]

    def rows(r: Runtime) -> list[Any]:
        state = r.model.backend.new_state()
        state.traverse(np.ones((3, r.bundle.manifest.spec.hidden_size), np.float32), None)
        return [row for which in (0, 1) for row in state.rows(np.array([0, 2], np.int32), which)]

    assert not hasattr(backend.new_state().cache[0], "dtype")
    assert tell(runtime) == tell(usual)
    for ours, theirs in zip(rows(runtime), rows(usual), strict=True):
        assert np.array_equal(ours, theirs)


def test_falls_back_only_where_asked(gpu_bundle: Path, nano: Runtime) -> None:
    """Without engines: an error; with fallback= a warning that says why, and the same answers."""
    with pytest.raises(BundleError, match="no engines for target tensorrt"):
        Runtime(gpu_bundle)
    with pytest.warns(
        RuntimeWarning, match="no engines for target tensorrt; .*Answers come from ONNX Runtime's cpu"
    ) as w:
        runtime = Runtime(gpu_bundle, fallback="cpu")
    assert w[0].filename == __file__
    assert runtime.generate(*QUESTIONS[0]).token_ids == nano.generate(*QUESTIONS[0]).token_ids
    with pytest.raises(UsageError, match="provider 'gpu' is not one of cpu, cuda, tensorrt"):
        Runtime(gpu_bundle, fallback="gpu")  # type: ignore[arg-type]


def test_nothing_to_fall_back_to(nano_bundle: Path, tmp_path: Path) -> None:
    """A bundle for a CPU is not run otherwise, and an altered file is no reason to go on with others."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Runtime(nano_bundle, fallback="cpu").generate("What is this?").text
        assert Runtime(nano_bundle, provider="cpu").generate("What is this?").text
    with pytest.raises(
        BundleError, match=r"made for target cpu, .* to use the cuda provider, export with --target tensorrt"
    ):
        Runtime(nano_bundle, provider="cuda")
    folder = tmp_path / "bundle"
    shutil.copytree(nano_bundle, folder)
    (folder / "step.onnx").write_bytes(b"?")
    with pytest.raises(BundleError, match=r"step.onnx has 1 bytes"):
        Runtime(folder, fallback="cpu")


def test_providers_that_are_not_there(gpu_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without them, and one that lists them but cannot start them: ONNX Runtime would use the CPU."""
    monkeypatch.setattr(ort_module.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for provider, name in (("cuda", CUDA), ("tensorrt", TENSORRT)):
        with pytest.raises(BackendError, match=rf"has CPUExecutionProvider, and not {name}; pip uninstall onnxruntime"):
            Runtime(gpu_bundle, provider=provider)  # type: ignore[arg-type]
    monkeypatch.setattr(ort_module.ort, "get_available_providers", lambda: [TENSORRT, CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort_module.ort, "preload_dlls", lambda: None, raising=False)
    opened = ort_module.open_session
    monkeypatch.setattr(
        ort_module, "open_session", lambda path, options, providers: opened(path, options, providers[-1:])
    )
    with pytest.raises(BackendError, match=rf"could not start {CUDA} \(it printed why, and would compute on the CPU\)"):
        Runtime(gpu_bundle, provider="cuda")


def test_what_providers_are_given(gpu_bundle: Path) -> None:
    """CUDA follows TensorRT, and the CPU both; dynamic inputs have the ranges that engines are built for."""
    bundle = Bundle(gpu_bundle)
    backend: Any = OrtBackend.__new__(OrtBackend)
    backend.bundle, backend.provider = bundle, "cuda"
    given = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}
    assert backend.providers_of("step") == [(CUDA, given), "CPUExecutionProvider"]
    backend.provider = "tensorrt"
    (name, options), *others = backend.providers_of("traverse")
    assert name == TENSORRT and others == [(CUDA, given), "CPUExecutionProvider"]
    assert options["trt_fp16_enable"] == "0" and not any("cache" in key for key in options)
    width, context = bundle.manifest.spec.hidden_size, bundle.manifest.context
    assert options["trt_profile_min_shapes"].startswith(f"inputs_embeds:1x1x{width},position_ids:1x1,slots:1")
    assert f"inputs_embeds:1x{context}x{width}" in options["trt_profile_max_shapes"]
    for name in ("traverse", "step"):
        graph, options = bundle.manifest.graphs[name], backend.providers_of(name)[0][1]
        dynamic = trt_build.shapes_of(graph, trt_build.profiles(bundle, graph)[0])
        for end in ("min", "opt", "max"):
            assert [part.split(":")[0] for part in options[f"trt_profile_{end}_shapes"].split(",")] == list(dynamic)
    half = dataclasses.replace(bundle.manifest.plan, compute="fp16")
    bundle.manifest = dataclasses.replace(bundle.manifest, plan=half)
    assert backend.providers_of("step")[0][1]["trt_fp16_enable"] == "1"
