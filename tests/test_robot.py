"""What a robot relies on: deadlines, stops, turns, event loops, choices, formats, and the end of a Runtime."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import NANO
from tests.slow import SlowBackend, slow_down
from trol_edge import Answer, Runtime
from trol_edge.answering import beam
from trol_edge.answering.turns import Call
from trol_edge.errors import BackendError, ContextError, ImageError, TrolEdgeError, UnfinishedError, UsageError

SCENE = NANO / "scene.png"
QUESTION = "What is left of the red circle?"
DESCRIBE = "Describe the scene."
COUNT = "How many objects are there?"


@pytest.fixture(scope="module")
def rt(nano_bundle: Path) -> Any:
    """A Runtime of this file's own, whose clock and back end tests may replace."""
    with Runtime(nano_bundle) as runtime:
        yield runtime


@pytest.fixture
def slow(rt: Runtime) -> SlowBackend:
    """The Runtime on simulated time: 50 ms a picture, 1 ms a prompt token, 10 ms a step."""
    return slow_down(rt)


@pytest.fixture(autouse=True)
def nothing_left(rt: Runtime) -> Any:
    """After every test no session is reserved and no call queued."""
    yield
    if rt.desk.busy or len(rt.desk.turns):
        gc.collect()  # a dropped stream gives back what it holds
    assert rt.desk.busy == []
    assert len(rt.desk.turns) == 0


def picture() -> Any:
    """The shipped picture as RGB bytes [H, W, 3]."""
    return np.array(Image.open(SCENE).convert("RGB"))


def in_thread(work: Any, *arguments: Any) -> Any:
    """The result of a call made in another thread, while this one waits."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *arguments).result(120)


def queued(rt: Runtime, count: int) -> None:
    """Wait until `count` calls have the turn or wait for it."""
    for _ in range(60_000):
        if len(rt.desk.turns) == count:
            return
        threading.Event().wait(0.001)
    raise AssertionError(f"{len(rt.desk.turns)} calls, not {count}")


# -- deadlines and stops -----------------------------------------------------------------------------------------------


def test_a_deadline_ends_an_answer_within_a_step(rt: Runtime, slow: SlowBackend) -> None:
    """For every deadline, in the picture, the prompt or the answer: never later than one step after it."""
    whole = rt.generate(DESCRIBE, SCENE)
    assert whole.finish_reason == "stop"
    ended = set()
    for milliseconds in (1, 30, 49, 51, 60, 120, 180, 186, 190, 200, 230, 300, 400, 420, 1000):
        rt.desk.idle.clear()
        rt.desk.vision_cache.clear()
        start = slow.clock.now
        answer = rt.generate(DESCRIBE, SCENE, deadline_ms=milliseconds)
        late_s = slow.clock.now - start - milliseconds / 1e3
        assert late_s <= slow.step_s + 1e-9, milliseconds
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        assert whole.text.startswith(answer.text)
        assert answer.finish_reason == ("deadline" if len(answer.token_ids) < len(whole.token_ids) else "stop")
        ended.add((answer.finish_reason, bool(answer.token_ids)))
        assert math.isclose(sum(vars(answer.timings).values()), 1e3 * (slow.clock.now - start), abs_tol=1e-6)
    assert ended == {("deadline", False), ("deadline", True), ("stop", True)}


def test_the_first_deadline_overshoots_by_one_chunk_at_most(rt: Runtime, slow: SlowBackend) -> None:
    """Nothing is known of the machine yet, so the prompt's chunks are the grain: 64 tokens, or as asked."""
    for chunk, most in ((None, 64), (10, 10), (1, 1)):
        slow = slow_down(rt, vision_s=0)
        answer = rt.generate(QUESTION, SCENE, deadline_ms=7.5, prefill_chunk=chunk)
        assert (answer.finish_reason, answer.text, answer.token_ids) == ("deadline", "", ())
        assert slow.clock.now - 100 <= 0.0075 + most * slow.token_s + 1e-9


def test_a_cut_prompt_is_gone_on_with(rt: Runtime, slow: SlowBackend) -> None:
    """The chunks that were done before a deadline are not computed again, and the answer is the whole one's."""
    whole = rt.generate(QUESTION, SCENE)
    rt.desk.idle.clear()
    cut = rt.generate(QUESTION, SCENE, deadline_ms=50, prefill_chunk=20)
    assert (cut.finish_reason, cut.token_ids) == ("deadline", ())
    again = rt.generate(QUESTION, SCENE)
    assert again.cached_tokens == 40
    assert (again.text, again.token_ids) == (whole.text, whole.token_ids)


