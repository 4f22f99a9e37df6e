"""Defines Chat, a conversation of several turns with pictures anywhere in it."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import TYPE_CHECKING, Any

from trol_edge.answering.asking import UNREAD, Color, Pictures, Seen, Turn, ask, check_length, look, texts
from trol_edge.answering.choose import Poll, checked_options, choose, yes_no
from trol_edge.answering.desk import Desk
from trol_edge.answering.loop import Answering
from trol_edge.answering.options import AnswerOptions, Options, options_from_keywords
from trol_edge.answering.results import Answer, Choice, Clock, Piece, YesNo
from trol_edge.answering.streams import AnswerStream, pieces
from trol_edge.answering.turns import Call
from trol_edge.errors import UnfinishedError, UsageError
from trol_edge.numeric import shown, switch, whole
from trol_edge.prompt.template import Prompt
from trol_edge.session import Session

if TYPE_CHECKING:
    from typing_extensions import Unpack

ANSWER_ROOM = 256  # tokens of the context that stay free for an answer, but at most a quarter of it
KEPT_SHARE = 0.75  # share of the room that is filled after turns were dropped, so that not every later turn drops one


class Chat:
    """A conversation, which `Runtime.chat` begins. Use it in one thread at a time.

    The prompt of each turn is the whole conversation so far in the model's template, and its answer is that of a fresh
    prefill of all of it. What the session still holds of it is not computed again: only the last answer, which was
    stepped, and the new question are traversed.

    A turn is remembered once its answer has ended, or was left early, with the text so far. A call that made no text
    and was ended by a deadline, by `stop` or by an error leaves no turn.
    """

    def __init__(self, desk: Desk, *, pinned: int = 0, truncate: bool = True, session: Session | None = None) -> None:
        """Begin a conversation; for arguments see trol_edge.Runtime.chat. Raises UsageError."""
        found, is_truncating = whole(pinned, 0), switch("truncate", truncate)
        if found is None:
            raise UsageError(f"pinned should be a number of turns, 0 or more, found {shown(pinned)}")
        self._desk, self._pinned, self._truncate = desk, found, is_truncating
        self._turns: list[Turn] = []
        self._dropped = 0
        self._session = desk.model.session() if session is None else session

    @property
    def turns(self) -> list[tuple[Prompt, str]]:
        """The questions and answers that the next prompt begins with."""
        return [(turn.prompt, turn.answer) for turn in self._turns]

    @property
    def dropped(self) -> int:
        """The number of turns that were dropped because the context was full."""
        return self._dropped

    @property
    def session(self) -> Session:
        """The session that holds the keys and values of the conversation."""
        return self._session

    def ask(self, prompt: Prompt, images: Pictures | None = None, **options: Unpack[AnswerOptions]) -> Answer:
        """Ask the next question; arguments, options and errors are those of `Runtime.generate`, without `session`."""
        checked = self._options(options)
        answering, turn = self._start(self._desk.call(checked), prompt, images, checked)
        answer = answering.whole()
        self._remember(turn, answer.text, answer.finish_reason)
        return answer

    def stream(self, prompt: Prompt, images: Pictures | None = None, **options: Unpack[AnswerOptions]) -> AnswerStream:
        """Like ask, but piece by piece (see `Runtime.stream`)."""
        checked = self._options(options)
        if checked.num_beams > 1:
            raise UsageError(f"num_beams {checked.num_beams}: a beam search cannot be streamed; use ask")
        call = self._desk.call(checked)
        answering, turn = self._start(call, prompt, images, checked)
        return AnswerStream(self._heard(answering.stream(), turn), call)

    def astream(
        self, prompt: Prompt, images: Pictures | None = None, **options: Unpack[AnswerOptions]
    ) -> AsyncGenerator[Piece, None]:
        """Like stream, but for `async for` (see `Runtime.astream`)."""
        return pieces(functools.partial(self.stream, prompt, images, **options))

    def choose(
        self,
        prompt: Prompt,
        options: Sequence[str],
        images: Pictures | None = None,
        *,
        color: Color = "rgb",
        bits: int | None = None,
        image_tokens: float = 1.0,
        max_tiles: int | None = None,
        deadline_ms: float | None = None,
    ) -> Choice:
        """Find which of some answers is likeliest (see `Runtime.choose`). It becomes the answer of this turn."""
        allowed = checked_options(options)
        shape = {"image_tokens": image_tokens, "max_tiles": max_tiles}
        checked = self._options({"color": color, "bits": bits, "deadline_ms": deadline_ms, **shape})
        poll = self._poll(prompt, images, checked)
        choice = choose(self._desk, poll, allowed, checked)
        self._turns.append(Turn(prompt, poll.pictures, choice.text))
        return choice

    def yes_no(
        self,
        prompt: Prompt,
        images: Pictures | None = None,
        *,
        color: Color = "rgb",
        bits: int | None = None,
        image_tokens: float = 1.0,
        max_tiles: int | None = None,
        deadline_ms: float | None = None,
    ) -> YesNo:
        """Find whether the answer begins with yes (see `Runtime.yes_no`). "Yes" or "No" is this turn's answer."""
        shape = {"image_tokens": image_tokens, "max_tiles": max_tiles}
        checked = self._options({"color": color, "bits": bits, "deadline_ms": deadline_ms, **shape})
        poll = self._poll(prompt, images, checked)
        found = yes_no(self._desk, poll, checked)
        self._turns.append(Turn(prompt, poll.pictures, "Yes" if found else "No"))
        return found

    def add(
        self,
        prompt: Prompt,
        answer: str,
        images: Pictures | None = None,
        *,
        color: Color = "rgb",
        bits: int | None = None,
        image_tokens: float = 1.0,
        max_tiles: int | None = None,
    ) -> None:
        """Add a turn whose answer is known already, as an example or from an earlier conversation. Nothing is computed.

        Raises UsageError and ImageError as ask does, and ContextError if the turn alone does not fit.
        """
        if not isinstance(answer, str):
            raise UsageError(f"the answer should be a text, found {shown(answer)}")
        shape = {"image_tokens": image_tokens, "max_tiles": max_tiles}
        options = self._options({"color": color, "bits": bits, **shape})
        call = self._desk.call(options)
        turn = Turn(prompt, look(self._desk, images, options, call), str(answer))
        self._make_room(turn, call)
        self._turns.append(turn)

    def fork(self) -> Chat:
        """Make a conversation that continues from here on its own; the cache is shared until one of the two writes."""
        twin = Chat(self._desk, pinned=self._pinned, truncate=self._truncate, session=self._session.fork())
        twin._turns, twin._dropped = list(self._turns), self._dropped
        return twin

    def close(self) -> None:
        """Free the session. Closing twice is fine."""
        self._session.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _options(self, given: Any) -> Options:
        if given.get("session") is not None:
            raise UsageError("a conversation has its own session; pass session= to Runtime.chat instead")
        return options_from_keywords({**given, "session": self._session})

    def _start(self, call: Call, prompt: Prompt, images: Pictures | None, options: Options) -> tuple[Answering, Turn]:
        desk = self._desk
        start = desk.now()
        pictures: list[Seen] = []
        try:
            pictures = look(desk, images, options, call)
            ids = self._make_room(Turn(prompt, pictures, ""), call)
            question = ask(desk, prompt, pictures, call, self._turns, ids)
        except UnfinishedError:  # the answer says so: its turn does not come
            question = UNREAD
        clock = Clock(1e3 * (desk.now() - start))
        return Answering(desk, question, options, call, clock), Turn(prompt, pictures, "")

    def _poll(self, prompt: Prompt, images: Pictures | None, options: Options) -> Poll:
        desk = self._desk
        call, start = desk.call(options), desk.now()
        pictures = look(desk, images, options, call)
        ids = self._make_room(Turn(prompt, pictures, ""), call)
        return Poll(prompt, pictures, list(self._turns), call, start, ids)

    def _heard(self, stream: AnswerStream, turn: Turn) -> Generator[Piece, None, None]:
        """Pass the pieces on, and remember the turn when they end or nobody asks for more."""
        text, reason = "", "left"
        try:
            with stream:
                for piece in stream:
                    text, reason = text + piece.text, piece.finish_reason or reason
                    yield piece
        except Exception:
            reason = "failed"
            raise
        finally:
            self._remember(turn, text, reason)

    def _remember(self, turn: Turn, text: str, reason: str) -> None:
        if text or reason not in ("deadline", "stopped", "left", "failed"):
            self._turns.append(Turn(turn.prompt, turn.pictures, text))

    def _make_room(self, new: Turn, call: Call) -> list[int] | None:
        """Drop the oldest turns that are not pinned if the conversation would not fit with `new`.

        Returns its tokens, or None where nothing may be dropped and so none were counted.
        """
        if not self._truncate:
            return None
        context = self._desk.model.bundle.manifest.context
        room = context - min(ANSWER_ROOM, context // 4)
        for text in texts(new):
            check_length(self._desk, text, "the prompt")
        ids = self._ids(new, call)
        if len(ids) > room:
            while len(self._turns) > self._pinned and len(ids) > KEPT_SHARE * room:
                del self._turns[self._pinned]
                self._dropped += 1
                ids = self._ids(new, call)
        return ids

    def _ids(self, new: Turn, call: Call) -> list[int]:
        """The tokens of the conversation with `new`."""
        call.check()
        before, last = [turn.spoken for turn in self._turns], new.spoken
        return self._desk.model.tokenize(last.prompt, last.tiles, last.answer, before)
