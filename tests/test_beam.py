"""Beam search: the rules against a recomputing reference and against all answers there are; golden through sessions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest

from tests import cases, prompts
from tests.cases import Array
from tests.golden import GOLDEN
from tests.prompts import STEPS, Prompts
from trol_edge.answering.beam import BeamSearch, Hypothesis, SessionBeams, search
from trol_edge.errors import UsageError
from trol_edge.runtime import Runtime

Model = Callable[[tuple[int, ...]], Array]  # answer so far -> logits [V]
pytestmark = pytest.mark.usefixtures("no_gradients")
GOLDEN_BEAMS = ("internlm2-gqa-image/main/0", "internlm2-text/main/0", "phi3-text/main/0", "phi3-tile1/main/0")


def toy(seed: int, vocabulary: int, sharpness: float = 2.0) -> Model:
    """A model whose logits depend on the whole answer so far."""

    def logits(answer: tuple[int, ...]) -> Array:
        return np.random.default_rng((seed, *answer)).normal(size=vocabulary) * sharpness

    return logits


def log_softmax(logits: Array) -> Array:
    return np.asarray(logits - np.logaddexp.reduce(logits), np.float64)


def run(model: Model, rules: BeamSearch) -> Hypothesis:
    """Beams that are recomputed from their tokens."""
    beams: list[tuple[int, ...]] = [()]
    while (chosen := rules.advance(np.stack([model(beam) for beam in beams]))) is not None:
        beams = [(*beams[parent], token) for parent, token in zip(*chosen, strict=True)]
    return rules.best()


def reference(
    model: Model, width: int, most: int, ends: Collection[int], penalty: float, early: bool
) -> tuple[tuple[int, ...], float]:
    """transformers 4.41's search in the plainest words: every beam a (sum of log-probabilities, tokens)."""
    running = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []

    def finish(total: float, tokens: tuple[int, ...], length: int) -> None:
        score = total / length**penalty
        if len(finished) < width or score > min(finished)[0]:
            finished.append((score, tokens))
            if len(finished) > width:
                finished.remove(min(finished))

    for length in range(1, most + 1):
        candidates = [
            (total + float(p), tokens, token)
            for total, tokens in running
            for token, p in enumerate(log_softmax(model(tokens)))
        ]
        candidates.sort(key=lambda c: -c[0])
        candidates = candidates[: max(2, 1 + len(ends)) * width]
        best = candidates[0][0]
        running = []
        for rank, (total, tokens, token) in enumerate(candidates):
            if token in ends:
                if rank < width:
                    finish(total, tokens, length)
            else:
                running.append((total, (*tokens, token)))
            if len(running) == width:
                break
        if len(finished) == width and (early or min(finished)[0] >= best / length**penalty):
            break
    else:
        for total, tokens in running:
            finish(total, tokens, most)
    score, tokens = max(finished)
    return tokens, score


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("early", [False, True])
def test_rules_equal_the_reference(width: int, penalty: float, early: bool) -> None:
    ended = 0
    for seed, ends in itertools.product(range(25), [(), (2,), (0, 3)]):
        model = toy(seed, 9)
        best = run(model, BeamSearch(width, 7, ends, penalty, early))
        tokens, score = reference(model, width, 7, ends, penalty, early)
        assert best.token_ids == tokens
        assert best.score == pytest.approx(score, rel=1e-12)
        assert best.ended == (len(tokens) < 7)
        ended += best.ended
    assert ended > 5


def test_enough_beams_find_the_best_of_all_answers() -> None:
    """Nothing is pruned where there are as many beams as answers."""
    for seed in range(10):
        model, vocabulary, most, end = toy(seed, 4), 4, 3, 1
        best = (-np.inf, ())
        for answer in itertools.chain(*(itertools.product(range(vocabulary), repeat=n) for n in range(1, most + 1))):
            if end in answer[:-1] or (len(answer) < most and answer[-1] != end):
                continue
            total = sum(log_softmax(model(answer[:i]))[token] for i, token in enumerate(answer))
            best = max(best, (total / len(answer), answer))
        found = run(model, BeamSearch(64, most, {end}))
        assert found.token_ids == tuple(t for t in best[1] if t != end)
        assert found.score == pytest.approx(best[0], rel=1e-12)


def test_one_beam_is_greedy_and_more_are_not_worse_here() -> None:
    better = 0
    for seed in range(20):
        model = toy(seed, 12, sharpness=1.0)
        greedy: tuple[int, ...] = ()
        while len(greedy) < 6:
            greedy += (int(model(greedy).argmax()),)
        one, five = (run(model, BeamSearch(n, 6, ())) for n in (1, 5))
        assert one.token_ids == greedy
        better += five.score > one.score
        assert five.score >= one.score - 1e-12 or five.token_ids != one.token_ids
    assert better > 10


def test_equal_candidates_are_taken_in_order() -> None:
    """Deterministic where all logits are equal; more beams than tokens is no error."""
    rules = BeamSearch(3, 2, ())
    assert rules.advance(np.zeros((1, 4))) == ([0, 0, 0], [0, 1, 2])
    assert rules.advance(np.zeros((3, 4))) is None
    assert rules.best().token_ids == (0, 0)
    wide = BeamSearch(8, 3, {0})
    assert wide.advance(np.zeros((1, 3))) == ([0, 0], [1, 2])


