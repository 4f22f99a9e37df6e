"""Trees of /proc and /sys of Jetson boards, and profiles made up of known numbers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trol_edge.machine import sensors as jetson
from trol_edge.measure.record import (
    SCHEMA,
    SCHEMA_VERSION,
    BundleId,
    BundleProfile,
    Case,
    Peaks,
    Profile,
    Run,
    Settings,
    Start,
    TimedAnswer,
    Work,
)

Tree = Callable[..., Path]

BOARDS = ("orin-nano", "agx-orin", "thor")
DATA = Path(__file__).with_name("data") / "machines"  # each file names its sources; none was recorded on a device


def described(board: str) -> dict[str, Any]:
    """What the file of a board says."""
    data: dict[str, Any] = json.loads((DATA / f"{board}.json").read_text(encoding="utf-8"))
    return data


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Root of a board's tree: tree("thor", {"path": "other content", "gone": None}). EAGAIN is a pipe without data."""
    pipes = []

    def make(board: str, changes: dict[str, str | None] | None = None) -> Path:
        root = tmp_path / f"{board}-{len(list(tmp_path.iterdir()))}"
        for name, content in (described(board)["files"] | (changes or {})).items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content == "EAGAIN":
                os.mkfifo(path)
                pipes.append(os.open(path, os.O_RDWR))
            elif content is not None:
                path.write_text(content, encoding="utf-8")
        return root

    yield make
    for pipe in pipes:
        os.close(pipe)


TIME = np.arange(0.0, 12.0, 0.1)  # of samples, in seconds
ANSWERS = 20
RUN = 2.0, 2.0 + 0.5 * ANSWERS  # an answer lasts half a second


def answers(
    step_ms: float = 10.0, first_ms: float = 100.0, jitter: float = 0.02, seed: int = 0
) -> tuple[TimedAnswer, ...]:
    """Answers of 40 steps, one after the other from the begin of the run on."""
    rng, found = np.random.default_rng(seed), []
    for i in range(ANSWERS):
        steps = tuple((step_ms * (1 + jitter * rng.standard_normal(40))).tolist())
        prefill = first_ms * (0.7 + jitter * rng.standard_normal())
        first = 0.3 * first_ms + prefill
        found.append(
            TimedAnswer(
                start_s=RUN[0] + 0.5 * i,
                preprocess_ms=0.1 * first_ms,
                vision_ms=0.2 * first_ms,
                prefill_ms=prefill,
                first_token_ms=first,
                total_ms=first + sum(steps) + 41 * 0.02,
                step_ms=steps,
                sample_ms=(0.01,) * 41,
                detokenise_ms=(0.01,) * 41,
                reused_tokens=0,
            )
        )
    return tuple(found)


def made(
    board: str | None = None,
    root: Path | None = None,
    names: tuple[str, ...] = ("trol-nano-fp32",),
    columns: dict[str, Any] | None = None,
    target: str = "cpu",
    **how: Any,
) -> Profile:
    """A profile of known numbers. root: a tree, whose sensors every sample repeats; columns: samples in their place."""
    machine = jetson.Sensors(root if root is not None else "/nowhere")
    constant = {k: v for k, v in machine.sample(os.getpid()).items() if k != "t_s"} if root is not None else {}
    samples: dict[str, Any] = {"t_s": TIME.tolist(), "rss_bytes": np.linspace(1e8, 3e8, len(TIME)).tolist()}
    samples |= {"available_bytes": [5e9] * len(TIME), "cpu": [1.9] * len(TIME), "cpu_own": [1.8] * len(TIME)}
    samples |= {k: [v] * len(TIME) for k, v in constant.items() if "/" in k or k.endswith("_hz") or "load" in k}
    samples |= {k: (list(v) if np.ndim(v) else [v] * len(TIME)) for k, v in (columns or {}).items()}
    start = Start(True, 0.0, 300.0, 200.0, 100.0, 600.0)
    bundles = []
    for i, name in enumerate(names):
        first = answers(seed=i, **how)
        second = answers(seed=i + 100, **{**how, "first_ms": how.get("first_ms", 100.0) / 5})
        size = (640, 480)
        work = {"vision": Work(4e9, 1e8), "prefill": Work(2e10, 3e8), "step": Work(1e8, 5e7)}
        run = Run(Case(size, 131, 64, 41), *RUN, first[:1], first, second, 3e8, work)
        identity = BundleId(
            f"build/{name}", "trol-nano", target, name.split("-")[-1], 2048, 5_000_000, "0" * 64, "test"
        )
        begun = (start, dataclasses.replace(start, cold=False, cached_share=1.0, load_ms=100.0, total_ms=500.0)) * 3
        bundles.append(
            BundleProfile(
                identity,
                "onnxruntime 1",
                (1.0, 1.5),
                (0.0, 1.0),
                begun,
                (run,),
                {k: tuple(v) for k, v in samples.items()},
                machine.total_power(),
            )
        )
    identity_of_machine = machine.identity() if root is not None else machine.identity() | {"cpu": "a CPU", "cores": 2}
    return Profile(
        SCHEMA, SCHEMA_VERSION, "2026-11-24T00:00:00+00:00", "0.1.0", "3.11", "Linux", dict(identity_of_machine),
        tuple(machine.missing()), Settings(2, ANSWERS, None, 0.1), Peaks(1e11, 2e10, "made up"), tuple(bundles),
    )  # fmt: skip
