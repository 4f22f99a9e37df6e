"""Ctrl-C at a chosen place: KeyboardInterrupt where CPython would run a signal's handler, one place per run.

CPython (3.10 to 3.14) looks for signals when a Python function begins or a generator goes on, at jumps backwards, and
when a call returns. A trace function sees each of these places as an opcode, and raises there.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections import Counter
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

Place = tuple[CodeType, int]
# Files whose functions take, hold or change something that outlives a call, and those of the standard library that they
# use for it. An exception that begins deeper leaves through a call of one of these.
HOLDING = (
    *(
        f"trol_edge/{name}.py"
        for name in ("runtime", "session", "cache", "vision_cache", "model", "lifetime", "latest")
    ),
    *(f"answering/{name}.py" for name in ("asking", "beam", "choose", "desk", "loop", "streams", "turns")),
    *("/threading.py", "/contextlib.py", "/weakref.py", "tests/test_interrupts.py"),
)


@functools.cache
def _names(code: CodeType) -> dict[int, str]:
    return {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}


@functools.cache
def _handlers(code: CodeType) -> list[tuple[int, int, int]]:
    parse = getattr(dis, "_parse_exception_table", None)  # 3.11 and newer; 3.10 keeps its handlers on a stack
    return [(entry.start, entry.end, entry.target) for entry in parse(code)] if parse else []


def _handler(code: CodeType, at: int) -> int | None:
    return next((target for start, end, target in _handlers(code) if start <= at < end), None)


class Interrupter:
    """Counts the places that a call comes by, or raises at one of them."""

    def __init__(self, at: Place | None = None, hit: int = 1) -> None:
        """at: raise there, the `hit`-th time; None: nowhere."""
        self.at, self.hit = at, hit
        self.seen: Counter[Place] = Counter()
        self.raised = False
        self._last: dict[FrameType, int] = {}

    def run(self, call: Callable[[], Any]) -> Any:
        """What the call returns; KeyboardInterrupt goes through."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            return call()
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith(HOLDING):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and not self.raised and self._delivers(frame):
            place = (frame.f_code, frame.f_lasti)
            self.seen[place] += 1
            if place == self.at and self.seen[place] == self.hit:
                self.raised = True
                raise KeyboardInterrupt
        return self._trace

    def _delivers(self, frame: FrameType) -> bool:
        code, at = frame.f_code, frame.f_lasti
        name, before = _names(code).get(at, ""), self._last.get(frame)
        self._last[frame] = at
        if name == "RESUME" or name.startswith(("JUMP_BACKWARD", "JUMP_ABSOLUTE")) or before is None:
            return True
        if not _names(code).get(before, "").startswith("CALL"):
            return False
        # The call's own handlers are what a real signal meets; raised one instruction later it should meet the same.
        return not _handlers(code) or _handler(code, before) == _handler(code, at)


def places(call: Callable[[], Any]) -> list[tuple[Place, int]]:
    """Where a call may be interrupted: each place the first and the last time that it comes by."""
    counter = Interrupter()
    counter.run(call)
    return [(place, hit) for place, hits in counter.seen.items() for hit in sorted({1, hits})]


def text_of(place: Place) -> str:
    """A place for a message."""
    code, at = place
    lines = [line for start, line in dis.findlinestarts(code) if start <= at and line is not None]
    return f"{code.co_filename}:{lines[-1] if lines else 0} {code.co_name} +{at}"
