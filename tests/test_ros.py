"""The example node on a real rclpy, where one is installed (`pip install "ros-rclpy[fastrtps]" ros-std-msgs
ros-sensor-msgs ros-diagnostic-msgs ros-lifecycle-msgs`), with another process that publishes frames and listens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="no ROS 2 here")
ROOT = Path(__file__).resolve().parents[1]
SCENE = ROOT / "export" / "checkpoints" / "trol-nano" / "scene.png"
QUESTION = "What is left of the red star?"
NODE = [sys.executable, "-m", "trol_edge.examples.ros2_node", "--ros-args"]
# The other process: good frames until an answer comes, a bad one, good ones; then parameters. It prints what it saw.
OTHER = """
import json, sys, time
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import String
from trol_edge.prompt.images import load_rgb
rclpy.init()
node = rclpy.create_node("other")
answers, levels = [], []
def on_diagnostics(message):
    for status in message.status:
        levels.append([status.level[0], {pair.key: pair.value for pair in status.values}])
node.create_subscription(String, "answer", lambda message: answers.append(message.data), 10)
node.create_subscription(DiagnosticArray, "/diagnostics", on_diagnostics, 10)
images = node.create_publisher(Image, "image", qos_profile_sensor_data)
frame = load_rgb(sys.argv[1])
height, width, _ = frame.shape
good = Image(height=height, width=width, step=3 * width, encoding="rgb8", data=frame.tobytes())
bad = Image(height=2, width=2, step=6, encoding="nonsense", data=bytes(12))
def until(done, message=None):
    end = time.monotonic() + 60
    while not done() and time.monotonic() < end:
        if message is not None:
            images.publish(message)
        rclpy.spin_once(node, timeout_sec=0.2)
    assert done(), (answers, levels[-1:])
until(lambda: answers and levels and levels[-1][0] == 0, good)
until(lambda: levels[-1][0] == 1, bad)
warned = levels[-1]
until(lambda: levels[-1][0] == 0, good)
client = node.create_client(SetParameters, "/trol_edge/set_parameters")
assert client.wait_for_service(30)
def put(name, **value):
    request = SetParameters.Request(parameters=[Parameter(name=name, value=ParameterValue(**value))])
    done = client.call_async(request)
    until(done.done)
    return [done.result().results[0].successful, done.result().results[0].reason]
said = [put("question", type=2, integer_value=5), put("deadline_ms", type=3, double_value=1.0),
        put("question", type=4, string_value="Is there a star?")]
count = len(answers)
until(lambda: len(answers) > count + 2, good)
print(json.dumps({"answers": [answers[0], answers[-1]], "warned": warned, "parameters": said}))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Nothing leaves the machine, and nothing of another ROS program on it comes in."""
    return os.environ | {
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_DOMAIN_ID": str(1 + os.getpid() % 200),
        "AMENT_PREFIX_PATH": os.environ.get("AMENT_PREFIX_PATH", sys.prefix),
        "ROS_LOG_DIR": str(tmp_path),
    }


@pytest.fixture
def running(nano_bundle: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The node, as a process."""
    command = [*NODE, "-p", f"bundle:={nano_bundle}", "-p", f"question:={QUESTION}"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as node:
        yield node
        node.kill()


@pytest.mark.slow
@pytest.mark.heavy
def test_the_node_answers_warns_and_ends_quietly(
    running: subprocess.Popen[str], environment: dict[str, str], nano: Any
) -> None:
    """Answers come, a bad frame is a warning until the next good one, wrong parameters are refused, SIGTERM is 0."""
    command = [sys.executable, "-c", OTHER, str(SCENE)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["answers"] == [nano.generate(q, SCENE).text for q in (QUESTION, "Is there a star?")]
    assert "nonsense" in seen["warned"][1]["last error"] and int(seen["warned"][1]["errors"]) >= 1
    assert [good for good, _ in seen["parameters"]] == [False, False, True]
    assert "start only" in seen["parameters"][1][1]
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 0 and "Traceback" not in said, said


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("given", ["max_new_tokens:=many", "question:=5", "deadline_ms:=-1.0"])
def test_parameters_of_a_wrong_type_end_it(given: str, nano_bundle: Path, environment: dict[str, str]) -> None:
    """At the start: one line, exit code 1."""
    command = [*NODE, "-p", f"bundle:={nano_bundle}", "-p", given]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert given.split(":=")[0] in done.stderr.splitlines()[-1]
