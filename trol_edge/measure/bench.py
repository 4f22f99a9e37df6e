"""Measures one bundle in this process: it makes answers and reads a clock between their stages."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering.asking import Question, ask, look, prefill
from trol_edge.answering.options import Options
from trol_edge.answering.results import Clock
from trol_edge.answering.sampling import Sampler
from trol_edge.answering.turns import Call
from trol_edge.bundle.folder import sha256_of
from trol_edge.bundle.graph_sizes import PREFILL_CHUNK
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import MANIFEST
from trol_edge.bundle.sizes import cache_bytes
from trol_edge.bundle.targets import TARGETS, is_gpu
from trol_edge.errors import ContextError, UsageError
from trol_edge.machine import sensors
from trol_edge.machine.identity import reset_peak_memory
from trol_edge.measure.process import Job, Progress, errors_as_json, print_json, sampled, told_job
from trol_edge.measure.record import (
    BundleId,
    BundleProfile,
    Case,
    Run,
    TimedAnswer,
    Work,
)
from trol_edge.prompt.images import load_rgb
from trol_edge.prompt.tokenizer import TextStream
from trol_edge.runtime import Runtime
from trol_edge.session import Session

Picture = NDArray[np.uint8]  # [H, W, 3]
QUESTIONS = ("Describe the scene.", "How many objects are there?")
IDLE_S = 1.0  # rest before a bundle is loaded, to see what the idle machine draws
SMALLEST_TEXT = 16  # shortest question of random ids, in tokens


def measure_job(began: float) -> None:
    """Entry point of a process: read the job from standard input, print progress and then a BundleProfile."""
    with errors_as_json():
        job = told_job()
        print_json(dataclasses.asdict(measure(job, lambda line: print_json({"progress": line}))))


def opened(job: Job) -> Runtime:
    """Open the Runtime that a job describes."""
    return Runtime(
        job.bundle,
        threads=job.threads,
        provider=cast(Any, job.provider),
        trusted_keys=job.trusted_keys or None,
    )


def measure(job: Job, progress: Progress = lambda line: None) -> BundleProfile:
    """Measure one bundle in this process, without its starts. Raises the errors that `profile` raises."""
    with sampled(job.root, job.interval_s) as rows:
        zero = time.monotonic()
        time.sleep(IDLE_S)
        idle = 0.0, time.monotonic() - zero
        progress("load")
        with opened(job) as runtime:
            load = idle[1], time.monotonic() - zero
            bench = Bench(runtime, job.tokens, zero)
            pictures: list[tuple[tuple[int, int] | None, Picture | None]]
            if job.image is not None:
                shown = load_rgb(job.image)
                pictures = [((shown.shape[1], shown.shape[0]), shown)]
            else:
                pictures = [(size, None if size is None else made_up(*size)) for size in job.sizes]
            cases = [(size, picture, length) for size, picture in pictures for length in job.prompt_tokens]
            runs = []
            for size, picture, length in cases:
                where = "no picture" if size is None else f"{size[0]}x{size[1]}"
                progress(f"{where}, {'short question' if length is None else f'{length} tokens'}")
                runs.append(bench.run(size, picture, length, job.warmup, job.runs))
            identity = bundle_id(runtime.bundle)
            library = runtime.model.backend.identity if job.provider else _library(runtime.bundle.manifest.target)
    names = list(dict.fromkeys(name for row in rows for name in row))
    samples = {name: tuple(row.get(name) for row in rows) for name in names}
    samples["t_s"] = tuple(None if t is None else t - zero for t in samples["t_s"])
    total = sensors.Sensors(job.root).total_power()
    return BundleProfile(
        bundle=identity,
        library=library,
        load_s=load,
        idle_s=idle,
        starts=(),
        runs=tuple(runs),
        samples=samples,
        total_power=total,
    )


def bundle_id(bundle: Bundle) -> BundleId:
    """What identifies a bundle in a profile."""
    manifest = bundle.manifest
    return BundleId(
        folder=os.fspath(bundle.folder),
        model=manifest.model,
        target=manifest.target,
        precision=manifest.plan.recipe,
        context=manifest.context,
        bytes=sum(info.bytes for info in manifest.files.values()),
        manifest_sha256=sha256_of(bundle.folder / MANIFEST),
        created_by=manifest.created_by,
        traversed=manifest.spec.traversed,
        kv=manifest.plan.kv,
        cache_bytes=cache_bytes(manifest.graphs["traverse"].inputs, manifest.context),
    )


def _library(target: str) -> str:
    name = TARGETS[target].module if is_gpu(target) else "onnxruntime"
    for distribution in (name, name.replace("_", "-")):
        try:
            return f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    return name


def made_up(width: int, height: int) -> Picture:
    """A picture of smooth colours that depends on the size only; uint8 [H, W, 3]."""
    if not (1 <= width <= 10000 and 1 <= height <= 8900):
        raise UsageError(f"a picture of {width}x{height} is not measured; give sizes from 1x1 to 10000x8900")
    x, y = np.arange(width)[None, :] * 255 // width, np.arange(height)[:, None] * 255 // height
    return np.stack(np.broadcast_arrays(x, y, x ^ y), axis=2).astype(np.uint8)


class Bench:
    """Makes answers on one Runtime and times their stages."""

    def __init__(self, runtime: Runtime, tokens: int, zero: float) -> None:
        self._runtime, self._tokens, self._zero = runtime, tokens, zero
        self._has_text = runtime.model.tokenizer is not None
        self._session = runtime.session()
        self._rng = np.random.default_rng(0)

    def run(
        self, size: tuple[int, int] | None, picture: Picture | None, length: int | None, warmup: int, runs: int
    ) -> Run:
        """Measure one case: `warmup` unmeasured pairs of a first and a second question, then `runs` measured ones."""
        prompts = self.prompts(picture, length)
        with self._session:
            reset_peak_memory()
            for_warmth = [self._pair(prompts, picture)[0] for _ in range(warmup)]
            start = time.monotonic() - self._zero
            pairs = [self._pair(prompts, picture) for _ in range(runs)]
            end = time.monotonic() - self._zero
        peak = sensors.Sensors().process(os.getpid())["peak_rss_bytes"]
        self._session = self._runtime.session()
        question = self._question(prompts[0], picture, self._runtime.desk.call(Options()))
        image = question.ids.count(self._runtime.bundle.manifest.spec.image_token_id)
        return Run(
            case=Case(size, len(question.ids), image, self._tokens),
            start_s=start,
            end_s=end,
            warmup=tuple(for_warmth),
            answers=tuple(first for first, _ in pairs),
            second=tuple(second for _, second in pairs),
            peak_rss_bytes=peak,
            work=work(self._runtime.bundle, question.ids, self._tokens),
        )

    def _pair(self, prompts: Sequence[Any], picture: Picture | None) -> tuple[TimedAnswer, TimedAnswer]:
        self._runtime.desk.vision_cache.clear()
        self._session.truncate(0)
        return self.answer(prompts[0], picture), self.answer(prompts[1], picture)

    def answer(self, prompt: Any, picture: Picture | None) -> TimedAnswer:
        """Make one answer and time its stages."""
        now, runtime, session = time.monotonic, self._runtime, self._session
        options, clock = Options(max_new_tokens=self._tokens), Clock()
        sampler = Sampler(options.sampling)
        steps, samples, texts = [], [], []
        start = now()
        call = runtime.desk.call(options)
        question = self._question(prompt, picture, call)
        looked = now()
        logits = prefill(runtime.desk, session, question, options, call, clock)
        text = TextStream(runtime.model.text) if self._has_text else None
        ids, first = list(question.ids), 0.0
        self._check_room(session)
        for i in range(self._tokens):
            since = now()
            token = sampler.sample(logits, ids)
            chosen = now()
            ids.append(token)
            if text is not None:
                text.push(token)
            written = now()
            samples.append(1e3 * (chosen - since))
            texts.append(1e3 * (written - chosen))
            first = first or written
            if i < self._tokens - 1:
                logits = session.step_view(token)
                steps.append(1e3 * (now() - written))
        end = now()
        return TimedAnswer(
            start_s=start - self._zero,
            preprocess_ms=1e3 * (looked - start),
            vision_ms=clock.vision_ms,
            prefill_ms=clock.prefill_ms,
            first_token_ms=1e3 * (first - start),
            total_ms=1e3 * (end - start),
            step_ms=tuple(steps),
            sample_ms=tuple(samples),
            detokenise_ms=tuple(texts) if text is not None else (),
            reused_tokens=session.reused,
        )

    def _check_room(self, session: Session) -> None:
        if session.length + self._tokens - 1 > session.limit:
            raise ContextError(
                f"the prompt has {session.length} tokens and the answer {self._tokens}, there is room for "
                f"{session.limit}: give fewer --tokens or --prompt-tokens, or export with a larger --context"
            )

    # -- prompts: text, or random ids where the bundle has no tokenizer ------------------------------------------------

    def _question(self, prompt: Any, picture: Picture | None, call: Call) -> Question:
        seen = look(self._runtime.desk, picture, Options(), call)
        if isinstance(prompt, str):
            return ask(self._runtime.desk, prompt, seen, call)
        return Question(prompt, seen)

    def prompts(self, picture: Picture | None, length: int | None) -> tuple[Any, Any]:
        """Two questions with a common prefix, padded with words to at most `length` tokens."""
        manifest = self._runtime.bundle.manifest
        tiles = self._runtime.count_tiles(picture)
        if length is not None and length > manifest.context - self._tokens:
            raise ContextError(
                f"a prompt of {length} tokens and an answer of {self._tokens} do not fit the context of "
                f"{manifest.context}; give fewer --prompt-tokens, or export with a larger --context"
            )
        image = sum(tiles) * manifest.spec.vision.tokens_per_image
        if not self._has_text:
            count = image + SMALLEST_TEXT if length is None else length
            self._check_length(count, image + SMALLEST_TEXT)
            text = self._rng.integers(3, manifest.spec.vocab_size, count - image)
            text[text == manifest.spec.image_token_id] = 3
            first = [*text[:8].tolist(), *[manifest.spec.image_token_id] * image, *text[8:].tolist()]
            return first, [*first[:-4], *reversed(first[-4:])]

        def tokens(words: int) -> int:
            return len(self._runtime.tokenize("and " * words + QUESTIONS[0], tiles))

        words = 0
        if length is not None:
            self._check_length(length, tokens(0))
            low, high = 0, length  # tokens(low) <= length
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if tokens(middle) <= length else (low, middle - 1)
            words = low
        return "and " * words + QUESTIONS[0], "and " * words + QUESTIONS[1]

    def _check_length(self, length: int, least: int) -> None:
        if length < least:
            raise UsageError(
                f"a prompt of {length} tokens is too short: template, picture and question take {least}; "
                "give more --prompt-tokens, or --size none"
            )


def work(bundle: Bundle, ids: Sequence[int], tokens: int) -> dict[str, Work] | None:
    """Operations and bytes of a prompt's stages and of a step, from the bundle's counts; None if it has no counts."""
    manifest = bundle.manifest
    costs: dict[str, Any] = {name: getattr(graph, "costs", None) for name, graph in manifest.graphs.items()}
    if any(c is None for c in costs.values()):
        return None
    image_id, found = manifest.spec.image_token_id, dict[str, Work]()

    def add(stage: str, cost: Any) -> None:
        before = found.get(stage, Work(0, 0))
        moved = cost.weight_bytes + cost.activation_bytes + cost.cache_bytes
        found[stage] = Work(before.flops + float(cost.flops), before.bytes + float(moved))

    images = ids.count(image_id) // manifest.spec.vision.tokens_per_image
    if images:
        add("vision", costs["vision"].at(images=images))
    for first in range(0, len(ids), PREFILL_CHUNK):
        chunk = ids[first : first + PREFILL_CHUNK]
        graph = "traverse" if image_id in chunk or "traverse_text" not in costs else "traverse_text"
        add("prefill", costs[graph].at(tokens=len(chunk), slots=first + len(chunk)))
    # A step in the middle of the answer.
    add("step", costs["step"].at(slots=len(ids) + tokens // 2))
    return found
