"""A bundle that is changed under a running Runtime: no crash, and no other answer; what is used is what was hashed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import NANO, slow
from trol_edge import Runtime
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import SELFTEST, TOKENIZER
from trol_edge.bundle.selftest import read as read_selftest
from trol_edge.errors import BundleError, TrolEdgeError, UsageError
from trol_edge.prompt.images import load_rgb
from trol_edge.testing import ScriptedRuntime

ROOT = Path(__file__).resolve().parents[1]
SCENE = ROOT / "export" / "checkpoints" / "trol-nano" / "scene.png"
QUESTION = "What is left of the red star?"


def shorten(path: Path) -> None:
    """In place, to a tenth: what is mapped of the rest ends the process with SIGBUS."""
    os.truncate(path, path.stat().st_size // 10)


def scramble(path: Path) -> None:
    """In place, all but the beginning."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 10)
        file.write(os.urandom(size - size // 10))


def replace(path: Path) -> None:
    """By another file of the same name."""
    path.with_suffix(".new").write_bytes(b"something else")
    path.with_suffix(".new").replace(path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_constants_live_until_a_session_has_them(recipe: str, exported: Callable[..., Path]) -> None:
    """With an allocator that gives memory back at once, as it does for a large bundle: reading it then is a crash."""
    program = "import sys; from trol_edge import Runtime; rt = Runtime(sys.argv[1], selftest=False); "
    program += f"print(rt.generate({QUESTION!r}, {str(SCENE)!r}).text)"
    command = [sys.executable, "-c", program, str(exported(NANO, recipe=recipe))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "cyan ring"), done.stderr


PROGRAM = """
import sys, pathlib
sys.path.insert(0, {root!r})
from tests.test_changed_bundle import {change} as change
from trol_edge import Runtime
bundle, scene = sys.argv[1:]
rt = Runtime(bundle, selftest=False)
for path in sorted(pathlib.Path(bundle).iterdir()):
    if path.name != "bundle.json":
        change(path)
print(rt.generate({question!r}, scene).text)
print(rt.generate("Is there a star?").text)
"""


@pytest.mark.parametrize("change", [shorten, *slow(scramble, replace)])
def test_a_bundle_changed_under_a_runtime(
    change: Callable[[Path], None], nano_bundle: Path, nano: Runtime, tmp_path: Path
) -> None:
    """Every file, after the Runtime has been made and before anything was asked; some graphs are not loaded then."""
    bundle = tmp_path / "bundle"
    shutil.copytree(nano_bundle, bundle)
    program = PROGRAM.format(root=str(ROOT), change=change.__name__, question=QUESTION)
    done = subprocess.run([sys.executable, "-c", program, bundle, SCENE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [nano.generate(QUESTION, SCENE).text, nano.generate("Is there a star?").text]


@pytest.mark.slow
@pytest.mark.parametrize("change", [shorten, scramble])
def test_a_bundle_for_a_gpu_changed_under_a_provider(
    change: Callable[[Path], None], exported: Callable[..., Path], nano: Runtime, tmp_path: Path
) -> None:
    """Its graphs point into the weights file, and yet ONNX Runtime reads nothing from it after the check."""
    ort = pytest.importorskip("trol_edge.runtimes.ort")
    if not ort.COPIES_CONSTANTS:
        pytest.skip("this onnxruntime maps the file itself")
    bundle = tmp_path / "bundle"
    shutil.copytree(exported(ROOT / "export" / "checkpoints" / "trol-nano", target="tensorrt"), bundle)
    program = PROGRAM.replace("selftest=False", 'selftest=False, provider="cpu"')
    program = program.format(root=str(ROOT), change=change.__name__, question=QUESTION)
    done = subprocess.run([sys.executable, "-c", program, bundle, SCENE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [nano.generate(QUESTION, SCENE).text, nano.generate("Is there a star?").text]


def test_a_tokenizer_and_a_self_test_changed_after_the_check_are_refused(nano_bundle: Path, tmp_path: Path) -> None:
    """They are read again for use, and their hash is checked again."""
    bundle = tmp_path / "bundle"
    shutil.copytree(nano_bundle, bundle)
    opened = Bundle(bundle)
    for name in (TOKENIZER, SELFTEST):
        path = bundle / name
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="altered"):
        opened.text(TOKENIZER)
    with pytest.raises(BundleError, match="altered"):
        read_selftest(opened)


def test_a_graph_changed_between_its_check_and_its_use_is_refused(nano_bundle: Path, tmp_path: Path) -> None:
    """The bytes that are loaded are hashed once more: a swap after the bundle was opened changes nothing."""
    bundle = tmp_path / "bundle"
    shutil.copytree(nano_bundle, bundle)
    opened = Bundle(bundle)
    name = opened.manifest.graphs["vision"].file
    whole = opened.read(name)
    shutil.copyfile(bundle / opened.manifest.graphs["step"].file, bundle / name)
    with pytest.raises(BundleError, match=r"altered|more than"):
        opened.read(name)
    (bundle / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match="altered"):
        opened.read(name)


class Overwritten(np.ndarray):  # type: ignore[type-arg]
    """A camera's buffer that the camera writes to as soon as it has been read once."""

    def copy(self, order: str = "C") -> np.ndarray:  # type: ignore[type-arg,override]
        """Read it; the next frame arrives."""
        taken = np.array(self)
        self[...] = 255 - self
        return taken


def test_a_frame_overwritten_during_the_call_is_read_once() -> None:
    """Its features are under the key of what was read, for RGB and BGR."""
    seen: list[bytes] = []
    rt = ScriptedRuntime("yes")
    encode = rt.model.backend.encode_image

    def noted(pixels: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        seen.append(pixels.tobytes())
        return np.asarray(encode(pixels))

    rt.model.backend.encode_image = noted  # type: ignore[method-assign]
    frame = load_rgb(SCENE)
    for color in ("rgb", "bgr"):
        rt.desk.vision_cache.clear()
        given = frame.copy().view(Overwritten)
        rt.generate("?", given, color=color)  # type: ignore[arg-type]
        assert not np.array_equal(given, frame)  # it was overwritten meanwhile
        rt.generate("?", frame, color=color)  # type: ignore[arg-type]
        assert rt.vision_cache.entries == 1
    assert len(seen) == 2


def test_features_and_pixels_of_a_session_are_its_own() -> None:
    """An array that the caller overwrites afterwards is not what the session knows a picture by."""
    rt = ScriptedRuntime("yes")
    frame = load_rgb(SCENE)
    ids = rt.tokenize("?", 1)
    pixels = rt.preprocess(frame)
    assert pixels is not None
    features = np.asarray(rt.model.backend.encode_image(pixels))
    features = features.copy()
    session = rt.session()
    session.prefill_features(ids, features)
    features += 1
    session.prefill_features(ids, features, reuse=True)
    assert session.reused < len(ids) - 1


TEXT = "a " * 5_000_000


def test_patterns_and_schemas_of_megabytes_are_refused() -> None:
    """Before they are compiled."""
    pytest.importorskip("llguidance", reason="pip install 'trol-edge[formats]'")
    for response_format in (re.compile("(" + "ab|" * 100_000 + "c)"), {"enum": [TEXT]}):
        with pytest.raises(UsageError, match=r"response_format has .* characters"):
            ScriptedRuntime("yes").generate("?", response_format=response_format)


def test_the_grammar_library_works_a_tenth_of_a_second_at_a_time() -> None:
    """Nothing interrupts it, so that a pattern which explodes would be waited for past the deadline."""
    pytest.importorskip("llguidance", reason="pip install 'trol-edge[formats]'")
    rt = ScriptedRuntime("yes")
    assert rt.generate("?", response_format=re.compile("yes|no")) == "yes"
    start = time.process_time()
    with pytest.raises(UsageError, match="response_format"):
        rt.generate("?", response_format=re.compile("(a{1000}){1000}"))
    assert time.process_time() - start < 2
    days = {f"day {i}": {"type": "string", "format": "date"} for i in range(100)}
    answer = rt.generate("?", response_format={"type": "object", "properties": days}, max_new_tokens=3)
    assert answer.finish_reason == "length"


def test_what_no_context_can_hold_is_refused_before_it_is_read() -> None:
    """Prompts, options, stop texts of megabytes, thousands of pictures: a message, and no work."""
    rt = ScriptedRuntime("yes")
    encoded: list[int] = []
    encode = rt.model.text.encode
    rt.model.text.encode = lambda parts: encoded.append(len(str(parts))) or encode(parts)  # type: ignore[method-assign,func-returns-value]
    calls: dict[str, Callable[[], object]] = {
        "characters": lambda: rt.generate(TEXT),
        "characters of parts": lambda: rt.generate([TEXT, TEXT]),
        "option": lambda: rt.choose("?", ["yes", TEXT.strip()]),
        "texts": lambda: rt.generate("?", stop=["x" * n for n in range(1, 2000)]),
        "at most 256": lambda: rt.generate("?", stop=TEXT),
        "pictures": lambda: rt.generate("?", [load_rgb(SCENE)] * 10_000),
    }
    for what, call in calls.items():
        with pytest.raises(TrolEdgeError, match=what.split(" of")[0]):
            call()
    assert max(encoded) < 100_000


def test_a_deadline_covers_what_comes_before_the_turn() -> None:
    """It passes while pictures are read: the answer says so, as it does later."""
    rt = ScriptedRuntime("yes")
    now = [0.0]
    rt.desk.now = lambda: now.__setitem__(0, now[0] + 0.06) or now[0]  # type: ignore[func-returns-value]
    answer = rt.generate("?", [load_rgb(SCENE)] * 3, deadline_ms=100)
    assert (answer.text, answer.finish_reason) == ("", "deadline")
    assert [a.finish_reason for a in rt.ask_many(["?", "?"], load_rgb(SCENE), deadline_ms=100)] == ["deadline"] * 2
    assert [p.finish_reason for p in rt.stream("?", load_rgb(SCENE), deadline_ms=100)] == ["deadline"]
