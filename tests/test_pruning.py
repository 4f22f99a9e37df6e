"""Fewer image tokens: which are kept, that the rest keep their positions, and that prefixes are reused exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from tests.conftest import CHECKPOINTS, NANO, NANOS, slow
from tests.test_prefix import EXACT, answer, off
from trol_edge.errors import ContextError, RequestError, UsageError
from trol_edge.export import scenes
from trol_edge.prompt.images import count_tiles
from trol_edge.prompt.pruning import count_kept, kept_rows, shares
from trol_edge.runtime import Runtime
from trol_edge.serve.schema import parse
from trol_edge.session import Session
from trol_edge.testing import ScriptedRuntime

Array = cases.Array
QUESTION = "What is left of the red circle?"
PRUNED = 0.5


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about the scene of a shipped model, whole."""

    runtime: Runtime
    ids: Array
    features: Array

    def prefill(self, session: Session, share: float, reuse: bool = False) -> Array:
        """Logits after it, with a share of the image tokens."""
        return session.prefill_features(self.ids, self.features, image_tokens=share, reuse=reuse)


@pytest.fixture
def asked(each_nano: Runtime) -> Asked:
    """The question to each shipped model."""
    return question(each_nano)


def question(runtime: Runtime) -> Asked:
    """The question to a Runtime."""
    picture = CHECKPOINTS / runtime.bundle.manifest.model / "scene.png"
    ids = np.array(runtime.tokenize(QUESTION, runtime.count_tiles(picture)))
    pixels = runtime.preprocess(picture)
    assert pixels is not None
    return Asked(runtime, ids, np.asarray(runtime.model.backend.encode_image(pixels)))


# --- which tokens ----------------------------------------------------------------------------------------------------


def test_what_looks_alike_is_seen_less() -> None:
    """Of a picture with one large and one small surface and single things, each single thing is kept."""
    dice = np.random.default_rng(0)
    features = dice.standard_normal((3, 96)).astype(np.float32)[[0] * 40 + [1] * 10 + [2] * 2]
    features += 0.01 * dice.standard_normal(features.shape).astype(np.float32)
    things = {3, 17, 41, 49}
    features[sorted(things)] += 3 * dice.standard_normal((4, 96)).astype(np.float32)
    kept = kept_rows(features, 9)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == 9
    assert things <= set(kept.tolist())
    assert set(kept.tolist()) & {50, 51} and set(kept.tolist()) & set(range(41, 50))
    assert np.array_equal(kept, kept_rows(features.copy(), 9))


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 300])
def test_numbers_of_tokens(tokens: int) -> None:
    """Every number from one to all is kept exactly, of equal tokens too."""
    for features in (np.zeros((tokens, 3), np.float32), np.random.default_rng(1).random((tokens, 80), np.float32)):
        for count in {1, 2, tokens // 3, tokens - 1, tokens} - {0}:
            if count <= tokens:
                assert len(set(kept_rows(features, count).tolist())) == count
    assert [count_kept(tokens, share) for share in (1e-9, 0.5, 1)] == [1, max(1, int(tokens / 2 + 0.5)), tokens]


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NANOS)
def test_what_is_kept_stays_where_it_was(name: str, bundle_of: Callable[[str], Path], no_gradients: None) -> None:
    """A reference in PyTorch that attends to the kept tokens at their positions in the whole prompt, and steps on."""
    import torch

    from trol_edge.export.reference.checkpoint import Checkpoint
    from trol_edge.export.reference.layerwise import rope_of
    from trol_edge.export.reference.model import Decoder, EagerAttention

    asked = question(Runtime(bundle_of(name)))
    session, spec = asked.runtime.session(), asked.runtime.bundle.manifest.spec
    ours = [asked.prefill(session, PRUNED)]
    rows = session.length
    token = int(ours[0].argmax())
    ours.append(session.step(token))

    source = Checkpoint(CHECKPOINTS / name)
    decoder = source.family.decoder(spec)
    assert isinstance(decoder, Decoder)
    source.load_into(decoder=decoder)
    mask = asked.ids == spec.image_token_id
    x = asked.runtime.model.embeddings[asked.ids].copy()
    x[mask] = asked.features.reshape(-1, spec.hidden_size)
    kept = np.ones(len(mask), bool)
    count = count_kept(spec.vision.tokens_per_image, PRUNED)
    kept[mask] = np.concatenate([np.isin(np.arange(len(tile)), kept_rows(tile, count)) for tile in asked.features])
    positions = np.flatnonzero(kept)
    assert len(positions) == rows == len(mask) - session.dropped < len(mask)
    attend = EagerAttention(spec, *rope_of(spec, len(mask) + 1))
    attend.positions = torch.from_numpy(positions)
    lora = torch.from_numpy(mask[kept]).float()[None, :, None] if spec.lora_rank else None
    theirs = [decoder.logits(decoder.traverse(torch.from_numpy(x[kept])[None], lora, attend))[0, -1].numpy()]
    attend.positions = torch.tensor([len(mask)])
    after = torch.from_numpy(asked.runtime.model.embeddings[np.array([token])].copy())[None]
    theirs.append(decoder.logits(decoder.step(after, attend))[0, -1].numpy())
    assert cases.difference(np.stack(ours), np.stack(theirs)) <= cases.TOLERANCE


