"""Measures a bundle's accuracy on questions with known answers.

It is the test for everything that changes numbers. It asks through `trol_edge.Runtime`, as a robot would, and compares
greedy answers by exact match.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from trol_edge.bundle.folder import write_text
from trol_edge.errors import UsageError
from trol_edge.export import scenes
from trol_edge.reading import read_text
from trol_edge.runtime import Runtime


def heading(scale: int) -> str:
    """The heading of the report's section about pictures of this scale; the same for every bundle."""
    return "## Through the exported bundle" + ("" if scale == 1 else f", pictures {scale} times as large")


@dataclasses.dataclass(frozen=True)
class Score:
    """The number of right answers and of questions, by kind of question (see trol_edge.export.scenes)."""

    right: dict[str, int]
    asked: dict[str, int]
    mistakes: tuple[tuple[str, str, str], ...]  # the first few, as (question, right answer, given answer)
    scale: int = 1  # pictures have 112 * scale pixels a side
    tiles: int = 1  # tiles into which the bundle cut each picture, the thumbnail included

    def percent(self, *kinds: str) -> float:
        """The accuracy over some kinds, in percent."""
        asked = sum(self.asked.get(kind, 0) for kind in kinds)
        return 100 * sum(self.right.get(kind, 0) for kind in kinds) / max(1, asked)

    @property
    def short(self) -> float:
        """The accuracy over all kinds but "describe", in percent. This is the figure that is quoted."""
        return self.percent(*scenes.SHORT_KINDS)


def evaluate(
    runtime: Runtime,
    count: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    scale: int = 1,
) -> Score:
    """Ask `count` held-out questions, one scene each, about pictures of 112 * scale pixels a side.

    The questions do not depend on the scale. A larger picture shows the same scene, in several tiles if the model cuts
    pictures into tiles.
    """
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    mistakes: list[tuple[str, str, str]] = []
    tiles = 1
    for done, (image, kind, question, wanted) in enumerate(scenes.held_out(count, scale), 1):
        (tiles,) = runtime.count_tiles(image)
        given = runtime.generate(question, image, max_new_tokens=96).text
        asked[kind] = asked.get(kind, 0) + 1
        right[kind] = right.get(kind, 0) + (given == wanted)
        if given != wanted and len(mistakes) < 20:
            mistakes.append((question, wanted, given))
        progress("ask", done, count)
    return Score(right, asked, tuple(mistakes), scale, tiles)


def markdown(score: Score, bundle: str) -> str:
    """Format a score as a table by kind of question."""
    rows = [(kind, score.asked.get(kind, 0), score.percent(kind)) for kind in scenes.KINDS]
    rows.insert(-1, ("**all short questions**", sum(score.asked.get(k, 0) for k in scenes.SHORT_KINDS), score.short))
    number = sum(score.asked.values())
    command = f"trol-edge evaluate {bundle} -n {number}" + (f" --scale {score.scale}" if score.scale != 1 else "")
    cut = f" Each picture is {score.tiles} tiles, the last one a thumbnail." if score.tiles > 1 else ""
    lines = [
        heading(score.scale),
        "",
        f"`{command}`: ONNX graphs, cached semantics, exact match.{cut}",
        "",
        "| kind | asked | right % |",
        "| --- | ---: | ---: |",
        *(f"| {kind} | {asked} | {percent:.1f} |" for kind, asked, percent in rows),
    ]
    return "\n".join(lines) + "\n"


def update_report(path: Path, section: str) -> None:
    """Write the section into a report file. It replaces one with the same heading, or else is added at the end."""
    text = read_text(path, UsageError, "choose another file for the report") if path.exists() else ""
    title = section.splitlines()[0]
    parts = re.split(r"(?m)^(?=## )", text)
    kept = [part.strip() for part in parts if part.strip() and part.splitlines()[0] != title]
    write_text(path, "\n\n".join([*kept, section.strip()]) + "\n")
