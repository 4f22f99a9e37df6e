"""What goes on from a cached prefix equals a fresh prefill: every split, chunks, turns, forks, both families."""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, prompts
from tests.cases import Array
from tests.conftest import NANO as NANO_FOLDER
from tests.conftest import slow
from tests.prompts import STEPS, Prompt, Prompts
from tests.test_phi3 import CONTEXT, ORIGINAL
from trol_edge.errors import ContextError, UsageError
from trol_edge.runtime import Runtime
from trol_edge.session import Session

EXACT = 1e-5  # of the largest logit: what the order of a sum may change in FP32
SHORT = 200  # tokens: up to here every split is tried with everything after it
AFTER = 7  # tokens after every split of a longer prompt
NAMES = prompts.names()
TEXT, IMAGE = "internlm2-text/main/0", "internlm2-gqa-image/main/0"
NANO = "trol-nano/scene/0"

pytestmark = pytest.mark.usefixtures("no_gradients")
# Long, and by all that a prefix is made of like the rows of other cases: a picture, a text before it, one after it.
ALIKE = {"internlm2-leftpad-batch/images/0", "internlm2-leftpad-batch/images/1", "internlm2-leftpad-batch/mixed/1"}
# Long, and of a kind that shorter ones show, too: with several pictures, or in a batch.
LONG = {"internlm2-two-images/main/0", "internlm2-gqa-image/main/0", "phi3-tiles/main/0", "phi3-leftpad-batch/images/1"}
every_prompt = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE | LONG else n for n in NAMES]
)


def off(ours: Array, fresh: Array) -> float:
    """Largest difference, of the largest magnitude; infinite where the greedy token differs."""
    if int(ours.argmax()) != int(fresh.argmax()):
        return float("inf")
    return cases.difference(ours, fresh)


def answer(session: Session, logits: Array, tokens: int = STEPS) -> list[int]:
    """Greedy tokens after those that the session holds, up to its limit."""
    ids = [int(logits.argmax())]
    while len(ids) < tokens and session.length < session.limit:
        ids.append(int(session.step_view(ids[-1]).argmax()))
    return ids


def features(prompt: Prompt) -> Array | None:
    """Image features of a prompt's pictures."""
    return None if prompt.pixels is None else prompt.runtime.model.backend.encode_image(prompt.pixels)


def caches(session: Session) -> list[Array]:
    """Both sets on ONNX Runtime: float32 [1, G, C, E] each."""
    state: Any = session.cache.state
    return [*state.cache, *state.second]


# --- every split -----------------------------------------------------------------------------------------------------


@every_prompt
def test_every_split_of_a_prompt(name: str, load: Prompts) -> None:
    """Both passes' keys and values, logits and greedy tokens after every prefix of a prompt.

    Short prompts: for each split the whole rest, and a first part by itself. Longer ones: for each split the next
    tokens, and at some the whole rest.
    """
    prompt = load(name)
    session = prompt.runtime.session()
    found = features(prompt)
    fresh = session.prefill_features(prompt.ids, found)
    rows = [array[:, :, : prompt.length].copy() for array in caches(session)]
    scale = [float(np.abs(array).max()) for array in rows]
    greedy = answer(session, fresh)
    state: Any = session.cache.state
    mask = prompt.ids == prompt.runtime.bundle.manifest.spec.image_token_id
    embeddings = prompt.runtime.model.embeddings[prompt.ids]
    if found is not None:
        embeddings[mask] = found.reshape(-1, embeddings.shape[1])
    long_rope = session.rope == "long"

    def traverse(start: int, stop: int) -> Array:
        part = mask[start:stop] if mask[start:stop].any() else None
        logits: Array = state.traverse(embeddings[start:stop], part, long_rope, start)
        for got, want, largest in zip(caches(session), rows, scale, strict=True):
            difference = np.abs(got[:, :, start:stop] - want[:, :, start:stop]).max()
            assert difference <= EXACT * largest, (start, stop, difference)
        return logits

    short = prompt.length <= SHORT
    edges = np.flatnonzero(np.diff(mask)) + 1  # before and after each run of image tokens
    whole = set(range(1, prompt.length)) if short else {1, 2, *edges, *(edges + 1), prompt.length - 1}
    for split in range(1, prompt.length):
        if short:
            traverse(0, split)
        if split in whole:
            logits = traverse(split, prompt.length)
            assert off(logits, fresh) <= EXACT, split
            session.truncate(prompt.length)
            if short or split == prompt.length - 1:
                assert answer(session, logits) == greedy, split
        else:
            traverse(split, min(split + AFTER, prompt.length))
    for position in range(prompt.length):  # one token at a time, the first included
        logits = traverse(position, position + 1)
    assert off(logits, fresh) <= EXACT


