"""Replay a bundle's self-test here, on its own target and precision, and compare every stage with the FP32 reference.

Stages run in the order of computation, each on what the one before gave: the first one out of its budget is where the
fault is, and what is wrong behind it follows from it. Drift is |here - reference| / |reference|, Euclidean norms over
all values of a stage (of logits less their mean). Not token by token: a token that attention uses as a sink has values
near zero, and of these any rounding is a large part.

    preprocess                         pixels of the picture
    rope                               the tables in the weights file, at 32 positions up to the end of the context
    vision                             features of the picture
    embedding                          rows of the table
    traverse.layers.<i>.pass<1|2>.keys, .values, then traverse.logits
    step.layers.<i>.keys, .values, then step.logits, of the last of several steps
    tokens                             the most probable token behind the prompt and behind each stepped token
    long.traverse...                   all of it with the long rope factors, where there are two sets

A Runtime does this once per machine (`first_load`) and leaves a file `verified-<key>.json` in the bundle's folder, or
in the user's cache folder where that cannot be written. The key is a hash over bundle, machine and what runs it there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge._version import __version__
from trol_edge.bundle.manifest import SELFTEST, VERIFIED, Bundle, Manifest
from trol_edge.bundle.selftest import Case, SelfTest, read
from trol_edge.bundle.weights import to_float32
from trol_edge.cache import FIRST, SECOND, Backend
from trol_edge.errors import BundleError, VerifyError
from trol_edge.machine import identity as machine
from trol_edge.prompt.images import preprocess
from trol_edge.session import Embeddings

Float32 = NDArray[np.float32]
log = logging.getLogger(__name__)

SWITCH = "TROL_EDGE_SELFTEST"  # environment variable: "0" turns the self-test at the first load off
ROPE = ("rope.cos", "rope.sin")
SMALL = 5  # layers of the small models' decoders, on which budgets were measured
UNRELATED = 1.0  # drift of zeros; values that have nothing to do with each other drift by 1.4
ALWAYS = {"preprocess": 5e-3, "rope": 1e-6, "tokens": 0.0}  # budgets that no precision changes


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most drift that one precision may cause."""

    embedding: float
    vision: float
    keys: float
    values: float
    logits: float


