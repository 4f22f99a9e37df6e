"""Folders that are made once and kept under build/tests/, known by the content of everything they were made from."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "tests"
VERSIONS = 3  # of one name, the newest by use: a change of sources makes a new one of each


def digest(paths: Iterable[Path], *more: object) -> str:
    """A key of files and folders, by names and content, and of anything else that has a repr."""
    found = hashlib.sha256(repr(more).encode())
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            found.update(f"{file.relative_to(path.parent)} {file.stat().st_size}\n".encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:20]


def folder(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name and key; `make` writes it if there is none. Other processes wait for it meanwhile."""
    home = KEPT / name
    home.mkdir(parents=True, exist_ok=True)
    found = home / key
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            part = Path(tempfile.mkdtemp(dir=home, prefix="part-"))
            try:
                make(part / name)
                (part / name).replace(found)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            others = sorted((p for p in home.iterdir() if p.is_dir() and p != found), key=lambda p: p.stat().st_mtime)
            for old in others[: 1 - VERSIONS]:
                shutil.rmtree(old, ignore_errors=True)
        os.utime(found)
    return found
