"""What to calibrate on: pictures and prompts from a folder, a JSONL file, Python, or the rendered scenes.

Photographs are not among the default samples: none was at hand whose licence lets us ship it. A robot's own camera
pictures are better than anything shipped: give them as a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.errors import CalibrationError, ImageError
from trol_edge.export import scenes
from trol_edge.prompt.images import load_rgb

Progress = Callable[[str, int, int], None]  # (what, done, total)

DEFAULT_COUNT = 32
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# For pictures that come without a question: short and long answers, parts and the whole.
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
CALIBRATION_SEED = 2 * scenes.HELD_OUT_SEED  # far from the scenes that models are trained and measured on


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt, with pictures or without. pictures: paths, or uint8 RGB arrays [H, W, 3]."""

    name: str  # for messages: the file, or the line
    pictures: tuple[Any, ...]
    prompt: str
    answer: str = ""  # appended to the prompt where it is known: its tokens are seen too

    def load(self) -> list[NDArray[np.uint8]]:
        """The pictures as uint8 [H, W, 3]. Raises ImageError."""
        return [load_rgb(picture) for picture in self.pictures]


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """The samples in use, all of them readable. skipped: the others, "name: why". sha256: of pixels and texts."""

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]
    sha256: str


def load(
    source: str | os.PathLike[str] | Iterable[tuple[Any, str]] | None,
    count: int | None = DEFAULT_COUNT,
    progress: Progress = lambda what, done, total: None,
    side: int = scenes.PIXELS,
) -> SampleSet:
    """Choose and read samples.

    source: None (rendered scenes), a folder of pictures (read with all folders below it, asked PROMPTS in turn), a
    JSONL file whose lines are {"image": path or list of paths or null, "prompt": text, "answer": text, optional},
    paths relative to the file, or a Python iterable of (picture or None, prompt). count: at most so many, chosen at
    random but always the same ones (None: all). side: pixels that a rendered scene is at least wide and high, because
    one that is enlarged has no fine detail. A picture that cannot be read is skipped and listed.

    Raises CalibrationError for a source that is missing, malformed, empty, or of which nothing is usable.
    """
    if count is not None and count < 1:
        raise CalibrationError(f"{count} samples asked for; calibration needs at least 1, better {DEFAULT_COUNT}")
    candidates = _candidates(source, count, side)
    if not candidates:
        raise CalibrationError(f"{_name(source)}: no samples here; give pictures ({', '.join(sorted(SUFFIXES))})")
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
    return SampleSet(tuple(usable), tuple(skipped), digest.hexdigest())


def _candidates(source: Any, count: int | None, side: int) -> list[Sample]:
    if source is None:
        return list(_scenes(DEFAULT_COUNT if count is None else count, -(-side // scenes.PIXELS)))
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            return _folder(path)
        if path.is_file():
            return list(_lines(path))
        raise CalibrationError(f"{path}: no such folder or file; give a folder of pictures or a JSONL file")
    return list(_pairs(source))


def _scenes(count: int, scale: int) -> Iterator[Sample]:
    """Rendered scenes, one question of every kind in turn, with its answer."""
    for i in range(count):
        pixels, scene = scenes.render(CALIBRATION_SEED + i, scale)
        options = scenes.questions(scene, random.Random(CALIBRATION_SEED + i))
        wanted = scenes.KINDS[i % len(scenes.KINDS)]
        _, question, answer = next((q for q in options if q[0] == wanted), options[i % len(options)])
        yield Sample(f"scene {i}", (pixels,), question, answer)


def _folder(folder: Path) -> list[Sample]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return [Sample(str(path.relative_to(folder)), (path,), PROMPTS[i % len(PROMPTS)]) for i, path in enumerate(paths)]


def _lines(path: Path) -> Iterator[Sample]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path}: not readable as text ({error}); give a JSONL file or a folder") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{path}, line {number}: not JSON ({error}); one object per line") from error
        images = data.get("image") if isinstance(data, dict) else 0
        images = [] if images is None else images if isinstance(images, list) else [images]
        texts = [data.get("prompt"), data.get("answer", "")] if isinstance(data, dict) else []
        if not all(isinstance(x, str) for x in [*images, *texts]) or not texts or not texts[0].strip():
            raise CalibrationError(
                f'{path}, line {number}: expected {{"image": path, "prompt": text}}, found {line:.80}'
            )
        yield Sample(where, tuple(path.parent / image for image in images), texts[0], texts[1])


def _pairs(source: Iterable[Any]) -> Iterator[Sample]:
    for i, pair in enumerate(source):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[1], str) or not pair[1].strip():
            raise CalibrationError(f"sample {i} is no (picture, prompt) but {pair!r:.80}")
        yield Sample(f"sample {i}", () if pair[0] is None else (pair[0],), pair[1])


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "the samples"
