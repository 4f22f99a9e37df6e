"""Trials that end as none may, each in its way, to show that it is noticed. Not one of the campaigns."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from trol_edge.errors import UsageError


class Trials:
    """The first file in the campaign's folder says how a trial ends."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def trial(self, rng: Random) -> str:
        """End as the folder says."""
        end = next(self.place.iterdir()).name
        if end == "refused":
            raise UsageError("no")
        if end == "exception":
            raise ValueError(end)
        if end == "panic":
            raise type("PanicException", (BaseException,), {})(end)
        if end == "wrong":
            raise AssertionError(end)
        if end == "crash":
            os.abort()
        if end == "memory":
            return str(len(b"\1" * (1200 << 20)) and "answered")
        while end == "hang":
            pass
        return end
