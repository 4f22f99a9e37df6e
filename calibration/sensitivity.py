"""Finds a mixed precision that loses no more than asked: it measures each Linear's cost and raises the costly ones.

The cost of a Linear is the Kullback-Leibler divergence of the logits from the float32 model when only this Linear is
rounded. It is in nats, the mean over calibration samples, over the last token of the prompt and the tokens of the
answer. If layers have no second pass, that counts, too: every loss is that from the whole model. The Linears are
raised in the order of their costs, from the recipe's precision to int8 and from int8 to floating point. As few are
raised as keep the divergence of the whole plan, measured again, within the limit.

This runs the whole PyTorch reference in float32, so a model needs four bytes of memory per parameter here. Low-rank
parts have their weights rounded, not their inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trol_edge.bundle.folder import new_file, writing
from trol_edge.bundle.precision import QUANTIZED, LinearPlan
from trol_edge.calibration.prompts import model_prompts
from trol_edge.calibration.samples import Progress, SampleSet
from trol_edge.errors import CalibrationError, UsageError
from trol_edge.export.quantize.recipes import RecipeOptions, make_plan
from trol_edge.export.quantize.rounding import quantize, restore, round_to
from trol_edge.export.quantize.scales import Scales, find_scales
from trol_edge.export.quantize.stats import Statistics
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.layerwise import rope_of
from trol_edge.export.reference.model import EagerAttention
from trol_edge.prompt.images import preprocess
from trol_edge.traversal import traversed_layers

# Precision of a Linear -> the next better one.
RAISED = {"int4": LinearPlan("int8"), "int8": LinearPlan("fp32"), "fp8": LinearPlan("fp16")}


@dataclasses.dataclass(frozen=True)
class MixedPlan:
    """A recipe with some Linears raised.

    linears: those that differ from the recipe. sensitivity: Linear -> nats when it alone is rounded by the recipe.
    recipe_nats, nats: loss of the plain recipe and of this plan, with all Linears rounded. reached: whether nats is
    within the limit.
    """

    options: RecipeOptions
    linears: Mapping[str, LinearPlan]
    sensitivity: Mapping[str, float]
    recipe_nats: float
    nats: float
    max_loss: float

    @property
    def reached(self) -> bool:
        """Whether the loss is within the limit."""
        return self.nats <= self.max_loss

    def mixed(self) -> RecipeOptions:
        """Options for an export: the recipe with the raised Linears."""
        return dataclasses.replace(self.options, linears={**self.options.linears, **self.linears})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as the JSON that `trol-edge export --precision` reads."""
        with writing(path, UsageError), new_file(Path(path)) as part:
            part.write_text(json.dumps(dataclasses.asdict(self.mixed()), indent=1) + "\n", encoding="utf-8")


def find_plan(
    checkpoint: str | os.PathLike[str],
    calibration: Callable[[Checkpoint], Statistics],
    samples: SampleSet,
    options: RecipeOptions,
    max_loss: float,
    progress: Progress = lambda what, done, total: None,
    traversal: str | Collection[int] = "all",
) -> MixedPlan:
    """Find the fewest Linears to raise in the recipe of `options` to keep the loss within `max_loss` nats.

    calibration(checkpoint) loads or gathers its statistics, once all other checks have passed. traversal: the layers
    that keep their second pass, see `pipeline.export`; the limit is for what is left out and rounded together.
    Raises UsageError for a limit that is not above zero or a recipe that rounds nothing, CalibrationError for
    statistics of another checkpoint.
    """
    if not max_loss > 0:
        raise UsageError(f"max_loss {max_loss!r} nats: choose a limit above 0, such as 0.01")
    # The search replaces the recipe's own rule, which raises Linears by the error of their weights.
    options = dataclasses.replace(options, sensitive=None)
    source = Checkpoint(checkpoint)
    twice = traversed_layers(traversal, source.spec.num_layers)
    plan = make_plan(options, {name: source.shape(name) for name in source.names()}, "cpu")
    if not plan.quantized:
        raise UsageError(f"recipe {options.recipe} rounds no Linear, so there is nothing to raise; choose int4 or int8")
    statistics = calibration(source)
    if statistics.checkpoint != source.identity():
        raise CalibrationError("the statistics belong to another checkpoint; calibrate this one into another folder")
    scales = find_scales(source, plan, statistics, None, progress)
    model = RoundedModel(source, samples, scales)
    wanted = model.logits({})
    if twice is not None:
        model.decoder.second_layers = frozenset(twice)
    plans = {name: linear for name, linear in scales.plan.linears.items() if linear.precision in QUANTIZED}

    def loss(linears: Mapping[str, LinearPlan]) -> float:
        return float(np.mean([_divergence(p, q) for p, q in zip(wanted, model.logits(linears), strict=True)]))

    sensitivity = {}
    for i, (name, linear) in enumerate(plans.items()):
        sensitivity[name] = loss({name: linear})
        progress("measure", i + 1, len(plans))
    order = sorted(plans, key=lambda name: -sensitivity[name])
    recipe_nats = nats = loss(plans)
    current = dict(plans)
    while nats > max_loss:
        raisable = [n for n in order if current[n].precision in RAISED]
        if not raisable:
            break
        raised, nats = fewest(current, raisable, loss, max_loss)
        current |= raised
    changed = {name: linear for name, linear in current.items() if linear != plans[name]}
    return MixedPlan(options, changed, sensitivity, recipe_nats, nats, max_loss)


