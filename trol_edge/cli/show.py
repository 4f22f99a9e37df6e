"""Consoles, JSON, progress bars and common options of the verbs."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleDimensions
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trol_edge.errors import BackendError, UsageError

STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
PICTURE_BYTES = 1 << 30  # most bytes of a picture that are read from standard input
LINE = 1 << 20  # columns without a terminal, so that a line stays a line and a table keeps every column


class Form(str, enum.Enum):
    """How a decoder is divided into engines."""

    WHOLE = "whole"
    LAYERS = "layers"


class _Console(Console):
    """A console with typography for terminals only; a pipe or a file gets the plain text."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    @property  # type: ignore[misc]  # nobody sets it
    def size(self) -> ConsoleDimensions:
        """The size in columns and lines."""
        return super().size if self.file.isatty() else ConsoleDimensions(LINE, 25)

    def on_broken_pipe(self) -> None:
        """Let main end quietly if the reader has gone; the library would exit with 1."""
        raise BrokenPipeError


out, err = _Console(), _Console(stderr=True)
OfOrt = Annotated[
    str | None,
    typer.Option("--provider", help="ONNX Runtime provider to use instead of engines: cuda, tensorrt or cpu."),
]
Fallback = Annotated[str | None, typer.Option(help="Provider to use, with a warning, if engines cannot be loaded.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the inference library.  [default: physical cores]")]
TrustedKeys = Annotated[
    list[Path] | None,
    typer.Option(
        "--trusted-key",
        help="PEM file of an ed25519 public key, repeatable; a bundle that no such key signed is not opened.",
    ),
]
ImageTokens = Annotated[
    float,
    typer.Option(
        help="Share of each picture's tokens that is used, above 0 and up to 1; less is quicker (docs/image-tokens.md)."
    ),
]
MaxTiles = Annotated[
    int | None, typer.Option(help="Most tiles of a picture, the thumbnail not counted.  [default: the bundle's]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]


def print_json(data: Any) -> None:
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    print(json.dumps(data, ensure_ascii=not encoding.startswith("utf")))


def print_error(kind: str, text: str, as_json: bool) -> None:
    """Print an error on standard error, in a pipe on one line, and if asked as JSON on standard output, too."""
    if as_json:
        print_json({"error": {"type": kind, "message": text}})
    lines = text if err.is_terminal else " ".join(line.strip() for line in text.splitlines() if line.strip())
    err.print(f"error: {lines}", style="red", soft_wrap=True)


def standard_input(limit: int) -> bytes:
    """Read standard input. Raises UsageError if it is closed, or has more than `limit` bytes."""
    if sys.stdin is None:
        raise UsageError("standard input is closed, but - reads from it; give the value itself")
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise UsageError(f"standard input has more than {limit} bytes; give less")
    return data


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn a missing library of an optional installation into an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BackendError(f"{error.name} is not installed; pip install 'trol-edge[{name}]'") from error


@contextmanager
def phases(quiet: bool) -> Iterator[Any]:
    """Yield a callback (phase, done, steps) that shows the current phase and the time since the start, on one line."""
    if quiet or not err.is_terminal:
        yield lambda what, done, total: None
        return
    with Progress(
        TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=err, transient=True
    ) as bars:
        task = bars.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bars.update(task, description=f"{what} {done}/{total}" if total > 1 else what)

        yield report


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Any]:
    """Yield a callback (what, done, total) that draws one bar per stage, with the remaining time."""
    if quiet or not err.is_terminal:
        yield lambda what, done, total: None
        return
    columns = (
        TextColumn("{task.description:8}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report
