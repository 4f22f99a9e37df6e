"""A profile: what `trol-edge profile` measured, as data. Written as JSON with a versioned schema, read back, summed up.

    Profile               one run of the command on one machine
    └── BundleProfile     one bundle, measured in a process of its own: how it starts, every sample of the machine
        └── Run           one picture size and prompt length
            └── Answer    one answer: where each millisecond of it went

Times end in _ms (wall time) or _s (seconds since the bundle's process began); memory is bytes, energy joules.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.folder import write_text
from trol_edge.bundle.strict import from_dict
from trol_edge.errors import UsageError

SCHEMA = "trol-edge-profile"
SCHEMA_VERSION = 1  # another one where a field gets another meaning, or goes
FILE = "profile.json"

Values = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class BundleId:
    """Which bundle it was."""

    folder: str  # as it was given
    model: str
    target: str
    precision: str  # the recipe
    context: int  # tokens
    bytes: int
    manifest_sha256: str  # of bundle.json, and so of everything in the bundle
    created_by: str


@dataclasses.dataclass(frozen=True)
class Case:
    """What was asked."""

    size: tuple[int, int] | None  # width and height of the picture, pixels; None: no picture
    prompt_tokens: int  # picture included
    image_tokens: int
    tokens: int  # of the answer; it is not cut short where the model would end it


@dataclasses.dataclass(frozen=True)
class TimedAnswer:
    """One answer. The projector has no time of its own: it is a part of the vision graph."""

    start_s: float
    preprocess_ms: float  # picture hashed, resized, normalised; prompt tokenized
    vision_ms: float  # vision tower and projector, one graph; next to nothing in a second question
    prefill_ms: float  # prompt to the first logits
    first_token_ms: float  # from the question to the text of the first token
    total_ms: float  # to the text of the last
    step_ms: tuple[float, ...]  # the step graph, once per token behind the first
    sample_ms: tuple[float, ...]  # a token chosen of the logits, once per token
    detokenise_ms: tuple[float, ...]  # its text; empty where the bundle has no tokenizer
    reused_tokens: int  # of the prompt, found in the cache


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage does, counted in its graphs."""

    flops: float
    bytes: float  # read and written: weights, activations, cache


@dataclasses.dataclass(frozen=True)
class Run:
    """One case on one bundle."""

    case: Case
    start_s: float  # warm-up over
    end_s: float
    warmup: tuple[TimedAnswer, ...]
    answers: tuple[TimedAnswer, ...]  # to the first question about a frame that was not seen before
    second: tuple[TimedAnswer, ...]  # to a second question about the same frame
    peak_rss_bytes: float | None  # of the process while this case ran
    work: dict[str, Work] | None  # stage -> counts: "vision", "prefill", "step"; None: the bundle has no counts


@dataclasses.dataclass(frozen=True)
class Start:
    """A fresh process, from its start to the text of the first token."""

    cold: bool  # the bundle's files were dropped from the page cache before (Python and its libraries were not)
    cached_share: float | None  # of the bundle's bytes that the page cache held at the start; None: not known
    import_ms: float  # the process begins, Python, trol_edge imported
    load_ms: float  # the Runtime opened, its hashes checked
    answer_ms: float  # question to first token
    total_ms: float