def test_all_tokens_are_the_default(asked: Asked) -> None:
    """A share of 1, or so near that no token is left out, is bit for bit what it is without the option."""
    session = asked.runtime.session()
    want = session.prefill_features(asked.ids, asked.features)
    for share in (1.0, 1, 0.999, np.float32(1)):
        assert np.array_equal(asked.prefill(asked.runtime.session(), share), want)
    assert session.dropped == 0


# --- reuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [29, *slow(1)])
@pytest.mark.parametrize(("before", "after"), [(1.0, PRUNED), (0.75, PRUNED), *slow((PRUNED, 1.0), (PRUNED, PRUNED))])
def test_reuse_after_every_split(asked: Asked, before: float, after: float, every: int) -> None:
    """Pruned and whole questions about one picture in one session, cut anywhere: as a fresh prefill, token by token."""
    fresh, session = asked.runtime.session(), asked.runtime.session()
    want = asked.prefill(fresh, after)
    length, greedy = fresh.length, answer(fresh, want, 4)
    asked.prefill(session, before)
    kept = session.fork()
    edges = {1, length - 1, int((asked.ids == asked.runtime.bundle.manifest.spec.image_token_id).argmax()) + 1}
    for split in sorted({*range(1, kept.length + 1, every), *edges}):
        session = kept.fork()
        session.truncate(min(split, session.length))
        got = asked.prefill(session, after, reuse=True)
        assert session.reused <= split and session.length == length
        assert session.reused == min(split, length - 1) or before != after
        assert off(got, want) <= EXACT, split
        assert answer(session, got, 4) == greedy, split


def test_reuse_knows_what_was_kept(asked: Asked) -> None:
    """Other tokens of the same picture are not gone on from, the same ones are; text behind them neither."""
    session = asked.runtime.session()
    asked.prefill(session, PRUNED)
    rows = session.length
    asked.prefill(session, PRUNED, reuse=True)
    assert session.reused == rows - 1
    asked.prefill(session, 1.0, reuse=True)
    head = int((asked.ids == asked.runtime.bundle.manifest.spec.image_token_id).argmax())
    assert head <= session.reused < head + 64  # up to the first token that was left out before
    assert session.dropped == 0


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks(asked: Asked, chunk: int) -> None:
    """Chunks end anywhere between kept tokens."""
    fresh, chunked = asked.runtime.session(), asked.runtime.session(prefill_chunk=chunk)
    want, got = asked.prefill(fresh, PRUNED), asked.prefill(chunked, PRUNED)
    assert off(got, want) <= EXACT
    assert answer(chunked, got, 4) == answer(fresh, want, 4)


