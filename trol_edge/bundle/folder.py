"""Files and folders that are there whole or not at all: written beside their place, and renamed when complete.

Who writes holds a lock on the folder that he writes in, so that a left-over is told from work under way, whichever
process, container or machine it belongs to.
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

PART = re.compile(r"[a-z0-9_]{8}\.part")  # what follows the name in the name of a folder under way


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

    Ctrl-C and a full disk count as failures, and leave what was there before. At every instant `target` is the old
    folder or the new one, whole; where the file system cannot exchange two names, `taken_back` finds the old one.
    Raises ExportError where target exists (unless overwrite, and then it must hold nothing but files named as in
    `ours`, patterns) or cannot be written.
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
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file to, and rename that to `path` on success; on any failure remove it.

    What has its name is on the disk, whole, even where the power fails. It is written in a folder of its own, which no
    other user may enter: a link that somebody laid in its place is not followed. OSError goes through.
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
    """A new folder beside `final` for one writer, who holds its lock; what is left of it in the end is removed."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
        # None: a file system without locks, where nobody takes the folder for a left-over either.
        lock = _locked(folder, wait=True)
        if folder.exists():
            break
        _unlock(lock)  # somebody took it for a left-over before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _locked(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder; None where another has the lock, or it cannot be locked."""
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
    """Remove folders that writers left beside `final` when they were killed: nobody holds their locks."""
    for part in final.parent.iterdir():
        name = part.name.removeprefix(f".{final.name}.")
        if name != part.name and PART.fullmatch(name) and (lock := _locked(part)) is not None:
            shutil.rmtree(part, ignore_errors=True)
            _unlock(lock)


def _exchange(new: Path, final: Path) -> None:
    """Exchange the names of two folders: the old one is then to be removed at `new`."""
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
    """Linux's renameat2 with RENAME_EXCHANGE; False where the C library or the file system has none."""
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
    """Where the old folder is for the moment between two renames."""
    return final.with_name(f".{final.name}.previous")


def taken_back(final: Path) -> bool:
    """Give a folder its name again whose writer was killed between two renames; whether there was one.

    What the killed writer had finished besides is removed by the next one.
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
    """Write a file whole or not at all. Raises UsageError where that is not possible."""
    with writing(path, UsageError, "choose another folder with -o"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as part:
            part.write_text(text, encoding="utf-8")
