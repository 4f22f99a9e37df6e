"""Shows answers inside an asyncio program: streamed while other tasks run, ended by a time limit, cancelled.

python -m trol_edge.examples.asyncio_loop build/trol-nano scene.png --question "Describe the scene."
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

import trol_edge


async def heartbeat(period_s: float, beats: list[int]) -> None:
    """Play everything else that a robot's loop does. It must not miss a beat while the model computes."""
    while True:
        beats[0] += 1
        await asyncio.sleep(period_s)


async def ask(runtime: trol_edge.Runtime, question: str, image: str, limit_s: float) -> str:
    """Stream an answer to the terminal. At the limit it is cancelled, and the text so far is returned."""
    text = ""

    async def stream() -> None:
        nonlocal text
        async for piece in runtime.astream(question, image):
            print(piece, end="", flush=True)
            text += piece.text

    try:
        await asyncio.wait_for(stream(), limit_s)
    except asyncio.TimeoutError:
        print(" ... (time is up)", end="")
    print()
    return text


async def run(runtime: trol_edge.Runtime, question: str, image: str, limit_s: float) -> tuple[str, int]:
    """Answer beside a heartbeat of 100 Hz; returns the answer, and the number of beats meanwhile."""
    beats = [0]
    other = asyncio.create_task(heartbeat(0.01, beats))
    try:
        return await ask(runtime, question, image, limit_s), beats[0]
    finally:
        other.cancel()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("image")
    parser.add_argument("--question", default="Describe the scene.")
    parser.add_argument("--limit-s", type=float, default=60.0, help="Seconds after which to cancel the answer.")
    given = parser.parse_args(arguments)
    try:
        with trol_edge.Runtime(given.bundle) as runtime:
            _, beats = asyncio.run(run(runtime, given.question, given.image, given.limit_s))
    except trol_edge.TrolEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"the loop went on: {beats} beats meanwhile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
