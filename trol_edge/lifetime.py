"""Tells whether a Runtime can still be used: it is not closed, and this is the process that loaded it."""

from __future__ import annotations

import os

from trol_edge.errors import UsageError


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
        if self.forked:  # inference threads do not survive a fork: a call would wait for ever
            raise UsageError(
                f"this Runtime was loaded in process {self._process} and cannot be used in its fork {os.getpid()}; "
                "make one in each process (multiprocessing: inside the worker)"
            )
