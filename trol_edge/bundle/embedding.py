"""The token embedding table of a bundle, which may have 8 bits and a scale per row."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import EMBEDDING, EMBEDDING_SCALE, WEIGHTS
from trol_edge.bundle.weights import FLOATS, to_float32
from trol_edge.errors import BundleError

Float32 = NDArray[np.float32]


def embedding_names(tensors: Collection[str]) -> set[str]:
    """The tensors of a weights file that make up the table."""
    return {EMBEDDING, EMBEDDING_SCALE} & set(tensors)


class Embeddings:
    """The token embedding table, in memory as it is stored. Rows are converted to float32 on access."""

    def __init__(self, bundle: Bundle, arrays: Mapping[str, NDArray[Any]] | None = None, verify: bool = True) -> None:
        """arrays: as a back end has read them (see `embedding_names`); None: they are read here. verify: hash the file
        meanwhile."""
        file = bundle.weights()
        if EMBEDDING not in file.tensors:
            raise BundleError(f"{file.path}: lacks {EMBEDDING}; export the bundle again")
        self._dtype = file.tensors[EMBEDDING].dtype
        if arrays is None:
            sha256 = bundle.manifest.files[WEIGHTS].sha256 if verify else None
            arrays = file.load((), sha256, stored=embedding_names(file.tensors))
        self._table, self._scale = arrays[EMBEDDING], arrays.get(EMBEDDING_SCALE)
        if self._scale is None and self._dtype not in FLOATS:
            raise BundleError(f"{file.path}: lacks {EMBEDDING_SCALE}; export the bundle again")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, ids: Any) -> Float32:
        """Look up ids, an int or int array [S]; returns float32 [D] or [S, D]."""
        rows = to_float32(self._table[ids], self._dtype)
        return rows if self._scale is None else rows * self._scale[ids, None]
