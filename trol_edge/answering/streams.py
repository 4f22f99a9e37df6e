"""Iterators over the pieces of one answer, directly or in an asyncio event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from types import TracebackType

from trol_edge.answering.results import Piece
from trol_edge.answering.turns import Call


class AnswerStream(Iterator[Piece]):
    """The pieces of one answer, which `Runtime.stream` returns. Iterate over it once.

    `stop()` ends it within one step from any thread, and the last piece then says "stopped". `close()`, leaving a
    `with` block, or dropping it gives its KV cache back at once. While nobody asks for the next piece, other calls run.
    """

    def __init__(self, pieces: Generator[Piece, None, None], call: Call) -> None:
        self._pieces, self._call = pieces, call

    def __next__(self) -> Piece:
        return next(self._pieces)

    def stop(self) -> None:
        """End the answer within one step, from any thread."""
        self._call.stop()

    def close(self) -> None:
        """End the answer without a last piece. Call it in the thread that iterates, or after that has ended."""
        self._pieces.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


async def pieces(start: Callable[[], AnswerStream]) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of `start()`, which a separate thread computes, so that the event loop never waits.

    `start` is called in that thread, too, because it reads pictures.

    If this is cancelled or closed, it stops the answer and returns when the thread has ended, a step later.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()  # None says that the thread has ended
    streams: list[AnswerStream] = []
    left = threading.Event()

    def deliver(item: Piece | BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, item)
        except RuntimeError:  # the loop was closed without waiting for us, so nobody listens any more
            left.set()

    def work() -> None:
        try:
            with start() as stream:
                streams.append(stream)
                for piece in stream:
                    if left.is_set():  # it may have been set before the stream was in the list
                        break
                    deliver(piece)
        except BaseException as error:  # every error is passed to the waiting task
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
