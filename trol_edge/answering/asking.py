"""From a prompt and pictures to the first logits: reading, encoding, and the prefill, chunk by chunk."""

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
from trol_edge.errors import ContextError
from trol_edge.prompt.images import Picture, count_tiles, load_rgb, preprocess
from trol_edge.prompt.template import Prompt
from trol_edge.session import Session
from trol_edge.vision_cache import content_key

Float32 = NDArray[np.float32]
Pictures = Picture | Sequence[Picture]
Color = Literal["rgb", "bgr"]

# Tokens of a prompt that are computed at a time: between two chunks a call can be stopped.
PREFILL_CHUNK = 256
DEADLINE_CHUNK = 64  # where it has a deadline


@dataclasses.dataclass(frozen=True)
class Seen:
    """A picture of a question, read: its features where they are cached, its pixels where not."""

    key: bytes
    tiles: int
    features: Features | None  # [tiles, T, D]
    pixels: Float32 | None  # [tiles, 3, P, P]


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt as token ids, and its pictures in the order of their tokens."""

    ids: list[int]
    pictures: list[Seen]

    @property
    def identities(self) -> list[bytes]:
        """One key per tile: equal keys, equal features."""
        return [picture.key + bytes([tile]) for picture in self.pictures for tile in range(picture.tiles)]


def listed(images: Any) -> list[Any]:
    """Pictures as a list, of none or one, too."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def look(desk: Desk, images: Pictures | None, color: Color) -> list[Seen]:
    """Read pictures; make pixels of those whose features are not in the cache."""
    spec, seen = desk.model.bundle.manifest.image, []
    for image in listed(images):
        rgb = load_rgb(image, color)
        key = content_key(rgb, repr(spec))
        features = desk.vision_cache.peek(key)
        pixels = None if features is not None else preprocess([rgb], spec)
        seen.append(Seen(key, count_tiles([rgb], spec)[0], features, pixels))
    return seen


def ask(desk: Desk, prompt: Prompt, pictures: list[Seen]) -> Question:
    """The question, if the context has room for it and for an answer; ContextError otherwise."""
    ids = desk.model.tokenize(prompt, [picture.tiles for picture in pictures])
    context = desk.model.bundle.manifest.context
    if len(ids) >= context:
        raise ContextError(
            f"prompt and pictures take {len(ids)} tokens, this bundle holds {context} and the answer "
            "needs room too; shorten the prompt, give fewer pictures, or export with a larger --context"
        )
    return Question(ids, pictures)


def prefill(desk: Desk, session: Session, question: Question, options: Options, call: Call, clock: Clock) -> Float32:
    """Logits [V] behind the prompt. Raises UnfinishedError at the deadline, or as soon as it cannot be met."""
    start = desk.now()
    features = [_features(desk, picture, call) for picture in question.pictures]
    began = desk.now()
    clock.vision_ms += 1e3 * (began - start)
    done, since = 0, began
    chunk = options.prefill_chunk or session.prefill_chunk
    if chunk is None and session.prefix_reuse:  # without it a prompt has to be computed in one go
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
            on_chunk=on_chunk,
        )
    finally:
        session.long_context, session.prefill_chunk = before
        end = desk.now()
        clock.prefill_ms += 1e3 * (end - began)
    desk.prefill_pace.saw(end - since, len(question.ids) - done)
    return logits


def _features(desk: Desk, picture: Seen, call: Call) -> Features:
    def encode() -> Features:
        if picture.features is not None:  # dropped from the cache since the question was read
            return picture.features
        assert picture.pixels is not None
        call.check(desk.vision_pace.least_s(picture.tiles))
        start = desk.now()
        features = desk.model.backend.encode_image(picture.pixels)
        desk.vision_pace.saw(desk.now() - start, picture.tiles)
        return features

    return desk.vision_cache.get(picture.key, encode)
