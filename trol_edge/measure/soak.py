"""A soak test, hours in minutes: four threads ask, stop, fork, miss deadlines and feed bad frames to one Runtime.

Every answer is compared with one that was made alone before. It must be equal, or its beginning if the call was cut
short.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering.results import Piece
from trol_edge.bundle.signature import PublicKey
from trol_edge.bundle.targets import is_gpu
from trol_edge.errors import ImageError, UnfinishedError, UsageError
from trol_edge.machine import identity
from trol_edge.model import Provider
from trol_edge.runtime import Runtime
from trol_edge.session import Session

THREADS = 4
QUESTIONS = ("What is left of the red circle?", "Describe the scene.", "How many objects are there?")
OPTIONS = ("one", "two", "two of them", "none")
SIZES = ((240, 320), (120, 90), (64, 64), (333, 200))  # sizes of the frames, which change from question to question
MAX_NEW_TOKENS = 24
SHORTEST_S = 60.0  # a shorter run says nothing about memory
FLAT_SHARE, FLAT_BYTES = 0.01, 4 << 20
SAMPLE_S = 2.0  # time between two readings of the memory
# Allowed difference between two probabilities of one option. A prompt is summed in other chunks when a part of it is
# cached already, and GPUs round to ten bits even in FP32 (TF32).
EXACT, HALF = 1e-4, 2e-2
HANGS_S = 120.0  # a thread that has not ended after this time hangs


@dataclasses.dataclass(frozen=True)
class Slope:
    """Resident memory over the last two thirds of a run; the first third is warm-up (caches, buffers)."""

    mb_per_minute: float  # by least squares
    growth_bytes: float  # slope times the judged time
    error_bytes: float  # twice the standard error of the growth
    allowed_bytes: float  # 1 % of the resident memory, at least 4 MiB
    resident_bytes: float  # mean

    @property
    def flat(self) -> bool:
        """Whether the growth, less its error, is within what is allowed."""
        return self.growth_bytes - self.error_bytes <= self.allowed_bytes


@dataclasses.dataclass(frozen=True)
class SoakReport:
    """What a soak test saw; `passed` is the verdict."""

    seconds: float
    calls: dict[str, int]  # by kind
    wrong: tuple[str, ...]  # the first few answers that differ, unexpected errors and leftovers
    slope: Slope | None  # None: the run was too short to judge
    vision_hits: int
    vision_misses: int

    @property
    def passed(self) -> bool:
        """Whether no answer was wrong, nothing was left over and memory stayed flat."""
        return not self.wrong and (self.slope is None or self.slope.flat)


def judge(samples: Sequence[tuple[float, int]]) -> Slope:
    """Compute the slope of resident memory from samples (seconds, bytes) of a whole run."""
    end = samples[-1][0]
    times, sizes = np.array([s for s in samples if s[0] >= samples[0][0] + (end - samples[0][0]) / 3], float).T
    centred, resident = times - times.mean(), float(sizes.mean())
    per_second = float(centred @ sizes / (centred @ centred))
    rest = sizes - resident - per_second * centred
    error = float(np.sqrt(rest @ rest / (len(rest) - 2) / (centred @ centred)))
    judged_s = float(times[-1] - times[0])
    return Slope(
        per_second * 60 / 1e6,
        per_second * judged_s,
        2 * error * judged_s,
        max(FLAT_BYTES, FLAT_SHARE * resident),
        resident,
    )


def soak(
    bundle: str | os.PathLike[str],
    seconds: float,
    progress: Callable[[float, int], None],
    provider: Provider | None = None,
    trusted_keys: Sequence[PublicKey] | None = None,
) -> SoakReport:
    """Run for `seconds`. progress is called every few seconds with the seconds so far and the resident bytes.

    Memory is read while all threads rest between two calls, so that caches in use do not count as growth.

    The bundle needs a tokenizer. provider and trusted_keys are what Runtime takes. Raises what Runtime raises for an
    unusable bundle.
    """
    threads_before = threading.active_count()
    runtime = Runtime(bundle, provider=provider, trusted_keys=trusted_keys)
    crew = _Crew(runtime)
    workers = [threading.Thread(target=crew.work, args=(seed,), daemon=True) for seed in range(THREADS)]
    start = time.monotonic()
    samples: list[tuple[float, int]] = []
    try:
        for worker in workers:
            worker.start()
        while (now := time.monotonic() - start) < seconds and not crew.wrong:
            with crew.resting():
                gc.collect()
                samples.append((now, resident_bytes()))
            progress(*samples[-1])
            time.sleep(min(SAMPLE_S, seconds / 20))
    except BaseException:
        crew.interrupt(workers)
        raise
    crew.over.set()
    for worker in workers:
        worker.join(HANGS_S)
    wrong, calls, info = crew.wrong, dict(crew.calls), runtime.vision_cache
    wrong += [f"thread {worker.name} hangs" for worker in workers if worker.is_alive()]
    if not wrong:
        wrong += left_behind(runtime)
        backend = weakref.ref(runtime.model.backend)
        runtime.close()
        del crew, runtime, workers, worker
        gc.collect()
        if backend() is not None:
            wrong.append("the model is still in memory after close")
        if threading.active_count() > threads_before:
            wrong.append(f"{threading.active_count() - threads_before} threads are left after close")
    slope = judge(samples) if seconds >= SHORTEST_S and len(samples) > 20 else None
    return SoakReport(time.monotonic() - start, calls, tuple(wrong[:20]), slope, info.hits, info.misses)


def resident_bytes() -> int:
    """Resident memory of this process, or its peak so far on a system that does not report the present value.

    Free pages that the C allocator keeps are given back first (glibc). With threads they come and go by whole arenas,
    tens of MB that nobody holds, which would hide a leak or look like one.
    """
    identity.free_pages()
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return identity.peak_memory()


def left_behind(runtime: Runtime) -> list[str]:
    """Names what should be gone once no call is running."""
    gc.collect()
    found = []
    sessions = [o for o in gc.get_objects() if type(o) is Session and o.backend is runtime.model.backend]
    if len(sessions) > 1:
        found.append(f"{len(sessions)} sessions are left, at most 1 waits for the next answer")
    if runtime.desk.busy or len(runtime.desk.turns):
        found.append(f"{len(runtime.desk.busy)} sessions reserved, {len(runtime.desk.turns)} calls queued")
    return found


class _Crew:
    """Holds the threads' work and what they found."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.over = runtime, threading.Event()
        manifest = runtime.bundle.manifest
        exact = manifest.plan.compute == "fp32" and not is_gpu(manifest.target)
        self._tolerance = EXACT if exact else HALF
        self.wrong: list[str] = []
        self.calls: Counter[str] = Counter()
        self._lock, self._all_here = threading.Lock(), threading.Barrier(THREADS)
        self._changed, self._pause, self._rest = threading.Condition(), False, 0  # _rest counts resting threads
        shades = np.random.default_rng(0)
        self._frames = [shades.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
        # Every answer that later ones are compared with is made here, with no other call running.
        self._alone = {
            (question, at): runtime.generate(question, frame, max_new_tokens=MAX_NEW_TOKENS)
            for question in QUESTIONS
            for at, frame in enumerate(self._frames)
        }
        self._chosen = {at: runtime.choose(QUESTIONS[2], OPTIONS, f) for at, f in enumerate(self._frames)}

    def _peak(self, dice: random.Random) -> None:
        """Use the most memory that the calls can take together once, because allocators keep what they once had."""
        question, _, frame = self._case(dice)
        with self.runtime.session() as session, self.runtime.stream(question, frame) as stream:
            next(stream)
            logits = session.prefill(self.runtime.tokenize(question))
            with session.fork() as twin:
                twin.extend([int(logits.argmax())])
                session.step(int(logits.argmax()))
                self._all_here.wait(HANGS_S)

    def work(self, seed: int) -> None:
        """Make one random kind of call after another until time is over."""
        dice = random.Random(seed)
        try:
            for _ in range(3):
                self._peak(dice)
        except Exception as error:
            self._note(f"peak: {type(error).__name__}: {error}")
        kinds = [
            self._ask,
            self._stream,
            self._abandon,
            self._deadline,
            self._fork,
            self._bad,
            self._choose,
            self._many,
        ]
        weights = [5, 3, 2, 3, 2, 2, 1, 1]
        while not self.over.is_set():
            self._maybe_rest()
            (kind,) = dice.choices(kinds, weights)
            name = kind.__name__.strip("_")
            try:
                kind(dice)
            except UnfinishedError as error:  # raised by choose when another thread calls stop()
                if error.reason != "stopped":
                    self._note(f"{name}: {error}")
            except Exception as error:
                self._note(f"{name}: {type(error).__name__}: {error}")
            with self._lock:
                self.calls[name] += 1
            if dice.random() < 0.02:
                self.runtime.stop()

    def interrupt(self, workers: Sequence[threading.Thread]) -> None:
        """End the threads after Ctrl-C: stop their calls as soon as they begin, and wait for them."""
        self.over.set()
        self._all_here.abort()
        self._go_on()
        last = time.monotonic() + HANGS_S
        while (alive := [w for w in workers if w.is_alive()]) and time.monotonic() < last:
            self.runtime.stop()
            alive[0].join(0.1)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Make all threads wait, so that no call is running inside the block."""
        with self._changed:
            self._pause = True
            if not self._changed.wait_for(lambda: self._rest == THREADS, HANGS_S):
                self._note(f"{THREADS - self._rest} threads hang")
        try:
            yield
        finally:
            self._go_on()

    def _go_on(self) -> None:
        """Let threads that rest make calls again."""
        with self._changed:
            self._pause = False
            self._changed.notify_all()

    def _maybe_rest(self) -> None:
        with self._changed:
            if self._pause:
                self._rest += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._pause)
                self._rest -= 1

    def _note(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)

    def _case(self, dice: random.Random) -> tuple[str, int, NDArray[np.uint8]]:
        at = dice.randrange(len(self._frames))
        return dice.choice(QUESTIONS), at, self._frames[at]

    def _compare(self, name: str, question: str, at: int, ids: Sequence[int], reason: str | None) -> None:
        """Check that a whole answer is equal to the one made alone, and that a shortened one is its beginning."""
        wanted = self._alone[question, at]
        whole = reason in ("stop", "length")
        if tuple(ids) != (wanted.token_ids if whole else wanted.token_ids[: len(ids)]):
            self._note(f"{name}: {question!r} about frame {at} gave {ids} ({reason}), alone {wanted.token_ids}")

    def _ask(self, dice: random.Random) -> None:
        question, at, frame = self._case(dice)
        bgr = np.ascontiguousarray(frame[:, :, ::-1])
        answer = self.runtime.generate(question, bgr, color="bgr", max_new_tokens=MAX_NEW_TOKENS)
        self._compare("ask", question, at, answer.token_ids, answer.finish_reason)

    def _stream(self, dice: random.Random) -> None:
        question, at, frame = self._case(dice)
        ids: list[int] = []
        reason, stop_at = None, dice.choice((None, dice.randrange(MAX_NEW_TOKENS)))
        with self.runtime.stream(question, frame, max_new_tokens=MAX_NEW_TOKENS) as stream:
            for piece in stream:
                ids += piece.token_ids
                reason = piece.finish_reason
                if len(ids) == stop_at:
                    stream.stop()
        self._compare("stream", question, at, ids, reason)

    def _abandon(self, dice: random.Random) -> None:
        question, at, frame = self._case(dice)
        stream = self.runtime.stream(question, frame, max_new_tokens=MAX_NEW_TOKENS)
        ids = [i for _ in range(dice.randrange(4)) for i in next(stream, Piece("", ())).token_ids]
        self._compare("abandon", question, at, ids, None)

    def _deadline(self, dice: random.Random) -> None:
        question, at, frame = self._case(dice)
        chunk = dice.choice((None, 1, 7, 50))
        answer = self.runtime.generate(
            question, frame, max_new_tokens=MAX_NEW_TOKENS, deadline_ms=dice.uniform(0.1, 60), prefill_chunk=chunk
        )
        self._compare("deadline", question, at, answer.token_ids, answer.finish_reason)

    def _fork(self, dice: random.Random) -> None:
        question, at, frame = self._case(dice)
        runtime, wanted = self.runtime, self._alone[question, at].token_ids
        with runtime.session() as session:
            logits = session.prefill(runtime.tokenize(question, runtime.count_tiles(frame)), runtime.preprocess(frame))
            split = dice.randrange(len(wanted) + 1)
            for token in wanted[:split]:
                logits = self._step(session, logits, token)
            with session.fork() as twin:
                for branch in (twin, session):
                    behind = logits
                    for token in wanted[split:]:
                        behind = self._step(branch, behind, token)

    def _step(self, session: Session, logits: NDArray[np.float32], token: int) -> NDArray[np.float32]:
        if int(logits.argmax()) != token:
            self._note(f"fork: token {int(logits.argmax())} at {session.length}, alone {token}")
        return session.step(token)

    def _bad(self, dice: random.Random) -> None:
        question, _, frame = self._case(dice)
        bad: Any = dice.choice((frame.astype(np.float32), frame[:, :, 0], frame[:0], b"", b"no picture", "gone.png", 7))
        try:
            self.runtime.generate(question, bad)
        except ImageError:
            pass
        else:
            self._note(f"bad: a frame {type(bad).__name__} was accepted")
        try:
            self.runtime.generate(question, frame, deadline_ms="0")  # type: ignore[arg-type]
        except UsageError:
            pass
        else:
            self._note("bad: deadline_ms='0' was accepted")
        answer = self.runtime.generate(question, frame, deadline_ms=0)  # no time left, or stop() came first
        if answer.token_ids or answer.finish_reason not in ("deadline", "stopped"):
            self._note(f"bad: deadline_ms=0 gave {answer.token_ids} ({answer.finish_reason})")

    def _choose(self, dice: random.Random) -> None:
        _, at, frame = self._case(dice)
        choice, wanted = self.runtime.choose(QUESTIONS[2], OPTIONS, frame), self._chosen[at]
        off = abs(choice.probability - wanted.probability)
        if choice.index != wanted.index or off > self._tolerance:
            self._note(
                f"choose: frame {at} gave {choice.text!r} ({choice.probability:.4f}), "
                f"alone {wanted.text!r} ({wanted.probability:.4f}); {self._tolerance:g} may be between them"
            )

    def _many(self, dice: random.Random) -> None:
        _, at, frame = self._case(dice)
        answers = self.runtime.ask_many(QUESTIONS, frame, max_new_tokens=MAX_NEW_TOKENS)
        for question, answer in zip(QUESTIONS, answers, strict=True):
            self._compare("ask_many", question, at, answer.token_ids, answer.finish_reason)
