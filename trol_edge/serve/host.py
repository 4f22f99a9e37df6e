"""Holds the Runtime of a server: loads it beside the event loop, keeps conversations, and runs one call at a time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from trol_edge.answering.results import Answer, Choice, Piece, TokenLogprob, YesNo
from trol_edge.answering.streams import AnswerStream
from trol_edge.errors import RequestError
from trol_edge.runtime import Runtime
from trol_edge.serve.schema import PICTURES, ChatRequest
from trol_edge.session import Session

State = Literal["loading", "verifying", "ready", "failed", "stopping"]
STOP_AGAIN_S = 0.02  # after which a call that has not ended is stopped again
Opener = Callable[[Callable[[State], None]], Runtime]  # called with what reports the state


@dataclasses.dataclass
class Outcome:
    """What a call gave. Without `last` it was weighed (choice, yes_no), or ended before it began."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str = "stop"
    last: Piece | Answer | None = None
    choice: Choice | None = None
    yes_no: YesNo | None = None
    first_s: float | None = None  # when the first token came, by time.perf_counter
    dropped: int = 0  # turns that truncation dropped
    queue_ms: float = 0.0  # from arrival to its turn

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 where nothing says it."""
        return (self.last.prompt_tokens or 0) if self.last is not None else 0

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were kept from earlier; 0 where nothing says it."""
        return (self.last.cached_tokens or 0) if self.last is not None else 0


class Job:
    """One call on its way through the worker."""

    def __init__(
        self,
        request: ChatRequest,
        pictures: list[list[bytes]],
        deadline: float,
        deliver: Callable[[Piece], None] | None,
    ) -> None:
        """pictures: of each turn. deadline: by time.perf_counter. deliver: called with each piece, in the worker."""
        self.request, self.pictures, self.deadline, self.deliver = request, pictures, deadline, deliver

    @property
    def remaining_ms(self) -> float | None:
        """What is left of the deadline, or None without one."""
        return None if math.isinf(self.deadline) else 1e3 * (self.deadline - time.perf_counter())

    def run(self, runtime: Runtime, session: Session) -> Outcome:
        """Compute the answer. Raises what Chat.ask, choose and yes_no raise."""
        request, outcome = self.request, Outcome()
        chat = runtime.chat(truncate=request.truncate, session=session)
        *before, (asked, images) = zip(request.turns, self.pictures, strict=True)
        shape = {name: request.options[name] for name in PICTURES if name in request.options}
        for turn, pictures in before:
            chat.add(turn.prompt, turn.answer, pictures, **shape)
        prompt = asked.prompt
        if request.choose is not None:
            outcome.choice = chat.choose(prompt, request.choose, images, deadline_ms=self.remaining_ms, **shape)
            outcome.text = outcome.choice.text
        elif request.yes_no:
            outcome.yes_no = chat.yes_no(prompt, images, deadline_ms=self.remaining_ms, **shape)
            outcome.text = "Yes" if outcome.yes_no else "No"
        elif self.deliver is not None:
            with chat.stream(prompt, images, deadline_ms=self.remaining_ms, **request.options) as stream:
                self._collect(stream, self.deliver, outcome)
        else:
            start = time.perf_counter()
            answer = chat.ask(prompt, images, deadline_ms=self.remaining_ms, **request.options)
            outcome.text, outcome.last, outcome.finish_reason = answer.text, answer, answer.finish_reason
            outcome.token_ids, outcome.logprobs = list(answer.token_ids), list(answer.logprobs or ())
            if answer.token_ids:
                times = answer.timings
                before_ms = times.preprocess_ms + times.wait_ms + times.vision_ms + times.prefill_ms
                outcome.first_s = start + before_ms / 1e3
        outcome.dropped = chat.dropped
        return outcome

    def _collect(self, stream: AnswerStream, deliver: Callable[[Piece], None], outcome: Outcome) -> None:
        parts: list[str] = []
        for piece in stream:
            if outcome.first_s is None:
                outcome.first_s = time.perf_counter()
            parts.append(piece.text)
            outcome.token_ids += piece.token_ids
            outcome.logprobs += piece.logprobs
            deliver(piece)
            if piece.finish_reason is not None:
                outcome.last, outcome.finish_reason = piece, piece.finish_reason
        outcome.text = "".join(parts)


class Host:
    """The Runtime with its state, its conversations' sessions and its one worker thread."""

    def __init__(self, open_runtime: Opener, sessions: int) -> None:
        """open_runtime makes the Runtime in the worker. sessions: conversations that are kept at a time."""
        self.state: State = "loading"
        self.reason = ""
        self.runtime: Runtime | None = None
        self._open, self._most = open_runtime, sessions
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, "trol-edge serve")

    async def load(self) -> None:
        """Load the Runtime; a failure is kept as the state "failed"."""
        loop = asyncio.get_running_loop()

        def reached(state: State) -> None:
            self.state = state

        try:
            self.runtime = await loop.run_in_executor(self._worker, self._open, reached)
        except Exception as error:  # whatever it is, /health/ready says it
            self.state, self.reason = "failed", f"{type(error).__name__}: {error}"
        else:
            if self.state != "stopping":
                self.state = "ready"

    def require_ready(self) -> Runtime:
        """Return the Runtime. Raises RequestError 503 with the reason if there is none that may be used."""
        if self.state != "ready" or self.runtime is None:
            raise RequestError(
                f"the model is not ready: {self.state}{f' ({self.reason})' if self.reason else ''}",
                status=503,
                code=self.state,
                retry_after_s=5,
            )
        return self.runtime

    async def run(self, job: Job) -> Outcome:
        """Run a call in the worker. If this is cancelled, the call is stopped, and its end waited for."""
        done = asyncio.get_running_loop().run_in_executor(self._worker, self._run, job)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            while not done.done():  # the first time may be before the Runtime knows the call
                self.stop_running()
                await asyncio.wait([done], timeout=STOP_AGAIN_S)
            with contextlib.suppress(Exception):
                done.result()
            raise

    def stop_running(self) -> None:
        """End the running call within a step; its answer holds the text so far."""
        if self.runtime is not None:
            self.runtime.stop()

    async def close(self) -> None:
        """Close the Runtime, and end the worker."""
        self.stop_running()
        await asyncio.get_running_loop().run_in_executor(self._worker, self._close)
        self._worker.shutdown()

    def _close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        if self.runtime is not None:
            self.runtime.close()

    def _run(self, job: Job) -> Outcome:
        runtime = self.require_ready()
        return job.run(runtime, self._session(runtime, job.request.conversation))

    def _session(self, runtime: Runtime, conversation: str) -> Session:
        """The session of a conversation; of one that is new, an unused one or the least recently used one."""
        session = self._sessions.pop(conversation, None)
        if session is None and len(self._sessions) >= self._most:
            _, session = self._sessions.popitem(last=False)
        session = runtime.session() if session is None else session
        self._sessions[conversation] = session
        return session