@every_prompt
@pytest.mark.parametrize("chunk", [7, 256, *slow(1, 64)])
def test_chunks(name: str, chunk: int, load: Prompts) -> None:
    """prefill_chunk changes nothing but the number of traverses."""
    prompt = load(name)
    if chunk == 1 and prompt.length > SHORT:
        chunk = prompt.length - 1  # one token after the first chunk; one by one is in the test of splits
    session, calls = prompt.runtime.session(), []
    fresh = session.prefill(prompt.ids, prompt.pixels)
    greedy = answer(session, fresh)
    chunked = prompt.runtime.session(prefill_chunk=chunk)
    logits = chunked.prefill(prompt.ids, prompt.pixels, on_chunk=lambda done, total: calls.append((done, total)))
    assert calls == [(done, prompt.length) for done in range(0, prompt.length, chunk)]
    assert off(logits, fresh) <= EXACT
    assert answer(chunked, logits) == greedy


def test_chunks_without_fused_attention(exported: Callable[..., Path]) -> None:
    """The graphs as they are traced read the positions, which fused attention counts by itself."""
    with Runtime(exported(NANO_FOLDER, lowered=False)) as runtime:
        ids = runtime.tokenize("What is left of the red star?")
        fresh = runtime.session().prefill(ids)
        assert off(runtime.session(prefill_chunk=7).prefill(ids), fresh) <= EXACT


# --- what a robot asks -----------------------------------------------------------------------------------------------


