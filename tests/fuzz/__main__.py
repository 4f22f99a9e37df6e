"""Run campaigns of hostile trials, count how they end, and print a line that replays each failure."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.workers import CAMPAIGNS, Child, Outcome

TRIALS_PER_CHILD = 500  # so that what libraries leak does not look like one trial's memory
MOST_FAILURES = 50  # of a campaign, after which it ends


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="time of all campaigns together (default: 10)")
    parser.add_argument("--trials", type=int, help="trials of each campaign, instead of --minutes")
    parser.add_argument("--seed", type=int, help="trials are made from it (default: another one each time)")
    parser.add_argument("--only", default="", help=f"campaigns, with commas between: {','.join(CAMPAIGNS)}")
    parser.add_argument("--trial", type=int, help="replay this trial of one campaign, and print what it did")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    found = parser.parse_args(arguments)
    found.only = [name for name in found.only.split(",") if name] or list(CAMPAIGNS)
    if unknown := set(found.only) - set(CAMPAIGNS):
        parser.error(f"no campaign {', '.join(sorted(unknown))}; there are {', '.join(CAMPAIGNS)}")
    if found.trial is not None and (len(found.only) != 1 or found.seed is None):
        parser.error("--trial needs --seed, and --only with one campaign")
    if found.seed is None:
        found.seed = int(time.time())
    return found


def campaign(name: str, seed: int, place: Path, seconds: float, trials: int | None, quiet: bool) -> list[Outcome]:
    """Trials 0, 1, ... of a campaign, until the time is over or there are as many as asked for."""
    shown, outcomes, failures = 0.0, list[Outcome](), 0
    child: Child | None = Child(name, place)
    start = time.monotonic()  # not counting what the campaign makes first
    try:
        while failures < MOST_FAILURES:
            passed, number = time.monotonic() - start, len(outcomes)
            if (passed >= seconds) if trials is None else (number >= trials):
                break
            if child is None or not child.alive or number % TRIALS_PER_CHILD == TRIALS_PER_CHILD - 1:
                if child is not None:
                    child.close()
                child = Child(name, place)
            outcomes.append(child.run(seed, number))
            if not outcomes[-1].good:
                failures += 1
                print(f"{name}: {_shown(outcomes[-1])}", file=sys.stderr, flush=True)
                child.close()
                child = None
            if not quiet and passed - shown >= 10:
                shown = passed
                print(f"{name}: {passed:4.0f} s, {len(outcomes)} trials, {failures} failures", file=sys.stderr)
    finally:
        if child is not None:
            child.close()
    return outcomes


def _shown(outcome: Outcome) -> str:
    lines = "\n  ".join(outcome.detail.strip().splitlines())
    return f"{outcome.end}\n  replay: {outcome.replay}\n  {lines}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 if every trial ended as it may."""
    asked = options(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = Path(folder)
        if asked.trial is not None:
            with Child(asked.only[0], place) as child:
                outcome = child.run(asked.seed, asked.trial)
            print(_shown(outcome))
            return 0 if outcome.good else 1
        found: dict[str, list[Outcome]] = {}
        with contextlib.suppress(KeyboardInterrupt):  # what was done is counted
            for name in asked.only:
                seconds = 60 * asked.minutes / len(asked.only)
                found[name] = campaign(name, asked.seed, place, seconds, asked.trials, asked.json)
    counts = {name: Counter(outcome.end for outcome in outcomes) for name, outcomes in found.items()}
    failures = [outcome for outcomes in found.values() for outcome in outcomes if not outcome.good]
    if asked.json:
        listed = [{"campaign": f.campaign, "end": f.end, "detail": f.detail, "replay": f.replay} for f in failures]
        print(json.dumps({"seed": asked.seed, "counts": counts, "failures": listed}))
    else:
        for name, ends in counts.items():
            print(f"{name:12} {ends.total():6} trials: {', '.join(f'{n} {end}' for end, n in ends.most_common())}")
        for failure in failures:
            print(f"{failure.end}: {failure.replay}")
        print(f"seed {asked.seed}: {len(failures)} failures in {sum(c.total() for c in counts.values())} trials")
    return 1 if failures or not all(found.get(name) for name in asked.only) else 0


if __name__ == "__main__":
    sys.exit(main())
