"""Measuring for `trol-edge profile`: each bundle in a process of its own, the sampler in another, starts in fresh ones.

What is special about it:
- An answer goes through the calls that `Runtime.generate` makes (`_look`, `_question`, `_prefill`, `step_view`, the
  Sampler, the TextStream), with a clock between them; only the queue for the turn is left out.
- Every first question meets an empty vision cache and an empty session, every second one what the first left there.
- An answer has as many tokens as asked for: the model's own end is passed over, so that runs are comparable.
- All clocks are CLOCK_MONOTONIC, which processes share: so samples, stages and starts lie on one time axis.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import json
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import trol_edge
from trol_edge.answering.loop import Clock
from trol_edge.answering.options import Options
from trol_edge.answering.sampling import Sampler
from trol_edge.bundle.manifest import MANIFEST, Bundle, sha256_of
from trol_edge.bundle.spec import from_dict
from trol_edge.bundle.targets import TARGETS
from trol_edge.errors import BackendError, ContextError, TrolEdgeError, UsageError
from trol_edge.machine import sensors as jetson
from trol_edge.machine.devices import DEVICES
from trol_edge.machine.identity import read as identify
from trol_edge.measure.record import (
    SCHEMA,
    SCHEMA_VERSION,
    Answer,
    BundleId,
    BundleProfile,
    Case,
    Peaks,
    Profile,
    Run,
    Settings,
    Start,
    Work,
)
from trol_edge.prompt.images import load_rgb
from trol_edge.prompt.tokenizer import TextStream
from trol_edge.runtime import PREFILL_CHUNK, Question, Runtime
from trol_edge.session import Session

Progress = Callable[[str], None]  # one line about what is being done
Picture = NDArray[np.uint8]  # [H, W, 3]

QUESTIONS = ("Describe the scene.", "How many objects are there?")
SAMPLER_START_S = 30.0  # to wait for the sampler's first line at most
IDLE_S = 1.0  # of rest before a bundle is loaded: what the machine draws without us
SMALLEST_TEXT = 16  # tokens of a question that is made of random ids


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process that measures one bundle is told."""

    bundle: str
    sizes: tuple[tuple[int, int] | None, ...]  # width, height; None: no picture
    prompt_tokens: tuple[int | None, ...]  # None: the question as it is
    image: str | None  # a picture file, instead of the sizes
    tokens: int
    warmup: int
    runs: int
    threads: int | None
    interval_s: float
    root: str


def profile(
    bundles: Sequence[str | os.PathLike[str]],
    *,
    sizes: Sequence[tuple[int, int] | None] = ((640, 480),),
    prompt_tokens: Sequence[int | None] = (None,),
    image: str | os.PathLike[str] | None = None,
    tokens: int = 32,
    warmup: int = 2,
    runs: int = 10,
    starts: int = 3,
    threads: int | None = None,
    interval_s: float = 0.1,
    root: str | os.PathLike[str] = "/",
    progress: Progress = lambda line: None,
) -> Profile:
    """Measure every bundle in every case (sizes x prompt lengths).

    sizes: of made-up pictures, (width, height) in pixels, None for none; image: a picture file instead. prompt_tokens:
    of the whole prompt, None for a short question. tokens: of each answer. starts: fresh processes, for each of page
    cache cold and warm. interval_s: between two samples of the machine. root: where its proc and sys folders lie.
    Raises UsageError, ImageError, ContextError for bad arguments, BundleError and BackendError as Runtime does.
    """
    if not bundles:
        raise UsageError("no bundle to profile; give one or more bundle folders")
    bad = [n for n, v, least in (("tokens", tokens, 2), ("runs", runs, 1), ("warmup", warmup, 0), ("starts", starts, 0))
           if v < least]  # fmt: skip
    if bad or not 0.005 <= interval_s <= 10:
        raise UsageError(f"{', '.join(bad) or 'interval'}: too small (tokens >= 2, runs >= 1, interval 5 ms to 10 s)")
    opened = [Bundle(bundle) for bundle in bundles]
    if image is not None:
        load_rgb(os.fspath(image))
    machine = jetson.Machine(root)
    progress("what memory and processors can do at most")
    peaks = machine_peaks(machine, opened)
    found = []
    for bundle in opened:
        name = os.fspath(bundle.folder)
        progress(f"{name} ...")
        job = Job(
            bundle=name,
            sizes=tuple(sizes),
            prompt_tokens=tuple(prompt_tokens),
            image=None if image is None else os.fspath(image),
            tokens=tokens,
            warmup=warmup,
            runs=runs,
            threads=threads,
            interval_s=interval_s,
            root=os.fspath(root),
        )
        measured = from_dict(BundleProfile, _process("measure_job", job, progress), name)
        begun = []
        for i in range(starts):
            for cold in (True, False):
                progress(f"start {i + 1} of {starts}, page cache {'cold' if cold else 'warm'}")
                begun.append(start(job, cold))
        found.append(dataclasses.replace(measured, starts=tuple(begun)))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Profile(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        created=now,
        trol_edge=trol_edge.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        machine=dict(machine.identity()),
        missing=tuple(machine.missing()),
        settings=Settings(warmup, runs, threads, interval_s),
        peaks=peaks,
        bundles=tuple(found),
    )


