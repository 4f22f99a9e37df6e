"""Folders that are made once and kept under build/tests/, known by the content of everything they were made from."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "tests"
DAYS = 7  # without use, after which a folder goes
_used: dict[Path, str] = {}


def digest(paths: Iterable[Path], *more: object) -> str:
    """A key of files and folders, by names and content, and of anything else that has a repr."""
    found = hashlib.sha256(repr(more).encode())
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            found.update(f"{file.relative_to(path.parent)} {file.stat().st_size}\n".encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:20]


@functools.cache
def sources(module: str) -> tuple[Path, ...]:
    """The file of a module of ours and of every module of ours that it imports, at any depth."""
    found: dict[str, Path] = {}
    new = [module]
    while new:
        name = new.pop()
        if name not in found and (path := _file(name)) is not None:
            found[name] = path
            new += [*_imported(path), name.rpartition(".")[0]]
    return tuple(sorted(found.values()))


def _file(module: str) -> Path | None:
    """Through the links trol_edge/export, ...: every room once."""
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@functools.cache
def _imported(path: Path) -> tuple[str, ...]:
    """Names that may be modules: of `from a.b import c` both a.b and a.b.c."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: a relative import"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(found)


def folder(name: str, key: str, make: Callable[[Path], object]) -> Path:
    """The folder of this name and key; `make` writes it if there is none. Other processes wait for it meanwhile.

    Nobody may write into it: `altered` finds who did, and it is made anew.
    """
    home = KEPT / name
    home.mkdir(parents=True, exist_ok=True)
    found, listing = home / key, home / f"{key}.files"
    if found in _used:
        return found
    with (home / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (listing.exists() and listing.read_text(encoding="utf-8") == _listing(found)):
            shutil.rmtree(found, ignore_errors=True)
            part = Path(tempfile.mkdtemp(dir=home, prefix="part-"))
            try:
                make(part / key)
                (part / key).replace(found)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            listing.write_text(_listing(found), encoding="utf-8")
        _used[found] = _listing(found)
        os.utime(listing)
    for old in home.glob("*.files"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it, too
            if time.time() - old.stat().st_mtime > DAYS * 86400:
                old.unlink()
                shutil.rmtree(old.with_suffix(""), ignore_errors=True)
    return found


def _listing(found: Path) -> str:
    files = sorted(path for path in found.rglob("*") if path.is_file())
    states = ((path.relative_to(found), path.stat()) for path in files)
    return "".join(f"{path} {state.st_size} {state.st_mtime_ns}\n" for path, state in states)


def altered() -> list[Path]:
    """Folders that this process used and whose files are no longer those it was given."""
    return [path for path, listing in _used.items() if _listing(path) != listing]
