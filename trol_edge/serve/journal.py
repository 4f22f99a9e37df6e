"""Writes the server's log: one JSON object per line, without a word of prompts and answers unless that is asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

_line = json.JSONEncoder(default=str).encode


class Journal:
    """Log lines on a stream, standard error by default."""

    def __init__(self, with_prompts: bool = False, stream: TextIO | None = None) -> None:
        self.with_prompts = with_prompts
        self._stream = stream

    def write(self, event: str, level: str = "info", **fields: Any) -> None:
        """Write one line. A stream that is full or closed loses it."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        line = _line({"time": stamp, "level": level, "event": event, **fields})
        stream = self._stream or sys.stderr
        try:
            stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError, AttributeError):
            return


class JournalHandler(logging.Handler):
    """Passes the records of other libraries' loggers on to a Journal."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, with the type of its exception."""
        error = record.exc_info[1] if record.exc_info else None
        more = {"error": f"{type(error).__name__}: {error}"} if error else {}
        self._journal.write("log", record.levelname.lower(), logger=record.name, message=record.getMessage(), **more)