# -- other processes ---------------------------------------------------------------------------------------------------


def _process(function: str, job: Job, progress: Progress = lambda line: None) -> Any:
    """Run a function of this module in a new interpreter, the job as JSON on its standard input; what it printed last.

    Lines before are progress. Raises the error of this package that it raised, or BackendError with the end of its
    standard error.
    """
    root = str(Path(trol_edge.__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    # The clock first: what importing takes is a part of a start.
    code = f"import time; began = time.monotonic(); from trol_edge.measure import run; run.{function}(began)"
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(dataclasses.asdict(job)))
            child.stdin.close()
            result: Any = None
            for line in child.stdout:
                told = json.loads(line)
                if "progress" in told:
                    progress(told["progress"])
                else:
                    result = told
        except (BrokenPipeError, ValueError):
            result = None
        finally:
            if result is None:
                child.terminate()
            status = child.wait()
            child.stdout.close()
        said.seek(0)
        last = said.read().strip().splitlines()[-1:] or [f"exit status {status}"]
    if result is None:
        raise BackendError(f"{job.bundle}: the process that measures it ended: {last[0]}")
    if "error" in result:
        kinds = {c.__name__: c for c in _family(TrolEdgeError)}
        error = kinds.get(result["error"], BackendError)(result["message"])
        raise error
    return result


def _family(root: type[TrolEdgeError]) -> Iterator[type[TrolEdgeError]]:
    yield root
    for child in root.__subclasses__():
        yield from _family(child)


def _told() -> Job:
    return from_dict(Job, json.load(sys.stdin), "job", UsageError)


@contextmanager
def _errors_as_json() -> Iterator[None]:
    try:
        yield
    except TrolEdgeError as error:
        _print({"error": type(error).__name__, "message": str(error)})


def _print(data: dict[str, Any]) -> None:
    print(json.dumps(data), flush=True)


@contextmanager
def _sampled(root: str, interval_s: float) -> Iterator[list[dict[str, float | None]]]:
    """Samples of the machine and this process, complete when the block is left. Taken by a process of its own.

    Raises BackendError where that process failed.
    """
    samples: list[dict[str, float | None]] = []
    command = [sys.executable, "-I", "-S", jetson.__file__, root, str(os.getpid()), str(interval_s)]
    with tempfile.TemporaryFile("w+") as file:
        sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file)
        assert sampler.stdin is not None
        # On a busy machine it may take longer to start than a short run lasts.
        latest = time.monotonic() + SAMPLER_START_S
        while sampler.poll() is None and not os.fstat(file.fileno()).st_size and time.monotonic() < latest:
            time.sleep(0.005)
        try:
            yield samples
        finally:
            sampler.stdin.close()
            status = sampler.wait()
        file.seek(0)
        samples += [json.loads(line) for line in file]
    if status or not samples:
        raise BackendError(f"the sampler of {root} ended by itself, exit status {status}; is there a /proc here?")


# -- one bundle --------------------------------------------------------------------------------------------------------


def measure_job(began: float) -> None:
    """As a process: the job on standard input, progress and a BundleProfile on standard output."""
    with _errors_as_json():
        job = _told()
        _print(dataclasses.asdict(measure(job, lambda line: _print({"progress": line}))))


