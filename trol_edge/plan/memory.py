"""Computes how much of a machine's memory a model needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from trol_edge.bundle.engines import GIVEN, PART
from trol_edge.bundle.sizes import build_bytes
from trol_edge.bundle.targets import TARGETS, is_gpu
from trol_edge.plan.rates import Platform
from trol_edge.plan.subject import Subject

# GPU: CUDA context, TensorRT and Python, taken from one run of another runtime on Orin Nano (Cosmos-Reason2-2B W4A16,
# 3.72 GB, of which 2.9 are weights and cache). CPU: ONNX Runtime and Python, from this library's trol-nano, rounded up.
RUNTIME_BYTES = {"gpu": 600_000_000, "cpu": 150_000_000}
STATES = 3 * 4  # bytes of a number of a hidden state: engines by layer hand them on in three buffers of float32


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device while it answers, and while an engine is built (0 if none is built there)."""

    weights: int
    embedding: int  # the table, which is always in the CPU's memory; 0 for a GPU with its own memory
    cache: int
    cache_sets: int
    activations: int
    runtime: int
    system: int
    usable: int
    build: int

    @property
    def needed(self) -> int:
        """Everything that this library takes."""
        return self.weights + self.embedding + self.cache + self.activations + self.runtime

    @property
    def remains(self) -> int:
        """Bytes left for the rest of the robot; negative if there is not enough."""
        return self.usable - self.system - self.needed

    @property
    def build_remains(self) -> int:
        """Bytes left while an engine is built, with no Runtime open."""
        return self.usable - self.system - self.build


def _held(subject: Subject, name: str) -> int:
    """Bytes of scratch memory that a graph's engine says it holds; 0 if its engine was not counted."""
    return max((counts.scratch for counts in subject.programs.get(name, ())), default=0)


def memory_of(
    subject: Subject,
    machine: Platform,
    dims: Mapping[str, int],
    context: int,
    reuse: bool,
    desktop: bool,
    shared: bool,
    by_layer: bool = False,
) -> Memory:
    """Compute bytes by use. Each engine has its own weights except those that are shared; on a CPU all graphs share.

    TensorRT reserves scratch memory for the longest prompt, once per engine; ONNX Runtime takes what a run needs.
    by_layer: engines by layer have each weight once, and one scratch memory. The largest is the vision tower, or the
    output layer, which is not counted apart: the tower is larger in all published models.
    """
    gpu = is_gpu(machine.target)
    graphs = [name for name in subject.graphs if not (gpu and name == "traverse_text")]
    first = subject.cache_bytes * context // subject.context
    second = first if subject.second_bytes is None else subject.second_bytes * context // subject.context
    longest = {"images": dims["images"], "tokens": context, "slots": context}
    if gpu and by_layer:
        weights = subject.weights["vision"] + subject.decoder_bytes
        part = longest | {"tokens": min(context, PART if TARGETS[machine.target].in_place else GIVEN)}
        peaks = [subject.graphs[name].peak_bytes(**part) for name in graphs]
        activations = (
            max(*peaks, _held(subject, "vision"), subject.scratch_bytes) + STATES * subject.hidden_size * context
        )
        if not TARGETS[machine.target].in_place:  # the new rows of a pass
            activations += first // subject.layers * part["tokens"] // context
        largest = max(subject.weights["vision"], subject.decoder_bytes // subject.layers)
    elif gpu:
        outside = subject.shareable_bytes if shared else 0  # stored once for the engines of traverse and step
        weights = sum(subject.weights[name] for name in graphs) - outside
        activations = sum(max(subject.graphs[name].peak_bytes(**longest), _held(subject, name)) for name in graphs)
        if not TARGETS[machine.target].in_place:  # the new rows of a part of a prompt, of both sets
            activations += (first + second) * min(GIVEN, context) // context
        largest = max(subject.weights["vision"], subject.weights["traverse"] - outside)
    else:
        weights = subject.weights["vision"] + subject.decoder_bytes
        one = dict(dims) | {"images": min(1, dims["images"])}  # tiles are encoded one at a time
        activations = max(subject.graphs[name].peak_bytes(**one) for name in graphs)
        largest = 0
    return Memory(
        weights=weights,
        embedding=subject.embedding_bytes if TARGETS[machine.target].shares_memory else 0,
        cache=first + (second if reuse else 0 if gpu and not by_layer else first // subject.layers),
        cache_sets=2 if reuse else 1,
        activations=activations,
        runtime=RUNTIME_BYTES["gpu" if gpu else "cpu"],
        system=machine.os_bytes + (machine.desktop_bytes if desktop else 0),
        usable=machine.memory_bytes,
        build=build_bytes(largest) if largest and not TARGETS[machine.target].rtx else 0,
    )
