"""Prompts to serve through bundles: every golden prompt of both families, and those of the shipped models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests import cases, test_phi3
from tests.cases import Array
from tests.conftest import NANO
from trol_edge.runtime import Runtime

SHIPPED = (NANO, NANO.parent / "trol-nano-phi3")  # checkpoints with a tokenizer and a picture, scene.png
QUESTION = "What is left of the red circle?"
BEYOND = {"over", "image"}  # runs of internlm2-dynamic-rope: longer than their model's positions, so refused
STEPS = cases.STEPS


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt on its Runtime, and golden's arrays for it."""

    name: str
    runtime: Runtime
    ids: Array  # int64 [S]
    pixels: Array | None
    expected: dict[str, Array]  # of this row; empty for shipped models

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)


def names() -> list[str]:
    """ "case/run/row" of every golden prompt that is served, each once, and "nano" ones."""
    found = []
    seen = set()
    for case, run in cases.names():
        if case == "internlm2-dynamic-rope" and run in BEYOND:
            continue
        for i, row in enumerate(cases.load(case, run).rows):
            if (key := (case, row.ids.tobytes(), row.pictures)) not in seen:
                seen.add(key)
                found.append(f"{case}/{run}/{i}")
    for case, run in test_phi3.RUNS:
        golden = test_phi3.Run(case, run)
        for i in range(len(golden.inputs["input_ids"])):
            found.append(f"{case}/{run}/{i}")
    return found + [f"{folder.name}/scene/0" for folder in SHIPPED]


class Prompts:
    """Loads bundles and prompts on demand, each once."""

    def __init__(self, exported: Callable[..., Path], golden_bundle: Callable[..., Path], phi3_checkpoint: Any) -> None:
        self._exported, self._golden_bundle, self._phi3_checkpoint = exported, golden_bundle, phi3_checkpoint
        self._runtimes: dict[str, Runtime] = {}
        self._prompts: dict[str, Prompt] = {}

    def runtime(self, case: str) -> Runtime:
        """The Runtime of a golden case or shipped model."""
        if case not in self._runtimes:
            # One thread: of models as small as these a second one waits more than it helps.
            self._runtimes[case] = Runtime(self.bundle(case), threads=1)
        return self._runtimes[case]

    def bundle(self, case: str) -> Path:
        """The bundle folder of a golden case or shipped model."""
        for folder in SHIPPED:
            if folder.name == case:
                return self._exported(folder)
        if case.startswith("phi3-"):
            return self._exported(self._phi3_checkpoint(case), "cpu", test_phi3.CONTEXT)
        return self._golden_bundle(case)

    def __call__(self, name: str) -> Prompt:
        if name not in self._prompts:
            self._prompts[name] = self._load(name)
        return self._prompts[name]

    def _load(self, name: str) -> Prompt:
        case, run, row = name.split("/")
        runtime = self.runtime(case)
        if run == "scene":
            (folder,) = (f for f in SHIPPED if f.name == case)
            picture = folder / "scene.png"
            ids = np.array(runtime.tokenize(QUESTION, runtime.count_tiles(picture)))
            return Prompt(name, runtime, ids, runtime.preprocess(picture), {})
        if case.startswith("phi3-"):
            golden = test_phi3.Run(case, run)
            found = list(golden.rows())[int(row)]
            return Prompt(name, runtime, found.ids, found.pixels, of_row(golden.expected, int(row)))
        loaded = cases.load(case, run)
        ours = loaded.rows[int(row)]
        return Prompt(name, runtime, ours.ids, loaded.pixels(ours), of_row(loaded.expected, int(row)))


def of_row(expected: dict[str, Array], row: int) -> dict[str, Array]:
    """The arrays about answers, of one row of a batch."""
    wanted = ("cached_ids", "cached_logits", "nocache_ids", "nocache_logits", "beam5_ids", "beam5_score")
    return {key: array[row] for key, array in expected.items() if key in wanted}
