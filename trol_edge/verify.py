"""Replay a bundle's self-test here, on its own target and precision, and compare every stage with the FP32 reference.

Stages run in the order of computation, each on what the one before gave, so the first one out of its budget is where
the fault is; those behind it follow from it. Drift is |here - reference| / |reference| of the vectors of a stage (a
token's keys, a picture token's features, a position's logits less their mean), the root mean square over these.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle import Bundle
from trol_edge.cache import FIRST, SECOND, Backend
from trol_edge.images import preprocess
from trol_edge.selftest import Case, SelfTest
from trol_edge.session import Embeddings
from trol_edge.weights import to_float32

Float32 = NDArray[np.float32]
ROPE = ("rope.cos", "rope.sin")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage. drift is infinite where values are not finite, or where what was compared is no number."""

    name: str
    drift: float
    budget: float
    text: str = ""

    @property
    def good(self) -> bool:
        return self.drift <= self.budget


def drift(here: NDArray[Any], reference: NDArray[Any]) -> float:
    """Root mean square, over the leading axes, of |here - reference| / |reference| along the last one."""
    if here.shape != reference.shape or not np.isfinite(here).all():
        return math.inf
    error, size = here.astype(np.float64) - reference, reference.astype(np.float64)
    e, s = np.square(error).sum(-1), np.square(size).sum(-1)
    return float(np.sqrt(np.mean(e / np.maximum(s, 1e-30))))


def replay(bundle: Bundle, backend: Backend, embeddings: Embeddings, test: SelfTest) -> Iterator[tuple[str, str, float]]:
    """(kind, name, drift) stage by stage."""
    manifest = bundle.manifest
    pixels = preprocess([test.picture], manifest.image)
    yield "pixels", "preprocess", drift(
        pixels[:, :, test.pixel_rows][..., test.pixel_rows].reshape(1, -1), test.pixels.reshape(1, -1)
    )
    features = backend.encode_image(pixels).reshape(-1, manifest.spec.hidden_size)[test.feature_rows]
    yield "vision", "vision", drift(features, test.features)
    forced = test.cases["picture"].forced
    yield "embedding", "embedding", drift(embeddings[forced], test.embeddings)
    for name, case in test.cases.items():
        yield from _case(bundle, backend, embeddings, features, case, name == "long")


def _case(bundle, backend, embeddings, features, case: Case, long: bool):
    state = backend.new_state()
    spec = bundle.manifest.spec
    rows = embeddings[case.ids]
    mask = case.ids == spec.image_token_id
    rows[mask] = features[: int(mask.sum())]
    behind = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else len(rows) // 2
    for part in (slice(0, behind), slice(behind, None)):
        some = mask[part] if mask[part].any() else None
        logits = state.traverse(rows[part], some, long, part.start)
    found = [logits.copy()]
    tag = " (long rope)" if long else ""
    caches = [state.rows(case.positions, which) for which in (FIRST, SECOND)]
    for layer in range(spec.num_layers):
        for which, cache in enumerate(caches):
            for kind in (0, 1):
                got = cache[2 * layer + kind]
                yield "cache", f"decoder.layers.{layer} pass {which + 1} {('keys', 'values')[kind]}{tag}", drift(
                    got, case.cache[which, layer, kind]
                )

    def centred(x):
        return x - x.mean(-1, keepdims=True)

    yield "logits", f"logits{tag}", drift(centred(found[0]), centred(case.logits[0]))
    for i, token in enumerate(case.forced):
        logits = state.step(embeddings[int(token)], len(rows) + i)
        found.append(logits.copy())
    last = np.array([len(rows) + len(case.forced) - 1])
    cache = state.rows(last, FIRST)
    for layer in range(spec.num_layers):
        for kind in (0, 1):
            yield "step", f"step layers.{layer} {('keys', 'values')[kind]}{tag}", drift(
                cache[2 * layer + kind][0], case.step_cache[layer, kind]
            )
    yield "step logits", f"step logits{tag}", drift(centred(found[-1]), centred(case.logits[1]))
    best = [int(x.argmax()) for x in found]
    yield "tokens", f"tokens{tag}", float(sum(a != b for a, b in zip(best, case.best.tolist())))
    print(best, case.best.tolist(), case.margin)
