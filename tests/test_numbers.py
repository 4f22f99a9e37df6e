"""Numbers as callers have them: NumPy's, fractions, huge ones, truth values. Taken as they are meant, or refused."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import trol_edge
from trol_edge.answering.options import Options
from trol_edge.answering.sampling import Sampler, SamplingParams
from trol_edge.errors import UnfinishedError, UsageError
from trol_edge.latest import LatestOnly
from trol_edge.model import MOST_THREADS
from trol_edge.runtime import Runtime
from trol_edge.testing import ScriptedRuntime

HUGE = 10**400
DIGITS = pytest.param(10**5000, id="more digits than Python prints")
WHOLES = ("max_new_tokens", "num_beams", "logprobs", "prefill_chunk", "top_k", "seed")
REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "deadline_ms")
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"}


def checked(name: str, value: Any) -> Any:
    """The value of one option, as it is used."""
    options = Options(**{name: value})
    return getattr(options.sampling if name in SAMPLING else options, name)


@pytest.mark.parametrize("name", WHOLES)
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.array])
def test_whole_numbers_of_numpy(name: str, kind: Callable[[int], Any]) -> None:
    """Plain ints afterwards: sums of small ones would overflow."""
    assert checked(name, kind(7)) == 7
    assert type(checked(name, kind(7))) is int


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("value", [np.float32(0.5), np.float16(0.5), np.float64(0.5), np.array(0.5), Fraction(1, 2)])
def test_numbers_that_are_no_float(name: str, value: Any) -> None:
    """Plain floats afterwards."""
    assert checked(name, value) == 0.5
    assert type(checked(name, value)) is float


@pytest.mark.parametrize("name", WHOLES)
@pytest.mark.parametrize("value", [2.5, 2.0, "2", True, np.True_, math.nan, Fraction(5, 2), np.float32(2), b"2", [2]])
def test_what_is_no_whole_number(name: str, value: Any) -> None:
    """Refused by name."""
    with pytest.raises(UsageError, match=name):
        checked(name, value)


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("value", ["1", True, np.True_, math.nan, np.float32("nan"), math.inf, HUGE, 1j, [1], DIGITS])
def test_what_is_no_finite_number(name: str, value: Any) -> None:
    """Refused by name, in a short message."""
    with pytest.raises(UsageError, match=name) as caught:
        checked(name, value)
    assert len(str(caught.value)) < 200


def test_answers_with_such_numbers_are_the_same() -> None:
    """In a whole call; counts may be as large as they like."""
    rt = ScriptedRuntime("yes, it is")
    plain = rt.generate("?", max_new_tokens=4, temperature=0.5, seed=3, prefill_chunk=2, logprobs=2)
    options: Any = {"temperature": Fraction(1, 2), "seed": np.uint8(3), "prefill_chunk": np.int8(2)}
    other = rt.generate("?", max_new_tokens=np.uint8(4), logprobs=np.int64(2), **options)  # type: ignore[arg-type]
    assert other.token_ids == plain.token_ids
    huge: Any = {"max_new_tokens": HUGE, "top_k": HUGE, "seed": HUGE, "prefill_chunk": HUGE, "deadline_ms": 1e300}
    assert rt.generate("?", **huge).text == "yes, it is"


@pytest.mark.parametrize("penalty", [1e-300, 1e300, 1e39, 1e-40, 0, -1])
def test_a_penalty_that_overflows(penalty: float) -> None:
    """Refused: logits would be infinite, or all the same."""
    with pytest.raises(UsageError, match=r"repetition_penalty .* from 1e-06 to 1e\+06"):
        SamplingParams(repetition_penalty=penalty)


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_largest_penalties(penalty: float) -> None:
    """No warning, and a token."""
    logits = np.array([0.0, 3e4, -3e4], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for temperature in (0, 1):
            assert 0 <= Sampler(SamplingParams(temperature, repetition_penalty=penalty)).sample(logits, [0, 1, 2]) < 3


def test_tokens() -> None:
    """Ids of any integer type; True is none."""
    rt = ScriptedRuntime("yes")
    ids = rt.tokenize("?")
    with rt.session() as session:
        expected = session.prefill(ids)
        for kind in (np.int32, np.int64, np.uint16):
            assert np.array_equal(session.prefill(np.array(ids, kind)), expected)
            assert np.array_equal(session.prefill([kind(token) for token in ids]), expected)
        for bad in ([*ids, True], [np.True_, *ids], np.array([True]), [HUGE], [1.0], ["1"]):
            with pytest.raises(UsageError, match=r"token_ids|token id"):
                session.prefill(bad)  # type: ignore[arg-type]
        for token in (True, np.False_, HUGE, -1, 1.0, "1", None, math.nan):
            with pytest.raises(UsageError, match="token id"):
                session.step(token)  # type: ignore[arg-type]
        token = int(expected.argmax())
        behind = session.step(token)
        session.truncate(np.uint8(len(ids)))  # type: ignore[arg-type]
        assert np.array_equal(session.step(np.array(token)), behind)  # type: ignore[arg-type]
        for length in (True, 1.5, HUGE, -1, "1"):
            with pytest.raises(UsageError, match="truncate"):
                session.truncate(length)  # type: ignore[arg-type]
    with rt.session(prefill_chunk=np.int8(2)) as session:  # type: ignore[arg-type]
        assert np.array_equal(session.prefill(ids * 100), rt.session().prefill(ids * 100))
    for chunk in (0, True, 2.5, "2"):
        with rt.session(prefill_chunk=chunk) as session, pytest.raises(UsageError, match="prefill_chunk"):  # type: ignore[arg-type]
            session.prefill(ids)
    with pytest.raises(UsageError, match="long_context"):
        rt.session("no")  # type: ignore[arg-type]


def test_tiles() -> None:
    """Counts of pictures and of tiles."""
    rt = ScriptedRuntime("yes")
    assert rt.tokenize("?", np.int64(2)) == rt.tokenize("?", 2) == rt.tokenize("?", [1, 1])  # type: ignore[arg-type]
    assert rt.tokenize("?", np.array([70, 1], np.uint8)) == rt.tokenize("?", (70, 1))  # type: ignore[arg-type]
    for bad in (-1, True, 2.5, "2", HUGE, [0], [True], [1, HUGE], 10**9, [10**9], None, np.array(2.5), np.ones((2, 1))):
        with pytest.raises(UsageError, match="tiles"):
            rt.tokenize("?", bad)  # type: ignore[arg-type]


def test_other_numbers() -> None:
    """Of the latest frame, and of the vision cache."""
    frames = LatestOnly[int](max_age_ms=np.float32(1e9))  # type: ignore[arg-type]
    assert frames.get(np.int64(0)) is None  # type: ignore[arg-type]
    assert frames.get(-1) is None
    frames.put(3)
    assert frames.get(1e300) == 3
    for bad in (math.nan, True, "1", HUGE, math.inf):
        with pytest.raises(UsageError, match="max_age_ms"):
            LatestOnly(bad)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="timeout_s"):
            frames.get(bad)  # type: ignore[arg-type]
    assert ScriptedRuntime("", vision_cache_bytes=np.int64(5)).vision_cache.capacity_bytes == 5  # type: ignore[arg-type]
    for bad in (True, -1, 1e6, "1"):
        with pytest.raises(UsageError, match="vision_cache_bytes"):
            ScriptedRuntime("", vision_cache_bytes=bad)  # type: ignore[arg-type]


# -- a budget that is used up ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -5, -0.0, np.float32(-1), -1e300, Fraction(-1, 3)])
def test_a_budget_that_is_used_up(value: Any) -> None:
    """The answer ends with "deadline", whichever call; what has no partial result says so."""
    rt = ScriptedRuntime("yes")
    picture = np.zeros((4, 4, 3), np.uint8)
    answer = rt.generate("?", picture, deadline_ms=value)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", (), "deadline")
    assert rt.generate("?", num_beams=2, deadline_ms=value).finish_reason == "deadline"
    (piece,) = rt.stream("?", picture, deadline_ms=value)
    assert (piece.text, piece.finish_reason) == ("", "deadline")
    answers = rt.ask_many(["?", "And?"], picture, deadline_ms=value)
    assert [(found.text, found.finish_reason) for found in answers] == [("", "deadline")] * 2
    for ask in (lambda: rt.choose("?", ["a", "b"], deadline_ms=value), lambda: rt.yes_no("?", deadline_ms=value)):
        with pytest.raises(UnfinishedError, match="deadline_ms") as caught:
            ask()
        assert caught.value.reason == "deadline"
    assert rt.generate("?").text == "yes"
    assert not len(rt.desk.turns) and not rt.desk.busy


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2.5, "2", True, 0, -1, math.nan, HUGE, MOST_THREADS + 1, [2]])
def test_threads_that_are_none(nano_bundle: Any, threads: Any) -> None:
    """Refused before anything is loaded."""
    with pytest.raises(UsageError, match="threads should be None or a whole number from 1 to"):
        Runtime(nano_bundle, threads=threads)


@pytest.mark.parametrize("name", ["verify", "prefix_reuse", "selftest"])
@pytest.mark.parametrize("value", ["no", 1, 0.0, np.zeros(3), b"", ..., [True]])
def test_switches_that_are_neither_true_nor_false(nano_bundle: Any, name: str, value: Any) -> None:
    """Refused before anything is loaded: "no" would switch it on."""
    with pytest.raises(UsageError, match=f"{name} should be True or False, found "):
        Runtime(nano_bundle, **{name: value})


def test_far_more_threads_than_cores(nano_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning at the line that asked for them; a moderate number has none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    with pytest.warns(RuntimeWarning, match="threads=5, but this process has 2 cores") as caught:
        trol_edge.Runtime(nano_bundle, threads=5).close()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trol_edge.Runtime(nano_bundle, threads=np.int64(1)).close()  # type: ignore[arg-type]
