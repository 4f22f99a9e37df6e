"""The report of a replay: stages, how far each may drift, and a verdict."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle import probes
from trol_edge.bundle.manifest import Manifest
from trol_edge.bundle.precision import QUANTIZED

SMALL = 5  # layers in the decoders of the small models on which budgets were measured
SUSPECT = 0.25  # share of a budget that no healthy machine uses, in arithmetic with forced inputs
UNRELATED = 1.0  # drift of an all-zero output; unrelated values drift by 1.4
ALWAYS = {
    "preprocess": 5e-3,
    "rope": 1e-6,
    "arithmetic": 2e-5,
    "rounded": 5e-3,
    "stored": 1e-12,
    "tokens": 0.0,
    "tokenizer": 0.0,
    "prompt": 0.0,
}  # budgets that no precision changes; "rounded": of 8-bit keys and values, and of what attention makes of them, where
# another order of sums moves a few numbers to the next step


@dataclasses.dataclass(frozen=True)
class Budget:
    """The highest drift that one precision may cause. grows: in models deeper than the small ones it is larger."""

    embedding: float
    vision: float
    keys: float
    values: float
    logits: float
    grows: bool = True

    def at(self, kind: str, layers: int) -> float:
        """The budget of a kind of value, "keys" for example, after `layers` layers."""
        budget: float = getattr(self, kind)
        return at_depth(layers, budget) if self.grows else budget


OLDER = (
    "An earlier version recorded this self-test, with the FP32 reference only: rounding may hide a fault; export the "
    "bundle again to have its own arithmetic checked"
)
SATURATES = (
    "This processor clips sums of 8-bit products (x86 without VNNI does), so int8 and int4 are less exact here than "
    "elsewhere; use fp32 here, or measure with `trol-edge compare`"
)
# How many times a precision's distance to FP32 two machines may be apart where inputs are rounded. A last bit of
# float32 moves a number to the next step, which moves others, until the errors of rounding are independent in the two.
# They are then the square root of two times as far apart as each is from a machine that rounds nothing.
APART = 2.0
# Ordered from the loosest to the tightest. Measured on both small models, for a CPU and for a GPU (the latter on a
# stand-in that computes on a CPU); they hold what nothing rounds, and self-tests of earlier versions. fp16 also serves
# fp32 on a GPU, where TensorRT multiplies in TF32, which has as many bits. In deeper models they grow, see `at_depth`.
BUDGETS = {
    "int4": Budget(embedding=1e-3, vision=0.1, keys=0.4, values=0.8, logits=0.3),
    "int8": Budget(embedding=1e-3, vision=0.05, keys=0.25, values=0.8, logits=0.3),
    "fp8": Budget(embedding=1e-3, vision=0.1, keys=0.2, values=0.5, logits=0.2),
    "fp16": Budget(embedding=1e-3, vision=1e-2, keys=1e-2, values=1e-2, logits=1e-2),
    "fp32": Budget(embedding=1e-6, vision=5e-5, keys=5e-5, values=5e-5, logits=5e-5),
}


HINTS = {
    "tokenizer": "tokenizer.json is not the one that export wrote; copy or export the bundle again",
    "prompt": "the prompt template, the ids of image and end tokens in bundle.json, or the version that runs here",
    "preprocess": "the picture settings in bundle.json, or the Pillow that resizes here, differ from the export's",
    "rope": "the rotary tables in the weights file are not this model's",
    "arithmetic": "the weights or scales of this place, the graph that it names, or the library's kernels for this "
    "processor",
    "stored": "this tensor in the weights file is not the one that export wrote",
    "vision": "weights or engine of the vision tower",
    "embedding": "the embedding table in the weights file",
    "traverse": "in a first pass this layer's qkv weights, or what is between them and the stage before; in a "
    "second pass this layer's other weights; or the engine or library that runs the prompt",
    "step": "the graph, engine or library that computes one token; the prompt was right",
    "tokens": "the logits are within their budget, but the most probable tokens differ",
    "engines": "build the engines again on this machine",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage. drift is infinite if it cannot be measured, and `text` then says why."""

    name: str
    drift: float
    budget: float
    text: str = ""

    @property
    def good(self) -> bool:
        """Whether the drift is within its budget."""
        return self.drift <= self.budget