@dataclasses.dataclass(frozen=True)
class BundleProfile:
    """One bundle. samples: columns of equal length, one entry per sample of the machine, None: not readable then."""

    bundle: BundleId
    library: str  # what computed: "onnxruntime 1.32.0"
    load_s: tuple[float, float]  # from when to when the Runtime was opened
    idle_s: tuple[float, float]  # the rest before that: what the machine draws without us
    starts: tuple[Start, ...]
    runs: tuple[Run, ...]
    samples: dict[str, tuple[float | None, ...]]
    total_power: tuple[str, ...]  # columns whose sum is all that is drawn; none: no energy


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What the machine can do at most, for the roofline."""

    flops_per_s: float
    bytes_per_s: float
    source: str  # "measured: ...", or the table that says so


@dataclasses.dataclass(frozen=True)
class Settings:
    """How it was measured."""

    warmup: int
    runs: int
    threads: int | None  # of one inference call; None: the library's choice
    interval_s: float  # between two samples of the machine


@dataclasses.dataclass(frozen=True)
class Profile:
    """Everything that one `trol-edge profile` found out. `save` and `load` keep it."""

    schema: str
    schema_version: int
    created: str  # UTC, ISO 8601
    trol_edge: str
    python: str
    system: str
    machine: dict[str, str | int | float | None]  # see sensors.Sensors.identity
    missing: tuple[str, ...]  # sensors that such a machine has and this one did not show: what is partial
    settings: Settings
    peaks: Peaks | None
    bundles: tuple[BundleProfile, ...]

    def save(self, path: Path) -> None:
        """Write the JSON. Raises UsageError where that is not possible."""
        write_text(path, json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":")) + "\n")

    @property
    def machine_name(self) -> str:
        """In a few words: "NVIDIA Jetson Orin Nano ..., MAXN_SUPER", "AMD EPYC, 2 cores"."""
        m = self.machine
        mode = m["power_mode_name"] or (None if m["power_mode"] is None else f"power mode {m['power_mode']}")
        cores = f"{m['cores']} core{'' if m['cores'] == 1 else 's'}" if m["cores"] else None
        return ", ".join(str(part) for part in (m["model"] or m["cpu"] or "unknown machine", mode or cores) if part)


def load(path: Path) -> Profile:
    """Read a profile. Raises UsageError for a file that is none, or has another schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error}); give a {FILE} of `trol-edge profile -o`") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise UsageError(f"{path}: not a profile; give a {FILE} of `trol-edge profile -o`")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: profile schema {data.get('schema_version')!r}, this trol-edge reads schema {SCHEMA_VERSION}; "
            "measure again with this version"
        )
    advice = "measure again with this version of trol-edge"
    profile: Profile = from_dict(Profile, data, str(path), UsageError, advice)
    for measured in profile.bundles:
        if len({len(column) for column in measured.samples.values()}) > 1 or "t_s" not in measured.samples:
            raise UsageError(f"{path}: samples of {measured.bundle.folder} are damaged; {advice}")
    return profile


# -- summed up ---------------------------------------------------------------------------------------------------------

# Key -> what it is called. In milliseconds, less is better; in this order everywhere.
STAGES = {
    "preprocess_ms": "preprocess",
    "vision_ms": "vision + projector",
    "prefill_ms": "prefill",
    "first_token_ms": "time to first token",
    "step_ms": "decode step",
    "sample_ms": "choose a token",
    "detokenise_ms": "detokenise",
    "total_ms": "whole answer",
    "second_first_token_ms": "second question, first token",
}
STARTS = {"cold_ms": "start, page cache cold", "warm_ms": "start, page cache warm"}


def pooled(run: Run) -> dict[str, Values]:
    """Every value measured, by key of STAGES, where there is any."""
    found: dict[str, list[float]] = {}
    for key in STAGES:
        if key == "vision_ms" and run.case.size is None:
            continue
        if key == "second_first_token_ms":
            found[key] = [answer.first_token_ms for answer in run.second]
        elif key in ("step_ms", "sample_ms", "detokenise_ms"):
            found[key] = [ms for answer in run.answers for ms in getattr(answer, key)]
        else:
            found[key] = [getattr(answer, key) for answer in run.answers]
    return {key: np.array(values) for key, values in found.items() if values}


def per_answer(run: Run) -> dict[str, Values]:
    """One value per answer: the median where an answer has many (steps of one answer are not independent)."""
    found = pooled(run)
    for key in ("step_ms", "sample_ms", "detokenise_ms"):
        if key in found:
            found[key] = np.array([np.median(getattr(answer, key)) for answer in run.answers])
    return found


def starts(measured: BundleProfile) -> dict[str, Values]:
    """Milliseconds of every start, by key of STARTS."""
    found = {"cold_ms": [s.total_ms for s in measured.starts if s.cold]}
    found["warm_ms"] = [s.total_ms for s in measured.starts if not s.cold]
    return {key: np.array(values) for key, values in found.items() if values}


def percentiles(values: Values) -> tuple[float, float, float]:
    """p50, p90, p99, interpolated. Of few values p99 is next to the largest."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return float(p50), float(p90), float(p99)


def tokens_per_s(run: Run) -> float | None:
    """Median over answers: tokens behind the first, by the time they took, choosing and detokenising included."""
    rates = []
    for answer in run.answers:
        milliseconds = answer.total_ms - answer.first_token_ms
        if answer.step_ms and milliseconds > 0:
            rates.append(1e3 * len(answer.step_ms) / milliseconds)
    return float(np.median(rates)) if rates else None


def case_name(case: Case) -> str:
    """ "640x480, 135 tokens"."""
    picture = f"{case.size[0]}x{case.size[1]}" if case.size else "no picture"
    return f"{picture}, {case.prompt_tokens} tokens"
