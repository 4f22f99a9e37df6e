"""Tells whether a Runtime can still be used, and how a program ends while threads use it.

Python ends daemon threads where they are. One that is inside an inference library then takes the whole process down
("terminate called without an active exception", exit status 134), so the end waits until none is. In the child of a
fork there are no threads of that library: what would wait for them, its destructors among it, must not run.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
import weakref
from typing import Any

from trol_edge.errors import UnfinishedError, UsageError

LONGEST_END_S = 60.0  # that the end of the program waits for a call into a library


class Native:
    """Every call that enters an inference library is made inside `with native:`."""

    def __init__(self) -> None:
        self._threads: set[int] = set()  # that are inside; changed by single operations, as Ctrl-C may come
        self._ending = False

    def __enter__(self) -> None:
        self._threads.add(threading.get_ident())
        if self._ending:
            self._threads.discard(threading.get_ident())
            raise UnfinishedError("the program is ending", "stopped")

    def __exit__(self, *exception: object) -> None:
        self._threads.discard(threading.get_ident())

    def end(self) -> None:
        """Let nobody in any more, and wait until all are out; other threads' answers end with "stopped"."""
        self._ending = True
        latest = time.monotonic() + LONGEST_END_S
        while self._threads - {threading.get_ident()} and time.monotonic() < latest:
            time.sleep(0.001)

    def forked(self) -> None:
        """In the child, which has one thread, and that is not inside."""
        self._threads.clear()


native = Native()
os.register_at_fork(after_in_child=native.forked)


def end_calls_at_exit() -> None:
    """Register the end, after the libraries that are loaded so far: it has to come before what they registered."""
    atexit.unregister(native.end)
    atexit.register(native.end)


_kept: weakref.WeakSet[Any] = weakref.WeakSet()


def keep_in_forks(owner: Any) -> None:
    """In the child of a fork never destroy this object, not even when the child ends."""
    _kept.add(owner)


def _keep_all() -> None:
    for owner in list(_kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


os.register_at_fork(after_in_child=_keep_all)


class Lifetime:
    """The state that a Runtime shares with the sessions that it made."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self.closed = False

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that loaded it."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raise UsageError if the Runtime is closed, or was loaded before this process was forked."""
        if self.closed:
            raise UsageError("this Runtime is closed; make another")
        if self.forked:  # a call would hang, because threads do not survive a fork
            raise UsageError(
                f"this Runtime was loaded in process {self._process} and cannot be used in its fork {os.getpid()}; "
                "make one in each process (multiprocessing: inside the worker)"
            )
