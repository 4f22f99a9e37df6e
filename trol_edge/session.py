"""The token level: a Session holds one KV cache and says explicitly whether a call is a traverse or a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trol_edge.bundle import EMBEDDING, Bundle
from trol_edge.errors import BundleError, ContextError, UsageError
from trol_edge.weights import to_float32

Float32 = NDArray[np.float32]


class State(Protocol):
    """One KV cache on some back end. Logits are float32 [V] and may be overwritten by the next call."""

    def traverse(self, embeddings: Float32, image_mask: NDArray[np.bool_] | None, long_rope: bool = False) -> Float32:
        """Prefill an empty cache: embeddings [S, D], image_mask [S] (None: no image tokens).

        long_rope: use the long factor set, here and in the steps that follow (only where spec.long_rope is set).
        """
        ...

    def step(self, embedding: Float32, position: int) -> Float32:
        """Decode one token: embedding [D] at a position."""
        ...


class Backend(Protocol):
    """The graphs of one bundle on some inference library; the one seam between runtime and accelerators."""

    def encode_image(self, pixel_values: Float32) -> Float32:
        """pixel_values [N, 3, P, P] -> image features [N, T, D]."""
        ...

    def new_state(self) -> State:
        """A new, empty KV cache."""
        ...


class Embeddings:
    """The token embedding table, mapped from the weights file; rows become float32 when asked for."""

    def __init__(self, bundle: Bundle) -> None:
        file = bundle.weights()
        if EMBEDDING not in file.tensors:
            raise BundleError(f"{file.path}: lacks {EMBEDDING}; export the bundle again")
        self._dtype = file.tensors[EMBEDDING].dtype
        self._table = file.rows(EMBEDDING)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, ids: Any) -> Float32:
        """ids: int, or int array [S]; float32 [D] or [S, D]."""
        return to_float32(self._table[ids], self._dtype)


class Session:
    """Token-level access to one conversation state. Not thread-safe; make one per thread.

    >>> s = rt.session()
    >>> logits = s.prefill(ids)               # float32 [V]: both traversal passes (paper section 3), any length
    >>> logits = s.step(int(logits.argmax())) # float32 [V]: one pass, KV cache
    """

    def __init__(self, backend: Backend, embeddings: Embeddings, bundle: Bundle, long_context: bool = False) -> None:
        self._backend, self._embeddings = backend, embeddings
        self._spec, self.context = bundle.manifest.spec, bundle.manifest.context
        self._state = backend.new_state()
        self._long = False
        # Whether the next prefill takes the long rope factors whatever the prompt's length. Without effect on models
        # that have one set.
        self.long_context = long_context
        self.length = 0  # tokens in the cache

    @property
    def rope(self) -> Literal["plain", "short", "long"]:
        """Which factors of the rotary embedding the cached keys have; "plain" for models that have one set only."""
        return "plain" if self._spec.long_rope is None else "long" if self._long else "short"

    @property
    def limit(self) -> int:
        """Tokens that the session can hold with these factors: the context, or less with the short ones."""
        rope = self._spec.long_rope
        return self.context if rope is None or self._long else rope.short_rows(self.context)

    def prefill(self, token_ids: Sequence[int] | ArrayLike, pixel_values: Float32 | None = None) -> Float32:
        """Start over with a prompt; returns the logits, float32 [V], of its last token.

        token_ids: ints [S], S >= 1, with `tokens_per_image` image tokens (`image_token_id`) per picture, or per tile.
        pixel_values: float32 [N, 3, P, P] normalised pictures or tiles in the order of their tokens, or None.
        Raises UsageError for wrong shapes, ids or counts and ContextError for a prompt longer than the context.
        A prompt of one token is traversed too. Where the model's rotary embedding has two factor sets, a prompt
        longer than the short set serves takes the long one (as does every prompt with `long_context`), see `rope`.
        """
        features = None if pixel_values is None else self._backend.encode_image(self.check_pixels(pixel_values))
        return self.prefill_features(token_ids, features)

    def prefill_features(self, token_ids: Sequence[int] | ArrayLike, features: Float32 | None) -> Float32:
        """As prefill, with image features [N, T, D] (from the vision graph) instead of pixels."""
        ids = self.check_ids(token_ids)
        mask = ids == self._spec.image_token_id
        pictures = 0 if features is None else len(features)
        expected = pictures * self._spec.vision.tokens_per_image
        if int(mask.sum()) != expected:
            raise UsageError(
                f"the prompt has {int(mask.sum())} image tokens (id {self._spec.image_token_id}), but {pictures} "
                f"picture(s) or tile(s) fill {expected}; give {self._spec.vision.tokens_per_image} for each"
            )
        if len(ids) > self.context:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, this bundle holds {self.context}; "
                "shorten it, give fewer pictures, or export with a larger --context"
            )
        self.length = 0  # should the traverse fail, the session is empty, not half-filled
        embeddings = self._embeddings[ids]
        if features is not None:
            embeddings[mask] = features.reshape(-1, embeddings.shape[1])
        rope = self._spec.long_rope
        self._long = rope is not None and (self.long_context or len(ids) > rope.original_max_position_embeddings)
        logits = self._state.traverse(embeddings, mask if features is not None else None, self._long)
        self.length = len(ids)
        return logits.copy()

    def step(self, token_id: int) -> Float32:
        """Append one token in one pass (no gate, no LoRA); returns the logits, float32 [V], of what follows it.

        Raises UsageError before a prefill or for an id outside the vocabulary, ContextError where the cache is full.
        """
        return self.step_view(token_id).copy()

    def step_view(self, token_id: int) -> Float32:
        """As step, but the array returned is overwritten by the next call (no allocation)."""
        if not self.length:
            raise UsageError("step before prefill; call prefill(token_ids) first")
        if self.length >= self.context:
            raise ContextError(f"the context of {self.context} tokens is full; export with a larger --context")
        if self.length >= self.limit:
            raise ContextError(
                f"the short rope factors serve {self.limit} tokens, and the cached keys have them; "
                "prefill again with long_context=True, which takes the long factors from the first token on"
            )
        if not isinstance(token_id, (int, np.integer)) or not 0 <= token_id < self._spec.vocab_size:
            raise UsageError(f"token id {token_id!r} is not an int in 0..{self._spec.vocab_size - 1}")
        logits = self._state.step(self._embeddings[token_id], self.length)
        self.length += 1
        return logits

    def check_ids(self, token_ids: Sequence[int] | ArrayLike) -> NDArray[np.int64]:
        """token_ids as int64 [S]; UsageError where they are no list of ids of this model."""
        ids = _array(token_ids, "token_ids")
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(
                f"token_ids should be a non-empty list of ints [S], found shape {ids.shape} of {ids.dtype}"
            )
        wrong = ids[(ids < 0) | (ids >= len(self._embeddings))]
        if wrong.size:
            raise UsageError(f"token id {int(wrong[0])} is not in 0..{len(self._embeddings) - 1}")
        return ids.astype(np.int64)

    def check_pixels(self, pixel_values: Float32) -> Float32:
        """pixel_values as contiguous float32 [N, 3, P, P]; UsageError otherwise."""
        size = self._spec.vision.image_size
        pixels = _array(pixel_values, "pixel_values")
        if pixels.dtype != np.float32 or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or not len(pixels):
            raise UsageError(
                f"pixel_values should be float32 [N, 3, {size}, {size}], N >= 1, "
                f"found {pixels.dtype} {list(pixels.shape)}"
            )
        if not np.isfinite(pixels).all():
            raise UsageError("pixel_values hold NaN or infinite values")
        return np.ascontiguousarray(pixels)


def _array(values: Any, name: str) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:  # rows of different lengths, among others
        raise UsageError(f"{name} cannot be made an array ({error})") from error
