"""`make bench-peers`: makes an environment for each peer of `make bench`, which finds them there.

Peers need other versions of the same packages than ours, so each has an interpreter of its own in build/peers. What
cannot be installed here is said, and has a row in the benchmark that says so.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from tests.bench.contenders import CONTENDERS, PEERS

FOLDER = Path("build/peers")
OURS = ("numpy", "pillow", "tokenizers")  # what contenders.py imports of the thin runtime
MINUTES = 20  # of one installation, which may compile


def python_of(label: str, folder: Path = FOLDER) -> str:
    """The interpreter of a peer's environment; this one if it has none."""
    made = _interpreter(label, folder)
    return str(made) if made.exists() else sys.executable


def make(label: str, packages: tuple[str, ...], folder: Path = FOLDER) -> str | None:
    """Make the environment of a peer. Returns why not, in the installer's last words; None if it is there."""
    python = _interpreter(label, folder)
    try:
        if not python.exists():
            venv.create(python.parents[1], with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *OURS, *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
    return None


def _interpreter(label: str, folder: Path) -> Path:
    return (folder / label.lower() / "bin" / "python").absolute()


def main() -> None:
    """Make all environments, and say which there are."""
    for label in dict.fromkeys(CONTENDERS[name].label for name in PEERS):
        packages = next(CONTENDERS[name].install for name in PEERS if CONTENDERS[name].label == label)
        print(f"{label}: {packages} into {FOLDER / label.lower()} ...", flush=True)
        why = make(label, tuple(packages.split()))
        print(f"{label}: {'ready' if why is None else f'not installed: {why}'}", flush=True)


if __name__ == "__main__":
    main()
