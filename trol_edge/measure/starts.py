"""Measures how long a fresh process takes to its first token, with a cold or a warm page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trol_edge.machine import sensors
from trol_edge.measure.bench import Bench, made_up, opened
from trol_edge.measure.process import Job, errors_as_json, in_process, print_json, told_job
from trol_edge.measure.record import (
    Start,
)
from trol_edge.prompt.images import load_rgb


def start(job: Job, cold: bool) -> Start:
    """Run a fresh process to its first token. cold: drop the bundle's files from the page cache before."""
    files = sorted(path for path in Path(job.bundle).rglob("*") if path.is_file())
    if cold:
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = cached_share(files)
    spawned = time.monotonic()
    told = in_process("starts.first_token", job)
    return Start(
        cold,
        share,
        1e3 * (told["imported"] - spawned),
        1e3 * (told["loaded"] - told["imported"]),
        1e3 * (told["answered"] - told["loaded"]),
        1e3 * (told["answered"] - spawned),
    )


def first_token(began: float) -> None:
    """Entry point of a process: load a bundle, answer with one token, print when each was done."""
    imported = time.monotonic()
    with errors_as_json():
        job = told_job()
        size = next((s for s in job.sizes if s is not None), None)
        picture = load_rgb(job.image) if job.image is not None else None if size is None else made_up(*size)
        with opened(job) as runtime:
            loaded = time.monotonic()
            bench = Bench(runtime, 1, loaded)
            bench.answer(bench.prompts(picture, None)[0], picture)
            answered = time.monotonic()
            print_json({"began": began, "imported": imported, "loaded": loaded, "answered": answered})


def cached_share(files: Sequence[Path]) -> float | None:
    """The share of the files' bytes that the page cache holds, by mincore(2); None if that cannot be found out."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    held = pages = 0
    for path in files:
        if not (size := path.stat().st_size):
            continue
        count = -(-size // sensors.PAGE)
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            array = np.frombuffer(view, np.uint8)
            resident = np.zeros(count, np.uint8)
            pointer, out = ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(resident.ctypes.data)
            failed = mincore(pointer, ctypes.c_size_t(size), out)
            del array
        if failed:
            return None
        held, pages = held + int((resident & 1).sum()), pages + count
    return held / pages if pages else None