def test_extend_fork_become_and_beams(asked: Asked) -> None:
    """Whatever a session does, it does behind a pruned picture at the right positions."""
    runtime = asked.runtime
    turn = np.array(runtime.tokenize("Describe the scene."))[:9]
    fresh, session = runtime.session(), runtime.session()
    said = answer(session, asked.prefill(session, PRUNED), 4)[:-1]
    got = session.extend(turn)
    whole = dataclasses.replace(asked, ids=np.concatenate((asked.ids, said, turn)))
    want = whole.prefill(fresh, PRUNED)
    assert off(got, want) <= EXACT and session.dropped == fresh.dropped > 0
    token = int(want.argmax())
    fork, other = session.fork(), runtime.session()
    other.prefill(turn)
    other.become(session)
    want = fresh.step(token)
    for each in (fork, other, session):
        assert off(each.step(token), want) <= EXACT and each.dropped == fresh.dropped
    head = len(asked.ids) - 12  # behind the picture
    session.prefill_features(asked.ids[:head], asked.features, image_tokens=PRUNED)
    got = session.extend(asked.ids[head:])
    assert off(got, asked.prefill(fresh, PRUNED)) <= EXACT
    begin = int((asked.ids == runtime.bundle.manifest.spec.image_token_id).argmax())
    session.prefill(asked.ids[:begin])
    got = session.extend_features(asked.ids[begin:], asked.features, image_tokens=PRUNED)
    assert off(got, asked.prefill(fresh, PRUNED)) <= EXACT
    session.truncate(begin + 3)
    with pytest.raises(UsageError, match="end inside a picture"):
        session.extend([5])
    picture = CHECKPOINTS / runtime.bundle.manifest.model / "scene.png"
    alone = Runtime(runtime.bundle.folder)
    given = alone.generate(QUESTION, picture, num_beams=3, image_tokens=PRUNED, max_new_tokens=8)
    runtime.generate(QUESTION, picture, max_new_tokens=3)  # another share of the same picture, in the kept session
    again = runtime.generate(QUESTION, picture, num_beams=3, image_tokens=PRUNED, max_new_tokens=8)
    assert (given.text, given.token_ids) == (again.text, again.token_ids)
    assert abs(given.score - again.score) < 1e-4


def test_rope_factors_follow_the_whole_prompt(load: Any) -> None:
    """A prompt that is long before its tokens are left out has the long factors, and positions up to the last."""
    prompt = load("phi3-su-rope/image/0")
    session = prompt.runtime.session()
    session.prefill(prompt.ids, prompt.pixels, image_tokens=0.25)
    whole = prompt.runtime.session()
    whole.prefill(prompt.ids, prompt.pixels)
    assert session.rope == whole.rope
    assert session.limit == whole.limit - session.dropped
    context = prompt.runtime.bundle.manifest.context
    while session.length < session.limit:
        session.step(5)
    assert session.length + session.dropped == (context if session.rope == "long" else whole.limit)
    with pytest.raises(ContextError):
        session.step(5)


# --- calls -----------------------------------------------------------------------------------------------------------


def test_calls_take_it(each_nano: Runtime) -> None:
    """Questions of every kind give the same with the option in one Runtime as alone, and count what they skip."""
    picture = CHECKPOINTS / each_nano.bundle.manifest.model / "scene.png"
    ids = each_nano.tokenize(QUESTION, each_nano.count_tiles(picture))
    whole = each_nano.generate(QUESTION, picture)
    pruned = each_nano.generate(QUESTION, picture, image_tokens=PRUNED)
    assert whole.prompt_tokens == pruned.prompt_tokens == len(ids)
    assert pruned.cached_tokens < len(ids) - 64 < whole.prompt_tokens
    assert "".join(each_nano.stream(QUESTION, picture, image_tokens=PRUNED)) == pruned.text
    assert [a.text for a in each_nano.ask_many([QUESTION] * 2, picture, image_tokens=PRUNED)] == [pruned.text] * 2
    session = each_nano.session()
    each_nano.generate(QUESTION, picture, session=session, image_tokens=PRUNED, answer_mode="traverse")
    assert session.dropped == sum(each_nano.count_tiles(picture)) * 32
    fresh = Runtime(each_nano.bundle.folder)
    for shape in ({}, {"image_tokens": PRUNED}):
        ours = each_nano.choose("Which colour is it?", ["red", "blue"], picture, **shape)
        theirs = fresh.choose("Which colour is it?", ["red", "blue"], picture, **shape)
        assert math.isclose(ours.probability, theirs.probability, rel_tol=1e-3)
        yes = [r.yes_no("Is there a red star?", picture, **shape).probability for r in (each_nano, fresh)]
        assert math.isclose(*yes, rel_tol=1e-3)


