"""The example programs, run as written: a generated video, an event loop, and a ROS 2 that is stood in for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import trol_edge
from tests.conftest import NANO
from trol_edge import LatestCounts, Runtime
from trol_edge.errors import ImageError
from trol_edge.examples import asyncio_loop, camera, ros2_node
from trol_edge.testing import ScriptedRuntime

ROOT = Path(__file__).resolve().parents[1]
SCENE = NANO / "scene.png"
DESCRIBE = "Describe the scene."


def scene() -> Any:
    """The shipped picture as RGB bytes [H, W, 3]."""
    return np.array(Image.open(SCENE).convert("RGB"))


def program(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """One example, as a user starts it."""
    command = [sys.executable, "-m", f"trol_edge.examples.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", ["camera", "asyncio_loop", "ros2_node"])
def test_each_says_what_it_is(name: str) -> None:
    """No ROS, no OpenCV and no model is needed to import one; its docstring shows the command."""
    module = {"camera": camera, "asyncio_loop": asyncio_loop, "ros2_node": ros2_node}[name]
    assert f"python -m trol_edge.examples.{name}" in str(module.__doc__)


# -- camera ------------------------------------------------------------------------------------------------------------


def test_the_camera_loop_answers_the_newest_frame(nano: Runtime) -> None:
    """Ten frames arrive while the first is being answered: of these only the last one is asked about."""
    bgr = np.ascontiguousarray(scene()[:, :, ::-1])
    all_out, answered = threading.Event(), threading.Event()

    def frames() -> Any:
        yield bgr
        assert answered.wait(120)  # the first answer is being shown
        for shade in range(10):
            yield np.full_like(bgr, 20 * shade)
        all_out.set()

    answers: list[Any] = []

    def show(answer: Any) -> None:
        answers.append(answer)
        if len(answers) == 1:
            answered.set()
            assert all_out.wait(120)

    counts = camera.answer_frames(nano, frames(), DESCRIBE, show)
    assert [a.token_ids for a in answers] == [
        nano.generate(DESCRIBE, scene()).token_ids,
        nano.generate(DESCRIBE, np.full_like(bgr, 180)).token_ids,
    ]
    assert counts == LatestCounts(offered=11, taken=2, dropped=9)


def test_the_camera_loop_stops_when_asked(nano: Runtime) -> None:
    """It ends after the given number of answers, although frames continue, and when the camera breaks."""

    def endless() -> Any:
        while True:
            yield scene()

    answers: list[Any] = []
    counts = camera.answer_frames(nano, endless(), "How many objects are there?", answers.append, most=2)
    assert (len(answers), counts.taken) == (2, 2)


def test_camera_program_on_a_video(nano_bundle: Path, tmp_path: Path) -> None:
    """A video file made here, of another size than the model's pictures."""
    cv2 = pytest.importorskip("cv2", reason="pip install 'trol-edge[camera]'")
    video = tmp_path / "scene.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 25.0, (320, 240))
    assert writer.isOpened()
    frame = cv2.resize(np.ascontiguousarray(scene()[:, :, ::-1]), (320, 240))
    for _ in range(12):
        writer.write(frame)
    writer.release()
    assert [f.shape for f in camera.frames_of(str(video))] == [(240, 320, 3)] * 12
    done = program("camera", nano_bundle, "--source", video, "--question", DESCRIBE, "--max-age-ms", 100_000)
    assert done.returncode == 0, done.stderr
    *answers, last = done.stdout.splitlines()
    assert answers and all("ms, stop]" in line for line in answers)
    assert last == f"12 frames: {len(answers)} answered, {12 - len(answers)} dropped"
    gone = program("camera", nano_bundle, "--source", tmp_path / "gone.avi")
    assert gone.returncode == 1
    assert "cannot open" in gone.stderr


class Capture:
    """Stands for cv2.VideoCapture: reads that succeed or fail as they are listed, the last for ever."""

    rate = 5.0

    def __init__(self, reads: list[bool]) -> None:
        self.reads, self.released = reads, False

    def isOpened(self) -> bool:
        """It is there."""
        return True

    def get(self, what: int) -> float:
        """A frame rate that is slower than the frames are."""
        return self.rate

    def set(self, what: int, value: float) -> bool:
        """Not supported, as by most drivers."""
        return False

    def read(self) -> tuple[bool, Any]:
        """The next one."""
        good = self.reads.pop(0) if len(self.reads) > 1 else self.reads[0]
        return good, scene() if good else None

    def release(self) -> None:
        """Noted."""
        self.released = True


