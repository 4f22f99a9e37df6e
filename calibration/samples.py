"""Loads samples to calibrate on: pictures and prompts from a folder, a JSONL file, Python, or the rendered scenes.

The default samples have no photographs, because we had none whose licence lets us ship it. A robot's own camera
pictures are better than anything that could be shipped; give them as a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.errors import CalibrationError, ImageError
from trol_edge.export import scenes
from trol_edge.prompt.images import SUFFIXES, load_rgb
from trol_edge.reading import guard, parse_json, printable, read_text

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # (what, done, total)

DEFAULT_COUNT = 32
# Questions for pictures without one. They want short and long answers, about parts and about the whole.
PROMPTS = (
    "Describe the scene.",
    "What is in this picture?",
    "What is in front of the camera?",
    "Is there a person in the picture?",
    "Which objects are there, and what colour are they?",
    "How many objects do you see?",
    "What is on the left, and what is on the right?",
    "Is the way ahead free?",
)
ROW_KEYS = ("image", "prompt", "answer")  # keys of a line of a JSONL file
CALIBRATION_SEED = 2 * scenes.HELD_OUT_SEED  # far from the scenes that models are trained and measured on


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt, with or without pictures. pictures: paths, or uint8 RGB arrays [H, W, 3]."""

    name: str  # the file or the line, for messages
    pictures: tuple[Any, ...]
    prompt: str
    answer: str = ""  # if known, it is appended to the prompt, so that its tokens are seen too

    def load(self) -> list[NDArray[np.uint8]]:
        """Load the pictures as uint8 [H, W, 3]. Raises ImageError."""
        return [load_rgb(picture) for picture in self.pictures]


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """The readable samples. skipped: the others, as "name: why". sha256: the hash of pixels and texts."""

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]
    sha256: str
    left_out: tuple[str, ...] = ()  # files of a folder in formats that are not read, in words


def load(
    source: str | os.PathLike[str] | Iterable[tuple[Any, str]] | None,
    count: int | None = DEFAULT_COUNT,
    progress: Progress = lambda what, done, total: None,
    side: int = scenes.PIXELS,
) -> SampleSet:
    """Choose and read samples.

    source is one of these: None (rendered scenes); a folder of pictures (with all folders below it; PROMPTS are asked
    in turn); a JSONL file whose lines are {"image": path or list of paths or null, "prompt": text, "answer": text,
    optional}, with paths relative to the file; a Python iterable of (picture or None, prompt). count: the most samples
    to use, chosen at random but the same on every call (None: all). side: least width and height of a rendered scene
    in pixels, because an enlarged one has no fine detail. A picture that cannot be read is skipped and listed.

    Raises CalibrationError for a source that is missing, malformed, empty, or has nothing usable.
    """
    if count is not None and count < 1:
        raise CalibrationError(f"{count} samples asked for; calibration needs at least 1, better {DEFAULT_COUNT}")
    candidates, left_out = _candidates(source, count, side)
    if not candidates:
        seen = f"; {'; '.join(left_out)}" if left_out else ""
        raise CalibrationError(f"{_name(source)}: no samples here; give pictures ({', '.join(sorted(SUFFIXES))}){seen}")
    for line in left_out:
        log.warning("%s: %s", _name(source), line)
    if source is not None:
        random.Random(0).shuffle(candidates)
    wanted = len(candidates) if count is None else min(count, len(candidates))
    digest = hashlib.sha256()
    usable: list[Sample] = []
    skipped: list[str] = []
    for sample in candidates:
        if len(usable) == wanted:
            break
        try:
            pixels = sample.load()
        except ImageError as error:
            skipped.append(f"{sample.name}: {error}")
            continue
        for array in pixels:
            digest.update(f"{array.shape}".encode())
            digest.update(array.data)
        digest.update(json.dumps([len(pixels), sample.prompt, sample.answer]).encode())
        usable.append(sample)
        progress("samples", len(usable), wanted)
    if not usable:
        raise CalibrationError(f"{_name(source)}: none of {len(skipped)} samples is usable; the first: {skipped[0]}")
    return SampleSet(tuple(usable), tuple(skipped), digest.hexdigest(), tuple(left_out))


