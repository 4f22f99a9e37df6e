"""The rendered scenes: what is asked about them has the answer that their geometry gives."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from trol_edge.export import scenes
from trol_edge.export.scenes import (
    FARTHEST_MARGIN,
    HARD_KINDS,
    NEARER_MARGIN,
    NUMBERS,
    RELATION_MARGIN,
    RELATION_SLACK,
    Item,
    Scene,
)

COUNT = 150
TOWARDS: dict[str, Callable[[float, float], float]] = {
    "left of": lambda dx, dy: -dx,
    "right of": lambda dx, dy: dx,
    "above": lambda dx, dy: -dy,
    "below": lambda dx, dy: dy,
}
SIDE = r"(?:to the )?(left of|right of|above|below)"


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, Item]]:
    """Hard questions about scenes, and about the mirrored ones that training shows."""
    rng, found = random.Random(1), []
    for seed in range(COUNT):
        drawn = scenes.render(seed)[1]
        for scene in (drawn, drawn.mirrored()):
            items = [scenes.ask(scene, kind, rng) for kind in HARD_KINDS]
            found += [(scene, item) for item in items if item]
    return found


def places(scene: Scene) -> dict[str, tuple[float, float]]:
    return {o.name: (o.x, o.y) for o in scene.objects}


def ahead(scene: Scene, side: str, name: str) -> dict[str, float]:
    """How far each other object is towards a side of the named one."""
    at = places(scene)
    x, y = at.pop(name)
    return {other: TOWARDS[side](p - x, q - y) for other, (p, q) in at.items()}


def distances(scene: Scene, name: str) -> dict[str, float]:
    at = places(scene)
    x, y = at.pop(name)
    return {other: abs(complex(p - x, q - y)) for other, (p, q) in at.items()}


def beside(scene: Scene, side: str, name: str) -> str:
    """The only object on a side, far enough away to be asked about."""
    ((found, gap),) = [(n, a) for n, a in ahead(scene, side, name).items() if a > RELATION_SLACK]
    assert gap >= RELATION_MARGIN
    return found


def test_which_is_nearer(asked: list[tuple[Scene, Item]]) -> None:
    first = 0
    for scene, item in (pair for pair in asked if pair[1].kind == "nearer"):
        found = re.fullmatch(r"Which is nearer to the (?P<x>.+), the (?P<a>.+) or the (?P<b>.+)\?", item.question)
        found = found or re.fullmatch(r"Is the (?P<a>.+) or the (?P<b>.+) nearer to the (?P<x>.+)\?", item.question)
        assert found, item.question
        far = distances(scene, found["x"])
        near, other = sorted((far[found[name]], found[name]) for name in "ab")
        assert item.answer == near[1] and other[0] - near[0] >= NEARER_MARGIN
        first += item.answer == found["a"]
    assert 50 < first < 200


def test_two_steps(asked: list[tuple[Scene, Item]]) -> None:
    """The second one starts at an object that is not named, and does not lead back."""
    seconds = Counter[str]()
    for scene, item in (pair for pair in asked if pair[1].kind == "chain"):
        pattern = rf"(?:What|Which object) is (?:{SIDE}|farthest from) the object {SIDE} the (.+)\?"
        found = re.fullmatch(pattern, item.question)
        assert found, item.question
        then, side, name = found.groups()
        middle = beside(scene, side, name)
        if then:
            wanted = beside(scene, then, middle)
        else:
            *_, (second, _), (most, wanted) = sorted((d, n) for n, d in distances(scene, middle).items())
            assert most - second >= FARTHEST_MARGIN
        assert item.answer == wanted != name
        seconds[then or "farthest from"] += 1
    assert len(seconds) >= 4 and seconds["farthest from"] > 50


def test_how_many_are_beside(asked: list[tuple[Scene, Item]]) -> None:
    answers = Counter[str]()
    for scene, item in (pair for pair in asked if pair[1].kind == "beside"):
        found = re.fullmatch(rf"How many (.+?) (?:are|do you see) {SIDE} the (.+)\?", item.question)
        assert found, item.question
        what, side, name = found.groups()
        gaps = ahead(scene, side, name)
        assert min(map(abs, gaps.values())) > RELATION_SLACK
        alone = {"objects": "", "crosses": "cross"}
        word = alone[what] if what in alone else what.removesuffix(" objects").removesuffix("s")
        assert item.answer == NUMBERS[sum(gap > 0 and word in other for other, gap in gaps.items())]
        answers[item.answer] += 1
    assert set(answers) == set(NUMBERS[:5]) and max(answers.values()) < 0.5 * sum(answers.values())


def test_what_is_marked_is_in_the_question(asked: list[tuple[Scene, Item]]) -> None:
    """Training looks phrases up by their text, and each is about the objects that it names."""
    for scene, item in asked:
        for phrase, about in item.named:
            assert phrase in item.question
            if item.kind != "beside":
                assert [phrase] == [scene.objects[i].name for i in about]
        if item.kind != "beside":
            assert [scene.objects[i].name for i in item.answer_objects] == [item.answer]


def test_the_other_questions_are_those_of_before() -> None:
    """Figures in documents were measured on them, and they are drawn before the hard ones."""
    plain = [asked[1:] for asked in scenes.held_out(120)]
    both = [asked[1:] for asked in scenes.held_out(120, hard=True)]
    assert [q for q in both if q[0] not in HARD_KINDS] == plain and 60 < len(both) - len(plain) < 120
    assert {kind for kind, _, _ in both} == set(scenes.KINDS)
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    assert digest.startswith("6e29d229ac5ae1a1")
