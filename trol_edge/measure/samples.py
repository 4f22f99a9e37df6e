"""Judges a run by the samples of its profile: whether it counts, what it lacks, and the energy that it took.

A run is invalid if the machine did not work as usual: its clocks sagged, a throttle counter rose, or the sampler itself
did not get to run. A run is partial if something that such a machine can report was not read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.targets import is_gpu
from trol_edge.machine.sensors import OVER_CURRENT
from trol_edge.measure.record import BundleProfile, Profile, Run, Values, percentiles, pooled, starts, tokens_per_s

GAP = 5.0  # a longer time without a sample, in sampling intervals, makes a run invalid
COVERED, COVERAGE = 2.5, 0.9  # samples at most COVERED intervals apart must cover this share of the run
SAG, CPU_SAG = 0.95, 0.8  # a clock sags below this share of what it should be
SAGGING = 3  # samples in a row below that make a run invalid
BUSY = 0.5  # load above which a clock should be high; also the processors that others may keep busy without a remark
FEWEST = 3  # power samples while decoding that an energy per token needs


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Says whether a run counts. Each entry is a reason in words."""

    invalid: list[str]
    partial: list[str]
    remarks: list[str]


@dataclasses.dataclass(frozen=True)
class Energy:
    """Joules, integrated over the samples' monotonic clock. "net" values are above what the machine drew idle."""

    token_j: float  # per token, while decoding
    token_net_j: float | None
    answer_j: float  # from question to the last token
    answer_net_j: float | None
    mean_w: float  # while answering
    idle_w: float | None


def column(measured: BundleProfile, name: str) -> Values:
    """A column of samples, with NaN for what could not be read; a missing column is all NaN."""
    values = measured.samples.get(name)
    if values is None:
        return np.full(len(measured.samples["t_s"]), np.nan)
    return np.array([np.nan if v is None else v for v in values], float)


def within(measured: BundleProfile, start_s: float, end_s: float) -> NDArray[np.bool_]:
    """Mask of the samples between two times."""
    times = column(measured, "t_s")
    return (times >= start_s) & (times <= end_s)


def verdict(profile: Profile, measured: BundleProfile, run: Run) -> Verdict:
    """Say whether a run counts and why not, what it lacks, and what else to know about it."""
    invalid = [*_gaps(profile, measured, run), *_sagged(measured, run), *_moved(measured, run)]
    partial = [*profile.missing, *_unread(measured, run)]
    if run.work is None:
        partial.append("no counts in this bundle: not on the roofline")
    if not run.answers[0].detokenise_ms:
        partial.append("no tokenizer in this bundle: nothing was detokenised")
    if measured.total_power and energy(measured, run) is None:
        partial.append(f"fewer than {FEWEST} power samples while decoding: no energy; give more --tokens")
    during = within(measured, run.start_s, run.end_s)
    others = (column(measured, "cpu") - column(measured, "cpu_own"))[during]
    remarks = []
    if len(others) and np.isfinite(others).any() and (mean := float(np.nanmean(others))) > BUSY:
        remarks.append(f"other processes kept {mean:.1f} processors busy: these figures are too slow")
    return Verdict(invalid, partial, remarks)


def _gaps(profile: Profile, measured: BundleProfile, run: Run) -> list[str]:
    interval, times = profile.settings.interval_s, column(measured, "t_s")
    inside = times[(times > run.start_s) & (times < run.end_s)]
    steps = np.diff([run.start_s, *inside, run.end_s])
    if steps.max() > GAP * interval:
        return [f"{steps.max():.2f} s without a sample (one is due every {interval:g} s): the machine was starved"]
    covered = steps[steps <= COVERED * interval].sum() / steps.sum()
    if covered < COVERAGE:
        return [f"samples cover {100 * covered:.0f} % of the run, {100 * COVERAGE:.0f} % are needed"]
    return []


def _longest(low: NDArray[np.bool_]) -> int:
    """The length of the longest run of True."""
    longest = now = 0
    for value in low:
        now = now + 1 if value else 0
        longest = max(longest, now)
    return longest


def _sagged(measured: BundleProfile, run: Run) -> list[str]:
    during, found = within(measured, run.start_s, run.end_s), []
    if is_gpu(measured.bundle.target):
        load = column(measured, "gpu_load")[during]
        busy = ~(load < BUSY)  # an unknown load (NaN) counts as busy
        for name, what, most in (("gpu_hz", "GPU", "gpu_max_hz"), ("emc_hz", "memory", "emc_cap_hz")):
            clock, ceiling = column(measured, name)[during], column(measured, most)
            if np.isfinite(ceiling).any():
                wanted = float(np.nanmax(ceiling))  # the highest, because a ceiling that drops is throttling, too
                low = (np.minimum(clock, ceiling[during]) if np.isfinite(clock).any() else ceiling[during]) < (
                    SAG * wanted
                )
                if (count := _longest(low & busy)) >= SAGGING:
                    worst = float(np.nanmin(np.fmin(clock, ceiling[during])[busy]))
                    found.append(
                        f"{what} clock sagged to {worst / 1e6:.0f} of {wanted / 1e6:.0f} MHz, {count} samples in a row"
                    )
    else:
        clock, own = column(measured, "cpu_hz")[during], column(measured, "cpu_own")[during]
        if np.isfinite(clock).any():
            usual = float(np.nanmedian(clock))
            if (count := _longest((clock < CPU_SAG * usual) & ~(own < BUSY))) >= SAGGING:
                worst = float(np.nanmin(clock))
                found.append(
                    f"CPU clock sagged to {worst / 1e6:.0f} of {usual / 1e6:.0f} MHz, {count} samples in a row"
                )
    return found


