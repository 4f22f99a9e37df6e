"""Pieces of an answer for an asyncio event loop: computed in a thread of their own, so that the loop never waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable

from trol_edge.answering.loop import AnswerStream
from trol_edge.answering.results import Piece


async def pieces(start: Callable[[], AnswerStream]) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of `start()`, which is called in the thread as well (it reads pictures).

    Cancelled or closed, the answer is stopped and this returns when the thread has ended, a step later.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()  # None: the thread has nothing more
    streams: list[AnswerStream] = []
    left = threading.Event()

    def deliver(item: Piece | BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, item)
        except RuntimeError:  # the loop was closed without waiting for us: nobody is there any more
            left.set()

    def work() -> None:
        try:
            with start() as stream:
                streams.append(stream)
                for piece in stream:
                    if left.is_set():  # perhaps before the stream was in the list
                        break
                    deliver(piece)
        except BaseException as error:  # whatever it is, it belongs to the task that waits
            deliver(error)
        finally:
            deliver(None)

    threading.Thread(target=work, name="trol-edge astream", daemon=True).start()
    item: Piece | BaseException | None = None
    try:
        while (item := await arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        for stream in streams:
            stream.stop()
        while item is not None:
            item = await arrived.get()
