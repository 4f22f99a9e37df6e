"""Ctrl-C at every place where CPython delivers it: the Runtime works afterwards, for this thread and for others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.interrupts import Interrupter, places, text_of
from trol_edge.errors import TrolEdgeError, UsageError
from trol_edge.latest import LatestOnly
from trol_edge.testing import ScriptedRuntime

FRAME = np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3)
PATIENCE_S = 60.0  # for an answer that takes a millisecond
FEWEST = 100  # places in a call, or the tracing does not work


def runtime() -> ScriptedRuntime:
    """Short answers, so that there are few places."""
    return ScriptedRuntime({"a?": "yes", "b?": "no"}, vision_cache_bytes=4096)


def in_thread(work: Callable[[], Any]) -> Any:
    """What other threads see: the result of work, or the error; AssertionError where it hangs."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert found, "it hangs"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def interrupted(call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> Iterator[str]:
    """Interrupt a call once at each place; yields the place, while the exception and its frames are still alive.

    As they are in an interactive Python, which keeps the last exception: nothing may depend on their going away.
    """
    prepare()
    count = 0
    for place, hit in places(call):
        prepare()
        interrupter = Interrupter(place, hit)
        try:
            interrupter.run(call)
        except KeyboardInterrupt as error:
            kept = error
            count += 1
            yield f"{text_of(place)}, time {hit}"
            del kept
        except TrolEdgeError as error:  # a place in a clean-up
            raise AssertionError(f"{text_of(place)}: {error!r}") from error
    assert count >= FEWEST


def check(rt: ScriptedRuntime, where: str) -> None:
    """Nothing is held, and everybody gets answers."""
    assert (rt.desk.busy, len(rt.desk.turns)) == ([], 0), where
    assert len(rt.desk.idle) <= 1, where
    answers = in_thread(lambda: [rt.generate(q, FRAME, deadline_ms=1e3 * PATIENCE_S).text for q in ("a?", "b?")])
    assert answers == ["yes", "no"], where
    assert rt.vision_cache.bytes <= rt.vision_cache.capacity_bytes, where


CALLS: dict[str, Callable[[ScriptedRuntime], Any]] = {
    "generate": lambda rt: rt.generate("a?", FRAME, deadline_ms=1e6),
    "generate in turn": lambda rt: rt.generate("b?", temperature=1.0, logprobs=1, stop=["x"]),
    "beams": lambda rt: rt.generate("a?", num_beams=2, max_new_tokens=2),
    "choose": lambda rt: rt.choose("a?", ["yes", "no"], FRAME),
    "yes_no": lambda rt: rt.yes_no("b?", FRAME),
    "ask_many": lambda rt: rt.ask_many(["a?", "b?"], FRAME),
}


@pytest.mark.slow  # hundreds of places each
@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    """Of every kind, with a picture that is not yet in the cache."""
    rt = runtime()
    for where in interrupted(lambda: CALLS[name](rt), rt.desk.vision_cache.clear):
        check(rt, where)


@pytest.mark.slow
def test_calls_in_a_session_of_the_user() -> None:
    """It is free again, and what it holds is what it says."""
    rt = runtime()
    session = rt.session()
    for where in interrupted(lambda: rt.generate("a?", session=session), lambda: session.truncate(0)):
        check(rt, where)
        assert rt.generate("a?", session=session).text == "yes", where


@pytest.mark.slow
def test_streams() -> None:
    """Interrupted anywhere, it goes on or is closed; meanwhile it blocks nobody."""
    rt, streams = runtime(), list[Any]()

    def read() -> str:
        with rt.stream("a?", FRAME) as stream:
            streams[:] = [stream]
            return "".join(piece.text for piece in stream)

    for where in interrupted(read, rt.desk.vision_cache.clear):
        assert len(rt.desk.turns) == 0, where
        assert in_thread(lambda: rt.generate("b?", deadline_ms=1e3 * PATIENCE_S)).text == "no", where
        for stream in streams:
            stream.close()
        del streams[:]
        check(rt, where)


@pytest.mark.slow
def test_sessions() -> None:
    """Every change of what is cached: the rows are those of the tokens that the session says it holds."""
    rt = runtime()
    ids, other = rt.tokenize("a?"), rt.tokenize("b?")
    sessions: list[Any] = []

    def work() -> None:
        session = rt.session(prefill_chunk=4)
        sessions[:] = [session]
        session.prefill(ids)
        twin = session.fork()
        sessions.append(twin)
        twin.step(ids[-1])
        session.truncate(len(ids) - 2)
        session.extend(ids[-2:])
        third = twin.fork()
        sessions.append(third)
        third.prefill(other, reuse=True)
        session.become(third)
        twin.truncate(3)
        twin.extend(ids[3:])

    def rows(session: Any) -> list[int]:
        """The cached tokens as the back end sees them."""
        cache, length = session.cache, session.length
        state = cache.stepping(length, session.traversed)
        return [int(i) for i in state.sets[0][:length]]

    for where in interrupted(work, sessions.clear):
        for session in sessions:
            assert rows(session) == session.token_ids, where
        for session in sessions:
            if session.prefix_reuse:
                assert np.array_equal(session.prefill(ids, reuse=True), rt.session().prefill(ids)), where
                assert rows(session) == ids, where
        check(rt, where)


@pytest.mark.slow
def test_close() -> None:
    """It is open and works, or it is closed; a second close ends what the first began."""
    runtimes: list[ScriptedRuntime] = []

    def prepare() -> None:
        runtimes[:] = [runtime()]
        runtimes[0].generate("a?", FRAME)

    count = 0
    prepare()
    for place, hit in places(lambda: runtimes[0].close()):
        prepare()
        (rt,) = runtimes
        try:
            Interrupter(place, hit).run(rt.close)
        except KeyboardInterrupt:
            count += 1
        where = text_of(place)
        if rt.model.lifetime.closed:
            with pytest.raises(UsageError, match="closed"):
                in_thread(lambda rt=rt: rt.generate("a?"))
        else:
            check(rt, where)
        in_thread(rt.close)
        assert not hasattr(rt.model, "backend") and not rt.desk.idle and not rt.vision_cache.entries, where
    assert count > 20


def test_the_newest_frame() -> None:
    """A queue whose reader or writer was interrupted serves the others."""
    queue: list[LatestOnly[int]] = []

    def prepare() -> None:
        queue[:] = [LatestOnly[int]()]

    def work() -> None:
        queue[0].put(1)
        queue[0].get()
        queue[0].get(timeout_s=0.001)

    prepare()
    for place, hit in places(work):
        prepare()
        try:
            Interrupter(place, hit).run(work)
        except KeyboardInterrupt:
            in_thread(lambda: queue[0].put(2))
            assert in_thread(lambda: queue[0].get(timeout_s=PATIENCE_S)) in (1, 2), text_of(place)
            in_thread(queue[0].close)


def test_the_interrupter_finds_what_is_wrong() -> None:
    """A lock taken outside of its try: some place leaves it locked."""
    lock = threading.Lock()

    def wrong() -> None:
        lock.acquire()
        try:
            len("work")
        finally:
            lock.release()

    stuck = 0
    for place, hit in places(wrong):
        with pytest.raises(KeyboardInterrupt):
            Interrupter(place, hit).run(wrong)
        stuck += lock.locked()
        lock = threading.Lock()
    assert stuck
