"""Measures a bundle's accuracy on questions with known answers.

It is the test for everything that changes numbers. It asks through `trol_edge.Runtime`, as a robot would, and compares
greedy answers by exact match.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from trol_edge.answering.results import Answer
from trol_edge.bundle.folder import write_text
from trol_edge.errors import UsageError
from trol_edge.export import scenes
from trol_edge.prompt.pruning import checked_share
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
    scenes: int
    scale: int = 1  # pictures have 112 * scale pixels a side
    tiles: int = 1  # tiles into which the bundle cut each picture, the thumbnail included
    image_tokens: float = 1.0  # share of each picture's tokens that was used
    vision_ms: float = 0.0  # median time of a picture in the vision tower
    prefill_ms: float = 0.0  # median time of a prompt

    def percent(self, *kinds: str) -> float:
        """The accuracy over some kinds, in percent."""
        asked = sum(self.asked.get(kind, 0) for kind in kinds)
        return 100 * sum(self.right.get(kind, 0) for kind in kinds) / max(1, asked)

    @property
    def short(self) -> float:
        """The accuracy over the short questions, in percent. This is the figure that is quoted."""
        return self.percent(*scenes.SHORT_KINDS)

    @property
    def hard(self) -> float:
        """The accuracy over the hard questions, in percent. It has room for a loss to show."""
        return self.percent(*scenes.HARD_KINDS)


def evaluate(
    runtime: Runtime,
    count: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    scale: int = 1,
) -> Score:
    """Ask the held-out questions about `count` scenes, with all image tokens (see evaluate_each)."""
    return evaluate_each(runtime, count, progress, scale)[0]


def evaluate_each(
    runtime: Runtime,
    count: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    scale: int = 1,
    image_tokens: Sequence[float] = (1.0,),
) -> list[Score]:
    """Ask the held-out questions about `count` scenes, drawn as pictures of 112 * scale pixels a side.

    There is one about each scene, and a hard one about each that allows one. The questions do not depend on the scale.
    A larger picture shows the same scene, in several tiles if the model cuts pictures into tiles.
    image_tokens: each question is asked with each of these shares of the picture's tokens, one after the other, so that
    times can be compared; one Score each. Raises UsageError for what is no share, before anything is asked.
    """
    if not image_tokens:
        raise UsageError("image_tokens is empty; give one share or more, 1 for all tokens")
    used = [checked_share(share) for share in image_tokens]
    # Each share has a session of its own, so that none continues from the rows of another.
    sessions = [runtime.session() for _ in used]
    tallies = [_Tally() for _ in used]
    tiles = 1
    for image, kind, question, wanted in scenes.held_out(count, scale, hard=True, progress=partial(progress, "ask")):
        (tiles,) = runtime.count_tiles(image)
        for share, session, tally in zip(used, sessions, tallies, strict=True):
            given = runtime.generate(question, image, max_new_tokens=96, image_tokens=share, session=session)
            tally.add(kind, question, wanted, given)
    # Features of a picture are cached, so only the first answer about it has the time of the tower.
    vision = statistics.median(tallies[0].vision_ms)
    return [
        Score(
            right=tally.right,
            asked=tally.asked,
            mistakes=tuple(tally.mistakes),
            scenes=count,
            scale=scale,
            tiles=tiles,
            image_tokens=share,
            vision_ms=vision,
            prefill_ms=statistics.median(tally.prefill_ms),
        )
        for share, tally in zip(used, tallies, strict=True)
    ]


class _Tally:
    """Answers so far."""

    def __init__(self) -> None:
        self.right: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        self.mistakes: list[tuple[str, str, str]] = []
        self.vision_ms: list[float] = []
        self.prefill_ms: list[float] = []

    def add(self, kind: str, question: str, wanted: str, given: Answer) -> None:
        """Count an answer."""
        self.asked[kind] = self.asked.get(kind, 0) + 1
        self.right[kind] = self.right.get(kind, 0) + (given.text == wanted)
        if given.text != wanted and len(self.mistakes) < 20:
            self.mistakes.append((question, wanted, given.text))
        self.vision_ms.append(given.timings.vision_ms)
        self.prefill_ms.append(given.timings.prefill_ms)


def markdown(score: Score, bundle: str) -> str:
    """Format a score as a table by kind of question."""
    command = f"trol-edge evaluate {bundle} -n {score.scenes}" + (f" --scale {score.scale}" if score.scale != 1 else "")
    cut = f" Each picture is {score.tiles} tiles, the last one a thumbnail." if score.tiles > 1 else ""
    lines = [
        heading(score.scale),
        "",
        f"`{command}`: ONNX graphs, cached semantics, exact match.{cut}",
        "",
        "| kind | asked | right % |",
        "| --- | ---: | ---: |",
        *(f"| {title} | {asked} | {percents[0]:.1f} |" for title, asked, percents in _rows([score])),
    ]
    return "\n".join(lines) + "\n"


def side_by_side(scores: Sequence[Score], bundle: str) -> str:
    """Format the scores of several shares of image tokens as one table: accuracy by kind, and times."""
    first, shares = scores[0], [f"{score.image_tokens:g}" for score in scores]
    command = f"trol-edge evaluate {bundle} -n {first.scenes}" + (f" --scale {first.scale}" if first.scale != 1 else "")
    lines = [
        f"`{command} {' '.join(f'--image-tokens {share}' for share in shares)}`: right answers in %.",
        "",
        f"| {Path(bundle).name}: kind | asked | {' | '.join(f'image_tokens={share}' for share in shares)} |",
        f"| --- | ---: |{' ---: |' * len(scores)}",
        *(f"| {title} | {n} | {' | '.join(f'{p:.1f}' for p in percents)} |" for title, n, percents in _rows(scores)),
        f"| prompt, median ms | | {' | '.join(f'{score.prefill_ms:.1f}' for score in scores)} |",
        f"| vision, median ms | | {' | '.join(f'{score.vision_ms:.1f}' for score in scores)} |",
    ]
    return "\n".join(lines) + "\n"


def _rows(scores: Sequence[Score]) -> list[tuple[str, int, list[float]]]:
    """(title, questions, accuracy of each score) of every kind, and of the short and the hard ones together."""
    rows = [
        *((kind, (kind,)) for kind in scenes.SHORT_KINDS),
        ("**all short questions**", scenes.SHORT_KINDS),
        ("describe", ("describe",)),
        *((kind, (kind,)) for kind in scenes.HARD_KINDS),
        ("**all hard questions**", scenes.HARD_KINDS),
    ]
    asked = scores[0].asked
    return [
        (title, sum(asked.get(kind, 0) for kind in kinds), [score.percent(*kinds) for score in scores])
        for title, kinds in rows
    ]


def update_report(path: Path, section: str) -> None:
    """Write the section into a report file. It replaces one with the same heading, or else is added at the end."""
    text = read_text(path, UsageError, "choose another file for the report") if path.exists() else ""
    title = section.splitlines()[0]
    parts = re.split(r"(?m)^(?=## )", text)
    kept = [part.strip() for part in parts if part.strip() and part.splitlines()[0] != title]
    write_text(path, "\n\n".join([*kept, section.strip()]) + "\n")