def within(
    checkpoint: str | os.PathLike[str],
    calibration: Callable[[Checkpoint], Statistics],
    samples: SampleSet,
    options: RecipeOptions,
    max_loss: float,
    progress: Progress = lambda what, done, total: None,
    traversal: str | Collection[int] = "all",
) -> RecipeOptions:
    """Options for an export that loses at most `max_loss` nats. Raises UsageError if no mixture of precisions does."""
    found = find_plan(checkpoint, calibration, samples, options, max_loss, progress, traversal)
    if not found.reached:
        raise UsageError(
            f"--max-loss {max_loss:g} nats: {found.nats:.2e} are lost even with {len(found.linears)} of "
            f"{len(found.sensitivity)} Linears raised; choose a higher limit, or a recipe of more bits"
            + ("" if traversal == "all" else ", or more second passes (--traversal)")
        )
    return found.mixed()


def fewest(
    current: Mapping[str, LinearPlan],
    order: Sequence[str],
    loss: Callable[[Mapping[str, LinearPlan]], float],
    limit: float,
) -> tuple[dict[str, LinearPlan], float]:
    """Find by bisection the shortest prefix of `order` that, raised one step, keeps the limit; all of it if none does.

    Returns the raised plan and its loss.
    """

    def raised(count: int) -> dict[str, LinearPlan]:
        return {name: RAISED[current[name].precision] for name in order[:count]}

    few, many = 0, len(order)
    nats = loss({**current, **raised(many)})
    if nats > limit:
        return raised(many), nats
    while many - few > 1:
        middle = (few + many) // 2
        found = loss({**current, **raised(middle)})
        if found <= limit:
            many, nats = middle, found
        else:
            few = middle
    return raised(many), nats


def _divergence(p: Tensor, q: Tensor) -> float:
    """The mean divergence of softmax(q) from softmax(p) over rows, in nats."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


class RoundedModel:
    """The whole reference with folded weights; any choice of its Linears can be rounded for one run."""

    def __init__(self, source: Checkpoint, samples: SampleSet, scales: Scales) -> None:
        self.spec, self.scales = source.spec, scales
        family = source.family
        with torch.device("meta"):
            self.decoder: Any = family.decoder(self.spec)
            self.vision: Any = family.vision(self.spec)
        for prefix, module in (("decoder", self.decoder), ("vision", self.vision)):
            state = {
                name: scales.folding.apply(f"{prefix}.{name}", source.tensor(f"{prefix}.{name}"), 0)
                for name in module.state_dict()
            }
            module.load_state_dict(state, assign=True)
        self.prompts, _ = model_prompts(source, samples)
        image = family.image(self.spec)
        self.pixels = [
            torch.from_numpy(preprocess(p.sample.load(), image)) if p.squares else None for p in self.prompts
        ]
        embedding = source.tensor("embedding").float()
        self.embedded = [embedding[torch.from_numpy(p.ids)] for p in self.prompts]
        self.features: list[Tensor | None] | None = None  # image features with the tower in float32

    @torch.no_grad()
    def logits(self, linears: Mapping[str, LinearPlan]) -> list[Tensor]:
        """Logits [rows, V] of every sample with these Linears rounded, from the last token of the prompt on."""
        tower = any(name.startswith("vision.") for name in linears)
        with self._rounded(linears):
            features = self.features
            if tower or features is None:
                features = [None if p is None else self.vision(p) for p in self.pixels]
                if not linears:
                    self.features = features
            return [self._one(i, features[i]) for i in range(len(self.prompts))]

    def _one(self, index: int, features: Tensor | None) -> Tensor:
        prompt, x = self.prompts[index], self.embedded[index].clone()
        mask = torch.from_numpy(prompt.ids == self.spec.image_token_id)
        if features is not None:
            x[mask] = features.reshape(-1, x.shape[1])
        attend = EagerAttention(self.spec, *rope_of(self.spec, len(x)))
        attend.positions = torch.arange(len(x))
        lora = mask.float()[None, :, None] if features is not None and self.spec.lora_rank else None
        x = self.decoder.traverse(x[None], lora, attend)
        logits: Tensor = self.decoder.logits(x[:, prompt.question - 1 :])[0]
        return logits

    @contextlib.contextmanager
    def _rounded(self, linears: Mapping[str, LinearPlan]) -> Iterator[None]:
        """Round weights and inputs of Linears inside the block, and restore them afterwards."""
        kept: list[tuple[nn.Parameter, Tensor]] = []
        handles = []
        try:
            for name, linear in linears.items():
                if linear.precision not in QUANTIZED:
                    continue
                path, _, kind = name.rpartition(".")
                prefix, _, inside = path.partition(".")
                module = getattr(self, prefix).get_submodule(inside)
                parameter = getattr(module, kind)
                kept.append((parameter, parameter.data))
                parameter.data = restore(*quantize(parameter.data, linear, self.scales.importance.get(name)))
                if linear.activations and kind == "weight":
                    handles.append(module.register_forward_pre_hook(_rounding(self.scales.inputs[name], linear)))
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data
            for handle in handles:
                handle.remove()


def _rounding(scale: float, linear: LinearPlan) -> Callable[[nn.Module, Any], Any]:
    def hook(module: nn.Module, args: Any) -> Any:
        return (round_to(args[0], scale, linear.precision) * scale, *args[1:])

    return hook
