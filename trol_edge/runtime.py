"""`trol_edge.Runtime`: pictures and questions in, answers out. What one loaded bundle shares between all calls."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering import streams as aio
from trol_edge.answering.choose import answer_logprobs, checked_options, softmax
from trol_edge.answering.constrain import Grammars
from trol_edge.answering.loop import Answering, AnswerStream, Clock
from trol_edge.answering.options import AnswerOptions, Options, options_from_keywords
from trol_edge.answering.results import Answer, Choice, Option, Piece, YesNo
from trol_edge.answering.turns import Call, Turns
from trol_edge.bundle.manifest import TOKENIZER, Bundle
from trol_edge.bundle.targets import TARGETS
from trol_edge.cache import Features
from trol_edge.errors import BackendError, BundleError, ContextError, UsageError
from trol_edge.lifetime import Lifetime
from trol_edge.prompt.images import Picture, count_tiles, load_rgb, preprocess
from trol_edge.prompt.tokenizer import ImageMark, Tokenizer, build_prompt, end_ids
from trol_edge.session import Backend, Embeddings, Session
from trol_edge.verify import replay as verify_numbers
from trol_edge.vision_cache import VisionCache, VisionCacheInfo, content_key

if TYPE_CHECKING:
    from typing_extensions import Unpack

Float32 = NDArray[np.float32]
Pictures = Picture | Sequence[Picture]
Prompt = str | Sequence[str | ImageMark]
Color = Literal["rgb", "bgr"]
Provider = Literal["cpu", "cuda", "tensorrt"]

# Target of a bundle -> (module, class) that runs it; imported when a Runtime is made.
BACKENDS = {"cpu": ("trol_edge.runtimes.ort", "OrtBackend")}
BACKENDS |= {name: ("trol_edge.runtimes.trt.backend", "TrtBackend") for name, entry in TARGETS.items() if entry.gpu}
# Tokens of a prompt that are computed at a time: between two chunks a call can be stopped.
PREFILL_CHUNK = 256
DEADLINE_CHUNK = 64  # where it has a deadline


@dataclasses.dataclass(frozen=True)
class Seen:
    """A picture of a question, read: its features where they are cached, its pixels where not."""

    key: bytes
    tiles: int
    features: Features | None  # [tiles, T, D]
    pixels: Float32 | None  # [tiles, 3, P, P]


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt as token ids, and its pictures in the order of their tokens."""

    ids: list[int]
    pictures: list[Seen]

    @property
    def identities(self) -> list[bytes]:
        """One key per tile: equal keys, equal features."""
        return [picture.key + bytes([tile]) for picture in self.pictures for tile in range(picture.tiles)]


class Pace:
    """The least time per unit that a kind of work has taken so far: what is sure to be too much before a deadline."""

    def __init__(self) -> None:
        self._per_unit_s = math.inf

    def saw(self, seconds: float, units: int) -> None:
        """So many units took so long."""
        self._per_unit_s = min(self._per_unit_s, seconds / units)

    def least_s(self, units: int) -> float:
        """Seconds that so many units take at least; 0 before any was seen."""
        return 0.0 if self._per_unit_s == math.inf else units * self._per_unit_s


