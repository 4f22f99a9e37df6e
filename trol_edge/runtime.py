"""`trol_edge.Runtime`: pictures and a question in, an answer out. The loop and the clock; no tensors of its own."""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trol_edge.bundle import TOKENIZER, Bundle
from trol_edge.errors import BundleError, ContextError, UsageError
from trol_edge.images import count_tiles, load_rgb, preprocess
from trol_edge.sampling import Sampler, SamplingParams
from trol_edge.session import Backend, Embeddings, Session
from trol_edge.text import ImageMark, TextStream, Tokenizer, build_prompt, end_ids

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
Pictures = Picture | Sequence[Picture]
Prompt = str | Sequence[str | ImageMark]

# Target of a bundle -> (module, class) that runs it; imported when a Runtime is made.
BACKENDS = {"cpu": ("trol_edge.runtimes.ort", "OrtBackend")}


@dataclasses.dataclass(frozen=True)
class Timings:
    """Where the time of one answer went, in milliseconds of wall time."""

    preprocess_ms: float  # pictures read, resized and normalised; prompt tokenized
    vision_ms: float  # vision tower and projector
    prefill_ms: float  # traverse of the prompt, to the first logits
    decode_ms: float  # all steps after that, with sampling and detokenizing


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a stream yields: text that is complete (perhaps empty), and on the last piece why the answer ended."""

    text: str
    token_ids: tuple[int, ...]  # ids that arrived with this piece
    finish_reason: str | None = None
    timings: Timings | None = None  # on the last piece
    rope: str | None = None  # on the last piece, see Answer

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole answer. `str(answer)` is its text.

    finish_reason: "stop" (the model ended it, or a stop string came), "length" (max_new_tokens reached) or
    "context" (prompt and answer fill the bundle's context, or reach the length where the model's rotary embedding
    would have to change its factors: long_context=True goes on there).
    rope: factors of the rotary embedding that the answer was made with, "short" or "long"; "plain" for models that
    have one set.
    """

    text: str
    token_ids: tuple[int, ...]  # without the end marker
    finish_reason: str
    timings: Timings
    prompt_tokens: int
    rope: str

    def __str__(self) -> str:
        return self.text