def test_stop_takes_what_is_there() -> None:
    model = toy(1, 9)
    rules = BeamSearch(3, 50, ())
    with pytest.raises(UsageError, match="not over"):
        rules.best()
    chosen = rules.advance(model(())[None])
    assert chosen is not None
    rules.stop()
    assert rules.best() == Hypothesis((chosen[1][0],), pytest.approx(log_softmax(model(())).max()), False)
    assert rules.advance(model(())[None]) is None


@pytest.mark.parametrize(("beams", "tokens"), [(0, 5), (5, 0), (True, 5), (2.0, 5), (-1, 5)])
def test_bad_numbers(beams: Any, tokens: Any) -> None:
    with pytest.raises(UsageError, match=r"(num_beams|max_new_tokens) should be a whole number above 0, found"):
        BeamSearch(beams, tokens, ())


def test_golden_beams_are_all_here() -> None:
    with_beams = {n for n in prompts.names() if not n.startswith("trol-") and "beam5_ids" in keys(n)}
    assert with_beams == set(GOLDEN_BEAMS)


def keys(name: str) -> set[str]:
    case, run_name, _ = name.split("/")
    return {key.split("/")[1] for key in np.load(GOLDEN / case / "expected.npz") if key.startswith(f"{run_name}/")}


# One of each family with both K/V sets or one; the others are slow.
QUICK_BEAMS = {("internlm2-text/main/0", True), ("phi3-tile1/main/0", False)}


@pytest.mark.parametrize(
    ("name", "reuse"),
    [
        pytest.param(name, reuse, marks=() if (name, reuse) in QUICK_BEAMS else pytest.mark.slow)
        for name in GOLDEN_BEAMS
        for reuse in (True, False)
    ],
)
def test_golden_beams(name: str, reuse: bool, load: Prompts) -> None:
    """The authors' benchmark setting, five beams; with one K/V set too. The session holds the prompt again after it."""
    prompt = load(name)
    runtime = prompt.runtime if reuse else Runtime(load.bundle(name.split("/")[0]), threads=1, prefix_reuse=False)
    session = runtime.session()
    logits = session.prefill(prompt.ids, prompt.pixels)
    ends = {runtime.bundle.manifest.spec.eos_token_id}
    best = search(session, logits, num_beams=5, max_new_tokens=STEPS, end_ids=ends)
    assert list(best.token_ids) == prompt.expected["beam5_ids"].tolist()
    assert best.score == pytest.approx(float(prompt.expected["beam5_score"]), abs=1e-5)
    assert session.length == session.traversed == prompt.length
    greedy = [int(logits.argmax())]
    while len(greedy) < STEPS:
        greedy.append(int(session.step(greedy[-1]).argmax()))
    assert greedy == prompt.expected["cached_ids"].tolist()


def test_caches_are_reordered(load: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random parents, doubled and dropped: each beam's logits are those of its own tokens; only answers are copied."""
    prompt = load("internlm2-text/main/0")
    session, alone = prompt.runtime.session(), prompt.runtime.session()
    logits = session.prefill(prompt.ids)
    alone.prefill(prompt.ids)
    beams = SessionBeams(session, 4)
    random = np.random.default_rng(3)
    answers: list[tuple[int, ...]] = [()]
    copied: list[tuple[int, int]] = []
    kind: Any = type(session.cache.state)
    copy = kind.copy_rows
    monkeypatch.setattr(kind, "copy_rows", lambda s, o, a, b, which: (copied.append((a, b)), copy(s, o, a, b, which)))
    for step in range(12):
        if step == 3:  # by now every beam has written, so each has rows of its own
            copied.clear()
        parents = random.integers(len(answers), size=4 if step < 9 else 3).tolist()
        tokens = random.integers(3, 40, size=len(parents)).tolist()
        found = beams.advance(parents, tokens)
        answers = [(*answers[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        for answer, ours in zip(answers, found, strict=True):
            alone.truncate(prompt.length)
            for token in answer:
                logits = alone.step_view(token)
            assert cases.difference(ours, logits) <= 1e-6
    assert copied and all(prompt.length <= start < stop <= prompt.length + 12 for start, stop in copied)


def test_search_ends_where_it_must(load: Prompts) -> None:
    """At the context's end, and when on_step says so; the answer is the best of the running beams."""
    prompt = load("internlm2-dynamic-rope/crossing/0")
    session = prompt.runtime.session()
    assert (prompt.length, session.context) == (89, 92)
    logits = session.prefill(prompt.ids)
    best = search(session, logits, num_beams=3, max_new_tokens=50, end_ids=())
    assert len(best.token_ids) == 4 and not best.ended  # three in the cache, and the one that follows them
    calls: list[int] = []
    best = search(
        session,
        logits,
        num_beams=3,
        max_new_tokens=50,
        end_ids=(),
        on_step=lambda: bool(calls.append(1) or len(calls) == 2),
    )
    assert len(best.token_ids) == 2 and len(calls) == 2
    assert session.length == 89
