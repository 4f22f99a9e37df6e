"""The results that the Runtime returns: answers, their pieces, choices, and where the time went.

An answer is a text with further fields, and is used as a text: compared, searched, joined, written as JSON. So Answer,
Piece, Option and Choice are strings with fields. Two of them are equal if their texts are, whatever their fields.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Timings:
    """Where the time of one answer went, in milliseconds of wall time."""

    preprocess_ms: float  # pictures read, resized and normalised; prompt tokenized
    wait_ms: float  # waiting for the turn, after other calls
    vision_ms: float  # vision tower and projector; close to 0 if the picture was in the vision cache
    prefill_ms: float  # traverse of the prompt, to the first logits
    decode_ms: float  # all steps after that, with sampling and detokenizing


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer, with natural logarithms of probabilities.

    The distribution is the model's own, before temperature, filters, penalty and response_format.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob) of the likeliest tokens, likeliest first


class _Text(str):
    """A string with fields; the first of them, `text`, is the string."""

    def __new__(cls, text: str, *fields: Any, **named: Any) -> _Text:
        return super().__new__(cls, text)


@dataclasses.dataclass(frozen=True, eq=False)
class Piece(_Text):
    """An item of a stream: text that is complete (perhaps empty), and on the last piece why the answer ended."""

    text: str
    token_ids: tuple[int, ...]  # ids that arrived with this piece
    logprobs: tuple[TokenLogprob, ...] = ()  # of these ids, if asked for
    finish_reason: str | None = None  # on the last piece, see Answer
    timings: Timings | None = None  # on the last piece
    rope: str | None = None  # on the last piece, see Answer
    cached_tokens: int | None = None  # on the last piece, see Answer
    prompt_tokens: int | None = None  # on the last piece, see Answer


@dataclasses.dataclass(frozen=True, eq=False)
class Answer(_Text):
    """A whole answer, as its text with further fields.

    finish_reason is one of these:
    "stop": the model ended it, a stop string came, or its response_format is complete;
    "length": max_new_tokens was reached;
    "context": prompt and answer fill the bundle's context, or reach the length at which the model's rotary embedding
    would have to change its factors (long_context=True continues there);
    "deadline", or "stopped" (Runtime.stop): the text is what had been made by then, perhaps none.
    rope: the factors of the rotary embedding in use, "short" or "long"; "plain" for models that have one set.
    """

    text: str
    token_ids: tuple[int, ...]  # without the end marker
    finish_reason: str
    timings: Timings
    prompt_tokens: int  # of the whole prompt, those that image_tokens left out included
    cached_tokens: int  # tokens of the prompt that were not computed again, because an earlier question had them
    rope: str
    logprobs: tuple[TokenLogprob, ...] | None  # one per token id if asked for, else None
    score: float | None = None  # after a beam search: sum of log-probabilities / length ** length_penalty


@dataclasses.dataclass(frozen=True, eq=False)
class Option(_Text):
    """One of the answers among which was chosen."""

    text: str
    probability: float  # share among the options, by score; they sum to 1
    score: float  # length-normalised: logprob / tokens
    logprob: float  # natural logarithm of the probability that the model gives exactly this answer
    tokens: int  # number of scored tokens, the end of the answer included


@dataclasses.dataclass(frozen=True, eq=False)
class Choice(_Text):
    """The likeliest option, as its text with further fields."""

    text: str
    index: int = dataclasses.field()  # type: ignore[assignment]  # in the options as given; field(): not str.index
    probability: float
    options: tuple[Option, ...]  # in the order in which they were given
    timings: Timings


@dataclasses.dataclass(frozen=True, eq=False)
class YesNo:
    """A yes or no. `bool(answer)` is the answer. It equals that bool, and another YesNo with the same answer."""

    yes: bool
    probability: float  # P(yes) / (P(yes) + P(no)) for the first word
    timings: Timings

    def __bool__(self) -> bool:
        return self.yes

    def __eq__(self, other: object) -> bool:
        return self.yes == bool(other) if isinstance(other, (bool, YesNo)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.yes)


@dataclasses.dataclass
class Clock:
    """Sums of milliseconds by stage while an answer is made (see Timings)."""

    preprocess_ms: float = 0.0
    wait_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    @property
    def timings(self) -> Timings:
        """The timings so far."""
        return Timings(**vars(self))
