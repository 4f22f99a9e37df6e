"""Finds out what a bundle of a published model would hold and do, without a checkpoint and without an export.

The graphs are those that `pipeline.export` writes, prepared by the same code. Layers are alike, so models of one and of
two layers are traced instead of the whole (seconds instead of a minute), and each further layer counts as much as the
second one adds. A plan that treats layers differently is traced whole. What only calibration knows (Linears that get 8
bits because INT4 would hurt them, values that overflow FP16) is not included.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import onnx_ir as ir

from trol_edge.bundle.costs import Costs
from trol_edge.bundle.names import EMBEDDING
from trol_edge.bundle.sizes import cache_bytes
from trol_edge.bundle.spec import ModelSpec
from trol_edge.bundle.targets import is_gpu
from trol_edge.export import pipeline
from trol_edge.export.graphs import canonical, counts
from trol_edge.export.quantize.qdq import scale_name
from trol_edge.export.quantize.recipes import RecipeOptions, make_plan
from trol_edge.export.quantize.stored import IR_TYPES, stored_dtype
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.family import Family
from trol_edge.export.reference.hub import find, shipped_folder
from trol_edge.plan import shipped
from trol_edge.plan.subject import Subject
from trol_edge.rope import TABLES

PUBLISHED = "F16"  # dtype of the published checkpoints


class Unbuilt:
    """A model described by its shape. Traces are kept, so that several precisions need only one."""

    def __init__(self, name: str, family: Family, spec: ModelSpec, context: int | None = None) -> None:
        """Describe a model. context: size of the cache in tokens (default: export's default)."""
        self.name, self.family, self.spec = name, family, spec
        self.context = pipeline.default_context(spec, family.image(spec)) if context is None else context
        self._traces: dict[tuple[str, int, bool], ir.Model] = {}

    def subject(self, target: str, options: RecipeOptions, twice: int | None = None) -> Subject:
        """The subject of a plan for one target and precision. Raises UsageError if they do not go together.

        twice: number of layers with a second pass (None: all). No engine of a model with fewer was counted.
        """
        if twice is not None and twice < self.spec.num_layers:
            return self._fewer(target, options, twice)
        layers, tower = self.spec.num_layers, self.spec.vision.num_layers
        if options.linears:
            return self._subject(target, options, layers, tower)
        one, two = (self._subject(target, options, n, n) for n in (1, 2))
        towers = {"vision": tower}
        depth = {name: towers.get(name, layers) for name in one.graphs}

        def grown(a: int, b: int, count: int) -> int:
            return a + (count - 1) * (b - a)

        return dataclasses.replace(
            two,
            layers=layers,
            graphs={name: counts.repeat(one.graphs[name], two.graphs[name], n) for name, n in depth.items()},
            weights={name: grown(one.weights[name], two.weights[name], n) for name, n in depth.items()},
            decoder_bytes=grown(one.decoder_bytes, two.decoder_bytes, layers),
            shareable_bytes=grown(one.shareable_bytes, two.shareable_bytes, layers),
            cache_bytes=grown(one.cache_bytes, two.cache_bytes, layers),
            **self._programs(target, options),
        )

    def _fewer(self, target: str, options: RecipeOptions, twice: int) -> Subject:
        """The same with a second pass in `twice` layers."""
        whole, layers = self.subject(target, options), self.spec.num_layers
        plain = dataclasses.replace(options, linears={})
        two, less = (self._subject(target, plain, 2, 2, once) for once in (False, True))
        graphs = {
            name: counts.without(costs, two.graphs[name], less.graphs[name], layers - twice)
            for name, costs in whole.graphs.items()
        }
        second = whole.cache_bytes * twice // layers
        return dataclasses.replace(whole, graphs=graphs, twice=twice, second_bytes=second, programs={}, programs_of="")

    def _programs(self, target: str, options: RecipeOptions) -> dict[str, Any]:
        """What engines of this model move, if it was counted for the plain recipe that is asked for."""
        recipe = options.recipe
        if options != RecipeOptions(recipe=recipe):
            return {}
        layers, tower = self.spec.num_layers, self.spec.vision.num_layers
        found = shipped.programs(self.name, target, recipe, layers, tower)
        return {"programs": found, "programs_of": f"{shipped.shipped().library}, one layer and two"} if found else {}

    def _subject(self, target: str, options: RecipeOptions, layers: int, tower: int, once: bool = False) -> Subject:
        """A model of fewer layers. once: its last layer has no second pass."""
        vision = dataclasses.replace(self.spec.vision, num_layers=tower)
        spec = dataclasses.replace(self.spec, num_layers=layers, vision=vision)
        spec = dataclasses.replace(spec, traversed=tuple(range(layers - 1)) if once else None)
        shapes = {name: source.shape for name, source in self.family.sources(spec).items()}
        shapes |= {"decoder.gate.weight": (1, spec.hidden_size), "decoder.gate.bias": (1,)}
        plan = make_plan(options, shapes, target)
        dtypes = {n: IR_TYPES[stored_dtype(n, s, PUBLISHED, plan, False)] for n, s in shapes.items()}
        dtypes |= dict.fromkeys(TABLES, ir.DataType.FLOAT)
        scale_type = ir.DataType.FLOAT16 if plan.compute == "fp16" else ir.DataType.FLOAT
        dtypes |= {scale_name(linear): scale_type for linear in plan.linears}
        models = {name: self._trace(name, spec).clone() for name in canonical.TRACED}
        if spec.lora_rank:
            models["traverse_text"] = canonical.without_lora(models["traverse"])
        lowered: set[str] = set()
        for name, model in models.items():
            given: dict[str, float] = defaultdict(lambda: 1.0)
            lowered |= pipeline.prepare(name, model, target, plan, given, dtypes, options.once).keys()
        can_share = is_gpu(target) and plan.can_share_weights
        shared = pipeline.shareable(models) if can_share else set()
        costs: dict[str, Costs] = {}
        sizes: dict[str, dict[str, int]] = {}
        caches = 0
        for name, model in models.items():
            if name == "step":
                caches = cache_bytes(pipeline.ports(model.graph.inputs), self.context)
            names, _, counted = pipeline.take_inputs(name, model, target, lowered)
            assert counted is not None
            costs[name] = counted
            values = {v.name: v for v in (*model.graph.initializers.values(), *model.graph.inputs)}
            sizes[name] = {w: counts.bytes_of(values[w]) for w in names}
        decoder = {w: n for name, found in sizes.items() if name != "vision" for w, n in found.items()}
        rounded = plan.embedding is not None
        embedding = IR_TYPES[stored_dtype(EMBEDDING, shapes[EMBEDDING], PUBLISHED, plan, False)]
        return Subject(
            name=self.name,
            target=target,
            precision=plan.recipe,
            context=self.context,
            layers=self.spec.num_layers,
            twice=self.spec.num_layers,
            tokens_per_tile=spec.vision.tokens_per_image,
            most_tiles=self.family.image(spec).most_tiles,
            graphs=costs,
            weights={name: sum(found.values()) for name, found in sizes.items()},
            decoder_bytes=sum(decoder.values()),
            shareable_bytes=sum(sizes["step"][name] for name in shared),
            shared=False,
            embedding_bytes=shapes[EMBEDDING][0] * (shapes[EMBEDDING][1] * round(embedding.itemsize) + 4 * rounded),
            cache_bytes=caches,
            hidden_size=spec.hidden_size,
        )

    def _trace(self, name: str, spec: ModelSpec) -> ir.Model:
        layers = spec.vision.num_layers if name == "vision" else spec.num_layers
        key = (name, layers, name == "traverse" and spec.traversed is not None)
        if key not in self._traces:
            self._traces[key] = canonical.trace(name, self.family, spec, self.context)
        return self._traces[key]


def published(name: str, context: int | None = None) -> Unbuilt:
    """Describe a model by its published name. Raises UsageError for another name, or if the context is too long."""
    model = find(name)
    if model.repository is None:
        spec = Checkpoint(shipped_folder(name)).spec
    else:
        spec = model.family.model_spec(model.config, None, model.family.published(model.config))
    if context is not None:
        pipeline.require_context(context, spec)
    return Unbuilt(name, model.family, spec, context)