def _candidates(source: Any, count: int | None, side: int) -> tuple[list[Sample], list[str]]:
    """The samples to choose from, and in words what else the source has."""
    if source is None:
        return list(_scenes(DEFAULT_COUNT if count is None else count, -(-side // scenes.PIXELS))), []
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            return _folder(path)
        if path.is_file():
            return list(_lines(path)), []
        raise CalibrationError(f"{path}: no such folder or file; give a folder of pictures or a JSONL file")
    return list(_pairs(source)), []


def _scenes(count: int, scale: int) -> Iterator[Sample]:
    """Yield rendered scenes, each with a question and its answer; the kinds of question take turns.

    The hard ones come first: second passes are left out on the first samples, and easy answers lose little without.
    """
    kinds = (*scenes.HARD_KINDS, *scenes.EASY_KINDS)
    for i in range(count):
        pixels, scene = scenes.render(CALIBRATION_SEED + i, scale)
        options = scenes.questions(scene, random.Random(CALIBRATION_SEED + i))
        wanted = kinds[i % len(kinds)]
        _, question, answer = next((q for q in options if q[0] == wanted), options[i % len(options)])
        yield Sample(f"scene {i}", (pixels,), question, answer)


def _folder(folder: Path) -> tuple[list[Sample], list[str]]:
    """The pictures of a folder and of those below it, and the number of other files by suffix."""
    paths: list[Path] = []
    others: dict[str, list[str]] = {}
    with guard(folder, CalibrationError, "give a folder that can be read"):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix.lower() in SUFFIXES:
                paths.append(path)
            elif not path.is_dir():
                others.setdefault(path.suffix.lower(), []).append(str(path.relative_to(folder)))
    samples = [Sample(str(p.relative_to(folder)), (p,), PROMPTS[i % len(PROMPTS)]) for i, p in enumerate(paths)]
    return samples, [
        f"left out {len(names)} file(s) {suffix or 'without a suffix'}, which is not a picture format that is read: "
        f"{printable(', '.join(names[:3]))}{', ...' if len(names) > 3 else ''}"
        for suffix, names in sorted(others.items())
    ]


def _lines(path: Path) -> Iterator[Sample]:
    # Lines end where JSONL says, at newlines: str.splitlines would cut a string at U+2028, too.
    for number, line in enumerate(read_text(path, CalibrationError, "give a JSONL file or a folder").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        with guard(f"{path}, line {number}", CalibrationError, "write one object per line", "not JSON"):
            data = parse_json(line)
        images = data.get("image") if isinstance(data, dict) else 0
        images = [] if images is None else images if isinstance(images, list) else [images]
        texts = [data.get("prompt"), data.get("answer", "")] if isinstance(data, dict) else []
        if not all(isinstance(x, str) for x in [*images, *texts]) or not texts or not texts[0].strip():
            raise CalibrationError(
                f'{path}, line {number}: expected {{"image": path, "prompt": text}}, found {line:.80}'
            )
        if unknown := sorted(data.keys() - ROW_KEYS):
            names = ", ".join(printable(key)[:80] for key in unknown)
            raise CalibrationError(
                f"{path}, line {number}: has an unknown key {names}; a row has {', '.join(ROW_KEYS)}"
            )
        yield Sample(where, tuple(path.parent / image for image in images), texts[0], texts[1])


def _pairs(source: Iterable[Any]) -> Iterator[Sample]:
    for i, pair in enumerate(source):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[1], str) or not pair[1].strip():
            raise CalibrationError(f"sample {i}: expected (picture, prompt), found {pair!r:.80}")
        yield Sample(f"sample {i}", () if pair[0] is None else (pair[0],), pair[1])


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "the samples"
