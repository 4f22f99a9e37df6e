"""Runs each measurement in a separate process, and another one that samples the machine meanwhile."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trol_edge
from trol_edge.bundle.strict import from_dict
from trol_edge.errors import BackendError, TrolEdgeError, UsageError
from trol_edge.machine import sensors

Progress = Callable[[str], None]  # takes one line about what is being done
SAMPLER_START_S = 30.0  # longest wait for the sampler's first line


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of a process that measures one bundle."""

    bundle: str
    sizes: tuple[tuple[int, int] | None, ...]  # width, height; None: no picture
    prompt_tokens: tuple[int | None, ...]  # None: the question as it is
    image: str | None  # a picture file, instead of the sizes
    tokens: int
    warmup: int
    runs: int
    threads: int | None
    interval_s: float
    root: str
    provider: str | None = None  # ONNX Runtime's, used instead of engines
    trusted_keys: tuple[str, ...] = ()  # files of public keys, one of which must have signed the bundle


def in_process(function: str, job: Job, progress: Progress = lambda line: None) -> Any:
    """Run a function of this folder ("module.name") in a new interpreter and return what it printed last.

    The job goes to its standard input as JSON. Lines that it prints before the last are progress.
    Raises the error of this package that it raised, or BackendError with the end of its standard error.
    """
    root = str(Path(trol_edge.__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    module, name = function.split(".")
    # The clock is read first, because importing is a part of a start.
    code = f"import time; began = time.monotonic(); from trol_edge.measure.{module} import {name}; {name}(began)"
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(dataclasses.asdict(job)))
            child.stdin.close()
            result: Any = None
            for line in child.stdout:
                told = json.loads(line)
                if "progress" in told:
                    progress(told["progress"])
                else:
                    result = told
        except (BrokenPipeError, ValueError):
            result = None
        finally:
            if result is None:
                child.terminate()
            status = child.wait()
            child.stdout.close()
        said.seek(0)
        last = said.read().strip().splitlines()[-1:] or [f"exit status {status}"]
    if result is None:
        raise BackendError(f"{job.bundle}: the process that measures it ended: {last[0]}")
    if "error" in result:
        kinds = {c.__name__: c for c in _family(TrolEdgeError)}
        error = kinds.get(result["error"], BackendError)(result["message"])
        raise error
    return result


def _family(root: type[TrolEdgeError]) -> Iterator[type[TrolEdgeError]]:
    yield root
    for child in root.__subclasses__():
        yield from _family(child)


def told_job() -> Job:
    return from_dict(Job, json.load(sys.stdin), "job", UsageError)


@contextmanager
def errors_as_json() -> Iterator[None]:
    try:
        yield
    except TrolEdgeError as error:
        print_json({"error": type(error).__name__, "message": str(error)})


def print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data), flush=True)


@contextmanager
def sampled(root: str, interval_s: float) -> Iterator[list[dict[str, float | None]]]:
    """Sample the machine and this process from another process; the list is complete when the block is left.

    Raises BackendError if that process failed.
    """
    samples: list[dict[str, float | None]] = []
    command = [sys.executable, "-I", "-S", sensors.__file__, root, str(os.getpid()), str(interval_s)]
    with tempfile.TemporaryFile("w+") as file:
        sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file)
        assert sampler.stdin is not None
        # On a busy machine it may take longer to start than a short run lasts.
        latest = time.monotonic() + SAMPLER_START_S
        while sampler.poll() is None and not os.fstat(file.fileno()).st_size and time.monotonic() < latest:
            time.sleep(0.005)
        try:
            yield samples
        finally:
            sampler.stdin.close()
            status = sampler.wait()
        file.seek(0)
        samples += [json.loads(line) for line in file]
    if status or not samples:
        raise BackendError(f"the sampler of {root} ended by itself, exit status {status}; is there a /proc here?")
