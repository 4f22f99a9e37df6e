"""Holds what the calls of one Runtime share: the model, their turns, its sessions, and features of pictures."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from trol_edge.answering.constrain import Grammars
from trol_edge.answering.options import Options
from trol_edge.answering.results import Clock
from trol_edge.answering.turns import Call, Pace, Turns
from trol_edge.errors import UsageError
from trol_edge.model import Model
from trol_edge.session import NOT_PRUNABLE, Session
from trol_edge.vision_cache import VisionCache

T = TypeVar("T")


class Desk:
    """The shared state of one Runtime. Calls take turns here, and each reserves a session for itself.

    idle: at most one session that waits for the next answer; its prefix is useful, but a KV cache is large. reserved:
    sessions in use. Both change by single operations, so that Ctrl-C finds them consistent (see turns.py).
    """

    def __init__(self, model: Model, vision_cache: VisionCache) -> None:
        self.model, self.vision_cache = model, vision_cache
        self.now = time.perf_counter
        self.turns = Turns()
        self.idle: list[Session] = []
        self.reserved: dict[Hold, Session] = {}
        self.vision_pace, self.prefill_pace = Pace(), Pace()
        self._calls: set[weakref.ref[Call]] = set()

    @property
    def busy(self) -> list[Session]:
        """The sessions that are reserved for an answer."""
        return list(self.reserved.values())

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
        if options.image_tokens < 1 and not self.model.backend.takes_rotary:
            raise UsageError(NOT_PRUNABLE)
        most = self.model.bundle.manifest.image.max_tiles
        if options.max_tiles is not None and options.max_tiles > most:
            raise UsageError(
                f"max_tiles {options.max_tiles}: this bundle makes at most {most} of a picture; give fewer"
            )
        call = Call(options.deadline_ms, self.now)
        self._calls.add(weakref.ref(call, self._calls.discard))
        return call

    def stop(self) -> None:
        """End every call within one step, from any thread."""
        for reference in self._calls.copy():
            call = reference()
            if call is not None:
                call.stop()

    def held(self, call: Call, session: Session | None, clock: Clock, work: Callable[[Session], T]) -> T:
        """Run `work` with the turn and a session (the given one, or one of the desk's), and return its result."""
        hold = Hold(self, call, session, clock)
        try:
            try:
                return work(hold.take())
            finally:
                hold.end()
        finally:
            hold.end()  # Ctrl-C may have interrupted the first

    def close(self) -> None:
        """Stop running calls, wait for them, and close the model. Closing twice is fine, for example after Ctrl-C."""
        if self.model.lifetime.forked:
            return
        self.stop()
        call = Call(None, self.now)
        try:
            try:
                self.turns.take(call)
                self.model.close()  # calls that still wait for the turn will find it closed
                for session in self.idle:
                    session.close()
                self.idle.clear()
                self.vision_cache.clear()
            finally:
                self.turns.give(call)
        finally:
            self.turns.give(call)


class Hold:
    """The turn of one call, and a session for it alone. `end` gives both back, and may be called twice.

    Call `end` in a `finally` inside another `finally` that calls it again, because the first may be interrupted.
    """

    def __init__(self, desk: Desk, call: Call, session: Session | None, clock: Clock) -> None:
        """Prepare a hold. session: the caller's, or None for one of the desk's."""
        self._desk, self._call, self._given, self._clock = desk, call, session, clock

    def take(self) -> Session:
        """Wait for the turn, and reserve the session. Raises UsageError if another answer uses it."""
        self.take_turn()
        desk, session = self._desk, self._given
        desk.model.lifetime.check()
        if session is None:
            try:
                session = desk.idle.pop()
            except IndexError:
                session = desk.model.session()
        elif any(session is other for other in desk.busy):
            raise UsageError("another answer uses this session; finish or close that answer first, or fork the session")
        desk.reserved[self] = session
        return session

    def take_turn(self) -> None:
        """Wait for the turn, and count it as waiting time. Raises UsageError in a fork, whose turns never come."""
        desk = self._desk
        if desk.model.lifetime.forked:
            desk.model.lifetime.check()
        start = desk.now()
        try:
            desk.turns.take(self._call)
        finally:
            self._clock.wait_ms += 1e3 * (desk.now() - start)

    def give_turn(self) -> None:
        """Let others compute; the session stays reserved."""
        self._desk.turns.give(self._call)

    def end(self) -> None:
        """Give back the session and the turn. Takes no lock, because a garbage collection may call it anywhere."""
        desk = self._desk
        session = desk.reserved.pop(self, None)
        if session is not None and self._given is None and not desk.idle and not desk.model.lifetime.closed:
            desk.idle.append(session)
        self.give_turn()
