"""The token level. A Session holds one KV cache, and its calls are explicitly a traverse or a step."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trol_edge.backend import Backend, Features, Placed, State
from trol_edge.bundle.embedding import Embeddings
from trol_edge.bundle.manifest import Bundle
from trol_edge.cache import Cache
from trol_edge.errors import ContextError, UsageError
from trol_edge.lifetime import Lifetime
from trol_edge.numeric import shown, whole
from trol_edge.prompt.pruning import count_kept, kept_rows, shares

Float32 = NDArray[np.float32]


_unhashed = itertools.count()
TEXT = -1  # the source of a row that holds no part of a picture
NOTHING = np.zeros(0, np.int64)
NOT_PRUNABLE = (
    "image_tokens below 1: the graphs of this bundle hold the positions of their rows, so no token can be left out; "
    "export the bundle again with this version, and build its engines"
)


# Called before each chunk with the number of tokens in the cache and the number that there will be.
OnChunk = Callable[[int, int], None]


class Session:
    """Token-level access to one conversation state. Not thread-safe; make one per thread.

    >>> s = rt.session()
    >>> logits = s.prefill(ids, pixels)       # float32 [V]: both traversal passes (paper section 3), any length
    >>> logits = s.step(int(logits.argmax())) # float32 [V]: one pass, first K/V set
    >>> logits = s.extend(next_turn)          # float32 [V]: like a prefill of everything so far and the new tokens
    >>> twin = s.fork()                       # shares cached rows, which are copied when one of the two overwrites them

    `extend` and `prefill(reuse=True)` are exact, because both passes' keys and values of the prefix are kept, and the
    new tokens attend to them pass by pass. A Runtime opened with prefix_reuse=False keeps one set, and refuses them.
    """

    def __init__(
        self,
        backend: Backend,
        embeddings: Embeddings,
        bundle: Bundle,
        long_context: bool = False,
        prefill_chunk: int | None = None,
        lifetime: Lifetime | None = None,
    ) -> None:
        self._lifetime = lifetime
        self.backend, self._embeddings = backend, embeddings
        self._spec, self.context = bundle.manifest.spec, bundle.manifest.context
        self._cache: Cache | None = Cache(backend)
        self._ids = np.zeros(self.context, np.int64)  # the cached tokens
        # What is in a row: number of the picture times T plus the row of its features, or -1 for a token's embedding.
        self._sources = np.full(self.context, TEXT, np.int64)
        self._positions = np.arange(self.context)  # of the rows in the whole prompt
        self._pictures: list[_Picture] = []
        self._length = 0  # rows; pruned image tokens have none
        self._next = 0  # position of the next token: the rows, and what was pruned before it
        self._traversed = 0  # leading tokens that went through both passes; stepped ones follow
        self._long = False
        self._interrupted = False
        # Whether the next prefill uses the long rope factors for any length of prompt. It has no effect on models
        # that have one set.
        self.long_context = long_context
        self.prefill_chunk = prefill_chunk  # tokens per traverse, None: all at once; bounds scratch memory and waiting
        self.reused = 0  # tokens that the last prefill or extend found in the cache

    @property
    def length(self) -> int:
        """The number of tokens in the cache."""
        return self._length

    @property
    def dropped(self) -> int:
        """The number of image tokens that were left out of the cache (see prefill, image_tokens)."""
        return self._next - self._length

    @property
    def traversed(self) -> int:
        """The number of leading tokens that went through both passes: the prompt, without the stepped answer."""
        return self._traversed

    @property
    def token_ids(self) -> list[int]:
        """The tokens in the cache."""
        found: list[int] = self._ids[: self._length].tolist()
        return found

    @property
    def rope(self) -> Literal["plain", "short", "long"]:
        """The factors of the rotary embedding in the cached keys; "plain" for models that have one set only."""
        return "plain" if self._spec.long_rope is None else "long" if self._long else "short"

    @property
    def limit(self) -> int:
        """The most tokens that `step` can reach with these factors: the context, or less with the short ones.

        Image tokens that were left out count, because the tokens after them keep their positions.
        """
        rope = self._spec.long_rope
        return (self.context if rope is None or self._long else rope.short_rows(self.context)) - self.dropped

    @property
    def prefix_reuse(self) -> bool:
        """Whether both K/V sets are kept, so that `extend` and `prefill(reuse=True)` work."""
        return self.backend.prefix_reuse

    def prefill(
        self,
        token_ids: Sequence[int] | ArrayLike,
        pixel_values: Float32 | None = None,
        *,
        reuse: bool = False,
        image_tokens: float | Sequence[float] = 1.0,
        on_chunk: OnChunk | None = None,
    ) -> Float32:
        """Make a prompt the content of the session; returns the logits, float32 [V], of its last token.

        token_ids: ints [S], S >= 1, with `tokens_per_image` image tokens (`image_token_id`) per picture, or per tile.
        pixel_values: float32 [N, 3, P, P] normalised pictures or tiles in the order of their tokens, or None.
        reuse: keep the longest cached prefix of the same tokens and the same pictures (by their features), and traverse
        only what follows, at least the last token. The result is that of a fresh prefill. `reused` is the number of
        tokens that were kept.
        image_tokens: share of each picture's or tile's tokens that enter the cache, above 0 and up to 1, or a list with
        one share for each. Those that differ least from the others are left out (trol_edge.prompt.pruning). The others,
        and the text, keep the positions that they have in the whole prompt.
        on_chunk: called before each chunk (see prefill_chunk). Its exceptions pass through. The session then holds the
        finished chunks, from which `prefill(reuse=True)` continues, and refuses to step.
        Raises UsageError for wrong shapes, ids, counts or shares and ContextError for a prompt that is longer than the
        context, image tokens that are left out included.
        A prompt of one token is traversed too. If the model's rotary embedding has two factor sets, a prompt longer
        than the short set allows uses the long one (as does every prompt with `long_context`), see `rope`; a prefix
        with the other set is not reused.
        """
        self._checked_shares(image_tokens)
        features, identities = self._encoded(pixel_values)
        return self.prefill_features(
            token_ids, features, identities, reuse=reuse, image_tokens=image_tokens, on_chunk=on_chunk
        )

    def prefill_features(
        self,
        token_ids: Sequence[int] | ArrayLike,
        features: Features | Sequence[Features] | None,
        identities: Sequence[bytes] | None = None,
        *,
        reuse: bool = False,
        image_tokens: float | Sequence[float] = 1.0,
        on_chunk: OnChunk | None = None,
    ) -> Float32:
        """Like prefill, with image features [N, T, D] (from the vision graph), or a list of such, instead of pixels.

        identities: one key per picture or tile, equal only if the features are equal, so that they need not be hashed
        again (10 MB each for TroL-1.8B). None: a hash of the features. Features in device memory are never copied to be
        hashed, so without identities they count as new ones.
        """
        cache = self.cache
        ids = self.check_ids(token_ids)
        used = self._checked_shares(image_tokens)
        squares = self._identify(features, identities)
        self._check_count(ids, len(squares))
        self._check_room(len(ids))
        if reuse:
            self._require_both("reuse=True")
        pictures = self._pruned(squares, used)
        long_rope = self._takes_long(len(ids))
        rows = self._rows(ids, pictures)
        start = self._common(rows, pictures) if reuse and long_rope == self._long else 0
        return self._traverse(cache, start, rows, pictures, long_rope, on_chunk)

    def extend(
        self,
        token_ids: Sequence[int] | ArrayLike,
        pixel_values: Float32 | None = None,
        *,
        image_tokens: float | Sequence[float] = 1.0,
        on_chunk: OnChunk | None = None,
    ) -> Float32:
        """Traverse more tokens after the cached ones; returns the logits, float32 [V], of the last.

        The result is exactly that of a `prefill` of all tokens so far and these, at the cost of these. Tokens that were
        stepped (an answer) are traversed as well, as in a prompt that contains them. One token at a time, this is
        decoding with both passes, the authors' `use_cache=False`. Arguments and errors are those of prefill; token_ids
        need image tokens for these pictures only.
        If the total length changes the rope factors (TroL-3.8B), everything is traversed again.
        """
        self._checked_shares(image_tokens)
        features, identities = self._encoded(pixel_values)
        return self.extend_features(token_ids, features, identities, image_tokens=image_tokens, on_chunk=on_chunk)

    def extend_features(
        self,
        token_ids: Sequence[int] | ArrayLike,
        features: Features | Sequence[Features] | None,
        identities: Sequence[bytes] | None = None,
        *,
        image_tokens: float | Sequence[float] = 1.0,
        on_chunk: OnChunk | None = None,
    ) -> Float32:
        """Like extend, with image features instead of pixels (see prefill_features)."""
        cache = self.cache
        self._require_both("extend")
        self._require_whole("extend")
        new = self.check_ids(token_ids)
        used = self._checked_shares(image_tokens)
        squares = self._identify(features, identities)
        self._check_count(new, len(squares))
        held, position = self._length, self._next
        self._check_room(position + len(new))
        if self._inside_picture(held):
            raise UsageError(f"the {held} cached tokens end inside a picture; prefill the whole prompt with reuse=True")
        pictures = [*self._pictures, *self._pruned(squares, used)]
        long_rope = self._takes_long(position + len(new))
        start = self._traversed if long_rope == self._long else 0
        rows = self._held.followed_by(self._rows(new, pictures, position))
        return self._traverse(cache, start, rows, pictures, long_rope, on_chunk)

    def step(self, token_id: int) -> Float32:
        """Append one token in one pass (no gate, no LoRA); returns the logits, float32 [V], of the token after it.

        Raises UsageError before a prefill or for an id outside the vocabulary, ContextError if the cache is full.
        """
        return self.step_view(token_id).copy()

    def step_view(self, token_id: int) -> Float32:
        """Like step, but the next call overwrites the returned array (no allocation)."""
        state, embedding = self._to_step(token_id)
        logits = state.step(embedding, self._length, self._rotary)
        self._stepped(token_id)
        return logits

    def step_token(self, token_id: int) -> int:
        """Like step, but returns only the id of the largest logit (the lowest among equal ones), for greedy decoding.

        On a GPU it is found there, and no logits are copied. Raises BackendError if no logit is a usable number.
        """
        state, embedding = self._to_step(token_id)
        found = state.step_token(embedding, self._length, self._rotary)
        self._stepped(token_id)
        return found

    def _to_step(self, token_id: int) -> tuple[State, Float32]:
        """Check everything that a step needs, and return its state and embedding."""
        cache, length, dropped = self.cache, self._length, self.dropped
        if not length:
            raise UsageError("step before prefill; call prefill(token_ids) first")
        if self._interrupted:
            self._require_whole("step")
        if length + dropped >= self.context:
            raise ContextError(f"the context of {self.context} tokens is full; export with a larger --context")
        if length >= self.limit:
            raise ContextError(
                f"the cached keys have the short rope factors, which allow {self.limit + dropped} tokens; "
                "prefill again with long_context=True, which uses the long factors from the first token on"
            )
        if whole(token_id, 0, self._spec.vocab_size - 1) is None:
            raise UsageError(f"token id {shown(token_id)} is not an int in 0..{self._spec.vocab_size - 1}")
        return cache.stepping(length, self._traversed), self._embeddings[token_id]

    def _stepped(self, token_id: int) -> None:
        at = self._length
        self._ids[at], self._sources[at], self._positions[at] = token_id, TEXT, self._next
        self._length, self._next = at + 1, self._next + 1

    @property
    def _rotary(self) -> int | None:
        """The position of the next token; None if it is its row."""
        return None if self._next == self._length else self._next

    def truncate(self, length: int) -> None:
        """Go back to the first `length` tokens (0: empty), from which step or extend continue. Nothing is copied.

        Raises UsageError if the session holds fewer.
        """
        self._require_open()
        if not isinstance(length, (int, np.integer)) or isinstance(length, bool) or not 0 <= length <= self._length:
            raise UsageError(
                f"truncate({shown(length)}): the session holds {self._length} tokens; give 0..{self._length}"
            )
        length = int(length)
        kept = int(self._sources[:length].max(initial=TEXT)) // self._spec.vision.tokens_per_image + 1
        pictures, traversed, position = self._pictures[:kept], min(self._traversed, length), self._after(length)
        # No call is between these assignments, so Ctrl-C comes before all of them or after.
        self._pictures, self._length, self._traversed, self._interrupted = pictures, length, traversed, False
        self._next = position

    def fork(self) -> Session:
        """Make a session that continues from here on its own, for what-if questions about one prompt.

        It shares the cached rows and copies them when it first writes: the first K/V set at its first step, the second
        set only if it traverses (extend). The original session copies nothing as long as it writes after the shared
        rows. Forks may be used in other threads.
        """
        cache = self.cache
        twin = Session.__new__(Session)
        twin.__dict__.update(self.__dict__)
        twin._cache = cache.fork(self._length, self._traversed)
        twin._ids, twin._pictures = self._ids.copy(), list(self._pictures)
        twin._sources, twin._positions = self._sources.copy(), self._positions.copy()
        return twin

    def become(self, other: Session) -> None:
        """Take the content of another session of the same Runtime, by copying only the rows that differ.

        Beam search needs it. Beams share their prompt, so a beam that continues another one copies only its answer.
        Raises UsageError for a session of another Runtime.
        """
        mine, theirs = self.cache, other.cache
        if other.backend is not self.backend:
            raise UsageError("become() takes a session of the same Runtime; this one belongs to another")
        if other is self:
            return
        start = 0
        if self._long == other._long:
            n = min(self._traversed, other._traversed)
            start = self._agree(other._held, other._pictures, n)
            m = min(self._length, other._length)
            if start == n and self._traversed == other._traversed:  # stepped tokens after the same prompt
                start += _same(self._ids[n:m] == other._ids[n:m])
        # Until everything is copied, claim only what does not change, because Ctrl-C may come meanwhile.
        position, traversed = self._after(start), min(start, self._traversed)
        self._length, self._traversed, self._interrupted, self._next = start, traversed, True, position
        mine.copy_rows(theirs, start, other._length, other._traversed)
        pictures = list(other._pictures)
        self._hold(slice(0, other._length), other._held)
        self._pictures, self._interrupted, self._next = pictures, other._interrupted, other._next
        self._length, self._traversed, self._long = other._length, other._traversed, other._long

    def close(self) -> None:
        """Free the K/V buffers (rows that forks rely on stay as long as the forks). Closing twice is fine."""
        self._cache = None

    def __enter__(self) -> Session:
        self._require_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _traverse(
        self,
        cache: Cache,
        start: int,
        rows: _Rows,
        pictures: list[_Picture],
        long_rope: bool,
        on_chunk: OnChunk | None,
    ) -> Float32:
        """Make the session hold `rows`, of which the first `start` are cached; returns logits of the last."""
        total = len(rows.ids)
        size = total if self.prefill_chunk is None else self._chunk_size(self.prefill_chunk, total - start)
        kept = pictures if self._spec.long_rope else [dataclasses.replace(p, features=None) for p in pictures]
        position = self._after(start)
        # No call is between these assignments, so Ctrl-C comes before all of them or after.
        self._length = self._traversed = self.reused = start
        self._pictures, self._long, self._next = kept, long_rope, position
        self._interrupted = True  # until the last chunk is done
        logits: Float32 | None = None
        while self._length < total:
            first, last = self._length, min(self._length + size, total)
            if on_chunk is not None:
                on_chunk(first, total)
            part = rows[first:last]
            placed = self._placed(pictures, part.sources)
            pictured = part.sources != TEXT if placed else None
            rotary = None if part.positions[-1] == last - 1 else part.positions
            logits = cache.traverse(self._embeddings[part.ids], pictured, long_rope, first, placed, rotary)
            self._hold(slice(first, last), part)
            position = self._after(last)
            self._length = self._traversed = last
            self._next = position
        self._interrupted = False
        assert logits is not None
        return logits.copy()

    def _placed(self, pictures: list[_Picture], sources: NDArray[np.int64]) -> list[Placed]:
        """The rows of pictures in a chunk, with their places, run by run."""
        per_picture = self._spec.vision.tokens_per_image
        at = np.flatnonzero(sources != TEXT)
        rows = sources[at]
        apart = (np.diff(at, prepend=-2) != 1) | (np.diff(rows, prepend=-2) != 1) | (rows % per_picture == 0)
        begins = np.flatnonzero(apart).tolist()
        placed = []
        for begin, end in zip(begins, [*begins[1:], len(at)], strict=False):
            picture, first = divmod(int(rows[begin]), per_picture)
            features = pictures[picture].features
            assert features is not None  # pictures without features are cached completely
            placed.append(Placed(features, first, int(at[begin]), end - begin))
        return placed

    def _rows(self, ids: NDArray[np.int64], pictures: list[_Picture], position: int = 0) -> _Rows:
        """The rows that these tokens take, from `position` on; the last ones of the pictures are theirs."""
        per_picture = self._spec.vision.tokens_per_image
        mask = ids == self._spec.image_token_id
        count = int(mask.sum())
        first = len(pictures) - count // per_picture
        sources, positions = np.full(len(ids), TEXT, np.int64), np.arange(position, position + len(ids))
        sources[mask] = np.arange(count) + first * per_picture
        taken = np.ones(len(ids), bool)
        if count:
            shown = np.zeros((len(pictures) - first, per_picture), bool)
            for i, picture in enumerate(pictures[first:]):
                shown[i, picture.kept] = True
            taken[mask] = shown.reshape(-1)
        return _Rows(ids[taken], sources[taken], positions[taken])

    @property
    def _held(self) -> _Rows:
        """What is cached."""
        return _Rows(self._ids, self._sources, self._positions)[: self._length]

    def _hold(self, part: slice, rows: _Rows) -> None:
        self._ids[part], self._sources[part], self._positions[part] = rows.ids, rows.sources, rows.positions

    def _inside_picture(self, length: int) -> bool:
        """Whether the first `length` rows end before the last one that is kept of a picture."""
        last = int(self._sources[:length].max(initial=TEXT))
        picture, row = divmod(last, self._spec.vision.tokens_per_image)
        return last != TEXT and row != self._pictures[picture].kept[-1]

    def _after(self, length: int) -> int:
        """The position of the token after the first `length` rows."""
        if not length:
            return 0
        last, source = int(self._positions[length - 1]), int(self._sources[length - 1])
        if source == TEXT or self._inside_picture(length):
            return last + 1
        per_picture = self._spec.vision.tokens_per_image
        return last + per_picture - source % per_picture  # what was left out at its end counts, too

    def _takes_long(self, total: int) -> bool:
        """Whether a prompt of `total` tokens uses the long rope factors."""
        rope = self._spec.long_rope
        return rope is not None and (self.long_context or total > rope.original_max_position_embeddings)

    def _encoded(self, pixel_values: Float32 | None) -> tuple[Features | None, list[bytes] | None]:
        """Encode pictures; if features are in device memory, also return hashes of the pixels as their identities."""
        if pixel_values is None:
            return None, None
        pixels = self.check_pixels(pixel_values)
        features = self.backend.encode_image(pixels)
        if isinstance(features, np.ndarray):
            features.flags.writeable = False
            return features, None
        return features, [hashlib.sha256(picture.data).digest() for picture in pixels]

    def _identify(
        self, features: Features | Sequence[Features] | None, identities: Sequence[bytes] | None
    ) -> list[_Picture]:
        if features is None:
            return []
        shape = (self._spec.vision.tokens_per_image, self._spec.hidden_size)
        blocks: list[Any] = list(features) if isinstance(features, (list, tuple)) else [features]
        for block in blocks:
            if len(block.shape) != 3 or block.shape[1:] != shape or block.dtype != np.float32:
                raise UsageError(
                    f"features should be float32 [N, {shape[0]}, {shape[1]}], found {block.dtype} {list(block.shape)}"
                )
        # Copy what the caller could overwrite, so that what was hashed is what is used.
        blocks = [b.copy() if isinstance(b, np.ndarray) and b.flags.writeable else b for b in blocks]
        squares: list[Features] = [block[i] for block in blocks for i in range(len(block))]
        if identities is None:
            identities = [self._identity(square) for square in squares]
        if len(identities) != len(squares):
            raise UsageError(
                f"{len(identities)} identities for {len(squares)} picture(s) or tile(s); give one for each"
            )
        return [_Picture(key, NOTHING, square) for key, square in zip(identities, squares, strict=True)]

    def _identity(self, features: Features) -> bytes:
        if self.backend.prefix_reuse and isinstance(features, np.ndarray):
            return hashlib.sha256(features.tobytes()).digest()
        return b"%d" % next(_unhashed)  # equal only to itself and to its copies in forks

    def _checked_shares(self, image_tokens: float | Sequence[float]) -> float | list[float]:
        """Return image_tokens. Raises UsageError for what is no share, and where tokens cannot keep their positions."""
        checked = shares(image_tokens)
        fewest = checked if isinstance(checked, float) else min(checked, default=1.0)
        if fewest < 1 and not self.backend.takes_rotary:
            raise UsageError(NOT_PRUNABLE)
        return checked

    def _pruned(self, squares: list[_Picture], used: float | list[float]) -> list[_Picture]:
        """The pictures with the rows that are kept of each. Raises UsageError for another number of shares."""
        each = [used] * len(squares) if isinstance(used, float) else used
        if len(each) != len(squares):
            raise UsageError(
                f"image_tokens has {len(each)} shares for {len(squares)} picture(s) or tile(s); give one for each"
            )
        all_rows = np.arange(self._spec.vision.tokens_per_image)
        known = {(p.identity, len(p.kept)): p.kept for p in self._pictures}
        found = []
        for square, share in zip(squares, each, strict=True):
            count = count_kept(len(all_rows), share)
            kept = all_rows if count == len(all_rows) else known.get((square.identity, count))
            if kept is None:
                kept = kept_rows(np.asarray(square.features), count)
            found.append(dataclasses.replace(square, kept=kept))
        return found

    def _common(self, rows: _Rows, pictures: list[_Picture]) -> int:
        """The number of rows of a new prompt that are cached as traversed. At least the last is left to traverse."""
        return self._agree(rows, pictures, min(self._traversed, len(rows.ids) - 1))

    def _agree(self, rows: _Rows, pictures: list[_Picture], n: int) -> int:
        """How many of the first n rows are the same as here: tokens, pictures, and what is kept of them.

        Positions follow from these.
        """
        mine, theirs = self._held[:n], rows[:n]
        same = _same((mine.ids == theirs.ids) & (mine.sources == theirs.sources))
        at = np.flatnonzero(theirs.sources[:same] != TEXT)
        order = theirs.sources[at] // self._spec.vision.tokens_per_image
        for begin in np.flatnonzero(np.diff(order, prepend=TEXT)):
            picture = int(order[begin])
            if self._pictures[picture].identity != pictures[picture].identity:
                return int(at[begin])
        return same

    @property
    def cache(self) -> Cache:
        """The K/V rows. Raises UsageError if the session, or its Runtime, is closed."""
        self._require_open()
        assert self._cache is not None
        return self._cache

    def _require_open(self) -> None:
        if self._lifetime is not None:
            self._lifetime.check()
        if self._cache is None:
            raise UsageError("this session is closed; make another with Runtime.session()")

    def _require_both(self, what: str) -> None:
        if not self.backend.prefix_reuse:
            raise UsageError(
                f"{what} needs the keys and values of both passes, but this Runtime keeps only the first pass's; "
                "open it with prefix_reuse=True (it doubles the K/V memory)"
            )

    def _require_whole(self, what: str) -> None:
        if self._interrupted:
            raise UsageError(
                f"{what}: the last prefill or extend did not finish, {self._length} tokens are done; "
                "prefill the whole prompt (reuse=True continues from there), or truncate"
            )

    def _chunk_size(self, given: int, tokens: int) -> int:
        size = whole(given, 1)
        if size is None:
            raise UsageError(f"prefill_chunk should be a whole number above 0, or None, found {shown(given)}")
        if tokens > size:
            self._require_both("prefill_chunk")
        return size

    def _check_count(self, ids: NDArray[np.int64], pictures: int) -> None:
        expected = pictures * self._spec.vision.tokens_per_image
        found = int((ids == self._spec.image_token_id).sum())
        if found != expected:
            raise UsageError(
                f"the prompt has {found} image tokens (id {self._spec.image_token_id}), but {pictures} "
                f"picture(s) or tile(s) fill {expected}; give {self._spec.vision.tokens_per_image} for each"
            )

    def _check_room(self, tokens: int) -> None:
        if tokens > self.context:
            raise ContextError(
                f"the prompt has {tokens} tokens, but this bundle holds {self.context}; "
                "shorten it, give fewer pictures, or export with a larger --context"
            )

    def check_ids(self, token_ids: Sequence[int] | ArrayLike) -> NDArray[np.int64]:
        """Return token_ids as int64 [S]. Raises UsageError if they are not a list of ids of this model."""
        ids = _array(token_ids, "token_ids")
        if isinstance(token_ids, Sequence) and any(isinstance(token, (bool, np.bool_)) for token in token_ids):
            raise UsageError("token_ids contain True or False; give ints")
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(
                f"token_ids should be a non-empty list of ints [S], found shape {ids.shape} of {ids.dtype}"
            )
        wrong = ids[(ids < 0) | (ids >= len(self._embeddings))]
        if wrong.size:
            raise UsageError(f"token id {int(wrong[0])} is not in 0..{len(self._embeddings) - 1}")
        return ids.astype(np.int64)

    def check_pixels(self, pixel_values: Float32) -> Float32:
        """Copy pixel_values as contiguous float32 [N, 3, P, P]. Raises UsageError if they are not."""
        size = self._spec.vision.image_size
        pixels = _array(pixel_values, "pixel_values")
        if pixels.dtype != np.float32 or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or not len(pixels):
            raise UsageError(
                f"pixel_values should be float32 [N, 3, {size}, {size}], N >= 1, "
                f"found {pixels.dtype} {list(pixels.shape)}"
            )
        pixels = np.array(pixels, order="C")  # copied, so that what is checked and hashed is what is encoded
        if not np.isfinite(pixels).all():
            raise UsageError("pixel_values hold NaN or infinite values")
        return pixels


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A picture or tile of the prompt: its identity, the rows of its features that are in the prompt, int64 [K] in
    order, and its features [T, D] while they are needed."""

    identity: bytes
    kept: NDArray[np.int64]
    features: Features | None = None


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of a cache, each int64 [R]: their tokens, what is in them (see Session), and their positions."""

    ids: NDArray[np.int64]
    sources: NDArray[np.int64]
    positions: NDArray[np.int64]

    def __getitem__(self, part: slice) -> _Rows:
        return _Rows(self.ids[part], self.sources[part], self.positions[part])

    def followed_by(self, more: _Rows) -> _Rows:
        """These rows and more of them."""
        pairs = ((self.ids, more.ids), (self.sources, more.sources), (self.positions, more.positions))
        return _Rows(*(np.concatenate(pair) for pair in pairs))


def _same(equal: NDArray[np.bool_]) -> int:
    """The number of leading entries that are True."""
    return len(equal) if equal.all() else int(equal.argmin())


def _array(values: Any, name: str) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:  # rows of different lengths, among others
        raise UsageError(f"{name} cannot be made an array ({error})") from error
