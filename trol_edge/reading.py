"""Reads files from elsewhere: only plain files are opened, and every reader is inside one guard.

Whatever such a file contains, its reader raises an error of this package that names the file and says what to do. So
readers list no expected exceptions, and `guard` turns any exception of a parser into that error.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from trol_edge.errors import BundleError, TrolEdgeError

MOST_JSON_BYTES = 64 << 20  # the largest tokenizer.json of a published model has 20 MB
MOST_PROBLEM = 300  # characters of one problem of a list
MOST_SHOWN = 1000  # characters of a path in a message; what is given as one by mistake may be long
MOST_NAME_BYTES = 200  # longest name of a file; file systems take 255, and temporary names are longer
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
# Beginnings of things that a failed download leaves in place of a model file, and what to do about them.
_OTHER_THINGS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull` in its folder"),
    (b"<!doctype html", "a web page (HTML), not the file itself; download it again, signed in where that is needed"),
    (b"<html", "a web page (HTML), not the file itself; download it again, signed in where that is needed"),
)


@contextmanager
def guard(
    what: object,
    error: type[TrolEdgeError] = BundleError,
    advice: str = "copy the bundle again",
    found: str = "not readable",
) -> Iterator[None]:
    """Turn any exception of a reader of `what` (a file) into `error`; errors of this package and Ctrl-C pass through.

    found: what the message says about the file. (A tokenizer library in Rust panics with a BaseException.)
    """
    try:
        yield
    except TrolEdgeError:
        raise
    except BaseException as cause:
        if not isinstance(cause, Exception) and type(cause).__name__ != "PanicException":
            raise
        refusal = error(f"{printable(what)[:MOST_SHOWN]}: {found} ({reason(cause)}); {advice}")
        raise refusal from cause


def reason(error: BaseException) -> str:
    """The text of an exception, short enough for a message and printable anywhere."""
    text = " ".join(str(error).split()) or type(error).__name__
    named = text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"
    return printable(named[:300])


def printable(value: object) -> str:
    """A value as text that every terminal can show, because names of files and keys may contain anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def listing(problems: Sequence[str], joint: str = "; ", most: int = 20) -> str:
    """The problems as one text: the first `most` of them, each cut where it is long, and how many more there are."""
    shown = [problem if len(problem) <= MOST_PROBLEM else problem[:MOST_PROBLEM] + "..." for problem in problems[:most]]
    return joint.join([*shown, *([f"and {len(problems) - most} more"] if len(problems) > most else [])])


def is_plain_name(name: object) -> bool:
    """Whether data may use this name for a file of its folder: no path, nothing hidden or unprintable."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not name.startswith((".", "-", "~"))
        and not re.search(r'[/\\:*?"<>|]', name)
        and 0 < len(name.encode("utf-8", "replace")) <= MOST_NAME_BYTES
    )


def stays_inside(path: Path) -> bool:
    """Whether a file of a folder is there itself, or is a link within the folder or to a blob of a model hub's cache.

    (A hub's client keeps each file once, in a folder `blobs`, and fills folders of models with links to them.)
    """
    if not path.is_symlink():
        return True
    found, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    return folder in found.parents or found.parent.name == "blobs"


@contextmanager
def open_plain(
    path: Path, error: type[TrolEdgeError] = BundleError, advice: str = "copy the bundle again"
) -> Iterator[BinaryIO]:
    """Open a regular file for reading, never a pipe or a device, which may block for ever; `error` says what it is."""
    with guard(path, error, advice):
        mode = os.stat(path).st_mode
        for test, kind in _KINDS.items():
            if test(mode):
                refusal = error(f"{printable(path)}: is {kind}, not a file; {advice}")
                raise refusal
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            refusal = error(f"{printable(path)}: is not a regular file; {advice}")
            raise refusal
        yield file


def read_plain(
    path: Path,
    error: type[TrolEdgeError] = BundleError,
    advice: str = "copy the bundle again",
    most: int = MOST_JSON_BYTES,
) -> bytes:
    """The bytes of a regular file of at most `most` bytes."""
    with open_plain(path, error, advice) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            refusal = error(f"{printable(path)}: has {size} bytes, more than the {most} that are allowed; {advice}")
            raise refusal
        with guard(path, error, advice):
            data = file.read(size)  # as many as the size says; files of /proc say 0, and some of them never end
    require_itself(path, data, error)
    return data


def require_itself(path: Path, beginning: bytes, error: type[TrolEdgeError]) -> None:
    """Raise `error` if a file begins like a replacement of it: a git-lfs pointer, a web page."""
    start = beginning[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for prefix, what in _OTHER_THINGS:
        if start.startswith(prefix):
            refusal = error(f"{printable(path)}: is {what}")
            raise refusal


def read_text(path: Path, error: type[TrolEdgeError] = BundleError, advice: str = "copy the bundle again") -> str:
    """The text of a regular file in UTF-8, without the byte-order mark that editors on Windows write."""
    with guard(path, error, advice, "not readable as text"):
        return read_plain(path, error, advice).decode("utf-8-sig")


def read_json_value(path: Path, error: type[TrolEdgeError] = BundleError, advice: str = "copy the bundle again") -> Any:
    """The value in a JSON file. Raises `error` with `advice` for any other file."""
    with guard(path, error, advice, "not readable as JSON"):
        return parse_json(read_text(path, error, advice))


def read_json(
    path: Path, error: type[TrolEdgeError] = BundleError, advice: str = "copy the bundle again"
) -> dict[str, Any]:
    """The object in a JSON file. Raises `error` with `advice` for any other file."""
    data = read_json_value(path, error, advice)
    if not isinstance(data, dict):
        refusal = error(f"{printable(path)}: expected a JSON object, found {type(data).__name__}; {advice}")
        raise refusal
    return data


def parse_json(text: str) -> Any:
    """Parse JSON and refuse halves of characters. Call it in a `guard`."""
    data = json.loads(text)
    if _SURROGATE.search(text):
        json.dumps(data, ensure_ascii=False).encode()  # raises for a lone surrogate, which cannot be written to a file
    return data
