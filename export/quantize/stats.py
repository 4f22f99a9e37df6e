"""Statistics of a checkpoint's activations: calibration writes them layer by layer, quantization reads them.

A folder of statistics holds

state.json          format, checkpoint identity, hash of the samples, and the stages (in order) that make it complete
parts/<stage>.npz   one per finished stage: the arrays of its points, and "meta", JSON with their numbers and peaks;
                    what else is in some of them, `trol_edge.export.gates` says

A "point" is the input of one Linear, named by its parameter without ".weight": "decoder.layers.3.qkv",
"vision.proj1"; the low-rank middle of a partial LoRA is "decoder.layers.3.qkv.lora_b". Both passes of the traversal
count into one point, because they share the weights. What K/V caches hold is another matter: each pass has its own, and
the part of a decoder layer has "cache_absmax", float32 [2, 2, G, E], the largest |keys| and |values| of both passes by
head and channel. Folders that earlier versions wrote do not have it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.folder import new_file, writing
from trol_edge.errors import CalibrationError, UsageError
from trol_edge.export.quantize.observers import OBSERVERS
from trol_edge.reading import guard, is_plain_name, open_plain, parse_json, read_json

Float32 = NDArray[np.float32]

FORMAT = "trol-edge-statistics"
FORMAT_VERSION = 1
STATE = "state.json"
PARTS = "parts"
CACHE_PEAKS = "cache_absmax"
BINS = 2048
ROWS = 64  # size of the reservoir
# The smallest threshold, so that a tensor of zeros does not get a scale of zero. It is far below what any Linear of
# these models sees, and its scale, 1e-6 / 127, is still a normal float32.
SMALLEST = 1e-6

ROOM = "calibrate into another folder (the same command continues where it stopped)"  # advice for a failed write
_ARRAYS = ("absmax", "mean_abs", "mean_square", "rows", "histogram")
_NUMBERS = ("count", "histogram_max", "output_absmax")


@dataclasses.dataclass(frozen=True)
class PointStatistics:
    """The input of one Linear with K input channels, over all samples.

    histogram counts |x| in B equal bins over [0, histogram_max], from at most 256 random rows of each call. The other
    values, except `rows`, are over every row.
    """

    count: int  # rows (tokens) seen
    absmax: Float32  # [K]
    mean_abs: Float32  # [K]
    mean_square: Float32  # [K], mean of x^2
    rows: Float32  # [R, K], R <= 64: a uniform random choice of the rows
    histogram: NDArray[np.int64]  # [B]
    histogram_max: float
    output_absmax: float  # largest |output| of the Linear, LoRA included

    def amax(self, observer: str) -> float:
        """Clipping threshold of |x| by "minmax", "percentile", "entropy" or "mse"; positive and finite, always.

        Raises UsageError for another name.
        """
        if observer not in OBSERVERS:
            raise UsageError(f"observer {observer!r} is not one of {', '.join(OBSERVERS)}")
        largest = float(self.absmax.max(initial=0.0))
        # The histogram has bins only, and not every row, so the exact largest value is used.
        found = largest if observer == "minmax" else OBSERVERS[observer](self.histogram, self.histogram_max)
        return max(min(found, largest), SMALLEST)


@dataclasses.dataclass(frozen=True)
class CalibrationState:
    """Identifies what a cache folder is for. All of it must match before the folder is used."""

    checkpoint: str  # identity, see Checkpoint.identity
    samples_sha256: str
    samples: int
    stages: tuple[str, ...]  # in the order in which they run
    skipped: tuple[str, ...] = ()  # samples that could not be used, each with the reason
    left_out: int = 0  # samples on which second passes are left out


class Statistics:
    """The statistics of all points of one checkpoint.

    points: PointStatistics by name, read from disk on access. peaks: largest |value| of tensors that are neither input
    nor output of a Linear: "decoder.layers.<i>.residual" and ".scores" (of attention, before the softmax),
    "vision.layers.<i>.residual" and ".scores". caches: [2, 2, G, E] by decoder layer, see above; empty if an earlier
    version gathered them.
    """

    def __init__(
        self,
        points: Mapping[str, PointStatistics],
        peaks: Mapping[str, float],
        state: CalibrationState,
        caches: Mapping[int, Float32] | None = None,
    ) -> None:
        self.points, self.peaks, self.state, self.caches = points, peaks, state, caches or {}

    @property
    def checkpoint(self) -> str:
        """The identity of the checkpoint."""
        return self.state.checkpoint

    @property
    def samples(self) -> int:
        """The number of samples that were seen."""
        return self.state.samples

    @classmethod
    def load(cls, folder: str | os.PathLike[str], checkpoint_identity: str | None) -> Statistics:
        """Open a finished cache folder.

        Raises CalibrationError if it is missing, unfinished, damaged, or belongs to another checkpoint than
        `checkpoint_identity` (from Checkpoint.identity; None accepts any).
        """
        path = Path(folder)
        state = finished_state(path, checkpoint_identity)
        points: dict[str, Path] = {}
        peaks: dict[str, float] = {}
        caches: dict[int, Float32] = {}
        for stage in state.stages:
            part = part_path(path, stage)
            with open_part(part) as file:
                meta = _meta(file)
                if CACHE_PEAKS in file:
                    caches[int(stage.rsplit(".", 1)[1])] = _cache_peaks(file)
            points |= dict.fromkeys(meta["points"], part)
            peaks |= meta["peaks"]
        return cls(_Points(points), peaks, state, caches)


def _cache_peaks(file: Any) -> Float32:
    """What a layer's caches held, from its part."""
    found: Float32 = file[CACHE_PEAKS]
    if found.dtype != np.float32 or found.ndim != 4 or found.shape[:2] != (2, 2) or not np.isfinite(found).all():
        raise ValueError(f"{CACHE_PEAKS} is {found.dtype} {list(found.shape)}, or has NaN or infinite values")
    return found


