"""What a model would need and reach on a machine: memory, floor and expected times, verdict. `trol-edge plan`.

Everything comes from the counts that export walked off the graphs (`trol_edge.bundle.costs`), the device table, and the
few numbers below. A floor is what no implementation can beat: all operations at the peak rate, or weights and cache at
the peak bandwidth. The expected time goes operator by operator: the slower of its operations at the rate that is
usually reached and its bytes at the bandwidth that is, plus a fixed time to start it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trol_edge.bundle.costs import Costs, Operation
from trol_edge.bundle.derived import loaded_bytes
from trol_edge.bundle.engines import build_bytes, device_bytes, shared_weights
from trol_edge.bundle.manifest import Bundle, Port
from trol_edge.bundle.targets import TARGETS
from trol_edge.errors import BundleError, UsageError
from trol_edge.machine.devices import Device, Mode

# What GPUs reach of their peaks; `python -m tests.bench.plan_check` compares with others' measurements.
# Bandwidth and start-up were set by the decode rates of Phi-3.5 3.8B and Llama-3.2 3B on Orin Nano in two power modes
# (NVIDIA, MLC INT4), FP16 by vision and prefill of Cosmos-Reason2-2B there, INT8 by YOLOv8n being 1.27 times as fast in
# INT8 as in FP16 there. FP8 is taken to be like INT8.
BANDWIDTH = 0.85
ARITHMETIC = {"float32": 0.45, "float16": 0.45, "int8": 0.29, "fp8": 0.29}
OPERATOR_CYCLES = 12_000  # of the GPU's clock, to start a kernel and let it drain: 12 us at 1 GHz

# CUDA context, TensorRT and Python: from one run of another runtime on Orin Nano (Cosmos-Reason2-2B W4A16: 3.72 GB, of
# which 2.9 are weights and cache); ONNX Runtime and Python on a CPU: this library's trol-nano, rounded up.
RUNTIME_BYTES = {"gpu": 600_000_000, "cpu": 150_000_000}

TEXT_TOKENS = 84  # template and a short question
ANSWER_TOKENS = 64
RESERVE_BYTES = 500_000_000  # that must remain for the rest of the robot
NEXT_QUESTION = 30  # tokens that a second question about the same picture adds
QUALITY = ("fp32", "fp16", "fp8", "int8", "int4")  # best first


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is planned: a bundle, or a model as it would be exported. Bytes are those in the device's memory."""

    name: str
    target: str
    precision: str
    context: int  # tokens
    layers: int
    tokens_per_tile: int
    most_tiles: int
    graphs: dict[str, Costs]
    weights: dict[str, int]  # by graph
    decoder_bytes: int  # weights of all graphs but vision, each once
    shareable_bytes: int  # of them, what the engines of traverse and step could share (`export --shared-weights`)
    shared: bool  # they do
    embedding_bytes: int  # of a table that is mapped from the file, and read a row at a time
    cache_bytes: int  # one K/V set at full context


