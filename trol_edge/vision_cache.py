"""Keeps the image features of recent pictures, so that a frame is encoded once for all questions.

Axes: N squares of a picture (1, or its tiles), T image tokens per square, D width of the decoder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trol_edge.backend import Features
from trol_edge.errors import UsageError
from trol_edge.numeric import shown, whole


@dataclasses.dataclass(frozen=True)
class VisionCacheInfo:
    """Contents and counts of a cache."""

    hits: int  # pictures whose features were there
    misses: int  # pictures that had to be encoded
    entries: int
    bytes: int
    capacity_bytes: int


def content_key(picture: NDArray[np.uint8], salt: str) -> bytes:
    """Hash the pixels of a picture (uint8 [H, W, 3], as `images.load_rgb` gives it, any strides) and `salt`.

    Bytes are read in their order in memory, so the same picture has different keys in RGB and in BGR.
    """
    order = "rgb"
    if picture.strides[2] < 0:
        picture, order = picture[:, :, ::-1], "bgr"
    # sha256 is the fastest hash of the standard library on processors with instructions for it (x86-64, ARMv8)
    digest = hashlib.sha256(f"{salt} {picture.shape} {order} ".encode())
    if picture.flags.c_contiguous:
        digest.update(picture.data)
    elif picture.shape[0] and picture[0].flags.c_contiguous:  # a crop of a larger frame
        for row in picture:
            digest.update(row.data)
    else:
        digest.update(np.ascontiguousarray(picture).data)
    return digest.digest()


class VisionCache:
    """Features by key; the least recently used are dropped first. Threads may share it.

    It holds what the back end made, which is arrays or device memory; its capacity bounds either.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """capacity_bytes: of all features together; 0 keeps none. Raises UsageError for other than an int >= 0."""
        capacity = whole(capacity_bytes, 0)
        if capacity is None:
            raise UsageError(
                f"vision_cache_bytes should be a whole number >= 0 (0: off), found {shown(capacity_bytes)}"
            )
        self._capacity = capacity
        self._hits = self._misses = 0
        self._entries: OrderedDict[bytes, Features] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def info(self) -> VisionCacheInfo:
        """The counts so far."""
        with self._lock:
            return VisionCacheInfo(self._hits, self._misses, len(self._entries), self._bytes, self._capacity)

    def peek(self, key: bytes) -> Features | None:
        """Return the features if they are cached, without counting it."""
        with self._lock:
            return self._entries.get(key)

    def get(self, key: bytes, encode: Callable[[], Features]) -> Features:
        """Return the read-only features [N, T, D] of the picture with this key; `encode` makes missing ones.

        Calls of a Runtime take turns, so only one encodes at a time and no caller waits for another's encoding.
        """
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._hits += 1
                self._entries.move_to_end(key)
                return found
            self._misses += 1
        features = encode()
        if isinstance(features, np.ndarray):
            features.flags.writeable = False
        with self._lock:
            if features.nbytes <= self._capacity:
                self._entries[key] = features
            while self._bytes > self._capacity:
                self._entries.popitem(last=False)
        return features

    def clear(self) -> None:
        """Forget all features, but keep counting."""
        with self._lock:
            self._entries.clear()

    @property
    def _bytes(self) -> int:
        """The bytes of all features, counted each time, so that an interrupted call cannot leave a wrong sum."""
        return sum(features.nbytes for features in self._entries.values())