@every_prompt
def test_second_question_next_turn_and_system_prompt(name: str, load: Prompts) -> None:
    """The common prefix is found, and what follows equals a fresh prefill; the first question's answer is in no way."""
    prompt = load(name)
    runtime, ids = prompt.runtime, prompt.ids
    fresh, session = runtime.session(), runtime.session()
    first = session.prefill(ids, prompt.pixels)
    text = ids[~(ids == runtime.bundle.manifest.spec.image_token_id)]
    room = session.limit - len(ids)  # 3 where the context ends soonest
    stepped = min(4, room // 2)
    greedy = answer(session, first, stepped + 1)

    other = np.concatenate((ids[:-5], text[:3][::-1]))  # another question about the same pictures
    want = fresh.prefill(other, prompt.pixels)
    got = session.prefill(other, prompt.pixels, reuse=True)
    assert session.reused == len(ids) - 5 and session.length == len(other)
    assert off(got, want) <= EXACT
    assert answer(session, got) == answer(fresh, want)

    again = session.prefill(ids, prompt.pixels, reuse=True)  # and the first one once more
    assert session.reused == len(ids) - 5
    assert off(again, first) <= EXACT
    same = session.prefill(ids, prompt.pixels, reuse=True)  # the very same: the last token is traversed
    assert session.reused == len(ids) - 1
    assert off(same, first) <= EXACT
    assert answer(session, same, stepped + 1) == greedy

    before = session.rope
    turn = text[: min(9, session.context - len(ids) - stepped)]
    dialogue = np.concatenate((ids, greedy[:-1], turn))  # the last greedy token was never stepped
    want = fresh.prefill(dialogue, prompt.pixels)
    assert session.length == len(ids) + stepped and session.traversed == len(ids)
    got = session.extend(turn)
    assert session.token_ids == dialogue.tolist()
    assert session.traversed == session.length == len(dialogue)
    assert session.rope == fresh.rope
    assert session.reused == (len(ids) if fresh.rope == before else 0)  # other rope factors: all over again
    assert off(got, want) <= EXACT
    assert answer(session, got) == answer(fresh, want)

    head = int((ids == runtime.bundle.manifest.spec.image_token_id).argmax()) if prompt.pixels is not None else 20
    session.prefill(ids[:head])
    got = session.extend(ids[head:], prompt.pixels)
    assert off(got, first) <= EXACT


def test_pictures_are_compared_by_content(load: Prompts) -> None:
    """The same ids with another picture share only what comes before it; the same pixels in a new array share all."""
    prompt = load("internlm2-two-images/main/0")
    assert prompt.pixels is not None
    swapped = np.ascontiguousarray(prompt.pixels[::-1])
    session, fresh = prompt.runtime.session(), prompt.runtime.session()
    image = np.flatnonzero(prompt.ids == prompt.runtime.bundle.manifest.spec.image_token_id)
    session.prefill(prompt.ids, prompt.pixels)
    got = session.prefill(prompt.ids, swapped, reuse=True)
    assert session.reused == image[0]
    assert off(got, fresh.prefill(prompt.ids, swapped)) <= EXACT
    mixed = np.stack((swapped[0], swapped[0]))
    got = session.prefill(prompt.ids, mixed, reuse=True)
    assert session.reused == image[len(image) // 2]  # up to the second picture
    assert off(got, fresh.prefill(prompt.ids, mixed)) <= EXACT
    session.prefill(prompt.ids, mixed.copy(), reuse=True)
    assert session.reused == prompt.length - 1


def test_identities_stand_for_features(load: Prompts) -> None:
    """A caller that keeps features may name them; then the name decides."""
    prompt = load(IMAGE)
    found = features(prompt)
    session = prompt.runtime.session()
    session.prefill_features(prompt.ids, found, [b"frame 1"])
    session.prefill_features(prompt.ids, found, [b"frame 1"], reuse=True)
    assert session.reused == prompt.length - 1
    session.prefill_features(prompt.ids, found, [b"frame 2"], reuse=True)
    assert session.reused == int((prompt.ids == 500).argmax())
    with pytest.raises(UsageError, match="2 identities for 1 picture"):
        session.prefill_features(prompt.ids, found, [b"a", b"b"])
    with pytest.raises(UsageError, match=r"features should be float32 \[N, 1225, 64\]"):
        session.prefill_features(prompt.ids, found[:, :7] if found is not None else None)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("trol-")])
def test_uncached_semantics(name: str, load: Prompts) -> None:
    """Both passes for every answer token, one at a time: the authors' use_cache=False."""
    prompt = load(name)
    session = prompt.runtime.session()
    logits = [session.prefill(prompt.ids, prompt.pixels)]
    while len(logits) < STEPS and session.length < session.context:
        logits.append(session.extend([int(logits[-1].argmax())]))
    count = 4 if name.startswith("internlm2-dynamic-rope/crossing") else STEPS  # see cases.APART
    assert len(logits) == count
    assert [int(row.argmax()) for row in logits] == prompt.expected["nocache_ids"][:count].tolist()
    assert cases.difference(np.stack(logits), prompt.expected["nocache_logits"][:count]) <= cases.TOLERANCE


# --- rope sets -------------------------------------------------------------------------------------------------------


