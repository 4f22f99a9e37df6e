"""Pieces of one answer, to iterate over: at once, or in an asyncio event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from types import TracebackType

from trol_edge.answering.results import Piece
from trol_edge.answering.turns import Call


class AnswerStream(Iterator[Piece]):
    """Pieces of one answer; what `Runtime.stream` returns. Iterate over it, once.

    `stop()`, from any thread, ends it within one step: the last piece then says "stopped". `close()`, leaving a `with`
    block, or dropping it gives its KV cache back at once. While nobody asks for the next piece, other calls run.
    """

    def __init__(self, pieces: Generator[Piece, None, None], call: Call) -> None:
        self._pieces, self._call = pieces, call

    def __next__(self) -> Piece:
        return next(self._pieces)

    def stop(self) -> None:
        """End the answer within one step, from any thread."""
        self._call.stop()

    def close(self) -> None:
        """End the answer without a last piece; in the thread that iterates, or after it has ended."""
        self._pieces.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


async def pieces(start: Callable[[], AnswerStream]) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of `start()`, computed in a thread of their own, so that the event loop never waits.

    `start` is called in that thread, too, because it reads pictures.

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
