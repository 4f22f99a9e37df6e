"""A profile is what `trol-edge profile` measured, as data. This module saves, loads and sums it up.

    Profile               one run of the command on one machine
    └── BundleProfile     one bundle, measured in a separate process, with its starts and every sample of the machine
        └── Run           one picture size and prompt length
            └── Answer    one answer: where each millisecond of it went

The file is JSON with a versioned schema. Times end in _ms (wall time) or _s (seconds since the bundle's process
began); memory is in bytes, energy in joules.
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
from trol_edge.reading import guard, read_json_value

SCHEMA = "trol-edge-profile"
SCHEMA_VERSION = 1  # raised when a field is removed or changes its meaning
FILE = "profile.json"

Values = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class BundleId:
    """Identifies the bundle that was measured."""

    folder: str  # as the user gave it
    model: str
    target: str
    precision: str  # the recipe
    context: int  # tokens
    bytes: int
    manifest_sha256: str  # of bundle.json, whose hashes cover everything in the bundle
    created_by: str
    traversed: tuple[int, ...] | None = None  # the layers with a second pass; None: all
    kv: str | None = None  # "int8": keys and values in 8 bits
    cache_bytes: int | None = None  # both K/V sets at full context; None: measured by an earlier version

    @property
    def kind(self) -> str:
        """The recipe, keys and values if they are rounded, and where second passes were left out how many there are."""
        name = self.precision if self.kv is None else f"{self.precision}, K/V {self.kv}"
        return name if self.traversed is None else f"{name}, second pass in {len(self.traversed)} layer(s)"


@dataclasses.dataclass(frozen=True)
class Case:
    """Describes the prompts of one run."""

    size: tuple[int, int] | None  # width and height of the picture, pixels; None: no picture
    prompt_tokens: int  # picture included
    image_tokens: int
    tokens: int  # length of every answer; it goes on where the model would end it


@dataclasses.dataclass(frozen=True)
class TimedAnswer:
    """The times of one answer. The projector has no time of its own; it is a part of the vision graph."""

    start_s: float
    preprocess_ms: float  # picture hashed, resized, normalised; prompt tokenized
    vision_ms: float  # vision tower and projector, one graph; next to nothing in a second question
    prefill_ms: float  # prompt to the first logits
    first_token_ms: float  # from the question to the text of the first token
    total_ms: float  # from the question to the text of the last token
    step_ms: tuple[float, ...]  # the step graph, once per token after the first
    sample_ms: tuple[float, ...]  # choosing a token from the logits, once per token
    detokenise_ms: tuple[float, ...]  # making its text; empty if the bundle has no tokenizer
    reused_tokens: int  # tokens of the prompt that were found in the cache


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a stage, counted in its graphs."""

    flops: float
    bytes: float  # read and written: weights, activations, cache


@dataclasses.dataclass(frozen=True)
class Run:
    """The answers to one case on one bundle."""

    case: Case
    start_s: float  # warm-up over
    end_s: float
    warmup: tuple[TimedAnswer, ...]
    answers: tuple[TimedAnswer, ...]  # each to the first question about a new frame
    second: tuple[TimedAnswer, ...]  # each to a second question about the same frame
    peak_rss_bytes: float | None  # highest resident memory of the process while this case ran
    work: dict[str, Work] | None  # stage -> counts: "vision", "prefill", "step"; None: the bundle has no counts


@dataclasses.dataclass(frozen=True)
class Start:
    """The times of a fresh process, from its start to the text of the first token."""

    cold: bool  # the bundle's files were dropped from the page cache before (Python and its libraries were not)
    cached_share: float | None  # share of the bundle's bytes in the page cache at the start; None: not known
    import_ms: float  # from the start of the process until Python and trol_edge are imported
    load_ms: float  # opening the Runtime, with its hashes checked
    answer_ms: float  # from the question to the first token
    total_ms: float