def test_stop_from_another_thread_ends_within_a_step(rt: Runtime, slow: SlowBackend) -> None:
    """Stop the Runtime or the stream, in the prompt and in a step; the text so far stays."""
    whole = rt.generate(DESCRIBE, SCENE)
    for kind, at, tokens in (("step", 3, 3), ("step", 1, 1), ("traverse", 1, 0)):
        slow = slow_down(rt)

        def hook(called: str, kind: str = kind, at: int = at, slow: SlowBackend = slow) -> None:
            if called == kind and slow.calls.count(kind) == at - 1:
                in_thread(rt.stop)

        slow.hook = hook
        answer = rt.generate(DESCRIBE, SCENE, prefill_chunk=50)
        assert answer.finish_reason == "stopped"
        assert slow.calls.count(kind) == at  # the running one was the last
        assert len(answer.token_ids) == tokens + (kind == "step")
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    slow_down(rt)
    stream = rt.stream(DESCRIBE, SCENE)
    first = next(stream)
    in_thread(stream.stop)
    rest = list(stream)
    assert [piece.finish_reason for piece in rest] == ["stopped"]
    assert first.text == whole.text[: len(first.text)]
    assert rt.generate(DESCRIBE, SCENE).token_ids == whole.token_ids  # calls made after stop() are not stopped


def test_stop_reaches_calls_that_wait(rt: Runtime, slow: SlowBackend) -> None:
    """One computes, two wait: all three end, none with a wrong answer."""
    inside, go = slow.hold()
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(rt.generate, QUESTION, SCENE)]
        assert inside.wait(120)
        calls += [pool.submit(rt.generate, DESCRIBE), pool.submit(rt.choose, QUESTION, ["a", "b"])]  # type: ignore[arg-type]
        queued(rt, 3)
        rt.stop()
        assert calls[1].result(120).finish_reason == "stopped"
        with pytest.raises(UnfinishedError, match="stopped"):
            calls[2].result(120)
        go.set()
        assert calls[0].result(120).finish_reason == "stopped"


def test_waiting_counts_to_the_deadline(rt: Runtime, slow: SlowBackend) -> None:
    """A call after another one gives up at its deadline, without an answer and without computing."""
    inside, go = slow.hold()
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(rt.generate, QUESTION)
        assert inside.wait(120)
        short = pool.submit(rt.generate, QUESTION, deadline_ms=5)
        queued(rt, 2)
        slow.clock.now += 0.006  # simulated time passes, and real time wakes it: 5 ms
        answer = short.result(120)
        go.set()
        long.result(120)
    assert (answer.finish_reason, answer.text, answer.cached_tokens) == ("deadline", "", 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, "100", True])
def test_deadlines_that_are_none(rt: Runtime, value: Any) -> None:
    """Refused by name, whichever call. (0 and less are budgets that are used up, see test_numbers.py.)"""
    for ask in (rt.generate, rt.stream):
        with pytest.raises(UsageError, match="deadline_ms"):
            ask(QUESTION, deadline_ms=value)
    for ask in (lambda: rt.choose(QUESTION, ["a", "b"], deadline_ms=value), lambda: rt.yes_no("?", deadline_ms=value)):
        with pytest.raises(UsageError, match="deadline_ms"):
            ask()


def test_choices_have_no_partial_result(rt: Runtime, slow: SlowBackend) -> None:
    """A deadline in the prompt or among the options is an error that says so."""
    for milliseconds in (30, 150):
        rt.desk.idle.clear()
        with pytest.raises(UnfinishedError, match=f"deadline_ms={milliseconds}") as caught:
            rt.choose(QUESTION, ["cyan ring", "red star", "purple triangle"], SCENE, deadline_ms=milliseconds)
        assert caught.value.reason == "deadline"
    assert rt.choose(QUESTION, ["cyan ring", "red star"], SCENE, deadline_ms=1000).text == "cyan ring"


# -- turns -------------------------------------------------------------------------------------------------------------


