"""Keeps the image features of recent pictures, so that a frame is encoded once for all questions.

Axes: N squares of a picture (1, or its tiles), T image tokens per square, D width of the decoder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.backend import Features
from trol_edge.errors import UsageError
from trol_edge.numeric import shown, whole


@dataclasses.dataclass(frozen=True)
class VisionCacheInfo:
    """Contents and counts of a cache."""

    hits: int  # pictures whose features were cached, or just being made for another caller
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
        """Make a cache. capacity_bytes bounds all features, 0 keeps none; UsageError unless it is an int >= 0."""
        capacity = whole(capacity_bytes, 0)
        if capacity is None:
            raise UsageError(
                f"vision_cache_bytes should be a whole number >= 0 (0: off), found {shown(capacity_bytes)}"
            )
        self._capacity, self._bytes = capacity, 0
        self._hits = self._misses = 0
        self._entries: OrderedDict[bytes, Features] = OrderedDict()
        self._under_way: dict[bytes, Future[Any]] = {}
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

        One caller encodes, and others that ask for the same key meanwhile wait for it. If it fails, its caller gets
        the error and one of the others tries.
        """
        while True:
            with self._lock:
                if key in self._entries:
                    self._hits += 1
                    self._entries.move_to_end(key)
                    return self._entries[key]
                other = self._under_way.get(key)
                if other is None:
                    self._misses += 1
                    mine = self._under_way[key] = Future()
            if other is None:
                return self._encode(key, encode, mine)
            features: Features | None = other.result()
            if features is not None:
                with self._lock:
                    self._hits += 1
                return features

    def _encode(self, key: bytes, encode: Callable[[], Features], mine: Future[Any]) -> Features:
        features = None
        try:
            features = encode()
            if isinstance(features, np.ndarray):
                features.flags.writeable = False
            return features
        finally:
            with self._lock:
                del self._under_way[key]
                if features is not None and features.nbytes <= self._capacity:
                    self._entries[key] = features
                    self._bytes += features.nbytes
                    while self._bytes > self._capacity:
                        self._bytes -= self._entries.popitem(last=False)[1].nbytes
            mine.set_result(features)  # None if encoding failed

    def clear(self) -> None:
        """Forget all features, but keep counting."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0
