"""`trol_edge.Runtime`: pictures and questions in, answers out."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering.asking import Color, Pictures, ask, listed, look
from trol_edge.answering.choose import checked_options, score, softmax
from trol_edge.answering.desk import Desk
from trol_edge.answering.loop import Answering
from trol_edge.answering.options import AnswerOptions, Options, options_from_keywords
from trol_edge.answering.results import Answer, Choice, Clock, Option, Piece, YesNo
from trol_edge.answering.streams import AnswerStream, pieces
from trol_edge.errors import UsageError
from trol_edge.model import Model, Provider
from trol_edge.prompt.images import count_tiles, load_rgb, preprocess
from trol_edge.prompt.template import Prompt
from trol_edge.session import Session
from trol_edge.verify.passed import wanted
from trol_edge.verify.replay import first_load
from trol_edge.vision_cache import VisionCache, VisionCacheInfo

if TYPE_CHECKING:
    from typing_extensions import Unpack

Float32 = NDArray[np.float32]


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
        vision_cache = VisionCache(vision_cache_bytes)
        self.model = Model(
            bundle, threads=threads, verify=verify, prefix_reuse=prefix_reuse, provider=provider, fallback=fallback
        )
        self.bundle = self.model.bundle
        if wanted(selftest):
            first_load(self.model)
        self.desk = Desk(self.model, vision_cache)

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
        return pieces(functools.partial(self.stream, prompt, images, **options))

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
        desk = self.desk
        call, start = desk.call(checked), desk.now()
        pictures = look(desk, images, checked.color)
        questions = [ask(desk, prompt, pictures) for prompt in prompts]
        preprocess_ms = 1e3 * (desk.now() - start)
        answers = []
        with desk.held(call, checked.session) as (session, waited_ms):
            for question in questions:
                clock = Clock(preprocess_ms, waited_ms)
                answering = Answering(desk, question, checked, call, clock, session)
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
        logprobs, tokens, clock = score(self.desk, prompt, texts, images, checked, whole=True)
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
        logprobs, _, clock = score(self.desk, prompt, ["Yes", "yes", "No", "no"], images, checked, whole=False)
        shares = softmax(logprobs)
        yes = shares[0] + shares[1]
        return YesNo(yes >= 0.5, yes, clock.timings)

    def stop(self) -> None:
        """End every call that is under way or waits, within one step, from any thread.

        In the prompt that is one chunk (see Options.prefill_chunk), in the vision tower one picture.
        Answers end with the reason "stopped" and the text there is; choose and yes_no raise UnfinishedError.
        """
        self.desk.stop()

    # -- tokens, pictures, sessions ----------------------------------------------------------------------------------

    def session(self, long_context: bool = False, prefill_chunk: int | None = None) -> Session:
        """A new token-level session with a KV cache of its own (see trol_edge.Session).

        long_context: see Options. prefill_chunk: tokens per traverse of a prompt (None: all at once). Its own calls
        take no turns: they run beside answers of other threads.
        """
        return self.model.session(long_context, prefill_chunk)

    def tokenize(self, prompt: Prompt, tiles: int | Sequence[int] = (), answer: str = "") -> list[int]:
        """Token ids of a whole prompt, template included. Raises UsageError as generate does.

        tiles: of each picture, from `count_tiles`; an int is a number of pictures of one tile each. answer: an answer,
        or the beginning of one, that follows.
        """
        return self.model.tokenize(prompt, tiles, answer)

    def count_tiles(self, images: Pictures | None) -> list[int]:
        """How many squares of `preprocess` each picture becomes: 1, or with TroL-3.8B up to 7. Raises ImageError."""
        return count_tiles([load_rgb(p) for p in listed(images)], self.bundle.manifest.image)

    def preprocess(self, images: Pictures | None, color: Color = "rgb") -> Float32 | None:
        """pixel_values float32 [N, 3, P, P] of pictures, tile by tile, or None for none. Raises ImageError."""
        pictures = [load_rgb(p, color) for p in listed(images)]
        return preprocess(pictures, self.bundle.manifest.image) if pictures else None

    @property
    def vision_cache(self) -> VisionCacheInfo:
        """Hits, misses, entries and bytes of the vision cache so far."""
        return self.desk.vision_cache.info

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop what is under way, wait for it, and let the model go; sessions are of no use afterwards. Twice is fine.

        Memory is free once sessions and streams of this Runtime are gone, too.
        """
        self.desk.close()

    def __enter__(self) -> Runtime:
        self.model.lifetime.check()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise UsageError("a Runtime cannot be sent to another process; make one there, from the same bundle folder")

    def _start(self, prompt: Prompt, images: Pictures | None, options: Options) -> Answering:
        desk = self.desk
        call, start = desk.call(options), desk.now()
        question = ask(desk, prompt, look(desk, images, options.color))
        return Answering(desk, question, options, call, Clock(1e3 * (desk.now() - start)))