@dataclasses.dataclass(frozen=True)
class Report:
    """The stages of a replay, with where and how they ran."""

    bundle: str
    target: str
    precision: str  # the recipe
    runs_on: str  # library and device
    machine: str
    stages: tuple[Stage, ...]
    seconds: float
    notes: tuple[str, ...] = ()  # what to know about this result
    passes: str = ""  # the layers, and which of them have a second pass

    @property
    def first_wrong(self) -> Stage | None:
        """Where the fault is, see `place_of`; None if every stage is within its budget."""
        return place_of(self.stages)

    @property
    def could_be_rounding(self) -> bool:
        """Whether rounding may explain everything, in a model that rounds worse than those that budgets are from."""
        pattern = r"(long\.)?(vision$|traverse\.|step\.)" + (r"|arithmetic\." if SATURATES in self.notes else "")
        wrong = [stage for stage in self.stages if not stage.good]
        rounded = [stage for stage in wrong if re.match(pattern, stage.name)]
        return wrong[:1] == rounded[:1] and all(stage.drift < UNRELATED for stage in rounded)

    @property
    def verdict(self) -> str:
        """The result in a sentence or two, with what to do."""
        wrong = self.first_wrong
        notes = "".join(f". {note}" for note in self.notes)
        if wrong is None:
            return f"the {len(self.stages)} stages of the self-test are within the budget of {self.precision}{notes}"
        found = wrong.text or f"drift {wrong.drift:.1e}, the budget of {self.precision} is {wrong.budget:.1e}"
        parts = wrong.name.removeprefix("long.").split(".")
        return f"the self-test goes wrong at {wrong.name}: {found}. Look at: {HINTS[parts[0]]}{notes}"

    def lines(self, every: bool = False) -> list[tuple[str, Stage]]:
        """What to print, as (title, stage). A layer shows only the stage that used most of its budget, and so do the
        arithmetic of a graph and what is stored."""
        groups: dict[str, list[Stage]] = {}
        for stage in self.stages:
            in_layer = re.match(r"arithmetic\.\w+|stored|.*\.layers\.\d+", stage.name)
            groups.setdefault(stage.name if every or not in_layer else in_layer[0], []).append(stage)
        worst = {name: max(group, key=lambda s: s.drift / (s.budget or 1)) for name, group in groups.items()}
        return [(name, stage if stage.name == name else _placed(stage, name)) for name, stage in worst.items()]

    def json(self) -> dict[str, Any]:
        """The report as plain data; an infinite drift is null."""
        wrong = self.first_wrong
        stages = [dataclasses.asdict(stage) | {"good": stage.good} for stage in self.stages]
        for stage in stages:
            stage["drift"] = stage["drift"] if math.isfinite(stage["drift"]) else None
        verdict = {"passed": wrong is None, "first_wrong": wrong.name if wrong else None, "verdict": self.verdict}
        return dataclasses.asdict(self) | verdict | {"stages": stages}


def place_of(stages: Iterable[Stage]) -> Stage | None:
    """The first stage above its budget. Arithmetic is named where it began to differ, if that was just within it.

    What a Linear computes wrongly stays in the sum that later stages read. A healthy machine uses a twentieth of the
    budget, so what is above a quarter of it before a stage that is wrong is the same fault.
    """
    before: list[Stage] = []
    for stage in stages:
        if not stage.good:
            graph = ".".join(stage.name.split(".")[:2]) + "."
            alike = (s for s in before if stage.name.startswith("arithmetic.") and s.name.startswith(graph))
            began = next((s for s in alike if s.drift > s.budget * SUSPECT), None)
            if began is None:
                return stage
            text = f"drift {began.drift:.1e}, and {stage.drift:.1e} at {stage.name}, the budget is {stage.budget:.1e}"
            return dataclasses.replace(began, text=text)
        before.append(stage)
    return None


def compared(name: str, here: NDArray[Any], reference: NDArray[Any], budget: float) -> Stage:
    """The stage that compares values with a reference by their drift."""
    if here.shape != reference.shape:
        return Stage(name, math.inf, budget, f"shape {list(here.shape)} instead of {list(reference.shape)}")
    bad = int((~np.isfinite(here)).sum())
    if bad:
        return Stage(name, math.inf, budget, f"{bad} of {here.size} values are NaN or infinite (FP16 ends at 65504)")
    return Stage(name, probes.drift(here, reference), budget)


def _placed(stage: Stage, layer: str) -> Stage:
    """The stage, labelled by its place within the layer."""
    place = stage.name.removeprefix(f"{layer}.")
    return dataclasses.replace(stage, text=f"{place}: {stage.text}" if stage.text else place)


def at_depth(layers: int, budget: float) -> float:
    """The budget after `layers` layers. Errors of layers are independent, so their sum grows as a square root.

    Capped below 1.0, the drift of an all-zero output, so that a stage unrelated to the reference always fails.
    """
    return min(budget * math.sqrt(max(1.0, layers / SMALL)), max(budget, 0.9 * UNRELATED))


def budget_of(manifest: Manifest, prefix: str) -> Budget:
    """The budget of the Linears under `prefix` and of what is between them.

    A bundle that recorded its own arithmetic is held to that: as float32 on a CPU, as FP16 on a GPU, and where inputs
    are rounded to twice the precision's distance to FP32. Older ones recorded the FP32 reference, and the budget
    is that of the loosest precision.
    """
    plan, far = manifest.plan, manifest.distance
    used = {linear.precision for name, linear in plan.linears.items() if name.startswith(prefix)} | {plan.compute}
    used |= {"fp16"} if manifest.target != "cpu" else set()
    loosest = BUDGETS[next(precision for precision in BUDGETS if precision in used)]
    if far is None:
        return loosest
    exact = BUDGETS["fp32" if manifest.target == "cpu" else "fp16"]
    # The tower has no cache.
    if not used & set(QUANTIZED) and (plan.kv is None or prefix == "vision."):
        return dataclasses.replace(exact, embedding=BUDGETS["fp32"].embedding)
    kinds = {
        kind: min(max(APART * far[kind], getattr(exact, kind)), 0.9 * UNRELATED)
        for kind in ("vision", "keys", "values", "logits")
    }
    return Budget(embedding=BUDGETS["fp32"].embedding, **kinds, grows=False)
