"""A ROS 2 node that turns sensor_msgs/Image into std_msgs/String, with diagnostics once a second.

    python -m trol_edge.examples.ros2_node --ros-args -p bundle:=build/trol-nano -p question:="Describe the scene."

Topics: image (in), answer (out), /diagnostics (out); remap them as usual. Parameters: bundle, question (may be changed
while it runs), deadline_ms (0: none), max_age_ms (frames that waited longer are dropped; 0: no limit), max_new_tokens.
rclpy and the messages come with ROS 2 (sourced in the shell), not from pip. All logic is in `FrameAnswerer`, which does
not depend on ROS.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import trol_edge
from trol_edge.errors import ImageError, UsageError

Frame = NDArray[np.uint8]
Color = Literal["rgb", "bgr"]
ENCODINGS: dict[str, tuple[int, Color]] = {  # name -> (bytes per pixel, order of the first three)
    "rgb8": (3, "rgb"),
    "bgr8": (3, "bgr"),
    "8UC3": (3, "bgr"),
    "rgba8": (4, "rgb"),
    "bgra8": (4, "bgr"),
    "8UC4": (4, "bgr"),
    "mono8": (1, "rgb"),
    "8UC1": (1, "rgb"),
}


def array_from_image(height: int, width: int, step: int, encoding: str, data: Any) -> tuple[Frame, Color]:
    """Turn the fields of a sensor_msgs/Image into an array [H, W, 3], a view of `data`, and its channel order.

    step: bytes from one row to the next. Raises ImageError for an encoding without 8-bit colours, or too little data.
    """
    if encoding not in ENCODINGS:
        raise ImageError(f"image encoding {encoding!r} is not one of {', '.join(ENCODINGS)}")
    channels, color = ENCODINGS[encoding]
    flat = np.frombuffer(data, np.uint8)
    if step < width * channels or flat.size < height * step:
        raise ImageError(
            f"found {flat.size} bytes with a step of {step}, too few for a {width}x{height} image of {encoding}; "
            "check the publisher"
        )
    pixels = np.lib.stride_tricks.as_strided(flat, (height, width, channels), (step, channels, 1), writeable=False)
    return (np.broadcast_to(pixels, (height, width, 3)) if channels == 1 else pixels[:, :, :3]), color


# Parameters of the node and their defaults. A value has the same type, but may be an int for a float.
PARAMETERS: dict[str, Any] = {
    "bundle": "build/trol-nano",
    "question": "Describe the scene.",
    "deadline_ms": 0.0,
    "max_age_ms": 500.0,
    "max_new_tokens": 64,
}


def problem_with(name: str, value: Any) -> str:
    """What is wrong with a parameter's value, in words; empty if nothing is."""
    default = PARAMETERS[name]
    if isinstance(default, str):
        return "" if isinstance(value, str) and value.strip() else f"{name} should be a text, found {value!r}"
    numbers, least = ((int, float), 0) if isinstance(default, float) else (int, 1)
    if isinstance(value, bool) or not isinstance(value, numbers) or not least <= value < float("inf"):
        return f"{name} should be a {type(default).__name__} of at least {least}, found {value!r}"
    return ""


