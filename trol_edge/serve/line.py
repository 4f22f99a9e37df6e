"""A bounded line before the one worker: first come, first served, and no place for more than was said."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from trol_edge.errors import RequestError, UnfinishedError

LONGEST_RETRY_S = 60
STOPPING_RETRY_S = 10
SHARE = 0.2  # weight of the newest call in the mean time of a call


class Line:
    """Counts the calls inside, and gives them turns in order. For one event loop."""

    def __init__(self, most: int) -> None:
        """most: calls that may be inside at a time, reading their bodies, waiting or running."""
        self.most, self.inside = most, 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._busy = self._closed = False
        self._mean_s = 0.0

    @property
    def waiting(self) -> int:
        """The calls that wait for their turn."""
        return len(self._waiting)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Be inside. Raises RequestError 429 if the line is full, 503 after `close`."""
        self._check_open()
        if self.inside >= self.most:
            seconds = min(max(math.ceil(self._mean_s * self.inside), 1), LONGEST_RETRY_S)
            raise RequestError(
                f"{self.inside} calls are waiting or running, and no more are taken; try again in {seconds} s",
                status=429,
                code="queue_full",
                retry_after_s=seconds,
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @asynccontextmanager
    async def turn(self, within_s: float) -> AsyncIterator[None]:
        """Wait for the turn, and have it. Raises UnfinishedError if it does not come within that time."""
        self._check_open()
        if self._busy:
            await self._wait(within_s)
        self._busy = True
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            yield
        finally:
            self._mean_s += (loop.time() - start - self._mean_s) * (SHARE if self._mean_s else 1)
            self._next()

    def close(self) -> None:
        """Refuse new calls and those that wait; the running one goes on."""
        self._closed = True
        while self._waiting:
            if not (future := self._waiting.popleft()).done():
                future.set_result(None)

    async def _wait(self, within_s: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            # unlike wait_for, this never loses a turn that comes together with the timeout
            await asyncio.wait([future], timeout=None if math.isinf(within_s) else max(within_s, 0.0))
        except asyncio.CancelledError:
            self._leave(future)
            raise
        if not future.done():
            self._leave(future)
            raise UnfinishedError("the deadline came while the call waited", "deadline")
        self._check_open()

    def _leave(self, future: asyncio.Future[None]) -> None:
        if future.done():  # it has the turn, and does not use it
            self._next()
        else:
            self._waiting.remove(future)

    def _next(self) -> None:
        """Give the turn to the first that waits."""
        self._busy = bool(self._waiting)
        if self._waiting:
            self._waiting.popleft().set_result(None)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the server is stopping", status=503, code="stopping", retry_after_s=STOPPING_RETRY_S)
