"""Measures what a bundle lost against another one of the same checkpoint: layer by layer, in logits, in answers.

Layers: the signal-to-noise ratio of the residual stream after each layer, and of the image features. It is
10 log10(|reference|^2 / |reference - other|^2) in dB for every token, averaged over the tokens, because a sum over
tokens would show only the few whose activations are huge. Equal values count as 150 dB.

Logits: both bundles follow the reference's greedy answer, token by token (teacher forcing). What is measured is the
Kullback-Leibler divergence of the other from the reference in nats, and how often the most probable token is the same.

The first layer that goes wrong is the first whose ratio is below WRONG_DB, or whose ratio is DROP_DB less than at the
place before it and below DROP_BELOW_DB. Lower ratios after it follow from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge import svg
from trol_edge.bundle.folder import write_text
from trol_edge.calibration.probes import probed
from trol_edge.calibration.samples import Progress, SampleSet
from trol_edge.errors import BundleError, UsageError
from trol_edge.export import scenes as rendered
from trol_edge.runtime import Runtime

MOST_DB = 150.0
WRONG_DB = 10.0  # at this ratio the error is a third of the signal
DROP_DB, DROP_BELOW_DB = 10.0, 20.0
FORCED_TOKENS = 64  # most tokens of an answer that are followed
FEATURES = "vision.features"


@dataclasses.dataclass(frozen=True)
class Place:
    """One place in the network. mean_db and worst_db are over tokens; worst is the 1st percentile."""

    name: str  # "vision.layers.0", ..., "vision.features", "decoder.layers.0", ...
    mean_db: float
    worst_db: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One bundle against the reference. Accuracies are percent of the short questions, or of the hard ones; None if
    none was asked."""

    reference: str
    bundle: str
    samples: int
    places: tuple[Place, ...]  # in the order of computation
    wrong: str | None  # the first layer that goes wrong
    kl_nats: float  # mean over the positions of the answers
    top1_percent: float  # share of the positions with the same most probable token
    forced_tokens: int
    same_answers_percent: float  # share of samples and scenes with the same answer
    answers: int
    scenes: int
    accuracy_percent: float | None
    reference_accuracy_percent: float | None
    lost_points: float | None  # accuracy of the reference minus accuracy of the bundle
    hard_accuracy_percent: float | None
    reference_hard_accuracy_percent: float | None
    hard_lost_points: float | None
    passes: str  # the layers, and which of them have a second pass, in words
    reference_passes: str
    kv_bytes: int  # both K/V sets at full context
    reference_kv_bytes: int


def compare(
    reference: str | os.PathLike[str],
    others: Sequence[str | os.PathLike[str]],
    samples: SampleSet,
    *,
    scenes: int = 0,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Comparison]:
    """Compare bundles of one checkpoint with a reference bundle of it, on samples and on held-out rendered scenes.

    The reference and one other are in memory at a time. threads is what trol_edge.Runtime takes. Raises UsageError for
    bundles of different models, BundleError for a bundle that cannot be read or run.
    """
    if not others:
        raise UsageError("there is nothing to compare with the reference; give two bundles or more")
    exam = list(_answers(Path(reference), scenes, threads, progress)) if scenes else []
    found = [_compare(Path(reference), Path(other), samples, exam, scenes, threads, progress) for other in others]
    # A layer without a second pass has no mixture to compare, so only those that have one in all bundles are shown.
    shown = set.intersection(*({place.name for place in comparison.places} for comparison in found))
    return [dataclasses.replace(c, places=tuple(place for place in c.places if place.name in shown)) for c in found]


@dataclasses.dataclass(frozen=True)
class _Answered:
    """A held-out question and the reference's answer."""

    kind: str
    wanted: str
    given: str


def _answers(bundle: Path, count: int, threads: int | None, progress: Progress) -> Iterator[_Answered]:
    runtime = Runtime(bundle, threads=threads)
    asked = partial(progress, f"scenes {bundle.name}")
    for image, kind, question, wanted in rendered.held_out(count, hard=True, progress=asked):
        yield _Answered(kind, wanted, runtime.generate(question, image, max_new_tokens=96).text)