Points = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a machine does per second, by how much it does: points (amount, per second), between which is interpolated.

    arithmetic: operations, by type and by the size of one product; "attention" has an entry of its own where its rate
    is another. reads: bytes of weights or cache, by the weights of the graph (what fits the processor's caches is read
    faster). touches: bytes of tensors between operators, by those of one operator; what products read and write waits
    for no arithmetic on a CPU. stored: bytes of weights of a type whose unpacking is slower than memory. operator,
    product, attention, run: seconds to start an element-wise operator, a product, an attention, a graph. fused:
    element-wise operators and copies are part of what stands beside them, and take no time.
    """

    arithmetic: dict[str, Points]
    reads: Points
    touches: Points
    stored: dict[str, float]
    operator: float
    product: float
    attention: float
    run: float
    fused: bool


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device in one of its modes, or the machine at hand."""

    name: str
    title: str
    target: str
    memory_bytes: int
    os_bytes: int
    desktop_bytes: int
    precisions: tuple[str, ...]  # that are compared where none is chosen
    peak: Rates
    reached: Rates
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One question: a picture in so many tiles (None: as many as the model cuts at most), text, and the answer."""

    tiles: int | None = None
    text: int = TEXT_TOKENS  # tokens
    answer: int = ANSWER_TOKENS  # tokens


@dataclasses.dataclass(frozen=True)
class Stage:
    """One graph run once: what it does, and in which time."""

    graph: str
    dims: dict[str, int]
    flops: int
    bytes: int  # weights and cache
    floor: float  # seconds
    expected: float  # seconds
    bound: str  # what takes most of the expected time: "arithmetic", "memory" or "starting operators"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device while it answers, and while an engine is built (0: nothing is built there)."""

    weights: int
    cache: int
    cache_sets: int
    activations: int
    runtime: int
    system: int
    usable: int
    build: int

    @property
    def needed(self) -> int:
        """All that is ours."""
        return self.weights + self.cache + self.activations + self.runtime

    @property
    def remains(self) -> int:
        """Left for the rest of the robot; below zero: there is not enough."""
        return self.usable - self.system - self.needed

    @property
    def build_remains(self) -> int:
        """Left while an engine is built, with nothing of ours running."""
        return self.usable - self.system - self.build


@dataclasses.dataclass(frozen=True)
class Planned:
    """The answer for one machine and one precision. first_token and the like are seconds."""

    machine: Machine
    subject: Subject
    memory: Memory
    stages: tuple[Stage, ...]
    first_token: tuple[float, float]  # floor, expected: vision and prompt
    next_question: float | None  # expected, about the same picture; None: needs both K/V sets
    tokens_per_second: tuple[float, float]  # floor (the most), expected
    verdict: str  # "fits", "fits with these changes" or "does not fit"
    changes: tuple[str, ...]


def machine_of(device: Device, mode: Mode) -> Machine:
    """A device of the table with the efficiencies above."""
    kinds = [kind for kind in ARITHMETIC if kind != "fp8" or device.fp8]
    peak = Rates(
        {kind: ((1, device.flops(mode, kind)),) for kind in kinds},
        ((1, mode.gb_per_s * 1e9),),
        (),
        {},
        0.0,
        0.0,
        0.0,
        0.0,
        True,
    )
    reached = dataclasses.replace(
        peak,
        arithmetic={kind: ((1, device.flops(mode, kind) * ARITHMETIC[kind]),) for kind in kinds},
        reads=((1, mode.gb_per_s * 1e9 * BANDWIDTH),),
        touches=((1, mode.gb_per_s * 1e9 * BANDWIDTH),),
        operator=OPERATOR_CYCLES / (mode.gpu_mhz * 1e6),
        product=OPERATOR_CYCLES / (mode.gpu_mhz * 1e6),
        attention=OPERATOR_CYCLES / (mode.gpu_mhz * 1e6),
    )
    target = TARGETS[device.target]
    precisions = tuple(p for p in target.precisions if p != "fp32" and (p != "fp8" or device.fp8))
    notes = tuple(f"unverified: {what}" for what in device.unverified)
    return Machine(
        f"{device.name}:{mode.name}",
        f"{device.title}, {mode.name}",
        device.target,
        device.memory_bytes,
        device.os_bytes,
        device.desktop_bytes,
        precisions,
        peak,
        reached,
        notes,
    )


def machine_of_host(rates: Rates, memory_bytes: int, available_bytes: int) -> Machine:
    """This machine, its rates measured (`runtimes/rates.py`): floor and expectation then differ by overheads only."""
    precisions = TARGETS["cpu"].precisions
    system = memory_bytes - available_bytes
    return Machine("host", "this machine", "cpu", memory_bytes, system, 0, precisions, rates, rates, ())