class Runtime:
    """A loaded bundle, ready for questions.

    Threads may share it: calls are served in the order in which they came, one at a time (a stream takes a new turn for
    each piece). Use it in a `with` block, or `close()` it.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify: bool = True,
        prefix_reuse: bool = True,
        vision_cache_bytes: int = 256 << 20,
        selftest: bool | None = None,
        provider: Provider | None = None,
        fallback: Provider | None = None,
    ) -> None:
        """Load a bundle folder.

        threads: of one inference call (default: the physical cores). verify: check the sha256 of the weights while
        they are read (the other files are always checked); False saves that time on a disk you trust. prefix_reuse:
        keep the keys and values of both passes, so that sessions can go on from a prefix (see trol_edge.Session); False
        halves the K/V memory, and what needs the second set is refused (engines keep both always, so with them this is
        refused). vision_cache_bytes: image features kept for pictures that are asked about again, least recently used
        out first; 0: none. They lie where they are used: in the GPU's memory with engines. selftest: replay the
        bundle's self-test (see trol_edge.verify.replay) when this machine loads it for the first time; None: unless the
        environment has TROL_EDGE_SELFTEST=0.
        provider: run the graphs of a bundle for a GPU by ONNX Runtime instead of engines: "cuda" or "tensorrt" (not yet
        run on a GPU), or "cpu" (right, but slow and large: each graph holds its weights, most widened to float32).
        fallback: a provider to go over to, with a RuntimeWarning that says why, where engines cannot be loaded; None:
        that is an error.
        Raises BundleError (missing, half-copied, altered, other version), BackendError (library, memory) and
        VerifyError (the numbers are not the reference's).
        """
        self.bundle = Bundle(bundle)
        manifest = self.bundle.manifest
        if manifest.target not in BACKENDS and provider is None:
            raise BundleError(
                f"{self.bundle.folder}: made for target {manifest.target!r}, which this version cannot run; "
                f"it runs {', '.join(BACKENDS)}: export with --target cpu"
            )
        self._vision_cache = VisionCache(vision_cache_bytes)
        self._tokenizer: Tokenizer | None = None
        if TOKENIZER in manifest.files:
            self._tokenizer = Tokenizer.from_file(self.bundle.path(TOKENIZER))
            self._ends = end_ids(self._tokenizer, manifest.prompt) | {manifest.spec.eos_token_id}
            image_id = self._tokenizer.special_id(manifest.prompt.image)
            if image_id != manifest.spec.image_token_id:
                raise BundleError(
                    f"{self.bundle.folder}: {manifest.prompt.image} is token {image_id} in {TOKENIZER} and "
                    f"{manifest.spec.image_token_id} in the manifest; export the bundle again"
                )
        settings = {"threads": threads, "verify": verify, "prefix_reuse": prefix_reuse}
        self._backend: Backend
        if provider is not None:
            self._backend = _backend_class("cpu")(self.bundle, provider=provider, **settings)
        elif fallback is None:
            self._backend = _backend_class(manifest.target)(self.bundle, **settings)
        else:
            try:
                self._backend = _backend_class(manifest.target)(self.bundle, **settings)
            except (BackendError, BundleError) as error:
                if manifest.target == "cpu":
                    raise  # there is nothing else
                self._backend = _backend_class("cpu")(self.bundle, provider=fallback, **settings)
                warnings.warn(
                    f"{error}. Answers come from ONNX Runtime's {fallback} provider instead, because of fallback=",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._embeddings = Embeddings(self.bundle)
        if verify_numbers.wanted(selftest):
            verify_numbers.first_load(self.bundle, self._backend, self._embeddings)
        self._lifetime = Lifetime()
        self._clock = time.perf_counter
        self._turns = Turns()
        self._idle: list[Session] = []  # at most one, between answers: a KV cache is large, and its prefix is of use
        self._busy: list[Session] = []  # under an answer
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._calls_lock = threading.Lock()
        self._vision_pace, self._prefill_pace = Pace(), Pace()

    # -- questions ---------------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, images: Pictures | None = None, **options: Unpack[AnswerOptions]) -> Answer:
        """Answer a question about pictures, or without any.

        prompt: the question, taken literally (special tokens in it are plain characters); or a list of str and
        trol_edge.IMAGE that says where the pictures stand. images: a path, PIL image, the bytes of a picture file or a
        uint8 [H, W, 3] array (channels as `color` says), or a list of them. options: see
        trol_edge.answering.options.Options; greedy by default.
        Raises UsageError, ImageError or ContextError for bad input, BackendError where inference fails; the Runtime
        stays usable.
        """
        checked = options_from_keywords(options)
        answering = self._start(prompt, images, checked)
        return answering.search() if checked.num_beams > 1 else answering.answer()

    def stream(self, prompt: Prompt, images: Pictures | None = None, **options: Unpack[AnswerOptions]) -> AnswerStream:
        """As generate, piece by piece. `print(piece, end="")` prints it; the last piece has a finish_reason.

        Arguments are checked, and pictures read, before this returns; the prompt is prefilled at the first piece.
        """
        checked = options_from_keywords(options)
        if checked.num_beams > 1:
            raise UsageError(f"num_beams {checked.num_beams}: a beam search has no pieces; use generate")
        return self._start(prompt, images, checked).stream()

    def astream(
        self, prompt: Prompt, images: Pictures | None = None, **options: Unpack[AnswerOptions]
    ) -> AsyncGenerator[Piece, None]:
        """As stream, for `async for`: computed in a thread of its own, which ends a step after the task is cancelled.

        Arguments are checked at the first piece. A cancelled task returns when that thread has ended.
        """
        return aio.pieces(functools.partial(self.stream, prompt, images, **options))

    def ask_many(
        self, prompts: Sequence[Prompt], images: Pictures | None = None, **options: Unpack[AnswerOptions]
    ) -> list[Answer]:
        """Answer several questions about the same pictures: these are encoded once, and prefilled once.

        The answers are those of one `generate` each, in order. deadline_ms holds for all of them together. Arguments
        and errors as for generate; all questions are checked before the first is answered.
        """
        if isinstance(prompts, str) or not isinstance(prompts, (list, tuple)) or not prompts:
            raise UsageError(f"ask_many takes a list of one or more questions, found {prompts!r}")
        checked = options_from_keywords(options)
        call = self._call(checked)
        start = self._clock()
        pictures = self._look(images, checked.color)
        questions = [self._question(prompt, pictures) for prompt in prompts]
        preprocess_ms = 1e3 * (self._clock() - start)
        answers = []
        with self._held(call, checked.session) as (session, waited_ms):
            for question in questions:
                clock = Clock(preprocess_ms, waited_ms)
                answering = Answering(self, question, checked, call, clock, session)
                answers.append(answering.search() if checked.num_beams > 1 else answering.answer())
                preprocess_ms = waited_ms = 0.0  # the first answer bears them
        return answers

    def choose(
        self,
        prompt: Prompt,
        options: Sequence[str],
        images: Pictures | None = None,
        *,
        color: Color = "rgb",
        deadline_ms: float | None = None,
        session: Session | None = None,
    ) -> Choice:
        """Which of some answers the model finds likeliest, and how likely each: from one prefill of the prompt.

        An option's score is its log-probability as the whole answer, divided by its tokens. The end of the answer is
        one of these tokens, so an option that is the beginning of another is told from it. probability: softmax of the
        scores over the options given.
        Raises UsageError for fewer than two options and for one that is empty, given twice or has white space around
        it, UnfinishedError where the deadline comes (or `stop`) first, and otherwise as generate.
        """
        texts = checked_options(options)
        checked = Options(color=color, deadline_ms=deadline_ms, session=session)
        logprobs, tokens, clock = self._score(prompt, texts, images, checked, whole=True)
        scores = [logprob / count for logprob, count in zip(logprobs, tokens, strict=True)]
        found = tuple(map(Option, texts, softmax(scores), scores, logprobs, tokens))
        best = max(range(len(found)), key=lambda i: found[i].score)
        return Choice(texts[best], best, found[best].probability, found, clock.timings)

    def yes_no(
        self,
        prompt: Prompt,
        images: Pictures | None = None,
        *,
        color: Color = "rgb",
        deadline_ms: float | None = None,
        session: Session | None = None,
    ) -> YesNo:
        """Whether the answer begins with yes rather than no (either case), and the probability of that.

        Arguments and errors as for choose.
        """
        checked = Options(color=color, deadline_ms=deadline_ms, session=session)
        logprobs, _, clock = self._score(prompt, ["Yes", "yes", "No", "no"], images, checked, whole=False)
        shares = softmax(logprobs)
        yes = shares[0] + shares[1]
        return YesNo(yes >= 0.5, yes, clock.timings)

    def stop(self) -> None:
        """End every call that is under way or waits, within one step, from any thread.

        In the prompt that is one chunk (see Options.prefill_chunk), in the vision tower one picture.
        Answers end with the reason "stopped" and the text there is; choose and yes_no raise UnfinishedError.
        """
        with self._calls_lock:
            calls = list(self._calls)
        for call in calls:
            call.stop()

    # -- tokens, pictures, sessions ----------------------------------------------------------------------------------

    def session(self, long_context: bool = False, prefill_chunk: int | None = None) -> Session:
        """A new token-level session with a KV cache of its own (see trol_edge.Session).

        long_context: see Options. prefill_chunk: tokens per traverse of a prompt (None: all at once). Its own calls
        take no turns: they run beside answers of other threads.
        """
        self._lifetime.check()
        return Session(self._backend, self._embeddings, self.bundle, long_context, prefill_chunk, self._lifetime)

    def tokenize(self, prompt: Prompt, tiles: int | Sequence[int] = (), answer: str = "") -> list[int]:
        """Token ids of a whole prompt, template included. Raises UsageError as generate does.

        tiles: of each picture, from `count_tiles`; an int is a number of pictures of one tile each. answer: an answer,
        or the beginning of one, that follows.
        """
        return build_prompt(self._text(), self.bundle.manifest.prompt, prompt, tiles, answer)

    def count_tiles(self, images: Pictures | None) -> list[int]:
        """How many squares of `preprocess` each picture becomes: 1, or with TroL-3.8B up to 7. Raises ImageError."""
        return count_tiles([load_rgb(p) for p in _listed(images)], self.bundle.manifest.image)

    def preprocess(self, images: Pictures | None, color: Color = "rgb") -> Float32 | None:
        """pixel_values float32 [N, 3, P, P] of pictures, tile by tile, or None for none. Raises ImageError."""
        pictures = [load_rgb(p, color) for p in _listed(images)]
        return preprocess(pictures, self.bundle.manifest.image) if pictures else None

    @property
    def vision_cache(self) -> VisionCacheInfo:
        """Hits, misses, entries and bytes of the vision cache so far."""
        return self._vision_cache.info

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop what is under way, wait for it, and let the model go; sessions are of no use afterwards. Twice is fine.

        Memory is free once sessions and streams of this Runtime are gone, too.
        """
        if not self._lifetime.alive:  # or this is the fork of the process that it belongs to
            return
        self.stop()
        call = Call(None, self._clock)
        self._turns.take(call)
        try:
            self._lifetime.closed = True  # whoever waits for the turn finds it so
            for session in self._idle:
                session.close()
            self._idle.clear()
            self._vision_cache.clear()
            del self._backend, self._embeddings
        finally:
            self._turns.give(call)

    def __enter__(self) -> Runtime:
        self._lifetime.check()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise UsageError("a Runtime cannot be sent to another process; make one there, from the same bundle folder")

    # -- for the calls ----------------------------------------------------------------------------------------------

    def _text(self) -> Tokenizer:
        """The tokenizer; UsageError where the bundle has none."""
        if self._tokenizer is None:
            raise UsageError(
                f"{self.bundle.folder} has no tokenizer (its checkpoint had none), so it serves token ids only: "
                "use session(), or export again with the tokenizer files in the checkpoint"
            )
        return self._tokenizer

    @functools.cached_property
    def _grammars(self) -> Grammars:
        """The vocabulary for response_format; made at the first use. BackendError where its library is missing."""
        return Grammars(self._text(), self._ends, self.bundle.manifest.spec.vocab_size)

    def _reserve(self, session: Session | None) -> Session:
        """The given session, or an idle or new one, for the caller alone until `release`. Needs the turn."""
        self._lifetime.check()
        if session is None:
            try:
                session = self._idle.pop()
            except IndexError:
                session = self.session()
        elif any(session is other for other in self._busy):
            raise UsageError(
                "this session is under another answer; finish or close that one first, or fork the session"
            )
        self._busy.append(session)
        return session

    def _release(self, session: Session, keep: bool) -> None:
        """Give a session back; keep: it is the Runtime's own, and may be reused."""
        self._busy.remove(session)
        if keep and not self._idle and not self._lifetime.closed:
            self._idle.append(session)

    def _prefill(self, session: Session, question: Question, options: Options, call: Call, clock: Clock) -> Float32:
        """Logits [V] behind the prompt. Raises UnfinishedError at the deadline, or as soon as it cannot be met."""
        start = self._clock()
        features = [self._features(picture, call) for picture in question.pictures]
        began = self._clock()
        clock.vision_ms += 1e3 * (began - start)
        done, since = 0, began
        chunk = options.prefill_chunk or session.prefill_chunk
        if chunk is None and session.prefix_reuse:  # without it a prompt has to be computed in one go
            chunk = PREFILL_CHUNK if options.deadline_ms is None else DEADLINE_CHUNK

        def on_chunk(first: int, total: int) -> None:
            nonlocal done, since
            now = self._clock()
            if first > done and since > began:
                self._prefill_pace.saw(now - since, first - done)
            done, since = first, now
            call.check(self._prefill_pace.least_s(min(chunk or total, total - first)))

        before = session.long_context, session.prefill_chunk
        session.long_context = options.long_context or (before[0] and options.session is not None)
        session.prefill_chunk = chunk
        try:
            logits = session.prefill_features(
                question.ids,
                features or None,
                question.identities if features else None,
                reuse=session.prefix_reuse,
                on_chunk=on_chunk,
            )
        finally:
            session.long_context, session.prefill_chunk = before
            end = self._clock()
            clock.prefill_ms += 1e3 * (end - began)
        self._prefill_pace.saw(end - since, len(question.ids) - done)
        return logits

    # -- inside ------------------------------------------------------------------------------------------------------

    def _start(self, prompt: Prompt, images: Pictures | None, options: Options) -> Answering:
        call, start = self._call(options), self._clock()
        question = self._question(prompt, self._look(images, options.color))
        return Answering(self, question, options, call, Clock(1e3 * (self._clock() - start)))

    def _call(self, options: Options) -> Call:
        """A call that begins now, and that `stop` knows of."""
        self._lifetime.check()
        if options.session is not None and options.session._backend is not self._backend:
            raise UsageError("the session belongs to another Runtime; make it with session() of this one")
        if options.answer_mode == "traverse" and not self._backend.prefix_reuse:
            raise UsageError("answer_mode 'traverse' needs both K/V sets; open the Runtime with prefix_reuse=True")
        call = Call(options.deadline_ms, self._clock)
        with self._calls_lock:
            self._calls.add(call)
        return call

    def _look(self, images: Pictures | None, color: Color) -> list[Seen]:
        """Read pictures; make pixels of those whose features are not in the cache."""
        spec, seen = self.bundle.manifest.image, []
        for image in _listed(images):
            rgb = load_rgb(image, color)
            key = content_key(rgb, repr(spec))
            features = self._vision_cache.peek(key)
            pixels = None if features is not None else preprocess([rgb], spec)
            seen.append(Seen(key, count_tiles([rgb], spec)[0], features, pixels))
        return seen

    def _question(self, prompt: Prompt, pictures: list[Seen]) -> Question:
        ids = self.tokenize(prompt, [picture.tiles for picture in pictures])
        context = self.bundle.manifest.context
        if len(ids) >= context:
            raise ContextError(
                f"prompt and pictures take {len(ids)} tokens, this bundle holds {context} and the answer "
                "needs room too; shorten the prompt, give fewer pictures, or export with a larger --context"
            )
        return Question(ids, pictures)

    def _features(self, picture: Seen, call: Call) -> Features:
        def encode() -> Features:
            if picture.features is not None:  # dropped from the cache since the question was read
                return picture.features
            assert picture.pixels is not None
            call.check(self._vision_pace.least_s(picture.tiles))
            start = self._clock()
            features = self._backend.encode_image(picture.pixels)
            self._vision_pace.saw(self._clock() - start, picture.tiles)
            return features

        return self._vision_cache.get(picture.key, encode)

    @contextmanager
    def _held(self, call: Call, session: Session | None) -> Iterator[tuple[Session, float]]:
        """The turn, a session for as long, and the milliseconds waited."""
        start = self._clock()
        self._turns.take(call)
        try:
            waited_ms = 1e3 * (self._clock() - start)
            held = self._reserve(session)
            try:
                yield held, waited_ms
            finally:
                self._release(held, keep=session is None)
        finally:
            self._turns.give(call)

    def _score(
        self, prompt: Prompt, texts: list[str], images: Pictures | None, options: Options, whole: bool
    ) -> tuple[list[float], list[int], Clock]:
        """Log-probability and token count of each text as the answer; whole: the end of the answer is a token of it."""
        call, start = self._call(options), self._clock()
        question = self._question(prompt, self._look(images, options.color))
        tiles = [picture.tiles for picture in question.pictures]
        answers = [self._answer_ids(question, self.tokenize(prompt, tiles, text), text) for text in texts]
        context, longest = self.bundle.manifest.context, max(map(len, answers))
        if len(question.ids) + longest > context:
            raise ContextError(
                f"prompt and pictures take {len(question.ids)} tokens and the longest option {longest}, this bundle "
                f"holds {context}; shorten them, give fewer pictures, or export with a larger --context"
            )
        ends = self._ends if whole else frozenset[int]()
        clock = Clock(1e3 * (self._clock() - start))
        with self._held(call, options.session) as (session, clock.wait_ms):
            logits = self._prefill(session, question, options, call, clock)
            since = self._clock()
            logprobs = answer_logprobs(session, logits, answers, ends, call.check)
            clock.decode_ms = 1e3 * (self._clock() - since)
        return logprobs, [len(answer) + whole for answer in answers], clock

    def _answer_ids(self, question: Question, ids: list[int], text: str) -> list[int]:
        prompt = len(question.ids)
        if ids[:prompt] != question.ids or len(ids) == prompt:
            raise UsageError(f"option {text!r} has no tokens of its own behind the prompt; word it differently")
        return ids[prompt:]


def _backend_class(target: str) -> Any:
    """The class that runs a target's bundles, imported late: its library may be missing."""
    module, name = BACKENDS[target]
    return getattr(importlib.import_module(module), name)


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]
