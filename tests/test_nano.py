"""trol-nano through its bundle: it means something, so its accuracy is the measure of every change of numbers."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from trol_edge.calibration import scenes
from trol_edge.calibration.evaluate import REPORT_HEADING, evaluate, markdown, update_report
from trol_edge.runtime import Runtime

QUESTIONS = 240


def test_short_questions_are_answered_right(nano_bundle: Path) -> None:
    score = evaluate(Runtime(nano_bundle), QUESTIONS)
    assert sum(score.asked.values()) == QUESTIONS
    assert set(score.asked) == set(scenes.KINDS)
    assert score.short >= 95, score.mistakes
    for kind in scenes.SHORT_KINDS:
        assert score.percent(kind) >= 85, (kind, score.mistakes)


def test_the_picture_matters(nano_bundle: Path) -> None:
    """Questions about one scene, asked about a blank table: a model that ignores the picture would not notice."""
    runtime = Runtime(nano_bundle)
    blank = Image.new("RGB", (scenes.PIXELS, scenes.PIXELS), (110, 110, 110))
    asked = list(scenes.held_out(40))
    seen = [runtime.generate(question, image).text == wanted for image, _, question, wanted in asked]
    blind = [runtime.generate(question, blank).text == wanted for _, _, question, wanted in asked]
    assert sum(seen) > sum(blind) + 10


def test_held_out_scenes_are_no_training_scenes() -> None:
    assert scenes.TRAINING_SEED < scenes.HELD_OUT_SEED
    first, again = next(scenes.held_out(1)), next(scenes.held_out(1))
    assert first[1:] == again[1:] and (first[0] == again[0]).all()
    assert (first[0] == scenes.render(scenes.HELD_OUT_SEED)[0]).all()


def test_report_section_is_rewritten_not_repeated(nano_bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "REPORT.md"
    report.write_text("# trol-nano\n\nHow it was trained.\n", encoding="utf-8")
    section = markdown(evaluate(Runtime(nano_bundle), 9), "build/trol-nano")
    update_report(report, section)
    update_report(report, section)
    text = report.read_text(encoding="utf-8")
    assert text.startswith("# trol-nano") and text.count(REPORT_HEADING) == 1
    assert "| colour |" in text and "all short questions" in text
