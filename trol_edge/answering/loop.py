"""One answer under way: the turn, the prompt, then token after token until something ends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering import beam
from trol_edge.answering.options import Options
from trol_edge.answering.results import Answer, Piece, Timings, TokenLogprob
from trol_edge.answering.sampling import Sampler, log_sum_exp, top_logprobs
from trol_edge.answering.turns import Call
from trol_edge.errors import UnfinishedError
from trol_edge.prompt.tokenizer import TextStream
from trol_edge.session import Session

if TYPE_CHECKING:
    from trol_edge.runtime import Question, Runtime

Float32 = NDArray[np.float32]


@dataclasses.dataclass
class Clock:
    """Milliseconds by stage, as they add up while an answer is made (see answers.Timings)."""

    preprocess_ms: float = 0.0
    wait_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    @property
    def timings(self) -> Timings:
        """So far."""
        return Timings(**dataclasses.asdict(self))


class AnswerStream(Iterator[Piece]):
    """Pieces of one answer; what `Runtime.stream` returns. Iterate over it, once.

    `stop()`, from any thread, ends it within one step: the last piece then says "stopped". `close()`, leaving a `with`
    block, or dropping it gives its KV cache back at once. While nobody asks for the next piece, other calls run.
    """

    def __init__(self, pieces: Generator[Piece, None, None], call: Call) -> None:
        self._pieces, self._call = pieces, call

    def __next__(self) -> Piece:
        return next(self._pieces)

    def stop(self) -> None:
        """End the answer within one step, from any thread."""
        self._call.stop()

    def close(self) -> None:
        """End the answer without a last piece; in the thread that iterates, or after it has ended."""
        self._pieces.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Answering:
    """One answer: `stream()` or `answer()`, once. It does not know its generator, so that dropping that ends it."""

    def __init__(
        self,
        runtime: Runtime,
        question: Question,
        options: Options,
        call: Call,
        clock: Clock,
        session: Session | None = None,
    ) -> None:
        """session: reserved for this answer by a caller who has the turn; None: the answer sees to both."""
        self._runtime, self._question, self._options, self._call, self._clock = runtime, question, options, call, clock
        self._ids = list(question.ids)  # prompt and answer so far
        self._sampler = Sampler(options.sampling)
        self._text = TextStream(runtime._text(), options.stop)
        self._constraint = None
        if options.response_format is not None:
            self._constraint = runtime._grammars.start(options.response_format)
        self._given = session
        self._session: Session | None = None
        self._has_turn = False
        self._keeps_turn = session is not None  # between pieces

    def stream(self) -> AnswerStream:
        """Piece by piece."""
        return AnswerStream(self._run(), self._call)

    def answer(self) -> Answer:
        """All of it. Other calls wait meanwhile."""
        self._keeps_turn = True
        piece = Piece("", ())
        text, ids, logprobs = "", list[int](), list[TokenLogprob]()
        with closing(self._run()) as pieces:
            for piece in pieces:
                text += piece.text
                ids += piece.token_ids
                logprobs += piece.logprobs
        assert piece.finish_reason is not None and piece.timings is not None
        assert piece.rope is not None and piece.cached_tokens is not None
        return Answer(
            text,
            tuple(ids),
            piece.finish_reason,
            piece.timings,
            len(self._question.ids),
            piece.cached_tokens,
            piece.rope,
            None if self._options.logprobs is None else tuple(logprobs),
        )

    def search(self) -> Answer:
        """The likeliest of `num_beams` answers that are searched in parallel. Other calls wait meanwhile."""
        runtime, options, call, clock, now = self._runtime, self._options, self._call, self._clock, self._runtime._clock
        found, cached, rope, over = beam.Hypothesis((), 0.0, False), 0, self._rope, list[str]()

        def on_step() -> bool:
            try:
                call.check()
            except UnfinishedError as error:
                over.append(error.reason)
            return bool(over)

        try:
            session = self._begin()
            logits = runtime._prefill(session, self._question, options, call, clock)
            rope, cached, since = session.rope, session.reused, now()
            found = beam.search(
                session,
                logits,
                num_beams=options.num_beams,
                max_new_tokens=options.max_new_tokens,
                end_ids=runtime._ends,
                on_step=on_step,
            )
            clock.decode_ms += 1e3 * (now() - since)
        except UnfinishedError as error:
            over.append(error.reason)
        finally:
            self._end()
        ids = found.token_ids
        reason = "stop" if found.ended else over[0] if over else "length"
        if reason == "length" and len(ids) < options.max_new_tokens:
            reason = "context"
        text = "".join([self._text.push(token) for token in ids]) + self._text.flush()
        prompt = len(self._question.ids)
        return Answer(text, ids, reason, clock.timings, prompt, cached, rope, None, found.score)

    @property
    def _rope(self) -> str:
        """The rope factors before there is a session."""
        if self._runtime.bundle.manifest.spec.long_rope is None:
            return "plain"
        return "long" if self._options.long_context else "short"

    def _run(self) -> Generator[Piece, None, None]:
        runtime, options, call, clock, now = self._runtime, self._options, self._call, self._clock, self._runtime._clock
        cached, rope = 0, self._rope
        try:
            try:
                session = self._begin()
                given: Float32 | int = runtime._prefill(session, self._question, options, call, clock)
                rope, cached = session.rope, session.reused
                since = now()
                while True:
                    token, piece = self._choose(session, given)
                    if piece.finish_reason is not None:
                        break
                    clock.decode_ms += 1e3 * (now() - since)
                    if self._keeps_turn:
                        yield piece
                    else:
                        self._give_turn()
                        yield piece
                        self._take_turn()
                    since = now()
                    call.check()
                    if options.answer_mode == "traverse":
                        given = session.extend([token])
                        rope = session.rope  # extend may have gone over to the long factors
                    elif self._needs_logits:
                        given = session.step_view(token)
                    else:
                        given = session.step_token(token)
                clock.decode_ms += 1e3 * (now() - since)
            except UnfinishedError as over:
                piece = Piece("", (), (), over.reason)
        finally:
            self._end()
        text = piece.text + self._text.flush()
        yield dataclasses.replace(piece, text=text, timings=clock.timings, rope=rope, cached_tokens=cached)

    @property
    def _needs_logits(self) -> bool:
        """Whether the next token depends on more than which logit is the largest, or logits are asked for."""
        options = self._options
        return (
            options.temperature != 0
            or options.repetition_penalty != 1
            or options.logprobs is not None
            or self._constraint is not None
        )

    def _choose(self, session: Session, given: Float32 | int) -> tuple[int, Piece]:
        """The next token of these logits, or the one given, and the piece that it makes.

        The piece has a finish_reason where it is the last.
        """
        if isinstance(given, int):
            token = given
        else:
            allowed = given if self._constraint is None else self._constraint.mask(given)
            token = self._sampler.sample(allowed, self._ids)
        if token in self._runtime._ends:
            return token, Piece("", (), (), "stop")
        self._ids.append(token)
        text = self._text.push(token)
        reason = None
        if (self._constraint is not None and self._constraint.accept(token)) or self._text.stopped is not None:
            reason = "stop"
        elif len(self._ids) - len(self._question.ids) == self._options.max_new_tokens:
            reason = "length"
        elif session.length == (session.limit if self._options.answer_mode == "step" else session.context):
            reason = "context"
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._options.logprobs is not None:
            assert not isinstance(given, int)
            normaliser = log_sum_exp(given)
            top = top_logprobs(given, self._options.logprobs, normaliser)
            logprobs = (TokenLogprob(token, float(given[token]) - normaliser, top),)
        return token, Piece(text, (token,), logprobs, reason)

    def _begin(self) -> Session:
        if self._given is not None:
            return self._given
        self._take_turn()
        self._session = self._runtime._reserve(self._options.session)
        return self._session

    def _take_turn(self) -> None:
        start = self._runtime._clock()
        try:
            self._runtime._turns.take(self._call)
            self._has_turn = True
        finally:
            self._clock.wait_ms += 1e3 * (self._runtime._clock() - start)

    def _give_turn(self) -> None:
        self._has_turn = False
        self._runtime._turns.give(self._call)

    def _end(self) -> None:
        """Give back what the answer holds. Takes no lock between pieces: a garbage collection may call it anywhere."""
        if self._session is not None:
            self._runtime._release(self._session, keep=self._options.session is None)
            self._session = None
        if self._has_turn:
            self._give_turn()