def _compare(
    reference: Path,
    other: Path,
    samples: SampleSet,
    exam: Sequence[_Answered],
    scenes: int,
    threads: int | None,
    progress: Progress,
) -> Comparison:
    values: list[dict[str, NDArray[np.float32]]] = [{}, {}]

    def keep(which: int) -> Any:
        return lambda place, array: values[which].__setitem__(place, np.asarray(array, np.float32))

    with probed(reference, keep(0), threads) as a, probed(other, keep(1), threads) as b:
        _require_same_model(reference, a, other, b)
        passes = [runtime.bundle.manifest.passes for runtime in (a, b)]
        caches = [runtime.model.backend.cache_bytes for runtime in (a, b)]
        ratios: dict[str, list[NDArray[np.float64]]] = {}
        divergences: list[float] = []
        top: list[bool] = []
        same: list[bool] = []
        sessions = (a.session(), b.session())
        for done, sample in enumerate(samples.samples, 1):
            pictures = list(sample.pictures)
            ids = a.tokenize(sample.prompt, a.count_tiles(pictures))
            pixels = a.preprocess(pictures)
            for runtime, own in zip((a, b), values, strict=True):
                own.clear()
                if pixels is not None:
                    own[FEATURES] = np.asarray(runtime.model.backend.encode_image(pixels))
            logits = [s.prefill_features(ids, v.get(FEATURES)) for s, v in zip(sessions, values, strict=True)]
            for place, array in values[0].items():
                if place not in values[1]:  # a layer with a second pass in one of the two only
                    continue
                ratios.setdefault(place, []).append(ratio_db(array, values[1][place]))
            budget = min(FORCED_TOKENS, sessions[0].limit - len(ids))
            agreed = True
            for _ in range(budget):
                divergences.append(divergence(logits[0], logits[1]))
                token, others_token = (int(x.argmax()) for x in logits)
                top.append(token == others_token)
                agreed &= top[-1]
                if token in a.model.ends:
                    break
                logits = [s.step(token) for s in sessions]
            same.append(agreed)
            progress(f"layers {other.name}", done, len(samples.samples))
    given = list(_answers(other, scenes, threads, progress)) if exam else []
    same += [before.given == after.given for before, after in zip(exam, given, strict=True)]
    accuracy, reference_accuracy = (_accuracy(answers, rendered.SHORT_KINDS) for answers in (given, exam))
    hard, reference_hard = (_accuracy(answers, rendered.HARD_KINDS) for answers in (given, exam))
    places = tuple(_place(name, np.concatenate(ratios[name])) for name in sorted(ratios, key=_order))
    return Comparison(
        reference=str(reference),
        bundle=str(other),
        samples=len(samples.samples),
        places=places,
        wrong=first_wrong(places),
        kl_nats=float(np.mean(divergences)),
        top1_percent=100 * float(np.mean(top)),
        forced_tokens=len(top),
        same_answers_percent=100 * float(np.mean(same)),
        answers=len(same),
        scenes=scenes,
        accuracy_percent=accuracy,
        reference_accuracy_percent=reference_accuracy,
        lost_points=None if accuracy is None or reference_accuracy is None else reference_accuracy - accuracy,
        hard_accuracy_percent=hard,
        reference_hard_accuracy_percent=reference_hard,
        hard_lost_points=None if hard is None or reference_hard is None else reference_hard - hard,
        passes=passes[1],
        reference_passes=passes[0],
        kv_bytes=caches[1],
        reference_kv_bytes=caches[0],
    )


def _accuracy(answers: Sequence[_Answered], kinds: Sequence[str]) -> float | None:
    """Right answers among those to questions of these kinds, in percent; None without such questions."""
    right = [answer.given == answer.wanted for answer in answers if answer.kind in kinds]
    return 100 * sum(right) / len(right) if right else None