def subject_of(bundle: Bundle) -> Subject:
    """A bundle, by its manifest and the header of its weights file. Raises BundleError where it was never counted."""
    manifest, tensors = bundle.manifest, bundle.weights().tensors
    graphs = {name: info.costs for name, info in manifest.graphs.items() if info.costs is not None}
    if len(graphs) != len(manifest.graphs):
        raise BundleError(
            f"{bundle.folder}: its graphs were never counted ({manifest.created_by} wrote it); export it again"
        )
    on_gpu = TARGETS[manifest.target].gpu if manifest.target in TARGETS else False

    def size(weight: str) -> int:
        return tensors[weight].nbytes if on_gpu else loaded_bytes(weight, tensors)

    sizes = {name: {w: size(w) for w in info.weights} for name, info in manifest.graphs.items()}
    decoder = {w: n for name, found in sizes.items() if name != "vision" for w, n in found.items()}
    apart, together = device_bytes(bundle) if on_gpu else (0, 0)
    return Subject(
        name=manifest.model,
        target=manifest.target,
        precision=manifest.plan.recipe,
        context=manifest.context,
        layers=manifest.spec.num_layers,
        tokens_per_tile=manifest.spec.vision.tokens_per_image,
        most_tiles=manifest.image.most_tiles,
        graphs=graphs,
        weights={name: sum(found.values()) for name, found in sizes.items()},
        decoder_bytes=sum(decoder.values()),
        shareable_bytes=apart - together if manifest.plan.can_share_weights else 0,
        shared=on_gpu and bool(shared_weights(bundle)),
        embedding_bytes=tensors["embedding"].nbytes,
        cache_bytes=cache_bytes(manifest.graphs["step"].inputs),
    )


def cache_bytes(ports: Sequence[Port]) -> int:
    """Bytes of the K/V cache among the inputs of a step: one set."""
    items = {"float32": 4, "float16": 2}
    return sum(math.prod(int(d) for d in p.shape) * items[p.dtype] for p in ports if p.name.startswith("past_"))


# -- time ----------------------------------------------------------------------------------------------------------


def stage(graph: str, costs: Costs, weight_bytes: int, machine: Machine, **dims: int) -> Stage:
    """One run of a graph whose weights take weight_bytes."""
    sizes, total = costs.dims(dims), costs.at(**dims)
    parts = [_seconds(o, sizes, weight_bytes, machine.reached) for o in costs.operations]
    sums = {
        "arithmetic": sum(c for c, m, _ in parts if c >= m),
        "memory": sum(m for c, m, _ in parts if c < m),
        "starting operators": sum(s for _, _, s in parts) + machine.reached.run,
    }
    products = [(o, o.at(sizes)) for o in costs.operations if o.kind in ("linear", "convolution", "attention")]
    compute = sum(o.count * c.flops / _most(machine.peak, o.arithmetic) for o, c in products)
    moved = total.weight_bytes + total.cache_bytes
    floor = max(compute, moved / max(rate for _, rate in machine.peak.reads))
    bound = max(sums, key=lambda name: sums[name])
    shown = {name: size for name, size in sizes.items() if name in ("tokens", "slots", "images")}
    return Stage(graph, shown, total.flops, moved, floor, sum(sums.values()), bound)


def _seconds(o: Operation, dims: Mapping[str, int], weight_bytes: int, rates: Rates) -> tuple[float, float, float]:
    """Arithmetic, memory and start-up of all operators of one kind."""
    if rates.fused and o.kind in ("pointwise", "move"):
        return 0.0, 0.0, 0.0
    cost = o.at(dims)
    product = o.kind in ("linear", "convolution", "attention")
    read = _at(rates.reads, weight_bytes)
    if o.stored in rates.stored:
        read = min(read, rates.stored[o.stored])
    touched = 0.0 if rates.fused and product else cost.activation_bytes / _at(rates.touches, cost.activation_bytes)
    memory = (cost.weight_bytes + cost.cache_bytes) / read + touched
    points = rates.arithmetic.get("attention") if o.kind == "attention" else None
    arithmetic = cost.flops / _at(points or _points(rates, o.arithmetic), cost.flops) if product else 0.0
    if product and o.kind != "attention":  # whose rate was measured with its scores
        arithmetic += touched
    starts = {"attention": rates.attention, "linear": rates.product, "convolution": rates.product}
    return o.count * arithmetic, o.count * memory, o.count * starts.get(o.kind, rates.operator)