def stand_in_for_cv2(monkeypatch: pytest.MonkeyPatch, reads: list[bool]) -> Capture:
    """The few names of cv2 that the example uses; time that is waited is noted only."""
    capture, module = Capture(reads), types.ModuleType("cv2")
    vars(module).update(VideoCapture=lambda source: capture, CAP_PROP_FPS=5, CAP_PROP_BUFFERSIZE=38)
    monkeypatch.setitem(sys.modules, "cv2", module)
    return capture


@pytest.mark.parametrize("source", ["0", "/dev/video0", "rtsp://robot/front"])
def test_a_live_source_is_not_paced(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rate it reports; single reads that fail are passed over, and one that has ended is an error."""
    waited: list[float] = []
    monkeypatch.setattr(camera.time, "sleep", waited.append)
    capture = stand_in_for_cv2(monkeypatch, [True, True, False, True, False])
    frames = camera.frames_of(source)
    assert len([next(frames) for _ in range(3)]) == 3
    assert waited == [camera.RETRY_S]
    with pytest.raises(ImageError, match="gave no frame"):
        next(frames)
    assert capture.released


def test_a_camera_that_ends_is_an_error_of_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and a message; Ctrl-C is 130 without a traceback."""
    monkeypatch.setattr(camera, "RETRY_S", 0.0)
    monkeypatch.setattr(trol_edge, "Runtime", lambda bundle: ScriptedRuntime("yes"))
    stand_in_for_cv2(monkeypatch, [True, False])
    assert camera.main(["bundle", "--source", "/dev/video0"]) == 1
    assert "gave no frame" in capsys.readouterr().err

    def interrupted(*given: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ScriptedRuntime, "generate", interrupted)
    stand_in_for_cv2(monkeypatch, [True])
    assert camera.main(["bundle", "--source", "/dev/video0"]) == 130


# -- asyncio -----------------------------------------------------------------------------------------------------------


def test_asyncio_program(nano_bundle: Path, nano: Runtime) -> None:
    """The answer is streamed, and the loop went on."""
    done = program("asyncio_loop", nano_bundle, SCENE, "--question", DESCRIBE)
    assert done.returncode == 0, done.stderr
    answer, last = done.stdout.splitlines()
    assert answer == nano.generate(DESCRIBE, SCENE).text
    assert last.startswith("the loop went on: ")


def test_asyncio_time_limit(nano: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    """No time at all: cancelled, and the Runtime is free afterwards."""
    import asyncio

    text, _ = asyncio.run(asyncio_loop.run(nano, DESCRIBE, str(SCENE), 1e-9))
    assert nano.generate(DESCRIBE, SCENE).text.startswith(text)
    assert "time is up" in capsys.readouterr().out
    assert nano.desk.busy == []


# -- ROS 2 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", list(ros2_node.ENCODINGS))
def test_image_messages_become_arrays(encoding: str, padding: int) -> None:
    """Every encoding, with and without unused bytes at the end of the rows; data is not copied."""
    channels, color = ros2_node.ENCODINGS[encoding]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    rows = np.zeros((6, 8 * channels + padding), np.uint8)
    rows[:, : 8 * channels] = pixels.reshape(6, -1)
    frame, order = ros2_node.array_from_image(6, 8, rows.shape[1], encoding, rows.reshape(-1))
    assert order == color
    assert frame.shape == (6, 8, 3)
    assert np.array_equal(frame, np.repeat(pixels, 3, axis=2) if channels == 1 else pixels[:, :, :3])
    assert np.shares_memory(frame, rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((2, 2, 6, "yuv422", bytes(12)), "'yuv422' is not one of rgb8"),
        ((2, 2, 6, "rgb8", bytes(11)), "11 bytes"),
        ((2, 2, 5, "rgb8", bytes(12)), "step of 5"),
        ((2, 2, 6, "32FC3", bytes(48)), "32FC3"),
    ],
)
def test_image_messages_that_are_none(fields: Any, message: str) -> None:
    """Refused by name."""
    with pytest.raises(ImageError, match=message):
        ros2_node.array_from_image(*fields)


def test_the_nodes_logic_without_ros(nano: Runtime) -> None:
    """Frames in, answers out; a bad one is counted and does not end it; the question may change."""
    said: list[str] = []
    heard = threading.Semaphore(0)

    def publish(text: str) -> None:
        said.append(text)
        heard.release()

    answerer = ros2_node.FrameAnswerer(nano, DESCRIBE, publish)
    try:
        answerer.offer(scene(), "rgb")
        assert heard.acquire(timeout=120)
        answerer.question = "How many objects are there?"
        answerer.offer(np.ascontiguousarray(scene()[:, :, ::-1]), "bgr")
        assert heard.acquire(timeout=120)
        assert answerer.healthy
        answerer.offer(np.zeros((0, 4, 3), np.uint8), "rgb")
        for _ in range(60_000):
            if not answerer.healthy:
                break
            threading.Event().wait(0.001)
    finally:
        answerer.close()
    assert said == [nano.generate(DESCRIBE, SCENE).text, nano.generate("How many objects are there?", SCENE).text]
    status = answerer.diagnostics()
    assert (status["answers"], status["errors"], status["frames offered"]) == ("2", "1", "3")
    assert "4x0 pixels" in status["last error"]


def wait_until(true: Any) -> None:
    """Until something that another thread does is done."""
    for _ in range(60_000):
        if true():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it does not come")


def test_a_publisher_that_fails_and_a_bad_frame_end_nothing() -> None:
    """Health is that of the newest frame; the thread goes on, and is noticed where it is gone."""
    fail, said = [True], list[str]()

    def publish(text: str) -> None:
        if fail[0]:
            raise RuntimeError("the publisher's context is invalid")
        said.append(text)

    answerer = ros2_node.FrameAnswerer(ScriptedRuntime("yes"), "?", publish)
    try:
        answerer.offer(scene(), "rgb")
        wait_until(lambda: answerer.diagnostics()["errors"] == "1")
        assert not answerer.healthy and "context is invalid" in answerer.diagnostics()["last error"]
        fail[0] = False
        answerer.offer(scene(), "rgb")
        wait_until(lambda: said)
        wait_until(lambda: answerer.healthy)
        answerer.offer(np.zeros((0, 4, 3), np.uint8), "rgb")
        wait_until(lambda: not answerer.healthy)
        answerer.offer(scene(), "rgb")
        wait_until(lambda: answerer.healthy)
    finally:
        answerer.close()
    assert not answerer.healthy  # nobody is there for the next frame


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("question", 5),
        ("question", " "),
        ("bundle", ["a"]),
        ("deadline_ms", "200"),
        ("deadline_ms", -1.0),
        ("deadline_ms", float("nan")),
        ("max_age_ms", True),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", 0),
    ],
)
def test_parameters_of_a_wrong_type(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start they are a message and exit code 1, later they are refused."""
    assert name in ros2_node.problem_with(name, value)
    modules = stand_in_for_ros(lambda node: None)
    for module_name, module in modules.items():
        monkeypatch.setitem(sys.modules, module_name, module)
    vars(modules["rclpy"])["node"].parameters[name] = value
    assert ros2_node.main([]) == 1
    assert name in capsys.readouterr().err
    assert vars(modules["rclpy"])["node"].destroyed


class ExternalShutdownException(Exception):
    """As rclpy.executors names it: what `spin` raises after SIGTERM."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, ExternalShutdownException])
def test_the_node_ends_quietly(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C, and by SIGTERM; a question of a wrong type was refused meanwhile, and one of two changes nothing."""
    results: list[Any] = []

    def spin(node: Any) -> None:
        change = [types.SimpleNamespace(name="question", value=v) for v in ("new?", 5)]
        results.append(node.callbacks["parameters"](change))
        node.callbacks["timer"]()
        raise error

    modules = stand_in_for_ros(spin)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(trol_edge, "Runtime", lambda bundle: ScriptedRuntime("yes"))
    assert ros2_node.main([]) == 0
    (refused,) = results
    assert not refused.successful and "found 5" in refused.reason
    node = vars(modules["rclpy"])["node"]
    assert node.destroyed and node.published["/diagnostics"][0].status[0].message == "Describe the scene."


def stand_in_for_ros(spin: Any) -> dict[str, types.ModuleType]:
    """Modules with the few names of rclpy and its messages that the node uses; they only remember."""
    modules = {
        name: types.ModuleType(name)
        for name in ("rclpy", "rclpy.qos", "sensor_msgs", "sensor_msgs.msg", "std_msgs", "std_msgs.msg",
                     "diagnostic_msgs", "diagnostic_msgs.msg", "rcl_interfaces", "rcl_interfaces.msg")
    }  # fmt: skip

    def message(**defaults: Any) -> Any:
        return lambda **fields: types.SimpleNamespace(**{**defaults, **fields})

    class Node:
        def __init__(self) -> None:
            self.published: dict[str, list[Any]] = {}
            self.callbacks: dict[str, Any] = {}
            self.parameters: dict[str, Any] = {}
            self.destroyed = False

        def declare_parameter(self, name: str, default: Any) -> Any:
            return types.SimpleNamespace(value=self.parameters.get(name, default))

        def create_publisher(self, kind: Any, topic: str, depth: int) -> Any:
            sent = self.published.setdefault(topic, [])
            return types.SimpleNamespace(publish=sent.append)

        def create_subscription(self, kind: Any, topic: str, callback: Any, qos: Any) -> None:
            self.callbacks[topic] = callback

        def create_timer(self, seconds: float, callback: Any) -> None:
            self.callbacks["timer"] = callback

        def add_on_set_parameters_callback(self, callback: Any) -> None:
            self.callbacks["parameters"] = callback

        def get_clock(self) -> Any:
            return types.SimpleNamespace(now=lambda: types.SimpleNamespace(to_msg=lambda: "now"))

        def destroy_node(self) -> None:
            self.destroyed = True

    any_modules: Any = modules
    ros = any_modules["rclpy"]
    ros.node = Node()
    ros.init = lambda args: None
    ros.create_node = lambda name: ros.node
    ros.spin = spin
    ros.try_shutdown = lambda: None
    any_modules["rclpy.qos"].qos_profile_sensor_data = "sensor data"
    any_modules["sensor_msgs.msg"].Image = message()
    any_modules["std_msgs.msg"].String = message(data="")
    status = message()
    status.OK, status.WARN = b"\0", b"\1"
    any_modules["diagnostic_msgs.msg"].DiagnosticStatus = status
    any_modules["diagnostic_msgs.msg"].KeyValue = message()
    any_modules["diagnostic_msgs.msg"].DiagnosticArray = lambda **fields: types.SimpleNamespace(
        header=types.SimpleNamespace(stamp=None), **fields
    )
    any_modules["rcl_interfaces.msg"].SetParametersResult = message(reason="")
    return modules


def test_the_node_itself_on_a_stand_in(nano_bundle: Path, nano: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """All callbacks of the node, on modules that have rclpy's names: image in, answer and diagnostics out."""
    results: list[Any] = []

    def spin(node: Any) -> None:
        def image(encoding: str, data: bytes) -> Any:
            height, width = scene().shape[:2]
            return types.SimpleNamespace(height=height, width=width, step=3 * width, encoding=encoding, data=data)

        parameters = node.callbacks["parameters"]
        results.append(parameters([types.SimpleNamespace(name="question", value=DESCRIBE)]).successful)
        results.append(parameters([types.SimpleNamespace(name="bundle", value="other")]).successful)
        node.callbacks["image"](image("rgb8", scene().tobytes()))
        for _ in range(120_000):
            if node.published["answer"]:
                break
            threading.Event().wait(0.001)
        node.callbacks["image"](image("bayer_rggb8", b""))
        node.callbacks["timer"]()
        raise KeyboardInterrupt

    modules = stand_in_for_ros(spin)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    node: Any = vars(modules["rclpy"])["node"]
    node.parameters["bundle"] = os.fspath(nano_bundle)
    node.parameters["max_age_ms"] = 0.0
    assert ros2_node.main([]) == 0
    assert results == [True, False]
    assert [message.data for message in node.published["answer"]] == [nano.generate(DESCRIBE, SCENE).text]
    (array,) = node.published["/diagnostics"]
    (status,) = array.status
    assert (status.name, status.message, status.level) == ("trol_edge", DESCRIBE, b"\1")
    values = {pair.key: pair.value for pair in status.values}
    assert (values["answers"], values["errors"]) == ("1", "1")
    assert "bayer_rggb8" in values["last error"]
    assert node.destroyed
