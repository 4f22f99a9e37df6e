"""Sampling: the filters of Hugging Face in its order, a private seed, and no token from unusable logits."""

import dataclasses
import math

import numpy as np
import pytest

from trol_edge.answering.sampling import Sampler, SamplingParams
from trol_edge.errors import BackendError, UsageError

V = 50


def random_logits(seed=0, size=V, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def reference_probabilities(logits, seen, params):
    """Hugging Face's processors one after the other over the whole vocabulary: slow and obvious. [V]"""
    scores = logits.astype(np.float64)
    for i in set(seen):
        scores[i] *= params.repetition_penalty if scores[i] < 0 else 1 / params.repetition_penalty
    scores = scores / params.temperature

    def softmax():
        return np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()

    if params.top_k:
        scores[scores < np.sort(scores)[-min(params.top_k, len(scores))]] = -np.inf
    if params.top_p < 1:
        ascending = np.argsort(scores, kind="stable")
        remove = np.cumsum(softmax()[ascending]) <= 1 - params.top_p
        remove[-1] = False
        scores[ascending[remove]] = -np.inf
    if params.min_p:
        probabilities = softmax()
        scores[probabilities < params.min_p * probabilities.max()] = -np.inf
    return softmax()


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.5, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "repetition_penalty": 1.8},
    {"temperature": 1.2, "repetition_penalty": 0.7},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_distribution_of_the_reference(setting):
    params = SamplingParams(**setting, seed=7)
    logits, seen, draws = random_logits(), [1, 1, 4, 9, 30], 4000
    sampler = Sampler(params)
    counts = np.bincount([sampler.sample(logits, seen) for _ in range(draws)], minlength=V)
    want = reference_probabilities(logits, seen, params)
    assert not counts[want == 0].any()
    assert np.abs(counts / draws - want).max() < 5 * math.sqrt(0.25 / draws)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_same_seed_gives_the_same_tokens(setting):
    def draw(seed):
        sampler = Sampler(SamplingParams(**setting, seed=seed))
        return [sampler.sample(random_logits(i), [3]) for i in range(50)]

    np.random.seed(0)
    first = draw(1)
    np.random.seed(1)
    assert draw(1) == first
    if setting == SETTINGS[0]:
        assert draw(2) != first and draw(None) != draw(None)


def test_the_default_is_greedy():
    logits = random_logits()
    assert SamplingParams().temperature == 0
    assert Sampler(SamplingParams()).sample(logits, [int(np.argmax(logits))]) == np.argmax(logits)
    assert Sampler(SamplingParams(top_k=3, seed=1)).sample(logits) == np.argmax(logits)
    tied = np.array([0, 5, 5], np.float32)
    assert Sampler(SamplingParams()).sample(tied) == 1


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    assert sampler.sample(np.array([4.0, 3.0, 1.0], np.float32), [0]) == 1
    assert sampler.sample(np.array([-4.0, -3.0, -9.0], np.float32), [1, 1]) == 0
    assert sampler.sample(np.array([4.0, 2.1, 1.0], np.float32), [0, 0, 0]) == 1  # 4 / 2 once, not 4 / 8
    assert Sampler(SamplingParams(repetition_penalty=1.8)).sample(np.array([4.0, 2.1], np.float32), [0, 0, 0]) == 0


def test_seen_ids_beyond_the_logits_count_for_nothing():
    """The image token of internlm2 has an embedding but no logit."""
    logits = random_logits()
    sampler = Sampler(SamplingParams(repetition_penalty=5.0))
    assert sampler.sample(logits, [V, V + 7, -1]) == np.argmax(logits)
    assert sampler.sample(logits, np.array([V], np.int64)) == np.argmax(logits)


@pytest.mark.parametrize("setting", [{}, *SETTINGS], ids=str)
def test_logits_are_not_changed_and_masked_tokens_not_drawn(setting):
    logits = random_logits()
    logits[[np.argmax(logits), 3]] = -np.inf
    logits.flags.writeable = False
    before = logits.copy()
    sampler = Sampler(SamplingParams(**setting, seed=0))
    assert not {sampler.sample(logits, [1, 3]) for _ in range(100)} & set(np.flatnonzero(np.isinf(before)))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("setting", [{}, *SETTINGS], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_no_token(setting, bad):
    logits = random_logits()
    logits[17] = bad
    with pytest.raises(BackendError, match=f"logit 17 of 50 is {bad}"):
        Sampler(SamplingParams(**setting)).sample(logits, [17])


@pytest.mark.parametrize("setting", [{}, *SETTINGS], ids=str)
def test_all_masked_is_no_token(setting):
    with pytest.raises(BackendError, match="let the mask allow at least one"):
        Sampler(SamplingParams(**setting)).sample(np.full(V, -np.inf, np.float32))


@pytest.mark.parametrize("temperature", [1e-320, 1e-5, 1e30])
def test_extreme_temperatures_neither_overflow_nor_warn(temperature):
    token = Sampler(SamplingParams(temperature=temperature, top_p=0.9, min_p=0.1, seed=0)).sample(random_logits())
    assert 0 <= token < V
    if temperature < 1:
        assert token == np.argmax(random_logits())


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": None},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": None},
        {"top_k": True},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 0.5},
        {"seed": "0"},
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(bad):
    ((name, value),) = bad.items()
    with pytest.raises(UsageError, match=f"sampling: {name} {value!r} should be "):
        SamplingParams(**bad)


def test_all_bad_values_are_listed_at_once():
    with pytest.raises(UsageError) as error:
        SamplingParams(temperature=-1, top_k=-2, top_p=3, min_p=4, repetition_penalty=-5, seed=-6)
    assert all(f.name in str(error.value) for f in dataclasses.fields(SamplingParams))


def test_numpy_numbers_are_numbers():
    params = SamplingParams(temperature=np.float32(1), top_k=np.int64(3), top_p=np.float64(0.5), seed=np.int64(1))
    assert 0 <= Sampler(params).sample(random_logits()) < V