class FrameAnswerer:
    """Asks one question about the newest frame, over and over, in a separate thread."""

    def __init__(
        self,
        runtime: trol_edge.Runtime,
        question: str,
        publish: Callable[[str], None],
        *,
        deadline_ms: float | None = None,
        max_age_ms: float | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """Start the thread. It calls publish with every answer that is not empty."""
        self.question = question
        self._runtime, self._publish = runtime, publish
        self._deadline_ms, self._max_new_tokens = deadline_ms, max_new_tokens
        self._newest = trol_edge.LatestOnly[tuple[Frame, Color]](max_age_ms)
        self._answers = self._cut = self._errors = 0
        self._last_ms, self._last_error, self._failing = 0.0, "", False
        self._thread = threading.Thread(target=self._work, name="answerer", daemon=True)
        self._thread.start()

    def offer(self, frame: Frame, color: Color) -> None:
        """Hand over a frame without waiting. It replaces a frame that is still waiting."""
        self._newest.put((frame, color))

    def reject(self, error: Exception) -> None:
        """Count a frame that could not be read or answered, or an answer that could not be published."""
        self._errors += 1
        self._last_error, self._failing = str(error) or type(error).__name__, True

    def diagnostics(self) -> dict[str, str]:
        """Counts and times for a status message."""
        counts = self._newest.counts
        return {
            "frames offered": str(counts.offered),
            "frames dropped": str(counts.dropped),
            "answers": str(self._answers),
            "answers cut by the deadline": str(self._cut),
            "errors": str(self._errors),
            "last error": self._last_error,
            "last answer ms": f"{self._last_ms:.0f}",
        }

    @property
    def healthy(self) -> bool:
        """Whether the newest frame that was tried was answered, and the thread still runs."""
        return not self._failing and self._thread.is_alive()

    def close(self) -> None:
        """Stop the current answer at once, and end the thread."""
        self._newest.close()
        while self._thread.is_alive():
            self._runtime.stop()  # again, because a waiting frame may have been taken meanwhile
            self._thread.join(0.05)

    def _work(self) -> None:
        for frame, color in self._newest:
            try:
                self._answer(frame, color)
            except Exception as error:  # neither a bad frame nor a publisher that fails ends the node
                self.reject(error)

    def _answer(self, frame: Frame, color: Color) -> None:
        start = time.monotonic()
        answer = self._runtime.generate(
            self.question,
            frame,
            color=color,
            deadline_ms=self._deadline_ms,
            max_new_tokens=self._max_new_tokens,
        )
        self._last_ms = 1e3 * (time.monotonic() - start)
        self._answers += 1
        self._cut += answer.finish_reason == "deadline"
        if answer.text:
            self._publish(answer.text)
        self._failing = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the node until it is shut down, by Ctrl-C, SIGTERM or ROS."""
    import rclpy

    rclpy.init(args=arguments)
    try:
        run(rclpy)
    except KeyboardInterrupt:
        pass
    except trol_edge.TrolEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # What rclpy raises after SIGTERM, or `ros2 lifecycle`, from wherever it waits.
        if type(error).__name__ != "ExternalShutdownException":
            raise
    finally:
        rclpy.try_shutdown()
    return 0


def run(rclpy: Any) -> None:
    """Make the node and spin it. Raises UsageError for a parameter of a wrong type."""
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
    from rcl_interfaces.msg import SetParametersResult
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image
    from std_msgs.msg import String

    node = rclpy.create_node("trol_edge")
    try:
        values = {name: declared(node, name) for name in PARAMETERS}
        answers = node.create_publisher(String, "answer", 10)
        diagnostics = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        with (
            trol_edge.Runtime(values["bundle"]) as runtime,
            closing(
                FrameAnswerer(
                    runtime,
                    values["question"],
                    lambda text: answers.publish(String(data=text)),
                    deadline_ms=values["deadline_ms"] or None,
                    max_age_ms=values["max_age_ms"] or None,
                    max_new_tokens=values["max_new_tokens"],
                )
            ) as answerer,
        ):

            def on_image(message: Any) -> None:
                fields = (message.height, message.width, message.step, message.encoding, message.data)
                try:
                    frame = array_from_image(*fields)
                except ImageError as error:
                    answerer.reject(error)
                else:
                    answerer.offer(*frame)

            def on_parameters(changed: Any) -> Any:
                ours = [parameter for parameter in changed if parameter.name in PARAMETERS]
                fixed = [f"{p.name} is read at the start only" for p in ours if p.name != "question"]
                problems = fixed or [text for p in ours if (text := problem_with(p.name, p.value))]
                if problems:
                    return SetParametersResult(successful=False, reason="; ".join(problems))
                for parameter in ours:
                    answerer.question = parameter.value
                return SetParametersResult(successful=True)

            def on_timer() -> None:
                level = DiagnosticStatus.OK if answerer.healthy else DiagnosticStatus.WARN
                pairs = [KeyValue(key=key, value=value) for key, value in answerer.diagnostics().items()]
                status = DiagnosticStatus(level=level, name="trol_edge", message=answerer.question, values=pairs)
                message = DiagnosticArray(status=[status])
                message.header.stamp = node.get_clock().now().to_msg()
                diagnostics.publish(message)

            node.create_subscription(Image, "image", on_image, qos_profile_sensor_data)  # best effort, a short queue
            node.add_on_set_parameters_callback(on_parameters)
            node.create_timer(1.0, on_timer)
            rclpy.spin(node)
    finally:
        node.destroy_node()


def declared(node: Any, name: str) -> Any:
    """The value of a parameter at the start of the node. Raises UsageError for a wrong type."""
    try:
        value = node.declare_parameter(name, PARAMETERS[name]).value
    except Exception as error:  # rclpy itself refuses a type
        if type(error).__name__ == "ExternalShutdownException":
            raise
        raise UsageError(f"parameter {name}: {error}") from error
    if problem := problem_with(name, value):
        raise UsageError(f"parameter {problem}")
    return value


if __name__ == "__main__":
    sys.exit(main())
