"""The token embedding table of a bundle."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import EMBEDDING, WEIGHTS
from trol_edge.bundle.weights import to_float32
from trol_edge.errors import BundleError

Float32 = NDArray[np.float32]


class Embeddings:
    """The token embedding table, in memory as it is stored. Rows are converted to float32 on access."""

    def __init__(self, bundle: Bundle, table: NDArray[Any] | None = None, verify: bool = True) -> None:
        """table: as a back end has read it; None: it is read here. verify: hash the file meanwhile."""
        file = bundle.weights()
        if EMBEDDING not in file.tensors:
            raise BundleError(f"{file.path}: lacks {EMBEDDING}; export the bundle again")
        self._dtype = file.tensors[EMBEDDING].dtype
        if table is None:
            sha256 = bundle.manifest.files[WEIGHTS].sha256 if verify else None
            table = file.load((), sha256, stored=[EMBEDDING])[EMBEDDING]
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, ids: Any) -> Float32:
        """Look up ids, an int or int array [S]; returns float32 [D] or [S, D]."""
        return to_float32(self._table[ids], self._dtype)
