"""Replays a bundle's self-test here, on its own target and precision, and compares each stage with the record.

Stages run in the order of computation, each on the output of the one before. So the first one above its budget is where
the fault is, and later ones are wrong because of it. Drift is |here - reference| / |reference|, with Euclidean norms
over all values of a stage (for logits after subtracting their mean). It is not computed token by token, because a token
that attention uses as a sink has values near zero, of which any rounding is a large part.

    tokenizer                          bytes of every token, and ids of fixed texts (trol_edge.prompt.probe)
    prompt                             ids of fixed questions with the prompt template, and the ids that end an answer
    preprocess                         pixels of the picture
    rope                               the tables in the weights file, at 32 positions up to the end of the context
    arithmetic.<graph>...              what each Linear reads, with its input forced (trol_edge.verify.forced)
    stored.<place>                     signed sums of the weights file
    vision                             features of the picture
    embedding                          rows of the table
    traverse.layers.<i>.pass<1|2>.keys, .values, then traverse.logits
    step.layers.<i>.keys, .values, then step.logits, of the last of several steps
    tokens                             the most probable token after the prompt and after each stepped token
    long.traverse...                   all of it with the long rope factors, if there are two sets

A Runtime does this once per machine (`first_load`) and leaves a file `verified-<key>.json` in the bundle's folder, or
in the user's cache folder if that cannot be written. The key is a hash over the bundle, the machine and the library
that runs it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from trol_edge.backend import FIRST, SECOND
from trol_edge.bundle import probes
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import SELFTEST, TOKENIZER
from trol_edge.bundle.precision import part_of
from trol_edge.bundle.selftest import SelfTest, SelfTestCase, read
from trol_edge.bundle.signature import PublicKey
from trol_edge.bundle.weights import to_float32
from trol_edge.errors import BundleError, VerifyError
from trol_edge.machine import identity
from trol_edge.model import Model, Provider
from trol_edge.prompt import probe
from trol_edge.prompt.images import preprocess
from trol_edge.rope import TABLES
from trol_edge.verify.forced import forced_stages
from trol_edge.verify.passed import SWITCH, Record
from trol_edge.verify.report import ALWAYS, OLDER, SATURATES, Budget, Report, Stage, budget_of, compared

Float32 = NDArray[np.float32]
log = logging.getLogger(__name__)


def verify(
    folder: str | os.PathLike[str],
    threads: int | None = None,
    provider: Provider | None = None,
    trusted_keys: Sequence[PublicKey] | None = None,
) -> Report:
    """Load a bundle and replay its self-test; a pass is recorded for later loads, see `first_load`.

    threads, provider and trusted_keys are what Runtime takes. Raises BundleError for a bundle that is damaged or has no
    self-test, and BackendError if its target does not run here. Engines that cannot be used here (stale ones) make a
    stage fail.
    """
    bundle = Bundle(folder, trusted_keys)
    test = read(bundle)
    try:
        model = Model(folder, threads=threads, provider=provider, trusted_keys=trusted_keys)
    except BundleError as error:
        if bundle.manifest.target == "cpu" or provider is not None:
            raise
        return _report(bundle, "nothing: no engine was loaded", [Stage("engines", math.inf, 0.0, str(error))], 0.0)
    with model:
        report = replay(model, test)
        if report.first_wrong is None:
            Record(bundle, model.backend.identity).write()
        return report


def first_load(model: Model) -> None:
    """Replay the self-test if this bundle has not passed it on this machine before; later loads find its record.

    It is skipped if no record can be written, because it would slow every load. Raises VerifyError if a stage is above
    its budget. If the weights are rounded and rounding may explain the drift, every load logs a warning instead.
    """
    bundle = model.bundle
    if SELFTEST not in bundle.manifest.files:
        return
    record = Record(bundle, model.backend.identity)
    if record.exists:
        return
    if record.writable is None:
        log.warning(
            "%s: the self-test was skipped, because its result could not be recorded; neither the bundle's folder nor "
            "%s can be written; run `trol-edge verify` once",
            *record.places,
        )
        return
    report = replay(model, read(bundle))
    if report.first_wrong is None:
        record.write()
        return
    text = f"{bundle.folder}: {report.verdict}. `trol-edge verify` shows all stages; "
    turn_off = f"Runtime(..., selftest=False), or {SWITCH}=0 in the environment"
    plan = bundle.manifest.plan
    if not ((plan.quantized or plan.kv) and report.could_be_rounding):
        raise VerifyError(f"{text}to load it anyway, use {turn_off}")
    log.warning("%sif `trol-edge compare` finds the answers good enough, use %s", text, turn_off)


# -- the replay --------------------------------------------------------------------------------------------------------


def _report(bundle: Bundle, runs_on: str, stages: Sequence[Stage], seconds: float, notes: Sequence[str] = ()) -> Report:
    here = identity.read()
    return Report(
        bundle=os.fspath(bundle.folder),
        target=bundle.manifest.target,
        precision=bundle.manifest.plan.recipe,
        runs_on=runs_on,
        machine=", ".join(text for text in (here.model, here.cpu, here.system) if text),
        stages=tuple(stages),
        seconds=seconds,
        notes=tuple(notes),
        passes=bundle.manifest.passes,
    )


def replay(model: Model, test: SelfTest) -> Report:
    """Replay a self-test on a model and compare its stages."""
    start = time.perf_counter()
    stages = list(stages_of(model, test))
    notes = [OLDER] if test.stored is None else []
    if model.bundle.manifest.plan.quantized and model.backend.saturates:
        notes.append(SATURATES)
    return _report(model.bundle, model.backend.identity, stages, time.perf_counter() - start, notes)


def stages_of(model: Model, test: SelfTest) -> Iterator[Stage]:
    """Compute the stages one after the other, so that a caller may stop at the first wrong one."""
    bundle, backend, embeddings = model.bundle, model.backend, model.embeddings
    manifest = bundle.manifest
    yield from _text_stages(model, test)
    pixels = preprocess([test.picture], manifest.image)
    noted = pixels[:, :, test.pixel_rows][..., test.pixel_rows]
    yield compared("preprocess", noted, test.pixels, ALWAYS["preprocess"])
    file = bundle.weights()
    stored = file.load((), stored=TABLES)
    tables = np.stack([to_float32(stored[name][test.rope_rows], file.tensors[name].dtype) for name in TABLES])
    yield compared("rope", tables, test.rope, ALWAYS["rope"])
    yield from forced_stages(model, test, pixels[:1])
    yield from _stored_stages(bundle, test)
    features = np.asarray(backend.encode_image(pixels)).reshape(-1, manifest.spec.hidden_size)[test.feature_rows]
    allowed = budget_of(manifest, "vision.").at("vision", manifest.spec.vision.num_layers)
    yield compared("vision", features, test.features, allowed)
    budget = budget_of(manifest, "")
    forced = test.cases["picture"].forced
    yield compared("embedding", embeddings[forced], test.embeddings, budget.embedding)
    for name, case in test.cases.items():
        for stage in _case_stages(model, features, case, name == "long", budget):
            yield stage if name == "picture" else dataclasses.replace(stage, name=f"{name}.{stage.name}")


def _case_stages(
    model: Model, features: Float32, case: SelfTestCase, long_rope: bool, budget: Budget
) -> Iterator[Stage]:
    backend, embeddings = model.backend, model.embeddings
    spec, state, length = model.bundle.manifest.spec, backend.new_state(), len(case.ids)
    rows, mask = embeddings[case.ids], case.ids == spec.image_token_id
    rows[mask] = features[: int(mask.sum())]
    # If a prefix can be kept, prefill in two parts; the second has no image tokens and attends to rows of both sets.
    split = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else length // 2
    for part in (slice(0, split), slice(split, length)) if backend.prefix_reuse else (slice(0, length),):
        pictured = mask[part] if mask[part].any() else None
        logits = [state.traverse(rows[part], pictured, long_rope, part.start).copy()]
    sets = [state.rows(case.positions, which) for which in (FIRST, SECOND)]
    for layer in range(spec.num_layers):
        for which, (cached, layers) in enumerate(zip(sets, spec.cached_layers, strict=True)):
            if not cached or layer not in layers:  # not every back end keeps the second set, nor has every layer one
                continue
            for kind, name in enumerate(("keys", "values")):
                here, reference = cached[2 * layers.index(layer) + kind], case.cache[which, layer, kind]
                allowed = budget.at(name, layer + 1)
                yield compared(f"traverse.layers.{layer}.pass{which + 1}.{name}", here, reference, allowed)
    allowed_logits = budget.at("logits", spec.num_layers)
    yield compared("traverse.logits", probes.centred(logits[0]), probes.centred(case.logits[0]), allowed_logits)
    for i, token in enumerate(case.forced):
        logits.append(state.step(embeddings[int(token)], length + i).copy())
    cached = state.rows(np.array([length + len(case.forced) - 1], np.int32), FIRST)
    for layer in range(spec.num_layers):
        for kind, name in enumerate(("keys", "values")):
            here, reference = cached[2 * layer + kind], case.step_cache[layer, kind][None]
            allowed = budget.at(name, layer + 1)
            yield compared(f"step.layers.{layer}.{name}", here, reference, allowed)
    yield compared("step.logits", probes.centred(logits[-1]), probes.centred(case.logits[1]), allowed_logits)
    yield _tokens(logits, case, allowed_logits)


def _stored_stages(bundle: Bundle, test: SelfTest) -> Iterator[Stage]:
    """Compare signed sums of all numbers in the weights file: for what the made-up inputs do not reach."""
    if test.stored is None:
        return
    file = bundle.weights()
    names = sorted(file.tensors)
    wanted = test.stored.view(np.float64)
    if len(wanted) != len(names):
        yield Stage("stored", math.inf, ALWAYS["stored"], f"{len(names)} tensors instead of {len(wanted)}")
        return
    sums = probes.stored_sums(file, names)
    parts: dict[str, tuple[float, str]] = {}
    for name, reference in zip(names, wanted, strict=True):
        off = float(np.abs(sums[name] - reference).max()) / max(float(reference[-1]), 1e-30)
        part = f"stored.{_place(name)}"
        parts[part] = max(parts.get(part, (0.0, "")), (off if math.isfinite(off) else math.inf, name))
    for part in sorted(parts):
        off, name = parts[part]
        yield Stage(part, off, ALWAYS["stored"], name if off > ALWAYS["stored"] else "")


def _place(tensor: str) -> str:
    """The part of the model that a stored tensor belongs to, or its layer."""
    layer = re.match(r"(?:decoder\.)?((?:vision\.)?layers\.\d+)\.", tensor)
    if layer:
        return layer[1]
    if tensor.startswith("decoder.gate"):
        return "gate"
    return "rope" if tensor.startswith("rope.") else part_of(tensor).replace(" ", "_")


def _text_stages(model: Model, test: SelfTest) -> Iterator[Stage]:
    """Compare tokenizer and template, if they were recorded, by a count of differences."""
    if test.token_digests is None or test.prompt_ids is None or test.prompt_lengths is None or test.end_ids is None:
        return
    if model.tokenizer is None:
        yield Stage("tokenizer", math.inf, ALWAYS["tokenizer"], "the bundle has none, but had one when it was exported")
        return
    manifest = model.bundle.manifest
    text = model.bundle.text(TOKENIZER)
    here = probe.token_digests(model.tokenizer, text, manifest.spec.vocab_size)
    if here.shape != test.token_digests.shape:
        yield compared("tokenizer", here, test.token_digests, ALWAYS["tokenizer"])
    else:
        (different,) = np.nonzero((here != test.token_digests).any(axis=1))
        firsts = [probe.BLOCK * (i - probe.BEFORE) for i in different.tolist() if i >= probe.BEFORE]
        said = ["the file says something else"] if 0 in different else []
        said += ["texts have other ids"] if 1 in different else []
        said += [f"so have tokens {first}..{first + probe.BLOCK - 1}, or other bytes" for first in firsts[:1]]
        yield Stage("tokenizer", float(len(different)), ALWAYS["tokenizer"], "; ".join(said))
    found = probe.prompt_ids(model.tokenizer, manifest.prompt)
    lengths, ends, wrong = np.array([len(ids) for ids in found], np.int32), sorted(model.ends), []
    if not np.array_equal(lengths, test.prompt_lengths):
        wrong.append(f"questions have {lengths.tolist()} tokens instead of {test.prompt_lengths.tolist()}")
    elif not np.array_equal(np.concatenate(found), test.prompt_ids):
        wrong.append("questions have other ids")
    if not np.array_equal(ends, test.end_ids):
        wrong.append(f"answers end at {ends} instead of {test.end_ids.tolist()}")
    yield Stage("prompt", float(len(wrong)), ALWAYS["prompt"], "; ".join(wrong))


def _tokens(logits: Sequence[Float32], case: SelfTestCase, allowed: float) -> Stage:
    """Compare most probable tokens. One that differs counts only if the reference led by more than logits may move."""
    noise = 4 * allowed * float(np.sqrt(np.mean(np.square(probes.centred(case.logits)))))
    best = np.array([int(np.nan_to_num(x, nan=-math.inf).argmax()) for x in logits])
    different = best != case.best
    wrong = different & (case.margin > noise)
    text = f"{len(best) - int(different.sum())} of {len(best)} the same"
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        text += f"; place {at}: {best[at]} instead of {case.best[at]}, which was ahead by {case.margin[at]:.2f}"
    return Stage("tokens", float(wrong.sum()), ALWAYS["tokens"], text)
