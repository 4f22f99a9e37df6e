"""Accuracy of a bundle on questions with known answers: the measure for everything that changes numbers.

It asks through `trol_edge.Runtime`, as a robot would: picture in, greedy answer out, exact match.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from trol_edge.calibration import scenes
from trol_edge.runtime import Runtime

REPORT_HEADING = "## Through the exported bundle"


@dataclasses.dataclass(frozen=True)
class Score:
    """Right answers and questions asked, by kind of question (see trol_edge.calibration.scenes)."""

    right: dict[str, int]
    asked: dict[str, int]
    mistakes: tuple[tuple[str, str, str], ...]  # (question, right answer, given answer), the first few

    def percent(self, *kinds: str) -> float:
        """Accuracy over some kinds, in percent."""
        asked = sum(self.asked.get(kind, 0) for kind in kinds)
        return 100 * sum(self.right.get(kind, 0) for kind in kinds) / max(1, asked)

    @property
    def short(self) -> float:
        """Accuracy over all kinds but "describe", in percent: the figure that is quoted."""
        return self.percent(*scenes.SHORT_KINDS)


def evaluate(
    runtime: Runtime, count: int, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> Score:
    """Ask `count` held-out questions, one scene each."""
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    mistakes: list[tuple[str, str, str]] = []
    for done, (image, kind, question, wanted) in enumerate(scenes.held_out(count), 1):
        given = runtime.generate(question, image, max_new_tokens=96).text
        asked[kind] = asked.get(kind, 0) + 1
        right[kind] = right.get(kind, 0) + (given == wanted)
        if given != wanted and len(mistakes) < 20:
            mistakes.append((question, wanted, given))
        progress("ask", done, count)
    return Score(right, asked, tuple(mistakes))


def markdown(score: Score, bundle: str) -> str:
    """A table by kind of question."""
    rows = [(kind, score.asked.get(kind, 0), score.percent(kind)) for kind in scenes.KINDS]
    rows.insert(-1, ("**all short questions**", sum(score.asked.get(k, 0) for k in scenes.SHORT_KINDS), score.short))
    lines = [
        REPORT_HEADING,
        "",
        f"`trol-edge evaluate {bundle} -n {sum(score.asked.values())}`: ONNX graphs, cached semantics, exact match.",
        "",
        "| kind | asked | right % |",
        "| --- | ---: | ---: |",
        *(f"| {kind} | {asked} | {percent:.1f} |" for kind, asked, percent in rows),
    ]
    return "\n".join(lines) + "\n"


def update_report(path: Path, section: str) -> None:
    """Write the section into a report file, in the place of an earlier one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.write_text(text.split(REPORT_HEADING)[0].rstrip() + "\n\n" + section, encoding="utf-8")
