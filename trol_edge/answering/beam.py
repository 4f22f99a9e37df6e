"""Beam search as the authors' benchmark uses it (num_beams=5), by transformers 4.41's rules over reordered caches.

`BeamSearch` is the algorithm alone, which turns logits into parents and tokens. `SessionBeams` moves sessions
accordingly, and `search` runs the two. Nothing is recomputed, because a beam that continues another one copies the rows
of its answer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trol_edge.errors import UsageError
from trol_edge.numeric import shown, whole
from trol_edge.session import Session

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished answer."""

    token_ids: tuple[int, ...]  # without the end token
    score: float  # natural log-probability of its tokens, end token included, / their number ** length_penalty
    ended: bool  # True if an end token ended it, False if the last step did


class BeamSearch:
    """The rules of the search. Call `advance` with the logits of all beams until it returns None, then `best`.

    Every step takes the 2 * num_beams likeliest continuations of all beams (more if there are several end tokens).
    Those that end are kept as hypotheses if they are among the first num_beams; the first num_beams of the others are
    the next beams. The search is over after max_new_tokens, or when num_beams hypotheses are all at least as good as
    the best running beam would be if it ended now (with early_stopping, as soon as there are num_beams of them).
    """

    def __init__(
        self,
        num_beams: int,
        max_new_tokens: int,
        end_ids: Collection[int],
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> None:
        for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens)):
            if whole(value, 1) is None:
                raise UsageError(f"{name} should be a whole number above 0, found {shown(value)}")
        self.num_beams, self.max_new_tokens, self.end_ids = num_beams, max_new_tokens, frozenset(end_ids)
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self._hypotheses: list[Hypothesis] = []
        self._beams: list[tuple[int, ...]] = [()]
        self._scores: Float64 = np.zeros(1)
        self._over = False

    def advance(self, logits: Float32 | Sequence[Float32]) -> tuple[list[int], list[int]] | None:
        """Make one step with logits [B, V] of the running beams. At first there is one, the prompt.

        Returns (parents, tokens) with num_beams of each, where beam j continues beam parents[j] with tokens[j], or None
        when the search is over. There are fewer beams only if the vocabulary has fewer continuations than that.
        """
        if self._over:
            return None
        scores = _log_softmax(np.asarray(logits, np.float64)) + self._scores[:, None]  # [B, V]
        vocabulary = scores.shape[1]
        kept = min(max(2, 1 + len(self.end_ids)) * self.num_beams, scores.size)
        parents: list[int] = []
        tokens: list[int] = []
        values: list[float] = []
        best = -np.inf
        for rank, (index, value) in enumerate(_largest(scores.reshape(-1), kept)):
            parent, token = divmod(index, vocabulary)
            best = max(best, value)
            if token in self.end_ids:
                if rank < self.num_beams:
                    self._add(self._beams[parent], value, len(self._beams[parent]) + 1, ended=True)
            elif len(tokens) < self.num_beams:
                parents.append(parent)
                tokens.append(token)
                values.append(value)
        length = len(self._beams[0]) + 1
        done = len(self._hypotheses) == self.num_beams and (
            self.early_stopping or self._hypotheses[-1].score >= best / length**self.length_penalty
        )
        self._beams = [(*self._beams[p], t) for p, t in zip(parents, tokens, strict=True)]
        self._scores = np.array(values)
        if done or length == self.max_new_tokens or not tokens:
            self._over = True
            if not done:
                self._keep_running()
            return None
        return parents, tokens

    def stop(self) -> None:
        """End the search as max_new_tokens would, for a deadline or a full context; running beams count as answers."""
        if not self._over:
            self._over = True
            self._keep_running()

    def best(self) -> Hypothesis:
        """The answer. Raises UsageError while the search is still running."""
        if not self._over:
            raise UsageError("the beam search is not over; advance it until it returns None, or stop() it")
        return self._hypotheses[0]

    def _keep_running(self) -> None:
        for beam, score in zip(self._beams, self._scores, strict=True):
            self._add(beam, float(score), max(len(beam), 1), ended=False)

    def _add(self, tokens: tuple[int, ...], log_probability: float, length: int, ended: bool) -> None:
        """Keep the num_beams best hypotheses, best first; among equals the earlier one wins."""
        self._hypotheses.append(Hypothesis(tokens, log_probability / length**self.length_penalty, ended))
        self._hypotheses.sort(key=lambda h: -h.score)
        del self._hypotheses[self.num_beams :]


class Beams(Protocol):
    """Sequences that share a prompt."""

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> Float32 | Sequence[Float32]:
        """Make beam j continue beam parents[j] with tokens[j]; returns logits [B, V] after these tokens."""
        ...


class SessionBeams:
    """Beams as sessions: the given one, which holds the prompt and is used in place, and forks of it.

    Each beam takes one first-pass K/V set. A step of B beams costs B steps, because the graph has one row.
    """

    def __init__(self, session: Session, num_beams: int) -> None:
        self._sessions = [session, *(session.fork() for _ in range(num_beams - 1))]

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> list[Float32]:
        """See Beams. The next call overwrites the arrays."""
        spare = [s for i, s in enumerate(self._sessions) if i not in set(parents)]
        placed: list[Session] = []
        taken: set[int] = set()
        for parent in parents:
            session = self._sessions[parent]
            if parent in taken:  # another beam already continues its session
                session = spare.pop()
                session.become(self._sessions[parent])
            taken.add(parent)
            placed.append(session)
        self._sessions = placed + spare
        return [session.step_view(token) for session, token in zip(placed, tokens, strict=True)]


def search(
    session: Session,
    logits: Float32,
    *,
    num_beams: int,
    max_new_tokens: int,
    end_ids: Collection[int],
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    on_step: Callable[[], bool] | None = None,
) -> Hypothesis:
    """Find the best answer to the prompt that a session holds; `logits` are those of its last token.

    Afterwards the session holds only the prompt again. on_step is called before every step; if it returns True, the
    search ends. A full context ends it too. Raises UsageError for numbers below 1.
    """
    rules = BeamSearch(num_beams, max_new_tokens, end_ids, length_penalty, early_stopping)
    prompt = session.length
    beams: Beams = SessionBeams(session, num_beams)
    current: Float32 | Sequence[Float32] = logits[None]
    try:
        for step in itertools.count():
            chosen = rules.advance(current)
            if chosen is None:
                break
            if prompt + step >= session.limit or (on_step is not None and on_step()):
                rules.stop()
                break
            current = beams.advance(*chosen)
    finally:
        session.truncate(prompt)
    return rules.best()


def _log_softmax(x: Float64) -> Float64:
    shifted = x - x.max(axis=-1, keepdims=True)
    result: Float64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _largest(values: Float64, count: int) -> list[tuple[int, float]]:
    """(index, value) of the `count` largest values in falling order, equal ones in order of index."""
    bound = np.partition(values, len(values) - count)[len(values) - count]
    found = np.flatnonzero(values >= bound)
    order = found[np.lexsort((found, -values[found]))][:count]
    return [(int(i), float(values[i])) for i in order]
