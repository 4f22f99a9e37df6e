"""The self-test in a bundle, `selftest.safetensors`: inputs, and samples of the FP32 reference's results.

Export writes it, `verify` replays it. A prompt is traversed, then fixed tokens are stepped after it. The most probable
token is recorded at each place but never fed back, so one difference does not hide later ones. Only some of a picture's
feature rows are in the prompt, because a prompt of 1300 tokens would make a first start wait for minutes and prove no
more.

Axes: M image tokens of the prompt, S tokens of the prompt, n stepped tokens, R sampled rows, L layers, G key/value
heads, E head size, D hidden, V vocabulary, N squares of the picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle import probes
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import SELFTEST
from trol_edge.bundle.weights import WeightsFile
from trol_edge.errors import BundleError
from trol_edge.prompt.images import MAX_PIXELS, count_tiles
from trol_edge.reading import guard, listing

MOST_FORCED = 8  # tokens of a forced prompt
Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class SelfTestCase:
    """One prompt and the tokens stepped after it. "long" has no picture and uses the long rope factors."""

    ids: Int32  # [S]
    forced: Int32  # [n] tokens that are stepped
    positions: Int32  # [R] rows of the prompt in the cache that are recorded
    cache: Float32  # [2, L, 2, R, G*E]: first and second pass; keys and values
    step_cache: Float32  # [L, 2, G*E]: keys and values of the last stepped token
    logits: Float32  # [2, V]: after the prompt, and after the last stepped token
    best: Int32  # [n+1] the most probable token after the prompt and after each stepped one
    margin: Float32  # [n+1] difference between its logit and the second largest


@dataclasses.dataclass(frozen=True)
class ForcedGraph:
    """What one graph computes where the input of every Linear is forced to a pattern; see trol_edge.bundle.probes.

    C cuts in the order of computation, P passes, B numbers in a summary. The prompt of a decoder's graph is made up,
    the first half of it image tokens; "step" computes one token after that of "traverse". "vision" sees the picture.
    """

    names: NDArray[np.uint8]  # UTF-8, a line per cut: value, first Linear that reads it, number of that use
    tokens: Int32  # [C] tokens of the value
    widths: Int32  # [C] inputs of the Linear
    scales: Float32  # [C] factors of the patterns
    seen: Float32  # [C, probes.SEEN, B] summaries of what the graph itself computed there
    cache: Float32  # [P, L, 2, rows, B] summaries of keys and values; P is 0 for the tower
    output: Float32  # [rows, B] summaries of the logits, or of some rows of the image features
    scale: Float32  # [1] factor of the pattern that is the embeddings

    def cuts(self) -> list[tuple[str, str, int]]:
        """(name of the value, first Linear that reads it, number of that use) of each cut."""
        lines = [line.split("\t") for line in bytes(self.names).decode().split("\n")]
        return [(value, weight, int(use)) for value, weight, use in lines]


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """The contents of `selftest.safetensors`."""

    picture: NDArray[np.uint8]  # [H, W, 3] RGB
    pixel_rows: Int32  # rows, and columns, of pixel_values that are recorded
    pixels: Float32  # [N, 3, rows, columns]
    feature_rows: Int32  # [M] rows of the image features [N*T, D] that are in the prompt
    features: Float32  # [M, D]
    rope_rows: Int32  # rows of the rope tables, all sets
    rope: Float32  # [2, rows, E/2] cos and sin
    embeddings: Float32  # [n, D] embeddings of the stepped tokens
    cases: dict[str, SelfTestCase]  # "picture", and "long" if the rotary embedding has two factor sets
    # The arithmetic itself, by graph; empty for targets whose graphs cannot be cut. None for `stored` in bundles of
    # versions that held a device to the FP32 reference.
    forced: dict[str, ForcedGraph] = dataclasses.field(default_factory=dict)
    stored: Int32 | None = None  # [tensors by name, 2 * (SUMS + 1)]: the bits of probes.stored_sums
    # Results of tokenizer and prompt template for fixed texts, see trol_edge.prompt.probe. None without a tokenizer, or
    # in bundles of versions that did not record them.
    token_digests: NDArray[np.uint8] | None = None  # [B, 32]
    prompt_ids: Int32 | None = None  # ids of all prompts, one after another
    prompt_lengths: Int32 | None = None  # number of ids of each
    end_ids: Int32 | None = None  # ids that end an answer, in rising order


def read(bundle: Bundle) -> SelfTest:
    """Read the self-test of a bundle. Raises BundleError if it has none, or one that cannot be read."""
    if SELFTEST not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.folder}: has no self-test to check its numbers with (made by an older version, or with "
            "--no-selftest); export it again"
        )
    file = WeightsFile(bundle.path(SELFTEST))
    with guard(file.path, BundleError, "export the bundle again", "not a self-test of this version"):
        arrays = file.load(file.tensors, bundle.manifest.files[SELFTEST].sha256)
        forced = {}
        for graph in sorted({name.split(".")[1] for name in arrays if name.startswith("forced.")}):
            forced[graph] = ForcedGraph(
                **{f.name: arrays.pop(f"forced.{graph}.{f.name}") for f in dataclasses.fields(ForcedGraph)}
            )
        cases = {}
        for name in sorted({name.split(".")[0] for name in arrays if "." in name}, reverse=True):  # the picture first
            cases[name] = SelfTestCase(
                **{f.name: arrays.pop(f"{name}.{f.name}") for f in dataclasses.fields(SelfTestCase)}
            )
        test = SelfTest(**arrays, cases=cases, forced=forced)
        if wrong := list(_contradictions(test, bundle)):
            raise ValueError(listing(wrong))
        return test


def _contradictions(test: SelfTest, bundle: Bundle) -> Iterator[str]:
    """Yield where a self-test contradicts its bundle's model: wrong shapes, and rows that do not exist."""
    manifest = bundle.manifest
    spec, image = manifest.spec, manifest.image
    if "picture" not in test.cases or test.cases.keys() - {"picture", "long"}:
        yield f"its cases are {', '.join(test.cases)}"
    if ("long" in test.cases) > (spec.long_rope is not None):
        yield "it has a case with long rope factors, but the model has none"
    if test.picture.ndim != 3 or test.picture.shape[2:] != (3,) or not 1 <= test.picture.size <= 3 * MAX_PIXELS:
        yield f"its picture is {list(test.picture.shape)}"
        return
    squares = sum(count_tiles([test.picture], image))
    wanted: dict[str, tuple[int, ...]] = {
        "pixels": (squares, 3, len(test.pixel_rows), len(test.pixel_rows)),
        "features": (len(test.feature_rows), spec.hidden_size),
        "rope": (2, len(test.rope_rows), spec.head_dim // 2),
    }
    below = {
        "pixel_rows": image.size,
        "feature_rows": squares * spec.vision.tokens_per_image,
        "rope_rows": bundle.weights().tensors["rope.cos"].shape[0],
    }
    forced = {len(case.forced) for case in test.cases.values()}
    wanted["embeddings"] = (max(forced), spec.hidden_size)
    yield from _differences(test, "", wanted, below)
    if test.stored is not None and (test.stored.dtype != np.int32 or test.stored.shape[1:] != (2 * (probes.SUMS + 1),)):
        yield f"its stored sums are {list(test.stored.shape)}"
    for graph, record in test.forced.items():
        yield from _forced_contradictions(graph, record, bundle)
    for name, case in test.cases.items():
        steps, positions = len(case.forced), len(case.positions)
        width = spec.num_kv_heads * spec.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "cache": (2, spec.num_layers, 2, positions, width),
            "step_cache": (spec.num_layers, 2, width),
            "logits": (2, spec.vocab_size),
            "best": (steps + 1,),
            "margin": (steps + 1,),
        }
        limits = {
            "ids": spec.embedding_rows,
            "forced": spec.embedding_rows,
            "positions": len(case.ids),
            "best": spec.vocab_size,
        }
        yield from _differences(case, f"{name}.", shapes, limits)
        pictured = int((case.ids == spec.image_token_id).sum())
        if not 1 <= len(case.ids) <= manifest.context - steps or steps < 1:
            yield f"{name} has {len(case.ids)} tokens and {steps} steps for a context of {manifest.context}"
        if pictured not in (0, len(test.feature_rows)) or (pictured and name == "long"):
            yield f"{name} has {pictured} image tokens, of {len(test.feature_rows)} rows of features"


