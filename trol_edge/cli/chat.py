"""The verb chat, a conversation with a bundle in a terminal or a pipe."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trol_edge.cli.show import ImageTokens, MaxTiles, Threads, err
from trol_edge.errors import TrolEdgeError, UsageError

if TYPE_CHECKING:
    from trol_edge.answering.chat import Chat
    from trol_edge.answering.options import AnswerOptions

LINE_CHARACTERS = 1 << 20  # longest question
COMMANDS = "/image FILE shows a picture with the next question, /forget starts a new conversation, /quit ends"


def chat(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    image: Annotated[
        list[Path] | None, typer.Option("-i", "--image", help="Picture of the first question; repeatable.")
    ] = None,
    pinned: Annotated[int, typer.Option(help="Turns at the beginning that stay when the context is full.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampling; 0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Sampling seed.")] = None,
    image_tokens: ImageTokens = 1.0,
    max_tiles: MaxTiles = None,
    threads: Threads = None,
) -> None:
    """Talk with a bundle: each line of standard input is a question, and each answer streams to standard output."""
    from trol_edge.runtime import Runtime

    options: AnswerOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "image_tokens": image_tokens,
        "max_tiles": max_tiles,
    }
    on_terminal = sys.stdin is not None and sys.stdin.isatty()
    with Runtime(bundle, threads=threads) as runtime:
        conversation, pictures = runtime.chat(pinned=pinned), list(image or [])
        if on_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (arrow keys in input())
            err.print(f"{runtime.bundle.manifest.model}; {COMMANDS}", style="dim")
        while (line := _next_line(on_terminal)) is not None:
            command, _, argument = line.strip().partition(" ")
            if command == "/quit":
                break
            if command == "/forget":
                conversation.close()
                conversation, pictures = runtime.chat(pinned=pinned), []
            elif command == "/image":
                pictures.append(Path(argument.strip()))
            elif command.startswith("/"):
                err.print(f"unknown command {command}; {COMMANDS}")
            elif command:
                try:
                    _answer(conversation, line, pictures, options)
                except TrolEdgeError as error:
                    if not on_terminal:
                        raise
                    err.print(f"error: {error}", style="red", soft_wrap=True)
                pictures = []


def _next_line(on_terminal: bool) -> str | None:
    """The next question, or None at the end. Raises UsageError for a line without an end, or not in UTF-8."""
    if on_terminal:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    try:
        line = sys.stdin.readline(LINE_CHARACTERS) if sys.stdin is not None else ""
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 ({error}); convert it first") from error
    if len(line) == LINE_CHARACTERS and not line.endswith("\n"):
        raise UsageError(f"a line of standard input has more than {LINE_CHARACTERS} characters; give shorter questions")
    return line.rstrip("\r\n") if line else None


def _answer(
    conversation: Chat,
    question: str,
    pictures: list[Path],
    options: AnswerOptions,
) -> None:
    """Stream one answer. Ctrl-C ends it, and keeps what was said."""
    dropped = conversation.dropped
    with conversation.stream(question, list(pictures), **options) as stream:
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            err.print(" (interrupted)", style="dim", end="")
    print()
    if conversation.dropped > dropped:
        err.print(f"the context is full: {conversation.dropped} turns are forgotten", style="dim")
