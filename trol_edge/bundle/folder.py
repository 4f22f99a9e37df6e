"""Writes files and folders completely or not at all, beside their place, and renames them when complete.

A writer holds a lock on the folder in which it writes. So left-overs can be distinguished from running work of any
process, container or machine.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trol_edge.bundle.names import BUNDLE_FILES
from trol_edge.errors import ExportError, TrolEdgeError, UsageError
from trol_edge.reading import open_plain, printable

PART = re.compile(r"[a-z0-9_]{8}\.part")  # suffix of the name of a folder that is being written


def sha256_of(path: Path) -> str:
    """The sha256 of a file in hex, read in blocks."""
    digest = hashlib.sha256()
    with open_plain(path) as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_of(data: Any) -> str:
    """The sha256 of plain data as JSON, in hex."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@contextmanager
def writing(what: object, error: type[TrolEdgeError], advice: str = "choose another place") -> Iterator[None]:
    """Turn an OSError while `what` is written into `error`: a full disk, no permission, a name that is too long."""
    try:
        yield
    except OSError as cause:
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        found = "the disk is full; make room or" if full else f"cannot be written ({cause.strerror or cause});"
        refusal = error(f"{printable(what)}: {found} {advice}")
        raise refusal from cause


@contextmanager
def new_folder(
    target: str | os.PathLike[str], overwrite: bool = False, ours: Collection[str] = BUNDLE_FILES
) -> Iterator[Path]:
    """Yield a temporary folder beside `target` and rename it to `target` on success; on any failure remove it.

    Ctrl-C and a full disk count as failures, and leave what was there before. At every moment `target` is
    either the old folder or the new one; if the file system cannot exchange two names, `taken_back` finds the old one.
    Raises ExportError if target cannot be written, or exists. With overwrite it may exist, but must hold only files
    that match the patterns `ours`.
    """
    final = Path(target)
    with writing(final, ExportError):
        if final.is_symlink():
            final = Path(os.path.realpath(final))  # the folder is replaced, not the link to it
        taken_back(final)
        _require_replaceable(final, overwrite, ours)
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(final)
        with _folder_beside(final) as folder:
            yield folder
            folder.chmod(0o755)
            if overwrite and final.exists():
                _exchange(folder, final)
            else:
                folder.rename(final)


def _require_replaceable(final: Path, overwrite: bool, ours: Collection[str]) -> None:
    if final.exists() and not overwrite:
        raise ExportError(f"{final}: exists; choose another name or allow overwriting (--force)")
    if final.exists() and not final.is_dir():
        raise ExportError(f"{final}: is a file, but a folder is to be written; remove it or choose another name")
    if final.is_dir():
        known = [*ours, *(f".{name}.*.part" for name in ours)]
        others = sorted(p.name for p in final.iterdir() if not any(fnmatch.fnmatch(p.name, name) for name in known))
        if others:
            raise ExportError(
                f"{final}: holds other files ({', '.join(others[:3])}), which would be lost; choose another name"
            )


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that stays there if its writer fails or is killed, for the next one to go on.

    On success it is removed. Raises ExportError if another process is writing it.
    """
    folder = target.with_name(f".{target.name}.unfinished")
    with writing(folder, ExportError):
        if folder.is_symlink():
            raise ExportError(f"{folder}: is a link; remove it")
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
        try:
            if lock is None:
                raise ExportError(f"{folder}: another process writes it; wait until it is done")
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            _unlock(lock)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file to, and rename that to `path` on success; on any failure remove it.

    A file with its final name is complete on the disk, even if the power fails. It is written in a separate folder that
    no other user may enter, so that a link that somebody put in its place is not followed. OSError passes through.
    """
    _remove_left_overs(path)
    with _folder_beside(path) as folder:
        part = folder / path.name
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)


@contextmanager
def _folder_beside(final: Path) -> Iterator[Path]:
    """Make a folder beside `final` for one writer, who holds its lock; what is left in the end is removed."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
        # None if the file system has no locks; then nobody takes the folder for a left-over either.
        lock = _locked(folder, wait=True)
        if folder.exists():
            break
        _unlock(lock)  # another process took it for a left-over before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _locked(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder; None if another process has the lock, or it cannot be locked."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _remove_left_overs(final: Path) -> None:
    """Remove folders that killed writers left beside `final`, whose locks nobody holds."""
    for part in final.parent.iterdir():
        name = part.name.removeprefix(f".{final.name}.")
        if name != part.name and PART.fullmatch(name) and (lock := _locked(part)) is not None:
            shutil.rmtree(part, ignore_errors=True)
            _unlock(lock)


def _exchange(new: Path, final: Path) -> None:
    """Exchange the names of two folders, so that the old one can be removed at `new`."""
    if not _exchanged_at_once(new, final):
        kept, lock = _previous(final), _locked(final)
        try:
            final.rename(kept)
            try:
                new.rename(final)
            except OSError:
                kept.rename(final)
                raise
            kept.rename(new)
        finally:
            _unlock(lock)


def _exchanged_at_once(new: Path, final: Path) -> bool:
    """Exchange by Linux's renameat2 with RENAME_EXCHANGE; False if the C library or the file system lacks it."""
    import ctypes

    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(here, os.fsencode(new), here, os.fsencode(final), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(final))


def _previous(final: Path) -> Path:
    """The place of the old folder between two renames."""
    return final.with_name(f".{final.name}.previous")


def taken_back(final: Path) -> bool:
    """Restore the name of a folder whose writer was killed between two renames; returns whether there was one.

    The new folder of the killed writer is removed by the next one.
    """
    kept = _previous(final)
    if not kept.is_dir() or (lock := _locked(kept)) is None:
        return False
    try:
        if final.exists():
            shutil.rmtree(kept, ignore_errors=True)
            return False
        kept.rename(final)
        return True
    finally:
        _unlock(lock)


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all. Raises UsageError if it cannot be written."""
    with writing(path, UsageError, "choose another folder with -o"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as part:
            part.write_text(text, encoding="utf-8")
