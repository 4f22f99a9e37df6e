"""Makes a bundle from a checkpoint: traces graphs, streams weights, converts the tokenizer, writes the manifest."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from trol_edge._version import __version__
from trol_edge.bundle.cache_scales import OLDEST_ONNXRUNTIME, SCALES
from trol_edge.bundle.costs import Costs
from trol_edge.bundle.embedding import embedding_names
from trol_edge.bundle.folder import new_folder, sha256_of
from trol_edge.bundle.manifest import FORMAT, FORMAT_VERSION, FileInfo, GraphInfo, Manifest, Port, write_manifest
from trol_edge.bundle.names import HEAD, LAYERS, MIX, SELFTEST, SINGLE, TOKENIZER, WEIGHTS
from trol_edge.bundle.precision import CalibrationInfo, PrecisionPlan
from trol_edge.bundle.sizes import is_shareable
from trol_edge.bundle.spec import ModelSpec, TraversalChoice
from trol_edge.bundle.targets import TARGETS, is_gpu
from trol_edge.errors import CalibrationError, CheckpointError, ExportError, UsageError
from trol_edge.export import storage
from trol_edge.export.graphs import canonical, counts
from trol_edge.export.graphs.layers import only_image_rows
from trol_edge.export.lower import cache as lower_cache
from trol_edge.export.lower import ort as lower_ort
from trol_edge.export.lower import trt as lower_trt
from trol_edge.export.quantize import half, qdq
from trol_edge.export.quantize.cache import find_cache_scales
from trol_edge.export.quantize.recipes import (
    EXPORT_TARGETS,
    RecipeOptions,
    calibrates_computation,
    is_linear,
    make_plan,
    needs_statistics,
)
from trol_edge.export.quantize.scales import find_scales, scales_of_norms
from trol_edge.export.quantize.stored import IR_TYPES, Place, StoredWeights, places
from trol_edge.export.reference import tokenizer
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.hub import MODELS
from trol_edge.export.selftest import record as selftest
from trol_edge.export.selftest.emulation import Emulation, find_cuts
from trol_edge.export.storage import Layout, Progress
from trol_edge.numeric import shown, whole
from trol_edge.prompt.images import ImageSpec
from trol_edge.prompt.tokenizer import Tokenizer
from trol_edge.reading import guard
from trol_edge.rope import TABLES
from trol_edge.traversal import traversed_layers

if TYPE_CHECKING:
    from trol_edge.export.quantize.stats import Statistics

MIN_DEFAULT_CONTEXT = 2048  # smallest default context, in tokens
ROOM_FOR_TEXT = 768  # tokens of template, question and answer beside one picture with the most tiles

# Rewrites a quantized graph for a target, in place: (name of the graph, model, whether 4-bit weights are held once,
# whether caches have 8 bits) -> layouts of tensors that are written beside the parameters. Those that the graph reads
# stay initializers.
Lowering = Callable[[str, ir.Model, bool, bool], dict[str, Layout]]
LOWERINGS: dict[str, Lowering] = {"cpu": lower_ort.lower}


def export(
    checkpoint: str | os.PathLike[str],
    bundle: str | os.PathLike[str],
    *,
    model: str | None = None,
    target: str = "cpu",
    context: int | None = None,
    max_tiles: int | None = None,
    traversal: str | Collection[int] = "all",
    choice: TraversalChoice | None = None,
    options: RecipeOptions | None = None,
    shared_weights: bool = False,
    calibration: Callable[[Checkpoint], Statistics] | None = None,
    record_selftest: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Write a bundle from a published checkpoint folder; returns its manifest.

    target "cpu" is what `trol_edge.Runtime` runs; "onnx" writes self-contained graphs whose initializers point into
    the weights file. context is the capacity of the KV cache in tokens (default: room for one picture and some
    700 tokens of text, 2048 for TroL-1.8B and 7B, 2560 for TroL-3.8B; at most the model's max_position_embeddings).
    max_tiles: most tiles of a picture, the thumbnail not counted (default: as many as the model was trained with, 6 for
    TroL-3.8B; the others do not tile). Fewer take less of the context and of the time, and show less detail.
    traversal: the layers with a second pass. "all", as the model was trained; "12", the first 12 of them; "0-7,10", or
    numbers, these. The bundle is that other model: its graphs, caches, self-test and reference have no other second
    passes. What that costs, `calibration.traversal.choose` measures, or an evaluation. choice: how it was chosen, for
    the manifest.
    options choose the precision (default: the recipe fp32). All recipes but fp32, int8-dynamic, int4-dynamic, and fp16
    on a CPU, need statistics of this checkpoint's activations, and so do 8-bit keys and values in any recipe.
    calibration(checkpoint) loads or gathers them, once all other checks have passed.
    record_selftest: keep what the bundle's arithmetic gives on a small prompt, for `trol_edge.verify.replay`, and how
    far that is from the FP32 reference.
    shared_weights, for TensorRT: traverse and step take the matrices that both read as inputs, so that one buffer on
    the device serves both engines; not with int4.
    Peak memory does not depend on the size of the model. A known model name must fit the checkpoint's family.

    Raises CalibrationError, CheckpointError, ExportError, UsageError (see trol_edge.errors); nothing is left at
    `bundle` then.
    """
    if target not in EXPORT_TARGETS:
        raise ExportError(f"target {target!r} is not one of {', '.join(EXPORT_TARGETS)}")
    source = Checkpoint(checkpoint, family=MODELS[model].family.name if model in MODELS else None)
    source.spec = dataclasses.replace(source.spec, traversed=traversed_layers(traversal, source.spec.num_layers))
    spec = source.spec
    image = with_tiles(source.family.image(spec), max_tiles)
    context = default_context(spec, image) if context is None else context
    require_context(context, spec)
    options = options or RecipeOptions()
    plan = make_plan(options, {name: source.shape(name) for name in source.names()}, target)
    if shared_weights:
        _require_shareable(plan, target)
    if plan.kv is not None and not lower_ort.takes_eight_bit_caches(spec.head_dim):
        raise UsageError(
            f"8-bit keys and values (--kv {plan.kv}): heads of {spec.head_dim} numbers have no kernel; leave it out"
        )
    needed = needs_statistics(options, plan)
    if needed and calibration is None:
        raise UsageError(f"precision {plan.recipe} for target {target} needs the statistics of a calibration")
    with new_folder(bundle, overwrite) as folder:
        words = _write_tokenizer(folder / TOKENIZER, source)
        statistics = calibration(source) if calibration and needed else None
        if statistics is not None and statistics.checkpoint != source.identity():
            raise CalibrationError(
                f"the statistics belong to another checkpoint ({statistics.checkpoint[:12]}, this one is "
                f"{source.identity()[:12]}); calibrate this one into another folder"
            )
        scales = None
        if plan.quantized and statistics is not None and calibrates_computation(options, plan):
            scales = find_scales(source, plan, statistics, options.sensitive, progress, is_gpu(target))
            plan = scales.plan
        elif plan.quantized:
            scales = scales_of_norms(source, plan, progress)
        if plan.compute == "fp16" and statistics is not None:
            plan = dataclasses.replace(plan, kept_fp32=half.find_overflows(statistics))
        cache_scales = find_cache_scales(spec, statistics) if plan.kv is not None and statistics is not None else {}
        stored = StoredWeights(source, context, plan, scales, cache_scales)
        models = _trace(source, context, progress)
        inputs = scales.inputs if scales else {}
        cuts = {name: find_cuts(traced) for name, traced in models.items()}
        emulation = Emulation(plan, target, inputs, cuts, options.once)
        if options.once:
            models |= _trace_layers(source, context)
        layouts, lowered = dict(stored.layouts), dict[str, Layout]()
        dtypes = {n: IR_TYPES[t.dtype] for n, t in stored.layouts.items()}
        for name, traced in models.items():
            lowered |= prepare(name, traced, target, plan, inputs, dtypes, options.once)
        used = {weight for traced in models.values() for weight in canonical.weight_names(traced)} | {
            *embedding_names(layouts),
            *lowered,
        }
        layouts |= lowered
        layouts = {name: layout for name, layout in layouts.items() if name in used}
        written = storage.write(folder / WEIGHTS, layouts, stored.read, progress)
        stored.require_finite()
        found = places(layouts, written, plan)
        shared = shareable(models) if shared_weights else set()
        infos = {n: _write_graph(folder, n, traced, target, lowered, shared, found) for n, traced in models.items()}
        del models
        distance = None
        if record_selftest:
            distance = selftest.record(source, folder / SELFTEST, context, words, progress, plan, emulation)
            if distance is None:
                source.notes.append(f"a context of {context} tokens is too short for a self-test")
        digests = _digests(folder, progress)
        manifest = Manifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            model=model or source.folder.resolve().name,
            created_by=f"trol-edge {__version__}",
            target=target,
            context=context,
            spec=spec,
            prompt=source.family.prompt(spec),
            image=image,
            graphs=infos,
            files=digests,
            checkpoint={"folder": source.folder.resolve().name, "sha256": digests[WEIGHTS].sha256},
            tools={n: metadata.version(n) for n in ("torch", "onnx-ir", "onnxscript")}
            | {"python": platform.python_version()},
            notes=tuple(source.notes),
            parts=stored.parts(),
            plan=plan,
            calibration=CalibrationInfo(statistics.samples, statistics.checkpoint) if statistics else None,
            distance=distance,
            traversal=choice,
            requires={} if plan.kv is None else {"onnxruntime": OLDEST_ONNXRUNTIME},
        )
        write_manifest(folder, manifest)
    return manifest


