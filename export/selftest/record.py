"""Records the self-test of a bundle: what its arithmetic gives, and how far that is from the FP32 reference.

The reference runs on the published checkpoint, before folding and rounding. Then the same modules run on the weights
that were written, with every input rounded as the bundle's graphs round it (see emulation.py); a device is held to
that. Each takes one pass, with one layer's weights in memory at a time. The tokens that are stepped after a prompt are
chosen beforehand, so they follow it through each layer, and no layer is read again for each of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from trol_edge.bundle import probes
from trol_edge.bundle.names import TOKENIZER, WEIGHTS
from trol_edge.bundle.precision import PrecisionPlan
from trol_edge.bundle.selftest import MOST_FORCED, ForcedGraph, SelfTest, SelfTestCase, tensors
from trol_edge.bundle.spec import ModelSpec
from trol_edge.bundle.weights import WeightsFile
from trol_edge.errors import CheckpointError
from trol_edge.export import scenes
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.layerwise import Layerwise, rope_of
from trol_edge.export.reference.model import EagerAttention, graph_rope_tables
from trol_edge.export.selftest.emulation import STEP, Emulation, Seen, stacked
from trol_edge.export.selftest.written import Written
from trol_edge.export.storage import Progress
from trol_edge.prompt import probe
from trol_edge.prompt.images import count_tiles, preprocess
from trol_edge.prompt.template import build_prompt, end_ids
from trol_edge.prompt.tokenizer import Tokenizer

# A rendered scene of the kind that default calibration uses, but a different one, within the range of the scales.
SCENE = 3 * scenes.HELD_OUT_SEED
QUESTION, ANSWER = "Describe the scene.", "from left to right: a small blue circle, a large red star"
STEPS = 8
IMAGE_TOKENS = 32  # feature rows in the prompt
LEAST_ROOM = 8  # shortest prompt in tokens; a bundle with less context gets no self-test
CACHE_BYTES = 2_000_000  # bytes of recorded rows, both passes, all layers ...
MOST_ROWS, LEAST_ROWS = 8, 2  # ... within these numbers of rows


def record(
    source: Checkpoint,
    path: Path,
    context: int,
    tokenizer: Tokenizer | None,
    progress: Progress,
    plan: PrecisionPlan,
    emulation: Emulation,
) -> dict[str, float] | None:
    """Write the self-test of the bundle whose weights file is beside `path`, for a cache of `context` tokens.

    Returns how far its precision is from FP32 (see `distances`), or None if the context is too short for a self-test.
    Without a tokenizer the tokens are chosen at random. Raises CheckpointError if the reference itself is not finite.
    """
    rope = source.spec.long_rope
    room = (rope.short_rows(context) if rope else context) - STEPS
    if room < LEAST_ROOM:
        return None
    weights = path.parent / WEIGHTS
    with torch.no_grad():
        reference = _Run(source, source, context, room, tokenizer, None).test(lambda w, d, t: progress(w, d, 2 * t))
        written = Written(weights, source, plan)
        test = _Run(source, written, context, room, tokenizer, emulation).test(
            lambda w, d, t: progress(w, t + d, 2 * t)
        )
    file = WeightsFile(weights)
    sums = probes.stored_sums(file, sorted(file.tensors))
    test = dataclasses.replace(test, stored=np.stack([sums[name] for name in sorted(sums)]).view(np.int32))
    if tokenizer is not None:
        test = dataclasses.replace(test, **_words(tokenizer, path.parent / TOKENIZER, source))
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in tensors(test).items()}))
    return distances(test, reference)


def distances(test: SelfTest, reference: SelfTest) -> dict[str, float]:
    """The largest drift of each kind of value between two self-tests, and the share of equal best tokens."""
    found = {"vision": probes.drift(test.features, reference.features)}
    pairs = [(case, reference.cases[name]) for name, case in test.cases.items()]
    for kind, name in enumerate(("keys", "values")):
        found[name] = max(
            probes.drift(one[..., kind, :, :][part], other[..., kind, :, :][part])
            for case, standard in pairs
            for one, other in (
                (case.cache, standard.cache),
                (case.step_cache[None, ..., None, :], standard.step_cache[None, ..., None, :]),
            )
            for part in np.ndindex(one.shape[:2])
        )
    found["logits"] = max(
        probes.drift(probes.centred(case.logits[i]), probes.centred(standard.logits[i]))
        for case, standard in pairs
        for i in range(2)
    )
    same = [case.best == standard.best for case, standard in pairs]
    return found | {"tokens": float(np.concatenate(same).mean())}


def picture(wide: bool) -> NDArray[np.uint8]:
    """A rendered scene, uint8 [112, 112, 3], or two of them side by side (wide), which models with tiles cut up."""
    return np.concatenate([scenes.render(SCENE + i)[0] for i in range(1 + wide)], axis=1)


def _prompt(source: Checkpoint, tokenizer: Tokenizer | None, tiles: list[int], room: int) -> tuple[Any, Any, Any]:
    """Ids of a prompt of at most `room` tokens, with at most IMAGE_TOKENS of the picture, and ids of an answer."""
    spec = source.spec
    images = min(IMAGE_TOKENS, room // 2)
    if tokenizer is None:
        ids = np.random.default_rng(0).integers(0, min(spec.vocab_size, spec.image_token_id), 48)
        before, after, forced = ids[:20], ids[20 : 48 - STEPS], ids[48 - STEPS :]
    else:
        template = source.family.prompt(spec)
        prompt = np.array(build_prompt(tokenizer, template, QUESTION, tiles))
        whole = np.array(build_prompt(tokenizer, template, QUESTION, tiles, ANSWER))
        (at,) = np.nonzero(prompt == spec.image_token_id)
        before, after = prompt[: at[0]], prompt[at[-1] + 1 :]
        forced = np.resize(whole[len(prompt) :], STEPS)
    after = after[-(room - images + 1) // 2 :]
    before = before[max(0, len(before) - (room - images - len(after))) :]
    return (
        np.concatenate((before, np.full(images, spec.image_token_id), after)),
        np.concatenate((before, after)),
        forced,
    )


class _Sequence:
    """One case on its way through the layers."""

    def __init__(
        self,
        ids: NDArray[Any],
        forced: NDArray[Any],
        long: bool,
        spec: ModelSpec,
        begin: Callable[[str], None],
        graph: str,
    ) -> None:
        self.ids, self.forced, self.graph, self._begin = ids, forced, graph, begin
        self.mask = torch.from_numpy(ids == spec.image_token_id)
        self.attend = EagerAttention(spec, *rope_of(spec, len(ids) + STEPS, long))
        row = 2 * 4 * spec.kv_values_per_token  # both sets, float32
        count = min(max(CACHE_BYTES // row, LEAST_ROWS), MOST_ROWS, len(ids))
        self.positions = np.unique(np.linspace(len(ids) - 1, len(ids) // 2, count).astype(np.int32))
        self.cache: list[Tensor] = []
        self.step_cache: list[Tensor] = []
        self.x = self.steps = torch.empty(0)

    def through(self, model: Layerwise, layer: Any, name: str, twice: bool) -> None:
        """Run one decoder layer, the prompt in its passes and then the stepped tokens in one. twice: see Layerwise."""
        attend, end = self.attend, len(self.ids)
        lora = self.mask.float()[None, :, None] if bool(self.mask.any()) and model.spec.lora_rank else None
        attend.positions = torch.arange(end)
        self._begin(self.graph)
        self.x = model.traverse(layer, 0, self.x, lora, attend, twice)[2]
        attend.positions = torch.arange(end, end + STEPS)
        self._begin(STEP)
        self.steps = layer(self.steps, None, 0, 0, attend)
        for hidden in (self.x, self.steps):
            _require_finite(name, hidden)
        rows: list[Any] = []  # [pass][keys, values] of [T, G*E]
        for traversal in (0, 1):
            keys, values = attend.keys[traversal], attend.values[traversal]
            if traversal and not twice:
                rows.append([torch.zeros_like(t) for t in rows[0]])
                continue
            assert keys[0] is not None and values[0] is not None
            rows.append([t[0].transpose(0, 1).flatten(1) for t in (keys[0], values[0])])
            keys[0] = values[0] = None  # the next layer uses the same place again
        self.cache.append(torch.stack([torch.stack([t[self.positions] for t in kind]) for kind in rows]))
        self.step_cache.append(torch.stack([t[-1] for t in rows[0]]))

    def case(self, logits: Tensor) -> SelfTestCase:
        """Make the case; logits [n+1, V] are those after the prompt and after each stepped token."""
        top = logits.topk(2, dim=-1)
        return SelfTestCase(
            ids=self.ids.astype(np.int32),
            forced=self.forced.astype(np.int32),
            positions=self.positions,
            cache=torch.stack(self.cache, dim=1).numpy(),
            step_cache=torch.stack(self.step_cache).numpy(),
            logits=logits[[0, -1]].numpy(),
            best=top.indices[:, 0].numpy().astype(np.int32),
            margin=(top.values[:, 0] - top.values[:, 1]).numpy(),
        )


class _Forced:
    """A short made-up prompt, with every Linear's input forced, on its way through the layers; see emulation.py."""

    def __init__(self, graph: str, emulation: Emulation, spec: ModelSpec, tokens: int) -> None:
        self.graph, self._emulation, self.tokens = graph, emulation, tokens
        self.seen, self.step_seen = Seen(), Seen()
        self.attend = EagerAttention(spec, *rope_of(spec, tokens + 1, False))
        mask = graph == "traverse" and spec.lora_rank
        self._mask = (torch.arange(tokens) < (tokens + 1) // 2).float()[None, :, None] if mask else None
        self.x = self.step = torch.empty(0)
        self._cache: list[Any] = []
        self._step_cache: list[Any] = []

    def start(self, scale: float) -> None:
        """Begin with an input of this size."""
        self.scale = np.float32(scale)
        width = self.attend.spec.hidden_size
        rows = probes.pattern("inputs_embeds", width)[np.arange(self.tokens + 1) % probes.ROWS] * self.scale
        self.x, self.step = torch.from_numpy(rows[None, :-1]), torch.from_numpy(rows[None, -1:])

    def through(self, model: Layerwise, layer: Any, twice: bool) -> None:
        """Run one decoder layer, its passes over the prompt and then one token after it. twice: see Layerwise."""
        attend, rows = self.attend, list[Any]()
        self._emulation.begin(self.graph, self.seen)
        attend.positions = torch.arange(self.tokens)
        self.x = model.traverse(layer, 0, self.x, self._mask, attend, twice)[2]
        for traversal in (0, 1) if twice else (0,):
            rows.append([_summary(t[traversal][0], probes.seen(self.tokens)) for t in (attend.keys, attend.values)])
        if not twice:
            rows.append([np.zeros_like(part) for part in rows[0]])
        if self.graph == "traverse":
            self._emulation.begin(STEP, self.step_seen)
            attend.positions = torch.arange(self.tokens, self.tokens + 1)
            self.step = layer(self.step, None, 0, 0, attend)
            at = np.array([self.tokens])
            self._step_cache.append([_summary(t[0][0], at) for t in (attend.keys, attend.values)])
        for traversal in (0, 1):
            attend.keys[traversal][0] = attend.values[traversal][0] = None
        self._cache.append(rows)

    def graphs(self, logits: NDArray[Any], step_logits: NDArray[Any]) -> Iterator[tuple[str, ForcedGraph]]:
        """The records of this run; logits [1, V]."""
        cache, scale = np.swapaxes(np.array(self._cache), 0, 1), self.scale.reshape(1)
        output = probes.summary(logits)
        yield self.graph, ForcedGraph(**stacked(self.seen), cache=cache, output=output, scale=scale)
        if self.graph == "traverse":
            cache, output = np.array(self._step_cache)[None], probes.summary(step_logits)
            yield STEP, ForcedGraph(**stacked(self.step_seen), cache=cache, output=output, scale=scale)


def _summary(rows: Tensor | None, at: NDArray[np.int64]) -> NDArray[np.float32]:
    """Summaries of some rows of keys or values [1, G, T, E]."""
    assert rows is not None
    return probes.summary(rows[0].transpose(0, 1).flatten(1)[torch.from_numpy(at)].numpy())


class _Run:
    """The model on one set of weights: a checkpoint's, or those of a bundle with its arithmetic."""

    def __init__(
        self,
        source: Checkpoint,
        weights: Checkpoint | Written,
        context: int,
        room: int,
        tokenizer: Tokenizer | None,
        emulation: Emulation | None,
    ) -> None:
        self._source, self._weights, self._context, self._emulation = source, weights, context, emulation
        self._spec, self._model = source.spec, Layerwise(weights)
        self._image = source.family.image(self._spec)
        self._picture = picture(wide=self._image.most_tiles > 1)
        prompt = _prompt(source, tokenizer, count_tiles([self._picture], self._image), room)
        self._ids, self._text, self._answer = prompt

    @contextlib.contextmanager
    def _part(self, stage: str) -> Iterator[Any]:
        """A part of the model, with its Linears emulated."""
        prefix = "vision" if stage in ("vision.embed", "vision.features") else stage
        with (
            self._model.part(stage) as module,
            self._emulation.part(module, prefix) if self._emulation else contextlib.nullcontext(),
        ):
            yield module

    def _begin(self, graph: str, seen: Seen | None = None) -> None:
        if self._emulation is not None:
            self._emulation.begin(graph, seen)

    def test(self, progress: Progress) -> SelfTest:
        """Run everything."""
        spec, ids, forced_ids = self._spec, self._ids, self._answer
        stages = spec.vision.num_layers + spec.num_layers + 1
        pixels = preprocess([self._picture], self._image)
        forced = self._emulation is not None and self._emulation.forced
        seen = Seen()
        with self._part("vision.embed") as tower:
            x = tower.embed(torch.from_numpy(pixels))
            y = x[:1]
        for i in range(spec.vision.num_layers):
            with self._part(f"vision.layers.{i}") as layer:
                self._begin("vision")
                x = layer(x)
                if forced:
                    self._begin("vision", seen)
                    y = layer(y)
            progress("selftest", i + 1, stages)
        with self._part("vision.features") as tower:
            self._begin("vision")
            x = tower.features(x).flatten(0, 1)
            if forced:
                self._begin("vision", seen)
                y = tower.features(y)[0]
        _require_finite("vision.features", x)
        records: dict[str, ForcedGraph] = {}
        if forced:
            nothing, rows = np.zeros((0, 0, 2, 0, probes.BUCKETS), np.float32), probes.seen(len(y))
            output = probes.summary(y[torch.from_numpy(rows)].numpy())
            records["vision"] = ForcedGraph(
                **stacked(seen), cache=nothing, output=output, scale=np.zeros(1, np.float32)
            )
        feature_rows = np.linspace(0, len(x) - 1, int((ids == spec.image_token_id).sum())).astype(np.int32)
        features = x[feature_rows]

        sequences = {"picture": _Sequence(ids, forced_ids, False, spec, self._begin, self._graph(True))}
        if spec.long_rope:
            sequences["long"] = _Sequence(self._text, forced_ids, True, spec, self._begin, self._graph(False))
        for sequence in sequences.values():
            embedded = self._model.embeddings(np.concatenate((sequence.ids, forced_ids)))
            sequence.x, sequence.steps = embedded[None, : len(sequence.ids)], embedded[None, len(sequence.ids) :]
            if bool(sequence.mask.any()):
                sequence.x[0, sequence.mask] = features
        embeddings = sequences["picture"].steps[0].clone()
        made_up: list[_Forced] = []
        if forced:
            assert self._emulation is not None
            tokens, scale = min(MOST_FORCED, self._context - 1), float(embeddings.square().mean().sqrt()) / probes.SMALL
            made_up = [
                _Forced(graph, self._emulation, spec, tokens)
                for graph in dict.fromkeys((self._graph(True), self._graph(False)))
            ]
            for one in made_up:
                one.start(scale)
        for i in range(spec.num_layers):
            name, twice = f"decoder.layers.{i}", i in spec.second_layers
            rounding = self._weights.rounding(i) if isinstance(self._weights, Written) else None
            for attend in (*(s.attend for s in sequences.values()), *(one.attend for one in made_up)):
                attend.rounding = rounding
            with self._part(name) as layer:
                for sequence in sequences.values():
                    sequence.through(self._model, layer, name, twice)
                for one in made_up:
                    one.through(self._model, layer, twice)
            progress("selftest", spec.vision.num_layers + i + 1, stages)
        logits, more = self._logits(list(sequences.values()), made_up)
        progress("selftest", stages, stages)
        for one in made_up:
            records |= dict(one.graphs(*more[one.graph]))

        rope = torch.stack(graph_rope_tables(spec, self._context))
        rope_rows = np.unique(np.linspace(0, rope.shape[1] - 1, 32).astype(np.int32))
        side = self._image.size
        pixel_rows = np.arange(side // 32 // 2, side, max(1, side // 32)).astype(np.int32)
        return SelfTest(
            picture=self._picture,
            pixel_rows=pixel_rows,
            pixels=pixels[:, :, pixel_rows][..., pixel_rows],
            feature_rows=feature_rows,
            features=features.numpy(),
            rope_rows=rope_rows,
            rope=rope[:, rope_rows].numpy(),
            embeddings=embeddings.numpy(),
            cases={n: s.case(part) for (n, s), part in zip(sequences.items(), logits, strict=True)},
            forced=records,
        )

    def _graph(self, pictured: bool) -> str:
        """The graph that runs a prompt with or without a picture."""
        return "traverse" if pictured or not self._spec.lora_rank else "traverse_text"

    def _logits(self, sequences: list[_Sequence], made_up: list[_Forced]) -> tuple[list[Tensor], dict[str, Any]]:
        """Logits [n+1, V] of each sequence, and ([1, V] of the prompt, [1, V] of the step) of each forced run.

        The output layer is read once, for all of them.
        """
        name = "decoder.lm_head.weight"
        parts: list[tuple[str, Tensor, Seen | None]] = []
        with self._part("decoder.norm") as norm:
            for s in sequences:
                parts += [(s.graph, norm(s.x[:, -1:]), None), (STEP, norm(s.steps), None)]
            for one in made_up:
                parts.append((one.graph, norm(one.x[:, -1:]), one.seen))
                if one.graph == "traverse":
                    parts.append((STEP, norm(one.step), one.step_seen))
        rows: dict[bool, list[tuple[int, Tensor]]] = {}
        for i, (graph, x, seen) in enumerate(parts):
            self._begin(graph, seen)
            derived = self._emulation is not None and self._emulation.is_derived(name)
            rows.setdefault(derived, []).append((i, self._emulation.input(name, x)[0] if self._emulation else x[0]))
        found: dict[int, Tensor] = {}
        for derived, group in rows.items():
            made = self._product(name, torch.cat([x for _, x in group]), derived)
            found |= dict(zip((i for i, _ in group), made.split([len(x) for _, x in group]), strict=True))
        count = 2 * len(sequences)
        logits = [torch.cat((found[i], found[i + 1])) for i in range(0, count, 2)]
        more: dict[str, Any] = {}
        for one in made_up:
            steps = one.graph == "traverse"
            more[one.graph] = (found[count].numpy(), found[count + steps].numpy())
            count += 1 + steps
        return logits, more

    def _product(self, name: str, x: Tensor, derived: bool) -> Tensor:
        if isinstance(self._weights, Written):
            return self._weights.product(name, x, derived)
        return torch.cat([F.linear(x, block.float()) for _, block in self._weights.blocks(name)], dim=1)


def _words(tokenizer: Tokenizer, file: Path, source: Checkpoint) -> dict[str, Any]:
    """The results of tokenizer (in its bundled file, too) and prompt template for fixed texts."""
    spec, template = source.spec, source.family.prompt(source.spec)
    prompts = probe.prompt_ids(tokenizer, template)
    return {
        "token_digests": probe.token_digests(tokenizer, file.read_text(encoding="utf-8"), spec.vocab_size),
        "prompt_ids": np.concatenate(prompts).astype(np.int32),
        "prompt_lengths": np.array([len(ids) for ids in prompts], np.int32),
        "end_ids": np.array(sorted({spec.eos_token_id} | end_ids(tokenizer, template)), np.int32),
    }


def _require_finite(name: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise CheckpointError(
            f"NaN or infinite activations after {name} in the float32 reference: the checkpoint's weights are damaged "
            "or too large; download it again, or export with --no-selftest"
        )
