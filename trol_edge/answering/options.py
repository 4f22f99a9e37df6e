"""How a question is to be answered: every option of `generate`, `stream`, `astream` and `ask_many`, checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from trol_edge.answering.constrain import ResponseFormat
from trol_edge.answering.sampling import SamplingParams
from trol_edge.errors import UsageError
from trol_edge.session import Session

__all__ = ["AnswerOptions", "Options", "options_from_keywords"]

MOST_LOGPROBS = 20
MOST_BEAMS = 16


class AnswerOptions(TypedDict, total=False):
    """The keyword arguments, for type checkers; `Options` says what each means, and its default."""

    max_new_tokens: int
    stop: str | Sequence[str]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    num_beams: int
    answer_mode: Literal["step", "traverse"]
    long_context: bool
    response_format: ResponseFormat | None
    logprobs: int | None
    deadline_ms: float | None
    prefill_chunk: int | None
    color: Literal["rgb", "bgr"]
    session: Session | None


@dataclasses.dataclass(frozen=True)
class Options:
    """Every option and its default. Raises UsageError that lists every bad value."""

    max_new_tokens: int = 256
    stop: str | Sequence[str] = ()  # strings before which the answer ends
    temperature: float = 0.0  # 0: greedy. This and the next five: see sampling.SamplingParams
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    num_beams: int = 1  # more: the likeliest of so many answers, searched in parallel; `generate` and `ask_many` only
    answer_mode: Literal["step", "traverse"] = "step"  # passes over each answer token: one, or two as in training
    long_context: bool = False  # TroL-3.8B: take the long rope factors from the first token on
    response_format: ResponseFormat | None = (
        None  # a JSON schema (dict), or a compiled pattern: what the answer matches
    )
    logprobs: int | None = None  # for each token its log-probability and so many alternatives, 0..20; None: off
    deadline_ms: float | None = None  # milliseconds of wall time from the call on, waiting for other calls included
    prefill_chunk: int | None = None  # tokens of the prompt at a time; None: 256, with a deadline 64
    color: Literal["rgb", "bgr"] = "rgb"  # order of the channels in arrays [H, W, 3]
    session: Session | None = None  # answer in this session, whose cache stays as it is afterwards

    def __post_init__(self) -> None:
        whole, number = _is_whole, _is_number
        checks = [
            ("max_new_tokens", whole(self.max_new_tokens, 1), "a whole number above 0"),
            ("num_beams", whole(self.num_beams, 1, MOST_BEAMS), f"a whole number from 1 to {MOST_BEAMS}"),
            ("answer_mode", self.answer_mode in ("step", "traverse"), "'step' or 'traverse'"),
            ("long_context", isinstance(self.long_context, bool), "True or False"),
            (
                "logprobs",
                self.logprobs is None or whole(self.logprobs, 0, MOST_LOGPROBS),
                f"None or a whole number from 0 to {MOST_LOGPROBS}",
            ),
            (
                "deadline_ms",
                self.deadline_ms is None or (number(self.deadline_ms) and self.deadline_ms > 0),
                "None or a number of milliseconds above 0",
            ),
            (
                "prefill_chunk",
                self.prefill_chunk is None or whole(self.prefill_chunk, 1),
                "None or a whole number of tokens above 0",
            ),
            ("color", self.color in ("rgb", "bgr"), "'rgb' or 'bgr', the order of the channels in an array"),
            ("session", self.session is None or isinstance(self.session, Session), "None or a Session"),
        ]
        problems = [f"{name} {getattr(self, name)!r} should be {want}" for name, good, want in checks if not good]
        if problems:
            raise UsageError("; ".join(problems))
        if self.num_beams > 1:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            others = ("temperature", "repetition_penalty", "response_format", "logprobs", "stop", "answer_mode")
            given = [name for name in others if getattr(self, name) != defaults[name]]
            if given:
                raise UsageError(
                    f"num_beams {self.num_beams} looks for the likeliest whole answer and does not go with "
                    f"{', '.join(given)}; leave one or the other out"
                )

    @property
    def sampling(self) -> SamplingParams:
        """The part that chooses tokens. Raises UsageError."""
        names = [field.name for field in dataclasses.fields(SamplingParams)]
        return SamplingParams(**{name: getattr(self, name) for name in names})


def options_from_keywords(keywords: Mapping[str, Any]) -> Options:
    """Checked options; UsageError for an unknown name, with the nearest known one, or a bad value."""
    known = [field.name for field in dataclasses.fields(Options)]
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"unknown option {name!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
            )
    return Options(**keywords)


def _is_whole(value: Any, low: int, high: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