def test_calls_are_served_in_the_order_in_which_they_came(
    rt: Runtime, slow: SlowBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five wait while one computes; each prompt is seen in turn."""
    rt.generate("warm up")
    inside, go = slow.hold()
    order: list[int] = []
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(rt.generate, QUESTION, max_new_tokens=1)
        assert inside.wait(120)

        numbers, take = threading.local(), rt.desk.turns.take

        def noted(call: Call) -> None:
            take(call)
            order.append(numbers.mine)

        def ask(number: int) -> None:
            numbers.mine = number
            rt.ask_many([QUESTION, QUESTION], max_new_tokens=2)

        monkeypatch.setattr(rt.desk.turns, "take", noted)
        later = []
        for number in range(5):
            later.append(pool.submit(ask, number))
            queued(rt, number + 2)
        go.set()
        for call in (first, *later):
            call.result(120)
    assert order == list(range(5))


def test_a_reader_that_dawdles_blocks_nobody(rt: Runtime) -> None:
    """A stream that nobody reads has no turn; one that is dropped neither."""
    stream = rt.stream(DESCRIBE, SCENE)
    first = next(stream)
    other = in_thread(rt.generate, QUESTION, SCENE)
    assert other.finish_reason == "stop"
    whole = rt.generate(DESCRIBE, SCENE)
    assert first.text + "".join(map(str, stream)) == whole.text


def test_a_session_serves_one_answer_at_a_time(rt: Runtime) -> None:
    """Two streams in one session would write over each other."""
    with rt.session() as session:
        stream = rt.stream(DESCRIBE, SCENE, session=session)
        next(stream)
        with pytest.raises(UsageError, match="another answer uses this session"):
            rt.generate(QUESTION, SCENE, session=session)
        stream.close()
        assert rt.generate(QUESTION, SCENE, session=session).finish_reason == "stop"


# -- event loops -------------------------------------------------------------------------------------------------------


def test_astream_equals_stream_and_leaves_the_loop_free(rt: Runtime, slow: SlowBackend) -> None:
    """Each step waits until the event loop has run another task: only a free loop gets there."""
    whole = rt.generate(DESCRIBE, SCENE)
    turned = threading.Event()

    def hook(kind: str) -> None:
        turned.clear()
        assert turned.wait(120)

    async def other() -> None:
        while True:
            turned.set()
            await asyncio.sleep(0)

    async def main() -> list[Any]:
        task = asyncio.create_task(other())
        slow.hook = hook
        pieces = [piece async for piece in rt.astream(DESCRIBE, SCENE)]
        task.cancel()
        return pieces

    pieces = asyncio.run(main())
    slow.hook = lambda kind: None
    assert "".join(map(str, pieces)) == whole.text
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
    assert [piece.finish_reason for piece in pieces][-1] == "stop"


def test_a_cancelled_astream_ends_its_thread(rt: Runtime, slow: SlowBackend) -> None:
    """While a step runs, the task returns when that step is done, and there is no other."""
    before = threading.active_count()
    inside, go = slow.hold("step")

    async def consume() -> None:
        async for _ in rt.astream(DESCRIBE, SCENE):
            pass

    async def main() -> None:
        task = asyncio.create_task(consume())
        while not inside.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert slow.calls.count("step") == 1
    assert rt.desk.busy == []
    for _ in range(5000):
        if threading.active_count() <= before:
            break
        threading.Event().wait(0.001)
    assert threading.active_count() <= before


def test_an_astream_that_is_left_or_fails(rt: Runtime) -> None:
    """`break` and `aclose` give the session back; bad arguments arrive as the error they are."""

    async def main() -> None:
        pieces = rt.astream(DESCRIBE, SCENE)
        async for _ in pieces:
            break
        await pieces.aclose()
        assert rt.desk.busy == []
        for bad, error in (({"prompt": ""}, UsageError), ({"prompt": "a", "images": "gone.png"}, ImageError)):
            with pytest.raises(error):
                async for _ in rt.astream(**bad):  # type: ignore[arg-type]
                    pass

    asyncio.run(main())


# -- many questions, one frame -----------------------------------------------------------------------------------------


def test_ask_many_is_one_generate_each(rt: Runtime, slow: SlowBackend) -> None:
    """Same answers; the picture is encoded once, and everything before the second question is prefilled once."""
    questions = [QUESTION, DESCRIBE, COUNT]
    alone = []
    for question in questions:
        rt.desk.idle.clear()
        alone.append(rt.generate(question, SCENE))
    slow = slow_down(rt)
    together = rt.ask_many(questions, SCENE)
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert slow.calls.count("vision") == 1
    assert together[0].cached_tokens == 0
    prompts = [rt.tokenize(question, 1) for question in questions]
    for before, prompt, found in zip(prompts, prompts[1:], together[1:], strict=False):
        assert prompt[: found.cached_tokens] == before[: found.cached_tokens]
        assert found.cached_tokens > 100
        assert prompt[found.cached_tokens] != before[found.cached_tokens]
    for bad in ([], "one", QUESTION, None, [QUESTION, ""], [QUESTION, 5]):
        with pytest.raises(UsageError):
            rt.ask_many(bad, SCENE)  # type: ignore[arg-type]


def test_ask_many_has_one_deadline(rt: Runtime, slow: SlowBackend) -> None:
    """Questions that it does not reach are answered with nothing, and say why."""
    rt.ask_many([QUESTION], SCENE)
    rt.desk.idle.clear()
    answers = rt.ask_many([QUESTION, DESCRIBE, COUNT], SCENE, deadline_ms=250)
    assert [a.finish_reason for a in answers] == ["stop", "deadline", "deadline"]
    assert (answers[2].text, answers[2].token_ids) == ("", ())


def test_the_same_frame_is_encoded_once(rt: Runtime, slow: SlowBackend) -> None:
    """Whoever asks, however it is passed; other pixels are another frame. Counts say so."""
    before = rt.vision_cache
    array = picture()
    for image in (array, array.copy(), SCENE, Image.open(SCENE), SCENE.read_bytes(), [array]):
        rt.generate(QUESTION, image, max_new_tokens=1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: rt.yes_no("Is there a star?", array), range(8)))
    assert slow.calls.count("vision") == 1
    after = rt.vision_cache
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 13)
    array[0, 0, 0] ^= 1
    rt.generate(QUESTION, array, max_new_tokens=1)
    assert slow.calls.count("vision") == 2


def test_frames_may_change_size_from_call_to_call(rt: Runtime) -> None:
    """In one session too: each answer is that of the frame alone."""
    array = picture()
    frames = [array, array[:100, :80], array[::2, ::3], np.ascontiguousarray(array[5:]), array[:1, :1]]
    alone = []
    for frame in frames:
        rt.desk.idle.clear()
        rt.desk.vision_cache.clear()
        alone.append(rt.generate(DESCRIBE, np.ascontiguousarray(frame), max_new_tokens=12).token_ids)
    with rt.session() as session:
        for _ in range(2):
            for frame, wanted in zip(frames, alone, strict=True):
                assert rt.generate(DESCRIBE, frame, max_new_tokens=12, session=session).token_ids == wanted


def test_bgr_is_rgb_turned_round(rt: Runtime) -> None:
    """Said by name; the wrong name is another picture."""
    array = picture()
    bgr = np.ascontiguousarray(array[:, :, ::-1])
    wanted = rt.generate(DESCRIBE, array)
    assert rt.generate(DESCRIBE, bgr, color="bgr").token_ids == wanted.token_ids
    assert rt.generate(DESCRIBE, array[:, :, ::-1], color="bgr").token_ids == wanted.token_ids
    assert rt.generate(DESCRIBE, bgr).token_ids != wanted.token_ids
    assert np.array_equal(rt.preprocess(bgr, "bgr"), rt.preprocess(array))  # type: ignore[arg-type]
    for color in ("BGR", "hsv", None, 1):
        for ask in (rt.generate, rt.stream, rt.yes_no):
            with pytest.raises(UsageError, match="color"):
                ask(QUESTION, array, color=color)  # type: ignore[operator]


# -- choices -----------------------------------------------------------------------------------------------------------


def log_softmax(logits: Any) -> Any:
    """The slow, plain way."""
    values = logits.astype(np.float64)
    return values - values.max() - np.log(np.exp(values - values.max()).sum())


def test_choose_equals_scoring_each_option_alone(rt: Runtime) -> None:
    """Options that contain each other included: the end of the answer tells them apart."""
    options = ["cyan ring", "cyan", "cyan ring and a red star", "red star", "ring"]
    choice = rt.choose(QUESTION, options, SCENE)
    prompt, pixels = rt.tokenize(QUESTION, 1), rt.preprocess(SCENE)
    for option, found in zip(options, choice.options, strict=True):
        ids = rt.tokenize(QUESTION, 1, option)[len(prompt) :]
        session = rt.session()
        logits, total = session.prefill(prompt, pixels), 0.0
        for token in ids:
            total += log_softmax(logits)[token]
            logits = session.step(token)
        total += np.log(np.exp(log_softmax(logits)[list(rt.model.ends)]).sum())
        assert found.text == option
        assert found.tokens == len(ids) + 1
        assert found.logprob == pytest.approx(total, abs=1e-3)
        assert found.score == pytest.approx(total / (len(ids) + 1), abs=1e-3)
    shares = np.exp([found.score for found in choice.options])
    assert [found.probability for found in choice.options] == pytest.approx(list(shares / shares.sum()))
    assert (str(choice), choice.index, choice.options[0].probability) == ("cyan ring", 0, choice.probability)
    backwards = rt.choose(QUESTION, options[::-1], SCENE)
    assert (backwards.text, backwards.index) == ("cyan ring", 4)
    assert backwards.probability == pytest.approx(choice.probability, abs=1e-5)


def test_choose_steps_through_common_beginnings_once(rt: Runtime, slow: SlowBackend) -> None:
    """One prefill, and one step for each token of the tree of options."""
    options = ["cyan ring", "cyan", "cyan star", "red star"]
    prompt = rt.tokenize(QUESTION, 1)
    answers = [rt.tokenize(QUESTION, 1, option)[len(prompt) :] for option in options]
    tree = {tuple(ids[:n]) for ids in answers for n in range(1, len(ids) + 1)}
    rt.choose(QUESTION, options, SCENE)
    assert slow.calls.count("step") == len(tree) < sum(map(len, answers))
    assert slow.calls.count("traverse") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "two or more"),
        (["one"], "two or more"),
        ("yes", "two or more"),
        (None, "two or more"),
        ({"a", "b"}, "two or more"),
        (["a", ""], "option 1 is ''"),
        (["a", "  "], "needs text"),
        (["a", 5], "option 1 is 5"),
        (["a", " b"], "white space"),
        (["a", "b", "a"], r"'a' occurs twice \(items 0 and 2\)"),
        (["a", "\ud800"], "surrogate"),
    ],
)
def test_bad_options(rt: Runtime, options: Any, message: str) -> None:
    """Refused by name, before anything is computed."""
    with pytest.raises(UsageError, match=message):
        rt.choose(QUESTION, options, SCENE)


def test_options_that_do_not_fit_the_context(rt: Runtime) -> None:
    """The numbers, and no computing."""
    with pytest.raises(ContextError, match="longest option"):
        rt.choose(QUESTION, ["a", "b " * rt.bundle.manifest.context + "b"], SCENE)


def test_yes_no_agrees_with_the_answer(rt: Runtime) -> None:
    """It is a bool with a meaningful probability; options that contradict each other sum to one."""
    for thing in ("blue square", "cyan ring", "red star"):
        question = f"Is there a {thing}?"
        found, said = rt.yes_no(question, SCENE), rt.generate(question, SCENE).text
        assert bool(found) == found.yes == (said == "yes")
        assert 0 <= found.probability <= 1
        assert found.yes == (found.probability >= 0.5)


# -- decoding options --------------------------------------------------------------------------------------------------


def test_traverse_mode_is_a_prefill_of_every_beginning(rt: Runtime, slow: SlowBackend) -> None:
    """Uncached semantics: each next token is the likeliest one after a fresh prefill of prompt and answer so far."""
    answer = rt.generate(QUESTION, SCENE, answer_mode="traverse")
    assert slow.calls.count("step") == 0
    assert slow.calls.count("traverse") == 1 + len(answer.token_ids)  # the end marker is chosen, not traversed
    ids, pixels = rt.tokenize(QUESTION, 1), rt.preprocess(SCENE)
    for token in answer.token_ids:
        assert int(rt.session().prefill(ids, pixels).argmax()) == token
        ids.append(token)
    assert int(rt.session().prefill(ids, pixels).argmax()) in rt.model.ends


def test_beam_search_is_the_token_level_one(rt: Runtime) -> None:
    """Same ids and score as trol_edge.answering.beam on a session of one's own; one beam is greedy."""
    session = rt.session()
    logits = session.prefill(rt.tokenize(DESCRIBE, 1), rt.preprocess(SCENE))
    for beams in (2, 5):
        wanted = beam.search(session, logits, num_beams=beams, max_new_tokens=40, end_ids=rt.model.ends)
        answer = rt.generate(DESCRIBE, SCENE, num_beams=beams, max_new_tokens=40)
        assert answer.token_ids == wanted.token_ids
        assert answer.score == pytest.approx(wanted.score, abs=1e-5)
        assert (answer.finish_reason, answer.text) == ("stop", rt.generate(DESCRIBE, SCENE).text)
    assert rt.generate(DESCRIBE, SCENE, num_beams=3, max_new_tokens=4).finish_reason == "length"
    assert rt.ask_many([QUESTION], SCENE, num_beams=2)[0].score is not None


def test_beam_search_has_deadlines_and_limits(rt: Runtime, slow: SlowBackend) -> None:
    """It ends with the best so far; what does not go together is said."""
    rt.generate(DESCRIBE, SCENE)
    answer = rt.generate(DESCRIBE, SCENE, num_beams=3, deadline_ms=100)
    assert answer.finish_reason == "deadline"
    assert 0 < len(answer.token_ids) < 6
    rt.desk.idle.clear()
    assert rt.generate(DESCRIBE, SCENE, num_beams=3, deadline_ms=3).token_ids == ()
    with pytest.raises(UsageError, match="cannot be streamed; use generate"):
        rt.stream(DESCRIBE, num_beams=2)
    for options in ({"temperature": 1.0}, {"logprobs": 1}, {"stop": "a"}, {"answer_mode": "traverse"}):
        with pytest.raises(UsageError, match=f"num_beams 2 .* {next(iter(options))}"):
            rt.generate(DESCRIBE, num_beams=2, **options)  # type: ignore[arg-type]


def test_logprobs_are_the_models_own(rt: Runtime) -> None:
    """Each token's, and the likeliest ones, whatever the sampling; in pieces as in answers."""
    prompt, pixels = rt.tokenize(QUESTION, 1), rt.preprocess(SCENE)
    for options in ({}, {"temperature": 9.0, "seed": 1}, {"repetition_penalty": 3.0}):
        answer = rt.generate(QUESTION, SCENE, logprobs=3, max_new_tokens=5, **options)  # type: ignore[arg-type]
        assert answer.logprobs is not None
        assert tuple(found.token_id for found in answer.logprobs) == answer.token_ids
        session = rt.session()
        logits = session.prefill(prompt, pixels)
        for found in answer.logprobs:
            right = log_softmax(logits)
            assert found.logprob == pytest.approx(right[found.token_id], abs=1e-3)
            assert [i for i, _ in found.top] == np.argsort(-right, kind="stable")[:3].tolist()
            assert [p for _, p in found.top] == pytest.approx(np.sort(right)[::-1][:3], abs=1e-3)
            logits = session.step(found.token_id)
    assert rt.generate(QUESTION, SCENE).logprobs is None
    bare = rt.generate(QUESTION, SCENE, logprobs=0).logprobs
    assert bare is not None and all(found.top == () for found in bare)
    pieces = list(rt.stream(QUESTION, SCENE, logprobs=1))
    assert [len(piece.logprobs) for piece in pieces] == [len(piece.token_ids) for piece in pieces]


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 5}, "unknown option 'max_tokens'; did you mean max_new_tokens"),
    ({"zzz": 5}, "unknown option 'zzz'; choose from max_new_tokens, "),
    ({"answer_mode": "both"}, "answer_mode 'both' should be 'step' or 'traverse'"),
    ({"num_beams": 0}, "num_beams 0"),
    ({"num_beams": 17}, "num_beams 17 .* from 1 to 16"),
    ({"num_beams": 2.0}, "num_beams 2.0"),
    ({"logprobs": -1}, "logprobs -1"),
    ({"logprobs": 21}, "logprobs 21"),
    ({"logprobs": True}, "logprobs True"),
    ({"prefill_chunk": 0}, "prefill_chunk 0"),
    ({"long_context": 1}, "long_context 1"),
    ({"session": "mine"}, "session 'mine'"),
    ({"num_beams": 0, "logprobs": -1, "color": "x"}, "num_beams 0 .*logprobs -1 .*color 'x'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_of_answers(rt: Runtime, options: dict[str, Any], message: str) -> None:
    """All bad values in one message, from each call."""
    for ask in (rt.generate, rt.stream, lambda prompt, **more: rt.ask_many([prompt], **more)):
        with pytest.raises(UsageError, match=message):
            ask(QUESTION, **options)


# -- answers of a given form -------------------------------------------------------------------------------------------


def test_answers_match_their_schema_or_pattern(rt: Runtime) -> None:
    """Whatever the question, and when sampled hot; a complete answer ends there."""
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"shape": {"enum": ["ring", "star"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["shape", "count"],
        "additionalProperties": False,
    }
    pattern = re.compile(r"(yes|no), \d{1,2} (stars?|rings?)")
    for question in (QUESTION, DESCRIBE, COUNT):
        for options in ({}, {"temperature": 20.0, "seed": 3}):
            answer = rt.generate(question, SCENE, response_format=schema, **options)  # type: ignore[arg-type]
            found = json.loads(answer.text)
            assert answer.finish_reason == "stop"
            assert set(found) == {"shape", "count"}
            assert found["shape"] in ("ring", "star") and found["count"] in range(10)
            answer = rt.generate(question, SCENE, response_format=pattern, **options)  # type: ignore[arg-type]
            assert pattern.fullmatch(answer.text)
    free = rt.generate(QUESTION, SCENE)
    formed = rt.generate(QUESTION, SCENE, response_format=re.compile("[a-z ]+"), logprobs=0)
    assert (formed.text, formed.finish_reason) == (free.text, "stop")  # a form that the free answer has changes nothing
    assert (
        rt.generate(QUESTION, SCENE, response_format=re.compile("[a-z ]+"), max_new_tokens=1).finish_reason == "length"
    )
    streamed = list(rt.stream(COUNT, SCENE, response_format=re.compile("one|two|four")))
    assert "".join(map(str, streamed)) == "four"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable"),
        ({"type": "nothing"}, "Invalid type"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"a": {1, 2}}, "not a JSON schema"),
        ({"type": "string", "pattern": "("}, "unclosed"),
        (re.compile("[^\\s\\S]"), "no text satisfies it"),
        (re.compile("a(?=b)"), "look-around"),
        (re.compile("a", re.I), "flags"),
        (re.compile(b"a"), "Pattern"),
        ("[a-z]+", "is a str"),
        (True, "is a bool"),
    ],
)
def test_forms_that_nothing_satisfies(rt: Runtime, form: Any, message: str) -> None:
    """Said at once, not after an answer that cannot end."""
    pytest.importorskip("llguidance")
    for ask in (rt.generate, rt.stream):
        with pytest.raises(UsageError, match=message) as caught:
            ask(QUESTION, response_format=form)
        assert "<state>" not in str(caught.value)


