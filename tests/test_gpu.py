"""On a real NVIDIA GPU: the same answers as on a CPU. `make test-gpu`. Engines are needed, so none has run yet.

TROL_EDGE_GPU_BUNDLE: a bundle of trol-nano with engines built on this machine. TROL_EDGE_NANO_BUNDLE: its cpu bundle.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.cases import difference
from tests.conftest import NANO
from trol_edge.runtime import Runtime
from trol_edge.runtimes.cuda import devices, open_cuda
from trol_edge.runtimes.trt.backend import TrtBackend

pytestmark = pytest.mark.gpu
PICTURE = NANO / "scene.png"
QUESTIONS = ("What is left of the red circle?", "Describe the scene.")
CLOSE = {"float32": 1e-3, "float16": 2e-2}  # of the largest magnitude; GPUs add in another order, and in TF32 or FP16


@pytest.fixture(scope="module")
def gpu() -> Runtime:
    """The engines that were built here; the test skips, with the reason, where there is no GPU or no bundle."""
    found = devices()
    if isinstance(found, str):
        pytest.skip(f"no NVIDIA GPU: {found}")
    folder = os.environ.get("TROL_EDGE_GPU_BUNDLE")
    if not folder:
        pytest.skip("TROL_EDGE_GPU_BUNDLE names no bundle with engines (make test-gpu makes one)")
    return Runtime(Path(folder))


def test_copies_and_graphs() -> None:
    """The CUDA calls by themselves: up, within, down, captured and launched again."""
    if isinstance(found := devices(), str):
        pytest.skip(f"no NVIDIA GPU: {found}")
    cuda = open_cuda()
    a, b = cuda.allocate(4096, "a test"), cuda.allocate(4096, "a test")
    up, down = cuda.pinned((1024,), np.float32), cuda.pinned((1024,), np.float32)
    for seed in range(3):
        up[:] = np.random.default_rng(seed).standard_normal(1024)
        cuda.upload(a, up)
        cuda.copy(b, a, 4096)
        cuda.download(down, b)
        cuda.wait()
        assert np.array_equal(up, down)
    if cuda.graphs:

        def copies() -> None:
            cuda.upload(a, up)
            cuda.copy(b, a, 4096)
            cuda.download(down, b)

        graph = cuda.capture(copies)
        up[:] = 7
        cuda.launch(graph)
        cuda.wait()
        assert (down == 7).all()
    cuda.close()


def test_the_same_answers_as_on_a_cpu(gpu: Runtime, nano: Runtime) -> None:
    """Tokens about a picture and without one, and the image features."""
    for question in QUESTIONS:
        for picture in (PICTURE, None):
            assert gpu.generate(question, picture).token_ids == nano.generate(question, picture).token_ids
    pixels = nano.preprocess(PICTURE)
    assert pixels is not None
    ours, theirs = (np.asarray(r.model.backend.encode_image(pixels)) for r in (gpu, nano))
    assert difference(ours, theirs) <= CLOSE["float16"]


def test_captured_steps_equal_plain_ones(gpu: Runtime) -> None:
    """Logits of the same steps with and without CUDA graphs; and the same again on a second state."""
    rows = gpu.model.embeddings[np.arange(5, 25)]
    found = []
    for graphs in (True, False):
        backend = TrtBackend(gpu.bundle, cuda_graphs=graphs)
        for _ in range(2):
            state = backend.new_state()
            first = state.traverse(rows[:10], None)
            found.append(np.stack([first, *(state.step(rows[10 + i], 10 + i).copy() for i in range(8))]))
        backend.close()
    for other in found[1:]:
        assert difference(other, found[0]) <= 1e-5


def test_tokens_are_those_of_the_logits(gpu: Runtime) -> None:
    """The id that the device finds is the argmax of the logits that it would download."""
    ids = gpu.tokenize(QUESTIONS[1])
    asked, whole = gpu.session(), gpu.session()
    token = int(asked.prefill(ids).argmax())
    whole.prefill(ids)
    for _ in range(12):
        expected = int(whole.step(token).argmax())
        token = asked.step_token(token)
        assert token == expected


def test_prefixes_go_on_exactly(gpu: Runtime) -> None:
    """A prompt in chunks, and extended, equals the prompt at once: the cache is written in place."""
    ids = gpu.tokenize(QUESTIONS[0])
    whole = gpu.session().prefill(ids)
    chunked = gpu.session(prefill_chunk=9).prefill(ids)
    session = gpu.session()
    session.prefill(ids[:11])
    extended = session.extend(ids[11:])
    for other in (chunked, extended):
        assert int(other.argmax()) == int(whole.argmax())
        assert difference(other, whole) <= CLOSE["float16"]
