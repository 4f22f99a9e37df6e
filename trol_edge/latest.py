"""A single slot between a camera and its reader. A new frame replaces one that nobody took, so frames do not queue."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from trol_edge.errors import UsageError
from trol_edge.numeric import real, shown

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LatestCounts:
    """Counts of the items: offered == taken + dropped + (1 if one waits)."""

    offered: int
    taken: int
    dropped: int  # replaced by a newer item, or too old when asked for


class LatestOnly(Generic[T]):
    """A queue of length one that keeps the newest item. Any number of threads may put and get.

    >>> frames = trol_edge.LatestOnly()
    >>> frames.put(frame)       # never waits
    >>> frame = frames.get()    # waits for one
    """

    def __init__(self, max_age_ms: float | None = None) -> None:
        """Make an empty slot.

        max_age_ms: an item that has waited longer is dropped instead of returned; None: no limit.
        Raises UsageError for a max_age_ms that is not above 0.
        """
        age = real(max_age_ms)
        if max_age_ms is not None and (age is None or age <= 0):
            raise UsageError(
                f"max_age_ms should be a number of milliseconds above 0 or None, found {shown(max_age_ms)}"
            )
        self._max_age_s = None if age is None else age / 1e3
        self.clock = time.monotonic
        # Bare locks, because a Condition that Ctrl-C interrupts may stay locked for ever.
        self._lock = threading.Lock()
        self._readers: deque[threading.Lock] = deque()  # each waits until its own is released
        self._slot: list[tuple[float, T]] = []  # empty, or (when it was put, item)
        self._closed = False
        self._offered = self._taken = self._dropped = 0

    @property
    def counts(self) -> LatestCounts:
        """The counts so far."""
        with self._lock:
            return LatestCounts(self._offered, self._taken, self._dropped)

    def put(self, item: T) -> bool:
        """Offer an item; True if it replaced one that nobody took. Raises UsageError after `close` and for None."""
        if item is None:
            raise UsageError("None cannot be put, because get() returns it if nothing came; put an item")
        with self._lock:
            if self._closed:
                raise UsageError("put after close; make a new LatestOnly")
            self._offered += 1
            replaced = bool(self._slot)
            self._dropped += replaced
            self._slot[:] = [(self.clock(), item)]
            self._wake()
            return replaced

    def get(self, timeout_s: float | None = None) -> T | None:
        """Take the newest item, or wait for one; None after `close`, or if none came within timeout_s seconds.

        A timeout of 0 or less does not wait. Raises UsageError for a timeout_s that is not a number.
        """
        timeout = real(timeout_s)
        if timeout_s is not None and timeout is None:
            raise UsageError(f"timeout_s should be a number of seconds or None, found {shown(timeout_s)}")
        end = None if timeout is None else self.clock() + timeout
        while True:
            with self._lock:
                if self._slot:
                    put_at, item = self._slot.pop()
                    if self._max_age_s is None or self.clock() - put_at <= self._max_age_s:
                        self._taken += 1
                        return item
                    self._dropped += 1
                if self._closed:
                    return None
                waits = threading.Lock()
                waits.acquire()
                self._readers.append(waits)
            try:
                left = None if end is None else end - self.clock()
                if left is not None and left <= 0:
                    return None
                waits.acquire(timeout=-1 if left is None else min(left, threading.TIMEOUT_MAX))
            finally:
                with contextlib.suppress(ValueError):
                    self._readers.remove(waits)

    def _wake(self) -> None:
        """Wake every reader, because a single one may have been interrupted."""
        while self._readers:
            self._readers.popleft().release()

    def __iter__(self) -> Iterator[T]:
        """Yield items until `close`."""
        while (item := self.get()) is not None:
            yield item

    def close(self) -> None:
        """End every `get` and loop once the last item is taken. Closing twice is fine."""
        with self._lock:
            self._closed = True
            self._wake()
