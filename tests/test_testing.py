"""The scripted Runtime: what a robot's own tests get, without a bundle."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import trol_edge
from trol_edge.errors import BackendError, ContextError, UsageError
from trol_edge.testing import ScriptedRuntime

FRAME = np.zeros((48, 64, 3), np.uint8)
SCRIPT = {"Is the door open?": "Yes, it is.", "How many boxes?": "3", "Wo?": "hinter der Tür 🚪"}


def test_answers_by_question() -> None:
    """With a picture and without, whole and in pieces; text of any alphabet."""
    with ScriptedRuntime(SCRIPT) as rt:
        assert isinstance(rt, trol_edge.Runtime)
        for question, wanted in SCRIPT.items():
            for images in (None, FRAME, [FRAME, FRAME]):
                answer = rt.generate(question, images)
                assert (answer.text, answer.finish_reason) == (wanted, "stop")
                assert "".join(map(str, rt.stream(question, images))) == wanted
        assert rt.generate("How many boxes?", FRAME, num_beams=3).text == "3"
        assert rt.generate([trol_edge.IMAGE, "How many", " boxes?"], FRAME).text == "3"
        assert [str(a) for a in rt.ask_many(list(SCRIPT), FRAME)] == list(SCRIPT.values())
        assert rt.vision_cache.hits and rt.vision_cache.entries == 1


def test_one_answer_and_functions() -> None:
    """The other two kinds of script."""
    assert ScriptedRuntime("nothing").generate("Anything?").text == "nothing"
    assert ScriptedRuntime(lambda question: question.upper()).generate("what?").text == "WHAT?"


def test_choices_follow_the_script() -> None:
    """The scripted answer is the likeliest option, and yes_no reads its first word."""
    rt = ScriptedRuntime(SCRIPT)
    assert rt.choose("How many boxes?", ["2", "3", "30"], FRAME).text == "3"
    assert rt.yes_no("Is the door open?", FRAME)
    assert not ScriptedRuntime("No.").yes_no("Is the door open?")


def test_options_hold() -> None:
    """Lengths, stop strings, formats and sessions are the Runtime's own."""
    rt = ScriptedRuntime("12 boxes", context=64)
    assert rt.generate("?", max_new_tokens=2).text == "12"
    assert rt.generate("?", stop=" ").text == "12"
    first, second = rt.generate("Next?"), rt.generate("Next?")
    assert (first.cached_tokens, second.cached_tokens) == (2, second.prompt_tokens - 1)  # 2: <s><question>
    with rt.session() as session, session.fork() as fork:
        ids = rt.tokenize("?")
        logits = session.prefill(ids)
        assert rt.model.text.decode([int(logits.argmax())]) == "1"
        fork.become(session)
        assert rt.model.text.decode([int(fork.step(int(logits.argmax())).argmax())]) == "2"
    with pytest.raises(ContextError):
        rt.generate("long " * 20)


def test_a_format_is_kept() -> None:
    """The grammar decides among what the script leaves open."""
    pytest.importorskip("llguidance")
    import re

    assert ScriptedRuntime("no").generate("?", response_format=re.compile("yes|no")).text == "no"


def test_deadlines_and_stops() -> None:
    """Times are those that the script was given."""
    rt = ScriptedRuntime("x" * 50, step_s=0.01)
    late = rt.generate("?", deadline_ms=60)
    assert late.finish_reason == "deadline" and 0 < len(late.text) < 10
    timer = threading.Timer(0.05, rt.stop)
    timer.start()
    start = time.monotonic()
    assert rt.generate("?").finish_reason == "stopped" and time.monotonic() - start < 0.4
    slow = ScriptedRuntime("x", picture_s=0.2)
    assert slow.generate("?", FRAME).timings.vision_ms >= 200 > slow.generate("?", FRAME).timings.vision_ms


def test_in_an_event_loop() -> None:
    """astream, too."""

    async def ask() -> str:
        return "".join([piece.text async for piece in ScriptedRuntime(SCRIPT).astream("How many boxes?", FRAME)])

    assert asyncio.run(ask()) == "3"


def test_what_is_not_in_the_script_is_an_error() -> None:
    """Which says what is; and the Runtime answers again afterwards."""
    rt = ScriptedRuntime(SCRIPT)
    with pytest.raises(UsageError, match=r"no answer to 'Why\?', only to 'Is the door open\?', "):
        rt.generate("Why?")
    assert rt.generate("How many boxes?").text == "3"


def test_failures_can_be_scripted() -> None:
    """Like a failing inference library: the call raises, and later ones are answered."""
    failing = [True]

    def failure(question: str) -> None:
        if failing and failing.pop():
            raise BackendError(f"out of memory at {question}")

    rt = ScriptedRuntime(SCRIPT, failure=failure)
    with pytest.raises(BackendError, match=r"out of memory at How many boxes\?"):
        rt.generate("How many boxes?", FRAME)
    assert rt.generate("How many boxes?", FRAME).text == "3"


def test_no_inference_library_is_loaded() -> None:
    """It works where only the thin runtime is installed."""
    code = """
import sys
from trol_edge.testing import ScriptedRuntime
assert ScriptedRuntime("yes").generate("?").text == "yes"
assert not {"onnxruntime", "torch", "onnx", "trol_edge.runtimes"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
