"""The shipped models through their bundles: they mean something, so their accuracy is the measure of every change of
numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import NANOS, slow
from trol_edge.calibration.evaluate import Score, evaluate, heading, markdown, update_report
from trol_edge.export import scenes
from trol_edge.runtime import Runtime

QUESTIONS = 96
PHI3 = "trol-nano-phi3"


def check(score: Score, questions: int) -> None:
    """The promise: 95 % of short questions, and no kind that was not learnt."""
    assert score.scenes == sum(score.asked[kind] for kind in scenes.EASY_KINDS) == questions
    assert set(score.asked) == set(scenes.KINDS)
    assert score.short >= 95, score.mistakes
    for kind in scenes.SHORT_KINDS:
        assert score.percent(kind) >= 85, (kind, score.mistakes)


def test_short_questions_are_answered_right(each_nano: Runtime) -> None:
    score = evaluate(each_nano, QUESTIONS)
    check(score, QUESTIONS)
    assert (score.scale, score.tiles) == (1, 1)
    assert 70 < score.hard < 92  # a loss can show


def test_only_a_whole_answer_is_right() -> None:
    """A part of the right answer counts as a mistake, as does more than the right answer."""
    right = {question: wanted for _, _, question, wanted in scenes.held_out(9, hard=True)}
    hard = len(right) - 9
    assert hard > 4

    def score(change: Callable[[str], str]) -> Score:
        runtime: Any = SimpleNamespace(
            count_tiles=lambda image: (1,),
            session=lambda: None,
            generate=lambda question, image, **_: SimpleNamespace(
                text=change(right[question]), timings=SimpleNamespace(vision_ms=0.0, prefill_ms=0.0)
            ),
        )
        return evaluate(runtime, 9)

    assert sum(score(str).right.values()) == 9 + hard and score(str).mistakes == ()
    for change in (lambda text: text[:-1], lambda text: f"{text}."):
        assert sum(score(change).right.values()) == 0 and len(score(change).mistakes) == 9 + hard


@pytest.fixture(scope="module")
def phi3(bundle_of: Callable[[str], Path]) -> Runtime:
    """The model that cuts pictures into tiles."""
    return Runtime(bundle_of(PHI3))


@pytest.mark.slow
def test_pictures_of_several_tiles_are_answered_right(phi3: Runtime) -> None:
    score = evaluate(phi3, QUESTIONS, scale=2)
    check(score, QUESTIONS)
    assert (score.scale, score.tiles) == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "tiles"), [(150, 150, 1), (120, 340, 4), (230, 110, 3), (640, 480, 7)])
def test_pictures_of_any_shape_are_answered_right(phi3: Runtime, width: int, height: int, tiles: int) -> None:
    """Stretched, so that the tiles cut other parts out of it; the thumbnail shows the whole."""
    right = []
    for drawn, _, question, wanted in scenes.held_out(40, scale=2):
        picture = Image.fromarray(drawn).resize((width, height), Image.Resampling.BICUBIC)
        assert phi3.count_tiles(picture) == [tiles]
        right.append(phi3.generate(question, picture).text == wanted)
    assert sum(right) >= 36


def test_the_long_factors_answer_right(phi3: Runtime) -> None:
    """The model was trained with both sets of rope factors."""
    right = []
    for picture, _, question, wanted in scenes.held_out(40):
        answer = phi3.generate(question, picture, long_context=True)
        assert answer.rope == "long"
        right.append(answer.text == wanted)
    assert sum(right) >= 36


@pytest.mark.parametrize("each_bundle", [NANOS[1], *slow(NANOS[0])], indirect=True)
def test_the_picture_matters(each_nano: Runtime) -> None:
    """Questions about one scene, asked about a blank table: a model that ignores the picture would not notice."""
    blank = Image.new("RGB", (scenes.PIXELS, scenes.PIXELS), (110, 110, 110))
    asked = list(scenes.held_out(40))
    seen = [each_nano.generate(question, image).text == wanted for image, _, question, wanted in asked]
    blind = [each_nano.generate(question, blank).text == wanted for _, _, question, wanted in asked]
    assert sum(seen) > sum(blind) + 10


def test_held_out_scenes_are_no_training_scenes() -> None:
    assert scenes.TRAINING_SEED < scenes.HELD_OUT_SEED
    first, again = next(scenes.held_out(1)), next(scenes.held_out(1))
    assert first[1:] == again[1:] and (first[0] == again[0]).all()
    assert (first[0] == scenes.render(scenes.HELD_OUT_SEED)[0]).all()


def test_a_larger_picture_shows_the_same_scene() -> None:
    """The same questions and answers; scaled down it looks the same, but for the table's noise."""
    for (small, *said), (large, *said_again) in zip(scenes.held_out(20), scenes.held_out(20, scale=3), strict=True):
        assert said == said_again
        assert large.shape == (3 * scenes.PIXELS, 3 * scenes.PIXELS, 3)
        shrunk = large.reshape(scenes.PIXELS, 3, scenes.PIXELS, 3, 3).mean((1, 3))
        assert np.abs(shrunk - small).mean() < 5  # of 255; another scene is 20 and more away
        assert np.abs(shrunk - small[:, ::-1]).mean() > 5


@pytest.mark.parametrize("each_bundle", [NANOS[1], *slow(NANOS[0])], indirect=True)
def test_report_section_is_rewritten_not_repeated(each_nano: Runtime, tmp_path: Path) -> None:
    """Each picture size has a section; a section of another title stays."""
    report = tmp_path / "REPORT.md"
    report.write_text("# trol-nano\n\nHow it was trained.\n\n## More\n\nwords\n", encoding="utf-8")
    for scale in (1, 2, 1):
        update_report(report, markdown(evaluate(each_nano, 9, scale=scale), "build/trol-nano"))
    text = report.read_text(encoding="utf-8")
    assert text.startswith("# trol-nano\n\nHow it was trained.\n\n## More\n\nwords\n\n## ")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## More", heading(2), heading(1)]
    assert text.count("| colour |") == 2 and "all short questions" in text
    assert "trol-edge evaluate build/trol-nano -n 9 --scale 2`" in text
