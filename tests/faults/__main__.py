"""Plant each fault of the catalogue in a copy of the repository and show that its tests go red."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.faults.catalogue import FAULTS, ROOT, Fault

FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
MINUTES = 10  # for the tests of one fault; a fault that makes them hang is seen, too


def copy(to: Path) -> None:
    """What git knows of, and the bundles and traces that are kept: no links, which onnx's checker refuses."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if os.path.lexists(ROOT / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)
    if (ROOT / "build" / "tests").is_dir():
        shutil.copytree(ROOT / "build" / "tests", to / "build" / "tests", dirs_exist_ok=True)


def run(place: Path, suite: str, tests: Iterable[str], minutes: int = MINUTES, *more: str) -> tuple[int, str]:
    """Exit code of pytest and what it printed, for the part of some tests that is in a suite."""
    marked = "slow" if suite == "test-all" else "not slow"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", marked, *more, *tests]
    environment = os.environ | {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return 1, f"FAILED no end after {minutes} minutes"
    return done.returncode, done.stdout + done.stderr


def plant(place: Path, fault: Fault) -> tuple[bool, str]:
    """Whether a fault was seen, and by which test."""
    path = place / fault.file
    sound = path.read_text(encoding="utf-8")
    if sound.count(fault.old) != 1:
        return False, f"the text to change stands there {sound.count(fault.old)} times"
    path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    try:
        code, output = run(place, fault.suite, fault.tests)
    finally:
        path.write_text(sound, encoding="utf-8")
    found = FAILED.search(output)
    if code == 1 and found:
        return True, found[1]
    return False, "nothing failed" if code == 0 else f"pytest ended with {code}: {output.strip()[-300:]}"


def main(words: list[str]) -> int:
    """Print a line per fault; 0 if every fault was seen."""
    faults = [f for f in FAULTS if not words or any(word in f"{f.file} {f.what}" for word in words)]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        places: SimpleQueue[Path] = SimpleQueue()
        for i in range(min(2, os.cpu_count() or 1)):
            places.put(Path(folder, str(i)))
            copy(Path(folder, str(i)))
        sound = places.get()
        for suite in ("test", "test-all"):  # a test that fails anyway would prove nothing
            tests = sorted({test for fault in faults if fault.suite == suite for test in fault.tests})
            both = ("-n", "2", "--dist", "worksteal")
            code, output = run(sound, suite, tests, 6 * MINUTES, *both) if tests else (0, "")
            if code:
                print(
                    output[-3000:], f"\nwithout any fault the tests of suite {suite} end with {code}", file=sys.stderr
                )
                return 1
        places.put(sound)

        def one(fault: Fault) -> tuple[Fault, bool, str, float]:
            place, start = places.get(), time.monotonic()
            try:
                return fault, *plant(place, fault), time.monotonic() - start
            finally:
                places.put(place)

        survived = 0
        with ThreadPoolExecutor(places.qsize()) as pool:
            for number, (fault, seen, by, seconds) in enumerate(pool.map(one, faults), 1):
                survived += not seen
                state = "seen" if seen else "SURVIVED"
                print(
                    f"{number:3} {state:8} {fault.suite:8} {seconds:4.0f} s  {fault.file}: {fault.what}\n{'':29}{by}",
                    flush=True,
                )
    print(f"{len(faults) - survived} of {len(faults)} faults seen")
    return 1 if survived or not faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, epilog="example: python -m tests.faults assembly gate"
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="Plant faults whose file or description holds one.")
    sys.exit(main(parser.parse_args().words))