def _forced_contradictions(graph: str, forced: ForcedGraph, bundle: Bundle) -> Iterator[str]:
    """Yield where the record of a graph contradicts the model, or asks for more memory than its graphs take."""
    spec = bundle.manifest.spec
    if graph not in bundle.manifest.graphs:
        yield f"it forces a graph {graph!r:.40}, which there is not"
        return
    v, count = spec.vision, len(forced.cuts())
    layers = 0 if graph == "vision" else spec.num_layers
    passes = {"vision": 0, "step": 1}.get(graph, 2)
    rows = forced.cache.shape[3] if forced.cache.ndim == 5 else 0
    shapes = {
        "tokens": (count,),
        "widths": (count,),
        "scales": (count,),
        "seen": (count, probes.SEEN, probes.BUCKETS),
        "cache": (passes, layers, 2, min(rows, probes.SEEN), probes.BUCKETS),
        "scale": (1,),
    }
    widest = max(4 * v.hidden_size, v.intermediate_size, spec.hidden_size, spec.intermediate_size)
    limits = {
        "tokens": max(4 * v.tokens_per_image + 2, MOST_FORCED + 1),
        "widths": max(widest, spec.num_heads * spec.head_dim) + 1,
    }
    yield from _differences(forced, f"forced.{graph}.", shapes, limits)
    if forced.output.shape[1:] != (probes.BUCKETS,) or (graph != "vision" and not 1 <= forced.tokens[0] <= MOST_FORCED):
        yield f"forced.{graph} has {forced.tokens[:1].tolist()} tokens and a result {list(forced.output.shape)}"


def _differences(
    part: object, name: str, shapes: Mapping[str, tuple[int, ...]], limits: Mapping[str, int]
) -> Iterator[str]:
    """Describe arrays of another shape than in `shapes`, and whole numbers that are not 0..limit-1 in one dimension."""
    for field, shape in shapes.items():
        array = getattr(part, field)
        if array.shape != shape:
            yield f"{name}{field} is {list(array.shape)} instead of {list(shape)}"
    for field, limit in limits.items():
        array = getattr(part, field)
        if array.ndim != 1 or array.dtype != np.int32 or not array.size or not 0 <= array.min() <= array.max() < limit:
            yield f"{name}{field} is not a list of numbers 0..{limit - 1}"


def tensors(test: SelfTest) -> dict[str, NDArray[Any]]:
    """The arrays of a self-test by their names in the file."""
    flat = {f.name: getattr(test, f.name) for f in dataclasses.fields(test) if f.name not in ("cases", "forced")}
    flat = {name: array for name, array in flat.items() if array is not None}
    for name, case in test.cases.items():
        flat |= {f"{name}.{f.name}": getattr(case, f.name) for f in dataclasses.fields(case)}
    for graph, forced in test.forced.items():
        flat |= {f"forced.{graph}.{f.name}": getattr(forced, f.name) for f in dataclasses.fields(forced)}
    return flat