def measure(job: Job, progress: Progress = lambda line: None) -> BundleProfile:
    """Measure one bundle in this process, without its starts. Errors as for `profile`."""
    with _sampled(job.root, job.interval_s) as rows:
        zero = time.monotonic()
        time.sleep(IDLE_S)
        idle = 0.0, time.monotonic() - zero
        progress("load")
        with Runtime(job.bundle, threads=job.threads) as runtime:
            load = idle[1], time.monotonic() - zero
            bench = _Bench(runtime, job.tokens, zero)
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
            identity, library = bundle_id(runtime.bundle), _library(runtime.bundle.manifest.target)
    names = list(dict.fromkeys(name for row in rows for name in row))
    samples = {name: tuple(row.get(name) for row in rows) for name in names}
    samples["t_s"] = tuple(None if t is None else t - zero for t in samples["t_s"])
    total = jetson.Machine(job.root).total_power()
    return BundleProfile(identity, library, load, idle, (), tuple(runs), samples, total)


def bundle_id(bundle: Bundle) -> BundleId:
    """Which bundle it is."""
    manifest = bundle.manifest
    return BundleId(
        os.fspath(bundle.folder),
        manifest.model,
        manifest.target,
        manifest.plan.recipe,
        manifest.context,
        sum(info.bytes for info in manifest.files.values()),
        sha256_of(bundle.folder / MANIFEST),
        manifest.created_by,
    )


def _library(target: str) -> str:
    name = "onnxruntime" if target not in TARGETS or not TARGETS[target].gpu else TARGETS[target].module
    for distribution in (name, name.replace("_", "-")):
        try:
            return f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    return name


def made_up(width: int, height: int) -> Picture:
    """A picture of smooth colours, always the same; uint8 [H, W, 3]."""
    if not (1 <= width <= 10000 and 1 <= height <= 8900):
        raise UsageError(f"a picture of {width}x{height} is not measured; give sizes from 1x1 to 10000x8900")
    x, y = np.arange(width)[None, :] * 255 // width, np.arange(height)[:, None] * 255 // height
    return np.stack(np.broadcast_arrays(x, y, x ^ y), axis=2).astype(np.uint8)


