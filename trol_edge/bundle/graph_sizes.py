"""Bounds the memory that a graph's tensors take, before anything runs it.

A graph of allowed operators could make tensors of any size. So the rules of shapes are applied to intervals, from the
largest inputs that a run may give (trol_edge/bundle/graph_shapes.py), and a graph is refused if a tensor has no bound,
or if its tensors may be larger than a few times what a model of the declared shape needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

from trol_edge.bundle.graph_file import GraphFile, Node
from trol_edge.bundle.graph_shapes import Interval, Value, constant, outputs_of, value_of
from trol_edge.bundle.spec import ModelSpec
from trol_edge.reading import printable, reason

PREFILL_CHUNK = 256  # tokens of a prompt that are computed at a time, if a call says nothing else


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers that a graph's nodes make, with the scratch memory of their kernels.

    peak: alive together, in the order of the file, the most at the node `where`. total: if none were freed.
    """

    peak: int
    total: int
    where: str


@dataclasses.dataclass(frozen=True)
class Work:
    """Most numbers alive together in a graph, for a few counts of tokens (or tiles) in ascending order."""

    peaks: tuple[tuple[int, int], ...]

    def at(self, count: int) -> int:
        """The most for this many tokens (or tiles), at most the last of the counts.

        Between two counts it is on the line between them: sizes are sums of products, which no line is below.
        """
        before = self.peaks[0]
        for after in self.peaks:
            if count <= after[0]:
                part = (count - before[0]) / max(1, after[0] - before[0])
                return math.ceil(before[1] + (after[1] - before[1]) * max(0.0, part))
            before = after
        return before[1]


def tensors(
    file: GraphFile, most: Mapping[str, int], others: int, spans: Mapping[str, Interval]
) -> Iterator[tuple[Node, list[Value], int]]:
    """Yield each node of a graph with what is known of its outputs, and numbers in the scratch memory of its kernel.

    most: largest size of dynamic dimensions; others: of those that it does not name. spans: of the whole numbers in
    inputs. Raises ValueError if nothing bounds a tensor, or a node is not as ONNX has it.
    """
    known: dict[str, Value] = {}
    for name, (_, shape) in file.inputs.items():
        dims = [(d, d) if isinstance(d, int) else (1, most.get(d, others)) for d in shape]
        known[name] = value_of(dims, span=spans.get(name))
    known |= {name: constant(tensor) for name, tensor in file.constants.items()}
    for node in file.nodes:
        try:
            found, scratch = outputs_of(node, known)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"nothing bounds the size of what {_title(node)} makes: {reason(error)}") from error
        known.update(zip(node.outputs, found, strict=False))
        yield node, found, scratch


def sizes(file: GraphFile, most: Mapping[str, int], others: int, spans: Mapping[str, Interval]) -> Sizes:
    """Add up the tensors of a graph (see `tensors`)."""
    # Outputs of a fixed size are written where the caller says: caches in place, and logits.
    given = {
        name: math.prod(d for d in shape if isinstance(d, int))
        for name, (_, shape) in file.outputs.items()
        if all(isinstance(d, int) for d in shape)
    }
    last = {name: i for i, node in enumerate(file.nodes) for name in node.inputs}
    last |= dict.fromkeys(file.outputs, len(file.nodes))
    freed: dict[int, int] = defaultdict(int)  # node -> numbers that are not read after it
    alive, peak, total, where = 0, 0, 0, ""
    for i, (node, found, scratch) in enumerate(tensors(file, most, others, spans)):
        for name, value in zip(node.outputs, found, strict=False):
            size = max(0, value.size - given.get(name, 0))
            alive += size
            freed[last.get(name, i)] += size
        if alive + scratch > peak:
            peak, where = alive + scratch, _title(node)
        total += scratch + sum(value.size for value in found)
        alive -= freed.pop(i, 0)
    return Sizes(peak, total, where)


def _title(node: Node) -> str:
    return f"{node.kind} {printable(node.outputs[0] if node.outputs else '')!r:.80}"


# How many times what one layer needs may be alive together, and be made by each layer. No graph that export writes
# reaches half of it, in any family, precision and target, at the published widths (tests/test_graph_sizes.py).
MOST_ALIVE, MOST_MADE = 4, 6


def work(name: str, file: GraphFile, spec: ModelSpec, tiles: int, context: int, weights: int) -> Work:
    """Bound a graph of a bundle, and compare it with what a model of this shape needs.

    tiles: most pictures or tiles at a time. weights: numbers in the weights file. Raises ValueError if a tensor has no
    bound, or if tensors may be larger than a few times what is needed.
    """
    positions = (0, context - 1)
    spans = {"position_ids": positions, "slots": positions, "rope_offset": (0, context)}
    layers = spec.vision.num_layers if name == "vision" else (1 if name == "step" else 2) * spec.num_layers
    peaks = []
    counts = {"vision": {1, tiles}, "step": {1}}.get(name, {min(PREFILL_CHUNK, context), context})
    for count in sorted(counts):
        vision = name == "vision"
        found = sizes(file, {} if vision else {"tokens": count}, count if vision else context, spans)
        layer = _needed(name, spec, context, count)
        if found.peak > MOST_ALIVE * layer + 2 * weights:
            raise ValueError(
                f"tensors at {found.where} are larger than a model of this shape needs ({found.peak} numbers)"
            )
        if found.total > MOST_MADE * (layers * layer + weights):
            raise ValueError(
                f"all its tensors together are larger than a model of this shape needs ({found.total} numbers)"
            )
        peaks.append((count, found.peak))
    return Work(tuple(peaks))


def _needed(name: str, spec: ModelSpec, context: int, count: int) -> int:
    """Numbers that one layer works on at a time, for tiles or tokens: scores, and its widest tensors side by side."""
    if name == "vision":
        tower = spec.vision
        patches = (tower.image_size // tower.patch_size) ** 2 + 1
        scores = tower.num_heads * patches * 2 * patches
        width = 8 * tower.hidden_size + 3 * tower.intermediate_size
        pixels = 3 * 2 * tower.image_size**2
        return count * (scores + patches * width + pixels + tower.tokens_per_image * 4 * spec.hidden_size)
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    scores = spec.num_heads * context * 2 * (count + spec.head_dim)
    return scores + count * (4 * spec.hidden_size + 3 * spec.intermediate_size + 2 * qkv) + 2 * spec.vocab_size
