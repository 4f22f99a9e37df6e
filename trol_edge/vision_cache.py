"""Image features of the pictures seen last: a frame is encoded once, whoever asks about it.

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


@dataclasses.dataclass(frozen=True)
class VisionCacheInfo:
    """What a cache holds and how often it was asked."""

    hits: int  # pictures whose features were there, or were being made for someone else
    misses: int  # pictures that had to be encoded
    entries: int
    bytes: int
    capacity_bytes: int


def content_key(picture: NDArray[np.uint8], salt: str) -> bytes:
    """A hash of the pixels of a picture (uint8 [H, W, 3], as `images.load_rgb` gives it, any strides) and of `salt`.

    Bytes are read where they lie, so a picture held in RGB and the same one held in BGR have different keys.
    """
    order = "rgb"
    if picture.strides[2] < 0:
        picture, order = picture[:, :, ::-1], "bgr"
    # sha256, because it is the fastest of the standard library where the processor helps (x86-64, ARMv8)
    digest = hashlib.sha256(f"{salt} {picture.shape} {order} ".encode())
    if picture.flags.c_contiguous:
        digest.update(picture.data)
    elif picture.shape[0] and picture[0].flags.c_contiguous:  # a part cut out of a larger frame
        for row in picture:
            digest.update(row.data)
    else:
        digest.update(np.ascontiguousarray(picture).data)
    return digest.digest()


class VisionCache:
    """Features by key, least recently used out first. Threads may share it.

    It holds what the back end made: arrays, or device memory, which its capacity bounds then.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """capacity_bytes: of all features together; 0 keeps none. Raises UsageError for other than an int >= 0."""
        if not isinstance(capacity_bytes, int) or isinstance(capacity_bytes, bool) or capacity_bytes < 0:
            raise UsageError(f"vision_cache_bytes should be a whole number >= 0 (0: off), found {capacity_bytes!r}")
        self._capacity, self._bytes = capacity_bytes, 0
        self._hits = self._misses = 0
        self._entries: OrderedDict[bytes, Features] = OrderedDict()
        self._under_way: dict[bytes, Future[Any]] = {}
        self._lock = threading.Lock()

    @property
    def info(self) -> VisionCacheInfo:
        """Counts so far."""
        with self._lock:
            return VisionCacheInfo(self._hits, self._misses, len(self._entries), self._bytes, self._capacity)

    def peek(self, key: bytes) -> Features | None:
        """The features if they are here; counts for nothing."""
        with self._lock:
            return self._entries.get(key)

    def get(self, key: bytes, encode: Callable[[], Features]) -> Features:
        """Features [N, T, D], read-only, of the picture with this key; `encode` makes them where they are missing.

        One caller encodes; others that ask for the same key meanwhile wait for it. Where it fails, its caller gets
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
            mine.set_result(features)  # None: it failed

    def clear(self) -> None:
        """Forget all features; the counts go on."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0
