"""What the tables of devices and of processors have in common: entries as JSON, for users to describe their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trol_edge.errors import UsageError


def to_json(entry: Any) -> str:
    """Write a device or a processor as JSON that its table's `find` reads back from a file."""
    return json.dumps(dataclasses.asdict(entry), indent=1)


def require(path: Path, entry: Any, sizes: Mapping[str, float], more: Sequence[str], advice: str) -> None:
    """Raise UsageError if a number of `sizes` is not above 0, if what a system takes is below 0, or for `more`.

    path: the file that it was read from. more: what else is wrong.
    """
    wrong = [f"{name} {value} is not above 0" for name, value in sizes.items() if not value > 0]
    wrong += [f"{k} {getattr(entry, k)} is below 0" for k in ("os_bytes", "desktop_bytes") if getattr(entry, k) < 0]
    if wrong := [*wrong, *more]:
        raise UsageError(f"{path}: {'; '.join(wrong)}. {advice}")