def test_turns_keep_their_shares(nano: Runtime) -> None:
    """Each turn's pictures are used as they were when it was asked, also when a fresh session computes them all."""
    picture = NANO / "scene.png"
    with nano.chat() as chat:
        chat.ask("What is left of the red circle?", picture, image_tokens=0.5, max_new_tokens=4)
        last = chat.ask("And on the right?", picture, image_tokens=0.75, max_new_tokens=4)
        held = chat.session.dropped
        turns = chat.turns
    assert held == 32 + 16
    with nano.chat() as again:
        again.add(turns[0][0], turns[0][1], picture, image_tokens=0.5)
        assert again.ask("And on the right?", picture, image_tokens=0.75, max_new_tokens=4) == last
        assert again.session.dropped == held


def test_tiles_per_call(bundle_of: Callable[[str], Path]) -> None:
    """A picture is cut into as many tiles as the call allows, and features are kept apart."""
    runtime = Runtime(bundle_of("trol-nano-phi3"))
    picture, *_ = next(iter(scenes.held_out(1, 3)))
    spec = runtime.bundle.manifest.image
    most = count_tiles([picture], spec)[0]
    assert most > 2
    for tiles in (None, 1, 2, spec.max_tiles):
        limited = dataclasses.replace(spec, max_tiles=tiles or spec.max_tiles)
        expected = runtime.tokenize(QUESTION, count_tiles([picture], limited))
        assert runtime.generate(QUESTION, picture, max_tiles=tiles).prompt_tokens == len(expected)
    with pytest.raises(UsageError, match="max_tiles 7: this bundle"):
        runtime.generate(QUESTION, picture, max_tiles=7)


@pytest.mark.parametrize("value", [0, 7, True, 1.5], ids=repr)
def test_tiles_of_an_export(value: Any) -> None:
    """Fewer tiles than the model was trained with, and a context for those; others are refused before work starts."""
    from trol_edge.export.pipeline import default_context, export, with_tiles
    from trol_edge.export.reference.checkpoint import Checkpoint

    source = Checkpoint(CHECKPOINTS / "trol-nano-phi3")
    whole = source.family.image(source.spec)
    assert with_tiles(whole, None) == whole and with_tiles(whole, 2).most_tiles == 3
    large = dataclasses.replace(source.spec, vision=dataclasses.replace(source.spec.vision, tokens_per_image=256))
    large = dataclasses.replace(large, max_position_embeddings=1 << 17)
    assert default_context(large, whole) - default_context(large, with_tiles(whole, 2)) == 512
    with pytest.raises(UsageError, match=r"max_tiles .* should be 1\.\.6"):
        export(source.folder, Path("nowhere"), max_tiles=value)
    with pytest.raises(UsageError, match="does not cut pictures"):
        export(NANO, Path("nowhere"), max_tiles=2)


def test_a_script_takes_it() -> None:
    """A program that is tested without a bundle may use it."""
    runtime = ScriptedRuntime("Yes.")
    picture = np.zeros((28, 28, 3), np.uint8)
    assert runtime.generate("Is it?", picture, image_tokens=0.5).text == "Yes."
    session = runtime.session()
    runtime.generate("Is it?", picture, image_tokens=0.5, session=session)
    assert session.dropped == 2


