"""Plants faults in a copy of a bundle, one at a time, and sees what the self-test names. Needs no export."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime

from tests.selftest_faults.catalogue import Fault
from trol_edge.bundle import selftest
from trol_edge.bundle.names import MANIFEST, TOKENIZER, WEIGHTS
from trol_edge.errors import BundleError
from trol_edge.model import Model
from trol_edge.runtimes import ort
from trol_edge.verify.replay import stages_of
from trol_edge.verify.report import place_of

CHANGED = (MANIFEST, WEIGHTS, TOKENIZER)  # files that faults change


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a fault: the first stage that was wrong, or "" if all passed."""

    fault: Fault
    stage: str

    @property
    def found(self) -> bool:
        return bool(self.stage)

    @property
    def named(self) -> bool:
        return bool(self.stage) and re.search(self.fault.place, self.stage) is not None


def first_wrong(folder: Path) -> str:
    """Where the self-test of a bundle goes wrong; "" if nowhere."""
    try:
        with Model(folder, threads=1) as model:
            wrong = place_of(stages_of(model, selftest.read(model.bundle)))
    except BundleError as error:
        if "engine" in str(error):
            return "engines"  # as trol_edge.verify.replay.verify calls it
        raise
    return "" if wrong is None else wrong.name


def plant(
    pristine: Path, work: Path, faults: Iterable[Fault], ready: Callable[[Path], object] = lambda folder: None
) -> Iterator[Outcome]:
    """Plant each fault in a copy at `work`. ready: what makes the copy runnable, such as engines."""
    shutil.copytree(pristine, work, ignore=shutil.ignore_patterns("verified-*"))
    for fault in faults:
        fault.plant(work)
        ready(work)
        yield Outcome(fault, first_wrong(work))
        for name in CHANGED:
            shutil.copyfile(pristine / name, work / name)


def variants() -> Iterator[tuple[str, contextlib.AbstractContextManager[object], int]]:
    """What may differ between two healthy machines: (description, context, threads)."""
    levels = {
        "all optimizations": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "basic optimizations": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "no optimization": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }
    real = ort.open_session
    for title, level in levels.items():

        def opened(model: Any, options: Any, providers: Any, level: Any = level) -> Any:
            options.graph_optimization_level = level
            return real(model, options, providers)

        for threads in (1, 2):
            yield f"{title}, {threads} threads", mock.patch.object(ort, "open_session", opened), threads