def with_tiles(image: ImageSpec, max_tiles: int | None) -> ImageSpec:
    """The form of pictures with at most this many tiles. Raises UsageError for more than the model has, or below 1."""
    if max_tiles is None:
        return image
    found = whole(max_tiles, 1, image.max_tiles)
    if found is None:
        most = "1, because this model does not cut pictures" if image.max_tiles == 1 else f"1..{image.max_tiles}"
        raise UsageError(f"max_tiles {shown(max_tiles)} should be {most}")
    return dataclasses.replace(image, max_tiles=found)


def default_context(spec: ModelSpec, image: ImageSpec) -> int:
    """The default size of the K/V cache in tokens: one picture and some 700 tokens of text."""
    picture = spec.vision.tokens_per_image * image.most_tiles
    return min(max(MIN_DEFAULT_CONTEXT, -(-(picture + ROOM_FOR_TEXT) // 256) * 256), spec.max_position_embeddings)


def require_context(context: int, spec: ModelSpec) -> None:
    """Raise ExportError if the model has fewer than `context` positions."""
    limit = spec.max_position_embeddings
    if not 2 <= context <= limit:
        raise ExportError(
            f"context {context}: this model has positions 0..{limit - 1} (max_position_embeddings), and its rotary "
            f"embedding is not defined above them; choose 2..{limit}"
        )


def _write_tokenizer(path: Path, source: Checkpoint) -> Tokenizer | None:
    # If no file lists the image token, the authors' loader adds it after all others.
    image_token = (source.family.prompt(source.spec).image,)
    with guard(source.folder, CheckpointError, "download the checkpoint again", "its tokenizer files are not usable"):
        text = tokenizer.convert(source.folder, image_token)
    if text is None:
        source.notes.append("the checkpoint has no tokenizer: the bundle serves token ids only")
        return None
    with guard(source.folder, CheckpointError, "download the checkpoint again", "its tokenizer files are not usable"):
        tokenizer.verify(text, source.folder, image_token)
    path.write_text(text, encoding="utf-8")
    made = Tokenizer(text, str(source.folder))
    made.require_ids_below(source.spec.embedding_rows, CheckpointError)
    return made


def _digests(folder: Path, progress: Progress) -> dict[str, FileInfo]:
    files = sorted(folder.iterdir())
    done, total = 0, sum(path.stat().st_size for path in files)
    digests = {}
    for path in files:
        size = path.stat().st_size
        digests[path.name] = FileInfo(size, sha256_of(path))
        progress("hash", done := done + size, total)
    return digests


def _trace(source: Checkpoint, context: int, progress: Progress) -> dict[str, ir.Model]:
    models = {}
    for i, name in enumerate(canonical.TRACED):
        progress("trace", i, len(canonical.TRACED))
        models[name] = canonical.trace(name, source.family, source.spec, context)
    progress("trace", len(canonical.TRACED), len(canonical.TRACED))
    if source.spec.lora_rank:
        models["traverse_text"] = canonical.without_lora(models["traverse"])
    return models


def _trace_layers(source: Checkpoint, context: int) -> dict[str, ir.Model]:
    models = {name: canonical.trace(name, source.family, source.spec, context) for name in (LAYERS, MIX, HEAD)}
    only_image_rows(models[LAYERS])
    return models


def _fold_transposes(name: str, model: ir.Model) -> None:
    linear = {w for w in canonical.weight_names(model) if is_linear(w, tuple(model.graph.initializers[w].shape or ()))}
    if canonical.fold_transposes(model) != linear:
        raise ExportError(f"the trace of {name} reads a weight in another layout than the stored; please report this")


def prepare(
    name: str,
    model: ir.Model,
    target: str,
    plan: PrecisionPlan,
    input_scales: Mapping[str, float],
    dtypes: Mapping[str, ir.DataType],
    once: bool = False,
) -> dict[str, Layout]:
    """Quantize and lower a traced graph in place; returns the layouts of tensors written beside the parameters.

    dtypes: the stored dtype of every parameter that is not quantized. once: 4-bit weights are held once.
    """
    _fold_transposes(name, model)
    if plan.quantized:
        qdq.insert(model, plan, input_scales)
    if is_gpu(target) or (target == "onnx" and plan.quantized):
        qdq.separate_readers(model)
    if plan.compute == "fp16":
        half.convert(model, plan.kept_fp32, dtypes)
    in_place = target not in TARGETS or TARGETS[target].in_place
    if is_gpu(target) and name == "step":
        lower_trt.add_token(model)
        lower_cache.read_filled(model, give_rows=not in_place)
    elif not in_place and name != "vision":
        lower_cache.give_rows(model)
    return LOWERINGS[target](name, model, once, plan.kv is not None) if target in LOWERINGS else {}


def take_inputs(
    name: str, model: ir.Model, target: str, lowered: Collection[str], shared: Collection[str] = ()
) -> tuple[tuple[str, ...], list[str], Costs | None]:
    """Make weights graph inputs if the target wants that. Returns all weights, those that are inputs now, and costs.

    A graph of single passes has no costs of its own: traverse and step have them.

    lowered: the names that `prepare` returned, of all graphs. shared: weights that traverse and step share, see
    `export`.
    """
    weights = tuple(canonical.weight_names(model))
    as_inputs = [w for w in weights if w in shared or (is_gpu(target) and w in TABLES)]  # see trol_edge/rope.py
    if target == "cpu":
        given = {w for w in weights if w not in lowered}
        if name == LAYERS:  # no other session reads its matrices
            given = {w for w in given if w in TABLES or w.endswith(("norm.weight", *SCALES))}
        as_inputs = canonical.weights_as_inputs(model, given)
    costs = None if name in SINGLE else counts.count(model, weights, scores=not is_gpu(target))
    return weights, as_inputs, costs


def _require_shareable(plan: PrecisionPlan, target: str) -> None:
    """Raise UsageError if TensorRT would not take the weights as inputs."""
    if not is_gpu(target):
        raise UsageError(
            f"shared weights are for TensorRT, and target {target} holds them once anyway; leave --shared-weights out"
        )
    if not plan.can_share_weights:
        raise UsageError(
            "shared weights with int4: TensorRT takes no 4-bit inputs; choose int8 or fp16, or leave --shared-weights "
            "out"
        )


def shareable(models: Mapping[str, ir.Model]) -> set[str]:
    """Names of the matrices that both traverse and step read, nearly all of what two engines would hold twice."""
    step = models["step"].graph.initializers
    both = set(canonical.weight_names(models["traverse"])) & set(canonical.weight_names(models["step"]))
    return {name for name in both if is_shareable(name, tuple(step[name].shape or ()))}


def _write_graph(
    folder: Path,
    name: str,
    model: ir.Model,
    target: str,
    lowered: Collection[str],
    shared: Collection[str],
    found: dict[str, Place],
) -> GraphInfo:
    inputs, outputs = ports(model.graph.inputs), ports(model.graph.outputs)
    weights, as_inputs, costs = take_inputs(name, model, target, lowered, shared)
    canonical.weights_from_file(model, WEIGHTS, {n: (p.dtype, p.offset, p.nbytes) for n, p in found.items()}, as_inputs)
    if is_gpu(target):
        model = lower_trt.lower(model, TARGETS[target])
    file = f"{name}.onnx"
    (folder / file).write_bytes(ir.to_proto(model).SerializeToString())
    operators = dict(Counter(node.op_type for node in model.graph))
    constants = tuple(w for w in weights if w not in as_inputs)
    return GraphInfo(
        file=file,
        inputs=inputs,
        outputs=outputs,
        weights=weights,
        constants=constants,
        operators=operators,
        costs=costs,
    )


def ports(values: Iterable[ir.Value]) -> tuple[Port, ...]:
    """Describe inputs or outputs of a graph for the manifest."""
    return tuple(_port(value) for value in values)


def _port(value: ir.Value) -> Port:
    assert value.name and value.shape is not None and value.dtype is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape.dims)
    return Port(value.name, value.dtype.numpy().name, shape)
