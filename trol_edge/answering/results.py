"""What the Runtime returns: answers, their pieces, choices, and where the time went. Plain data."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Timings:
    """Where the time of one answer went, in milliseconds of wall time."""

    preprocess_ms: float  # pictures read, resized and normalised; prompt tokenized
    wait_ms: float  # for the turn, behind other calls
    vision_ms: float  # vision tower and projector; next to nothing where the picture was in the vision cache
    prefill_ms: float  # traverse of the prompt, to the first logits
    decode_ms: float  # all steps after that, with sampling and detokenizing


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer, with the natural logarithms of probabilities.

    The distribution is the model's own, before temperature, filters, penalty and response_format.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob) of the likeliest tokens, likeliest first


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a stream yields: text that is complete (perhaps empty), and on the last piece why the answer ended."""

    text: str
    token_ids: tuple[int, ...]  # ids that arrived with this piece
    logprobs: tuple[TokenLogprob, ...] = ()  # of these ids, where asked for
    finish_reason: str | None = None  # on the last piece, see Answer
    timings: Timings | None = None  # on the last piece
    rope: str | None = None  # on the last piece, see Answer
    cached_tokens: int | None = None  # on the last piece, see Answer

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole answer. `str(answer)` is its text.

    finish_reason: "stop" (the model ended it, a stop string came, or its response_format is complete), "length"
    (max_new_tokens reached), "context" (prompt and answer fill the bundle's context, or reach the length where the
    model's rotary embedding would have to change its factors: long_context=True goes on there), "deadline" or
    "stopped" (Runtime.stop): then the text is what there was by then, perhaps none.
    rope: factors of the rotary embedding that the answer was made with, "short" or "long"; "plain" for models that
    have one set.
    """

    text: str
    token_ids: tuple[int, ...]  # without the end marker
    finish_reason: str
    timings: Timings
    prompt_tokens: int
    cached_tokens: int  # of the prompt: already computed for an earlier question, and exactly the same
    rope: str
    logprobs: tuple[TokenLogprob, ...] | None  # one per token id where asked for, else None
    score: float | None = None  # of a beam search: sum of log-probabilities / length ** length_penalty

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Option:
    """One of the answers that a choice was between."""

    text: str
    probability: float  # among the options, by score; they sum to 1
    score: float  # logprob / tokens: length-normalised
    logprob: float  # natural logarithm of the probability that the model gives exactly this answer
    tokens: int  # tokens that were scored, the end of the answer included


@dataclasses.dataclass(frozen=True)
class Choice:
    """The likeliest option. `str(choice)` is its text."""

    text: str
    index: int  # in the options as they were given
    probability: float
    options: tuple[Option, ...]  # in the order in which they were given
    timings: Timings

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class YesNo:
    """A yes or no. `bool(answer)` is the answer."""

    yes: bool
    probability: float  # that the answer begins with yes, among the two, 0..1
    timings: Timings

    def __bool__(self) -> bool:
        return self.yes


@dataclasses.dataclass
class Clock:
    """Milliseconds by stage, as they add up while an answer is made (see Timings)."""

    preprocess_ms: float = 0.0
    wait_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    @property
    def timings(self) -> Timings:
        """So far."""
        return Timings(**dataclasses.asdict(self))