def ratio_db(reference: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """The signal-to-noise ratio of every token in dB: [..., tokens, D] -> [all tokens]. NaN in `other` gives -150."""
    x = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    noise = np.square(x - other.reshape(x.shape)).sum(-1)
    signal = np.square(x).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        db = 10 * np.log10(signal / noise)
    db[(noise == 0)] = MOST_DB
    return np.clip(np.nan_to_num(db, nan=-MOST_DB), -MOST_DB, MOST_DB)


def divergence(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """The Kullback-Leibler divergence of softmax(other) from softmax(reference), in nats; infinite for NaN logits."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (reference, other))
    found = float(np.exp(p) @ (p - q))
    return found if math.isfinite(found) else math.inf


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def first_wrong(places: Sequence[Place]) -> str | None:
    """The first layer that goes wrong, as the module's docstring defines it."""
    before = MOST_DB
    for place in places:
        dropped = before - place.mean_db > DROP_DB and place.mean_db < DROP_BELOW_DB
        if place.mean_db < WRONG_DB or dropped:
            return place.name
        before = place.mean_db
    return None


def summary(comparisons: Sequence[Comparison]) -> list[tuple[str, list[str]]]:
    """Rows of a table, each with a title and a cell per bundle."""
    first = comparisons[0]
    rows = [
        ("first layer that goes wrong", [c.wrong or "none" for c in comparisons]),
        ("KL divergence of logits, nats", [f"{c.kl_nats:.2e}" for c in comparisons]),
        (f"same top token, % of {first.forced_tokens}", [f"{c.top1_percent:.2f}" for c in comparisons]),
        (f"same greedy answer, % of {first.answers}", [f"{c.same_answers_percent:.2f}" for c in comparisons]),
    ]
    if first.reference_accuracy_percent is not None:
        reference = f"{first.reference_accuracy_percent:.2f}"
        cells = [f"{c.accuracy_percent:.2f} (lost {c.lost_points:+.2f})" for c in comparisons]
        rows.append((f"right answers, % (reference {reference})", cells))
    if first.reference_hard_accuracy_percent is not None:
        reference = f"{first.reference_hard_accuracy_percent:.2f}"
        cells = [f"{c.hard_accuracy_percent:.2f} (lost {c.hard_lost_points:+.2f})" for c in comparisons]
        rows.append((f"right hard answers, % (reference {reference})", cells))
    if any(c.passes != first.reference_passes for c in comparisons):
        rows.append((f"passes (reference {first.reference_passes})", [c.passes for c in comparisons]))
    if any(c.kv_bytes != first.reference_kv_bytes for c in comparisons):
        reference = f"{first.reference_kv_bytes / 1e6:.2f}"
        rows.append((f"K/V cache, MB (reference {reference})", [f"{c.kv_bytes / 1e6:.2f}" for c in comparisons]))
    return rows


def save(folder: str | os.PathLike[str], comparisons: Sequence[Comparison]) -> None:
    """Write compare.json and compare.svg into a folder, which is made if it does not exist."""
    path = Path(folder)
    data = [dataclasses.asdict(c) for c in comparisons]
    write_text(path / "compare.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    write_text(path / "compare.svg", picture(comparisons))


def picture(comparisons: Sequence[Comparison]) -> str:
    """Draw the ratios along the network, one line per bundle, as a self-contained SVG."""
    places = [place.name for place in comparisons[0].places]
    width, height, left, top, bottom = 60 + max(24 * len(places), 360), 300, 46, 16, 96
    finite = [p.mean_db for c in comparisons for p in c.places if p.mean_db < MOST_DB]
    high = 10 * math.ceil(max([*finite, 30.0]) / 10)
    low = min(0, 10 * math.floor(min([*finite, 0.0]) / 10))

    def x(i: int) -> float:
        return left + 12 + i * (width - left - 24) / max(1, len(places) - 1)

    def y(db: float) -> float:
        return top + (high - min(max(db, low), high)) * (height - top) / (high - low)

    shown = names(comparisons)
    colours = ("#1f5fbf", "#c8501e", "#2f8f4e", "#8a3fa0", "#a08000")
    body = ""
    for db in range(low, high + 1, 10):
        body += svg.line(left, y(db), width, y(db), "#ddd") + svg.text_at(left - 6, y(db) + 3, f"{db} dB", "end")
    for i, name in enumerate(places):
        label = name.replace(".layers.", " ").replace(".", " ")
        turned = f' transform="rotate(-60 {x(i) + 3:.1f} {height + 10})"'
        body += svg.text_at(x(i) + 3, height + 10, label, "end", more=turned)
    for k, c in enumerate(comparisons):
        colour = colours[k % len(colours)]
        body += svg.path([(x(i), y(p.mean_db)) for i, p in enumerate(c.places)], colour, "stroke-width:1.5")
        for i, p in enumerate(c.places):
            body += svg.circle(x(i), y(p.mean_db), 5 if p.name == c.wrong else 2, colour)
        label = f"{shown[k]} against {Path(c.reference).name}" + (f": goes wrong at {c.wrong}" if c.wrong else "")
        more = f' style="font-size:12px;fill:{colour}"'
        body += svg.text_at(left, height + bottom + 18 * k, label, more=more)
    return svg.document(width, height + bottom + 18 * len(comparisons), body)


def names(comparisons: Sequence[Comparison]) -> list[str]:
    """Short names of the bundles, which are those of their folders if these differ."""
    short = [Path(c.bundle).name for c in comparisons]
    return short if len(set(short)) == len(short) else [c.bundle for c in comparisons]


def _place(name: str, db: NDArray[np.float64]) -> Place:
    return Place(name, float(db.mean()), float(np.percentile(db, 1)))


def _order(name: str) -> tuple[int, int]:
    """Sort key that orders vision layers, image features, decoder layers."""
    last = name.rsplit(".", 1)[1]
    return (0 if name.startswith("vision.layers") else 1 if name == FEATURES else 2, int(last) if last.isdigit() else 0)


def _require_same_model(reference: Path, a: Runtime, other: Path, b: Runtime) -> None:
    one, two = a.bundle.manifest, b.bundle.manifest
    specs = [dataclasses.replace(manifest.spec, traversed=None) for manifest in (one, two)]
    if specs[0] != specs[1] or one.prompt != two.prompt or one.image != two.image:
        raise UsageError(
            f"{reference} is {one.model} and {other} is {two.model}, which has other sizes; "
            "compare bundles of one checkpoint"
        )
    for path, runtime in ((reference, a), (other, b)):
        if runtime.model.tokenizer is None:
            raise BundleError(f"{path}: the bundle has no tokenizer to ask it with; export with the tokenizer files")
