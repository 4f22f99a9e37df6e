"""The campaigns of hostile trials: a short one without a failure, and that failures of every kind are seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.workers import CAMPAIGNS, ROOT, Child

ENDS = {
    "answered": "answered",
    "refused": "refused",
    "exception": "exception",
    "panic": "exception",
    "wrong": "wrong",
    "crash": "crash",
    "hang": "hang",
    "memory": "memory",
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_every_bad_end_is_seen(end: str, tmp_path: Path) -> None:
    """What no trial may do is named, and what it may do is not."""
    with Child("faulty", tmp_path) as child:
        (next(tmp_path.iterdir()) / end).touch()
        outcome = child.run(0, 1)
    assert (outcome.end, outcome.good) == (ENDS[end], end in ("answered", "refused")), outcome


def test_trials_are_known_by_their_seed() -> None:
    """A seed and a number name one trial, and the command line says so."""
    command = [sys.executable, "-m", "tests.fuzz", "--only", "pictures", "--trial", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--trial needs --seed" in done.stderr


@pytest.mark.slow
@pytest.mark.heavy
def test_a_short_campaign_of_each_kind() -> None:
    """No trial ends otherwise than in an answer as it should be or in a TrolEdgeError."""
    command = [sys.executable, "-m", "tests.fuzz", "--trials", "12", "--seed", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    found = json.loads(done.stdout)
    assert done.returncode == 0, found["failures"]
    assert found["counts"].keys() == set(CAMPAIGNS) and found["failures"] == []
    assert all(sum(ends.values()) == 12 for ends in found["counts"].values())
    assert all(found["counts"][name].get("answered") for name in CAMPAIGNS), "nothing was ever answered"