def _points(rates: Rates, arithmetic: str) -> Points:
    if arithmetic not in rates.arithmetic:
        raise UsageError(f"nothing is known about {arithmetic} on this machine; choose another precision")
    return rates.arithmetic[arithmetic]


def _most(rates: Rates, arithmetic: str) -> float:
    return max(rate for _, rate in _points(rates, arithmetic))


def _at(points: Points, amount: int) -> float:
    """The rate between two points, linear in logarithms; outside of them that of the nearest."""
    for (low, slow), (high, fast) in itertools.pairwise(points):
        if low <= amount < high:
            return slow * (fast / slow) ** (math.log(amount / low) / math.log(high / low))
    return points[0][1] if amount < points[0][0] else points[-1][1]


# -- memory --------------------------------------------------------------------------------------------------------


def memory_of(
    subject: Subject, machine: Machine, dims: Mapping[str, int], context: int, reuse: bool, desktop: bool, shared: bool
) -> Memory:
    """Bytes by use. Engines hold their weights each, but those that they share; on a CPU all graphs share them.

    TensorRT reserves scratch memory for the longest prompt, once per engine; ONNX Runtime takes what a run needs.
    """
    gpu = TARGETS[machine.target].gpu
    graphs = [name for name in subject.graphs if not (gpu and name == "traverse_text")]
    one_set = subject.cache_bytes * context // subject.context
    longest = {"images": dims["images"], "tokens": context, "slots": context}
    if gpu:
        outside = subject.shareable_bytes if shared else 0  # of the engines of traverse and step, once for both
        weights = sum(subject.weights[name] for name in graphs) - outside
        activations = sum(subject.graphs[name].peak_bytes(**longest) for name in graphs)
        largest = max(subject.weights["vision"], subject.weights["traverse"] - outside)
    else:
        weights = subject.weights["vision"] + subject.decoder_bytes
        one = dict(dims) | {"images": min(1, dims["images"])}  # one tile after the other
        activations = max(subject.graphs[name].peak_bytes(**one) for name in graphs)
        largest = 0
    return Memory(
        weights=weights,
        cache=2 * one_set if reuse else one_set + (0 if gpu else one_set // subject.layers),
        cache_sets=2 if reuse else 1,
        activations=activations,
        runtime=RUNTIME_BYTES["gpu" if gpu else "cpu"],
        system=machine.os_bytes + (machine.desktop_bytes if desktop else 0),
        usable=machine.memory_bytes,
        build=build_bytes(largest) if largest and not TARGETS[machine.target].rtx else 0,
    )


# -- the answer ----------------------------------------------------------------------------------------------------


def plan(
    subject: Subject,
    machine: Machine,
    work: Workload | None = None,
    *,
    desktop: bool = False,
    reserve: int = RESERVE_BYTES,
    smaller: Callable[[], Iterator[Subject]] = lambda: iter(()),
) -> Planned:
    """Times, memory and verdict: does it fit, and leave `reserve` bytes to the rest of the robot?

    smaller: the same model in smaller precisions, asked for only where it does not.

    Raises UsageError where the question does not fit the context, or the machine cannot run such a bundle.
    """
    work = work or Workload()
    if TARGETS[machine.target].gpu != (subject.target in TARGETS and TARGETS[subject.target].gpu):
        raise UsageError(
            f"{subject.name} was made for target {subject.target}, {machine.name} runs {machine.target}: what one of "
            "them does says nothing about the other; plan with --model, or export the bundle for that target"
        )
    tiles = subject.most_tiles if work.tiles is None else work.tiles
    prompt = tiles * subject.tokens_per_tile + work.text
    if prompt + work.answer > subject.context:
        raise UsageError(
            f"{tiles} tile(s) of {subject.tokens_per_tile} tokens, {work.text} of text and {work.answer} of answer do "
            f"not fit a context of {subject.context}; choose a larger --context, or fewer --tiles"
        )
    dims = {"images": tiles, "tokens": prompt, "slots": prompt}
    text_only = "traverse_text" in subject.graphs and not TARGETS[machine.target].gpu  # no engine of its own there
    text_graph = "traverse_text" if text_only else "traverse"

    def run(name: str, **given: int) -> Stage:
        return stage(name, subject.graphs[name], subject.weights[name], machine, **given)

    vision = [run("vision", images=tiles)] if tiles else []
    prefill = run("traverse" if tiles else text_graph, tokens=prompt, slots=prompt)
    step = run("step", slots=prompt + work.answer // 2)
    following = run(text_graph, tokens=NEXT_QUESTION, slots=prompt + work.answer + NEXT_QUESTION)
    memory, verdict, changes = _fit(subject, machine, work, dims, desktop, reserve, smaller)
    first = [*vision, prefill]
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
    )


def _fit(
    subject: Subject,
    machine: Machine,
    work: Workload,
    dims: Mapping[str, int],
    desktop: bool,
    reserve: int,
    smaller: Callable[[], Iterator[Subject]],
) -> tuple[Memory, str, tuple[str, ...]]:
    """Memory as asked for, the verdict, and the fewest changes that make it fit, those first that hurt least."""
    gpu = TARGETS[machine.target].gpu
    switches: list[tuple[str, dict[str, Any]]] = [("boot without a desktop", {"desktop": False})] if desktop else []
    if gpu and subject.shareable_bytes and not subject.shared:
        switches.append(("one copy of the decoder's weights for both engines (--shared-weights)", {"shared": True}))
    if not gpu:  # TensorRT's back end always keeps both
        switches.append(("one K/V set (prefix_reuse=False: no second question for free)", {"reuse": False}))
    subsets = [chosen for n in range(len(switches) + 1) for chosen in itertools.combinations(switches, n)]
    contexts: dict[int, str] = {subject.context: ""}
    for tiles in range(dims["images"], -1, -1):
        tokens = -(-(tiles * subject.tokens_per_tile + work.text + work.answer) // 256) * 256
        if tokens < min(contexts) and (tiles or not dims["images"]):
            fewer = f"at most {tiles} tile(s) a picture and " if tiles < dims["images"] else ""
            contexts[tokens] = f"{fewer}a context of {tokens} tokens"
    as_asked = memory_of(subject, machine, dims, subject.context, True, desktop, subject.shared)
    for candidate in itertools.chain((subject,), smaller()):
        for context, shorter in contexts.items():
            for chosen in subsets:
                given: dict[str, Any] = {"reuse": True, "desktop": desktop, "shared": subject.shared}
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


def best(plans: Sequence[Planned], first_token: float | None, tokens_per_second: float | None) -> Planned | None:
    """The finest precision on a machine that fits and is expected to reach the goals (seconds, tokens per second)."""
    for found in sorted(plans, key=lambda p: (*QUALITY, p.subject.precision).index(p.subject.precision)):
        early = first_token is None or found.first_token[1] <= first_token
        fast = tokens_per_second is None or found.tokens_per_second[1] >= tokens_per_second
        if found.verdict != "does not fit" and early and fast:
            return found
    return None


def to_dict(planned: Planned) -> dict[str, Any]:
    """What --json prints of a plan: seconds and bytes; the counts themselves stand in the bundle's manifest."""
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
        "embedding_bytes_mapped": subject.embedding_bytes,
        "stages": [dataclasses.asdict(stage) for stage in planned.stages],
        "first_token": dict(zip(("floor", "expected"), planned.first_token, strict=True)),
        "next_question": planned.next_question,
        "tokens_per_second": dict(zip(("floor", "expected"), planned.tokens_per_second, strict=True)),
        "peak": dataclasses.asdict(machine.peak),
        "reached": dataclasses.asdict(machine.reached),
        "notes": list(machine.notes),
    }
