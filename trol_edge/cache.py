"""Copy-on-write for K/V caches: a fork shares its parent's rows until one of the two would overwrite them.

A back end's `State` is plain buffers. A `Cache` is a State that may borrow the first rows of another one. Each set
(first pass, second pass) is copied when the borrower first writes to it. The owner continues to write in place after
the borrowed rows, and moves to new buffers only if it would overwrite them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.backend import FIRST, SECOND, Backend, Placed, State

Float32 = NDArray[np.float32]


class _Body:
    """A State with the Cache that may write it, and the caches that rely on its first rows."""

    def __init__(self, state: State, owner: Cache) -> None:
        self.state = state
        self.owner: Any = weakref.ref(owner)
        self.readers: list[tuple[Any, int, int]] = []  # (weak reference to a Cache, which set, rows)

    def relied_on(self, which: int) -> int:
        """The number of rows of a set that other caches still read."""
        self.readers = [entry for entry in self.readers if entry[0]() is not None]
        return max((rows for _, kind, rows in self.readers if kind == which), default=0)

    def drop(self, cache: Cache, which: int) -> None:
        """Forget that a cache reads a set."""
        self.readers = [entry for entry in self.readers if entry[0]() is not cache or entry[1] != which]


_lock = threading.Lock()  # forks may be in several threads; it guards bookkeeping only, not the copying of rows


class Cache:
    """The K/V rows of one sequence. Not thread-safe, but forks of one cache may be used in different threads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._body: _Body | None = _Body(backend.new_state(), self)
        self._borrowed: dict[int, tuple[_Body, int]] = {}  # set -> (body with its first rows, their number)

    @property
    def state(self) -> State | None:
        """The State that this cache writes, or None while a fork has written nothing."""
        return None if self._body is None else self._body.state

    def fork(self, first: int, second: int) -> Cache:
        """Make a cache that shares rows 0..first-1 of the first set and 0..second-1 of the second; copies nothing."""
        twin = Cache.__new__(Cache)
        twin._backend, twin._body, twin._borrowed = self._backend, None, {}
        with _lock:
            for which, rows in ((FIRST, first), (SECOND, second if self._backend.prefix_reuse else 0)):
                lender = self._borrowed[which][0] if which in self._borrowed else self._body
                if rows and lender is not None:
                    twin._borrow(lender, which, rows)
        return twin

    def traverse(
        self,
        embeddings: Float32,
        image_mask: NDArray[np.bool_] | None,
        long_rope: bool,
        start: int,
        pictures: Sequence[Placed],
        rotary: NDArray[np.int64] | None = None,
    ) -> Float32:
        """See State. Rows 0..start-1 of both sets must be filled."""
        state = self._writable(start, start, both=True)
        return state.traverse(embeddings, image_mask, long_rope, start, pictures, rotary)

    def stepping(self, position: int, traversed: int) -> State:
        """The State to step at `position`. Rows 0..position-1 of the first set must be filled.

        traversed: number of valid rows of the second set.
        """
        body = self._body
        if body is not None and not body.readers and FIRST not in self._borrowed:  # the usual case: nothing is shared
            return body.state
        return self._writable(position, traversed, both=False)

    def copy_rows(self, source: Cache, start: int, stop: int, traversed: int) -> None:
        """Copy rows start..stop-1 of the first set, and start..traversed-1 of the second, from another cache."""
        both = self._backend.prefix_reuse and traversed > start
        state = self._writable(start, min(start, traversed), both)
        for which, end in ((FIRST, stop), (SECOND, traversed)) if both else ((FIRST, stop),):
            body = source._borrowed[which][0] if which in source._borrowed else source._body
            if body is not None and end > start:
                state.copy_rows(body.state, start, end, which)

    def _writable(self, start: int, traversed: int, both: bool) -> State:
        """The State whose rows from `start` on may be written, after borrowed rows below them have been copied."""
        sets = (FIRST, SECOND) if both else (FIRST,)
        with _lock:
            self._adopt()
            body = self._body
            if body is not None and any(start < body.relied_on(which) for which in sets):
                # Become one of the readers of these rows, then leave them. The order matters for Ctrl-C.
                for which, rows in ((FIRST, start), (SECOND, min(start, traversed))):
                    if rows and which not in self._borrowed and (which == FIRST or self._backend.prefix_reuse):
                        self._borrow(body, which, rows)
                self._body, body.owner = None, lambda: None
        if self._body is None:
            self._body = _Body(self._backend.new_state(), self)
        state = self._body.state
        for which in sets:
            if which in self._borrowed:
                lender, rows = self._borrowed[which]
                if min(rows, start):
                    state.copy_rows(lender.state, 0, min(rows, start), which)
                with _lock:
                    del self._borrowed[which]
                    lender.drop(self, which)
        return state

    def _adopt(self) -> None:
        """Take over borrowed rows whose owner is gone. Free of copies if we write only after other readers' rows."""
        lenders = {id(body): body for body, _ in self._borrowed.values()}
        if self._body is not None or len(lenders) != 1:
            return
        (body,) = lenders.values()
        if body.owner() is None:
            sets = tuple(self._borrowed)
            self._body, body.owner, self._borrowed = body, weakref.ref(self), {}
            for which in sets:
                body.drop(self, which)

    def _borrow(self, body: _Body, which: int, rows: int) -> None:
        body.readers.append((weakref.ref(self), which, rows))
        self._borrowed[which] = (body, rows)
