"""Defines and checks every option of `generate`, `stream`, `astream` and `ask_many`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from trol_edge.answering.constrain import ResponseFormat
from trol_edge.answering.sampling import SamplingParams
from trol_edge.errors import UsageError
from trol_edge.numeric import is_one_of, real, shown, truth, whole
from trol_edge.prompt.pruning import SHARE, share
from trol_edge.session import Session

__all__ = ["AnswerOptions", "Options", "options_from_keywords"]

MOST_LOGPROBS = 20
MOST_BEAMS = 16


class AnswerOptions(TypedDict, total=False):
    """The keyword arguments, for type checkers. `Options` has the meaning and default of each."""

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
    bits: int | None
    image_tokens: float
    max_tiles: int | None
    session: Session | None


@dataclasses.dataclass(frozen=True)
class Options:
    """Every option and its default. Raises a UsageError that lists every bad value."""

    max_new_tokens: int = 256
    stop: str | Sequence[str] = ()  # strings before which the answer ends
    temperature: float = 0.0  # 0 is greedy; for this and the next five see sampling.SamplingParams
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    num_beams: int = 1  # above 1: width of a beam search for the likeliest answer; `generate` and `ask_many` only
    answer_mode: Literal["step", "traverse"] = "step"  # one pass over each answer token, or two as in training
    long_context: bool = False  # TroL-3.8B: use the long rope factors from the first token on
    response_format: ResponseFormat | None = (
        None  # a JSON schema (dict) or a compiled pattern that the answer must match
    )
    logprobs: int | None = None  # alternatives (0..20) to report beside each token's log-probability; None: off
    # Milliseconds of wall time from the call on, waiting for other calls included; with 0 or less no time is left.
    deadline_ms: float | None = None
    prefill_chunk: int | None = None  # tokens of the prompt that are computed at a time; None: 256, with a deadline 64
    color: Literal["rgb", "bgr"] = "rgb"  # order of the channels in arrays [H, W, 3]
    bits: int | None = None  # bits per channel of pictures that have more than 8, see images.load_rgb
    # Share of each picture's tokens that is used, above 0 and up to 1; see session.Session.prefill. Less is quicker.
    image_tokens: float = 1.0
    max_tiles: int | None = None  # most tiles of a picture, its thumbnail not counted; None: those of the bundle
    session: Session | None = None  # answer in this session, whose cache stays as it is afterwards

    def __post_init__(self) -> None:
        """Check, and make plain ints, floats and bools of the numbers."""
        numbers = [
            ("max_new_tokens", whole(self.max_new_tokens, 1), "a whole number above 0"),
            ("num_beams", whole(self.num_beams, 1, MOST_BEAMS), f"a whole number from 1 to {MOST_BEAMS}"),
            ("long_context", truth(self.long_context), "True or False"),
            ("logprobs", whole(self.logprobs, 0, MOST_LOGPROBS), f"None or a whole number from 0 to {MOST_LOGPROBS}"),
            ("deadline_ms", real(self.deadline_ms), "None or a number of milliseconds"),
            ("prefill_chunk", whole(self.prefill_chunk, 1), "None or a whole number of tokens above 0"),
            ("bits", whole(self.bits, 8, 16), "None or a whole number from 8 to 16"),
            ("image_tokens", share(self.image_tokens), SHARE),
            ("max_tiles", whole(self.max_tiles, 1), "None or a whole number above 0"),
        ]
        checks = [
            ("answer_mode", is_one_of(self.answer_mode, ("step", "traverse")), "'step' or 'traverse'"),
            ("color", is_one_of(self.color, ("rgb", "bgr")), "'rgb' or 'bgr', the order of the channels in an array"),
            ("session", self.session is None or isinstance(self.session, Session), "None or a Session"),
        ]
        wrong = []
        for name, found, want in numbers:
            if found is not None:
                object.__setattr__(self, name, found)
            elif getattr(self, name) is not None or not want.startswith("None"):
                wrong.append((name, want))
        wrong += [(name, want) for name, good, want in checks if not good]
        if wrong:
            raise UsageError("; ".join(f"{name} {shown(getattr(self, name))} should be {want}" for name, want in wrong))
        if self.num_beams > 1:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            others = ("temperature", "repetition_penalty", "response_format", "logprobs", "stop", "answer_mode")
            given = [name for name in others if not is_one_of(getattr(self, name), (defaults[name], []))]
            if given:
                raise UsageError(
                    f"num_beams {self.num_beams} searches for the likeliest whole answer and cannot be combined with "
                    f"{', '.join(given)}; leave one or the other out"
                )

    @property
    def sampling(self) -> SamplingParams:
        """The options that choose tokens. Raises UsageError."""
        names = [field.name for field in dataclasses.fields(SamplingParams)]
        return SamplingParams(**{name: getattr(self, name) for name in names})


def options_from_keywords(keywords: Mapping[str, Any]) -> Options:
    """Make checked options. Raises UsageError for a bad value, or an unknown name, with the nearest known one."""
    known = [field.name for field in dataclasses.fields(Options)]
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"unknown option {name!r}; "
                + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}")
            )
    return Options(**keywords)
