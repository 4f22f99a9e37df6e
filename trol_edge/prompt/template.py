"""The prompt template, which turns a question and its pictures into token ids."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from trol_edge.errors import BundleError, UsageError
from trol_edge.numeric import shown, whole
from trol_edge.prompt.tokenizer import Tokenizer


class ImageMark(enum.Enum):
    """The type of `IMAGE`, the place of a picture in a prompt. Not a text, because any text could be user text."""

    IMAGE = "image"


MOST_TILES = 1 << 16  # more than any context holds
IMAGE: Final = ImageMark.IMAGE
Prompt = str | Sequence[str | ImageMark]  # a question, or one with the places of its pictures


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """The prompt template of a model family; stored in the bundle manifest.

    A prompt is before_system + system + before_question + pictures and question + after_question, and a picture is
    image_prefix + tokens_per_image times image for each of its tiles + image_suffix. Raises BundleError for unusable
    values.
    """

    before_system: str
    system: str
    before_question: str
    after_question: str
    image: str  # the token for one image feature
    image_prefix: str
    image_suffix: str
    after_image: str  # follows each picture that the caller did not place
    tokens_per_image: int  # per tile, if pictures are cut into tiles
    special_tokens: tuple[str, ...]  # the strings in the template that are tokens, not text
    end_markers: tuple[str, ...]  # special tokens that end an answer

    def __post_init__(self) -> None:
        problems = []
        for name in ("special_tokens", "end_markers"):
            if not getattr(self, name) or not all(getattr(self, name)):
                problems.append(f"{name} {getattr(self, name)!r} should be one or more non-empty strings")
        if self.tokens_per_image < 1:
            problems.append(f"tokens_per_image {self.tokens_per_image} is not a count")
        if problems:
            raise BundleError(f"prompt template: {'; '.join(problems)}; export the bundle again with this version")


@dataclasses.dataclass(frozen=True)
class Spoken:
    """An earlier turn of a conversation: a question, the tiles of each of its pictures, and its answer."""

    prompt: Prompt
    tiles: Sequence[int]
    answer: str


def build_prompt(
    tokenizer: Tokenizer,
    spec: PromptSpec,
    prompt: Prompt,
    tiles: int | Sequence[int] = (),
    answer: str = "",
    before: Sequence[Spoken] = (),
) -> list[int]:
    """Return the ids of a whole prompt, followed by those of an answer (or its beginning) if one is given.

    before: earlier turns of the conversation. Each answer is followed by `before_question`, which ends a turn and
    begins the next question. The authors' code renders one question only; this is how it joins the system's turn and
    the question, and how InternLM2's and Phi-3's own templates join turns.

    `prompt` is the question, and the pictures come before it. Or it is a sequence of texts and `IMAGE`, once per
    picture, which sets their places. `tiles` has the number of tiles of each picture (`images.count_tiles`); an int is
    a number of pictures of one tile each. Raises UsageError for a prompt without text, of another type, with lone
    surrogates, or whose `IMAGE` count is not the number of pictures; BundleError for a tokenizer that does not fit
    `spec`.
    """

    def template(part: str) -> list[str | int]:
        return tokenizer.parse(part, spec.special_tokens)

    image_id = tokenizer.special_id(spec.image)
    prefix, suffix = template(spec.image_prefix), template(spec.image_suffix)
    parts = [*template(spec.before_system), spec.system]
    for turn in (*before, Spoken(prompt, _counts(tiles), answer)):
        pictures = iter([*prefix, *[image_id] * (spec.tokens_per_image * count), *suffix] for count in turn.tiles)
        parts += template(spec.before_question)
        for part in _user(turn, spec):
            parts += [part] if isinstance(part, str) else next(pictures)
        parts += [*template(spec.after_question), *([turn.answer] if turn.answer else [])]
    return tokenizer.encode(parts)


def _user(turn: Spoken, spec: PromptSpec) -> list[str | ImageMark]:
    """The texts and pictures of a question, in order."""
    user: list[str | ImageMark]
    if isinstance(turn.prompt, str):
        user = [part for _ in turn.tiles for part in (IMAGE, spec.after_image)] + [turn.prompt]
        text = turn.prompt
    else:
        user = _checked_parts(turn.prompt, len(turn.tiles))
        text = "".join(part for part in user if isinstance(part, str))
    if not text.strip():
        raise UsageError("the prompt has no text; pass a question")
    return user


def _counts(tiles: int | Sequence[int]) -> list[int]:
    """The number of tiles of each picture."""
    pictures = whole(tiles, 0, MOST_TILES)
    listed: Any = [1] * pictures if pictures is not None else tiles
    if isinstance(listed, np.ndarray) and listed.ndim == 1:
        listed = list(listed)
    counts = [whole(count, 1) for count in listed] if isinstance(listed, (list, tuple)) else [None]
    found = [count for count in counts if count is not None]
    if len(found) < len(counts) or sum(found) > MOST_TILES:
        raise UsageError(
            f"tiles should be a number of pictures, or a list of the tiles of each (at least 1 each, at most "
            f"{MOST_TILES} in all), found {shown(tiles)}"
        )
    return found


def _checked_parts(prompt: Sequence[str | ImageMark], pictures: int) -> list[str | ImageMark]:
    if not isinstance(prompt, (list, tuple)):
        raise UsageError(f"the prompt is a {type(prompt).__name__}; pass a str, or a list of str and IMAGE")
    for i, part in enumerate(prompt):
        if not isinstance(part, (str, ImageMark)):
            raise UsageError(f"item {i} of the prompt is a {type(part).__name__}; pass str and IMAGE only")
    placed = sum(part is IMAGE for part in prompt)
    if placed != pictures:
        raise UsageError(
            f"the prompt places {placed} pictures but {pictures} were passed; put IMAGE once per picture, "
            "or pass the prompt as one str to put the pictures before it"
        )
    return list(prompt)


def end_ids(tokenizer: Tokenizer, spec: PromptSpec) -> frozenset[int]:
    """The ids that end an answer. Raises BundleError if the tokenizer lacks one of the end markers."""
    return frozenset(tokenizer.special_id(marker) for marker in spec.end_markers)
