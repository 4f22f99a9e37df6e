"""The interface between runtime and accelerators: what a back end does, and the K/V buffers that it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
FIRST, SECOND = 0, 1  # the K/V sets of the first and of the second pass


class Features(Protocol):
    """Image features float32 [N, T, D], or [T, D] for one picture, as an array or in a back end's device memory.

    `numpy.asarray` turns either into an array.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, [N, T, D] or [T, D]."""
        ...

    @property
    def dtype(self) -> Any:
        """The dtype, which is float32."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes of memory."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Placed:
    """Rows `first`..`first + count - 1` of a picture's features [T, D], which replace the tokens `at`, `at + 1` ..."""

    features: Features
    first: int
    at: int
    count: int


class State(Protocol):
    """The K/V buffers of one sequence on some back end. Logits are float32 [V] and may be overwritten by the next call.

    Rows are positions, unless tokens before them were left out. There are two sets of buffers, one for each pass. A
    back end without prefix reuse does not keep the second.
    """

    def traverse(
        self,
        embeddings: Float32,
        image_mask: NDArray[np.bool_] | None,
        long_rope: bool = False,
        start: int = 0,
        pictures: Sequence[Placed] = (),
        rotary: NDArray[np.int64] | None = None,
    ) -> Float32:
        """Run both passes over tokens in rows start..start+S-1, S >= 1, after rows 0..start-1 of both sets.

        embeddings [S, D], image_mask [S] (None: no image tokens). Writes rows start..start+S-1 of both sets; returns
        logits of the last token. start > 0 needs a back end that keeps the second set. long_rope: use the long factor
        set, here and in the steps that follow (only if spec.long_rope is set). pictures: image features that replace
        rows of embeddings, which may be overwritten. rotary: the tokens' positions [S] in the rotary embedding,
        increasing and below the context, if they are not their rows; only if the back end `takes_rotary`.
        """
        ...

    def step(self, embedding: Float32, position: int, rotary: int | None = None) -> Float32:
        """Run one pass over one token, embedding [D], in row `position`; reads and writes the first set only.

        rotary: its position in the rotary embedding, if that is not its row.
        """
        ...

    def step_token(self, embedding: Float32, position: int, rotary: int | None = None) -> int:
        """Like step, but return only the id of the largest logit (the lowest among equal ones), found on the device.

        Raises BackendError if no logit is a usable number.
        """
        ...

    def copy_rows(self, source: State, start: int, stop: int, which: int) -> None:
        """Copy rows start..stop-1 of one set (FIRST or SECOND) of another state of the same back end.

        FIRST also copies what else steps need (the choice of rope factors).
        """
        ...

    def rows(self, positions: NDArray[np.int32], which: int) -> list[Float32]:
        """Return some cached rows of one set: keys and values in turn, layer by layer, [R, G*E] each.

        It is for `verify` and may be slow. It is empty for a set that is not kept.
        """
        ...


class Backend(Protocol):
    """The graphs of one bundle on some inference library, the only interface between runtime and accelerators."""

    # Whether states keep both K/V sets, so that a traverse may start after a prefix.
    prefix_reuse: bool
    # What runs the graphs: library and version, GPU, driver, engines. If it changes, the self-test must pass again.
    identity: str

    # The layers with a second pass in the states that are made from now on. It may be set to fewer than the bundle has,
    # if the back end `takes_traversal`.
    second_layers: tuple[int, ...]

    # The token embedding table as it is stored, with its scales, if it was read (and hashed) with the weights; None:
    # nobody has read it.
    embedding: Mapping[str, NDArray[Any]] | None

    @property
    def takes_rotary(self) -> bool:
        """Whether a token's position may be another than its row, as it is after tokens that were left out."""
        ...

    @property
    def takes_traversal(self) -> bool:
        """Whether it runs layer by layer, so that a second pass can be left out without another export."""
        ...

    @property
    def saturates(self) -> bool:
        """Whether sums of two 8-bit products are clipped here, so that INT8 computes something else than elsewhere."""
        ...

    @property
    def weight_bytes(self) -> int:
        """The bytes of memory that the weights take."""
        ...

    @property
    def cache_bytes(self) -> int:
        """The bytes of the K/V buffers of one state at full context."""
        ...

    def encode_image(self, pixel_values: Float32) -> Features:
        """Encode pixel_values [N, 3, P, P] into image features [N, T, D], in the memory that the back end needs."""
        ...

    def new_state(self) -> State:
        """Make empty K/V buffers."""
        ...

    def run_cut(
        self, name: str, cuts: Collection[str], feeds: Mapping[str, NDArray[Any]], state: Any
    ) -> dict[str, NDArray[Any]] | None:
        """Run a graph that is cut at some values (see trol_edge.bundle.graph_cut), on a state; it is for `verify`.

        feeds: inputs of the graph and of its cuts. Returns `<value>.computed` of every cut, and the graph's outputs but
        the caches, which the state keeps. None if graphs are compiled, or run elsewhere than on this machine's CPU.
        """
        ...
