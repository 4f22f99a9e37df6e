"""Kills of `export --force` and `calibrate` at any instant: there is one complete bundle under the name, always."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from tests.conftest import CHECKPOINTS, NANOS
from tests.fuzz.material import bundle, copy, remember_traces
from tests.fuzz.workers import say
from trol_edge.bundle.folder import new_folder
from trol_edge.bundle.manifest import Bundle
from trol_edge.calibration import run as calibration
from trol_edge.calibration import samples
from trol_edge.export import pipeline


class Trials:
    """Starts a writer in a child, kills it, and looks at what is there."""

    def __init__(self, place: Path) -> None:
        remember_traces()
        self.old, self.new = (copy(bundle(model), place / model) for model in NANOS)
        self.identities = {Bundle(self.old).identity, Bundle(self.new).identity}
        self.target = place / "target" / "bundle"
        self.target.parent.mkdir()
        self.statistics = place / "statistics"
        self.samples = samples.load(None, 2)
        self.seconds: dict[str, float] = {}

    def trial(self, rng: Random) -> str:
        """One kill."""
        kind = rng.choice([self.folder, self.folder, self.folder, self.export, self.calibrate])
        if kind == self.calibrate:
            self.killed("calibrate", self.calibrate, rng)
            if rng.random() < 0.3:
                found = self.calibrate()
                assert found.samples == 2, found.samples
            return "answered"
        copy(self.old, self.target)
        self.killed(kind.__name__, kind, rng)
        left = sorted(path.name for path in self.target.parent.iterdir())
        opened = Bundle(self.target)  # takes the old one back where a kill came between two renames
        assert opened.identity in self.identities, f"another bundle than before or after; beside it {left}"
        if rng.random() < 0.3:
            self.folder()
            assert Bundle(self.target).identity == Bundle(self.new).identity
            left = [path.name for path in self.target.parent.iterdir() if path != self.target]
            assert not left, f"what was left is not removed: {left}"
        return "answered"

    def killed(self, name: str, work: Callable[[], Any], rng: Random) -> None:
        """Run work in a fork that is killed, by the clock or at a place in what writes folders."""
        if name not in self.seconds:  # how long it takes when nobody kills it
            start = time.monotonic()
            self.fork(work, lambda: None)
            self.seconds[name] = time.monotonic() - start
        by_place = name == "folder" or rng.random() < 0.3
        if by_place:
            countdown = rng.randrange(400)
            say(f"{name}, killed at place {countdown}")
            self.fork(work, lambda: sys.settrace(_Killer(countdown).trace))
        else:
            delay = rng.random() * self.seconds[name]
            say(f"{name}, killed after {delay:.3f} s")
            self.fork(work, lambda: signal.setitimer(signal.ITIMER_REAL, delay))

    def fork(self, work: Callable[[], Any], prepare: Callable[[], Any]) -> None:
        """A child that does the work; its status says whether it was killed, and any other end is a failure."""
        child = os.fork()
        if child == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                prepare()
                work()
                sys.settrace(None)
                os._exit(0)
            finally:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL, -signal.SIGALRM), f"the writer ends with {status}"

    def folder(self) -> None:
        """Only the folder, written as export writes it."""
        with new_folder(self.target, overwrite=True) as part:
            for path in self.new.iterdir():
                (part / path.name).write_bytes(path.read_bytes())

    def export(self) -> None:
        """The command `export --force`."""
        pipeline.export(CHECKPOINTS / NANOS[1], self.target, overwrite=True)

    def calibrate(self) -> Any:
        """The command `calibrate`, which goes on where it was killed."""
        return calibration.calibrate(CHECKPOINTS / NANOS[0], self.samples, self.statistics, overwrite=True)


class _Killer:
    """Kills its process at the n-th instruction of what writes folders."""

    def __init__(self, countdown: int) -> None:
        self.countdown = countdown

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith("bundle/folder.py"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.countdown -= 1
            if self.countdown < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.trace