# --- bad input -------------------------------------------------------------------------------------------------------

BAD: list[Any] = [0, 0.0, -0.5, 1.0001, 2, math.nan, math.inf, True, "0.5", None, 1j, np.bool_(True)]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_bad_shares(value: Any, nano: Runtime) -> None:
    """Refused by name before anything is read or computed, in every call."""
    missing = "no such picture.png"
    picture, session = NANO / "scene.png", nano.session()
    ids, pixels = nano.tokenize(QUESTION, 1), nano.preprocess(picture)
    calls: list[Callable[[], object]] = [
        lambda: nano.generate("?", missing, image_tokens=value),
        lambda: nano.stream("?", missing, image_tokens=value),
        lambda: nano.ask_many(["?"], missing, image_tokens=value),
        lambda: nano.choose("?", ["a", "b"], missing, image_tokens=value),
        lambda: nano.yes_no("?", missing, image_tokens=value),
        lambda: nano.chat().ask("?", missing, image_tokens=value),
        lambda: session.prefill(ids, pixels, image_tokens=value),
        lambda: session.prefill(ids, pixels, image_tokens=[value]),
        lambda: session.extend(ids, pixels, image_tokens=value),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"image_tokens .* should be .*above 0 and up to 1"):
            call()
    with pytest.raises(UsageError, match=r"max_tiles .* should be None or a whole number above 0"):
        nano.generate("?", missing, max_tiles=value if value not in (None, 2) else 0)
    assert session.length == 0


def test_shares_of_other_numbers(nano: Runtime) -> None:
    """A list has one share for each picture or tile."""
    assert (shares(0.5), shares((1, 0.5)), shares(np.array(0.5))) == (0.5, [1.0, 0.5], 0.5)
    picture = NANO / "scene.png"
    with pytest.raises(UsageError, match="2 shares for 1 picture"):
        nano.session().prefill(nano.tokenize("?", 1), nano.preprocess(picture), image_tokens=[0.5, 0.5])


def test_graphs_that_hold_their_tables(bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles for a GPU from before this option answer as before, and say what they cannot."""
    runtime = Runtime(bundle_of("trol-nano"))
    monkeypatch.setattr(type(runtime.model.backend), "takes_rotary", False)
    session = runtime.session()
    for call in (
        lambda: runtime.generate("?", "no such picture.png", image_tokens=0.5),
        lambda: session.prefill([5], image_tokens=0.5),
    ):
        with pytest.raises(UsageError, match="export the bundle again"):
            call()
    assert runtime.generate(QUESTION, NANO / "scene.png", max_new_tokens=2).token_ids


def test_a_request_takes_it() -> None:
    """The server's body, with its checks."""
    body = b'{"messages": [{"role": "user", "content": "?"}], "image_tokens": %s}'
    assert parse(body % b"0.5", "m").options == {"image_tokens": 0.5}
    for bad in (b"0", b"1.5", b"true", b'"0.5"'):
        with pytest.raises(RequestError, match="image_tokens"):
            parse(body % bad, "m")
    body = body.replace(b"image_tokens", b"max_tiles")
    assert parse(body % b"2", "m").options == {"max_tiles": 2}
    with pytest.raises(RequestError, match="max_tiles"):
        parse(body % b"0", "m")


def test_rows_of_a_state_stay_apart(asked: Asked) -> None:
    """Sessions with other positions in the same rows share no tables; a whole prompt after a pruned one is right."""
    one, two = asked.runtime.session(), asked.runtime.session()
    asked.prefill(one, PRUNED)
    want = asked.prefill(two, 1.0)
    got = asked.prefill(one, 1.0)
    assert off(got, want) <= 1e-6
    state: Any = one.cache.state
    other: Any = two.cache.state
    for mine, theirs in zip(state.cache, other.cache, strict=True):
        assert np.allclose(mine[:, :, : one.length], theirs[:, :, : one.length], atol=1e-5)
