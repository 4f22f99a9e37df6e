"""How a program ends: with daemon threads inside calls, after Ctrl-C, and as the fork of one that has a Runtime."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import slow
from trol_edge.measure.soak import HANGS_S, soak

ROOT = Path(__file__).resolve().parents[1]
START = """
import os, signal, sys, threading, time
import trol_edge
rt = trol_edge.Runtime(sys.argv[1], threads=3)  # more than one, so that the library has threads of its own
QUESTION = "Describe the scene."
"""
DAEMONS = {
    "generate": "rt.generate(QUESTION, max_new_tokens=500)",
    "stream": "[None for _ in rt.stream(QUESTION)]",
    "choose": "rt.choose(QUESTION, ['a star', 'a ring'])",
    "session": "rt.session().prefill(list(range(5, 700)))",
    "load": "trol_edge.Runtime(sys.argv[1])",
}
DAEMON = """
inside = threading.Event()
def work():
    while True:
        try:
            inside.set()
            {call}
        except trol_edge.TrolEdgeError:
            time.sleep(0.001)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
inside.wait()
time.sleep(0.05 * int(sys.argv[2]))
"""
QUICK = ("generate", "load")  # the others are slow


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A program of its own, which may not take long."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "call",
    [pytest.param(call, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, call in DAEMONS.items()],
)
def test_a_program_ends_while_daemon_threads_are_inside_calls(call: str, nano_bundle: Path) -> None:
    """At once and a while later; with exit status 0 and nothing said."""
    for moment in (0, 2):
        done = run(START + DAEMON.format(call=call), nano_bundle, str(moment))
        assert (done.returncode, done.stderr) == (0, "")


def test_a_program_ends_with_its_own_status(nano_bundle: Path) -> None:
    """An error, too, ends it as it would without us."""
    done = run(START + DAEMON.format(call=DAEMONS["generate"]) + "sys.exit(7)", nano_bundle, "1")
    assert (done.returncode, done.stderr) == (7, "")


def test_threads_that_python_waits_for_may_finish(nano_bundle: Path) -> None:
    """What is no daemon answers to its end, although the main thread is over."""
    ask = 'lambda: (time.sleep(0.3), print(rt.generate("Is there a star?").finish_reason))'
    work = f"threading.Thread(target={ask}).start()"
    done = run(START + work, nano_bundle)
    assert (done.returncode, done.stdout.strip()) == (0, "stop")


def started(command: list[str]) -> subprocess.Popen[str]:
    """A process that Ctrl-C reaches, also where the tests run in the background of a shell, which ignores it there."""

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)


@pytest.mark.slow
def test_ctrl_c_ends_soak(nano_bundle: Path) -> None:
    """With the exit code of an interrupted command; its threads are inside calls."""
    command = [sys.executable, "-m", "trol_edge", "soak", str(nano_bundle), "--minutes", "5"]
    with started(command) as soak:
        assert soak.stdout is not None and soak.stderr is not None
        try:
            soak.wait(20)
        except subprocess.TimeoutExpired:
            soak.send_signal(signal.SIGINT)
        _, said = soak.communicate(timeout=120)
    assert soak.returncode == 130
    assert "Traceback" not in said and "terminate" not in said


@pytest.mark.slow
def test_ctrl_c_ends_an_asyncio_program(nano_bundle: Path) -> None:
    """The thread of `astream` ends with it: exit code 130 at once, without a traceback."""
    scene = ROOT / "export" / "checkpoints" / "trol-nano" / "scene.png"
    program = (
        "import sys; from trol_edge.examples import asyncio_loop\nwhile not asyncio_loop.main(sys.argv[1:]): pass\n"
    )
    program += "sys.exit(130)"
    command = [sys.executable, "-c", program, str(nano_bundle), str(scene)]
    with started(command) as running:
        assert running.stdout is not None
        running.stdout.readline()  # an answer has come
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=120)
    assert (running.returncode, said) == (130, "")


@pytest.mark.slow
def test_ctrl_c_in_soak_ends_its_threads(nano_bundle: Path) -> None:
    """As an exception, with no thread left, wherever it comes."""
    before = threading.active_count()

    def interrupt(seconds: float, resident: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        soak(nano_bundle, 60, interrupt)
    assert threading.active_count() == before


def test_ctrl_c_in_soak_while_threads_come_to_rest(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that rest already are let go."""
    before, wait_for = threading.active_count(), threading.Condition.wait_for

    def interrupted(self: threading.Condition, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread() and timeout == HANGS_S:
            self.wait(HANGS_S)  # for the first thread that rests
            raise KeyboardInterrupt
        return wait_for(self, predicate, timeout)

    monkeypatch.setattr(threading.Condition, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        soak(nano_bundle, 60, lambda *_: None)
    assert threading.active_count() == before


FORK = """
rt.generate(QUESTION, max_new_tokens=2)
session = rt.session(); session.prefill([5, 6])
stream = rt.stream(QUESTION); next(stream)
def read():
    for piece in rt.stream(QUESTION, max_new_tokens=400):
        pass
if sys.argv[2] == "beside a thread":
    threading.Thread(target=read, daemon=True).start()
child = os.fork()
if child == 0:
    signal.alarm(60)
    {child}
    sys.exit(3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(status)
assert rt.generate("Is there a star?").text
"""
REFUSED = """
    refused = 0
    for call in (lambda: rt.generate(QUESTION), lambda: next(stream), lambda: session.step(5), rt.session,
             lambda: rt.choose(QUESTION, ["a", "b"]), lambda: rt.ask_many([QUESTION]), rt.__enter__,
             lambda: rt.stream(QUESTION), lambda: session.fork()):
        try:
            call()
        except trol_edge.TrolEdgeError as error:
            refused += "cannot be used in its fork" in str(error)
    sys.exit(3 if refused == 9 else 4)
"""
DROPPED = """
    import gc
    rt.stop(); stream.close(); session.close(); rt.close()
    del rt, session, stream
    gc.collect()
"""
OWN = """
    with trol_edge.Runtime(sys.argv[1]) as mine:
        assert mine.generate("Is there a star?").text
"""


@pytest.mark.parametrize("beside", [*slow("alone"), "beside a thread"])
@pytest.mark.parametrize(
    "child",
    [
        pytest.param(REFUSED, id="uses"),
        pytest.param(DROPPED, id="drops", marks=pytest.mark.slow),
        pytest.param(OWN, id="makes its own"),
        pytest.param("\n", id="ends", marks=pytest.mark.slow),
    ],
)
def test_the_child_of_a_fork(child: str, beside: str, nano_bundle: Path) -> None:
    """It is refused, or drops what it inherited, and ends with its own exit status; the parent goes on."""
    done = run(START + FORK.format(child=child), nano_bundle, beside)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "3", "")
