"""The soak: a few seconds of it, its judgement of memory, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trol_edge.cli.main import main
from trol_edge.machine import identity as machine
from trol_edge.measure import soak
from trol_edge.runtime import Runtime


@pytest.mark.slow
def test_a_few_seconds(nano_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of call is made, nothing is wrong, nothing is left."""
    code = main(["soak", str(nano_bundle), "--minutes", "0.1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["wrong"] == []
    assert (code, report["passed"], report["slope"]) == (0, True, None)
    assert sum(report["calls"].values()) > 0
    assert report["vision_hits"] > 0


def series(minutes: float, mb_per_minute: float, noise_mb: float = 0.0) -> list[tuple[float, int]]:
    """Samples once a second: 200 MB, a warm-up of 50 MB that is over after a fifth, and a slope."""
    times = np.arange(0, 60 * minutes)
    sizes = 200 + 50 * np.minimum(1, times / times[-1] * 5) + mb_per_minute * times / 60
    sizes += np.random.default_rng(0).normal(0, noise_mb, len(times))
    return [(float(t), int(1e6 * s)) for t, s in zip(times, sizes, strict=True)]


def test_memory_is_judged_by_its_slope() -> None:
    """A warm-up is none, noise is none; a leak of 1 MB a minute in ten minutes is one."""
    flat = soak.judge(series(10, 0.0, noise_mb=5))
    assert flat.flat
    assert abs(flat.mb_per_minute) < 0.5
    leak = soak.judge(series(10, 1.0, noise_mb=1))
    assert not leak.flat
    assert leak.mb_per_minute == pytest.approx(1.0, abs=0.1)
    assert leak.growth_bytes == pytest.approx(6.67e6, rel=0.1)
    assert leak.error_bytes < 1e6
    assert soak.judge(series(10, -1.0)).flat
    noisy = soak.judge(series(10, 0.0, noise_mb=30))
    assert noisy.error_bytes == pytest.approx(2 * 30e6 * np.sqrt(12 / 400), rel=0.2)  # of a line through 400 samples
    assert noisy.flat


def test_the_verdict_needs_all_three() -> None:
    """A wrong answer or a slope fails it; too short a run is judged by its answers."""
    leak, flat = soak.judge(series(10, 1.0)), soak.judge(series(10, 0.0))

    def passed(wrong: tuple[str, ...], slope: Any) -> bool:
        return soak.SoakReport(1.0, {}, wrong, slope, 0, 0).passed

    assert passed((), flat) and passed((), None)
    assert not passed((), leak)
    assert not passed(("ask: other tokens",), flat)


@pytest.mark.slow
def test_wrong_answers_fail_it(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A Runtime that answers differently under load than alone: found, said, and exit code 1."""
    generate, seen = Runtime.generate, []  # type: Any, list[int]

    def sometimes_wrong(self: Runtime, *args: Any, **more: Any) -> Any:
        seen.append(1)
        if len(seen) > 13:  # the serial run is over
            more["repetition_penalty"] = 50.0
        return generate(self, *args, **more)

    monkeypatch.setattr(Runtime, "generate", sometimes_wrong)
    assert main(["soak", str(nano_bundle), "--minutes", "0.5"]) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said and "wrong: " in said and "alone" in said


@pytest.mark.slow
def test_sessions_left_behind_fail_it(nano_bundle: Path) -> None:
    """What `_left_behind` looks for is found."""
    with Runtime(nano_bundle) as runtime:
        assert soak.left_behind(runtime) == []
        kept = [runtime.session() for _ in range(2)]
        assert soak.left_behind(runtime) == ["2 sessions are left, at most 1 waits for the next answer"]
        del kept
        stream = runtime.stream("What is this?")
        next(stream)
        assert soak.left_behind(runtime) == ["1 sessions reserved, 0 calls queued"]
        stream.close()
        assert soak.left_behind(runtime) == []


ARENAS = """
import ctypes, os, sys, threading
import trol_edge

runtime = trol_edge.Runtime(sys.argv[1])
hold = threading.Barrier(9)
for _ in range(8):
    threading.Thread(target=lambda: (bytearray(100_000), hold.wait(), hold.wait())).start()
hold.wait()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, ctypes.c_void_p(file))
libc.fclose(ctypes.c_void_p(file))
hold.wait()
"""


@pytest.mark.skipif(machine.from_libc("malloc_info") is None, reason="only glibc has arenas that could be bounded")
@pytest.mark.parametrize(("own_limit", "fewest", "most"), [(None, 1, 2), ("4", 3, 4)])
def test_threads_share_arenas(nano_bundle: Path, tmp_path: Path, own_limit: str | None, fewest: int, most: int) -> None:
    """A Runtime bounds how many the C library makes, unless the user did."""
    env = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    env |= {"MALLOC_ARENA_MAX": own_limit} if own_limit else {}
    told = tmp_path / "arenas.xml"
    subprocess.run([sys.executable, "-c", ARENAS, nano_bundle, told], env=env, check=True)
    assert fewest <= told.read_text().count("<heap nr=") <= most