def _moved(measured: BundleProfile, run: Run) -> list[str]:
    times, found = column(measured, "t_s"), []
    for name in measured.samples:
        if name.startswith("counter/"):
            values = column(measured, name)
            before, behind = values[times <= run.start_s], values[times >= run.end_s]
            during = values[within(measured, run.start_s, run.end_s)]
            series = np.concatenate((before[-1:], during, behind[:1]))
            series = series[np.isfinite(series)]
            if len(series) > 1 and series[-1] != series[0]:
                short = name.removeprefix("counter/")
                title = f"{short} ({OVER_CURRENT[short]})" if short in OVER_CURRENT else short
                found.append(f"counter {title} rose by {series[-1] - series[0]:.0f}: the machine throttled itself")
    return found


def _unread(measured: BundleProfile, run: Run) -> list[str]:
    during, found = within(measured, run.start_s, run.end_s), []
    if not during.any():
        return ["no sample fell into this run: more runs (--runs) or a shorter --interval-ms give some"]
    for name in measured.samples:
        kind, _, short = name.partition("/")
        silent = int(np.isnan(column(measured, name)[during]).sum())
        if silent and kind in ("power_w", "temperature_c", "counter", "energy_uj"):
            what = {"power_w": "rail", "temperature_c": "temperature", "counter": "counter", "energy_uj": "RAPL"}[kind]
            share = "none" if silent == during.sum() else f"{during.sum() - silent} of {during.sum()}"
            gated = ", gated" if kind == "temperature_c" else ""
            found.append(f"{what} {short}: {share} of its samples could be read{gated}")
    return found


# -- power and energy --------------------------------------------------------------------------------------------------


def power(measured: BundleProfile, names: tuple[str, ...] | None = None) -> tuple[Values, Values] | None:
    """Times in seconds and summed watts of some columns (by default the total), where all of them could be read."""
    names = measured.total_power if names is None else names
    if not names:
        return None
    times, watts = column(measured, "t_s"), np.zeros(len(measured.samples["t_s"]))
    for name in names:
        values = column(measured, name)
        if name.startswith("energy_uj/"):  # a counter; a sample where it wraps or stops is dropped
            steps = np.diff(values) / np.diff(times) / 1e6
            steps[steps < 0] = np.nan
            values = np.concatenate(([np.nan], steps))
        watts = watts + values
    good = np.isfinite(watts)
    return (times[good], watts[good]) if good.sum() >= 2 else None


def integral(times: Values, watts: Values, start_s: float, end_s: float) -> float:
    """Joules between two times, by trapezoids between the samples and interpolation at both ends."""
    inside = (times > start_s) & (times < end_s)
    at = np.concatenate(([start_s], times[inside], [end_s]))
    values = np.interp(at, times, watts)
    return float(((values[1:] + values[:-1]) / 2 * np.diff(at)).sum())


def energy(measured: BundleProfile, run: Run) -> Energy | None:
    """The energy of a run's answers; None if the total power was not read or has too few samples."""
    found = power(measured)
    if found is None:
        return None
    times, watts = found
    answers = [(a.start_s, a.start_s + a.total_ms / 1e3) for a in run.answers]
    decodes = [(a.start_s + a.first_token_ms / 1e3, a.start_s + a.total_ms / 1e3) for a in run.answers]
    tokens = sum(len(a.step_ms) for a in run.answers)
    seen = sum(int(((times >= start) & (times <= end)).sum()) for start, end in decodes)
    if not tokens or seen < FEWEST:
        return None
    resting = (times >= measured.idle_s[0]) & (times <= measured.idle_s[1])
    idle = float(watts[resting].mean()) if resting.any() else None
    decode_j, answer_j = (sum(integral(times, watts, *span) for span in spans) for spans in (decodes, answers))
    decode_s, answer_s = (sum(end - start for start, end in spans) for spans in (decodes, answers))
    return Energy(
        decode_j / tokens,
        None if idle is None else (decode_j - idle * decode_s) / tokens,
        answer_j / len(answers),
        None if idle is None else (answer_j - idle * answer_s) / len(answers),
        answer_j / answer_s,
        idle,
    )


def lowest(measured: BundleProfile, run: Run, name: str) -> float | None:
    """The least value of a column during a run, or None if there is none."""
    values = column(measured, name)[within(measured, run.start_s, run.end_s)]
    return float(np.nanmin(values)) if np.isfinite(values).any() else None


def summary(profile: Profile) -> list[dict[str, Any]]:
    """One flat row per run, as `--json` prints it, with case, percentiles, rates, memory, energy and verdict."""
    rows = []
    for measured in profile.bundles:
        for run in measured.runs:
            found, used = verdict(profile, measured, run), energy(measured, run)
            row: dict[str, Any] = {
                "bundle": measured.bundle.folder,
                "model": measured.bundle.model,
                "precision": measured.bundle.precision,
                "traversed": measured.bundle.traversed,
                "case": dataclasses.asdict(run.case),
                **dataclasses.asdict(found),
                "tokens_per_s": tokens_per_s(run),
                "peak_rss_bytes": run.peak_rss_bytes,
                "energy": None if used is None else dataclasses.asdict(used),
            }
            for name in ("available_bytes", "cma_free_bytes", "largest_free_block_bytes"):
                row[f"lowest_{name}"] = lowest(measured, run, name)
            for key, values in (pooled(run) | starts(measured)).items():
                row[key] = dict(zip(("p50", "p90", "p99"), percentiles(values), strict=True)) | {"n": len(values)}
            rows.append(row)
    return rows
