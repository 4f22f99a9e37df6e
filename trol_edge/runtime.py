"""Defines `trol_edge.Runtime`, which answers questions about pictures."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering.asking import UNREAD, Color, Pictures, ask, listed, look
from trol_edge.answering.chat import Chat
from trol_edge.answering.choose import Poll, checked_options, choose, yes_no
from trol_edge.answering.desk import Desk
from trol_edge.answering.loop import Answering
from trol_edge.answering.options import AnswerOptions, Options, options_from_keywords
from trol_edge.answering.results import Answer, Choice, Clock, Piece, YesNo
from trol_edge.answering.streams import AnswerStream, pieces
from trol_edge.bundle.signature import PublicKey
from trol_edge.errors import UnfinishedError, UsageError
from trol_edge.model import Model, Provider
from trol_edge.numeric import shown, switch
from trol_edge.prompt.images import count_tiles, load_rgb, preprocess
from trol_edge.prompt.template import Prompt
from trol_edge.session import Session
from trol_edge.traversal import Traversal
from trol_edge.verify.passed import wanted
from trol_edge.verify.replay import first_load
from trol_edge.vision_cache import VisionCache, VisionCacheInfo

if TYPE_CHECKING:
    from typing_extensions import Unpack

Float32 = NDArray[np.float32]


class Runtime:
    """A loaded bundle, ready for questions.

    Threads may share it. Calls are served one at a time, in the order in which they came (a stream takes a new turn for
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
        trusted_keys: Sequence[PublicKey] | None = None,
        traversal: Traversal | None = None,
    ) -> None:
        """Load a bundle folder.

        threads: threads of one inference call (default: the physical cores). Far more threads than cores give a
        RuntimeWarning, because that is many times slower.
        verify: check the sha256 of the weights while they are read (the other files are always checked). False saves
        that time on a disk you trust.
        prefix_reuse: keep the keys and values of both passes, so that sessions can continue from a prefix (see
        trol_edge.Session). False halves the K/V memory, and calls that need the second set raise UsageError. Engines
        always keep both, so they refuse False.
        vision_cache_bytes: most bytes of image features that are kept for pictures that are asked about again, least
        recently used out first; 0 keeps none. With engines they are in the GPU's memory.
        selftest: replay the bundle's self-test (see trol_edge.verify.replay) when this machine loads it for the first
        time. None does so unless the environment has TROL_EDGE_SELFTEST=0.
        provider: run the graphs of a bundle for a GPU by ONNX Runtime instead of engines: "cuda", "tensorrt" (not yet
        run on a GPU) or "cpu" (right, but slow and large: each graph holds its weights, most widened to float32).
        fallback: a provider to use if engines cannot be loaded, with a RuntimeWarning that says why. With None that is
        an error.
        trusted_keys: ed25519 public keys (PEM files, or bytes). A bundle, or engines, that none of them signed
        (`trol-edge sign`) are not opened. Needs `trol-edge[sign]`. None accepts any bundle.
        traversal: the layers that have a second pass, of those that the bundle has it in: "all", a number (the first so
        many layers), or a list such as "0-7,10" or [0, 1]; None: as it was exported. It is for what runs layer by
        layer: engines by layer, and on a CPU int4-dynamic. The self-test is of all second passes.
        Raises BundleError (missing, half-copied, altered, not signed, other version), BackendError (library, memory),
        UsageError (an argument that does not fit) and VerifyError (the numbers are not the reference's).
        """
        vision_cache = VisionCache(vision_cache_bytes)
        is_tested = wanted(None if selftest is None else switch("selftest", selftest))
        self.model = Model(
            bundle,
            threads=threads,
            verify=verify,
            prefix_reuse=prefix_reuse,
            provider=provider,
            fallback=fallback,
            trusted_keys=trusted_keys,
            traversal=traversal,
        )
        self.bundle = self.model.bundle
        if is_tested:
            first_load(self.model)
        self.model.pass_twice()
        self.desk = Desk(self.model, vision_cache)

    # -- questions ---------------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, images: Pictures | None = None, **options: Unpack[AnswerOptions]) -> Answer:
        """Answer a question about pictures, or without any.

        prompt: the question, taken literally (special tokens in it are plain characters), or a list of str and
        trol_edge.IMAGE, which marks the place of a picture. images: a path, PIL image, the bytes of a picture file or a
        uint8 [H, W, 3] array (`color` is the order of its channels), or a list of them. options: see
        trol_edge.answering.options.Options; greedy by default.
        Raises UsageError, ImageError or ContextError for bad input, BackendError if inference fails; the Runtime
        stays usable.
        """
        return self._start(prompt, images, options_from_keywords(options)).whole()

    def stream(self, prompt: Prompt, images: Pictures | None = None, **options: Unpack[AnswerOptions]) -> AnswerStream:
        """Like generate, but piece by piece. `print(piece, end="")` prints one; the last has a finish_reason.

        Arguments are checked, and pictures read, before this returns. The prompt is prefilled at the first piece.
        """
        checked = options_from_keywords(options)
        if checked.num_beams > 1:
            raise UsageError(f"num_beams {checked.num_beams}: a beam search cannot be streamed; use generate")
        return self._start(prompt, images, checked).stream()

    def astream(
        self, prompt: Prompt, images: Pictures | None = None, **options: Unpack[AnswerOptions]
    ) -> AsyncGenerator[Piece, None]:
        """Like stream, but for `async for`. A separate thread computes, and ends one step after the task is cancelled.

        Arguments are checked at the first piece. A cancelled task returns when that thread has ended.
        """
        return pieces(functools.partial(self.stream, prompt, images, **options))

    def ask_many(
        self, prompts: Sequence[Prompt], images: Pictures | None = None, **options: Unpack[AnswerOptions]
    ) -> list[Answer]:
        """Answer several questions about the same pictures, which are encoded and prefilled once.

        The answers are those of one `generate` each, in order. deadline_ms is for all of them together. Arguments and
        errors are those of generate; all questions are checked before the first is answered.
        """
        if isinstance(prompts, str) or not isinstance(prompts, (list, tuple)) or not prompts:
            raise UsageError(f"ask_many takes a list of one or more questions, found {shown(prompts)}")
        checked = options_from_keywords(options)
        desk = self.desk
        call, start = desk.call(checked), desk.now()
        clocks = [Clock() for _ in prompts]
        try:
            pictures = look(desk, images, checked, call)
            questions = [ask(desk, prompt, pictures, call) for prompt in prompts]
            clocks[0].preprocess_ms = 1e3 * (desk.now() - start)  # the first answer bears it, and the waiting

            def work(session: Session | None) -> list[Answer]:
                each = zip(questions, clocks, strict=True)
                return [Answering(desk, q, checked, call, clock, session).whole() for q, clock in each]

            return desk.held(call, checked.session, clocks[0], work)
        except UnfinishedError:  # before its turn
            return [Answering(desk, UNREAD, checked, call, clock).whole() for clock in clocks]

    def choose(
        self,
        prompt: Prompt,
        options: Sequence[str],
        images: Pictures | None = None,
        *,
        color: Color = "rgb",
        bits: int | None = None,
        image_tokens: float = 1.0,
        max_tiles: int | None = None,
        deadline_ms: float | None = None,
        session: Session | None = None,
    ) -> Choice:
        """Find which of some answers is likeliest to the model, and how likely each is, from one prefill of the prompt.

        An option's score is its log-probability as the whole answer, divided by the number of its tokens. The end of
        the answer is one of these tokens, which distinguishes an option from one that it begins. probability: softmax
        of the scores over the given options.
        Raises UsageError for fewer than two options and for one that is empty, given twice or has white space around
        it, UnfinishedError if the deadline (or `stop`) comes first, and otherwise the errors of generate.
        """
        texts = checked_options(options)
        checked = Options(
            color=color,
            bits=bits,
            image_tokens=image_tokens,
            max_tiles=max_tiles,
            deadline_ms=deadline_ms,
            session=session,
        )
        return choose(self.desk, self._poll(prompt, images, checked), texts, checked)

    def yes_no(
        self,
        prompt: Prompt,
        images: Pictures | None = None,
        *,
        color: Color = "rgb",
        bits: int | None = None,
        image_tokens: float = 1.0,
        max_tiles: int | None = None,
        deadline_ms: float | None = None,
        session: Session | None = None,
    ) -> YesNo:
        """Find whether the answer begins with yes rather than no (in either case), and the probability of that.

        Arguments and errors are those of choose.
        """
        checked = Options(
            color=color,
            bits=bits,
            image_tokens=image_tokens,
            max_tiles=max_tiles,
            deadline_ms=deadline_ms,
            session=session,
        )
        return yes_no(self.desk, self._poll(prompt, images, checked), checked)

    def stop(self) -> None:
        """End every call that runs or waits, within one step, from any thread.

        In the prompt a step is one chunk (see Options.prefill_chunk), in the vision tower one picture.
        Answers end with the reason "stopped" and the text so far; choose and yes_no raise UnfinishedError.
        """
        self.desk.stop()

    # -- conversations ----------------------------------------------------------------------------------------------

    def chat(self, *, pinned: int = 0, truncate: bool = True, session: Session | None = None) -> Chat:
        """Begin a conversation, whose later questions follow on the earlier ones and their answers.

        pinned: number of turns at the beginning that always stay, for example 1 if all is about the first picture.
        truncate: drop the oldest other turns once the context is full; with False that is a ContextError.
        session: answer in this session instead of one that the conversation makes for itself.
        """
        return Chat(self.desk, pinned=pinned, truncate=truncate, session=session)

    # -- tokens, pictures, sessions ----------------------------------------------------------------------------------

    def session(self, long_context: bool = False, prefill_chunk: int | None = None) -> Session:
        """Make a token-level session with its own KV cache (see trol_edge.Session).

        long_context: see Options. prefill_chunk: tokens per traverse of a prompt (None: all at once). A session's own
        calls take no turns; they run beside answers of other threads.
        """
        return self.model.session(switch("long_context", long_context), prefill_chunk)

    def tokenize(self, prompt: Prompt, tiles: int | Sequence[int] = (), answer: str = "") -> list[int]:
        """The token ids of a whole prompt, template included. Raises UsageError as generate does.

        tiles: number of tiles of each picture, from `count_tiles`; an int is a number of pictures of one tile each.
        answer: an answer, or the beginning of one, that follows.
        """
        return self.model.tokenize(prompt, tiles, answer)

    def count_tiles(self, images: Pictures | None, bits: int | None = None) -> list[int]:
        """The squares that `preprocess` makes of each picture: 1, or up to 7 with TroL-3.8B. Raises ImageError."""
        return count_tiles([load_rgb(p, bits=bits) for p in listed(images)], self.bundle.manifest.image)

    def preprocess(self, images: Pictures | None, color: Color = "rgb", bits: int | None = None) -> Float32 | None:
        """Make pixel_values float32 [N, 3, P, P] of pictures, tile by tile, or None for none. Raises ImageError."""
        pictures = [load_rgb(p, color, bits) for p in listed(images)]
        return preprocess(pictures, self.bundle.manifest.image) if pictures else None

    @property
    def vision_cache(self) -> VisionCacheInfo:
        """The hits, misses, entries and bytes of the vision cache so far."""
        return self.desk.vision_cache.info

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop running calls, wait for them, and release the model. Sessions cannot be used afterwards.

        Memory is free once sessions and streams of this Runtime are gone, too. Closing twice is fine.
        """
        self.desk.close()

    def __enter__(self) -> Runtime:
        self.model.lifetime.check()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise UsageError("a Runtime cannot be sent to another process; make one there, from the same bundle folder")

    def _poll(self, prompt: Prompt, images: Pictures | None, options: Options) -> Poll:
        call, start = self.desk.call(options), self.desk.now()
        return Poll(prompt, look(self.desk, images, options, call), (), call, start)

    def _start(self, prompt: Prompt, images: Pictures | None, options: Options) -> Answering:
        desk = self.desk
        call, start = desk.call(options), desk.now()
        try:
            question = ask(desk, prompt, look(desk, images, options, call), call)
        except UnfinishedError:  # the answer says so: its turn does not come
            question = UNREAD
        return Answering(desk, question, options, call, Clock(1e3 * (desk.now() - start)))
