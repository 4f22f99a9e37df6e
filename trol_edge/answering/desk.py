"""What the calls of one Runtime share: the model, the order of their turns, its sessions, and features of pictures."""

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
    """One per Runtime. Calls take turns here; each has a session for itself as long as it has one reserved.

    idle: at most one session between answers, because a KV cache is large, and its prefix is of use. busy: sessions
    under an answer.
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
        """The vocabulary for response_format; made at the first use. BackendError where its library is missing."""
        return Grammars(self.model.text, self.model.ends, self.model.bundle.manifest.spec.vocab_size)

    def call(self, options: Options) -> Call:
        """A call that begins now, and that `stop` knows of. Raises UsageError for options that the model lacks."""
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
        """The given session, or an idle or new one, for the caller alone until `release`. Needs the turn."""
        self.model.lifetime.check()
        if session is None:
            try:
                session = self.idle.pop()
            except IndexError:
                session = self.model.session()
        elif any(session is other for other in self.busy):
            raise UsageError(
                "this session is under another answer; finish or close that one first, or fork the session"
            )
        self.busy.append(session)
        return session

    def release(self, session: Session, keep: bool) -> None:
        """Give a session back; keep: it is the desk's own, and may be reused."""
        self.busy.remove(session)
        if keep and not self.idle and not self.model.lifetime.closed:
            self.idle.append(session)

    @contextmanager
    def held(self, call: Call, session: Session | None) -> Iterator[tuple[Session, float]]:
        """The turn, a session for as long, and the milliseconds waited."""
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
        """Stop what is under way, wait for it, and close the model. Twice is fine."""
        if not self.model.lifetime.alive:  # or this is the fork of the process that it belongs to
            return
        self.stop()
        call = Call(None, self.now)
        self.turns.take(call)
        try:
            self.model.close()  # whoever waits for the turn finds it so
            for session in self.idle:
                session.close()
            self.idle.clear()
            self.vision_cache.clear()
        finally:
            self.turns.give(call)
