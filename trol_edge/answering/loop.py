"""Makes one answer: takes the turn, computes the prompt, then token after token until something ends it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering import beam
from trol_edge.answering.asking import Question, prefill
from trol_edge.answering.desk import Desk, Hold
from trol_edge.answering.options import Options
from trol_edge.answering.results import Answer, Clock, Piece, TokenLogprob
from trol_edge.answering.sampling import Sampler, log_sum_exp, top_logprobs
from trol_edge.answering.streams import AnswerStream
from trol_edge.answering.turns import Call
from trol_edge.errors import UnfinishedError
from trol_edge.prompt.tokenizer import TextStream
from trol_edge.session import Session

Float32 = NDArray[np.float32]


class Answering:
    """One answer. Call `stream()` or `answer()` once. It has no reference to its generator, whose drop must end it."""

    def __init__(
        self,
        desk: Desk,
        question: Question,
        options: Options,
        call: Call,
        clock: Clock,
        session: Session | None = None,
    ) -> None:
        """Prepare an answer.

        session: reserved for it by a caller who has the turn; with None the answer takes turn and session itself.
        """
        self._desk, self._question, self._options, self._call, self._clock = desk, question, options, call, clock
        self._ids = list(question.ids)  # prompt and answer so far
        self._sampler = Sampler(options.sampling)
        self._text = TextStream(desk.model.text, options.stop)
        self._constraint = None
        if options.response_format is not None:
            self._constraint = desk.grammars.start(options.response_format)
        self._rope = self._first_rope()
        self._cached = 0  # tokens of the prompt that the session had already
        self._given = session
        self._hold = Hold(desk, call, options.session, clock)
        self._keeps_turn = session is not None  # whether it keeps the turn between pieces

    def stream(self) -> AnswerStream:
        """Return the answer as a stream of pieces."""
        return AnswerStream(self._run(), self._call)

    def whole(self) -> Answer:
        """Return the whole answer, as its options say. Other calls wait meanwhile."""
        return self.search() if self._options.num_beams > 1 else self.answer()

    def answer(self) -> Answer:
        """Return the whole answer. Other calls wait meanwhile."""
        self._keeps_turn = True
        text, ids, logprobs, reason = "", list[int](), list[TokenLogprob](), ""
        with closing(self._run()) as pieces:
            for piece in pieces:
                text += piece.text
                ids += piece.token_ids
                logprobs += piece.logprobs
                reason = piece.finish_reason or reason
        return Answer(
            text=text,
            token_ids=tuple(ids),
            finish_reason=reason,
            timings=self._clock.timings,
            prompt_tokens=len(self._question.ids),
            cached_tokens=self._cached,
            rope=self._rope,
            logprobs=None if self._options.logprobs is None else tuple(logprobs),
        )

    def search(self) -> Answer:
        """Return the likeliest of `num_beams` answers that are searched in parallel. Other calls wait meanwhile."""
        desk, options, call, clock = self._desk, self._options, self._call, self._clock
        found, over = beam.Hypothesis((), 0.0, False), list[str]()

        def on_step() -> bool:
            try:
                call.check()
            except UnfinishedError as error:
                over.append(error.reason)
            return bool(over)

        try:
            try:
                session = self._begin()
                logits = self._prefill(session)
                since = desk.now()
                found = beam.search(
                    session,
                    logits,
                    num_beams=options.num_beams,
                    max_new_tokens=options.max_new_tokens,
                    end_ids=desk.model.ends,
                    on_step=on_step,
                )
                clock.decode_ms += 1e3 * (desk.now() - since)
            except UnfinishedError as error:
                over.append(error.reason)
            finally:
                self._end()
        finally:
            self._end()  # Ctrl-C may have interrupted the first
        ids = found.token_ids
        reason = "stop" if found.ended else over[0] if over else "length"
        if reason == "length" and len(ids) < options.max_new_tokens:
            reason = "context"
        text = "".join([self._text.push(token) for token in ids]) + self._text.flush()
        return Answer(
            text=text,
            token_ids=ids,
            finish_reason=reason,
            timings=clock.timings,
            prompt_tokens=len(self._question.ids),
            cached_tokens=self._cached,
            rope=self._rope,
            logprobs=None,
            score=found.score,
        )

    def _first_rope(self) -> str:
        """The rope factors before there is a session."""
        if self._desk.model.bundle.manifest.spec.long_rope is None:
            return "plain"
        return "long" if self._options.long_context else "short"

    def _run(self) -> Generator[Piece, None, None]:
        options, call, clock, now = self._options, self._call, self._clock, self._desk.now
        try:
            try:
                session = self._begin()
                given: Float32 | int = self._prefill(session)
                since = now()
                while True:
                    token, piece = self._choose(session, given)
                    if piece.finish_reason is not None:
                        break
                    clock.decode_ms += 1e3 * (now() - since)
                    if self._keeps_turn:
                        yield piece
                    else:
                        self._hold.give_turn()
                        yield piece
                        self._hold.take_turn()
                    since = now()
                    call.check()
                    if options.answer_mode == "traverse":
                        given = session.extend([token])
                        self._rope = session.rope  # extend may have changed to the long factors
                    elif self._needs_logits:
                        given = session.step_view(token)
                    else:
                        given = session.step_token(token)
                clock.decode_ms += 1e3 * (now() - since)
            except UnfinishedError as over:
                piece = Piece("", (), (), over.reason)
            finally:
                self._end()
        finally:
            self._end()  # Ctrl-C may have interrupted the first
        yield Piece(
            text=piece.text + self._text.flush(),
            token_ids=piece.token_ids,
            logprobs=piece.logprobs,
            finish_reason=piece.finish_reason,
            timings=clock.timings,
            rope=self._rope,
            cached_tokens=self._cached,
            prompt_tokens=len(self._question.ids),
        )

    def _prefill(self, session: Session) -> Float32:
        logits = prefill(self._desk, session, self._question, self._options, self._call, self._clock)
        self._rope, self._cached = session.rope, session.reused
        return logits

    @property
    def _needs_logits(self) -> bool:
        """Whether logits are asked for, or the next token depends on more than which of them is the largest."""
        options = self._options
        return (
            options.temperature != 0
            or options.repetition_penalty != 1
            or options.logprobs is not None
            or self._constraint is not None
        )

    def _choose(self, session: Session, given: Float32 | int) -> tuple[int, Piece]:
        """Choose the next token from these logits, or take the given one; returns it with the piece that it makes.

        The last piece has a finish_reason.
        """
        if isinstance(given, int):
            token = given
        else:
            allowed = given if self._constraint is None else self._constraint.mask(given)
            token = self._sampler.sample(allowed, self._ids)
        if token in self._desk.model.ends:
            return token, Piece("", (), (), "stop")
        self._ids.append(token)
        text = self._text.push(token)
        reason = None
        if (self._constraint is not None and self._constraint.accept(token)) or self._text.stopped is not None:
            reason = "stop"
        elif len(self._ids) - len(self._question.ids) == self._options.max_new_tokens:
            reason = "length"
        elif session.length == self._room(session):
            reason = "context"
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._options.logprobs is not None:
            assert not isinstance(given, int)
            normaliser = log_sum_exp(given)
            top = top_logprobs(given, self._options.logprobs, normaliser)
            logprobs = (TokenLogprob(token, float(given[token]) - normaliser, top),)
        return token, Piece(text, (token,), logprobs, reason)

    def _room(self, session: Session) -> int:
        """The number of cached tokens at which the answer has to end."""
        return session.limit if self._options.answer_mode == "step" else session.context - session.dropped

    def _begin(self) -> Session:
        return self._hold.take() if self._given is None else self._given

    def _end(self) -> None:
        if self._given is None:
            self._hold.end()
