"""Gets from a prompt and pictures to the first logits: reads, encodes, and prefills chunk by chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering.desk import Desk
from trol_edge.answering.options import Options
from trol_edge.answering.results import Clock
from trol_edge.answering.turns import Call
from trol_edge.backend import Features
from trol_edge.bundle.graph_sizes import PREFILL_CHUNK
from trol_edge.errors import ContextError
from trol_edge.prompt.images import Picture, count_tiles, load_rgb, preprocess
from trol_edge.prompt.template import Prompt, Spoken
from trol_edge.session import Session
from trol_edge.vision_cache import content_key

Float32 = NDArray[np.float32]
Pictures = Picture | Sequence[Picture]
Color = Literal["rgb", "bgr"]

# Tokens of a prompt that are computed at a time, in calls with a deadline. A call can be stopped between two chunks.
DEADLINE_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Seen:
    """A picture of a question that was read, with its features if they are cached, else with its pixels."""

    key: bytes
    tiles: int
    features: Features | None  # [tiles, T, D]
    pixels: Float32 | None  # [tiles, 3, P, P]
    image_tokens: float  # share of its tokens that is used


@dataclasses.dataclass(frozen=True)
class Turn:
    """An earlier turn of a conversation: a question with its pictures, as they were read, and its answer."""

    prompt: Prompt
    pictures: list[Seen]
    answer: str

    @property
    def spoken(self) -> Spoken:
        """The turn as the prompt template takes it."""
        return Spoken(self.prompt, [picture.tiles for picture in self.pictures], self.answer)


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt as token ids, and all its pictures, those of earlier turns too, in the order of their tokens."""

    ids: list[int]
    pictures: list[Seen]

    @property
    def identities(self) -> list[bytes]:
        """One key per tile; equal keys mean equal features."""
        return [picture.key + bytes([tile]) for picture in self.pictures for tile in range(picture.tiles)]

    @property
    def image_tokens(self) -> list[float]:
        """The share of tokens that is used of each tile."""
        return [picture.image_tokens for picture in self.pictures for _ in range(picture.tiles)]


UNREAD = Question([], [])  # for a call that ended before its question was read


def listed(images: Any) -> list[Any]:
    """Return pictures as a list, for none and for a single one, too."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def look(desk: Desk, images: Pictures | None, options: Options, call: Call) -> list[Seen]:
    """Read pictures, and make pixels of those whose features are not in the cache.

    An array is copied first, so that what is hashed is what is encoded, even if a camera overwrites its buffer.
    Raises ContextError, before anything is read, for too many pictures, and UnfinishedError.
    """
    spec, seen, given = desk.model.bundle.manifest.image, [], listed(images)
    tokens, context = len(given) * desk.model.bundle.manifest.prompt.tokens_per_image, _context(desk)
    if tokens >= context:
        raise ContextError(
            f"{len(given)} pictures take at least {tokens} tokens, but this bundle holds {context}; "
            "give fewer pictures, or export with a larger --context"
        )
    if options.max_tiles is not None:
        spec = dataclasses.replace(spec, max_tiles=options.max_tiles)
    for image in given:
        call.check()
        rgb = load_rgb(image, options.color, options.bits)
        if isinstance(image, np.ndarray):
            rgb = _copy(rgb)
        key = content_key(rgb, repr(spec))
        features = desk.vision_cache.peek(key)
        pixels = None if features is not None else preprocess([rgb], spec)
        seen.append(Seen(key, count_tiles([rgb], spec)[0], features, pixels, options.image_tokens))
    return seen


def _copy(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Copy with the same order of channels in memory, because reversing them takes ten times as long."""
    return picture[:, :, ::-1].copy()[:, :, ::-1] if picture.strides[2] < 0 else picture.copy()