@dataclasses.dataclass(frozen=True)
class BundleProfile:
    """The measurements of one bundle.

    samples: columns of equal length, with one entry per sample of the machine and None for what could not be read.
    """

    bundle: BundleId
    library: str  # the library that computed, such as "onnxruntime 1.32.0"
    load_s: tuple[float, float]  # begin and end of opening the Runtime
    idle_s: tuple[float, float]  # begin and end of the rest before that, to see what the idle machine draws
    starts: tuple[Start, ...]
    runs: tuple[Run, ...]
    samples: dict[str, tuple[float | None, ...]]
    total_power: tuple[str, ...]  # columns whose sum is the total power; empty: no energy


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The machine's highest rates, for the roofline."""

    flops_per_s: float
    bytes_per_s: float
    source: str  # "measured: ...", or the table that they are from


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a measurement."""

    warmup: int
    runs: int
    threads: int | None  # threads of one inference call; None: the library's choice
    interval_s: float  # time between two samples of the machine


@dataclasses.dataclass(frozen=True)
class Profile:
    """Everything that one `trol-edge profile` measured. `save` writes it, `load` reads it back."""

    schema: str
    schema_version: int
    created: str  # UTC, ISO 8601
    trol_edge: str
    python: str
    system: str
    machine: dict[str, str | int | float | None]  # see sensors.Sensors.identity
    missing: tuple[str, ...]  # sensors that such a machine should have and that could not be read
    settings: Settings
    peaks: Peaks | None
    bundles: tuple[BundleProfile, ...]

    def save(self, path: Path) -> None:
        """Write the JSON file. Raises UsageError if it cannot be written."""
        write_text(path, json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":")) + "\n")

    @property
    def machine_name(self) -> str:
        """The machine in a few words, such as "NVIDIA Jetson Orin Nano ..., MAXN_SUPER" or "AMD EPYC, 2 cores"."""
        m = self.machine
        mode = m["power_mode_name"] or (None if m["power_mode"] is None else f"power mode {m['power_mode']}")
        cores = f"{m['cores']} core{'' if m['cores'] == 1 else 's'}" if m["cores"] else None
        return ", ".join(str(part) for part in (m["model"] or m["cpu"] or "unknown machine", mode or cores) if part)


def load(path: Path) -> Profile:
    """Read a profile. Raises UsageError for a file that is not a profile or has another schema."""
    data = read_json_value(path, UsageError, f"give a {FILE} of `trol-edge profile -o`")
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise UsageError(f"{path}: not a profile; give a {FILE} of `trol-edge profile -o`")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: profile schema {data.get('schema_version')!r}, this trol-edge reads schema {SCHEMA_VERSION}; "
            "measure again with this version"
        )
    advice = "measure again with this version of trol-edge"
    with guard(path, UsageError, advice):
        profile: Profile = from_dict(Profile, data, str(path), UsageError, advice)
    for measured in profile.bundles:
        if len({len(column) for column in measured.samples.values()}) > 1 or "t_s" not in measured.samples:
            raise UsageError(f"{path}: samples of {measured.bundle.folder} are damaged; {advice}")
    return profile


# -- summed up ---------------------------------------------------------------------------------------------------------

# Key -> name, in the order in which they are shown everywhere. All are in milliseconds, and less is better.
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
    """Every measured value, by key of STAGES; a key without values is absent."""
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
    """One value per answer. Steps of one answer are not independent, so their median counts."""
    found = pooled(run)
    for key in ("step_ms", "sample_ms", "detokenise_ms"):
        if key in found:
            found[key] = np.array([np.median(getattr(answer, key)) for answer in run.answers])
    return found


def starts(measured: BundleProfile) -> dict[str, Values]:
    """The milliseconds of every start, by key of STARTS."""
    found = {"cold_ms": [s.total_ms for s in measured.starts if s.cold]}
    found["warm_ms"] = [s.total_ms for s in measured.starts if not s.cold]
    return {key: np.array(values) for key, values in found.items() if values}


def percentiles(values: Values) -> tuple[float, float, float]:
    """Return p50, p90 and p99, interpolated. With few values, p99 is close to the largest."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return float(p50), float(p90), float(p99)


def tokens_per_s(run: Run) -> float | None:
    """Tokens after the first per second, choosing and detokenising included; the median over the answers."""
    rates = []
    for answer in run.answers:
        milliseconds = answer.total_ms - answer.first_token_ms
        if answer.step_ms and milliseconds > 0:
            rates.append(1e3 * len(answer.step_ms) / milliseconds)
    return float(np.median(rates)) if rates else None


def case_name(case: Case) -> str:
    """The case in a few words, such as "640x480, 135 tokens"."""
    picture = f"{case.size[0]}x{case.size[1]}" if case.size else "no picture"
    return f"{picture}, {case.prompt_tokens} tokens"