class _Bench:
    """Answers on one Runtime, with a clock between the stages."""

    def __init__(self, runtime: Runtime, tokens: int, zero: float) -> None:
        self._runtime, self._tokens, self._zero = runtime, tokens, zero
        self._has_text = runtime._tokenizer is not None
        self._session = runtime.session()
        self._rng = np.random.default_rng(0)

    def run(
        self, size: tuple[int, int] | None, picture: Picture | None, length: int | None, warmup: int, runs: int
    ) -> Run:
        """One case: warm-up, then so many pairs of a first and a second question."""
        prompts = self._prompts(picture, length)
        with self._session:
            _reset_peak()
            for_warmth = [self._pair(prompts, picture)[0] for _ in range(warmup)]
            start = time.monotonic() - self._zero
            pairs = [self._pair(prompts, picture) for _ in range(runs)]
            end = time.monotonic() - self._zero
        peak = jetson.Machine()._process(os.getpid())["peak_rss_bytes"]
        self._session = self._runtime.session()
        question = self._question(prompts[0], picture)
        image = question.ids.count(self._runtime.bundle.manifest.spec.image_token_id)
        return Run(
            Case(size, len(question.ids), image, self._tokens),
            start,
            end,
            tuple(for_warmth),
            tuple(first for first, _ in pairs),
            tuple(second for _, second in pairs),
            peak,
            work(self._runtime.bundle, question.ids, self._tokens),
        )

    def _pair(self, prompts: Sequence[Any], picture: Picture | None) -> tuple[Answer, Answer]:
        self._runtime._vision_cache.clear()
        self._session.truncate(0)
        return self._answer(prompts[0], picture), self._answer(prompts[1], picture)

    def _answer(self, prompt: Any, picture: Picture | None) -> Answer:
        now, runtime, session = time.monotonic, self._runtime, self._session
        options, clock = Options(max_new_tokens=self._tokens), Clock()
        sampler = Sampler(options.sampling)
        steps, samples, texts = [], [], []
        start = now()
        call = runtime._call(options)
        question = self._question(prompt, picture)
        looked = now()
        logits = runtime._prefill(session, question, options, call, clock)
        text = TextStream(runtime._text()) if self._has_text else None
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
        return Answer(
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

    # -- prompts: text, or where the bundle has no tokenizer the ids that stand for it ---------------------------------

    def _question(self, prompt: Any, picture: Picture | None) -> Question:
        seen = self._runtime._look(picture, "rgb")
        if isinstance(prompt, str):
            return self._runtime._question(prompt, seen)
        return Question(prompt, seen)

    def _prompts(self, picture: Picture | None, length: int | None) -> tuple[Any, Any]:
        """Two questions about a frame, equal at the beginning: of so many tokens, or as near below as words come."""
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


def _reset_peak() -> None:
    """Let the kernel count this process's peak memory from here on, where it can."""
    with suppress(OSError):  # then the peak is that of all cases so far
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def work(bundle: Bundle, ids: Sequence[int], tokens: int) -> dict[str, Work] | None:
    """Operations and bytes of a prompt's stages and of a step, by the counts of the bundle's graphs; None without."""
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
    # in the middle of the answer; a GPU's step reads the whole cache, and its costs know no slots
    add("step", costs["step"].at(slots=len(ids) + tokens // 2))
    return found


# -- starts ------------------------------------------------------------------------------------------------------------


def start(job: Job, cold: bool) -> Start:
    """A fresh process to its first token. cold: the bundle's files leave the page cache before."""
    files = sorted(path for path in Path(job.bundle).rglob("*") if path.is_file())
    if cold:
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = cached_share(files)
    spawned = time.monotonic()
    told = _process("first_token", job)
    return Start(
        cold,
        share,
        1e3 * (told["imported"] - spawned),
        1e3 * (told["loaded"] - told["imported"]),
        1e3 * (told["answered"] - told["loaded"]),
        1e3 * (told["answered"] - spawned),
    )


def first_token(began: float) -> None:
    """As a process: load a bundle, answer with one token, say when each was done."""
    imported = time.monotonic()
    with _errors_as_json():
        job = _told()
        size = next((s for s in job.sizes if s is not None), None)
        picture = load_rgb(job.image) if job.image is not None else None if size is None else made_up(*size)
        with Runtime(job.bundle, threads=job.threads) as runtime:
            loaded = time.monotonic()
            bench = _Bench(runtime, 1, loaded)
            bench._answer(bench._prompts(picture, None)[0], picture)
            answered = time.monotonic()
            _print({"began": began, "imported": imported, "loaded": loaded, "answered": answered})


def cached_share(files: Sequence[Path]) -> float | None:
    """Which share of some files' bytes the page cache holds, by mincore(2); None where that cannot be asked."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    held = pages = 0
    for path in files:
        if not (size := path.stat().st_size):
            continue
        count = -(-size // jetson.PAGE)
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            array = np.frombuffer(view, np.uint8)
            resident = np.zeros(count, np.uint8)
            pointer, out = ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(resident.ctypes.data)
            failed = mincore(pointer, ctypes.c_size_t(size), out)
            del array
        if failed:
            return None
        held, pages = held + int((resident & 1).sum()), pages + count
    return held / pages if pages else None


# -- the roofline's roofs ----------------------------------------------------------------------------------------------


def machine_peaks(machine: jetson.Machine, bundles: Sequence[Bundle]) -> Peaks | None:
    """What the machine can do at most: measured on a CPU, from the table of devices on a Jetson's GPU; else None."""
    gpu = [t for b in bundles if (t := TARGETS.get(b.manifest.target)) is not None and t.gpu]
    if gpu:
        return table_peaks(machine)
    threads = len(os.sched_getaffinity(0))
    return Peaks(
        matmul_rate(), read_rate(threads), f"measured: numpy's float32 MatMul, memory read by {threads} threads"
    )


def table_peaks(machine: jetson.Machine) -> Peaks | None:
    """FP16 and memory of this Jetson in its power mode; None where `trol_edge.machine.devices` has not both."""
    here = identify(machine.root).jetson
    if here is None:
        return None
    title = "Jetson " + here.module.removesuffix(" (developer kit)")
    name = str(machine.identity()["power_mode_name"]).removeprefix("MODE_")
    for device in DEVICES.values():
        for mode in device.modes:
            if (device.title, mode.name) == (title, name):
                source = f"table of devices: {device.title}, {mode.name}, FP16"
                return Peaks(device.flops(mode, "float16"), 1e9 * mode.gb_per_s, source)
    return None


def read_rate(threads: int, size: int = 256 << 20, repeats: int = 5) -> float:
    """Best of several reads of `size` bytes of memory by all threads, in bytes per second."""
    parts = np.array_split(np.ones(size // 8), threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.monotonic()
            list(pool.map(np.max, parts))
            rates.append(size / (time.monotonic() - start))
    return max(rates)


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
    """Best of several float32 products of square matrices, in floating point operations per second."""
    a = np.ones((size, size), np.float32)
    rates = []
    for _ in range(repeats + 1):
        start = time.monotonic()
        a @ a
        rates.append(2 * size**3 / (time.monotonic() - start))
    return max(rates[1:])