class _Points(Mapping[str, PointStatistics]):
    """Points by name, each read on access, because all rows together would be hundreds of megabytes."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> PointStatistics:
        return read_point(self._files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def part_path(folder: Path, stage: str) -> Path:
    """The file of one stage."""
    return folder / PARTS / f"{stage}.npz"


def read_state(folder: Path) -> CalibrationState | None:
    """The state of a cache folder, or None if there is none. Raises CalibrationError for another format."""
    path = folder / STATE
    if not path.exists():
        return None
    advice = "remove the folder and calibrate again"
    data = read_json(path, CalibrationError, advice)
    with guard(path, CalibrationError, advice):
        if data.pop("format") != FORMAT or data.pop("format_version") != FORMAT_VERSION:
            raise ValueError("another format or version")
        strings = all(isinstance(data[key], str) for key in ("checkpoint", "samples_sha256"))
        if not strings or not all(isinstance(data.get(key, 0), int) for key in ("samples", "left_out")):
            raise ValueError("fields of other types")
        stages, skipped = (tuple(map(str, data.pop(key))) for key in ("stages", "skipped"))
        if strange := [stage for stage in stages if not is_plain_name(stage)]:
            raise ValueError(f"a stage {strange[0]!r:.80}")
        return CalibrationState(**data, stages=stages, skipped=skipped)


def finished_state(folder: Path, checkpoint_identity: str | None) -> CalibrationState:
    """The state of a finished cache folder. Raises CalibrationError as `Statistics.load` does."""
    state = read_state(folder)
    if state is None:
        raise CalibrationError(f"{folder}: no {STATE} here; gather statistics with `trol-edge calibrate`")
    if checkpoint_identity is not None and state.checkpoint != checkpoint_identity:
        raise CalibrationError(
            f"{folder}: statistics of another checkpoint ({state.checkpoint[:12]}, this one is "
            f"{checkpoint_identity[:12]}); calibrate this one into another folder"
        )
    missing = [stage for stage in state.stages if not part_path(folder, stage).is_file()]
    if missing:
        raise CalibrationError(
            f"{folder}: unfinished, {len(missing)} of {len(state.stages)} stages are missing (next: {missing[0]}); "
            "run `trol-edge calibrate` again with the same arguments to continue where it stopped"
        )
    return state


def write_state(folder: Path, state: CalibrationState) -> None:
    """Start a cache folder by writing its state."""
    data = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(state)}
    with writing(folder, CalibrationError):
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
    with writing(folder / STATE, CalibrationError), new_file(folder / STATE) as part:
        part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_part(
    folder: Path,
    stage: str,
    points: Mapping[str, PointStatistics],
    peaks: Mapping[str, float],
    more: Mapping[str, Any] | None = None,
    more_arrays: Mapping[str, Any] | None = None,
) -> None:
    """Store one stage completely or not at all. Raises CalibrationError for numbers that are not finite.

    more, more_arrays: what the stage keeps beside points and peaks, in JSON and as arrays.
    """
    bad = [name for name, point in points.items() if not _finite(point)]
    bad += [name for name, peak in peaks.items() if not math.isfinite(peak)]
    if bad:
        raise CalibrationError(
            f"NaN or infinite activations at {', '.join(bad[:5])}; check the checkpoint with `trol-edge export`, and "
            "the samples"
        )
    arrays: dict[str, Any] = {f"{name}/{a}": getattr(p, a) for name, p in points.items() for a in _ARRAYS}
    meta = {"points": {name: {n: getattr(p, n) for n in _NUMBERS} for name, p in points.items()}, "peaks": dict(peaks)}
    meta |= more or {}
    arrays |= more_arrays or {}
    path = part_path(folder, stage)
    with writing(path, CalibrationError, ROOM), new_file(path) as part, part.open("wb") as f:
        np.savez(f, meta=np.array(json.dumps(meta)), **arrays)


def read_point(path: Path, name: str) -> PointStatistics:
    """Read one point of a part. Raises CalibrationError if the file is damaged."""
    numbers = read_meta(path)["points"][name]
    with open_part(path) as file:
        point = PointStatistics(**{a: file[f"{name}/{a}"] for a in _ARRAYS}, **numbers)
        if not _finite(point):
            raise ValueError(f"{name} holds NaN or infinite values")
        return point


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON of a part. Raises CalibrationError if the file is damaged."""
    with open_part(path) as file:
        return _meta(file)


def _meta(file: Any) -> dict[str, Any]:
    meta = parse_json(str(file["meta"]))
    return {
        **meta,
        "points": dict(meta["points"]),
        "peaks": {k: float(v) for k, v in meta["peaks"].items()},
    }


@contextlib.contextmanager
def open_part(path: Path) -> Iterator[Any]:
    """Open a part. Raises CalibrationError for anything that is wrong with it."""
    advice = "remove the folder and calibrate again"
    with (
        guard(path, CalibrationError, advice, "damaged"),
        open_plain(path, CalibrationError, advice) as opened,
        np.load(opened, allow_pickle=False) as file,
    ):
        yield file


def _finite(point: PointStatistics) -> bool:
    arrays: Sequence[Any] = (point.absmax, point.mean_abs, point.mean_square, point.rows)
    numbers = (point.histogram_max, point.output_absmax)
    return all(bool(np.isfinite(a).all()) for a in arrays) and all(map(math.isfinite, numbers))
