"""Finds what became slower since an older profile by more than noise.

How noise is judged: every answer gives one value per stage. The steps of one answer are not independent, so their
median is that value. A stage is slower if the ratio of the medians, new / old, exceeds one by more than a threshold
with 99 % confidence. The confidence interval comes from 2000 bootstrap resamplings of both sides' answers, and its
lower end is what counts. The threshold is the larger of 5 % and the drift of the two runs themselves, which is the
largest ratio between the medians of their thirds. With fewer than five values on a side resampling says nothing; then
every new value must be at least 10 % above every old one. Peak memory is one value per run and may grow by 5 %.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from trol_edge.errors import UsageError
from trol_edge.measure.record import STAGES, STARTS, BundleProfile, Profile, Run, Values, case_name, per_answer, starts
from trol_edge.measure.samples import energy, verdict

LEAST = 0.05  # smallest slowdown that is reported
FEW, LEAST_OF_FEW = 5, 0.10
CONFIDENCE, RESAMPLINGS = 0.99, 2000
# Stages below this are too short for a robot to notice and for the clock to resolve.
TOO_SHORT_MS = 0.05


@dataclasses.dataclass(frozen=True)
class Change:
    """One stage of one case, in the older profile and in the new one."""

    where: str  # names the bundle and the case
    what: str
    unit: str
    old: float  # median
    new: float
    threshold: float  # relative difference that is still noise
    slower: bool


@dataclasses.dataclass(frozen=True)
class BaselineComparison:
    """Everything that both profiles measured; `unjudged` says why parts of it could not be compared."""

    changes: tuple[Change, ...]
    unjudged: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def slower(self) -> list[Change]:
        """The changes that are slower, or take more, by more than noise."""
        return [change for change in self.changes if change.slower]


def compare(old: Profile, new: Profile) -> BaselineComparison:
    """Compare what both profiles measured. Raises UsageError if their machines, bundles or cases differ."""
    _same_machine(old, new)
    changes: list[Change] = []
    unjudged, remarks = [], []
    pairs = [(b, m) for m in new.bundles for b in old.bundles if _key(b) == _key(m)]
    if not pairs:
        raise UsageError(
            f"the baseline has other bundles ({_listed(old)}) than this profile ({_listed(new)}); "
            "measure bundles of the same model, target, precision and context"
        )
    for before, after in pairs:
        name = after.bundle.folder
        if before.bundle.manifest_sha256 != after.bundle.manifest_sha256:
            remarks.append(f"{name}: exported again since the baseline (its manifest differs)")
        if before.library != after.library:
            remarks.append(f"{name}: {before.library} then, {after.library} now")
        for key, values in starts(after).items():
            if key in starts(before):
                changes.append(judge(name, STARTS[key], "ms", starts(before)[key], values))
        known = {_asked(run): run for run in before.runs}
        matched = [(known[_asked(run)], run) for run in after.runs if _asked(run) in known]
        if not matched:
            cases = "; ".join(case_name(run.case) for run in before.runs)
            raise UsageError(
                f"{name}: the baseline measured other cases ({cases}); measure with the same --size, "
                "--prompt-tokens and --tokens"
            )
        for was, run in matched:
            where = f"{name}, {case_name(run.case)}"
            bad = [f"then: {why}" for why in verdict(old, before, was).invalid]
            bad += [f"now: {why}" for why in verdict(new, after, run).invalid]
            if bad:
                unjudged.append(f"{where}: {'; '.join(bad)}")
            else:
                changes += _run_changes(where, before, was, after, run)
    return BaselineComparison(tuple(changes), tuple(unjudged), tuple(remarks))


def judge(where: str, what: str, unit: str, old: Values, new: Values) -> Change:
    """Judge one stage by the values of the answers on both sides."""
    was, now = float(np.median(old)), float(np.median(new))
    if min(len(old), len(new)) < FEW:
        threshold = LEAST_OF_FEW
        slower = bool(new.min() > old.max() * (1 + threshold))
    else:
        threshold = max(LEAST, drift(old), drift(new))
        rng = np.random.default_rng(0)
        medians = [np.median(rng.choice(side, (RESAMPLINGS, len(side))), axis=1) for side in (old, new)]
        low = float(np.quantile(medians[1] / np.maximum(medians[0], 1e-12), 1 - CONFIDENCE))
        slower = low > 1 + threshold
    if unit == "ms" and now - was < TOO_SHORT_MS:
        slower = False
    return Change(where=where, what=what, unit=unit, old=was, new=now, threshold=threshold, slower=slower)


def drift(values: Values) -> float:
    """Relative difference between the medians of a run's thirds: how much it varies on its own."""
    medians = [float(np.median(third)) for third in np.array_split(values, 3)]
    return max(medians) / min(medians) - 1 if min(medians) > 0 else 0.0


def _run_changes(where: str, before: BundleProfile, was: Run, after: BundleProfile, run: Run) -> list[Change]:
    old, new = per_answer(was), per_answer(run)
    found = [judge(where, STAGES[key], "ms", old[key], new[key]) for key in STAGES if key in old and key in new]
    single = [("peak memory", "MB", was.peak_rss_bytes, run.peak_rss_bytes, 1e6)]
    joules = energy(before, was), energy(after, run)
    if joules[0] is not None and joules[1] is not None:
        single.append(("energy per token", "mJ", joules[0].token_j, joules[1].token_j, 1e-3))
    for what, unit, then, now, scale in single:
        if then and now:
            least = LEAST if unit == "MB" else LEAST_OF_FEW
            found.append(
                Change(
                    where=where,
                    what=what,
                    unit=unit,
                    old=then / scale,
                    new=now / scale,
                    threshold=least,
                    slower=now > then * (1 + least),
                )
            )
    return found


def _same_machine(old: Profile, new: Profile) -> None:
    differs = [
        f"{name.replace('_', ' ')} {old.machine.get(name)!r} there, {new.machine.get(name)!r} here"
        for name in ("model", "board", "cpu", "cores", "power_mode_name", "power_mode")
        if old.machine.get(name) != new.machine.get(name)
    ]
    if differs:
        raise UsageError(
            f"the baseline is from another machine ({'; '.join(differs)}); "
            "take a baseline on this one, in this power mode"
        )
    if old.settings.threads != new.settings.threads:
        raise UsageError(
            f"the baseline ran with --threads {old.settings.threads}, this profile with {new.settings.threads}; "
            "use the same number"
        )


def _key(measured: BundleProfile) -> tuple[object, ...]:
    bundle = measured.bundle
    return bundle.model, bundle.target, bundle.precision, bundle.kv, bundle.context, bundle.traversed


def _asked(run: Run) -> tuple[object, ...]:
    return run.case.size, run.case.prompt_tokens, run.case.tokens


def _listed(profile: Profile) -> str:
    return ", ".join(f"{b.model} {b.target} {b.kind} {b.context}" for b in (m.bundle for m in profile.bundles))