def test_rope_sets_are_never_mixed(load: Prompts) -> None:
    """A prefix with short factors is not gone on from with long ones, nor the other way round."""
    long, short = load("phi3-su-rope/over/0"), load("phi3-su-rope/below/0")
    runtime = long.runtime
    session, fresh = runtime.session(), runtime.session()
    whole = fresh.prefill(long.ids)
    session.prefill(long.ids[: short.length])
    assert (session.rope, fresh.rope) == ("short", "long")
    got = session.prefill(long.ids, reuse=True)
    assert (session.reused, session.rope) == (0, "long")
    assert off(got, whole) <= EXACT
    got = session.prefill(long.ids[:40], reuse=True)
    assert (session.reused, session.rope) == (0, "short")
    assert off(got, fresh.prefill(long.ids[:40])) <= EXACT
    got = session.extend(long.ids[40:])
    assert (session.reused, session.rope, session.length) == (0, "long", long.length)
    assert off(got, whole) <= EXACT
    session.truncate(50)
    got = session.extend(long.ids[50:55])
    assert (session.reused, session.rope) == (0, "short")
    assert off(got, fresh.prefill(long.ids[:55])) <= EXACT
    session.long_context = True
    got = session.extend(long.ids[55:57])
    assert (session.reused, session.rope) == (0, "long")
    fresh.long_context = True
    assert off(got, fresh.prefill(long.ids[:57])) <= EXACT


def test_a_fork_keeps_the_rope_set(load: Prompts) -> None:
    """The first step of a fork, which copies its parent's rows then, reads the same factors."""
    prompt = load("phi3-su-rope/over/0")
    session = prompt.runtime.session()
    logits = session.prefill(prompt.ids)
    fork = session.fork()
    token = int(logits.argmax())
    want = session.step(token)
    assert (session.rope, fork.rope) == ("long", "long")
    assert off(fork.step(token), want) <= EXACT


