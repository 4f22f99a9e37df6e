"""Estimates what a model would need and reach on a machine, for `trol-edge plan`: memory, times and a verdict.

Everything comes from the counts that export took from the graphs (`trol_edge.bundle.costs`), the device table, and the
few numbers below. A floor is a time that no implementation can beat: all operations at the peak rate, or weights and
cache at the peak bandwidth. The expected time is a sum over operators. Each takes the longer of its operations at the
rate that is usually reached and its bytes at the bandwidth that is usually reached, plus a fixed time to start. Where
the program of an engine is known, its kernels take the place of the operators: they move more than the graph needs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trol_edge.bundle.graph_sizes import PREFILL_CHUNK
from trol_edge.bundle.targets import is_gpu
from trol_edge.errors import UsageError
from trol_edge.plan.duration import GraphTime, graph_time
from trol_edge.plan.memory import Memory, memory_of
from trol_edge.plan.rates import Platform
from trol_edge.plan.subject import Subject, Workload

RESERVE_BYTES = 500_000_000  # must remain free for the rest of the robot
NEXT_QUESTION = 30  # tokens that a second question about the same picture adds


@dataclasses.dataclass(frozen=True)
class Fewer:
    """What a plan would be with a second pass in fewer layers; an answer takes as long per token."""

    twice: int  # layers with a second pass
    first_token: tuple[float, float]  # floor and expected time, in seconds
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Planned:
    """The plan for one machine and one precision. Times are in seconds."""

    machine: Platform
    subject: Subject
    memory: Memory
    stages: tuple[GraphTime, ...]
    first_token: tuple[float, float]  # floor and expected time of vision and prompt
    next_question: float | None  # expected time for the same picture; None: it needs both K/V sets
    tokens_per_second: tuple[float, float]  # highest possible, expected
    verdict: str  # "fits", "fits with these changes" or "does not fit"
    changes: tuple[str, ...]
    fewer: Fewer | None = None  # an assumption, if one was asked for


# -- the answer ----------------------------------------------------------------------------------------------------


def plan(
    subject: Subject,
    machine: Platform,
    work: Workload | None = None,
    *,
    desktop: bool = False,
    reserve: int = RESERVE_BYTES,
    smaller: Callable[[], Iterator[Subject]] = lambda: iter(()),
    fewer: Subject | None = None,
) -> Planned:
    """Compute times, memory and the verdict: whether it fits and leaves `reserve` bytes to the rest of the robot.

    smaller gives the same model in smaller precisions; it is called only if the subject itself does not fit. fewer: the
    same model with a second pass in fewer layers, planned beside it. No engine of it was ever counted, so its prompt
    takes the share of the subject's time that the graphs say, and its scratch memory is the subject's.

    Raises UsageError if the question does not fit the context, or the machine cannot run such a bundle.
    """
    work = work or Workload()
    if is_gpu(machine.target) != is_gpu(subject.target):
        raise UsageError(
            f"{subject.name} was made for target {subject.target}, but {machine.name} runs {machine.target}; "
            "plan with --model, or export the bundle for that target"
        )
    tiles = subject.most_tiles if work.tiles is None else work.tiles
    prompt = tiles * subject.tokens_per_tile + work.text
    if prompt + work.answer > subject.context:
        raise UsageError(
            f"{tiles} tile(s) of {subject.tokens_per_tile} tokens, {work.text} tokens of text and {work.answer} of "
            f"answer do not fit a context of {subject.context}; choose a larger --context, or fewer --tiles"
        )
    dims = {"images": tiles, "tokens": prompt, "slots": prompt}
    text_only = "traverse_text" in subject.graphs and not is_gpu(machine.target)  # a GPU has no engine for it
    text_graph = "traverse_text" if text_only else "traverse"

    def run(name: str, **given: int) -> GraphTime:
        programs = subject.programs.get(name, ())
        return graph_time(
            name, subject.graphs[name], subject.weights[name], machine, programs, subject.context, **given
        )

    vision = [run("vision", images=tiles)] if tiles else []
    prefill = _in_chunks(run, "traverse" if tiles else text_graph, prompt)
    step = run("step", slots=prompt + work.answer // 2)
    following = run(text_graph, tokens=NEXT_QUESTION, slots=prompt + work.answer + NEXT_QUESTION)
    memory, verdict, changes = _fit(subject, machine, work, dims, desktop, reserve, smaller)
    first = [*vision, prefill]
    assumed = None
    if fewer is not None:
        bare, less = (_in_chunks(functools.partial(_bare, s, machine), prefill.graph, prompt) for s in (subject, fewer))
        times = (less.floor, prefill.expected * less.expected / bare.expected)
        seen = sum(s.floor for s in vision), sum(s.expected for s in vision)
        held = dataclasses.replace(fewer, programs=subject.programs)
        assumed = Fewer(
            twice=fewer.twice,
            first_token=(seen[0] + times[0], seen[1] + times[1]),
            memory=memory_of(held, machine, dims, subject.context, True, desktop, subject.shared),
        )
    return Planned(
        machine=machine,
        subject=subject,
        memory=memory,
        stages=(*vision, prefill, step),
        first_token=(sum(s.floor for s in first), sum(s.expected for s in first)),
        next_question=following.expected if memory.cache_sets == 2 else None,
        tokens_per_second=(1 / step.floor, 1 / step.expected),
        verdict=verdict,
        changes=changes,
        fewer=assumed,
    )


def _bare(subject: Subject, machine: Platform, name: str, **given: int) -> GraphTime:
    """A graph's time by its own counts, whatever is known of its engine."""
    return graph_time(name, subject.graphs[name], subject.weights[name], machine, **given)


