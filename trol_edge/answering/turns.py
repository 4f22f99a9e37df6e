"""Who may compute next: calls take turns in the order in which they came, and end by their deadline or when stopped."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable

from trol_edge.errors import UnfinishedError


class Call:
    """One call under way: its deadline, and whether someone stopped it."""

    def __init__(self, deadline_ms: float | None, clock: Callable[[], float]) -> None:
        """deadline_ms: from now on, or None. clock: seconds, monotonic (time.perf_counter)."""
        self._clock = clock
        self._deadline_ms = deadline_ms
        self._deadline = math.inf if deadline_ms is None else clock() + deadline_ms / 1e3
        self._stopped = False
        self.woken = threading.Event()

    def stop(self) -> None:
        """End the call within one step; from any thread, at any time, more than once."""
        self._stopped = True
        self.woken.set()

    @property
    def remaining_s(self) -> float:
        """Seconds to the deadline, infinite without one, negative behind it."""
        return self._deadline - self._clock()

    def check(self, needs_s: float = 0.0) -> None:
        """Raise UnfinishedError where the call was stopped, or `needs_s` more seconds would miss its deadline."""
        if self._stopped:
            raise UnfinishedError("stopped before there was a result", "stopped")
        if self._deadline_ms is not None and self.remaining_s <= needs_s:
            raise UnfinishedError(f"no result within deadline_ms={self._deadline_ms}; allow more time", "deadline")


class Turns:
    """A lock that is handed on in the order of asking. (A `threading.Lock` may pass over the same thread for long.)"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[Call] = deque()  # the first has the turn

    def take(self, call: Call) -> None:
        """Wait for the turn of `call`. Raises UnfinishedError, without the turn, where the call ends before."""
        with self._lock:
            self._queue.append(call)
        try:
            while True:
                call.check()
                with self._lock:
                    if self._queue[0] is call:
                        return
                call.woken.wait(min(call.remaining_s, threading.TIMEOUT_MAX))
                call.woken.clear()  # before looking again, so that no stop is lost
        except BaseException:  # Ctrl-C too: a place in the queue that nobody takes would block all behind it
            self.give(call)
            raise

    def give(self, call: Call) -> None:
        """Hand the turn on."""
        with self._lock:
            first = self._queue[0] is call
            self._queue.remove(call)
            if first and self._queue:
                self._queue[0].woken.set()

    def __len__(self) -> int:
        """Calls that have the turn (0 or 1) or wait for it."""
        with self._lock:
            return len(self._queue)


class Pace:
    """The least time per unit that a kind of work has taken so far: what is sure to be too much before a deadline."""

    def __init__(self) -> None:
        self._per_unit_s = math.inf

    def saw(self, seconds: float, units: int) -> None:
        """So many units took so long."""
        self._per_unit_s = min(self._per_unit_s, seconds / units)

    def least_s(self, units: int) -> float:
        """Seconds that so many units take at least; 0 before any was seen."""
        return 0.0 if self._per_unit_s == math.inf else units * self._per_unit_s
