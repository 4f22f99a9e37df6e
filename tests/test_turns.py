"""Turns, deadlines and the latest-only queue: order, stops and counts, without a model or a wait for clocks."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from trol_edge.answering.turns import Call, Turns
from trol_edge.errors import UnfinishedError, UsageError
from trol_edge.latest import LatestCounts, LatestOnly


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def waiting(turns: Turns, count: int) -> None:
    """Wait until `count` calls have the turn or wait for it."""
    for _ in range(5000):
        if len(turns) == count:
            return
        threading.Event().wait(0.001)
    raise AssertionError(f"{len(turns)} calls, not {count}")


def test_turns_are_given_in_the_order_of_asking() -> None:
    """Ten threads that ask one after another; each notes when it has the turn."""
    turns, clock, order = Turns(), FakeClock(), []  # type: Turns, FakeClock, list[int]
    first = Call(None, clock)
    turns.take(first)

    def work(number: int) -> None:
        call = Call(None, clock)
        turns.take(call)
        order.append(number)
        turns.give(call)

    threads = []
    for number in range(10):
        threads.append(threading.Thread(target=work, args=(number,)))
        threads[-1].start()
        waiting(turns, number + 2)
    assert order == []
    turns.give(first)
    for thread in threads:
        thread.join(60)
    assert order == list(range(10))
    assert len(turns) == 0


def test_who_gives_the_turn_up_and_asks_again_is_last() -> None:
    """Like a stream between two pieces: whoever waits comes first."""
    turns, clock, order = Turns(), FakeClock(), []  # type: Turns, FakeClock, list[str]
    stream, other = Call(None, clock), Call(None, clock)
    turns.take(stream)
    thread = threading.Thread(target=lambda: (turns.take(other), order.append("other"), turns.give(other)))
    thread.start()
    waiting(turns, 2)
    turns.give(stream)
    turns.take(stream)
    order.append("stream")
    turns.give(stream)
    thread.join(60)
    assert order == ["other", "stream"]


def test_a_stopped_call_leaves_the_queue_and_the_others_move_up() -> None:
    """Stopped while it waits: it raises, and the one after it gets the turn."""
    turns, clock = Turns(), FakeClock()
    first, second, third = (Call(None, clock) for _ in range(3))
    turns.take(first)
    seen: list[Any] = []

    def work(call: Call) -> None:
        try:
            turns.take(call)
            seen.append(call)
            turns.give(call)
        except UnfinishedError as error:
            seen.append(error.reason)

    threads = []
    for number, call in enumerate((second, third)):
        threads.append(threading.Thread(target=work, args=(call,)))
        threads[-1].start()
        waiting(turns, number + 2)
    second.stop()
    threads[0].join(60)
    assert seen == ["stopped"]
    turns.give(first)
    threads[1].join(60)
    assert seen == ["stopped", third]


def test_a_deadline_ends_the_waiting() -> None:
    """A call after one that never ends; this takes real time, a millisecond of it."""
    import time

    turns = Turns()
    turns.take(Call(None, time.perf_counter))
    with pytest.raises(UnfinishedError, match="deadline_ms=1") as caught:
        turns.take(Call(1, time.perf_counter))
    assert caught.value.reason == "deadline"
    assert len(turns) == 1


def test_call_checks_its_deadline_against_what_is_needed() -> None:
    """At the deadline it is over; before, only for work that is sure to miss it. A stop comes first."""
    clock = FakeClock()
    call = Call(200, clock)
    call.check()
    assert call.remaining_s == pytest.approx(0.2)
    call.check(0.199)
    with pytest.raises(UnfinishedError, match="deadline"):
        call.check(0.201)
    clock.now += 0.2
    with pytest.raises(UnfinishedError, match="deadline"):
        call.check()
    call.stop()
    call.stop()
    with pytest.raises(UnfinishedError, match="stopped"):
        call.check()
    endless = Call(None, clock)
    clock.now = 1e12
    endless.check(1e9)


# -- the newest frame --------------------------------------------------------------------------------------------------


def test_only_the_latest_is_kept_and_all_are_counted() -> None:
    """A burst of frames before anyone looks: the last one is taken, the others are dropped."""
    frames = LatestOnly[int]()
    assert [frames.put(i) for i in range(5)] == [False, True, True, True, True]
    assert frames.get() == 4
    assert frames.counts == LatestCounts(offered=5, taken=1, dropped=4)
    assert frames.get(timeout_s=0) is None
    assert frames.put(9) is False
    frames.close()
    assert list(frames) == [9]
    assert list(frames) == []
    assert frames.counts == LatestCounts(offered=6, taken=2, dropped=4)


def test_old_frames_are_dropped_when_asked_for() -> None:
    """max_age_ms counts from put to get."""
    frames, clock = LatestOnly[str](max_age_ms=100), FakeClock()
    frames.clock = clock
    frames.put("fresh")
    clock.now += 0.1
    assert frames.get() == "fresh"
    frames.put("stale")
    clock.now += 0.101
    assert frames.get(timeout_s=0) is None
    assert frames.counts == LatestCounts(offered=2, taken=1, dropped=1)


def test_get_waits_for_a_frame_or_the_end() -> None:
    """Readers that came first get what comes, and end with close."""
    frames = LatestOnly[int]()
    got: list[int | None] = []
    threads = [threading.Thread(target=lambda: got.extend(frames)) for _ in range(2)]
    for thread in threads:
        thread.start()
    frames.put(1)
    for _ in range(5000):
        if got:
            break
        threading.Event().wait(0.001)
    frames.close()
    frames.close()
    for thread in threads:
        thread.join(60)
    assert got == [1]


def test_many_threads_lose_and_double_nothing() -> None:
    """Every frame is taken once or dropped."""
    frames, got = LatestOnly[int](), []  # type: LatestOnly[int], list[int]
    readers = [threading.Thread(target=lambda: got.extend(frames)) for _ in range(3)]
    writers = [threading.Thread(target=lambda n=n: [frames.put(i) for i in range(n, 3000, 3)]) for n in range(3)]  # type: ignore[misc]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join(60)
    frames.close()
    for thread in readers:
        thread.join(60)
    counts = frames.counts
    assert counts.offered == 3000 == counts.taken + counts.dropped
    assert len(got) == len(set(got)) == counts.taken


@pytest.mark.parametrize("age", [0, -1, float("nan")])
def test_bad_ages_and_items_are_refused(age: float) -> None:
    """And a queue that is closed."""
    with pytest.raises(UsageError, match="max_age_ms"):
        LatestOnly[int](max_age_ms=age)
    frames = LatestOnly[Any]()
    with pytest.raises(UsageError, match="None cannot"):
        frames.put(None)
    frames.close()
    with pytest.raises(UsageError, match="put after close"):
        frames.put(1)
