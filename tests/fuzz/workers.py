"""Trials in child processes: a crash, a hang and too much memory are seen, and the next child goes on."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Protocol

from trol_edge.errors import TrolEdgeError
from trol_edge.machine.identity import peak_memory, reset_peak_memory

ROOT = Path(__file__).resolve().parents[2]
CAMPAIGNS = ("bundles", "pictures", "checkpoints", "signals", "kills", "calls", "http")
CPU_S = 10  # most processor time of a trial
START_S = 3600  # for what a campaign makes first, such as bundles
WALL_S = 300  # most time of a trial, which may have to wait for a processor
MEMORY_BYTES = 1 << 30  # most memory that a trial may take beyond what the child had before
ADDRESS_BYTES = 6 << 30  # address space of a child: what is asked for beyond it is refused by the system
GOOD = ("answered", "refused")


class Campaign(Protocol):
    """A kind of trials. Made in a child, with a folder of its own for files."""

    def __init__(self, place: Path) -> None: ...

    def trial(self, rng: Random) -> str:
        """Do one; returns a word for how it ended. TrolEdgeError is such an end, other exceptions are failures."""
        ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended: a campaign's word, or "exception", "wrong", "crash", "hang", "memory" with what is known."""

    campaign: str
    seed: int
    number: int
    end: str
    detail: str = ""

    @property
    def good(self) -> bool:
        """Whether it ended as it may."""
        return self.end in GOOD

    @property
    def replay(self) -> str:
        """The command that does this trial again."""
        return f"python -m tests.fuzz --only {self.campaign} --seed {self.seed} --trial {self.number}"


def say(what: str) -> None:
    """Note what a trial is about to do, for the report of its failure."""
    print(what, file=sys.stderr, flush=True)


def work(name: str, place: Path) -> None:
    """A child: trials as standard input asks for them, a line of JSON for each on what was standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with who asked for it
    make: type[Campaign] = importlib.import_module(f"tests.fuzz.{name}").Trials
    campaign = make(place)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        seed, number = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        reset_peak_memory()
        before = peak_memory()
        end, detail = _one(campaign, Random(f"{name} {seed} {number}"))
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        grown = peak_memory() - before
        if grown > MEMORY_BYTES:
            end, detail = "memory", f"{grown / 1e6:.0f} MB more than before; it ended with {end} {detail}"
        print(json.dumps({"end": end, "detail": detail}), file=answers, flush=True)


def _one(campaign: Campaign, rng: Random) -> tuple[str, str]:
    try:
        return campaign.trial(rng), ""
    except TrolEdgeError as error:
        try:
            str(error).encode()
        except UnicodeError:
            return "wrong", f"a message that cannot be printed: {error!r}"
        if len(str(error)) > 10_000:
            return "wrong", f"a message of {len(str(error))} characters: {str(error)[:300]}"
        return "refused", str(error)
    except AssertionError as error:
        return "wrong", f"{error}\n{traceback.format_exc(limit=-4)}"
    except BaseException as error:  # also what libraries in Rust raise
        if isinstance(error, (KeyboardInterrupt, SystemExit)) and not getattr(campaign, "interrupts", False):
            raise
        return "exception", traceback.format_exc(limit=-12)


class Child:
    """A child process of a campaign."""

    def __init__(self, name: str, place: Path) -> None:
        self.name = name
        self._place = tempfile.TemporaryDirectory(prefix=f"{name}-", dir=place)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the child)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TROL_EDGE_SELFTEST": "0", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.workers", name, self._place.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            cwd=ROOT,
            env=environment,
            start_new_session=True,  # so that whatever a trial started ends with it
        )
        if self._answer(START_S) is None:
            raise RuntimeError(f"the campaign {name} does not start:\n{self._tail()}")

    def run(self, seed: int, number: int) -> Outcome:
        """One trial. After a crash or a hang the child is gone."""
        assert self._process.stdin is not None
        self._said.truncate(0)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([seed, number]).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._answer(WALL_S)
        if answer is not None:
            detail = answer["detail"]
            if answer["end"] not in GOOD:
                detail = f"{self._tail()}{detail}"
            return Outcome(self.name, seed, number, answer["end"], detail)
        code = self._process.poll()
        if code is None or -code == signal.SIGXCPU:
            return Outcome(self.name, seed, number, "hang", self._tail())
        named = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Outcome(self.name, seed, number, "crash", f"{named}\n{self._tail()}")

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """The child's next line; None if it has ended or nothing came in time."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            return None
        found: dict[str, Any] = json.loads(line)
        return found

    def _tail(self) -> str:
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - 3000))
        return self._said.read().decode(errors="replace").lstrip("\0")

    @property
    def alive(self) -> bool:
        """Whether it can do another trial."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the child and all that it started, and remove its folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        with contextlib.suppress(OSError):
            self._place.cleanup()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
