"""The real back end with a simulated clock, which only its calls move."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from trol_edge.answering.turns import Pace
from trol_edge.runtime import Runtime


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowBackend:
    """Each call takes its set time on the fake clock, and is noted in `calls`; `hook(kind)` is called first."""

    def __init__(self, backend: Any, clock: FakeClock, vision_s: float, token_s: float, step_s: float) -> None:
        self.backend, self.clock = backend, clock
        self.vision_s, self.token_s, self.step_s = vision_s, token_s, step_s
        self.calls: list[str] = []
        self.hook: Callable[[str], None] = lambda kind: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def hold(self, only: str | None = None) -> tuple[threading.Event, threading.Event]:
        """Let calls (of one kind, or all) wait from now on: (set when one is inside, to be set so that they go on)."""
        inside, go = threading.Event(), threading.Event()

        def hook(kind: str) -> None:
            if only in (None, kind):
                inside.set()
                assert go.wait(120)

        self.hook = hook
        return inside, go

    def passes(self, kind: str, seconds: float) -> None:
        """Let `seconds` pass in a call of this kind."""
        self.hook(kind)
        self.calls.append(kind)
        self.clock.now += seconds

    def encode_image(self, pixel_values: Any) -> Any:
        """See Backend."""
        self.passes("vision", self.vision_s * len(pixel_values))
        return self.backend.encode_image(pixel_values)

    def new_state(self) -> SlowState:
        """See Backend."""
        return SlowState(self, self.backend.new_state())

    def run_cut(self, *arguments: Any) -> Any:
        """See Backend."""
        return self.backend.run_cut(*arguments)


class SlowState:
    """A State that passes its time on."""

    def __init__(self, slow: SlowBackend, state: Any) -> None:
        self.slow, self.state = slow, state

    def traverse(self, embeddings: Any, *more: Any) -> Any:
        """See State."""
        self.slow.passes("traverse", self.slow.token_s * len(embeddings))
        return self.state.traverse(embeddings, *more)

    def step(self, *arguments: Any) -> Any:
        """See State."""
        self.slow.passes("step", self.slow.step_s)
        return self.state.step(*arguments)

    def step_token(self, *arguments: Any) -> Any:
        """See State."""
        self.slow.passes("step", self.slow.step_s)
        return self.state.step_token(*arguments)

    def copy_rows(self, source: SlowState, *more: Any) -> None:
        """See State."""
        self.state.copy_rows(source.state, *more)


def slow_down(runtime: Runtime, vision_s: float = 0.05, token_s: float = 0.001, step_s: float = 0.01) -> SlowBackend:
    """Make a Runtime run on simulated time, from now on and as if it had just been loaded."""
    model, desk = runtime.model, runtime.desk
    real: Any = model.backend
    clock = FakeClock()
    slow = SlowBackend(real.backend if isinstance(real, SlowBackend) else real, clock, vision_s, token_s, step_s)
    model.backend, desk.now = slow, clock  # type: ignore[assignment]
    desk.vision_pace, desk.prefill_pace = Pace(), Pace()
    desk.idle.clear()
    desk.vision_cache.clear()
    return slow