# From the loosest to the tightest. Measured on both small models, lowered for a CPU and for a GPU (there on a stand-in
# that computes on a CPU): CONTRIBUTING.md has the figures and the margins. fp16 also serves fp32 on a GPU, where
# TensorRT multiplies in TF32, of as many bits. Behind more layers than theirs a budget grows, see `_behind`.
BUDGETS = {
    "int4": Budget(embedding=1e-3, vision=0.1, keys=0.4, values=0.8, logits=0.3),
    "int8": Budget(embedding=1e-3, vision=0.05, keys=0.25, values=0.8, logits=0.3),
    "fp8": Budget(embedding=1e-3, vision=0.1, keys=0.2, values=0.5, logits=0.2),
    "fp16": Budget(embedding=1e-3, vision=1e-2, keys=1e-2, values=1e-2, logits=1e-2),
    "fp32": Budget(embedding=1e-6, vision=5e-5, keys=5e-5, values=5e-5, logits=5e-5),
}
HINTS = {
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
            if not re.fullmatch(r"(long\.)?(preprocess|rope|embedding|tokens|engines)", stage.name)
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


def verify(folder: str | os.PathLike[str], threads: int | None = None) -> Report:
    """Load a bundle and replay its self-test; what passes is noted for later loads, see `first_load`.

    threads: as Runtime takes it. Raises BundleError for a bundle that is damaged or has no self-test, and BackendError
    where its target does not run here. Engines that do not serve here (stale ones) are a stage that fails.
    """
    from trol_edge.runtime import Runtime  # it imports this file

    bundle = Bundle(folder)
    test = read(bundle)
    try:
        runtime = Runtime(folder, threads=threads, selftest=False)
    except BundleError as error:
        if bundle.manifest.target == "cpu":
            raise
        return _report(bundle, "nothing: no engine was loaded", [Stage("engines", math.inf, 0.0, str(error))], 0.0)
    with runtime:
        report = _replay(bundle, runtime._backend, runtime._embeddings, test)
        if report.first_wrong is None:
            _Record(bundle, runtime._backend).write()
        return report


def first_load(bundle: Bundle, backend: Backend, embeddings: Embeddings) -> None:
    """Replay the self-test if this bundle has not passed it on this machine before; later loads look for a file.

    Where nothing can be noted it is left out, because it would slow every load. Raises VerifyError where a stage is out
    of its budget; but where weights are rounded and that may be all, it is a warning at every load.
    """
    if SELFTEST not in bundle.manifest.files:
        return
    record = _Record(bundle, backend)
    if record.exists:
        return
    if record.writable is None:
        log.warning(
            "%s: the self-test was left out, because its result could not be kept: neither the bundle's folder nor %s "
            "can be written; run `trol-edge verify` once",
            *record.places,
        )
        return
    report = _replay(bundle, backend, embeddings, read(bundle))
    if report.first_wrong is None:
        record.write()
        return
    text = f"{bundle.folder}: {report.verdict}. `trol-edge verify` shows all stages; "
    turn_off = f"Runtime(..., selftest=False), or {SWITCH}=0 in the environment"
    if not (bundle.manifest.plan.quantized and report.could_be_rounding):
        raise VerifyError(f"{text}to load it nevertheless: {turn_off}")
    log.warning("%sif `trol-edge compare` finds the answers good enough: %s", text, turn_off)


def wanted(selftest: bool | None) -> bool:
    """Whether a first load replays the self-test: as the caller says, or else the environment."""
    return os.environ.get(SWITCH, "1") != "0" if selftest is None else selftest


def passed_here(bundle: Bundle) -> list[str]:
    """What has passed this bundle's self-test on this machine: "onnxruntime 1.32.0", ..."""
    here, found = machine.read().fingerprint, set()
    for path in (path for place in _places(bundle) for path in place.glob(VERIFIED)):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(data, dict) and (data.get("bundle"), data.get("machine")) == (bundle.identity, here):
            found.add(str(data.get("runs_on")))
    return sorted(found)


def _places(bundle: Bundle) -> list[Path]:
    """Folders for records, the best first."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [bundle.folder, Path(cache) / "trol-edge"]


class _Record:
    """The file that says that a bundle passed here. One file per key, renamed into place: processes do not collide."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.places = _places(bundle)
        self._key = {
            "bundle": bundle.identity,
            "target": bundle.manifest.target,
            "runs_on": backend.identity,
            "trol_edge": __version__,
            "machine": machine.read().fingerprint,
        }
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self._name = VERIFIED.replace("*", digest[:20])

    @property
    def exists(self) -> bool:
        return any((place / self._name).is_file() for place in self.places)

    @property
    def writable(self) -> Path | None:
        """The first folder that can be written."""
        for place in self.places:
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if os.access(place, os.W_OK | os.X_OK):
                return place
        return None

    def write(self) -> None:
        place = self.writable
        if place is None:
            return
        part = place / f".{self._name}.{os.getpid()}.part"
        try:
            part.write_text(json.dumps(self._key, indent=1) + "\n", encoding="utf-8")
            part.replace(place / self._name)
        except OSError as error:
            log.warning("%s: the passed self-test could not be noted (%s)", place, error)
            part.unlink(missing_ok=True)


# -- the replay --------------------------------------------------------------------------------------------------------


def _report(bundle: Bundle, runs_on: str, stages: Sequence[Stage], seconds: float) -> Report:
    here = machine.read()
    return Report(
        bundle=os.fspath(bundle.folder),
        target=bundle.manifest.target,
        precision=bundle.manifest.plan.recipe,
        runs_on=runs_on,
        machine=", ".join(text for text in (here.model, here.cpu, here.system) if text),
        stages=tuple(stages),
        seconds=seconds,
    )


def _replay(bundle: Bundle, backend: Backend, embeddings: Embeddings, test: SelfTest) -> Report:
    start = time.perf_counter()
    stages = list(_stages(bundle, backend, embeddings, test))
    return _report(bundle, backend.identity, stages, time.perf_counter() - start)


def _stages(bundle: Bundle, backend: Backend, embeddings: Embeddings, test: SelfTest) -> Iterator[Stage]:
    manifest = bundle.manifest
    pixels = preprocess([test.picture], manifest.image)
    noted = pixels[:, :, test.pixel_rows][..., test.pixel_rows]
    yield _stage("preprocess", noted, test.pixels, ALWAYS["preprocess"])
    file = bundle.weights()
    tables = np.stack([to_float32(file.rows(name)[test.rope_rows], file.tensors[name].dtype) for name in ROPE])
    yield _stage("rope", tables, test.rope, ALWAYS["rope"])
    features = np.asarray(backend.encode_image(pixels)).reshape(-1, manifest.spec.hidden_size)[test.feature_rows]
    allowed = _behind(manifest.spec.vision.num_layers, _budget(manifest, "vision.").vision)
    yield _stage("vision", features, test.features, allowed)
    budget = _budget(manifest, "")
    forced = test.cases["picture"].forced
    yield _stage("embedding", embeddings[forced], test.embeddings, budget.embedding)
    for name, case in test.cases.items():
        for stage in _case_stages(bundle, backend, embeddings, features, case, name == "long", budget):
            yield stage if name == "picture" else dataclasses.replace(stage, name=f"{name}.{stage.name}")


def _case_stages(
    bundle: Bundle,
    backend: Backend,
    embeddings: Embeddings,
    features: Float32,
    case: Case,
    long_rope: bool,
    budget: Budget,
) -> Iterator[Stage]:
    spec, state, length = bundle.manifest.spec, backend.new_state(), len(case.ids)
    rows, mask = embeddings[case.ids], case.ids == spec.image_token_id
    rows[mask] = features[: int(mask.sum())]
    # In two parts where a prefix can be kept: the second one attends to the rows of both sets, and has no image tokens.
    split = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else length // 2
    for part in (slice(0, split), slice(split, length)) if backend.prefix_reuse else (slice(0, length),):
        pictured = mask[part] if mask[part].any() else None
        logits = [state.traverse(rows[part], pictured, long_rope, part.start).copy()]
    sets = [state.rows(case.positions, which) for which in (FIRST, SECOND)]
    for layer in range(spec.num_layers):
        for which, cached in enumerate(sets):
            for kind, name in enumerate(("keys", "values")):
                if cached:  # the second set is not kept everywhere
                    here, reference = cached[2 * layer + kind], case.cache[which, layer, kind]
                    allowed = _behind(layer + 1, (budget.keys, budget.values)[kind])
                    yield _stage(f"traverse.layers.{layer}.pass{which + 1}.{name}", here, reference, allowed)
    allowed_logits = _behind(spec.num_layers, budget.logits)
    yield _stage("traverse.logits", _centred(logits[0]), _centred(case.logits[0]), allowed_logits)
    for i, token in enumerate(case.forced):
        logits.append(state.step(embeddings[int(token)], length + i).copy())
    cached = state.rows(np.array([length + len(case.forced) - 1], np.int32), FIRST)
    for layer in range(spec.num_layers):
        for kind, name in enumerate(("keys", "values")):
            here, reference = cached[2 * layer + kind], case.step_cache[layer, kind][None]
            allowed = _behind(layer + 1, (budget.keys, budget.values)[kind])
            yield _stage(f"step.layers.{layer}.{name}", here, reference, allowed)
    yield _stage("step.logits", _centred(logits[-1]), _centred(case.logits[1]), allowed_logits)
    yield _tokens(logits, case, allowed_logits)


def _tokens(logits: Sequence[Float32], case: Case, allowed: float) -> Stage:
    """Most probable tokens: those that differ although the reference was sure beyond what logits may move."""
    noise = 4 * allowed * float(np.sqrt(np.mean(np.square(_centred(case.logits)))))
    best = np.array([int(np.nan_to_num(x, nan=-math.inf).argmax()) for x in logits])
    different = best != case.best
    wrong = different & (case.margin > noise)
    text = f"{len(best) - int(different.sum())} of {len(best)} the same"
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        text += f"; place {at}: {best[at]} instead of {case.best[at]}, which was ahead by {case.margin[at]:.2f}"
    return Stage("tokens", float(wrong.sum()), ALWAYS["tokens"], text)


def _stage(name: str, here: NDArray[Any], reference: NDArray[Any], budget: float) -> Stage:
    if here.shape != reference.shape:
        return Stage(name, math.inf, budget, f"shape {list(here.shape)} instead of {list(reference.shape)}")
    bad = int((~np.isfinite(here)).sum())
    if bad:
        return Stage(name, math.inf, budget, f"{bad} of {here.size} values are NaN or infinite (FP16 ends at 65504)")
    return Stage(name, drift(here, reference), budget)


def drift(here: NDArray[Any], reference: NDArray[Any]) -> float:
    """|here - reference| / |reference|, Euclidean norms over all values."""
    error, size = (
        float(np.square(x.astype(np.float64)).sum()) for x in (here.astype(np.float64) - reference, reference)
    )
    return math.sqrt(error / max(size, float(np.finfo(np.float32).tiny)))


def _centred(logits: Float32) -> Float32:
    """Logits less their mean, which no probability depends on."""
    return logits - logits.mean(-1, keepdims=True)


def _behind(layers: int, budget: float) -> float:
    """A budget behind so many layers: the errors of layers are independent, so their sum grows as a square root.

    Never as much as values drift that have nothing to do with the reference's.
    """
    return min(budget * math.sqrt(max(1.0, layers / SMALL)), max(budget, 0.9 * UNRELATED))


def _budget(manifest: Manifest, prefix: str) -> Budget:
    """Of the loosest precision among the Linears whose names begin so, or of what the rest computes in."""
    plan = manifest.plan
    used = {linear.precision for name, linear in plan.linears.items() if name.startswith(prefix)} | {plan.compute}
    used |= {"fp16"} if manifest.target != "cpu" else set()
    return BUDGETS[next(precision for precision in BUDGETS if precision in used)]