class Runtime:
    """A loaded bundle. Calls from several threads are safe: each has a KV cache of its own while it runs."""

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify: bool = True,
        prefix_reuse: bool = True,
    ) -> None:
        """Load a bundle folder.

        threads: of one inference call (default: the physical cores). verify: check the sha256 of the weights while
        they are read (the other files are always checked); False saves that time on a disk you trust. prefix_reuse:
        keep the keys and values of both passes, so that sessions can go on from a prefix (see trol_edge.Session); False
        halves the K/V memory, and what needs the second set is refused.
        Raises BundleError (missing, half-copied, altered, other version) and BackendError (library, memory).
        """
        self.bundle = Bundle(bundle)
        manifest = self.bundle.manifest
        if manifest.target not in BACKENDS:
            raise BundleError(
                f"{self.bundle.folder}: made for target {manifest.target!r}, which this version cannot run; "
                f"it runs {', '.join(BACKENDS)}: export with --target cpu"
            )
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
        module, name = BACKENDS[manifest.target]
        backend_class = getattr(importlib.import_module(module), name)
        self._backend: Backend = backend_class(self.bundle, threads=threads, verify=verify, prefix_reuse=prefix_reuse)
        self._embeddings = Embeddings(self.bundle)
        self._idle: list[Session] = []  # sessions between answers; a KV cache is large, so it is used again

    def session(self, long_context: bool = False, prefill_chunk: int | None = None) -> Session:
        """A new token-level session with a KV cache of its own (see trol_edge.Session).

        long_context: see generate. prefill_chunk: tokens per traverse of a prompt (None: all at once).
        """
        return Session(self._backend, self._embeddings, self.bundle, long_context, prefill_chunk)

    def tokenize(self, prompt: Prompt, tiles: int | Sequence[int] = ()) -> list[int]:
        """Token ids of a whole prompt, template included. Raises UsageError as generate does.

        tiles: of each picture, from `count_tiles`; an int is a number of pictures of one tile each.
        """
        return build_prompt(self._text(), self.bundle.manifest.prompt, prompt, tiles)

    def count_tiles(self, images: Pictures | None) -> list[int]:
        """How many squares of `preprocess` each picture becomes: 1, or with TroL-3.8B up to 7. Raises ImageError."""
        return count_tiles([load_rgb(p) for p in _listed(images)], self.bundle.manifest.image)

    def preprocess(self, images: Pictures | None) -> NDArray[np.float32] | None:
        """pixel_values float32 [N, 3, P, P] of pictures, tile by tile, or None for none. Raises ImageError."""
        pictures = _listed(images)
        return preprocess([load_rgb(p) for p in pictures], self.bundle.manifest.image) if pictures else None

    def generate(
        self,
        prompt: Prompt,
        images: Pictures | None = None,
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        long_context: bool = False,
    ) -> Answer:
        """Answer a question about pictures, or without any.

        prompt: the question, taken literally (special tokens in it are plain characters); or a list of str and
        trol_edge.IMAGE that says where the pictures stand. images: a path, PIL image or uint8 [H, W, 3] RGB array, or
        a list of them. Greedy by default; temperature > 0 samples (see trol_edge.sampling.SamplingParams).
        long_context: for a model whose rotary embedding has long and short factors (TroL-3.8B: short up to 4096
        tokens), take the long ones from the first token on, so that the answer may go beyond; otherwise only a prompt
        that is itself longer takes them. Other models ignore it. The answer's `rope` says which were used.
        Raises UsageError, ImageError or ContextError for bad input, BackendError where inference fails; the Runtime
        stays usable.
        """
        options = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        text, last = "", None
        ids: list[int] = []
        run = _Run(self, prompt, images, max_new_tokens, stop, options, long_context)
        for last in run.pieces():
            text += last.text
            ids += last.token_ids
        assert last is not None and last.finish_reason is not None and last.timings is not None
        assert last.rope is not None
        return Answer(text, tuple(ids), last.finish_reason, last.timings, run.prompt_tokens, last.rope)

    def stream(
        self,
        prompt: Prompt,
        images: Pictures | None = None,
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        long_context: bool = False,
    ) -> Iterator[Piece]:
        """As generate, piece by piece. `print(piece, end="")` prints it; the last piece has a finish_reason.

        Arguments are checked, and pictures read, before this returns; the prompt is prefilled at the first piece.
        """
        options = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        return _Run(self, prompt, images, max_new_tokens, stop, options, long_context).pieces()

    def _text(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(
                f"{self.bundle.folder} has no tokenizer (its checkpoint had none), so it serves token ids only: "
                "use session(), or export again with the tokenizer files in the checkpoint"
            )
        return self._tokenizer


class _Run:
    """One answer under way."""

    def __init__(
        self,
        runtime: Runtime,
        prompt: Prompt,
        images: Pictures | None,
        max_new_tokens: int,
        stop: str | Sequence[str],
        options: SamplingParams,
        long_context: bool,
    ) -> None:
        start = time.perf_counter()
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens should be a whole number above 0, found {max_new_tokens!r}")
        self.runtime, self.max_new_tokens, self.long_context = runtime, max_new_tokens, long_context
        self.detokenizer = TextStream(runtime._text(), stop)
        self.sampler = Sampler(options)
        pictures = [load_rgb(picture) for picture in _listed(images)]
        self.ids = runtime.tokenize(prompt, runtime.count_tiles(pictures))
        self.prompt_tokens = len(self.ids)
        context = runtime.bundle.manifest.context
        if self.prompt_tokens >= context:
            raise ContextError(
                f"prompt and pictures take {self.prompt_tokens} tokens, this bundle holds {context} and the answer "
                "needs room too; shorten the prompt, give fewer pictures, or export with a larger --context"
            )
        self.pixels = runtime.preprocess(pictures)
        self.preprocess_ms = 1e3 * (time.perf_counter() - start)

    def pieces(self) -> Iterator[Piece]:
        """Prefill, then one piece per token (text may lag behind until a character is whole)."""
        runtime = self.runtime
        try:
            session = runtime._idle.pop()
        except IndexError:
            session = runtime.session()
        session.long_context = self.long_context
        try:
            clock = [time.perf_counter()]
            features = None if self.pixels is None else runtime._backend.encode_image(self.pixels)
            clock.append(time.perf_counter())
            logits = session.prefill_features(self.ids, features)
            clock.append(time.perf_counter())
            vision_ms, prefill_ms = 1e3 * (clock[1] - clock[0]), 1e3 * (clock[2] - clock[1])
            decode_ms, resumed = 0.0, clock[2]  # time that the caller spends between two pieces does not count
            reason = None
            count = 0
            while reason is None:
                token = self.sampler.sample(logits, self.ids)
                text = ""
                ids: tuple[int, ...] = (token,)
                if token in runtime._ends:
                    reason, ids = "stop", ()
                else:
                    count += 1
                    self.ids.append(token)
                    text = self.detokenizer.push(token)
                    if self.detokenizer.stopped is not None:
                        reason = "stop"
                    elif count == self.max_new_tokens:
                        reason = "length"
                    elif session.length == session.limit:
                        reason = "context"
                if reason is None:
                    decode_ms += 1e3 * (time.perf_counter() - resumed)
                    yield Piece(text, ids)
                    resumed = time.perf_counter()
                    logits = session.step_view(token)
                else:
                    text += self.detokenizer.flush()
                    decode_ms += 1e3 * (time.perf_counter() - resumed)
                    timings = Timings(self.preprocess_ms, vision_ms, prefill_ms, decode_ms)
                    yield Piece(text, ids, reason, timings, session.rope)
        finally:
            session.truncate(0)
            runtime._idle.append(session)


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]
