"""Asks a question again and again about the newest frame of a camera or a video file, with OpenCV.

    python -m trol_edge.examples.camera build/trol-nano --source 0 --question "Describe the scene."

It needs OpenCV: pip install 'trol-edge[cpu,camera]'. The camera never waits for the model. A thread reads frames into a
queue of length one, and a frame that is older than --max-age-ms when the model is free is dropped.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import trol_edge
from trol_edge.errors import ImageError

Frame = NDArray[np.uint8]
FAILED_READS = 10  # in a row, that end a camera
RETRY_S = 0.1  # between them
JOIN_S = 5.0  # that a camera may take for its last frame


def frames_of(source: str) -> Iterator[Frame]:
    """Yield frames, uint8 [H, W, 3] in BGR, of a camera or of a video file, the latter at the file's own speed.

    A camera is a number ("0", "1", ...), a device (/dev/video0) or the address of a stream (rtsp://...). Its frames are
    read as they come, whatever rate it reports: with waits they would pile up, and answers would be later and later.
    Exits with a message if there is no such camera or file. Raises ImageError if a camera gives no frames any more, or
    a file none at all.
    """
    import cv2

    live = not Path(source).is_file()
    capture: Any = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not capture.isOpened():
        sys.exit(f"cannot open {'camera ' if source.isdigit() else ''}{source}")
    if live:
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # where the driver lets us: no frame waits there, either
        return _live(capture, source)
    return _file(capture, source, 1 / (capture.get(cv2.CAP_PROP_FPS) or 30.0))


def _live(capture: Any, source: str) -> Iterator[Frame]:
    failed = 0
    try:
        while failed < FAILED_READS:
            read, frame = capture.read()
            if read:
                failed = 0
                yield frame
            else:  # cameras lose a frame now and then
                failed += 1
                time.sleep(RETRY_S)
    finally:
        capture.release()
    raise ImageError(f"camera {source}: {failed} reads in a row gave no frame; is it still connected?")


def _file(capture: Any, source: str, period_s: float) -> Iterator[Frame]:
    due, count = time.monotonic(), 0
    try:
        while True:
            read, frame = capture.read()
            if not read:
                break
            count += 1
            yield frame
            due += period_s
            time.sleep(max(0.0, due - time.monotonic()))
    finally:
        capture.release()
    if not count:
        raise ImageError(f"{source}: no frame could be read; is it a video of a kind that OpenCV reads here?")


def answer_frames(
    runtime: trol_edge.Runtime,
    frames: Iterator[Frame],
    question: str,
    show: Callable[[trol_edge.Answer], None],
    *,
    deadline_ms: float | None = None,
    max_age_ms: float | None = None,
    most: int | None = None,
) -> trol_edge.LatestCounts:
    """Ask about the newest frame until there are no more, or `most` answers; returns what became of the frames."""
    newest = trol_edge.LatestOnly[Frame](max_age_ms)
    over, ended = threading.Event(), list[Exception]()

    def read() -> None:
        try:
            for frame in frames:
                if over.is_set():
                    return
                newest.put(frame)
        except Exception as error:  # belongs to the thread that waits for frames
            ended.append(error)
        finally:
            newest.close()

    reader = threading.Thread(target=read, name="camera", daemon=True)
    reader.start()
    try:
        for count, frame in enumerate(newest, 1):
            show(runtime.generate(question, frame, color="bgr", deadline_ms=deadline_ms))
            if count == most:
                break
    finally:
        over.set()
        reader.join(JOIN_S)  # a camera that hangs does not keep the program
    if ended:
        raise ended[0]
    return newest.counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--source", default="0", help="Number of a webcam, or a video file.")
    parser.add_argument("--question", default="Describe the scene.")
    parser.add_argument("--deadline-ms", type=float, help="Milliseconds after which an answer is cut off.")
    parser.add_argument("--max-age-ms", type=float, default=500.0, help="Skip frames that waited longer than this.")
    parser.add_argument("--answers", type=int, help="Number of answers after which to stop.")
    given = parser.parse_args(arguments)

    def show(answer: Any) -> None:
        spent = sum(vars(answer.timings).values())
        print(f"{answer}   [{spent:.0f} ms, {answer.finish_reason}]", flush=True)

    try:
        with trol_edge.Runtime(given.bundle) as runtime:
            counts = answer_frames(
                runtime,
                frames_of(given.source),
                given.question,
                show,
                deadline_ms=given.deadline_ms,
                max_age_ms=given.max_age_ms,
                most=given.answers,
            )
    except trol_edge.TrolEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{counts.offered} frames: {counts.taken} answered, {counts.dropped} dropped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