def ask(
    desk: Desk,
    prompt: Prompt,
    pictures: list[Seen],
    call: Call,
    before: Sequence[Turn] = (),
    ids: list[int] | None = None,
) -> Question:
    """Make the question. Raises ContextError if the context has no room for it and an answer, and UnfinishedError.

    before: earlier turns of the conversation. ids: the tokens of all of it, if they are known already.
    """
    call.check()
    check_length(desk, prompt, "the prompt")
    check_length(desk, [text for turn in before for text in texts(turn)], "the conversation")
    if ids is None:
        ids = desk.model.tokenize(prompt, [p.tiles for p in pictures], before=[turn.spoken for turn in before])
    context = _context(desk)
    if len(ids) >= context:
        raise ContextError(
            f"prompt and pictures{' of the conversation' if before else ''} take {len(ids)} tokens, but this bundle "
            f"holds {context} and the answer needs room too; shorten the prompt, give fewer "
            f"{'turns or ' if before else ''}pictures, or export with a larger --context"
        )
    return Question(ids, [picture for turn in before for picture in turn.pictures] + pictures)


def texts(turn: Turn) -> list[str]:
    """The texts of a turn, its answer last."""
    parts = turn.prompt if isinstance(turn.prompt, (list, tuple)) else [turn.prompt]
    return [part for part in parts if isinstance(part, str)] + [turn.answer]


def check_length(desk: Desk, text: Prompt, what: str) -> None:
    """Raise ContextError for a text that is too long for the context even with the longest tokens.

    Finding that out by tokenizing ten megabytes takes seconds, and two gigabytes of memory.
    """
    parts = [text] if isinstance(text, str) else text if isinstance(text, (list, tuple)) else []
    length = sum(len(part) for part in parts if isinstance(part, str))
    context = _context(desk)
    if length > context and length > context * desk.model.text.longest:
        raise ContextError(
            f"{what} has {length} characters, but this bundle holds {context} tokens of at most "
            f"{desk.model.text.longest} characters; shorten it, or export with a larger --context"
        )


def _context(desk: Desk) -> int:
    return desk.model.bundle.manifest.context


def prefill(desk: Desk, session: Session, question: Question, options: Options, call: Call, clock: Clock) -> Float32:
    """Compute logits [V] after the prompt. Raises UnfinishedError at the deadline, or once it cannot be met."""
    start = desk.now()
    features = [_features(desk, picture, call) for picture in question.pictures]
    began = desk.now()
    clock.vision_ms += 1e3 * (began - start)
    done, since = 0, began
    chunk = options.prefill_chunk or session.prefill_chunk
    if chunk is None and session.prefix_reuse:  # without prefix reuse a prompt has to be computed as a whole
        chunk = PREFILL_CHUNK if options.deadline_ms is None else DEADLINE_CHUNK

    def on_chunk(first: int, total: int) -> None:
        nonlocal done, since
        now = desk.now()
        if first > done and since > began:
            desk.prefill_pace.saw(now - since, first - done)
        done, since = first, now
        call.check(desk.prefill_pace.least_s(min(chunk or total, total - first)))

    before = session.long_context, session.prefill_chunk
    session.long_context = options.long_context or (before[0] and options.session is not None)
    session.prefill_chunk = chunk
    try:
        logits = session.prefill_features(
            question.ids,
            features or None,
            question.identities if features else None,
            reuse=session.prefix_reuse,
            image_tokens=question.image_tokens,
            on_chunk=on_chunk,
        )
    finally:
        session.long_context, session.prefill_chunk = before
        end = desk.now()
        clock.prefill_ms += 1e3 * (end - began)
    desk.prefill_pace.saw(end - since, session.length - done)
    return logits


def _features(desk: Desk, picture: Seen, call: Call) -> Features:
    def encode() -> Features:
        if picture.features is not None:  # the cache may have dropped it since the question was read
            return picture.features
        assert picture.pixels is not None
        call.check(desk.vision_pace.least_s(picture.tiles))
        start = desk.now()
        features = desk.model.backend.encode_image(picture.pixels)
        desk.vision_pace.saw(desk.now() - start, picture.tiles)
        return features

    return desk.vision_cache.get(picture.key, encode)
