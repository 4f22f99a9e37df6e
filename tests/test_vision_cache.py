"""The vision cache: keys by content, least recently used out first, one encoding for many askers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from trol_edge.errors import BackendError, UsageError
from trol_edge.prompt.images import load_rgb
from trol_edge.vision_cache import VisionCache, VisionCacheInfo, content_key


def frame(seed: int = 0, height: int = 12, width: int = 16) -> Any:
    """Noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def features(kilobytes: int = 1) -> Any:
    """Features of `kilobytes` KiB."""
    return np.zeros((1, kilobytes * 256, 1), np.float32)


def test_keys_are_content_not_address() -> None:
    """Copies and views of the same pixels agree; a pixel, a size or a salt makes another key."""
    picture = frame()
    key = content_key(picture, "spec")
    assert content_key(picture.copy(), "spec") == key
    padded = np.zeros((20, 30, 3), np.uint8)
    padded[3:15, 5:21] = picture
    assert content_key(padded[3:15, 5:21], "spec") == key  # rows apart
    assert content_key(np.asfortranarray(picture), "spec") == key
    assert content_key(picture[::-1][::-1], "spec") == key
    changed = picture.copy()
    changed[5, 5, 1] ^= 1
    others = [
        content_key(changed, "spec"),
        content_key(picture, "other spec"),
        content_key(picture.reshape(16, 12, 3), "spec"),
        content_key(picture[::-1], "spec"),
        content_key(picture[:, ::-1], "spec"),
        content_key(load_rgb(picture, "bgr"), "spec"),
    ]
    assert len({key, *others}) == 7


def test_bgr_frames_have_a_key_of_their_own_that_is_stable() -> None:
    """Read where they lie; the same camera frame twice is one key."""
    bgr = frame()
    assert content_key(load_rgb(bgr, "bgr"), "") == content_key(load_rgb(bgr.copy(), "bgr"), "")
    assert content_key(load_rgb(bgr[2:, 3:], "bgr"), "") == content_key(load_rgb(bgr[2:, 3:].copy(), "bgr"), "")


def test_hits_misses_and_read_only_features() -> None:
    """The second ask encodes nothing, and nobody can change what others get."""
    cache, made = VisionCache(1 << 20), []  # type: VisionCache, list[Any]

    def encode() -> Any:
        made.append(features())
        return made[-1]

    first = cache.get(b"a", encode)
    assert cache.get(b"a", encode) is first
    assert cache.peek(b"a") is first
    assert cache.peek(b"b") is None
    assert len(made) == 1
    assert cache.info == VisionCacheInfo(hits=1, misses=1, entries=1, bytes=1024, capacity_bytes=1 << 20)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_least_recently_used_goes_first() -> None:
    """Three of 1 KiB fit; a hit keeps an entry alive; one that is larger than all is not kept."""
    cache = VisionCache(3 * 1024)
    for key in (b"a", b"b", b"c"):
        cache.get(key, features)
    cache.get(b"a", features)
    cache.get(b"d", features)
    assert [cache.peek(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    cache.get(b"large", lambda: features(4))
    assert cache.peek(b"large") is None
    assert (cache.info.entries, cache.info.bytes) == (3, 3072)
    cache.get(b"two", lambda: features(2))
    assert (cache.info.entries, cache.info.bytes) == (2, 3072)
    cache.clear()
    assert (cache.info.entries, cache.info.bytes) == (0, 0)


def test_a_cache_of_nothing() -> None:
    """0 turns it off."""
    cache = VisionCache(0)
    assert cache.get(b"a", features) is not cache.get(b"a", features)
    assert cache.info == VisionCacheInfo(hits=0, misses=2, entries=0, bytes=0, capacity_bytes=0)
    for wrong in (-1, 1.5, True, None, "1"):
        with pytest.raises(UsageError, match="vision_cache_bytes"):
            VisionCache(wrong)  # type: ignore[arg-type]


def test_an_encoding_that_ends_early_is_waited_for_by_nobody() -> None:
    """Failed, interrupted, or still under way elsewhere: the next one who asks encodes."""
    cache, begun, go = VisionCache(1 << 20), threading.Event(), threading.Event()

    def ends(error: BaseException) -> Any:
        raise error

    for error in (BackendError("planted"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            cache.get(b"a", lambda error=error: ends(error))
        assert cache.peek(b"a") is None

    def slow() -> Any:
        begun.set()
        go.wait(60)
        return features()

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get, b"a", slow)
        begun.wait(60)
        mine = cache.get(b"a", features)
        assert not first.done()
        go.set()
        assert first.result(60).shape == mine.shape
    assert (cache.info.entries, cache.info.bytes) == (1, mine.nbytes)
