"""The faults: where each is planted, what it is, and which suite must go red."""

from __future__ import annotations

import dataclasses
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old` stands once in `file`; with `new` instead, one of `tests` fails, all of which `make suite` runs."""

    file: str
    old: str
    new: str
    what: str
    tests: tuple[str, ...]
    suite: str = "test"


FAULTS: tuple[Fault, ...] = ()
