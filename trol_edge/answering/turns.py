"""Decides who may compute next. Calls take turns in order of arrival, and end by their deadline or when stopped.

Ctrl-C may raise KeyboardInterrupt between any two steps of Python, even inside `Condition.__exit__`, whose lock is then
held for ever. So shared state is changed only by single operations of the interpreter (of a deque, a bare lock), and
every function that gives something back may be called twice.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable

from trol_edge.errors import UnfinishedError

LONGEST_S = 1.0  # longest sleep of a call before it checks the queue itself


class Call:
    """One running call, with its deadline and whether it was stopped."""

    def __init__(self, deadline_ms: float | None, clock: Callable[[], float]) -> None:
        """Begin a call. deadline_ms: counts from now, or None. clock: monotonic seconds (time.perf_counter)."""
        self._clock = clock
        self._deadline_ms = deadline_ms
        self._deadline = math.inf if deadline_ms is None else clock() + deadline_ms / 1e3
        self._stopped = False
        self._asleep = threading.Lock()  # released when there is something to check
        self._asleep.acquire()

    def stop(self) -> None:
        """End the call within one step. May be called from any thread, at any time, more than once."""
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        """Let `wait` return, now or when it is called next."""
        try:
            self._asleep.release()
        except RuntimeError:  # it is awake already
            return

    def wait(self) -> None:
        """Wait until `wake` or the deadline, but at most a second, because the caller of `wake` may be interrupted."""
        self._asleep.acquire(timeout=min(max(self.remaining_s, 0.0), LONGEST_S))

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
        self._queue: deque[Call] = deque()  # the first has the turn

    def take(self, call: Call) -> None:
        """Wait for the turn of `call`. Raises UnfinishedError, without the turn, if the call ends before.

        After any other exception, such as Ctrl-C's, the caller gives the turn back.
        """
        try:
            self._queue.append(call)
            while True:
                call.check()
                if self._queue[0] is call:
                    return
                call.wait()
        except BaseException:  # a place in the queue that nobody takes would block all after it
            self.give(call)
            raise

    def give(self, call: Call) -> None:
        """Give the turn to the next call, or leave the queue. It has no effect for a call that is not in the queue."""
        with contextlib.suppress(ValueError):
            self._queue.remove(call)
        try:
            self._queue[0].wake()
        except IndexError:  # nobody waits
            return

    def __len__(self) -> int:
        """Calls that have the turn (0 or 1) or wait for it."""
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
