"""Chooses the image tokens of a picture that enter a prompt, without training and at run time.

The tokens that are kept are those farthest from one another and from the picture's mean, so what looks alike (a wall, a
table, the sky) is seen a few times instead of hundreds of times. It is farthest-point sampling that takes many points
at a time, on the channels that vary most; docs/decisions.md has what it was chosen over.
Axes: T image tokens of a picture or tile, D width of the decoder, C channels, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trol_edge.errors import UsageError
from trol_edge.numeric import real, shown

SHARE = "the share of a picture's tokens that is used, above 0 and up to 1 (1: all)"


CHANNELS = 64  # that are compared
SAMPLE = 128  # tokens, about, in which it is seen how much a channel varies
ROUNDS = 8  # in which the tokens are chosen, each after the distances to those of the rounds before it


def kept_rows(features: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The rows, int64 [K] in order, of the `count` tokens among features [T, D] that are to be kept."""
    x = np.asarray(features)
    varied = x[:: max(1, len(x) // SAMPLE)].var(0)
    most = np.sort(np.argsort(-varied, kind="stable")[:CHANNELS])
    x = x[:, most]
    x = x - x.mean(0)  # [T, C]
    squares = np.einsum("tc,tc->t", x, x)
    nearest = squares.copy()  # squared distance to the nearest kept token, first of all to the mean
    kept = np.zeros(0, np.int64)
    for left in range(ROUNDS, 0, -1):
        chosen = np.argsort(-nearest, kind="stable")[: -(-(count - len(kept)) // left)]
        kept = np.concatenate((kept, chosen))
        apart = squares[:, None] + squares[chosen] - 2 * (x @ x[chosen].T)
        nearest = np.minimum(nearest, apart.min(1, initial=np.inf))
        nearest[kept] = -np.inf
    return np.sort(kept)


def count_kept(tokens: int, share: float) -> int:
    """The number of tokens that are kept of a picture or tile, at least one."""
    return max(1, int(tokens * share + 0.5))


def share(value: object) -> float | None:
    """The value as a float; None if it is not a number above 0 and up to 1."""
    found = real(value)
    return found if found is not None and 0 < found <= 1 else None


def shares(image_tokens: float | Sequence[float]) -> float | list[float]:
    """Return a share, or a list of them. Raises UsageError for anything else."""
    if isinstance(image_tokens, (list, tuple)):
        return [checked_share(value) for value in image_tokens]
    return checked_share(image_tokens)


def checked_share(value: object) -> float:
    """Return a share. Raises UsageError for anything else."""
    found = share(value)
    if found is None:
        raise UsageError(f"image_tokens {shown(value)} should be {SHARE}")
    return found
