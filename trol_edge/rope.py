"""Rope tables of one sequence, whose rows are its cache's rows, for tokens whose positions are others than their rows.

Graphs look up the rotary embedding of a token at its row in the cache. Where tokens before it were left out, its
position is a later one, so a sequence gets tables of its own, with the rows of the shared tables put where its tokens
are. Keys are cached rotated, so only the rows that are being written have to be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

TABLES = ("rope.cos", "rope.sin")  # [rows, E/2] each, stored beside the weights


class RopeRows:
    """Copies of the tables, [rows, E/2] each, in `own`, whose rows `place` chooses."""

    def __init__(self, tables: Mapping[str, NDArray[Any]]) -> None:
        self._shared = dict(tables)
        self.own = {name: np.array(table, order="C") for name, table in tables.items()}
        self._held = np.arange(min(len(table) for table in tables.values()))  # the shared row in each of ours

    def place(self, first: int, count: int, rows: NDArray[np.int64] | int | None) -> bool:
        """Put these rows of the shared tables into `count` of ours, from `first` on; None: the same rows as ours.

        Returns whether that changed ours.
        """
        part = slice(first, first + count)
        wanted = np.arange(first, first + count) if rows is None else np.atleast_1d(rows)
        if np.array_equal(self._held[part], wanted):
            return False
        for name, table in self._shared.items():
            self.own[name][part] = table[wanted]
        self._held[part] = wanted
        return True
