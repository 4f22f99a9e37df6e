"""Holds what the calls of one Runtime share: the model, their turns, its sessions, and features of pictures."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from trol_edge.answering.constrain import Grammars
from trol_edge.answering.options import Options
from trol_edge.answering.turns import Call, Pace, Turns
from trol_edge.errors import UsageError
from trol_edge.model import Model
from trol_edge.session import Session
from trol_edge.vision_cache import VisionCache


class Desk:
    """The shared state of one Runtime. Calls take turns here, and each reserves a session for itself.

    idle: at most one session that waits for the next answer; its prefix is useful, but a KV cache is large. busy:
    sessions that are reserved for an answer.
    """

    def __init__(self, model: Model, vision_cache: VisionCache) -> None:
        self.model, self.vision_cache = model, vision_cache
        self.now = time.perf_counter
        self.turns = Turns()
        self.idle: list[Session] = []
        self.busy: list[Session] = []
        self.vision_pace, self.prefill_pace = Pace(), Pace()
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._lock = threading.Lock()

    @functools.cached_property
    def grammars(self) -> Grammars:
        """The vocabulary for response_format, made on first use. Raises BackendError if its library is missing."""
        return Grammars(self.model.text, self.model.ends, self.model.bundle.manifest.spec.vocab_size)

    def call(self, options: Options) -> Call:
        """Begin a call, which `stop` can end. Raises UsageError for options that the model lacks."""
        self.model.lifetime.check()
        if options.session is not None and options.session.backend is not self.model.backend:
            raise UsageError("the session belongs to another Runtime; make it with session() of this one")
        if options.answer_mode == "traverse" and not self.model.backend.prefix_reuse:
            raise UsageError("answer_mode 'traverse' needs both K/V sets; open the Runtime with prefix_reuse=True")
        call = Call(options.deadline_ms, self.now)
        with self._lock:
            self._calls.add(call)
        return call

    def stop(self) -> None:
        """End every call within one step, from any thread."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.stop()

    def reserve(self, session: Session | None) -> Session:
        """Reserve the given session, or an idle or new one, for the caller until `release`. The caller has the turn."""
        self.model.lifetime.check()
        if session is None:
            try:
                session = self.idle.pop()
            except IndexError:
                session = self.model.session()
        elif any(session is other for other in self.busy):
            raise UsageError("another answer uses this session; finish or close that answer first, or fork the session")
        self.busy.append(session)
        return session

    def release(self, session: Session, keep: bool) -> None:
        """Give a session back. keep: it is the desk's own and may be reused."""
        self.busy.remove(session)
        if keep and not self.idle and not self.model.lifetime.closed:
            self.idle.append(session)

    @contextmanager
    def held(self, call: Call, session: Session | None) -> Iterator[tuple[Session, float]]:
        """Take the turn and a session inside the block; yields the session and the milliseconds waited."""
        start = self.now()
        self.turns.take(call)
        try:
            waited_ms = 1e3 * (self.now() - start)
            reserved = self.reserve(session)
            try:
                yield reserved, waited_ms
            finally:
                self.release(reserved, keep=session is None)
        finally:
            self.turns.give(call)

    def close(self) -> None:
        """Stop running calls, wait for them, and close the model. Closing twice is fine."""
        if not self.model.lifetime.alive:  # closed already, or in a fork of the process that owns it
            return
        self.stop()
        call = Call(None, self.now)
        self.turns.take(call)
        try:
            self.model.close()  # calls that still wait for the turn will find it closed
            for session in self.idle:
                session.close()
            self.idle.clear()
            self.vision_cache.clear()
        finally:
            self.turns.give(call)
