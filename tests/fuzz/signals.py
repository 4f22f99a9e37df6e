"""Ctrl-C at any place where CPython delivers it, in calls of any kind with any options."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.conftest import NANOS
from tests.fuzz.material import QUESTION, bundle, scene
from tests.fuzz.workers import say
from tests.interrupts import Interrupter, places, text_of
from tests.test_interrupts import in_thread
from trol_edge import Runtime
from trol_edge.errors import UnfinishedError, UsageError
from trol_edge.prompt.images import load_rgb
from trol_edge.testing import ScriptedRuntime

REAL = 0.15  # share of trials on a real bundle, which are slower


class Trials:
    """Interrupts calls and asks again."""

    interrupts = True  # KeyboardInterrupt in a trial is one that came out where it should not

    def __init__(self, place: Path) -> None:
        self.frame = load_rgb(scene(NANOS[0]))
        self.real = Runtime(bundle(), threads=1)
        self.answers = {True: self.ask(self.real)}

    def ask(self, rt: Runtime) -> list[str]:
        """What the Runtime says to two questions."""
        given: dict[str, Any] = {"deadline_ms": 1e5, "max_new_tokens": 4}
        return [rt.generate(QUESTION, self.frame, **given).text, rt.generate("Is there a star?", **given).text]

    def trial(self, rng: Random) -> str:
        """One call that is interrupted once."""
        real = rng.random() < REAL
        rt = self.real if real else ScriptedRuntime("yes", vision_cache_bytes=rng.choice([0, 100, 4096]))
        wanted = self.answers[True] if real else ["yes", "yes"]
        session = rt.session() if rng.random() < 0.3 else None
        call = self.call(rt, session, rng)
        cached = rng.random() < 0.5

        def prepare() -> None:
            rt.desk.vision_cache.clear()
            if cached:
                rt.generate("?", self.frame, max_new_tokens=1)
            if session is not None:
                session.truncate(0)

        prepare()
        place, hit = rng.choice(places(call))
        prepare()
        say(f"{'real' if real else 'scripted'}, {call.__name__}, {text_of(place)}, time {hit}")
        try:
            Interrupter(place, hit).run(call)
        except KeyboardInterrupt as error:
            kept = error  # its frames live on, as in an interactive Python
        else:
            kept = None
        assert rt.desk.busy == [] and len(rt.desk.turns) == 0, "something is held"
        assert len(rt.desk.idle) <= 1
        found = in_thread(lambda: self.ask(rt))
        assert found == wanted, f"{found} instead of {wanted}"
        if session is not None:
            answer = in_thread(lambda: rt.generate(QUESTION, self.frame, session=session, max_new_tokens=4).text)
            assert answer == found[0], f"{answer} in the session"
        assert rt.vision_cache.bytes <= rt.vision_cache.capacity_bytes
        del kept
        if not real:
            self.closed(rt, rng)
        return "answered"

    def closed(self, rt: Runtime, rng: Random) -> None:
        """Close it, interrupted as well: it is open and works, or it is closed."""
        other = ScriptedRuntime("yes")
        place, hit = rng.choice(places(other.close))
        with contextlib.suppress(KeyboardInterrupt):
            Interrupter(place, hit).run(rt.close)
        with contextlib.suppress(UsageError):
            assert in_thread(lambda: rt.generate("?").text) == "yes", "it is half closed"
        in_thread(rt.close)
        assert not hasattr(rt.model, "backend"), "it does not close"

    def call(self, rt: Runtime, session: Any, rng: Random) -> Callable[[], Any]:
        """A call of any kind."""
        choices: list[dict[str, Any]] = [
            {}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2}, {"stop": ["e", "zz"]}, {"answer_mode": "traverse"},
            {"prefill_chunk": 8}, {"long_context": True}, {"repetition_penalty": 1.2, "top_k": 3, "temperature": 0.5},
        ]  # fmt: skip
        options = {**rng.choice(choices), "max_new_tokens": 3, "deadline_ms": 1e6, "session": session}
        images = rng.choice([None, self.frame, [self.frame, self.frame[::-1]]])
        plain = {"deadline_ms": 1e6, "session": session}

        def generate() -> None:
            rt.generate(QUESTION, images, **options)

        def beams() -> None:
            rt.generate(QUESTION, images, num_beams=2, max_new_tokens=2, session=session)

        def stream() -> None:
            with rt.stream(QUESTION, images, **options) as pieces:
                for _ in pieces:
                    pass

        def choose() -> None:
            rt.choose(QUESTION, ["yes", "no", "yes it is"], images, **plain)

        def yes_no() -> None:
            rt.yes_no(QUESTION, images, **plain)

        def ask_many() -> None:
            rt.ask_many([QUESTION, "b?", "c?"], images, **options)

        def late() -> None:
            with contextlib.suppress(UnfinishedError):
                rt.choose(QUESTION, ["yes", "no"], images, deadline_ms=rng.choice([0, 0.01]))

        return rng.choice([generate, generate, beams, stream, stream, choose, yes_no, ask_many, late])
