"""The seam between runtime and accelerators: what a back end does, and the K/V buffers that it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
FIRST, SECOND = 0, 1  # the K/V sets: of the first and of the second pass


class Features(Protocol):
    """Image features float32 [N, T, D] (of one picture: [T, D]) where a back end has them: an array, or device memory.

    `numpy.asarray` makes an array of either.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, T, D] or [T, D]."""
        ...

    @property
    def dtype(self) -> Any:
        """float32."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Placed:
    """Rows `first`..`first + count - 1` of a picture's features [T, D], which stand for tokens `at`, `at + 1` ..."""

    features: Features
    first: int
    at: int
    count: int


class State(Protocol):
    """The K/V buffers of one sequence on some back end. Logits are float32 [V] and may be overwritten by the next call.

    Rows are positions. There are two sets of buffers: the first pass's, and the second pass's, which a back end without
    prefix reuse does not keep.
    """

    def traverse(
        self,
        embeddings: Float32,
        image_mask: NDArray[np.bool_] | None,
        long_rope: bool = False,
        start: int = 0,
        pictures: Sequence[Placed] = (),
    ) -> Float32:
        """Both passes over tokens at positions start..start+S-1, S >= 1, behind rows 0..start-1 of both sets.

        embeddings [S, D], image_mask [S] (None: no image tokens). Writes rows start..start+S-1 of both sets; logits of
        the last token. start > 0 only where the back end keeps the second set. long_rope: use the long factor set,
        here and in the steps that follow (only where spec.long_rope is set). pictures: image features that take the
        place of rows of embeddings, which may be overwritten.
        """
        ...

    def step(self, embedding: Float32, position: int) -> Float32:
        """One pass over one token, embedding [D], at `position`: reads and writes the first set only."""
        ...

    def step_token(self, embedding: Float32, position: int) -> int:
        """As step, but only the id of the largest logit (the lowest of equal ones), found where the logits are.

        Raises BackendError where no logit is a usable number.
        """
        ...

    def copy_rows(self, source: State, start: int, stop: int, which: int) -> None:
        """Copy rows start..stop-1 of one set (FIRST or SECOND) of another state of the same back end.

        With FIRST also what steps need to know besides (the rope factors).
        """
        ...

    def rows(self, positions: NDArray[np.int32], which: int) -> list[Float32]:
        """Some rows of one set as they are cached: keys and values in turn, layer by layer, [R, G*E] each.

        For `verify`: it may take its time. Empty for a set that is not kept.
        """
        ...


class Backend(Protocol):
    """The graphs of one bundle on some inference library; the one seam between runtime and accelerators."""

    # Whether states keep both K/V sets, so that a traverse may start behind a prefix.
    prefix_reuse: bool
    # What runs the graphs: library and version, GPU, driver, engines. Another one has to pass the self-test anew.
    identity: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the weights take."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes of the K/V buffers of one state at full context."""
        ...

    def encode_image(self, pixel_values: Float32) -> Features:
        """pixel_values [N, 3, P, P] -> image features [N, T, D], where the back end wants them."""
        ...

    def new_state(self) -> State:
        """New, empty K/V buffers."""
        ...
