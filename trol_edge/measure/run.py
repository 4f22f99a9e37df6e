"""Measures for `trol-edge profile`: each bundle in a separate process, the sampler in another, each start in a new one.

- An answer goes through the calls that `Runtime.generate` makes (`look`, `ask`, `prefill`, `step_view`, the Sampler,
  the TextStream), with a clock between them; only the queue for the turn is left out.
- Every first question finds an empty vision cache and an empty session; the second one finds what the first left there.
- An answer has as many tokens as asked for. The model's own end is ignored, so that runs are comparable.
- All clocks are CLOCK_MONOTONIC, which processes share, so samples, stages and starts are on one time axis.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from collections.abc import Sequence

import trol_edge
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.strict import from_dict
from trol_edge.errors import UsageError
from trol_edge.machine import sensors
from trol_edge.measure.peaks import machine_peaks
from trol_edge.measure.process import Job, Progress, in_process
from trol_edge.measure.record import (
    SCHEMA,
    SCHEMA_VERSION,
    BundleProfile,
    Profile,
    Settings,
)
from trol_edge.measure.starts import start
from trol_edge.model import Provider
from trol_edge.prompt.images import load_rgb


def profile(
    bundles: Sequence[str | os.PathLike[str]],
    *,
    sizes: Sequence[tuple[int, int] | None] = ((640, 480),),
    prompt_tokens: Sequence[int | None] = (None,),
    image: str | os.PathLike[str] | None = None,
    tokens: int = 32,
    warmup: int = 2,
    runs: int = 10,
    starts: int = 3,
    threads: int | None = None,
    interval_s: float = 0.1,
    root: str | os.PathLike[str] = "/",
    provider: Provider | None = None,
    trusted_keys: Sequence[str | os.PathLike[str]] = (),
    progress: Progress = lambda line: None,
) -> Profile:
    """Measure every bundle in every case (sizes x prompt lengths).

    sizes: (width, height) of made-up pictures in pixels, None for no picture. image: a picture file to use instead.
    prompt_tokens: length of the whole prompt, None for a short question. tokens: length of each answer. starts: number
    of fresh processes with a cold page cache, and again with a warm one. interval_s: time between two samples of the
    machine. root: the folder that contains proc and sys. provider: ONNX Runtime's provider, as Runtime takes it, for
    bundles of a GPU target. trusted_keys: files of public keys, one of which must have signed each bundle.
    Raises UsageError, ImageError, ContextError for bad arguments, BundleError and BackendError as Runtime does.
    """
    if not bundles:
        raise UsageError("no bundle to profile; give one or more bundle folders")
    bad = [n for n, v, least in (("tokens", tokens, 2), ("runs", runs, 1), ("warmup", warmup, 0), ("starts", starts, 0))
           if v < least]  # fmt: skip
    if bad or not 0.005 <= interval_s <= 10:
        raise UsageError(f"{', '.join(bad) or 'interval'}: too small (tokens >= 2, runs >= 1, interval 5 ms to 10 s)")
    opened = [Bundle(bundle) for bundle in bundles]
    if image is not None:
        load_rgb(os.fspath(image))
    machine = sensors.Sensors(root)
    progress("measuring the highest rates of memory and processors")
    peaks = machine_peaks(machine, opened)
    found = []
    for bundle in opened:
        name = os.fspath(bundle.folder)
        progress(f"{name} ...")
        job = Job(
            bundle=name,
            sizes=tuple(sizes),
            prompt_tokens=tuple(prompt_tokens),
            image=None if image is None else os.fspath(image),
            tokens=tokens,
            warmup=warmup,
            runs=runs,
            threads=threads,
            interval_s=interval_s,
            root=os.fspath(root),
            provider=provider,
            trusted_keys=tuple(os.fspath(key) for key in trusted_keys),
        )
        measured = from_dict(BundleProfile, in_process("bench.measure_job", job, progress), name)
        begun = []
        for i in range(starts):
            for cold in (True, False):
                progress(f"start {i + 1} of {starts}, page cache {'cold' if cold else 'warm'}")
                begun.append(start(job, cold))
        found.append(dataclasses.replace(measured, starts=tuple(begun)))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Profile(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        created=now,
        trol_edge=trol_edge.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        machine=dict(machine.identity()),
        missing=tuple(machine.missing()),
        settings=Settings(warmup, runs, threads, interval_s),
        peaks=peaks,
        bundles=tuple(found),
    )