def _in_chunks(run: Callable[..., GraphTime], name: str, tokens: int) -> GraphTime:
    """A prompt, which a Runtime computes in chunks: each reads all weights. The floor is that of the whole at once."""
    whole = run(name, tokens=tokens, slots=tokens)
    starts = range(0, tokens, PREFILL_CHUNK)
    chunks = [run(name, tokens=min(PREFILL_CHUNK, tokens - n), slots=min(n + PREFILL_CHUNK, tokens)) for n in starts]
    moved = [chunk.moved for chunk in chunks if chunk.moved is not None]
    return dataclasses.replace(
        whole,
        expected=sum(chunk.expected for chunk in chunks),
        bound=max(chunks, key=lambda chunk: chunk.expected).bound,
        moved=sum(moved) if moved else None,
    )


def _fit(
    subject: Subject,
    machine: Platform,
    work: Workload,
    dims: Mapping[str, int],
    desktop: bool,
    reserve: int,
    smaller: Callable[[], Iterator[Subject]],
) -> tuple[Memory, str, tuple[str, ...]]:
    """Memory as asked for, the verdict, and the fewest changes that make it fit, the least harmful tried first."""
    gpu = is_gpu(machine.target)
    switches: list[tuple[str, dict[str, Any]]] = [("boot without a desktop", {"desktop": False})] if desktop else []
    if gpu and subject.shareable_bytes and not subject.shared:
        switches.append(("one copy of the decoder's weights for both engines (--shared-weights)", {"shared": True}))
    if gpu and not subject.by_layer:
        switches.append(("engines by layer (trol-edge build --engines layers)", {"by_layer": True}))
    switches.append(("one K/V set (prefix_reuse=False; each question is computed again)", {"reuse": False}))
    combined = (chosen for n in range(len(switches) + 1) for chosen in itertools.combinations(switches, n))
    subsets = [chosen for chosen in combined if _goes_together(subject, gpu, [change for _, change in chosen])]
    contexts: dict[int, str] = {subject.context: ""}
    for tiles in range(dims["images"], -1, -1):
        tokens = -(-(tiles * subject.tokens_per_tile + work.text + work.answer) // 256) * 256
        if tokens < min(contexts) and (tiles or not dims["images"]):
            option = f" (--max-tiles {max(1, tiles - 1)})" if subject.most_tiles > 1 else ""  # beside the thumbnail
            fewer = f"at most {tiles} tile(s) a picture{option} and " if tiles < dims["images"] else ""
            contexts[tokens] = f"{fewer}a context of {tokens} tokens"
    own: dict[str, Any] = {"shared": subject.shared, "by_layer": subject.by_layer}
    as_asked = memory_of(subject, machine, dims, subject.context, True, desktop, **own)
    for candidate in itertools.chain((subject,), smaller()):
        for context, shorter in contexts.items():
            for chosen in subsets:
                given: dict[str, Any] = {"reuse": True, "desktop": desktop} | own
                for _, change in chosen:
                    given |= change
                memory = memory_of(candidate, machine, dims, context, **given)
                if memory.remains < reserve:
                    continue
                lacking = f"{-memory.build_remains / 1e9:.1f} GB of swap while the engines are built"
                changes = (
                    *(() if candidate is subject else (f"precision {candidate.precision}",)),
                    *((shorter,) if shorter else ()),
                    *(text for text, _ in chosen),
                    *((lacking,) if memory.build_remains < 0 else ()),
                )
                return as_asked, "fits with these changes" if changes else "fits", changes
    return as_asked, "does not fit", ()


def _goes_together(subject: Subject, gpu: bool, changes: list[dict[str, Any]]) -> bool:
    """Whether some changes of a plan can be made together. Whole engines keep both K/V sets."""
    made = {name for change in changes for name in change}
    by_layer = subject.by_layer or "by_layer" in made
    return not (by_layer and (subject.shared or "shared" in made)) and not (gpu and "reuse" in made and not by_layer)


def to_dict(planned: Planned) -> dict[str, Any]:
    """What --json prints of a plan, in seconds and bytes. The counts themselves are in the bundle's manifest."""
    machine, subject, memory = planned.machine, planned.subject, planned.memory
    return {
        "device": machine.name,
        "model": subject.name,
        "target": machine.target,
        "precision": subject.precision,
        "context": subject.context,
        "verdict": planned.verdict,
        "changes": list(planned.changes),
        "memory": dataclasses.asdict(memory)
        | {"needed": memory.needed, "remains": memory.remains, "build_remains": memory.build_remains},
        "programs_of": subject.programs_of,
        "stages": [dataclasses.asdict(graph_time) for graph_time in planned.stages],
        "first_token": dict(zip(("floor", "expected"), planned.first_token, strict=True)),
        "next_question": planned.next_question,
        "passes": {"layers": subject.layers, "twice": subject.twice},
        "fewer": None if planned.fewer is None else _fewer_dict(planned.fewer),
        "tokens_per_second": dict(zip(("floor", "expected"), planned.tokens_per_second, strict=True)),
        "peak": dataclasses.asdict(machine.peak),
        "reached": dataclasses.asdict(machine.reached),
        "notes": list(machine.notes),
    }


def _fewer_dict(fewer: Fewer) -> dict[str, Any]:
    return {
        "twice": fewer.twice,
        "first_token": dict(zip(("floor", "expected"), fewer.first_token, strict=True)),
        "memory": dataclasses.asdict(fewer.memory) | {"remains": fewer.memory.remains},
    }
