"""What a replay found: stages, how far each may drift, and a verdict."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from trol_edge.bundle.manifest import Manifest

SMALL = 5  # layers of the small models' decoders, on which budgets were measured
UNRELATED = 1.0  # drift of zeros; values that have nothing to do with each other drift by 1.4
ALWAYS = {
    "preprocess": 5e-3,
    "rope": 1e-6,
    "tokens": 0.0,
    "tokenizer": 0.0,
    "prompt": 0.0,
}  # budgets that no precision changes


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most drift that one precision may cause."""

    embedding: float
    vision: float
    keys: float
    values: float
    logits: float


# From the loosest to the tightest. Measured on both small models, lowered for a CPU and for a GPU (there on a stand-in
# that computes on a CPU): docs/verify.md has the figures and the margins. fp16 also serves fp32 on a GPU, where
# TensorRT multiplies in TF32, of as many bits. Behind more layers than theirs a budget grows, see `behind`.
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
    "preprocess": "the picture settings in bundle.json, or the Pillow that resizes here, are not those of the export",
    "rope": "the rotary tables in the weights file are not this model's",
    "vision": "weights or engine of the vision tower",
    "embedding": "the embedding table in the weights file",
    "traverse": "in a first pass this layer's qkv weights, or what stands between them and the stage before; in a "
    "second pass this layer's other weights; or the engine or library that runs the prompt",
    "step": "the graph, engine or library that computes one token; the prompt was right",
    "tokens": "the logits are within their budget, but the most probable tokens are others",
    "engines": "build the engines again on this machine",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage. drift is infinite where there is nothing to measure, and `text` then says why."""

    name: str
    drift: float
    budget: float
    text: str = ""

    @property
    def good(self) -> bool:
        """Whether it is within its budget."""
        return self.drift <= self.budget


@dataclasses.dataclass(frozen=True)
class Report:
    """What a replay found."""

    bundle: str
    target: str
    precision: str  # the recipe
    runs_on: str  # library and device
    machine: str
    stages: tuple[Stage, ...]
    seconds: float

    @property
    def first_wrong(self) -> Stage | None:
        """The first stage out of its budget: where the fault is."""
        return next((stage for stage in self.stages if not stage.good), None)

    @property
    def could_be_rounding(self) -> bool:
        """Whether a model that rounds worse than the small ones, on which budgets were measured, may explain it all."""
        wrong = [stage for stage in self.stages if not stage.good]
        rounded = [
            stage
            for stage in wrong
            if not re.fullmatch(r"(long\.)?(tokenizer|prompt|preprocess|rope|embedding|tokens|engines)", stage.name)
        ]
        return wrong[:1] == rounded[:1] and all(stage.drift < UNRELATED for stage in rounded)

    @property
    def verdict(self) -> str:
        """In a sentence or two, what to do included."""
        wrong = self.first_wrong
        if wrong is None:
            return f"the {len(self.stages)} stages of the self-test are within the budget of {self.precision}"
        found = wrong.text or f"drift {wrong.drift:.1e}, the budget of {self.precision} is {wrong.budget:.1e}"
        parts = wrong.name.removeprefix("long.").split(".")
        return f"the self-test goes wrong at {wrong.name}: {found}. Look at: {HINTS[parts[0]]}"

    def lines(self, every: bool = False) -> list[tuple[str, Stage]]:
        """What to print: (title, stage), and of each layer that stage alone which used most of its budget."""
        groups: dict[str, list[Stage]] = {}
        for stage in self.stages:
            in_layer = re.match(r".*\.layers\.\d+", stage.name)
            groups.setdefault(stage.name if every or not in_layer else in_layer[0], []).append(stage)
        worst = {name: max(group, key=lambda s: s.drift / (s.budget or 1)) for name, group in groups.items()}
        return [(name, stage if stage.name == name else _placed(stage, name)) for name, stage in worst.items()]

    def json(self) -> dict[str, Any]:
        """As plain data; a drift that is no number is null."""
        wrong = self.first_wrong
        stages = [dataclasses.asdict(stage) | {"good": stage.good} for stage in self.stages]
        for stage in stages:
            stage["drift"] = stage["drift"] if math.isfinite(stage["drift"]) else None
        verdict = {"passed": wrong is None, "first_wrong": wrong.name if wrong else None, "verdict": self.verdict}
        return dataclasses.asdict(self) | verdict | {"stages": stages}


def _placed(stage: Stage, layer: str) -> Stage:
    """A stage of a layer, told by where in it."""
    place = stage.name.removeprefix(f"{layer}.")
    return dataclasses.replace(stage, text=f"{place}: {stage.text}" if stage.text else place)


def behind(layers: int, budget: float) -> float:
    """A budget behind so many layers: the errors of layers are independent, so their sum grows as a square root.

    Never as much as values drift that have nothing to do with the reference's.
    """
    return min(budget * math.sqrt(max(1.0, layers / SMALL)), max(budget, 0.9 * UNRELATED))


def budget_of(manifest: Manifest, prefix: str) -> Budget:
    """Of the loosest precision among the Linears whose names begin so, or of what the rest computes in."""
    plan = manifest.plan
    used = {linear.precision for name, linear in plan.linears.items() if name.startswith(prefix)} | {plan.compute}
    used |= {"fp16"} if manifest.target != "cpu" else set()
    return BUDGETS[next(precision for precision in BUDGETS if precision in used)]
