"""Files and folders that are there whole or not at all: written beside their place, and renamed when complete."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trol_edge.bundle.names import BUNDLE_FILES
from trol_edge.errors import ExportError, UsageError


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_of(data: Any) -> str:
    """sha256, hex, of plain data as JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@contextmanager
def new_folder(
    target: str | os.PathLike[str], overwrite: bool = False, ours: Collection[str] = BUNDLE_FILES
) -> Iterator[Path]:
    """Yield a temporary folder beside `target` and rename it to `target` on success; on any failure remove it.

    Ctrl-C and a full disk count as failures, and leave what was there before. Raises ExportError where target exists
    (unless overwrite, and then it must hold nothing but files named as in `ours`, patterns) or cannot be written.
    """
    final = Path(target)
    if final.exists() and not overwrite:
        raise ExportError(f"{final}: exists; choose another name or allow overwriting (--force)")
    if final.exists() and not final.is_dir():
        raise ExportError(f"{final}: is a file, a folder is to be written there; remove it or choose another name")
    if final.is_dir():
        others = sorted(p.name for p in final.iterdir() if not any(fnmatch.fnmatch(p.name, name) for name in ours))
        if others:
            raise ExportError(
                f"{final}: holds other files ({', '.join(others[:3])}), which would be lost; choose another name"
            )
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(final)
        folder = _part(final)
    except OSError as error:
        raise ExportError(f"{final}: cannot be written ({error.strerror}); choose another place") from error
    old: Path | None = None
    try:
        yield folder
        folder.chmod(0o755)
        if overwrite and final.exists():
            old = _part(final)
            final.rename(old)  # onto an empty folder: POSIX allows it
        folder.rename(final)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ExportError(f"{final}: the disk is full; make room or choose another place") from error
        raise ExportError(f"{final}: cannot be written ({error}); nothing was left there") from error
    finally:
        if old is not None and not final.exists():
            old.rename(final)
        for part in (folder, old):
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file to, and rename that to `path` on success; on any failure remove it.

    What has its name is on the disk, whole, even where the power fails. OSError goes through.
    """
    _remove_left_overs(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _part(final: Path) -> Path:
    """A new folder beside `final`, whose name says which process made it."""
    return Path(tempfile.mkdtemp(prefix=f".{final.name}.{os.getpid()}.", suffix=".part", dir=final.parent))


def _remove_left_overs(final: Path) -> None:
    """Remove files and folders that writers left beside `final` when they were killed, so that no `finally` ran."""
    name = re.compile(rf"\.{re.escape(final.name)}\.(\d+)\.[^.]+\.part")
    for part in final.parent.iterdir():
        if not (match := name.fullmatch(part.name)):
            continue
        try:
            os.kill(int(match[1]), 0)
        except (ProcessLookupError, OverflowError):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)
        except PermissionError:
            pass  # alive, and someone else's


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises UsageError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another folder with -o") from error
