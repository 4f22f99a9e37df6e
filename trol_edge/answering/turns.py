"""Decides who may compute next. Calls take turns in order of arrival, and end by their deadline or when stopped."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable

from trol_edge.errors import UnfinishedError


class Call:
    """One running call, with its deadline and whether it was stopped."""

    def __init__(self, deadline_ms: float | None, clock: Callable[[], float]) -> None:
        """Begin a call. deadline_ms: counts from now, or None. clock: monotonic seconds (time.perf_counter)."""
        self._clock = clock
        self._deadline_ms = deadline_ms
        self._deadline = math.inf if deadline_ms is None else clock() + deadline_ms / 1e3
        self._stopped = False
        self.woken = threading.Event()

    def stop(self) -> None:
        """End the call within one step. May be called from any thread, at any time, more than once."""
        self._stopped = True
        self.woken.set()

    @property
    def remaining_s(self) -> float:
        """The seconds to the deadline, infinite without one, negative after it."""
        return self._deadline - self._clock()

    def check(self, needs_s: float = 0.0) -> None:
        """Raise UnfinishedError if the call was stopped, or if `needs_s` more seconds would miss its deadline."""
        if self._stopped:
            raise UnfinishedError("stopped before there was a result", "stopped")
        if self._deadline_ms is not None and self.remaining_s <= needs_s:
            raise UnfinishedError(f"no result within deadline_ms={self._deadline_ms}; allow more time", "deadline")


class Turns:
    """A lock that callers get in order of arrival. (A `threading.Lock` may skip the same thread for long.)"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[Call] = deque()  # the first has the turn

    def take(self, call: Call) -> None:
        """Wait for the turn of `call`. Raises UnfinishedError, without the turn, if the call ends before."""
        with self._lock:
            self._queue.append(call)
        try:
            while True:
                call.check()
                with self._lock:
                    if self._queue[0] is call:
                        return
                call.woken.wait(min(call.remaining_s, threading.TIMEOUT_MAX))
                call.woken.clear()  # before checking again, so that no stop is lost
        except BaseException:  # Ctrl-C too, because a place in the queue that nobody takes would block all after it
            self.give(call)
            raise

    def give(self, call: Call) -> None:
        """Give the turn to the next call."""
        with self._lock:
            first = self._queue[0] is call
            self._queue.remove(call)
            if first and self._queue:
                self._queue[0].woken.set()

    def __len__(self) -> int:
        """The number of calls that have the turn (0 or 1) or wait for it."""
        with self._lock:
            return len(self._queue)


class Pace:
    """Fastest time per unit seen so far. Work that would miss its deadline even at this pace is not started."""

    def __init__(self) -> None:
        self._per_unit_s = math.inf

    def saw(self, seconds: float, units: int) -> None:
        """Record that `units` units took `seconds`."""
        self._per_unit_s = min(self._per_unit_s, seconds / units)

    def least_s(self, units: int) -> float:
        """The least seconds that `units` units take; 0 before any was seen."""
        return 0.0 if self._per_unit_s == math.inf else units * self._per_unit_s
