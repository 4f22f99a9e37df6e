"""Chooses the next token from a row of logits, greedily or drawn with the usual filters. NumPy only.

The filters run in the order of Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from trol_edge.errors import BackendError, UsageError
from trol_edge.numeric import real, shown, whole

__all__ = ["Sampler", "SamplingParams", "best_token", "log_sum_exp", "top_logprobs"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# With a penalty below this, or above its inverse, logits would leave float32 or become all the same.
LEAST_PENALTY = 1e-6


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy. Raises a UsageError that lists every bad value."""

    temperature: float = 0.0  # 0 is greedy and takes the largest logit, after the repetition penalty
    top_k: int = 0  # keep the k most likely tokens (and any equal to the last of them); 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens whose probabilities reach this sum; 1 keeps all
    min_p: float = 0.0  # drop tokens less likely than this share of the most likely one; 0 keeps all
    repetition_penalty: float = 1.0  # for tokens already seen; it divides positive logits and multiplies negative ones
    seed: int | None = None  # the same seed and logits give the same tokens; None draws a new seed

    def __post_init__(self) -> None:
        """Check, and make plain ints and floats of the numbers."""
        temperature, top_p, min_p, penalty = map(
            real, (self.temperature, self.top_p, self.min_p, self.repetition_penalty)
        )
        checks = [
            ("temperature", temperature, temperature is not None and temperature >= 0, "a number >= 0 (0 is greedy)"),
            ("top_k", whole(self.top_k), whole(self.top_k, 0) is not None, "an integer >= 0 (0 is off)"),
            ("top_p", top_p, top_p is not None and 0 < top_p <= 1, "a number > 0 and <= 1 (1 is off)"),
            ("min_p", min_p, min_p is not None and 0 <= min_p <= 1, "a number from 0 (off) to 1"),
            (
                "repetition_penalty",
                penalty,
                penalty is not None and LEAST_PENALTY <= penalty <= 1 / LEAST_PENALTY,
                f"a number from {LEAST_PENALTY:g} to {1 / LEAST_PENALTY:g} (1 is off)",
            ),
            (
                "seed",
                whole(self.seed),
                self.seed is None or whole(self.seed, 0) is not None,
                "None or an integer >= 0",
            ),
        ]
        problems = [
            f"{name} {shown(getattr(self, name))} should be {want}" for name, _, good, want in checks if not good
        ]
        if problems:
            raise UsageError(f"sampling: {'; '.join(problems)}")
        for name, found, _, _ in checks:
            object.__setattr__(self, name, found)


class Sampler:
    """Chooses tokens for one answer. Its only state is the random state of that answer."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)

    def sample(self, logits: F32, seen: Iterable[int] = ()) -> int:
        """Return the id of the next token.

        `logits` is float32 [V] (not changed; -inf masks a token). `seen` are the ids of prompt and answer so far. They
        are read only with a repetition penalty, which ignores ids of V and above (the image token).
        Raises BackendError if the largest logit is NaN or infinite, because there is no next token then.
        """
        params = self._params
        best = best_token(logits)
        if params.repetition_penalty != 1.0:
            logits = _penalise(logits, seen, params.repetition_penalty)
            best = int(np.argmax(logits))
        if params.temperature == 0:
            return best
        ids, shares = _candidates(logits, params)
        cumulative = np.cumsum(shares)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(drawn, len(ids) - 1)])


def log_sum_exp(logits: F32) -> float:
    """The natural log of the sum of exp(logits), in double precision. A token's logprob is its logit minus this."""
    values = logits.astype(np.float64)
    most = float(values.max())
    return most + math.log(float(np.exp(values - most).sum()))


def top_logprobs(logits: F32, count: int, normaliser: float) -> tuple[tuple[int, float], ...]:
    """(token id, logprob) of the `count` likeliest tokens of logits [V], likeliest first, lowest id first if equal."""
    if count == 0:
        return ()
    ids = (
        np.flatnonzero(logits >= np.partition(logits, -count)[-count])
        if count < len(logits)
        else np.arange(len(logits))
    )
    ids = ids[np.argsort(-logits[ids], kind="stable")][:count]
    return tuple((int(i), float(logits[i]) - normaliser) for i in ids)


def best_token(logits: F32) -> int:
    """The id of the largest logit of [V], the lowest among equal ones. Raises BackendError if it is NaN or infinite."""
    # argmax returns the first NaN if there is one, so checking one value is enough
    best = int(np.argmax(logits))
    value = float(logits[best])
    if math.isfinite(value):
        return best
    if value == -math.inf:
        raise BackendError("all logits are -inf, so there is no next token; let the mask allow at least one")
    raise BackendError(
        f"logit {best} of {len(logits)} is {value}: the graph computed no usable numbers; "
        "run it in a higher precision, or export the bundle again and verify it"
    )


def _penalise(logits: F32, seen: Iterable[int], penalty: float) -> F32:
    ids = np.fromiter(seen, np.int64)
    ids = ids[(ids >= 0) & (ids < len(logits))]
    penalised: F32 = logits.copy()
    old = logits[ids]  # a repeated id is penalised once, because each copy is computed from the old logit
    penalised[ids] = np.where(old < 0, old * np.float32(penalty), old / np.float32(penalty))
    return penalised


def _candidates(logits: F32, params: SamplingParams) -> tuple[Ids, F64]:
    """The ids that pass every filter, most likely first, and their likelihood relative to the first one."""
    ids: Ids = np.flatnonzero(logits > -np.inf).astype(np.int64)
    if 0 < params.top_k < len(ids):
        kept = logits[ids]
        ids = ids[kept >= np.partition(kept, -params.top_k)[-params.top_k]]
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    # relative to the largest logit and in double precision, so that no temperature can overflow
    values = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature gives -inf, whose share is 0
        shares = np.exp((values - values[0]) / params.temperature)
    keep = len(ids)
    if params.top_p < 1:
        cumulative = np.cumsum(shares)
        keep = 1 + int(np.searchsorted(cumulative, params.top_p * cumulative[-1], side="left"))
    if params.min_p > 0:
        keep = min(keep, int(np.searchsorted(-shares, -params.min_p, side="right")))
    return ids[:keep], shares[:keep]