def test_rope_change_with_pictures(
    load: Prompts,
    phi3_checkpoint: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    """The features of earlier pictures are at hand when everything is traversed again."""
    prompt = load("phi3-su-rope/image/0")
    folder = phi3_checkpoint("phi3-su-rope", original_max_position_embeddings=ORIGINAL)
    runtime = Runtime(exported(folder, "cpu", CONTEXT))
    session, fresh = runtime.session(), runtime.session()
    session.prefill(prompt.ids, prompt.pixels)
    more = np.arange(5, 5 + ORIGINAL - prompt.length)
    session.extend(more)
    assert (session.reused, session.rope, session.length) == (prompt.length, "short", ORIGINAL)
    got = session.extend([7])
    assert (session.reused, session.rope) == (0, "long")
    assert off(got, fresh.prefill(np.concatenate((prompt.ids, more, [7])), prompt.pixels)) <= EXACT


# --- one set only ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["internlm2-gqa-image", "trol-nano"])
def test_without_prefix_reuse(case: str, load: Prompts) -> None:
    """Half the memory, the same answers; what needs the second set is refused by name."""
    prompt = load({"internlm2-gqa-image": IMAGE, "trol-nano": NANO}[case])
    runtime = Runtime(load.bundle(case), threads=1, prefix_reuse=False)
    session, both = runtime.session(), prompt.runtime.session()
    logits = session.prefill(prompt.ids, prompt.pixels)
    want = both.prefill(prompt.ids, prompt.pixels)
    assert off(logits, want) <= 1e-6
    greedy = answer(session, logits)
    assert greedy == answer(both, want)
    state, with_both = (s.cache.state for s in (session, both))
    spec, context = runtime.bundle.manifest.spec, runtime.bundle.manifest.context
    held = [sum(a.nbytes for a in (*s.cache, *s.second)) for s in (state, with_both)]  # type: ignore[union-attr]
    one = 4 * spec.kv_values_per_token * context
    assert held == [one + one // spec.num_layers, 2 * one]
    assert [rt.model.backend.cache_bytes for rt in (runtime, prompt.runtime)] == held  # type: ignore[attr-defined]
    refused: list[tuple[str, Callable[[], object]]] = [
        ("extend needs", lambda: session.extend([5])),
        ("reuse=True needs", lambda: session.prefill(prompt.ids, prompt.pixels, reuse=True)),
        ("prefill_chunk needs", lambda: runtime.session(prefill_chunk=9).prefill(prompt.ids, prompt.pixels)),
    ]
    for message, call in refused:
        with pytest.raises(UsageError, match=rf"{message}.*both passes.*prefix_reuse=True"):
            call()
    assert session.length > prompt.length  # the refused calls left it alone
    session.truncate(prompt.length)  # going back inside the answer needs one set only
    assert answer(session, logits) == greedy
    session.truncate(prompt.length)
    twin = session.fork()
    assert answer(session, logits) == answer(twin, logits) == greedy


# --- truncate, fork, become ------------------------------------------------------------------------------------------


def test_truncate_goes_back(load: Prompts) -> None:
    """To any place in the answer or the prompt, for steps and traverses, without a copy."""
    prompt = load(TEXT)
    session = prompt.runtime.session()
    logits = session.prefill(prompt.ids)
    greedy = answer(session, logits)
    session.truncate(prompt.length + 3)
    assert [int(session.step(greedy[3]).argmax())] == greedy[4:5]
    session.truncate(30)
    assert (session.length, session.traversed) == (30, 30)
    fresh = prompt.runtime.session()
    fresh.prefill(prompt.ids[:30])
    assert off(session.step(9), fresh.step(9)) <= EXACT
    session.truncate(30)
    assert off(session.extend(prompt.ids[30:]), logits) <= EXACT
    session.truncate(0)
    with pytest.raises(UsageError, match="step before prefill"):
        session.step(1)
    for wrong in (-1, 1, True, 0.0):
        with pytest.raises(UsageError, match=r"truncate\(.*\): the session holds 0 tokens"):
            session.truncate(wrong)  # type: ignore[arg-type]


def test_extend_inside_a_picture_is_refused(load: Prompts) -> None:
    """Its rest would need features that are not there; prefill(reuse=True) has them."""
    prompt = load(IMAGE)
    session = prompt.runtime.session()
    logits = session.prefill(prompt.ids, prompt.pixels)
    session.truncate(600)
    with pytest.raises(UsageError, match=r"600 cached tokens end inside a picture.*reuse=True"):
        session.extend([5])
    assert off(session.prefill(prompt.ids, prompt.pixels, reuse=True), logits) <= EXACT
    assert session.reused == 600


def test_fork_shares_until_written(load: Prompts) -> None:
    """No buffer is made before the fork writes; a step then copies one set; a parent that goes on never moves."""
    prompt = load(TEXT)
    parent = prompt.runtime.session()
    logits = parent.prefill(prompt.ids)
    homes = [a.ctypes.data for a in caches(parent)]
    forks = [parent.fork() for _ in range(3)]
    assert all(fork.cache.state is None for fork in forks)
    want = answer(parent, logits)
    assert [a.ctypes.data for a in caches(parent)] == homes
    assert answer(forks[0], logits) == want
    layers = prompt.runtime.bundle.manifest.spec.num_layers
    own = caches(forks[0])
    assert not set(homes) & {a.ctypes.data for a in own}
    assert all(a.any() for a in own[: 2 * layers]) and not any(a.any() for a in own[2 * layers :])
    fresh = prompt.runtime.session()
    fresh.prefill(np.append(prompt.ids, [7, 8]))
    forks[0].truncate(prompt.length)
    forks[0].extend([7, 8])  # now the second set is copied, from the parent, which has long gone on
    assert off(forks[0].step(3), fresh.step(3)) <= EXACT
    # The parent starts over: it leaves its rows to the forks that have not written yet.
    parent.prefill(prompt.ids[:9])
    assert not set(homes) & {a.ctypes.data for a in caches(parent)}
    assert answer(forks[1], logits) == want  # the first to write takes them over
    assert [a.ctypes.data for a in caches(forks[1])] == homes
    assert answer(forks[2], logits) == want
    assert not set(homes) & {a.ctypes.data for a in caches(forks[2])}


def test_last_fork_of_a_closed_session_copies_nothing(load: Prompts) -> None:
    prompt = load(TEXT)
    parent = prompt.runtime.session()
    logits = parent.prefill(prompt.ids)
    homes = [a.ctypes.data for a in caches(parent)]
    want = answer(parent, logits)
    fork, other = parent.fork(), parent.fork()
    parent.close()
    del other
    gc.collect()
    fork.truncate(prompt.length)
    assert answer(fork, logits) == want
    assert [a.ctypes.data for a in caches(fork)] == homes
    with pytest.raises(UsageError, match="session is closed"):
        parent.step(1)
    with pytest.raises(UsageError, match="session is closed"):
        parent.fork()
    with prompt.runtime.session() as opened:
        opened.prefill([5])
    opened.close()
    with pytest.raises(UsageError, match="session is closed"):
        opened.prefill([5])


@dataclasses.dataclass
class Believed:
    """What a session should hold: a prompt, and the tokens stepped after it."""

    traversed: list[int]
    stepped: list[int]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reuse", [True, False])
def test_sessions_never_see_each_other(seed: int, reuse: bool, load: Prompts) -> None:
    """Random prefills, extensions, steps, rewinds, forks, takeovers and ends: each session equals one that is alone."""
    case = "internlm2-text"
    runtime = load.runtime(case) if reuse else Runtime(load.bundle(case), threads=1, prefix_reuse=False)
    random_ = random.Random(seed)
    alone = load.runtime(case).session()

    @functools.cache
    def truth(traversed: tuple[int, ...], stepped: tuple[int, ...]) -> Array:
        logits = alone.prefill(traversed)
        for token in stepped:
            logits = alone.step(token)
        return logits

    def tokens(most: int) -> list[int]:
        return [random_.randrange(3, 40) for _ in range(random_.randint(1, most))]

    pool: list[tuple[Session, Believed]] = [(runtime.session(), Believed([], []))]
    done = {"fork": 0, "become": 0, "compared": 0}
    for _ in range(250):
        session, believed = random_.choice(pool)
        verb = random_.choice(["prefill", "again", "extend", "step", "step", "truncate", "fork", "become", "close"])
        logits = None
        if verb == "prefill" or (verb in ("again", "extend") and not reuse):
            believed.traversed, believed.stepped = tokens(12), []
            logits = session.prefill(believed.traversed)
        elif verb == "again":
            believed.traversed = believed.traversed[: random_.randint(0, 12)] + tokens(4)
            believed.stepped = []
            logits = session.prefill(believed.traversed, reuse=True)
        elif verb == "extend":
            new = tokens(3)
            believed.traversed, believed.stepped = [*believed.traversed, *believed.stepped, *new], []
            logits = session.extend(new)
        elif verb == "step" and session.length:
            (token, *_) = tokens(1)
            believed.stepped = [*believed.stepped, token]
            logits = session.step(token)
        elif verb == "truncate":
            length = random_.randint(0, session.length)
            session.truncate(length)
            cut = len(believed.traversed)
            believed.traversed, believed.stepped = believed.traversed[:length], believed.stepped[: max(0, length - cut)]
        elif verb == "fork" and len(pool) < 6:
            pool.append((session.fork(), dataclasses.replace(believed)))
            done["fork"] += 1
        elif verb == "become":
            other, theirs = random_.choice(pool)
            session.become(other)
            believed.traversed, believed.stepped = theirs.traversed, theirs.stepped
            done["become"] += 1
        elif verb == "close" and len(pool) > 2:
            pool.remove((session, believed))
            session.close()
            continue
        assert session.token_ids == [*believed.traversed, *believed.stepped]
        if logits is not None:
            done["compared"] += 1
            assert off(logits, truth(tuple(believed.traversed), tuple(believed.stepped))) <= EXACT
    assert done["fork"] > 10 and done["become"] > 10 and done["compared"] > 50


def test_become_copies_only_what_differs(load: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions with one prompt and answers that differ after some tokens: only rows after that place are copied."""
    prompt = load(IMAGE)
    a = prompt.runtime.session()
    a.prefill(prompt.ids, prompt.pixels)
    b = a.fork()
    for token in (5, 6, 7):
        a.step(token)
    for token in (5, 9):
        b.step(token)
    copied: list[tuple[int, int, int]] = []
    state: Any = b.cache.state
    copy = state.copy_rows
    monkeypatch.setattr(state, "copy_rows", lambda s, i, j, which: (copied.append((i, j, which)), copy(s, i, j, which)))
    b.become(a)
    assert copied == [(prompt.length + 1, prompt.length + 3, 0)]
    assert np.array_equal(a.step(11), b.step(11))
    with pytest.raises(UsageError, match="same Runtime"):
        b.become(load.runtime("internlm2-text").session())


# --- interrupted, refused --------------------------------------------------------------------------------------------


class _TimeIsUpError(Exception):
    pass


def test_interrupted_prefill_can_be_resumed(load: Prompts) -> None:
    """What on_chunk raises goes through; the chunks that are done stay, and nobody answers half a prompt."""
    prompt = load(IMAGE)
    session = prompt.runtime.session(prefill_chunk=100)
    fresh = session.prefill(prompt.ids, prompt.pixels)

    def give_up(done: int, total: int) -> None:
        assert total == prompt.length
        if done >= 300:
            raise _TimeIsUpError

    with pytest.raises(_TimeIsUpError):
        session.prefill(prompt.ids, prompt.pixels, on_chunk=give_up)
    assert session.length == session.traversed == 300
    for refused in (lambda: session.step(5), lambda: session.extend([5])):
        with pytest.raises(UsageError, match=r"did not finish, 300 tokens are done.*reuse=True"):
            refused()
    assert off(session.prefill(prompt.ids, prompt.pixels, reuse=True), fresh) <= EXACT
    assert session.reused == 300
    with pytest.raises(_TimeIsUpError):
        session.extend([5], on_chunk=lambda done, total: give_up(done, total - 1))
    session.truncate(prompt.length)  # the caller decides: what is there is the prompt
    session.step(5)


def test_bad_arguments_change_nothing(load: Prompts) -> None:
    prompt = load(TEXT)
    session = prompt.runtime.session()
    session.prefill(prompt.ids)
    too_many = [5] * (session.context + 1 - prompt.length)
    with pytest.raises(ContextError, match=f"the prompt has {session.context + 1} tokens"):
        session.extend(too_many)
    for wrong in ([], [500], [[5]], [0.5]):
        with pytest.raises(UsageError):
            session.extend(wrong)
    for chunk in (0, -1, 1.5, True):
        session.prefill_chunk = chunk  # type: ignore[assignment]
        with pytest.raises(UsageError, match="prefill_chunk should be a whole number above 0"):
            session.extend([5])
    session.prefill_chunk = None
    assert session.token_ids == prompt.ids.tolist()
    want = prompt.runtime.session().prefill(np.append(prompt.ids, 5))
    assert off(session.extend([5]), want) <= EXACT


# --- the graphs ------------------------------------------------------------------------------------------------------


def test_only_the_rows_in_use_are_read(load: Prompts) -> None:
    """The capacity is not read: rows after the last token may hold anything, with and without a prefix."""
    prompt = load(IMAGE)
    session = prompt.runtime.session()
    fresh = session.prefill(prompt.ids, prompt.pixels)
    for array in caches(session):
        array[:, :, prompt.length :] = np.nan
    assert np.array_equal(session.prefill(prompt.ids, prompt.pixels), fresh)
    for array in caches(session):
        array[:, :, 40:] = np.nan
    session.truncate(40)
    assert off(session.prefill(prompt.ids, prompt.pixels, reuse=True), fresh) <= EXACT


def test_traverse_writes_its_rows_in_place(load: Prompts) -> None:
    """Both sets keep their addresses, and only the rows of the new tokens change."""
    prompt = load(TEXT)
    session = prompt.runtime.session()
    session.prefill(prompt.ids)
    homes = [a.ctypes.data for a in caches(session)]
    for count in (1, 5, 1):
        before, length = [a.copy() for a in caches(session)], session.length
        session.extend([7] * count)
        for old, new in zip(before, caches(session), strict=True):
            assert np.flatnonzero((old != new).any(axis=(0, 1, 3))).tolist() == list(range(length, length + count))
    assert [a.ctypes.data for a in caches(session)] == homes
    state: Any = session.cache.state
    assert [v.data_ptr() for v in state.past.values()] == [v.data_ptr() for v in state.present.values()] == homes