def test_forms_without_their_library(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the installation that brings it."""
    vars(rt.desk).pop("grammars", None)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BackendError, match=r"trol-edge\[formats\]"):
        rt.generate(QUESTION, response_format=re.compile("a"))
    assert rt.generate(QUESTION, SCENE).text == "cyan ring"


# -- sessions, and the end of a Runtime --------------------------------------------------------------------------------


def test_sessions_of_others_and_closed_ones(rt: Runtime, nano_bundle: Path) -> None:
    """Refused by every call, and nothing hangs or breaks."""
    with Runtime(nano_bundle) as other:
        foreign = other.session()
        for ask in (rt.generate, rt.stream, rt.yes_no):
            with pytest.raises(UsageError, match="belongs to another Runtime"):
                ask(QUESTION, session=foreign)
        stream = other.stream(DESCRIBE, SCENE)
        next(stream)
    with pytest.raises(UsageError, match="Runtime is closed"):
        foreign.prefill([5])
    assert [piece.finish_reason for piece in stream] == ["stopped"]
    for call in (other.generate, other.stream, other.yes_no):
        with pytest.raises(UsageError, match="Runtime is closed"):
            call(QUESTION)
    with pytest.raises(UsageError, match="Runtime is closed"), other:
        pass
    with pytest.raises(UsageError, match="Runtime is closed"):
        other.session()
    other.close()
    mine = rt.session()
    mine.close()
    with pytest.raises(UsageError, match="session is closed"):
        rt.generate(QUESTION, session=mine)
    assert rt.generate(QUESTION, SCENE).text == "cyan ring"


def test_close_waits_for_the_call_under_way_and_ends_those_behind(nano_bundle: Path) -> None:
    """From another thread: the answer that was computing is cut, a waiting one too, and memory is let go."""
    runtime = Runtime(nano_bundle)
    slow = slow_down(runtime)
    inside, go = slow.hold()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(runtime.generate, DESCRIBE, SCENE)
        assert inside.wait(120)
        second = pool.submit(runtime.generate, QUESTION)
        queued(runtime, 2)
        closing = pool.submit(runtime.close)
        assert second.result(120).finish_reason == "stopped"
        queued(runtime, 2)
        go.set()
        assert first.result(120).finish_reason == "stopped"
        closing.result(120)
    model = weakref.ref(slow.backend)
    del slow, first, second, closing
    gc.collect()
    assert model() is None


def test_a_runtime_that_is_dropped_frees_its_model(nano_bundle: Path) -> None:
    """Memory is freed without close, after answers, streams and sessions."""
    runtime = Runtime(nano_bundle)
    runtime.generate(QUESTION, SCENE)
    stream = runtime.stream(DESCRIBE)
    next(stream)
    session = runtime.session().fork()
    model: Any = weakref.ref(runtime.model.backend)
    del runtime, stream, session
    gc.collect()
    assert model() is None


def test_a_fork_refuses_its_parents_runtime(rt: Runtime) -> None:
    """A clear error in the child instead of a wait for threads that are not there; the parent goes on."""
    session = rt.session()
    session.prefill([5, 6])
    child = os.fork()
    if child == 0:  # no pytest in here: only the exit code goes back
        code = 1
        try:
            refused = 0
            for call in (lambda: rt.generate(QUESTION), lambda: session.step(5), rt.session, lambda: rt.yes_no("?")):
                try:
                    call()
                except UsageError as error:
                    refused += "cannot be used in its fork" in str(error)
            rt.close()  # does nothing here
            code = 0 if refused == 4 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert session.step(7).shape == (800,)
    assert rt.generate(QUESTION, SCENE).text == "cyan ring"


SPAWN = """
import multiprocessing, sys
import trol_edge

def ask(bundle):
    with trol_edge.Runtime(bundle) as rt:
        return rt.generate("What is this?", max_new_tokens=3).token_ids

if __name__ == "__main__":
    with trol_edge.Runtime(sys.argv[1]) as rt:
        here = rt.generate("What is this?", max_new_tokens=3).token_ids
        for kind in ("spawn", "fork"):
            with multiprocessing.get_context(kind).Pool(1) as pool:
                assert pool.apply_async(ask, (sys.argv[1],)).get(300) == here, kind
        try:
            multiprocessing.get_context("spawn").Pool(1).apply(ask, (rt,))
        except trol_edge.TrolEdgeError as error:
            print(error)
"""


def test_each_process_may_have_its_own(nano_bundle: Path, tmp_path: Path) -> None:
    """Spawned or forked, beside a Runtime in the parent; a Runtime itself does not travel."""
    (tmp_path / "spawn.py").write_text(SPAWN, encoding="utf-8")
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, tmp_path / "spawn.py", nano_bundle.resolve()],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be sent to another process" in done.stdout


def test_a_runtime_is_not_pickled(rt: Runtime) -> None:
    """Said in words."""
    with pytest.raises(TrolEdgeError, match="cannot be sent to another process"):
        pickle.dumps(rt)


def test_without_prefix_reuse(nano_bundle: Path, rt: Runtime) -> None:
    """Half the K/V memory: the same answers, nothing cached, and what needs both sets is refused."""
    wanted: Answer = rt.generate(QUESTION, SCENE)
    with Runtime(nano_bundle, prefix_reuse=False, vision_cache_bytes=0) as runtime:
        for _ in range(2):
            answer = runtime.generate(QUESTION, SCENE, deadline_ms=1e9)
            assert (answer.token_ids, answer.cached_tokens) == (wanted.token_ids, 0)
        assert runtime.choose(QUESTION, ["cyan ring", "red star"], SCENE).index == 0
        assert runtime.vision_cache.hits == 0
        with pytest.raises(UsageError, match="prefix_reuse=True"):
            runtime.generate(QUESTION, SCENE, answer_mode="traverse")
        with pytest.raises(UsageError, match="prefix_reuse=True"):
            runtime.generate(QUESTION, SCENE, prefill_chunk=10)
        assert runtime.generate(QUESTION, SCENE).token_ids == wanted.token_ids
